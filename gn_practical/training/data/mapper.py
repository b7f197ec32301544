"""Detectron2's dataset mapper, with errors that name the file."""

import os
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import read_image

from gn_practical.training.data.errors import DatasetError
from gn_practical.training.data.skipped_samples import SkippedSamples, skipped_samples

_WAY_OUT = "Restore the file, or remove the image from the data set's json."


class CheckedDatasetMapper(DatasetMapper):
    """A `detectron2.data.DatasetMapper` that says which file it could not use.

    Args:
        cfg: a Detectron2 config; or the arguments of `detectron2.data.DatasetMapper`.
        is_train: whether to augment and to keep the annotations.
        skipped: list of samples that may be skipped, as ``DATALOADER.MAX_SKIPPED_SAMPLES`` makes it
            for training; the mapper returns None for such a sample.

    Raises:
        DatasetError: (when called) if a file of the sample or its annotations cannot be used, and
            no more may be skipped.
    """

    @configurable
    def __init__(
        self, is_train: bool, *, skipped: SkippedSamples | None = None, **arguments: Any
    ) -> None:
        super().__init__(is_train, **arguments)
        self.skipped = skipped

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Return the arguments of the constructor as a config has them."""
        skipped = skipped_samples(cfg)
        allowed = is_train and skipped.limit
        return {**super().from_config(cfg, is_train), "skipped": skipped if allowed else None}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        """Read and transform one sample; see `detectron2.data.DatasetMapper`."""
        return _checked(super().__call__, dataset_dict, self.image_format, self.skipped)


class CheckedMapper:
    """Calls any other mapper, and says which file it could not use.

    Args:
        mapper: makes an input of the model of an entry of a data set.
        skipped: as of :class:`CheckedDatasetMapper`.
    """

    def __init__(
        self, mapper: Callable[[dict[str, Any]], Any], skipped: SkippedSamples | None = None
    ) -> None:
        self.mapper, self.skipped = mapper, skipped

    def __call__(self, dataset_dict: dict[str, Any]) -> Any:
        """Map one sample, None for one that is skipped."""
        image_format = getattr(self.mapper, "image_format", None)
        return _checked(self.mapper, dataset_dict, image_format, self.skipped)


def _checked(
    mapper: Callable[[dict[str, Any]], Any],
    dataset_dict: dict[str, Any],
    image_format: str | None,
    skipped: SkippedSamples | None,
) -> Any:
    try:
        return mapper(dataset_dict)
    except Exception as error:
        try:
            _explain(dataset_dict, error, image_format)
        except DatasetError as explained:
            if skipped is None:
                raise
            skipped.add(dataset_dict, str(explained))
        return None


def _explain(dataset_dict: dict[str, Any], error: Exception, image_format: str | None) -> NoReturn:
    """Raise what is wrong with the files of a sample, or else with its annotations."""
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
    raise DatasetError(
        f"The annotations of {dataset_dict.get('file_name')} must be valid, got "
        f"{type(error).__name__}: {' '.join(str(error).split())}. "
        f"Correct them in the data set's json (image_id={dataset_dict.get('image_id')}), "
        f"or INPUT.FORMAT={image_format} and the other INPUT keys if every image fails."
    ) from error


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
