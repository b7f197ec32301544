"""Exported models, run as Detectron2's models are."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision  # noqa: F401 (its operators, which TorchScript files name)
from detectron2.modeling.meta_arch.panoptic_fpn import combine_semantic_and_instance_outputs
from detectron2.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from detectron2.structures import Boxes, Instances
from torch import Tensor

from gn_practical.inference.export.contents import FILE, Contents
from gn_practical.weights.description import Description

SUFFIXES = (".onnx", ".ts")
_Outputs = Sequence[Tensor]


class ExportedModel:
    """A file of ``tools/export_model.py`` in place of a model: ONNX by onnxruntime, or TorchScript.

    The call is that of Detectron2's models in evaluation, and so are the steps after the graph:
    masks are pasted and panoptic maps merged by Detectron2's own functions. No model is built. It
    runs on the CPU.

    Args:
        path: a file that ends in .onnx or .ts.
        threads: how many onnxruntime computes with; PyTorch's number by default.

    Attributes:
        contents: what the file says about itself.

    Raises:
        ValueError: for another file, a damaged one, or one of another program.
    """

    def __init__(self, path: str | Path, threads: int | None = None) -> None:
        self.path = str(path)
        _check_file(self.path)
        if self.path.endswith(".onnx"):
            self.contents, self._run = _open_onnx(self.path, threads or torch.get_num_threads())
        else:
            self.contents, self._run = _open_torchscript(self.path)

    @property
    def description(self) -> Description:
        """What the model was trained with, as its checkpoint says it: config, classes, resize."""
        return self.contents.description

    @property
    def thresholds(self) -> dict[str, float]:
        """Those that are applied, inside the file and after it."""
        return self.contents.thresholds

    def __call__(self, inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Predict, one picture after the other.

        Args:
            inputs: of each picture the "image", (3, H, W) in 0 to 255, resized and in the order of
                channels that ``description`` tells, and "height" and "width" of the results.

        Returns:
            Of each picture what the model returned before it was exported: "instances", and, of
            panoptic FPN, "sem_seg" and "panoptic_seg".
        """
        with torch.no_grad():
            return [self._predict(each) for each in inputs]

    def detect(self, image: Tensor) -> dict[str, Tensor]:
        """Return what the graph itself finds in a picture, by name, in pixels of that picture."""
        channels = self.contents.input["channels"]
        if image.dim() != 3 or 0 in image.shape or len(image) != len(channels):
            raise ValueError(
                f"image must be a picture of shape ({len(channels)}, height, width), in {channels},"
                f" got shape={tuple(image.shape)}. Give one picture at a time."
            )
        return dict(zip(self.contents.outputs, self._run(image.float().cpu()), strict=True))

    def _predict(self, given: Mapping[str, Any]) -> dict[str, Any]:
        image = given["image"]
        size = tuple(image.shape[1:])
        wanted = given.get("height", size[0]), given.get("width", size[1])
        outputs = self.detect(image)
        results = {"instances": detector_postprocess(_instances(outputs, size), *wanted)}
        if "sem_seg" in outputs:
            results["sem_seg"] = sem_seg_postprocess(outputs["sem_seg"], size, *wanted)
            results["panoptic_seg"] = combine_semantic_and_instance_outputs(
                results["instances"],
                results["sem_seg"].argmax(dim=0),
                *(self.thresholds[key] for key in ("overlap", "stuff_area", "instance_score")),
            )
        return results


def _instances(outputs: Mapping[str, Tensor], size: tuple[int, int]) -> Instances:
    found = Instances(size)
    found.pred_boxes = Boxes(outputs["boxes"])
    found.scores = outputs["scores"]
    found.pred_classes = outputs["classes"]
    if "masks" in outputs:
        found.pred_masks = outputs["masks"]
    return found


def _check_file(path: str) -> None:
    if not path.endswith(SUFFIXES):
        raise ValueError(
            f"an exported model must end in {' or '.join(SUFFIXES)}, got {path}. Export one with "
            "tools/export_model.py; what torch.export writes is the backbone alone."
        )
    if not Path(path).is_file():
        raise ValueError(f"an exported model must be a file, got {path}. Correct the path.")


def _open_onnx(path: str, threads: int) -> tuple[Contents, Callable[[Tensor], _Outputs]]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(
            f"onnxruntime must be installed to run {path}, got {error}. Install it: "
            "pip install 'gn_practical[export]'."
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what fails is raised, and then said once
    try:
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    except Exception as error:  # of a base class of its own
        raise _damaged(path, error) from error
    contents = Contents.from_texts(session.get_modelmeta().custom_metadata_map, path)
    name = contents.input["name"]

    def run(image: Tensor) -> _Outputs:
        return [torch.from_numpy(each) for each in session.run(None, {name: image.numpy()})]

    return contents, run


def _open_torchscript(path: str) -> tuple[Contents, Callable[[Tensor], _Outputs]]:
    files = {FILE: ""}
    try:
        with warnings.catch_warnings():  # of TorchScript's own end
            warnings.simplefilter("ignore", FutureWarning)
            run = torch.jit.load(path, "cpu", _extra_files=files)
    except Exception as error:  # RuntimeError, or what unpickles
        raise _damaged(path, error) from error
    text = files[FILE]
    return Contents.from_json(text.decode() if isinstance(text, bytes) else text, path), run


def _damaged(path: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200]
    return ValueError(
        f"an exported model must be a whole file, got {path}: {reason}. Export it again."
    )
