"""Pictures beside each other, with what is drawn on them in the colour of its class."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.utils.visualizer import Visualizer

_LONGER_SIDE = (512, 1024)  # px: small images are enlarged until their texts are readable
GAP = 8  # px between pictures
_BAR = 32
_TEXT = 9  # points, of 1/72 inch at 100 pixels an inch
_STEPS = sorted(range(-8, 9), key=abs)  # lines from where a text should be
_FONT = (cv2.FONT_HERSHEY_SIMPLEX, 0.6)


class Shape(NamedTuple):
    """Something to draw: a mask, a box, keypoints, or several of these."""

    text: str
    color: tuple[float, float, float]  # RGB from 0 to 255
    mask: np.ndarray | None = None  # (H, W)
    # Left, top, right, bottom; or of a rotated box x and y of its centre, width, height, degrees.
    box: Sequence[float] | None = None
    keypoints: np.ndarray | None = None  # (K, 3): x, y, visibility

    @property
    def area(self) -> float:
        """Pixels of the mask, or else of the box."""
        if self.mask is not None:
            return float(np.count_nonzero(self.mask))
        if self.box is not None and len(self.box) == 5:
            return self.box[2] * self.box[3]
        left, top, right, bottom = self.box or (0, 0, 0, 0)
        return (right - left) * (bottom - top)


def panel_scale(height: int, width: int) -> float:
    """Return by how much to enlarge or shrink a picture, given its size in pixels.

    Example:
        >>> panel_scale(96, 128), panel_scale(480, 640), panel_scale(4096, 1)
        (4.0, 1.0, 0.25)
    """
    longer = max(height, width)
    return float(np.clip(longer, *_LONGER_SIDE)) / longer


def draw_shapes(pixels: np.ndarray, shapes: Iterable[Shape], metadata: Metadata) -> np.ndarray:
    """Draw shapes on an RGB picture, the large ones first; enlarged if it is small.

    Args:
        pixels: (H, W, 3), uint8.
        shapes: in the coordinates of the picture.
        metadata: of the keypoints, if there are any.
    """
    scale = panel_scale(*pixels.shape[:2])
    # Enlarged here: the visualizer's own scale leaves texts too small, or of no size at all.
    pixels = _resized(pixels, scale, cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    visualizer = Visualizer(pixels, metadata)
    shapes = [_scaled(shape, scale) for shape in sorted(shapes, key=lambda shape: -shape.area)]
    for shape in shapes:
        color = _between_0_and_1(shape.color)
        if shape.mask is not None:
            visualizer.draw_binary_mask(shape.mask, color, alpha=0.5, area_threshold=0)
    for shape in shapes:
        color = _between_0_and_1(shape.color)
        if shape.box is not None and len(shape.box) == 5:
            visualizer.draw_rotated_box_with_label(shape.box, edge_color=color)
        elif shape.box is not None:
            visualizer.draw_box(shape.box, edge_color=color)
        if shape.keypoints is not None:
            visualizer.draw_and_connect_keypoints(shape.keypoints)
    _write_texts(visualizer, shapes)
    return visualizer.get_output().get_image()


def _write_texts(visualizer: Visualizer, shapes: Iterable[Shape]) -> None:
    """Write each text at the corner of its box or in its mask, where no other is, if there is room.

    Those of small shapes come first, as they have less room.
    """
    image = visualizer.output
    renderer, taken = image.canvas.get_renderer(), []
    for shape in sorted(shapes, key=lambda shape: shape.area):
        if shape.box is not None:
            x, y = shape.box[:2]
        elif shape.area:
            x, y = _inside(shape.mask)
        else:
            continue
        color = _lighter(shape.color)
        # Else matplotlib takes what is between dollars for a formula.
        text = shape.text.replace("$", r"\$")
        visualizer.draw_text(text, (x, y), font_size=_TEXT, color=color)
        text = image.ax.texts[-1]
        extent = text.get_window_extent(renderer)
        width, height = extent.width + 4, extent.height + 4
        left = x if shape.box is not None else x - width / 2
        left = float(np.clip(left, 2, max(2, image.width - width)))
        if shape.box is not None and shape.box[3] - shape.box[1] < 2 * height:
            y -= height  # above what it would hide
        lowest = max(2, image.height - height)
        tops = [float(np.clip(y + n * height, 2, lowest)) for n in _STEPS]
        free = (top for top in tops if not _meets(taken, left, top, width, height))
        top = next(free, tops[0])
        text.set_horizontalalignment("left")
        text.set_position((left, top))
        taken.append((left, top, left + width, top + height))


def _meets(
    taken: Iterable[tuple[float, ...]], left: float, top: float, width: float, height: float
) -> bool:
    return any(
        left < x1 and x0 < left + width and top < y1 and y0 < top + height
        for x0, y0, x1, y1 in taken
    )


def _inside(mask: np.ndarray) -> tuple[float, float]:
    """Return the point of a mask that is farthest from its border."""
    distance = cv2.distanceTransform(np.pad(mask, 1), cv2.DIST_L2, 3)
    row, column = np.unravel_index(distance.argmax(), distance.shape)
    return column - 1, row - 1


def _lighter(color: Sequence[float]) -> tuple[float, ...]:
    """Mix a colour with white, to be read on black."""
    return tuple((channel + 255) / 510 for channel in color)


def side_by_side(panels: Sequence[np.ndarray], titles: Sequence[str]) -> np.ndarray:
    """Join pictures of one size, each under its title, in ASCII."""
    height = max(panel.shape[0] for panel in panels)
    texts = [cv2.getTextSize(title, *_FONT, 1)[0][0] + 12 for title in titles]
    widths = [max(p.shape[1], text) for p, text in zip(panels, texts, strict=True)]
    whole = sum(widths) + (len(panels) - 1) * GAP
    canvas = np.full((height + _BAR, whole, 3), 255, dtype=np.uint8)
    left = 0
    for panel, title, width in zip(panels, titles, widths, strict=True):
        canvas[_BAR : _BAR + panel.shape[0], left : left + panel.shape[1]] = panel
        cv2.putText(canvas, title, (left + 6, 22), *_FONT, (0, 0, 0), 1, cv2.LINE_AA)
        left += width + GAP
    return canvas


def _scaled(shape: Shape, scale: float) -> Shape:
    mask, box, keypoints = shape.mask, shape.box, shape.keypoints
    if mask is not None:
        mask = _resized(mask.astype(np.uint8), scale, cv2.INTER_NEAREST)
    if box is not None:
        box = [scale * edge for edge in box[:4]] + list(box[4:])
    if keypoints is not None:
        keypoints = np.asarray(keypoints, dtype=float) * (scale, scale, 1)
    return shape._replace(mask=mask, box=box, keypoints=keypoints)


def _resized(pixels: np.ndarray, scale: float, interpolation: int) -> np.ndarray:
    if scale == 1:
        return pixels
    size = [max(1, round(side * scale)) for side in pixels.shape[1::-1]]
    return cv2.resize(pixels, size, interpolation=interpolation)


def _between_0_and_1(color: Sequence[float]) -> tuple[float, ...]:
    return tuple(channel / 255 for channel in color)
