"""Colours of classes in pictures."""

from detectron2.data.catalog import Metadata
from detectron2.utils.colormap import colormap


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
