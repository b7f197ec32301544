"""What the config inside a file of MMCV's family says about its weights.

The config is Python source. It is parsed and never run: literals and calls of ``dict`` are read,
all else counts as not known.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gn_practical.weights.description import Standardization

_UNKNOWN = object()


def described_by(beside: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a description that the file's ``meta`` tells.

    Args:
        beside: what stands beside the weights in the file.
    """
    meta = beside.get("meta")
    if not isinstance(meta, dict):
        return {}
    text = meta.get("config") or meta.get("cfg") or ""
    known = _from_config(text) if isinstance(text, str) else {}
    dataset = meta.get("dataset_meta")
    classes = meta.get("CLASSES")
    if classes is None and isinstance(dataset, dict):
        classes = dataset.get("classes", dataset.get("CLASSES"))
    if isinstance(classes, list | tuple) and classes:
        known["class_names"] = {"thing": [str(each) for each in classes]}
    return known


def _from_config(text: str) -> dict[str, Any]:
    try:
        values = _assigned(ast.parse(text))
    except (SyntaxError, ValueError, RecursionError):
        return {}
    if "_base_" in values:  # only what differs from another file
        return {}
    dicts = list(_dicts(list(values.values())))
    return {**_pixels(dicts), **_layers(dicts)}


def _assigned(tree: ast.Module) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = _value(node.value, values)
    return values


def _pixels(dicts: list[dict[str, Any]]) -> dict[str, Any]:
    """Read mean, std and order, of MMDetection 2's normalization or 3's preprocessor."""
    found = {
        (_three(each["mean"]), _three(each["std"]), str(each.get("to_rgb", each.get("bgr_to_rgb"))))
        for each in dicts
        if _three(each.get("mean")) and _three(each.get("std"))
    }
    if len(found) != 1:
        return {}
    mean, std, to_rgb = found.pop()
    known = {"pixel_mean": mean, "pixel_std": std}
    if to_rgb in ("True", "False"):
        known["input_format"] = "RGB" if to_rgb == "True" else "BGR"
    return known


def _three(value: Any) -> tuple[float, ...] | None:
    is_three = isinstance(value, list | tuple) and len(value) == 3
    return tuple(map(float, value)) if is_three and all(map(_is_number, value)) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _layers(dicts: list[dict[str, Any]]) -> dict[str, Any]:
    """Read the backbone's stride, norm and convolution."""
    backbone = next((b for each in dicts if isinstance(b := each.get("backbone"), dict)), {})
    known: dict[str, Any] = {}
    if backbone.get("style") in ("pytorch", "caffe"):
        known["stride_in_1x1"] = backbone["style"] == "caffe"
    norm = backbone.get("norm_cfg")
    if isinstance(norm, dict) and isinstance(norm.get("type"), str):
        known["norm"] = re.sub(r"^(SyncBN|MMSyncBN)$", "BN", norm["type"])
        if isinstance(norm.get("num_groups"), int):
            known["num_groups"] = norm["num_groups"]
        known["norm_eps"] = norm.get("eps", 1e-5)
    convolution = backbone.get("conv_cfg")
    if backbone and convolution is not _UNKNOWN:
        standardized = isinstance(convolution, dict) and convolution.get("type") == "ConvWS"
        known["weight_standardization"] = standardized
        known["standardization"] = Standardization() if standardized else None
    return known


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _dicts(each)


def _value(node: ast.AST, names: Mapping[str, Any]) -> Any:
    """Return a literal, a ``dict(...)`` or what a name stands for."""
    if isinstance(node, ast.Name):
        return names.get(node.id, _UNKNOWN)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {each.arg: _value(each.value, names) for each in node.keywords if each.arg}
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {k.value: _value(v, names) for k, v in pairs if isinstance(k, ast.Constant)}
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(each, names) for each in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return _UNKNOWN
