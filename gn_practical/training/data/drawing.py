"""Drawing of one scene: wavy regions of stuff with a few overlapping things on them."""

from typing import NamedTuple

import cv2
import numpy as np

THING_CLASSES = ("disc", "box", "triangle", "star", "ring")
STUFF_CLASSES = ("sky", "grass", "water", "sand")

_SUPERSAMPLING = 4  # masks are drawn this much larger, for smooth outlines
_THING_SIZE = (26 / 128, 72 / 128)  # diameter as a fraction of the image side
_HUES = {"disc": 0, "box": 72, "triangle": 144, "star": 216, "ring": 288}  # degrees
_HUE_SPREAD = 30
_MIN_VISIBLE_PIXELS = 120
_MIN_VISIBLE_FRACTION = 0.5  # less of a thing than this and its class can only be guessed
_MIN_STUFF_PIXELS = 64

Generator = np.random.Generator


class Segment(NamedTuple):
    """One segment of a scene: its class, as an index, and its visible pixels, ``(H, W)`` bool."""

    is_thing: bool
    class_index: int
    mask: np.ndarray


def draw_scene(rng: Generator, size: int) -> tuple[np.ndarray, list[Segment]]:
    """Draw a scene: the RGB image, ``(size, size, 3)`` uint8, and its segments, which are disjoint.

    The class of a thing shows in its shape and, less surely, in its hue. Things that stay hidden
    for the most part are left out of the picture; what is left of a stuff region of fewer than 64
    pixels belongs to no segment (void).
    """
    image, regions = _draw_stuff(rng, size)
    things = _place_things(rng, size)
    covered = np.zeros((size, size), bool)
    for thing, alpha in things:
        image = _paint_thing(rng, image, thing.class_index, alpha)
        covered |= thing.mask
    image *= rng.uniform(0.85, 1.1)
    image += rng.normal(0, rng.uniform(2, 6), image.shape)
    stuff = [Segment(False, index, mask & ~covered) for index, mask in regions]
    stuff = [segment for segment in stuff if segment.mask.sum() >= _MIN_STUFF_PIXELS]
    return image.clip(0, 255).astype(np.uint8), stuff + [thing for thing, _ in things]


def _draw_stuff(rng: Generator, size: int) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """Stack two or three regions with wavy boundaries, the sky above the others."""
    ground = 1 + rng.permutation(len(STUFF_CLASSES) - 1)
    has_sky = rng.random() < 0.85
    count = rng.integers(1, 3) if has_sky else rng.integers(2, 4)
    classes = [*([0] if has_sky else []), *ground[:count].tolist()]
    layer = np.zeros((size, size), int)
    for edge in _boundaries(rng, len(classes), size):
        layer += np.arange(size)[:, None] >= edge
    image = np.zeros((size, size, 3))
    for position, class_index in enumerate(classes):
        texture = _STUFF_TEXTURES[class_index](rng, size)
        image = np.where((layer == position)[..., None], texture, image)
    return image, [(index, layer == position) for position, index in enumerate(classes)]


def _boundaries(rng: Generator, count: int, size: int) -> list[np.ndarray]:
    heights = (np.arange(1, count) + rng.uniform(-0.25, 0.25, count - 1)) / count
    x = np.arange(size) / size
    edges = []
    for height in heights:
        wave = np.zeros(size)
        for periods in rng.uniform([0.4, 1.5, 3.0], [1.2, 2.5, 6.0]):
            wave += 0.035 / np.sqrt(periods) * np.sin(2 * np.pi * (periods * x + rng.random()))
        edges.append(size * (height + wave))
    return edges


def _noise(rng: Generator, size: int, rows: int, columns: int) -> np.ndarray:
    """Smooth noise of unit variance with about `rows` x `columns` independent cells."""
    cells = rng.normal(size=(rows, columns))
    return cv2.resize(cells, (size, size), interpolation=cv2.INTER_CUBIC)[..., None]


def _base_colour(rng: Generator, red: int, green: int, blue: int) -> np.ndarray:
    return np.array([red, green, blue]) + rng.uniform(-18, 18, 3)


def _sky(rng: Generator, size: int) -> np.ndarray:
    haze = np.linspace(0, rng.uniform(30, 70), size)[:, None, None]
    clouds = np.clip(_noise(rng, size, 6, 4) - rng.uniform(0, 1), 0, 1)
    blue = _base_colour(rng, 110, 165, 220) + haze
    return blue + clouds * (245 - blue)


