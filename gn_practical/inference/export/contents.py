"""What an exported file says about itself."""

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from gn_practical.inference.export.group_norm import FAST
from gn_practical.inference.export.network import detector_outputs
from gn_practical.weights.describe import describe, describe_config, installed_versions
from gn_practical.weights.description import Description

FILE = "gn_practical.json"  # of files that hold files
PREFIX = "gn_practical."  # of keys of files that hold pairs of texts
_MASK_THRESHOLD = 0.5  # Detectron2's, which has no key
_PACKAGES = ("gn_practical", "torch", "torchvision", "onnx", "onnxruntime")


@dataclass(frozen=True)
class Contents:
    """What an exported file takes, gives, and was made of.

    Attributes:
        architecture: class of the model.
        outputs: names in their order; those of feature maps, where the backbone alone is exported.
        input: the picture: name, layout, type, range and order of the channels.
        inside: what the graph does to the picture.
        thresholds: those that are inside ("score", "nms", "detections", all that a box must pass)
            and those of the steps after it ("mask", "overlap", "stuff_area", "instance_score").
        group_norm: "fast", "plain" or "onnx".
        standardized: how many convolutions had weight standardization, which is folded.
        description: of the model, as its checkpoints have it.
        versions: {package: version} of what exported it.
    """

    architecture: str
    outputs: list[str]
    input: dict[str, Any]
    inside: list[str]
    thresholds: dict[str, float]
    group_norm: str
    standardized: int
    description: Description
    versions: dict[str, str]

    def to_texts(self) -> dict[str, str]:
        """Return the contents as pairs of texts, the values as JSON."""
        return {f"{PREFIX}{key}": json.dumps(each) for key, each in asdict(self).items()}

    def to_json(self) -> str:
        """Return the contents as one text."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_texts(cls, texts: dict[str, str], path: str) -> "Contents":
        """Return the contents that :meth:`to_texts` made.

        Raises:
            ValueError: if the file at ``path`` was not made by this package.
        """
        ours = {k.removeprefix(PREFIX): v for k, v in texts.items() if k.startswith(PREFIX)}
        return cls._of({key: json.loads(each) for key, each in ours.items()}, path)

    @classmethod
    def from_json(cls, text: str, path: str) -> "Contents":
        """Return the contents that :meth:`to_json` made.

        Raises:
            ValueError: if the file at ``path`` was not made by this package.
        """
        return cls._of(json.loads(text) if text else {}, path)

    @classmethod
    def _of(cls, values: dict[str, Any], path: str) -> "Contents":
        missing = [each.name for each in fields(cls) if each.name not in values]
        if missing:
            raise ValueError(
                "an exported model must say what it takes and gives, got "
                f"{path} without {', '.join(missing)}. Export it with tools/export_model.py."
            )
        known = {each.name: values[each.name] for each in fields(cls)}
        return cls(**{**known, "description": Description.from_dict(known["description"])})


def contents_of(
    model: nn.Module,
    cfg: CfgNode,
    stored: Description,
    group_norm: str = FAST,
    backbone_only: bool = False,
) -> Contents:
    """Describe what is exported.

    Args:
        model: as it was trained, nothing folded.
        cfg: its config.
        stored: what its checkpoint says, for what neither model nor config know, as class names.
        group_norm: "fast", "plain" or "onnx".
        backbone_only: whether no more than backbone and neck are exported.
    """
    described = describe(model, describe_config(cfg))
    known = {k: getattr(stored, k) for k, each in vars(described).items() if each is None}
    # Not those of a data set that has the same name on this machine.
    known |= {k: v for k, v in vars(stored).items() if k.startswith("class_") and v is not None}
    divisor = model.backbone.size_divisibility
    return Contents(
        architecture=type(model).__name__,
        outputs=list(model.backbone.output_shape()) if backbone_only else detector_outputs(model),
        input={
            "name": "image",
            "layout": "channels, height, width",
            "type": "float32",
            "range": [0, 255],
            "channels": cfg.INPUT.FORMAT,
        },
        inside=["minus pixel_mean, divided by pixel_std", f"padding to multiples of {divisor}"],
        thresholds=_thresholds(cfg),
        group_norm=group_norm,
        standardized=len(described.standardized_layers or ()),
        description=replace(described, **known),
        versions=installed_versions(_PACKAGES),
    )


def _thresholds(cfg: CfgNode) -> dict[str, float]:
    architecture = cfg.MODEL.META_ARCHITECTURE
    keys = cfg.MODEL.RETINANET if architecture == "RetinaNet" else cfg.MODEL.ROI_HEADS
    found = {
        "score": keys.SCORE_THRESH_TEST,
        "nms": keys.NMS_THRESH_TEST,
        "detections": cfg.TEST.DETECTIONS_PER_IMAGE,
    }
    if cfg.MODEL.MASK_ON:
        found["mask"] = _MASK_THRESHOLD
    if architecture == "PanopticFPN":
        combine = cfg.MODEL.PANOPTIC_FPN.COMBINE
        found["overlap"] = combine.OVERLAP_THRESH
        found["stuff_area"] = combine.STUFF_AREA_LIMIT
        found["instance_score"] = combine.INSTANCES_CONFIDENCE_THRESH
    return found
