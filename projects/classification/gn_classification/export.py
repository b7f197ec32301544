"""The backbone of a classifier as a file that ``MODEL.WEIGHTS`` of a detector takes."""

from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from gn_practical.layers import WSConv2d
from gn_practical.layers.protocol import norm_channels, norm_groups
from gn_practical.training.atomic import replace_file
from gn_practical.weights.description import Description, Standardization

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
    description = describe_backbone(model.backbone, cfg)
    content: dict[str, Any] = {
        "model": weights,
        "matching_heuristics": True,  # a detector's names begin otherwise: backbone.bottom_up.
        "num_groups": description.num_groups,
        "description": description.to_dict(),
    }
    with replace_file(path) as temporary:
        torch.save(content, temporary)


def describe_backbone(backbone: nn.Module, cfg: CfgNode) -> Description:
    """Describe a backbone for those who load its weights.

    Args:
        backbone: as built and bound.
        cfg: config of the classifier.
    """
    modules = dict(backbone.named_modules())
    pgn, standardized = cfg.MODEL.PGN, any(isinstance(m, WSConv2d) for m in modules.values())
    return Description(
        source="gn_practical's classification",
        input_format=cfg.INPUT.FORMAT,
        pixel_mean=tuple(cfg.MODEL.PIXEL_MEAN),
        pixel_std=tuple(cfg.MODEL.PIXEL_STD),
        stride_in_1x1=cfg.MODEL.RESNETS.STRIDE_IN_1X1,
        weight_standardization=standardized,
        standardization=Standardization() if standardized else None,
        num_groups={path: groups for path, m in modules.items() if (groups := norm_groups(m))},
        norm_eps=next((m.eps for m in modules.values() if norm_channels(m)), None),
        rule=str(pgn.NUM_GROUPS or pgn.RULE),
        config=cfg.dump(),
    )
