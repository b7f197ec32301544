"""The sizes of a Detectron2 ResNet, read off its weights."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_DEPTHS = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}


def resnet_keys(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the keys of MODEL.RESNETS that a ResNet's shapes decide.

    Args:
        state: in Detectron2's names, with or without a prefix.

    Returns:
        {key without "MODEL.RESNETS.": value}; no DEPTH for a network that Detectron2 has no name
        for, and nothing where the state has no ResNet.
    """
    shapes = {
        match[1]: tuple(each.shape)
        for key, each in state.items()
        if (match := re.search(r"(?:^|\.)((?:stem|res\d\.\d+)\.\w+\.weight)$", key))
    }
    first = shapes.get("res2.0.conv1.weight")
    if first is None or "stem.conv1.weight" not in shapes:
        return {}
    bottleneck = "res2.0.conv3.weight" in shapes
    last = shapes["res2.0.conv3.weight" if bottleneck else "res2.0.conv2.weight"]
    groups = first[0] // shapes["res2.0.conv2.weight"][1]
    stem = "stem.conv3.weight" if "stem.conv3.weight" in shapes else "stem.conv1.weight"
    keys = {
        "DEPTH": _DEPTHS.get((bottleneck, _blocks(shapes))),
        "STEM_OUT_CHANNELS": shapes[stem][0],
        "RES2_OUT_CHANNELS": last[0],
        "NUM_GROUPS": groups if bottleneck else None,
        "WIDTH_PER_GROUP": first[0] // groups if bottleneck else None,
    }
    return {key: value for key, value in keys.items() if value is not None}


def _blocks(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    blocks = {match[0] for key in shapes if (match := re.match(r"res\d\.\d+", key))}
    return tuple(sum(each.startswith(f"res{stage}.") for each in blocks) for stage in range(2, 6))
