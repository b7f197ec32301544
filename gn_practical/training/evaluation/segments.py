"""What a picture shows: segments and boxes with names and colours, drawn on an image."""

import colorsys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.utils.visualizer import Visualizer

Color = tuple[float, float, float]


@dataclass
class Segment:
    """One thing or stuff region: its text, its colour (RGB in [0, 1]), its mask and its box."""

    text: str
    color: Color
    is_thing: bool
    mask: np.ndarray | None = None
    box: np.ndarray | None = None


def panoptic_segments(
    segment_ids: np.ndarray, segments_info: Sequence[dict], metadata: Metadata
) -> list[Segment]:
    """Segments of a panoptic map, in Detectron2's format with contiguous class ids.

    Args:
        segment_ids: the id of each pixel's segment.
        segments_info: dicts with "id", "category_id", "isthing", and "score" or "iscrowd".
        metadata: of the data set.

    Shape:
        ``segment_ids``: ``(H, W)``.
    """
    shades = Counter()
    segments = []
    for info in segments_info:
        is_thing, category = bool(info["isthing"]), info["category_id"]
        color = class_color(metadata, category, is_thing)
        if is_thing:
            color = _shade(color, shades[category])
            shades[category] += 1
        text = _text(metadata, is_thing, category, info.get("score"), info.get("iscrowd"))
        segments.append(Segment(text, color, is_thing, mask=segment_ids == info["id"]))
    return segments


def instance_segments(
    boxes: np.ndarray,
    classes: Sequence[int],
    metadata: Metadata,
    masks: Sequence[np.ndarray] | None = None,
    scores: Sequence[float] | None = None,
    crowds: Sequence[int] | None = None,
) -> list[Segment]:
    """Segments of detected or annotated instances.

    Args:
        boxes: x0, y0, x1, y1 in pixels.
        classes: contiguous class ids.
        metadata: of the data set.
        masks: of each instance, ``(H, W)``.
        scores: of each instance, in [0, 1].
        crowds: 1 for annotations of a crowd.

    Shape:
        ``boxes``: ``(N, 4)``.
    """
    shades = Counter()
    segments = []
    for index, category in enumerate(classes):
        color = _shade(class_color(metadata, category, True), shades[category])
        shades[category] += 1
        score = None if scores is None else scores[index]
        text = _text(metadata, True, category, score, crowds is not None and crowds[index])
        mask = None if masks is None else masks[index]
        segments.append(Segment(text, color, True, mask=mask, box=np.asarray(boxes[index])))
    return segments


def semantic_segments(labels: np.ndarray, metadata: Metadata) -> list[Segment]:
    """Segments of a map of stuff classes; labels that are no class are left out.

    Shape:
        ``labels``: ``(H, W)``.
    """
    known = [int(label) for label in np.unique(labels) if label < len(metadata.stuff_classes)]
    return [
        Segment(
            _text(metadata, False, label),
            class_color(metadata, label, False),
            False,
            mask=labels == label,
        )
        for label in known
    ]


def class_color(metadata: Metadata, category: int, is_thing: bool) -> Color:
    """The class's colour in the metadata, or else one that follows from its number.

    Example:
        >>> class_color(Metadata(thing_colors=[[255, 0, 0]]), 0, is_thing=True)
        (1.0, 0.0, 0.0)
    """
    colors = metadata.get("thing_colors" if is_thing else "stuff_colors") or ()
    if category < len(colors):
        red, green, blue = (value / 255 for value in colors[category])
        return red, green, blue
    golden_ratio = 0.618034  # neighbouring numbers get distant hues
    if is_thing:
        return colorsys.hsv_to_rgb(category * golden_ratio % 1, 0.85, 1.0)
    return colorsys.hsv_to_rgb((category * golden_ratio + 0.25) % 1, 0.6, 0.8)


def draw_segments(image: np.ndarray, segments: Sequence[Segment], width: int) -> np.ndarray:
    """Draw segments with their texts on an image that is first scaled to a given width.

    Args:
        image: RGB.
        segments: masks and boxes on the scale of ``image``.
        width: of the picture in pixels.

    Shape:
        ``(H, W, 3)`` → ``(width · H / W, width, 3)``, uint8.
    """
    scale = width / image.shape[1]
    size = (width, max(1, round(scale * image.shape[0])))
    visualizer = Visualizer(
        cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC),
        font_size_scale=1.25,
    )
    _draw_stuff(visualizer, [s for s in segments if not s.is_thing], size)
    _draw_things(visualizer, [s for s in segments if s.is_thing], size, scale)
    return visualizer.get_output().get_image()


def _draw_stuff(visualizer: Visualizer, segments: list[Segment], size: tuple[int, int]) -> None:
    for segment in segments:
        visualizer.draw_binary_mask(
            _resize(segment.mask, size),
            color=segment.color,
            edge_color=(1.0, 1.0, 1.0),
            text=segment.text,
            alpha=0.45,
        )


def _draw_things(
    visualizer: Visualizer, segments: list[Segment], size: tuple[int, int], scale: float
) -> None:
    for segment in segments:
        if segment.mask is not None:  # not overlay_instances, which fills the holes of masks
            visualizer.draw_binary_mask(
                _resize(segment.mask, size),
                color=segment.color,
                edge_color=segment.color,
                text=segment.text,
                alpha=0.55,
            )
    boxed = [s for s in segments if s.box is not None]
    if boxed:
        visualizer.overlay_instances(
            boxes=np.stack([scale * s.box for s in boxed]),
            labels=[s.text if s.mask is None else "" for s in boxed],
            assigned_colors=[s.color for s in boxed],
            alpha=0.55,
        )


def _resize(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)


def _text(
    metadata: Metadata,
    is_thing: bool,
    category: int,
    score: float | None = None,
    is_crowd: int | None = None,
) -> str:
    names = metadata.get("thing_classes" if is_thing else "stuff_classes") or ()
    name = names[category] if category < len(names) else f"class {category}"
    score_text = "" if score is None else f" {100 * float(score):.0f}%"
    return name + score_text + (" (crowd)" if is_crowd else "")


def _shade(color: Color, index: int) -> Color:
    """Tell instances of one class apart by lightness: as it is, darker, lighter, and again."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*color)
    factor = (1.0, 0.7, 1.35)[index % 3]
    return colorsys.hls_to_rgb(hue, min(0.85, max(0.15, lightness * factor)), saturation)
