"""``ImageClassifier``: a backbone of Detectron2's registry, pooling and a linear layer."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn


@dataclass
class Batch:
    """Images of one size with their labels.

    Attributes:
        images: (N, C, H, W), 0 to 255, uint8.
        labels: (N,), int64.
        indices: (N,), of the images in their data set.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor

    def __iter__(self) -> Iterator[dict[str, int]]:
        """Name the images, as a batch of Detectron2's does."""
        return ({"image_id": index} for index in self.indices.tolist())

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, part: slice) -> "Batch":
        """Return a part of the batch."""
        return Batch(self.images[part], self.labels[part], self.indices[part])


@META_ARCH_REGISTRY.register()
class ImageClassifier(nn.Module):
    """Normalizes pixels, runs a backbone, pools, and classifies by a linear layer.

    Any backbone of Detectron2's registry will do; the last of its features is taken.

    Args:
        cfg: config with ``CLASSIFICATION``, ``MODEL.BACKBONE.NAME``, ``INPUT.FORMAT``, and
            ``MODEL.PIXEL_MEAN`` and ``MODEL.PIXEL_STD`` in its order.

    Shape:
        - Input: a :class:`Batch` of N images.
        - Output: {"loss_cls": cross-entropy in nats} while training, logits (N, classes) else.

    Raises:
        ValueError: if the number of classes is not known yet.

    Example:
        >>> from detectron2.config import get_cfg
        >>> from gn_classification.config import add_classification_config
        >>> from gn_practical import add_pgn_config, build_model
        >>> cfg = get_cfg()
        >>> add_pgn_config(cfg)
        >>> add_classification_config(cfg)
        >>> cfg.MODEL.META_ARCHITECTURE = "ImageClassifier"
        >>> cfg.MODEL.BACKBONE.NAME = "build_mlp_backbone"
        >>> cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [77.9], [95.9]
        >>> cfg.CLASSIFICATION.NUM_CLASSES, cfg.CLASSIFICATION.IMAGE_SIZE = 10, 8
        >>> cfg.MODEL.DEVICE = "cpu"
        >>> model = build_model(cfg).eval()
        >>> images = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
        >>> model(Batch(images, torch.tensor([3, 4]), torch.arange(2))).shape
        torch.Size([2, 10])
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        num_classes = cfg.CLASSIFICATION.NUM_CLASSES
        if num_classes < 1:
            raise ValueError(
                "CLASSIFICATION.NUM_CLASSES must be known before a model is built, got "
                f"CLASSIFICATION.NUM_CLASSES={num_classes}. Set it to that of the data set."
            )
        mean, std = (torch.tensor(cfg.MODEL[key]) for key in ("PIXEL_MEAN", "PIXEL_STD"))
        self.register_buffer("pixel_mean", mean.view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", std.view(-1, 1, 1), persistent=False)
        self.swap = cfg.INPUT.FORMAT == "BGR" and len(mean) == 3  # images are read as RGB
        self.backbone = build_backbone(cfg)
        self.feature, shape = list(self.backbone.output_shape().items())[-1]
        self.classifier = nn.Linear(shape.channels, num_classes)

    def forward(self, batch: Batch) -> dict[str, Tensor] | Tensor:
        """Return the loss while training, logits otherwise."""
        device = self.pixel_mean.device
        images = batch.images.to(device, non_blocking=True)
        images = images.flip(1) if self.swap else images
        features = self.backbone((images - self.pixel_mean) / self.pixel_std)[self.feature]
        if features.dim() == 4:
            features = features.mean((2, 3))
        logits = self.classifier(features)
        if not self.training:
            return logits
        labels = batch.labels.to(device, non_blocking=True)
        if has_event_storage():
            wrong = (logits.detach().argmax(1) != labels).float().mean()
            get_event_storage().put_scalar("train_error", 100 * wrong.item())
        return {"loss_cls": F.cross_entropy(logits, labels)}
