"""Detectron2's dataset mapper, with errors that name the file."""

import os
from typing import Any

import numpy as np
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import read_image

from gn_practical.data.errors import DatasetError

_WAY_OUT = "Restore the file, or remove the image from the data set's json."


class CheckedDatasetMapper(DatasetMapper):
    """A `detectron2.data.DatasetMapper` that says which file it could not use.

    What it makes of a sound sample is Detectron2's own. Masks as RLE need
    ``INPUT.MASK_FORMAT: "bitmask"``.

    Args:
        cfg: a Detectron2 config; or the arguments of `detectron2.data.DatasetMapper`.
        is_train: whether to augment and to keep the annotations.

    Raises:
        DatasetError: (when called) if a file of the sample is missing, truncated or of another
            size than the json says, or its annotations cannot be used. It comes out of a data
            loader's worker with the same short message.

    Example:
        >>> from detectron2.config import get_cfg
        >>> mapper = CheckedDatasetMapper(get_cfg(), is_train=False)
    """

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Read and transform one sample; see `detectron2.data.DatasetMapper`."""
        try:
            return super().__call__(dataset_dict)
        except DatasetError:
            raise
        except Exception as error:
            _explain_files(dataset_dict)
            raise DatasetError(
                f"The annotations of {dataset_dict.get('file_name')} must be valid, got "
                f"{type(error).__name__}: {' '.join(str(error).split())}. "
                f"Correct them in the data set's json (image_id={dataset_dict.get('image_id')})."
            ) from error


def _explain_files(dataset_dict: dict[str, Any]) -> None:
    """Raise if a file of the sample is what went wrong."""
    keys = [key for key in ("file_name", "sem_seg_file_name") if key in dataset_dict]
    sizes = {key: _read(dataset_dict[key]).shape[1::-1] for key in keys}
    stated = (dataset_dict.get("width"), dataset_dict.get("height"))
    expected = sizes.get("file_name") if None in stated else stated
    for key, size in sizes.items():
        if size != expected:
            raise DatasetError(
                f"{dataset_dict[key]} must be {expected[0]}x{expected[1]} pixels as its image in "
                f"the json, got {size[0]}x{size[1]}. {_WAY_OUT}"
            )


def _read(path: str) -> np.ndarray:
    if not os.path.isfile(path):
        raise DatasetError(f"{path} must exist. {_WAY_OUT}")
    try:
        return read_image(path)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        reason = " ".join(str(error).split()).removesuffix(".")
        raise DatasetError(
            f"{path} must be a whole image, got: {reason} ({os.path.getsize(path)} bytes). "
            f"{_WAY_OUT}"
        ) from None
