"""Pictures of predictions, painted fast enough to keep up with a model.

Detectron2's visualizer draws with matplotlib, which takes as long as a small model itself.
"""

import colorsys
import os
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from gn_practical.inference.prediction import Prediction

Color = tuple[int, int, int]

_READABLE = 512  # px: narrower pictures are enlarged
_ALPHA = 0.5
_MOST_LETTERS = 40
_COARSE = 256  # px: side of the masks in which the place of a text is looked for


class Region(NamedTuple):
    """An area of one colour with a text."""

    mask: np.ndarray  # (H, W) bool
    color: Color
    text: str


class Box(NamedTuple):
    """A rectangle with a text."""

    corners: tuple[float, float, float, float]  # x0, y0, x1, y1
    color: Color
    text: str


def paint(prediction: "Prediction", scale: float | None = None) -> np.ndarray:
    """Paint a prediction: its panoptic segments, or else instances, or else semantic classes.

    Args:
        prediction: of one picture.
        scale: of the sides; by default pictures narrower than 512 pixels are enlarged to that.

    Returns:
        ``(H, W, 3)`` uint8 RGB.
    """
    height, width = prediction.pixels.shape[:2]
    scale = scale or max(1.0, min(_READABLE / width, _READABLE / height))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    canvas = _enlarged(prediction.pixels, size)
    boxes: list[Box] = []
    if prediction.panoptic is not None:
        labels, regions = _segments(prediction)
    elif prediction.instances is not None:
        labels, regions, boxes = _instances(prediction)
    else:
        labels, regions = _semantic(prediction)
    if regions:
        _blend(canvas, labels, [region.color for region in regions])
    _write_boxes(canvas, boxes, scale)
    _mark_keypoints(canvas, prediction, scale)
    for region in regions:
        if region.text:
            _write(canvas, region.text, region.color, center=_inside(region.mask, scale))
    return canvas


def _segments(prediction: "Prediction") -> tuple[np.ndarray, list[Region]]:
    """Return an image of numbers from 1 and the region of each."""
    panoptic, regions = prediction.panoptic, []
    order = np.zeros(max([0, *(each.id for each in prediction.segments)]) + 1, np.uint16)
    for number, each in enumerate(prediction.segments, start=1):
        order[each.id] = number
        color = prediction.classes.color(each.category, each.is_thing)
        if each.is_thing:
            color = _shade(color, number)
        regions.append(Region(panoptic == each.id, color, _text(each.name, each.score)))
    known = np.where(panoptic < len(order), panoptic, 0)
    return order[known], regions


def _instances(prediction: "Prediction") -> tuple[np.ndarray, list[Region], list[Box]]:
    found = prediction.instances
    if found.has("scores"):
        found = found[found.scores >= prediction.least_score]
    boxes = (found.pred_boxes if found.has("pred_boxes") else found.proposal_boxes).tensor.tolist()
    scores = found.scores.tolist() if found.has("scores") else [None] * len(boxes)
    numbers = found.pred_classes.tolist() if found.has("pred_classes") else [0] * len(boxes)
    named = found.has("pred_classes")
    drawn, regions = [], []
    labels = np.zeros(prediction.pixels.shape[:2], np.uint16)
    for index, (number, score) in enumerate(zip(numbers, scores, strict=True)):
        text = _text(prediction.classes.name(number), score) if named else ""
        drawn.append(Box(boxes[index], _shade(prediction.classes.color(number), index), text))
    if found.has("pred_masks"):
        masks = found.pred_masks.numpy()
        areas = masks.reshape(len(masks), -1).sum(axis=1)
        for index in np.argsort(-areas, kind="stable"):  # the small ones on top
            regions.append(Region(masks[index], drawn[index].color, ""))
            labels[masks[index]] = len(regions)
    return labels, regions, drawn


def _semantic(prediction: "Prediction") -> tuple[np.ndarray, list[Region]]:
    classes = prediction.class_map
    labels, regions = np.zeros(prediction.pixels.shape[:2], np.uint16), []
    for number in [] if classes is None else np.unique(classes[classes >= 0]).tolist():
        mask = classes == number
        name = prediction.classes.name(number, thing=False)
        regions.append(Region(mask, prediction.classes.color(number, thing=False), _text(name)))
        labels[mask] = len(regions)
    return labels, regions