def _grass(rng: Generator, size: int) -> np.ndarray:
    blades = _noise(rng, size, max(size // 9, 2), size // 2)
    return _base_colour(rng, 75, 135, 55) + blades * [18, 24, 12] + _noise(rng, size, 5, 5) * 8


def _water(rng: Generator, size: int) -> np.ndarray:
    ripples = _noise(rng, size, size // 3, max(size // 14, 2))
    return _base_colour(rng, 40, 95, 145) + ripples * [14, 20, 22] + _noise(rng, size, 4, 4) * 6


def _sand(rng: Generator, size: int) -> np.ndarray:
    grains = rng.normal(size=(size, size, 1)) * 12
    return _base_colour(rng, 208, 182, 130) + grains + _noise(rng, size, 8, 8) * 7


_STUFF_TEXTURES = (_sky, _grass, _water, _sand)


def _place_things(rng: Generator, size: int) -> list[tuple[Segment, np.ndarray]]:
    """Choose two to four things, in painter's order; drop those that others hide."""
    classes_and_alphas = []
    for _ in range(rng.integers(2, 5)):
        class_index = int(rng.integers(len(THING_CLASSES)))
        classes_and_alphas.append((class_index, _thing_alpha(rng, class_index, size)))
    kept, covered = [], np.zeros((size, size), bool)
    for class_index, alpha in reversed(classes_and_alphas):
        mask = alpha >= 0.5
        visible = mask & ~covered
        if visible.sum() >= max(_MIN_VISIBLE_PIXELS, _MIN_VISIBLE_FRACTION * mask.sum()):
            kept.append((Segment(True, class_index, visible), alpha))
            covered |= mask
    return kept[::-1]


def _thing_alpha(rng: Generator, class_index: int, size: int) -> np.ndarray:
    """Rasterize a shape at a random place, size and angle: the coverage of each pixel, 0 to 1."""
    scale = np.exp(rng.uniform(*np.log(_THING_SIZE))) / 2
    angle = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretch = scale * np.array([1, rng.uniform(0.75, 1)])
    centre = rng.uniform(0.12, 0.88, 2)
    large = size * _SUPERSAMPLING
    contours = [
        np.rint(large * ((contour * stretch) @ rotation.T + centre)).astype(np.int32)
        for contour in _contours(rng, class_index)
    ]
    canvas = np.zeros((large, large), np.uint8)
    cv2.fillPoly(canvas, contours, 255)  # even-odd rule: a second contour is a hole
    return cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA) / 255.0


def _contours(rng: Generator, class_index: int) -> list[np.ndarray]:
    """Outlines of a shape inside the unit circle."""
    name = THING_CLASSES[class_index]
    if name == "ring":
        return [_polygon(64), _polygon(64) * rng.uniform(0.45, 0.6)]
    if name == "star":
        radius = np.tile([1.0, rng.uniform(0.38, 0.5)], 5)
        return [_polygon(10) * radius[:, None]]
    return [_polygon({"disc": 64, "box": 4, "triangle": 3}[name])]


def _polygon(corners: int) -> np.ndarray:
    angles = 2 * np.pi * (np.arange(corners) + 0.5) / corners
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _paint_thing(
    rng: Generator, image: np.ndarray, class_index: int, alpha: np.ndarray
) -> np.ndarray:
    """Blend a thing of its class's hue and a random texture, with a darker rim, into the image."""
    size = len(alpha)
    hue = _HUES[THING_CLASSES[class_index]] + rng.uniform(-_HUE_SPREAD, _HUE_SPREAD)
    first, second = _random_colour(rng, hue), _random_colour(rng, rng.uniform(0, 360))
    pattern = _pattern(rng, size)
    texture = first * (1 - pattern) + (0.5 * first + 0.5 * second) * pattern
    inner = cv2.erode(alpha, np.ones((3, 3)), iterations=max(1, size // 128))
    texture = texture * (0.45 + 0.55 * inner[..., None])
    return image + alpha[..., None] * (texture - image)


def _random_colour(rng: Generator, hue: float) -> np.ndarray:
    hsv = np.float32([hue % 360, rng.uniform(0.45, 1), rng.uniform(0.55, 1)])
    return 255.0 * cv2.cvtColor(hsv[None, None], cv2.COLOR_HSV2RGB)[0, 0]


def _pattern(rng: Generator, size: int) -> np.ndarray:
    """Weight of the second colour in each pixel, 0 to 1: plain, stripes, checks, noise, ramp."""
    y, x = np.mgrid[:size, :size]
    angle, period = rng.uniform(0, np.pi), size * rng.uniform(5, 12) / 128
    along = (x * np.cos(angle) + y * np.sin(angle)) / period
    across = (y * np.cos(angle) - x * np.sin(angle)) / period
    patterns = (
        np.zeros((size, size)),
        along % 1 < 0.5,
        (along % 1 < 0.5) ^ (across % 1 < 0.5),
        _noise(rng, size, size // 4, size // 4)[..., 0].clip(-1, 1) / 2 + 0.5,
        (along / 8) % 1,
    )
    return patterns[rng.integers(len(patterns))].astype(float)[..., None]
