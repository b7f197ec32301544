"""The backbone of a classifier as a file that ``MODEL.WEIGHTS`` of a detector takes."""

from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from gn_practical.atomic import replace_file
from gn_practical.weights.describe import describe, describe_config

_PREFIX = "backbone."


def export_backbone(model: nn.Module, cfg: CfgNode, path: str) -> None:
    """Write the backbone's weights under Detectron2's names, with what they were trained with.

    Args:
        model: an ``ImageClassifier``, not wrapped for data parallelism.
        cfg: its config.
        path: of the file to write.
    """
    weights = {
        name.removeprefix(_PREFIX): value
        for name, value in model.state_dict().items()
        if name.startswith(_PREFIX)
    }
    description = replace(
        describe(model.backbone, describe_config(cfg)), source="gn_practical's classification"
    )
    content: dict[str, Any] = {
        "model": weights,
        "matching_heuristics": True,  # a detector's names begin otherwise: backbone.bottom_up.
        "num_groups": description.num_groups,
        "description": description.to_dict(),
    }
    with replace_file(path) as temporary:
        torch.save(content, temporary)
