"""ResNets in torchvision's names, which timm, MMCV's family, MoCo, DINO and others share."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from gn_practical.weights.patterns import VALUES, rename

# The first convolution of the first block tells where a ResNet lies in a file.
_FIRST = re.compile(r"(.*?)layer1\.0\.conv1\.weight")
# Of several networks in one file, the one that its authors go on with.
_PREFERRED = ("encoder_q.", "base_encoder.", "teacher.backbone.", "backbone.", "module.", "")
_NAMES = (
    (r"conv1\.weight", "stem.conv1.weight"),
    (r"layer(\d)\.(\d+)\.(conv\d)\.weight", r"res\1.\2.\3.weight"),
    (rf"layer(\d)\.(\d+)\.(?:bn|gn)(\d)\.{VALUES}", r"res\1.\2.conv\3.norm.\4"),
    (r"layer(\d)\.(\d+)\.downsample\.0\.weight", r"res\1.\2.shortcut.weight"),
    (rf"layer(\d)\.(\d+)\.downsample\.1\.{VALUES}", r"res\1.\2.shortcut.norm.\3"),
    (r"fc\.(weight|bias)", r"linear.\1"),
)
_BASIC_STEM = ((rf"(?:bn|gn)1\.{VALUES}", r"stem.conv1.norm.\1"),)
# Three convolutions, as in timm's conv1 and in MMPretrain's stem; Detectron2's DeepLabStem.
_DEEP_STEM = (
    (r"(?:conv1|stem)\.0\.weight", "stem.conv1.weight"),
    (rf"(?:conv1|stem)\.1\.{VALUES}", r"stem.conv1.norm.\1"),
    (r"(?:conv1|stem)\.3\.weight", "stem.conv2.weight"),
    (rf"(?:conv1|stem)\.4\.{VALUES}", r"stem.conv2.norm.\1"),
    (r"(?:conv1|stem)\.6\.weight", "stem.conv3.weight"),
    (rf"(?:(?:bn|gn)1|stem\.7)\.{VALUES}", r"stem.conv3.norm.\1"),
)


@dataclass(frozen=True)
class ResNetNames:
    """Where a ResNet lies in a file, and what Detectron2 calls its parts.

    Attributes:
        prefix: of the ResNet's names in the file.
        renamed: {name in the file without the prefix: Detectron2's name}.
        deep_stem: whether the stem has three convolutions.
        pooled_shortcuts: whether shortcuts with a stride average before their convolution.
        norm: "BN" or "GN".
        norm_names: "bn" or "gn".
    """

    prefix: str
    renamed: dict[str, str]
    deep_stem: bool
    pooled_shortcuts: bool
    norm: str
    norm_names: str


def find_resnet(tensors: Mapping[str, Tensor], prefix: str | None = None) -> ResNetNames | None:
    """Find a ResNet in torchvision's names; None if there is none.

    Args:
        tensors: by the names of the file.
        prefix: look there alone.

    Raises:
        ValueError: for a ResNet that Detectron2's cannot express, with the reason.
    """
    found = [match[1] for key in tensors if (match := _FIRST.fullmatch(key))]
    if prefix is not None:
        found = [each for each in found if each == prefix]
    if not found:
        return None
    prefix = min(found, key=lambda each: (_preference(each), len(each), each))
    inside = {
        key.removeprefix(prefix): each for key, each in tensors.items() if key.startswith(prefix)
    }
    deep = "conv1.0.weight" in inside or "stem.0.weight" in inside
    pooled = _pooled_blocks(inside)
    _check_shortcuts(pooled, inside, deep)
    renamed = _rename(inside, deep, pooled)
    norm_names = "gn" if "layer1.0.gn1.weight" in inside else "bn"
    norm = "BN" if f"layer1.0.{norm_names}1.running_mean" in inside else "GN"
    names = ResNetNames(prefix, renamed, deep, bool(pooled), norm, norm_names)
    _check_stem({renamed[key]: each for key, each in inside.items() if key in renamed}, deep)
    return names


def _preference(prefix: str) -> int:
    return next(i for i, ending in enumerate(_PREFERRED) if prefix.endswith(ending))


def _rename(inside: Mapping[str, Tensor], deep: bool, pooled: set[str]) -> dict[str, str]:
    patterns = _NAMES + (_DEEP_STEM if deep else _BASIC_STEM)
    renamed = {}
    for key in inside:
        plain = _without_pool(key) if key.partition(".downsample.")[0] in pooled else key
        new = rename(plain, patterns)
        if new is not None:
            renamed[key] = re.sub(r"^res(\d)", lambda match: f"res{int(match[1]) + 1}", new)
        elif re.match(r"layer\d\.", key) and not key.endswith("num_batches_tracked"):
            raise ValueError(
                f"a ResNet's block must have the parts of Detectron2's, got {key} of shape "
                f"{tuple(inside[key].shape)}. Such a network (squeeze and excitation, attention, "
                "split convolutions, biases) needs a backbone of its own."
            )
    return renamed


def _pooled_blocks(inside: Mapping[str, Tensor]) -> set[str]:
    """Return the blocks whose shortcut has an average, or nothing, before its convolution."""
    return {
        match[1]
        for key, value in inside.items()
        if (match := re.fullmatch(r"(layer\d\.\d+)\.downsample\.1\.weight", key))
        and value.dim() == 4
    }


def _without_pool(key: str) -> str:
    return re.sub(r"downsample\.(\d)", lambda match: f"downsample.{int(match[1]) - 1}", key)


def _check_shortcuts(pooled: set[str], inside: Mapping[str, Tensor], deep: bool) -> None:
    strided = {f"layer{stage}.0" for stage in (2, 3, 4)}
    if not pooled or (deep and strided <= pooled <= {*strided, "layer1.0"}):
        return
    stem = "deep" if deep else "7x7"
    raise ValueError(
        "a ResNet whose shortcuts average 2x2 pixels before their convolution must do so in each "
        f"stage with a stride and have a deep stem, got {', '.join(sorted(pooled))} and a {stem} "
        "stem. Such a network needs a backbone of its own; timm's d variants and MMPretrain's V1d "
        "go into build_resnet_d_backbone."
    )


def _check_stem(state: Mapping[str, Tensor], deep: bool) -> None:
    if "stem.conv1.weight" not in state:
        raise ValueError(
            "a ResNet must have its first convolution, got none in conv1 or stem. Load the whole "
            "file of its authors."
        )
    shapes = [tuple(each.shape) for key, each in state.items() if each.dim() == 4 and "stem" in key]
    if not deep and shapes[0][2:] != (7, 7):
        raise ValueError(
            f"a ResNet's stem must be a 7x7 convolution, got conv1 of shape {shapes[0]}. "
            "Detectron2's BasicStem has no other, so such a network needs a backbone of its own."
        )
    if deep:
        widths = sorted(shape[0] for shape in shapes)
        if widths[0] != widths[1] or widths[2] != 2 * widths[0]:
            raise ValueError(
                "a deep stem must have widths w, w, 2w as Detectron2's DeepLabStem, got "
                f"{', '.join(map(str, widths))} (timm's tiered stem). Take another variant."
            )
