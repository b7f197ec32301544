"""A model as a file: ONNX, TorchScript, or torch.export."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from gn_practical.inference.export.contents import FILE, Contents
from gn_practical.inference.export.group_norm import DOMAIN, ONNX, GroupNormAs
from gn_practical.inference.export.network import (
    Backbone,
    example_image,
    largest_stride,
    traceable,
)
from gn_practical.inference.export.suppression import (
    by_class_in_onnx,
    by_class_in_torchscript,
    suppressing_by,
)

OPSET = 18  # the first with GroupNormalization
_LAST_TRACED = 20  # of PyTorch's exporter; later ones are converted
_LAST = 21  # onnxruntime has no RoiAlign of the next
_LOGGERS = ("torch.onnx", "torch.fx._symbolic_trace", "torch.export")


class Format(NamedTuple):
    """How a format is written.

    Attributes:
        suffix: of its files.
        write: called with the model, what to say of it, the path, and the opset.
        limit: what it cannot do, "" where it does all.
    """

    suffix: str
    write: Callable[[nn.Module, Contents, Path, int], None]
    limit: str = ""


def check_opset(opset: int) -> None:
    """Refuse what cannot be written.

    Raises:
        ValueError: for such an opset.
    """
    if not OPSET <= opset <= _LAST:
        raise ValueError(
            f"opset must be from {OPSET} to {_LAST}, got opset={opset}. Choose one of them; older "
            "ones have no exact resize and no GroupNormalization."
        )


def write_onnx(model: nn.Module, contents: Contents, path: Path, opset: int = OPSET) -> None:
    """Write an ONNX file.

    Args:
        model: a detector, its standardization folded.
        contents: what the file says about itself.
        path: the file.
        opset: version of ONNX's operators.

    Raises:
        ValueError: for an opset that cannot be written, or where onnx is not installed.
    """
    check_opset(opset)
    onnx = _import_onnx()
    image = example_image(model)
    norms, suppression = GroupNormAs(contents.group_norm, model), suppressing_by(by_class_in_onnx)
    with _quiet(), norms, suppression:
        torch.onnx.export(
            traceable(model, image),
            (image,),
            str(path),
            dynamo=False,
            opset_version=min(opset, _LAST_TRACED),
            input_names=[contents.input["name"]],
            output_names=contents.outputs,
            dynamic_axes=_dynamic_axes(contents),
            custom_opsets={DOMAIN: 1} if contents.group_norm == ONNX else None,
        )
    file = onnx.load(path)
    if opset > _LAST_TRACED:
        file = onnx.version_converter.convert_version(file, opset)
    _move_to_onnx(file)
    onnx.helper.set_model_props(file, contents.to_texts())
    onnx.checker.check_model(file)
    onnx.save(file, path)


def write_torchscript(model: nn.Module, contents: Contents, path: Path, opset: int = 0) -> None:
    """Write a TorchScript file, for the CPU.

    Args:
        model: a detector, its standardization folded.
        contents: what the file says about itself.
        path: the file.
        opset: not used.
    """
    image = example_image(model)
    with _quiet(), torch.no_grad(), suppressing_by(by_class_in_torchscript):
        traced = torch.jit.trace(traceable(model, image), (image,), check_trace=False)
        torch.jit.save(traced, str(path), _extra_files={FILE: contents.to_json()})


def write_torch_export(model: nn.Module, contents: Contents, path: Path, opset: int = 0) -> None:
    """Write backbone and neck by ``torch.export``, for pictures of some multiples of the stride.

    From 3 times the largest stride on: of a map of one row it would make another program.

    Args:
        model: a detector, its standardization folded.
        contents: what the file says about itself.
        path: the file.
        opset: not used.
    """
    divisor = largest_stride(model)
    image = example_image(model, 5 * divisor, 7 * divisor)
    rows, columns = (torch.export.Dim(name, min=3, max=128) for name in ("rows", "columns"))
    sizes = {1: divisor * rows, 2: divisor * columns}
    with _quiet(), torch.no_grad():
        program = torch.export.export(Backbone(model).eval(), (image,), dynamic_shapes=(sizes,))
        torch.export.save(program, path, extra_files={FILE: contents.to_json()})


FORMATS = {
    "onnx": Format(".onnx", write_onnx),
    "torchscript": Format(".ts", write_torchscript),
    "torch.export": Format(
        ".pt2",
        write_torch_export,
        "torch.export takes the backbone and its neck alone: the number of boxes depends on the "
        "picture, which it cannot follow through Detectron2's proposals. Take onnx or torchscript "
        "for the whole model.",
    ),
}


def _move_to_onnx(file: "onnx.ModelProto") -> None:  # noqa: F821
    """Give the operators of our domain that of ONNX, whose opset has them by now."""
    for node in file.graph.node:
        if node.domain == DOMAIN:
            node.domain = ""
    kept = [each for each in file.opset_import if each.domain != DOMAIN]
    del file.opset_import[:]
    file.opset_import.extend(kept)


def _dynamic_axes(contents: Contents) -> dict[str, dict[int, str]]:
    maps = {"sem_seg": {1: "height", 2: "width"}}
    axes = {name: maps.get(name, {0: "detections"}) for name in contents.outputs}
    return {contents.input["name"]: {1: "height", 2: "width"}, **axes}


def _import_onnx() -> "onnx":  # noqa: F821
    try:
        import onnx
        import onnx.version_converter
    except ImportError as error:
        raise ValueError(
            f"onnx must be installed to write ONNX, got {error}. Install it: "
            "pip install 'gn_practical[export]'."
        ) from error
    return onnx


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to errors: what tracing warns of is in Detectron2, and the check shows that it holds."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
