"""The description of a model and its config, as its checkpoints carry it."""

from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.layers import CNNBlockBase
from torch import nn

from gn_practical.layers import WSConv2d
from gn_practical.layers.protocol import norm_channels, norm_groups
from gn_practical.weights.description import Description, Standardization

_PACKAGES = ("gn_practical", "torch", "torchvision", "detectron2", "sal-detectron2")
_RESIZE = ("MIN_SIZE_TEST", "MAX_SIZE_TEST")


def describe(model: nn.Module, of_config: Mapping[str, Any] | None = None) -> Description:
    """Describe a model as it is now.

    Args:
        model: any module.
        of_config: what the modules do not tell, by :func:`describe_config`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8, eps=1e-6))
        >>> described = describe(model)
        >>> described.num_groups, described.norm_eps, described.weight_standardization
        ({'1': 2}, 1e-06, False)
    """
    modules = dict(model.named_modules())
    standardized = [path for path, each in modules.items() if isinstance(each, WSConv2d)]
    known = dict(of_config or {})
    for name in ("pixel_mean", "pixel_std"):
        if name not in known:  # else no GPU is waited for
            known[name] = _pixels(model, name)
    return Description(
        source="gn_practical",
        stride_in_1x1=_only(_strides_in_1x1(modules.values())),
        pooled_shortcuts=_only(_pooled_shortcuts(modules.values())),
        weight_standardization=bool(standardized),
        standardization=Standardization() if standardized else None,
        standardized_layers=standardized,
        norm=_only(_norm_kinds(model.get_submodule(trunk_of(modules)))),
        num_groups={path: g for path, each in modules.items() if (g := norm_groups(each))},
        norm_eps=_only(each.eps for each in modules.values() if norm_channels(each)),
        versions=installed_versions(),
        **known,
    )


def describe_config(cfg: CfgNode) -> dict[str, Any]:
    """Return the fields of a description that a config tells: input, classes, rule, itself.

    Reading it here does not count as a use of its keys.

    Args:
        cfg: a complete config.
    """
    keys = _plain(cfg)
    keys.pop("OUTPUT_DIR")  # of this machine
    lazy = keys.pop("LAZY_CONFIG", None)  # the keys are then a part of it, and build no model
    pgn = keys["MODEL"].get("PGN")
    return {
        "input_format": keys["INPUT"]["FORMAT"],
        "pixel_mean": tuple(keys["MODEL"]["PIXEL_MEAN"]),
        "pixel_std": tuple(keys["MODEL"]["PIXEL_STD"]),
        "class_names": class_names(keys["DATASETS"]["TRAIN"]),
        "class_ids": class_ids(keys["DATASETS"]["TRAIN"]),
        "class_colors": class_colors(keys["DATASETS"]["TRAIN"]),
        "resize": {key: keys["INPUT"][key] for key in _RESIZE},
        "rule": pgn and (str(pgn["NUM_GROUPS"]) if pgn["NUM_GROUPS"] else pgn["RULE"]),
        "config": None if lazy else yaml.safe_dump(keys, sort_keys=False),
        "lazy_config": lazy,
    }


def trunk_of(paths: Iterable[str]) -> str:
    """Return the path of a detector's backbone, "" for a model that has none.

    Example:
        >>> trunk_of(["backbone.bottom_up.stem.conv1.weight", "roi_heads.box_head.fc1.weight"])
        'backbone.bottom_up'
    """
    paths = list(paths)
    found = (t for t in ("backbone.bottom_up", "backbone") if any(_in(p, t) for p in paths))
    return next(found, "")


def _in(path: str, outer: str) -> bool:
    return f"{path}.".startswith(f"{outer}.")


def _norm_kinds(model: nn.Module) -> Iterable[str]:
    for module in model.modules():
        if norm_channels(module):
            yield "GN" if norm_groups(module) else "BN"


def _plain(cfg: CfgNode) -> dict[str, Any]:
    return {k: _plain(v) if isinstance(v, CfgNode) else v for k, v in dict.items(cfg)}


def class_names(datasets: Iterable[str]) -> dict[str, list[str]] | None:
    """Return the classes of the first data set that has any, by "thing" and "stuff"."""
    metadata = metadata_of(datasets)
    names = {kind: list(metadata.get(f"{kind}_classes") or ()) for kind in ("thing", "stuff")}
    return {kind: each for kind, each in names.items() if each} or None


def class_ids(datasets: Iterable[str]) -> dict[str, list[int]] | None:
    """Return the data set's ids of the classes that :func:`class_names` names, where it has any."""
    metadata = metadata_of(datasets)
    found = {}
    for kind in ("thing", "stuff"):
        numbers = metadata.get(f"{kind}_dataset_id_to_contiguous_id") or {}
        ids = {number: each for each, number in numbers.items()}
        if ids and sorted(ids) == list(range(len(metadata.get(f"{kind}_classes") or ()))):
            found[kind] = [ids[number] for number in range(len(ids))]
    return found or None


def class_colors(datasets: Iterable[str]) -> dict[str, list[list[int]]] | None:
    """Return the data set's colours of the classes that :func:`class_names` names."""
    metadata = metadata_of(datasets)
    found = {}
    for kind in ("thing", "stuff"):
        colors = [[int(each) for each in rgb] for rgb in metadata.get(f"{kind}_colors") or ()]
        if colors and len(colors) == len(metadata.get(f"{kind}_classes") or ()):
            found[kind] = colors
    return found or None


def metadata_of(datasets: Iterable[str]) -> Metadata:
    """Return the metadata of the first data set that has classes, else empty ones."""
    for name in datasets:
        metadata = MetadataCatalog.get(name) if name in MetadataCatalog else Metadata()
        if any(metadata.get(f"{kind}_classes") for kind in ("thing", "stuff")):
            return metadata
    return Metadata()


def _pixels(model: nn.Module, name: str) -> tuple[float, ...] | None:
    value = getattr(model, name, None)
    if value is None or value.is_meta:
        return None
    return tuple(float(f"{each:.6g}") for each in value.flatten().tolist())  # of float32


def _strides_in_1x1(modules: Iterable[nn.Module]) -> Iterable[bool]:
    """Yield, for each bottleneck with a stride, whether it is in the first of its convolutions."""
    for module in modules:
        convs = [getattr(module, name, None) for name in ("conv1", "conv2", "conv3")]
        if not all(isinstance(conv, nn.Conv2d) for conv in convs):
            continue
        sizes, strides = zip(
            *((conv.kernel_size[0], conv.stride[0]) for conv in convs), strict=True
        )
        if sizes == (1, 3, 1) and max(strides) > 1:
            yield strides[0] > 1


def _pooled_shortcuts(modules: Iterable[nn.Module]) -> Iterable[bool]:
    """Yield, for each block with a stride, whether its shortcut has it outside its convolution."""
    for module in modules:
        shortcut = getattr(module, "shortcut", None)
        has_shortcut = isinstance(module, CNNBlockBase) and isinstance(shortcut, nn.Conv2d)
        if has_shortcut and module.stride > 1:
            yield shortcut.stride == (1, 1)


def _only(values: Iterable[Any]) -> Any:
    """Return the value that all are equal to, None if they differ or there are none."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


@cache
def installed_versions(packages: tuple[str, ...] = _PACKAGES) -> dict[str, str]:
    """Return {package: version} of those that are installed.

    Example:
        >>> sorted(installed_versions(("torch", "no-such-package")))
        ['torch']
    """
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