def _enlarged(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if size == (pixels.shape[1], pixels.shape[0]):
        return pixels.copy()
    return cv2.resize(pixels, size, interpolation=cv2.INTER_LINEAR)


def _blend(canvas: np.ndarray, labels: np.ndarray, colors: list[Color]) -> None:
    """Tint each region and draw where two meet; by OpenCV, which lets other threads run."""
    size = canvas.shape[1], canvas.shape[0]
    flat = np.array([(0, 0, 0), *colors], np.uint8)[labels]
    flat = cv2.resize(flat, size, interpolation=cv2.INTER_NEAREST)
    labels = cv2.resize(labels, size, interpolation=cv2.INTER_NEAREST)
    inside = cv2.compare(labels, 0, cv2.CMP_GT)
    cv2.copyTo(cv2.addWeighted(canvas, 1 - _ALPHA, flat, _ALPHA, 0), inside, canvas)
    steps = cv2.morphologyEx(labels, cv2.MORPH_GRADIENT, np.ones((2, 2), np.uint8))
    edges = cv2.bitwise_and(inside, cv2.compare(steps, 0, cv2.CMP_GT))
    cv2.copyTo(cv2.convertScaleAbs(flat, alpha=0.5), edges, canvas)


def _write_boxes(canvas: np.ndarray, boxes: list[Box], scale: float) -> None:
    thickness = max(1, round(min(canvas.shape[:2]) / 250))
    for box in reversed(boxes):  # the highest score on top
        x0, y0, x1, y1 = (round(each * scale) for each in box.corners)
        cv2.rectangle(canvas, (x0, y0), (x1, y1), box.color, thickness)
        if box.text:
            _write(canvas, box.text, box.color, corner=(x0, y0))


def _mark_keypoints(canvas: np.ndarray, prediction: "Prediction", scale: float) -> None:
    found = prediction.instances
    if found is None or not found.has("pred_keypoints"):
        return
    radius = max(2, round(min(canvas.shape[:2]) / 150))
    for points in found[found.scores >= prediction.least_score].pred_keypoints.tolist():
        for x, y, _ in points:
            at = round(x * scale), round(y * scale)
            cv2.circle(canvas, at, radius, (255, 255, 255), -1, cv2.LINE_AA)
            cv2.circle(canvas, at, radius, (0, 0, 0), 1, cv2.LINE_AA)


def _write(
    canvas: np.ndarray,
    text: str,
    color: Color,
    *,
    corner: tuple[int, int] | None = None,
    center: tuple[int, int] | None = None,
) -> None:
    """Write a text on its plate, kept inside the picture."""
    height, width = canvas.shape[:2]
    plate = _plate(text, color, max(11, round(min(height, width) / 45)))
    plate = plate[:height, :width]
    rows, columns = plate.shape[:2]
    if center is not None:
        x, y = center[0] - columns // 2, center[1] - rows // 2
    else:
        x, y = corner[0], corner[1] - rows
    x, y = max(0, min(x, width - columns)), max(0, min(y, height - rows))
    under = canvas[y : y + rows, x : x + columns]
    under[:] = cv2.addWeighted(under, 0.2, plate, 0.8, 0)


@lru_cache(maxsize=512)
def _plate(text: str, color: Color, size: int) -> np.ndarray:
    """Return a text in white on a dark shade of a colour."""
    font = _font(size)
    left, top, right, bottom = font.getbbox(text)
    box = right - left + size // 2, bottom - top + size // 2
    plate = Image.new("RGB", box, tuple(channel // 3 for channel in color))
    ImageDraw.Draw(plate).text((size // 4 - left, size // 4 - top), text, (255, 255, 255), font)
    return np.asarray(plate)


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(path, size)


def _text(name: str, score: float | None = None) -> str:
    name = " ".join(name.split()) or "?"
    if len(name) > _MOST_LETTERS:
        name = f"{name[: _MOST_LETTERS - 1]}…"
    return name if score is None else f"{name} {100 * score:.0f} %"


@lru_cache(maxsize=4096)
def _shade(color: Color, number: int) -> Color:
    """Return a shade of a class's colour, so that neighbours of one class differ."""
    hue, light, saturation = colorsys.rgb_to_hls(*(channel / 255 for channel in color))
    light = min(0.75, max(0.25, light + 0.25 * ((number * 0.618) % 1 - 0.5)))
    return tuple(round(255 * each) for each in colorsys.hls_to_rgb(hue, light, saturation))


def _inside(mask: np.ndarray, scale: float) -> tuple[int, int]:
    """Return the point of a mask that is farthest from its border, in pixels of the canvas."""
    step = max(1, max(mask.shape) // _COARSE)
    coarse = mask[::step, ::step].astype(np.uint8)
    coarse = cv2.copyMakeBorder(coarse, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    distance = cv2.distanceTransform(coarse, cv2.DIST_L2, 3)
    row, column = np.unravel_index(distance.argmax(), distance.shape)
    return tuple(round((each - 0.5) * step * scale) for each in (column, row))
