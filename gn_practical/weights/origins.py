"""Which sources the names and the values of a ResNet allow."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gn_practical.weights.contents import Contents
from gn_practical.weights.resnet_names import ResNetNames

# A normalized picture lies between -2.12 and 2.64, so what a filter w returns spans no more than
# 4.76 sum(|w|), and has a variance of no more than a quarter of that squared.
_LARGEST_VARIANCE = 5.7


def resnet_origins(contents: Contents, names: ResNetNames) -> tuple[list[str], str | None]:
    """Return the keys of ``SOURCES`` that a ResNet in torchvision's names can come from.

    Args:
        contents: the file.
        names: the ResNet in it.

    Returns:
        Those that its names allow, and the one among them that its values tell, if they do.
    """
    inside = {key: contents.tensors[names.prefix + key] for key in names.renamed}
    allowed = _allowed_by_names(contents, names, inside)
    told = _told_by_values(inside) if "torchvision" in allowed else None
    return (allowed if told in (None, *allowed) else [*allowed, told]), told


def _allowed_by_names(
    contents: Contents, names: ResNetNames, inside: Mapping[str, Tensor]
) -> list[str]:
    prefix, level = names.prefix, contents.level
    if prefix.endswith(("encoder_q.", "base_encoder.")):
        return ["moco"]
    if level in ("teacher", "student") or "teacher." in prefix or "student." in prefix:
        return ["dino"]
    if prefix == "backbone." and "head.fc.weight" in contents.tensors:
        return ["mmpretrain" if names.norm == "BN" else "mmpretrain_gn"]
    grouped = _channels_per_group(inside) is not None
    if names.norm_names == "gn":
        return ["jhu", "jhu_gn"] if grouped else ["jhu", "mmcv_detectron_gn", "mmcv_contrib_gn"]
    if names.norm == "GN" and prefix == "module.":
        return ["jhu", "timm_gn", "torchvision_gn"]
    if names.norm == "GN":
        return ["timm_gn"] if names.deep_stem else ["timm_gn", "torchvision_gn"]
    if _channels_per_group(inside) == 8:
        return ["torchvision", "mmcv_detectron_resnext"]
    return ["torchvision"]


def _channels_per_group(inside: Mapping[str, Tensor]) -> int | None:
    middle = inside["layer1.0.conv2.weight"]
    return None if middle.shape[0] == middle.shape[1] else middle.shape[1]


def _told_by_values(inside: Mapping[str, Tensor]) -> str | None:
    if _statistics_are_folded(inside) and _channels_per_group(inside):
        return "mmcv_detectron_resnext"
    if _statistics_are_folded(inside) or _takes_bytes(inside):
        return "mmcv_detectron_msra"
    return None


def _statistics_are_folded(inside: Mapping[str, Tensor]) -> bool:
    """Whether scale and shift of batch norms hold their statistics, as Detectron's files do."""
    means = [each for key, each in inside.items() if key.endswith("running_mean")]
    variances = [each for key, each in inside.items() if key.endswith("running_var")]
    fresh = bool((inside["layer1.0.bn1.weight"] == 1).all())
    return not fresh and not any(map(torch.any, means)) and all((v == 1).all() for v in variances)


def _takes_bytes(inside: Mapping[str, Tensor]) -> bool:
    """Whether the first convolution's outputs vary more than normalized pictures let them."""
    weight, variance = inside.get("conv1.weight"), inside.get("bn1.running_var")
    if weight is None or variance is None:
        return False
    bound = _LARGEST_VARIANCE * weight.double().flatten(1).abs().sum(1).square()
    return bool((variance > bound).any())
