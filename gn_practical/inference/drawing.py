"""Pictures of predictions and annotations, by Detectron2's visualizer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import GenericMask, VisImage, Visualizer


class HoleKeepingVisualizer(Visualizer):
    """Detectron2's, but for the holes of things, which it fills."""

    def overlay_instances(
        self,
        *,
        masks: Sequence[Any] | None = None,
        labels: Sequence[str] | None = None,
        assigned_colors: Sequence[Any] | None = None,
        alpha: float = 0.5,
        **others: Any,
    ) -> VisImage:
        """Draw masks as they are, the large ones first, and boxes and keypoints as Detectron2."""
        if masks is None or len(masks) == 0:
            style = {"labels": labels, "assigned_colors": assigned_colors, "alpha": alpha}
            return super().overlay_instances(**style, **others)
        size = self.output.height, self.output.width
        masks = [m if isinstance(m, GenericMask) else GenericMask(m, *size) for m in masks]
        for i in np.argsort([-float(mask.area()) for mask in masks]):
            color = None if assigned_colors is None else assigned_colors[i]
            text = None if labels is None else labels[i]
            self.draw_binary_mask(masks[i].mask, color, text=text, alpha=alpha)
        return super().overlay_instances(assigned_colors=assigned_colors, **others)

    def draw_text(self, text: str, position: Any, **style: Any) -> VisImage:
        """Write a text as it is: without, matplotlib takes what is between dollars for formulas."""
        return super().draw_text(text.replace("$", r"\$"), position, **style)


def with_colors(metadata: Metadata) -> Metadata:
    """Return a copy in which each class has a colour: its own, or one that follows from its number.

    Example:
        >>> with_colors(Metadata(thing_classes=["cat"], thing_colors=[(255, 0, 0)])).thing_colors
        [(255, 0, 0)]
    """
    palette = colormap(rgb=True)
    colors = {}
    for kind, first in (("thing", 0), ("stuff", len(palette) // 2)):
        own = list(metadata.get(f"{kind}_colors") or ())
        count = len(metadata.get(f"{kind}_classes") or ())
        others = [palette[(first + i) % len(palette)] for i in range(len(own), count)]
        colors[f"{kind}_colors"] = own + others
    return Metadata(**{**metadata.as_dict(), **colors})
