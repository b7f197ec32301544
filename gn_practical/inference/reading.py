"""Pictures of any kind as the pixels that training reads from their files."""

import os
import re
from typing import Any

import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy, read_image
from PIL import Image, ImageOps

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def read_pixels(image: Any, channels: str) -> np.ndarray:
    """Return a picture as Detectron2's loader reads its file: EXIF's rotation done, no alpha.

    An array and a PIL image give what a file of the same picture gives. Of 16 bits those of colour
    keep the upper 8, as Pillow reads their files; what Pillow makes of 16-bit grey it makes here.

    Args:
        image: path or address; PIL image; or array in RGB, ``(H, W)``, ``(H, W, 1)``,
            ``(H, W, 3)`` or ``(H, W, 4)``, of uint8 or uint16.
        channels: ``INPUT.FORMAT`` of the model: "BGR", "RGB", "L".

    Returns:
        ``(H, W, C)`` uint8.

    Raises:
        ValueError: if it is no whole picture, or an array of another kind.

    Example:
        >>> read_pixels(np.array([[[255, 0, 0]]], np.uint8), "BGR").tolist()
        [[[0, 0, 255]]]
    """
    if isinstance(image, str | os.PathLike):
        return _read_file(os.fspath(image), channels)
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"a picture must be a path, an array or a PIL image, got {type(image).__name__}. "
            "Convert it to one of them."
        )
    return convert_PIL_to_numpy(ImageOps.exif_transpose(image), channels)


def to_rgb(pixels: np.ndarray, channels: str) -> np.ndarray:
    """Return pixels of ``INPUT.FORMAT`` as ``(H, W, 3)`` RGB."""
    if channels == "BGR":
        return np.ascontiguousarray(pixels[..., ::-1])
    return np.repeat(pixels, 3, axis=2) if channels == "L" else np.ascontiguousarray(pixels)


def _read_file(path: str, channels: str) -> np.ndarray:
    try:
        return read_image(path, channels)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        if isinstance(error, OSError) and error.errno is not None:
            reason = error.strerror
        else:
            # Pillow names the open file, or the path, which is said already.
            reason = re.sub(r" (<_io\.\S+ name=.*>|'.*')$", "", " ".join(str(error).split()))
        raise ValueError(
            f"a picture must be whole and readable, got {path}: {reason.rstrip('.')}. "
            "Restore the file, or leave it out."
        ) from None


def _from_array(array: np.ndarray) -> Image.Image:
    size = array.shape
    depth = 1 if array.ndim == 2 else size[-1]
    if array.ndim not in (2, 3) or depth not in _MODES or 0 in size:
        raise ValueError(
            "an array must be a picture of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), got "
            f"shape={size}. Put the channels last."
        )
    if array.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"an array must be of uint8 or uint16, got dtype={array.dtype}. Scale it to 0 to 255 "
            "and convert it."
        )
    if depth == 1:
        return Image.fromarray(np.ascontiguousarray(array.reshape(size[:2])))
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(array))
