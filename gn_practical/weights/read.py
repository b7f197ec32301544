"""Weights of others in Detectron2's names, with what they were trained with."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from gn_practical.weights import detectron_names, mm_config, mmdetection_names
from gn_practical.weights.contents import Contents, read_contents
from gn_practical.weights.description import Description
from gn_practical.weights.origins import resnet_origins
from gn_practical.weights.resnet_names import ResNetNames, find_resnet
from gn_practical.weights.sources import choose_source

_PRE_ACTIVATION = "stages.0.blocks.0.norm1.weight"


@dataclass(frozen=True)
class Weights:
    """Weights to load, and where they come from.

    Attributes:
        state: by Detectron2's names: ``stem.conv1.weight``, ``res2.0.conv1.norm.weight`` of a
            backbone without prefix, ``backbone.bottom_up.stem...`` of a whole detector.
        description: what they were trained with, as far as it is known.
        matching_heuristics: whether Detectron2's matching of suffixes is still to be applied.
        notes: what to tell the user: what was chosen and what is not known.
        unused: names in the file that have no place in Detectron2's model.
        in_file: all tensors under the file's own names.
        beside: what else stands at the file's top, such as the state of an optimizer.
    """

    state: dict[str, Tensor]
    description: Description = field(default_factory=Description)
    matching_heuristics: bool = False
    notes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    in_file: dict[str, Tensor] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)


def read_weights(path: str, source: str | None = None, level: str | None = None) -> Weights:
    """Read weights of Detectron2 and of others, and recognize which by the names inside.

    Args:
        path: a file or an address that Detectron2's PathManager takes.
        source: where they come from, a key of :data:`gn_practical.weights.sources.SOURCES`, for
            files whose keys leave it open.
        level: the file's key that the weights are under, where there are several.

    Raises:
        ValueError: if the file is damaged, no weights, could run code, or is of a network that
            Detectron2 cannot express.
    """
    contents = read_contents(path, level)
    try:
        weights = _recognize(contents, source)
    except ValueError as error:
        raise ValueError(f"{error} The file: {path}.") from error
    notes = (*_of_level(contents), *weights.notes)
    heuristics = contents.matching_heuristics or weights.matching_heuristics
    return replace(
        weights,
        notes=notes,
        matching_heuristics=heuristics,
        in_file=dict(contents.tensors),
        beside=contents.beside,
    )


def _of_level(contents: Contents) -> tuple[str, ...]:
    if not contents.others:
        return ()
    return (f"taken from {contents.level}; the file has {', '.join(contents.others)} too",)


def _recognize(contents: Contents, source: str | None) -> Weights:
    tensors = contents.tensors
    if contents.ours:
        return Weights(dict(tensors), _our_description(contents))
    if detectron_names.are_blobs(tensors):
        description, notes = _choose([detectron_names.blob_source(tensors)], contents, source)
        return Weights(detectron_names.from_blobs(tensors), description, True, notes)
    if any(re.search(r"(^|\.)res2\.0\.conv1\.weight$", key) for key in tensors):
        return _detectron2(contents, source)
    if any(re.fullmatch(r"s1\.b1\.f\.a\.weight", key) for key in tensors):
        return _pycls(contents, source)
    if any(key.endswith(_PRE_ACTIVATION) for key in tensors):
        raise ValueError(
            "a ResNet must have its norms after its convolutions, got one of pre-activation (BiT, "
            "timm's resnetv2), where they come before. Detectron2's ResNet has no such blocks; "
            "take timm's resnet50_gn."
        )
    if mmdetection_names.is_detector(tensors):
        return _mmdetection(contents, source)
    names = find_resnet(tensors)
    if names is None:
        return Weights(dict(tensors), notes=("its names are taken for the model's",))
    return _resnet(contents, names, source)


def _our_description(contents: Contents) -> Description:
    known = contents.beside.get("description")
    if isinstance(known, dict):
        return Description.from_dict(known)
    groups = contents.beside.get("num_groups")
    return Description("gn_practical", num_groups=groups if isinstance(groups, dict) else None)


def _choose(
    candidates: Sequence[str], contents: Contents, source: str | None
) -> tuple[Description, tuple[str, ...]]:
    return choose_source(candidates, contents.name, source)


def _detectron2(contents: Contents, source: str | None) -> Weights:
    author = str(contents.beside.get("__author__", "")).lower()
    found = "detectron2_torchvision" if author == "torchvision" else "detectron2"
    description, notes = _choose([found], contents, source)
    if any(key.endswith("res2.0.conv1.norm.running_mean") for key in contents.tensors):
        description = replace(description, norm="BN")
    return Weights(dict(contents.tensors), description, notes=notes)


def _pycls(contents: Contents, source: str | None) -> Weights:
    description, notes = _choose(["pycls"], contents, source)
    renamed = detectron_names.from_pycls_resnet(contents.tensors)
    if renamed is not None:
        return Weights(renamed, description, notes=notes)
    kept = {k: v for k, v in contents.tensors.items() if not k.endswith("batches_tracked")}
    return Weights(kept, description, True, notes)


def _resnet(contents: Contents, names: ResNetNames, source: str | None) -> Weights:
    candidates, told = resnet_origins(contents, names)
    description, notes = _choose(candidates, contents, source or told)
    if told and not source:
        notes = (f"told by its values, not its keys: {told}",)
    described = mm_config.described_by(contents.beside)
    state = _renamed(contents.tensors, names)
    if candidates[0] in ("moco", "dino"):
        # A projection, not a classifier.
        state = {key: each for key, each in state.items() if not key.startswith("linear.")}
    used = {names.prefix + key for key, new in names.renamed.items() if new in state}
    description = replace(description, **{**described, **_of_names(names)})
    return Weights(state, description, notes=notes, unused=_unused(contents.tensors, used))


def _mmdetection(contents: Contents, source: str | None) -> Weights:
    names = find_resnet(contents.tensors, "backbone.")
    heads = mmdetection_names.rename_detector(contents.tensors)
    with_ws = ["mmdetection_gn_ws", "mmdetection_gn"]
    candidates = with_ws if names.norm == "GN" else ["mmdetection", "mmdetection_caffe"]
    described = mm_config.described_by(contents.beside)
    decided = [each for each in candidates if _agrees(each, described)] if described else []
    description, notes = _choose(decided or candidates, contents, source)
    description = replace(description, **{**described, **_of_names(names)})
    bottom_up = "backbone.bottom_up." if _has_fpn(heads) else "backbone."
    resnet = _renamed(contents.tensors, names)
    state = {bottom_up + key: each for key, each in resnet.items()}
    state |= {new: contents.tensors[key] for key, new in heads.items()}
    used = {*heads, *(names.prefix + key for key in names.renamed)}
    return Weights(state, description, notes=notes, unused=_unused(contents.tensors, used))


def _agrees(source: str, described: Mapping[str, object]) -> bool:
    description, _ = choose_source([source], "")
    fields = ("input_format", "stride_in_1x1", "weight_standardization")
    return all(described.get(each) in (None, getattr(description, each)) for each in fields)


def _has_fpn(heads: Mapping[str, str]) -> bool:
    return any(new.startswith("backbone.fpn_") for new in heads.values())


def _renamed(tensors: Mapping[str, Tensor], names: ResNetNames) -> dict[str, Tensor]:
    return {new: tensors[names.prefix + key] for key, new in names.renamed.items()}


def _of_names(names: ResNetNames) -> dict[str, Any]:
    return {"norm": names.norm, "pooled_shortcuts": names.pooled_shortcuts}


def _unused(tensors: Mapping[str, Tensor], used: set[str]) -> tuple[str, ...]:
    left = (key for key in tensors if key not in used)
    return tuple(key for key in left if not key.endswith("num_batches_tracked"))
