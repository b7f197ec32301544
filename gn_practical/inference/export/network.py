"""The part of a detector that is exported: from one picture to tensors of any number of rows.

What comes before, the resize, is described in the file. What comes after, pasting masks and merging
things and stuff into a panoptic map, is left to Detectron2's own functions, which need no model:
they are loops over what was found, with sizes in pixels of the original picture.
"""

from collections.abc import Sequence

import torch
from detectron2.export import TracingAdapter
from detectron2.modeling import GeneralizedRCNN, PanopticFPN, RetinaNet
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

BOXES, SCORES, CLASSES, MASKS, SEM_SEG = "boxes", "scores", "classes", "masks", "sem_seg"
_MODELS = (GeneralizedRCNN, PanopticFPN, RetinaNet)


def detector_outputs(model: nn.Module) -> list[str]:
    """Return the names of what :func:`detect` returns for a model.

    Raises:
        ValueError: for a model that cannot be exported.
    """
    if type(model) not in _MODELS:
        raise ValueError(
            "the model must be one of Faster R-CNN, Mask R-CNN, RetinaNet and panoptic FPN to be "
            f"exported, got MODEL.META_ARCHITECTURE={type(model).__name__}. Train one of these."
        )
    heads = getattr(model, "roi_heads", None)
    if getattr(heads, "keypoint_on", False):
        raise ValueError(
            "the model must predict boxes and masks to be exported, got MODEL.KEYPOINT_ON=True. "
            "Set it to False."
        )
    names = [BOXES, SCORES, CLASSES]
    names += [MASKS] if getattr(heads, "mask_on", False) else []
    return names + ([SEM_SEG] if isinstance(model, PanopticFPN) else [])


def detect(model: nn.Module, inputs: Sequence[dict[str, Tensor]]) -> tuple[Tensor, ...]:
    """Run a model without what follows on the original picture.

    Args:
        model: a detector in evaluation mode.
        inputs: one picture, as the model takes it: ``[{"image": (3, H, W)}]``.

    Returns:
        Boxes (N, 4) in pixels of the input, scores (N,), classes (N,), masks (N, 1, M, M) in each
        box, and logits (C, H, W) of the semantic classes: those that the model has.

    Raises:
        ValueError: for rotated boxes.
    """
    if isinstance(model, PanopticFPN):
        (found,), (sem_seg,) = model.inference(inputs, do_postprocess=False)
    else:
        (found,), sem_seg = _find(model, inputs), None
    if not isinstance(found.pred_boxes, Boxes):
        raise ValueError(
            "the model must predict upright boxes to be exported, got "
            f"{type(found.pred_boxes).__name__}. Train one with MODEL.ANCHOR_GENERATOR.NAME "
            "DefaultAnchorGenerator."
        )
    outputs = [found.pred_boxes.tensor, found.scores, found.pred_classes]
    outputs += [found.pred_masks] if found.has("pred_masks") else []
    if sem_seg is not None:  # without the padding
        height, width = inputs[0]["image"].shape[1:]
        outputs.append(sem_seg[:, :height, :width])
    return tuple(outputs)


def _find(model: nn.Module, inputs: Sequence[dict[str, Tensor]]) -> list[Instances]:
    if isinstance(model, GeneralizedRCNN):
        return model.inference(inputs, do_postprocess=False)
    images = model.preprocess_image(inputs)
    maps = model.backbone(images.tensor)
    features = [maps[name] for name in model.head_in_features]
    return model.forward_inference(images, features, model.head(features))


class Backbone(nn.Module):
    """The backbone and neck of a detector: from a picture to feature maps, for what knows no more.

    The picture must be whole multiples of the stride: padding depends on its size.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of a picture (3, H, W), the finest first."""
        normalized = (image[None] - self.model.pixel_mean) / self.model.pixel_std
        return tuple(self.model.backbone(normalized).values())


def traceable(model: nn.Module, image: Tensor) -> TracingAdapter:
    """Return a module that takes a picture (3, H, W) and returns what :func:`detect` does."""
    return TracingAdapter(model, [{"image": image}], detect).eval()


def largest_stride(model: nn.Module) -> int:
    """Return what the sides of a picture must be multiples of to need no padding anywhere."""
    strides = [shape.stride for shape in model.backbone.output_shape().values()]
    return max(32, *strides)


def example_image(model: nn.Module, height: int = 224, width: int = 320) -> Tensor:
    """Return noise as a picture to trace with, so that there is something to find."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        0, 256, (len(model.pixel_mean), height, width), generator=generator
    ).float()
