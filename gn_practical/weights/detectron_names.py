"""The blob names of Detectron and Caffe2, and the names of pycls."""

import re
from collections.abc import Mapping

import torch
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from torch import Tensor

from gn_practical.weights.patterns import VALUES, rename

_PYCLS_RESNET = (
    (r"stem\.conv\.weight", "stem.conv1.weight"),
    (rf"stem\.bn\.{VALUES}", r"stem.conv1.norm.\1"),
    (r"s(\d)\.b(\d+)\.f\.([abc])\.weight", r"res\1.\2.conv\3.weight"),
    (rf"s(\d)\.b(\d+)\.f\.([abc])_bn\.{VALUES}", r"res\1.\2.conv\3.norm.\4"),
    (r"s(\d)\.b(\d+)\.proj\.weight", r"res\1.\2.shortcut.weight"),
    (rf"s(\d)\.b(\d+)\.(?:bn|proj_bn)\.{VALUES}", r"res\1.\2.shortcut.norm.\3"),
    (r"head\.fc\.(weight|bias)", r"linear.\1"),
)


# Where the parts of a detector with FPN lie in Detectron2's.
_PARTS = (
    (r"(stem|res\d)\.", "backbone.bottom_up."),
    (r"fpn_", "backbone."),
    (r"(box_head|mask_head)\.", "roi_heads."),
    (r"(cls_score|bbox_pred)\.", "roi_heads.box_predictor."),
)


def are_blobs(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are Caffe2's: ``res2_0_branch2a_w``, ``conv1_gn_s``.

    Args:
        tensors: by the names of the file.
    """
    return any(re.match(r"res\d+_\d+_branch\w+_w$", key) for key in tensors)


def from_blobs(blobs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Caffe2's blobs as Detectron2 does, with the background's class put last.

    Args:
        blobs: by Caffe2's names; momenta are left out.

    Returns:
        Detectors with FPN under Detectron2's names, others for its matching heuristics, which
        complete their prefixes.
    """
    kept = {key: each for key, each in blobs.items() if not key.endswith("_momentum")}
    renamed, names = convert_c2_detectron_names(kept)
    for key, blob in names.items():
        if blob.endswith("_bn_s"):
            _add_statistics(renamed, key.removesuffix("weight"))
    if any(key.startswith("fpn_") for key in renamed):
        return {_with_prefix(key): each for key, each in renamed.items()}
    return renamed


def _with_prefix(name: str) -> str:
    return next((prefix + name for start, prefix in _PARTS if re.match(start, name)), name)


def _add_statistics(state: dict[str, Tensor], prefix: str) -> None:
    """Let a frozen batch norm compute ``x * weight + bias``, which is what an affine blob means.

    Without statistics Detectron2 takes the variance for 1, and then adds eps.
    """
    if f"{prefix}running_var" not in state:
        weight = state[f"{prefix}weight"]
        state[f"{prefix}running_mean"] = torch.zeros_like(weight)
        state[f"{prefix}running_var"] = torch.ones_like(weight) - 1e-5


def blob_source(blobs: Mapping[str, Tensor]) -> str:
    """Return which of Detectron's backbones the blobs are, a key of ``SOURCES``.

    Args:
        blobs: by Caffe2's names.
    """
    if "res2_0_branch2a_gn_s" in blobs:
        return "detectron_gn"
    middle = blobs.get("res2_0_branch2b_w")
    grouped = middle is not None and middle.shape[0] != middle.shape[1]
    return "detectron_resnext" if grouped else "detectron_msra"


def from_pycls_resnet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Rename a ResNet of pycls; None for its other networks, whose names Detectron2 has too.

    Args:
        tensors: by pycls's names.
    """
    stem = tensors.get("stem.conv.weight")
    if stem is None or tuple(stem.shape[2:]) != (7, 7):
        return None
    renamed = {}
    for key, value in tensors.items():
        if (new := rename(key, _PYCLS_RESNET)) is not None:
            renamed[_count_like_detectron2(new)] = value
    return renamed


def _count_like_detectron2(name: str) -> str:
    """Blocks count from 1 in pycls, stages one less, and convolutions are letters."""
    return re.sub(
        r"^res(\d)\.(\d+)\.(conv[abc]|shortcut)",
        lambda match: (
            f"res{int(match[1]) + 1}.{int(match[2]) - 1}."
            + match[3].replace("conva", "conv1").replace("convb", "conv2").replace("convc", "conv3")
        ),
        name,
    )
