"""What a picture shows: segments and boxes with names and colours, drawn on an image.

With the primitives of Detectron2's ``Visualizer``: its ``draw_panoptic_seg`` and
``draw_dataset_dict`` give a class other colours in each picture, fill the holes of masks and put
the names of things beside them.
"""

import colorsys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer

Color = tuple[float, float, float]

_WHITE = (1.0, 1.0, 1.0)


def draw_segments(
    image: np.ndarray, segments: Sequence[dict[str, Any]], metadata: Metadata, width: int
) -> np.ndarray:
    """Draw segments with their texts on an image that is first scaled to a given width.

    Args:
        image: RGB.
        segments: as Detectron2's ``segments_info``: "category_id" (contiguous) and "isthing",
            perhaps "score" and "iscrowd"; with "mask", "box" (x0, y0, x1, y1 in pixels), or both,
            on the scale of ``image``.
        metadata: names and colours of the classes.
        width: of the picture in pixels.

    Shape:
        ``(H, W, 3)`` → ``(width · H / W, width, 3)``, uint8.
    """
    scale = width / image.shape[1]
    size = (width, max(1, round(scale * image.shape[0])))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    visualizer = Visualizer(
        cv2.resize(image, size, interpolation=interpolation), font_size_scale=1.25
    )
    shades: Counter[int] = Counter()
    for segment in sorted(segments, key=lambda segment: bool(segment["isthing"])):
        category, is_thing = segment["category_id"], bool(segment["isthing"])
        color = class_color(metadata, category, is_thing)
        if is_thing:
            color = _shade(color, shades[category])
            shades[category] += 1
        text = segment_text(segment, metadata)
        if segment.get("mask") is not None:
            visualizer.draw_binary_mask(
                cv2.resize(segment["mask"].astype(np.uint8), size, interpolation=cv2.INTER_NEAREST),
                color=color,
                edge_color=color if is_thing else _WHITE,
                text=text,
                alpha=0.55 if is_thing else 0.45,
            )
            text = ""  # once
        if segment.get("box") is not None:
            box = scale * np.asarray(segment["box"], dtype=float)[None]
            visualizer.overlay_instances(
                boxes=box, labels=[text], assigned_colors=[color], alpha=0.55
            )
    return visualizer.get_output().get_image()


def segment_text(segment: dict[str, Any], metadata: Metadata) -> str:
    """Name a segment: class, score in percent, and whether it is a crowd.

    Example:
        >>> segment = {"category_id": 0, "isthing": True, "score": 0.9}
        >>> segment_text(segment, Metadata(thing_classes=["cat"]))
        'cat 90%'
    """
    names = metadata.get("thing_classes" if segment["isthing"] else "stuff_classes") or ()
    category, score = segment["category_id"], segment.get("score")
    name = names[category] if category < len(names) else f"class {category}"
    score_text = "" if score is None else f" {100 * float(score):.0f}%"
    return name + score_text + (" (crowd)" if segment.get("iscrowd") else "")


def class_color(metadata: Metadata, category: int, is_thing: bool) -> Color:
    """The class's colour in the metadata, or else one that follows from its number.

    Example:
        >>> class_color(Metadata(thing_colors=[[255, 0, 0]]), 0, is_thing=True)
        (1.0, 0.0, 0.0)
    """
    colors = metadata.get("thing_colors" if is_thing else "stuff_colors") or ()
    if category >= len(colors):
        colors = colormap(rgb=True)
        category = (category if is_thing else category + len(colors) // 2) % len(colors)
    red, green, blue = (float(value) / 255 for value in colors[category])
    return red, green, blue


def _shade(color: Color, index: int) -> Color:
    """Tell instances of one class apart by lightness: as it is, darker, lighter, and again."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*color)
    factor = (1.0, 0.7, 1.35)[index % 3]
    return colorsys.hls_to_rgb(hue, min(0.85, max(0.15, lightness * factor)), saturation)
