"""The config keys that weights need."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gn_practical.weights.description import Standardization
from gn_practical.weights.read import Weights
from gn_practical.weights.resnet_shape import resnet_keys


def config_keys(weights: Weights) -> dict[str, Any]:
    """Return the keys of a config that these weights decide, as far as they are known.

    Args:
        weights: as they were read or folded.

    Returns:
        {dotted key: value}, in the order to print them.
    """
    description = weights.description
    keys: dict[str, Any] = {"INPUT.FORMAT": description.input_format}
    for key in ("pixel_mean", "pixel_std"):
        value = getattr(description, key)
        keys[f"MODEL.{key.upper()}"] = value and list(value)
    for key, value in resnet_keys(weights.state).items():
        keys[f"MODEL.RESNETS.{key}"] = value
    if description.pooled_shortcuts:
        keys["MODEL.BACKBONE.NAME"] = "build_resnet_d_fpn_backbone"
    elif any(re.search(r"(^|\.)stem\.conv3\.weight$", key) for key in weights.state):
        keys["MODEL.RESNETS.STEM_TYPE"] = "deeplab"
    keys["MODEL.RESNETS.STRIDE_IN_1X1"] = description.stride_in_1x1
    norm = _norm(weights)
    keys["MODEL.RESNETS.NORM"] = norm
    if norm == "PGN" and isinstance(description.num_groups, int):
        keys["MODEL.PGN.NUM_GROUPS"] = description.num_groups
    if description.standardization in (None, Standardization()):
        keys["MODEL.WS.ENABLED"] = description.weight_standardization
    keys |= _detector_keys(weights.state, norm)
    return {key: value for key, value in keys.items() if value is not None}


def as_yaml(keys: Mapping[str, Any]) -> str:
    """Return keys as lines of a YAML config.

    Args:
        keys: {dotted key: value}, those of one node together.

    Example:
        >>> print(as_yaml({"INPUT.FORMAT": "RGB", "MODEL.RESNETS.DEPTH": 50}))
        INPUT:
          FORMAT: "RGB"
        MODEL:
          RESNETS:
            DEPTH: 50
    """
    lines: list[str] = []
    open_nodes: list[str] = []
    for key, value in sorted(keys.items(), key=lambda item: item[0].split(".")[:-1]):
        *nodes, name = key.split(".")
        same = 0
        while same < min(len(nodes), len(open_nodes)) and nodes[same] == open_nodes[same]:
            same += 1
        lines += [f"{'  ' * (same + i)}{node}:" for i, node in enumerate(nodes[same:])]
        open_nodes = nodes
        lines.append(f"{'  ' * len(nodes)}{name}: {_scalar(value)}")
    return "\n".join(lines)


def as_overrides(keys: Mapping[str, Any]) -> str:
    """Return keys as a command line takes them.

    Args:
        keys: {dotted key: value}.

    Example:
        >>> as_overrides({"MODEL.PIXEL_STD": [1.0, 1.0, 1.0], "INPUT.FORMAT": "BGR"})
        "MODEL.PIXEL_STD '[1.0, 1.0, 1.0]' INPUT.FORMAT BGR"
    """
    texts = {key: str(value) for key, value in keys.items()}
    return " ".join(f"{k} '{v}'" if " " in v else f"{k} {v}" for k, v in texts.items())


def _scalar(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _norm(weights: Weights) -> str | None:
    """Return the type of the backbone's norms; Detectron2's "GN" has 32 groups."""
    description = weights.description
    if description.norm == "BN":
        return "FrozenBN"
    if description.norm == "GN" and description.num_groups is not None:
        return "GN" if description.num_groups == 32 else "PGN"
    return None


def _detector_keys(state: Mapping[str, Tensor], norm: str | None) -> dict[str, Any]:
    keys: dict[str, Any] = {}
    output = state.get("backbone.fpn_output2.weight")
    if output is not None:
        keys["MODEL.FPN.OUT_CHANNELS"] = output.shape[0]
        keys["MODEL.FPN.NORM"] = norm if "backbone.fpn_output2.norm.weight" in state else ""
    scores = state.get("roi_heads.box_predictor.cls_score.weight")
    if scores is not None:
        keys["MODEL.ROI_HEADS.NUM_CLASSES"] = scores.shape[0] - 1
        keys |= _head_keys(state, "box_head", "conv", "FastRCNNConvFCHead", norm)
        layers = _layers(state, "box_head", "fc")
        keys["MODEL.ROI_BOX_HEAD.NUM_FC"] = len(layers)
        keys["MODEL.ROI_BOX_HEAD.FC_DIM"] = layers[0].shape[0] if layers else None
    if "roi_heads.mask_head.predictor.weight" in state:
        keys["MODEL.MASK_ON"] = True
        keys |= _head_keys(state, "mask_head", "mask_fcn", "MaskRCNNConvUpsampleHead", norm)
    return keys


def _head_keys(
    state: Mapping[str, Tensor], head: str, kind: str, name: str, norm: str | None
) -> dict[str, Any]:
    node = f"MODEL.ROI_{head.upper()}"
    convolutions = _layers(state, head, kind)
    keys: dict[str, Any] = {f"{node}.NAME": name, f"{node}.NUM_CONV": len(convolutions)}
    if convolutions:
        has_norm = f"roi_heads.{head}.{kind}1.norm.weight" in state
        keys[f"{node}.CONV_DIM"] = convolutions[0].shape[0]
        keys[f"{node}.NORM"] = norm if has_norm else ""
    return keys


def _layers(state: Mapping[str, Tensor], head: str, kind: str) -> list[Tensor]:
    pattern = rf"roi_heads\.{head}\.{kind}\d+\.weight"
    return [value for key, value in state.items() if re.fullmatch(pattern, key)]
