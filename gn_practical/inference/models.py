"""A trained model from its file, with what must be known to feed it and to read its output."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from gn_practical.inference.classes import Classes, classes_of
from gn_practical.inference.configs import config_for
from gn_practical.modeling import build_model
from gn_practical.weights.describe import describe, describe_config
from gn_practical.weights.loading import Purpose, check_loaded, place
from gn_practical.weights.read import Weights, read_weights

EXPORTED = (".onnx", ".ts")  # files of gn_practical.inference.exported
_FORMATS = ("BGR", "RGB", "L")


@dataclass(frozen=True)
class TrainedModel:
    """A model that is ready to predict.

    Attributes:
        run: Detectron2's interface: a list of dicts with "image", "height" and "width" to a list
            of dicts with "instances", "panoptic_seg", "sem_seg", "proposals".
        channels: ``INPUT.FORMAT``.
        sizes: shortest and longest side that pictures are resized to; 0 for their own size.
        classes: what it predicts.
        device: where it runs.
        batches: whether it takes more than one picture at a time.
    """

    run: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
    channels: str
    sizes: tuple[int, int]
    classes: Classes
    device: str = "cpu"
    batches: bool = True


def load_model(
    path: str,
    config_file: str | None = None,
    *,
    device: str | None = None,
    threshold: float | None = None,
    opts: Sequence[str] = (),
) -> TrainedModel:
    """Load a checkpoint, or a model that was exported.

    Args:
        path: a file or an address, as :func:`gn_practical.weights.read_weights` takes it; or what
            ``tools/export_model.py`` has written.
        config_file: for checkpoints that hold no config.
        device: to run on; by default CUDA where there is a GPU.
        threshold: least score of a detection; by default that of the config.
        opts: keys of the config and values in turn.

    Raises:
        ValueError: if the file is no model, holds no config, or does not fill the model.
    """
    if path.endswith(EXPORTED):
        return _load_exported(path, config_file, device, threshold, opts)
    weights = read_weights(path)
    cfg = config_for(path, weights.description, config_file, device=device, opts=opts)
    if threshold is not None:
        set_threshold(cfg, threshold)
    model = build_model(cfg).eval()
    fill(model, weights, path, describe_config(cfg), cfg.TEST.get("ALLOW_DIFFERENCES", False))
    return TrainedModel(
        run=model,
        channels=_checked_format(cfg.INPUT.FORMAT),
        sizes=(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST),
        classes=classes_of(weights.description, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)),
        device=cfg.MODEL.DEVICE,
    )


def load_into(model: nn.Module, path: str) -> TrainedModel:
    """Load a checkpoint into a model that was built by code, such as of a LazyConfig.

    Args:
        model: takes the weights, and is set to evaluation.
        path: a file or an address; it must say how its pictures are read, as those of this package.

    Raises:
        ValueError: if the file does not fill the model, or does not say how pictures are read.
    """
    weights = read_weights(path)
    description = weights.description
    if not (description.input_format and description.resize):
        raise ValueError(
            "weights for a model that is given must say the order of channels and the size that "
            f"it takes, got {path}, which does not. Give --config-file in place of the model."
        )
    fill(model.eval(), weights, path)
    parameter = next(model.parameters(), None)
    return TrainedModel(
        run=model,
        channels=_checked_format(description.input_format),
        sizes=(description.resize["MIN_SIZE_TEST"], description.resize["MAX_SIZE_TEST"]),
        classes=classes_of(description),
        device="cpu" if parameter is None else str(parameter.device),
    )


def fill(
    model: nn.Module,
    weights: Weights,
    path: str,
    of_config: Mapping[str, Any] | None = None,
    allow_differences: bool = False,
) -> None:
    """Load weights into a model, all of them, as an evaluation does.

    Args:
        model: takes them.
        weights: as they were read.
        path: of the weights, for errors.
        of_config: what its config says, by :func:`gn_practical.weights.describe.describe_config`.
        allow_differences: warn where the weights were trained with another model or input.

    Raises:
        ValueError: if they do not fill the model, or were trained with another one.
    """
    placed, own = place(model, weights), model.state_dict()
    fitting = {k: v for k, v in placed.items() if k not in own or own[k].shape == v.shape}
    incompatible = model.load_state_dict(fitting, strict=False)
    purpose = Purpose("evaluation", min_share=0.0, allow_differences=allow_differences)
    present = describe(model, {**(of_config or {}), "class_names": None})
    check_loaded(path, weights, placed, model, incompatible, present, purpose)


def set_threshold(cfg: CfgNode, threshold: float) -> None:
    """Set the least score of a detection in every kind of model."""
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = threshold
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = threshold
    cfg.MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH = threshold


def _load_exported(
    path: str,
    config_file: str | None,
    device: str | None,
    threshold: float | None,
    opts: Sequence[str],
) -> TrainedModel:
    if device not in (None, "cpu"):
        raise ValueError(
            f"an exported model must run on the cpu here, got device={device} for {path}. Leave "
            "the device out, or use the checkpoint."
        )
    if config_file or opts:
        raise ValueError(
            f"an exported model must be used without config and overrides, got them for {path}. "
            "Set them when you export it."
        )
    from gn_practical.inference.exported import ExportedModel

    model = ExportedModel(path)
    if threshold is not None:
        _raise_threshold(model.thresholds, threshold, path)
    description = model.description
    resize = description.resize or {}
    return TrainedModel(
        run=model,
        channels=_checked_format(description.input_format or "BGR"),
        sizes=(resize.get("MIN_SIZE_TEST", 0), resize.get("MAX_SIZE_TEST", 0)),
        classes=classes_of(description),
        batches=False,
    )


def _raise_threshold(inside: dict[str, float], threshold: float, path: str) -> None:
    """Raise the score from which panoptic FPN takes instances; the file's own lets through less."""
    least = inside.get("score", 0.0)
    if threshold < least:
        raise ValueError(
            f"the threshold must be at least that of the exported model, {least:g}, got "
            f"threshold={threshold:g} for {path}. Export it with a lower one."
        )
    if "instance_score" in inside:
        inside["instance_score"] = threshold


def _checked_format(channels: str) -> str:
    if channels not in _FORMATS:
        raise ValueError(
            f"INPUT.FORMAT must be one of {', '.join(_FORMATS)}, got INPUT.FORMAT={channels}. "
            "Predict with Detectron2's own tools."
        )
    return channels
