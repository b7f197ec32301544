"""Mean IoU of semantic segmentation, with label files read so that NumPy 2 accepts it."""

import numpy as np
from detectron2 import evaluation
from detectron2.utils.file_io import PathManager
from PIL import Image


def read_label_image(path: str, dtype: np.typing.DTypeLike = np.int64) -> np.ndarray:
    """Read an image whose pixel values are class labels.

    Args:
        path: PNG with one channel (gray or palette).
        dtype: of the array.

    Shape:
        ``(H, W)``.

    Raises:
        ValueError: naming the file, if it cannot be read or has several channels.
    """
    try:
        with PathManager.open(path, "rb") as f:
            labels = np.array(Image.open(f), dtype=dtype)
    except (OSError, SyntaxError) as error:  # PIL's PNG reader raises SyntaxError
        raise ValueError(
            f"A label file must be a readable image, got path={path} ({error}). "
            "Restore the file or prepare the data set again."
        ) from error
    if labels.ndim != 2:
        raise ValueError(
            f"A label file must have one channel, got path={path} with shape={labels.shape}. "
            "Convert its colours to class labels."
        )
    return labels


class SemSegEvaluator(evaluation.SemSegEvaluator):
    """Detectron2's ``SemSegEvaluator`` (mIoU, fwIoU, mACC, pACC) for NumPy 1 and 2.

    Args:
        dataset_name: a registered data set with "sem_seg_file_name" in its records.
        output_dir: folder for the predictions.

    Raises:
        ValueError: from ``process``, naming the label file, if it cannot be read or holds a label
            that is no class of the data set.

    Example:
        >>> evaluator = SemSegEvaluator("coco_2017_val_panoptic_stuffonly")  # doctest: +SKIP
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None) -> None:
        super().__init__(dataset_name, output_dir=output_dir, sem_seg_loading_fn=self._load)

    def _load(self, path: str, dtype: np.typing.DTypeLike) -> np.ndarray:
        labels = read_label_image(path, dtype)
        known = (labels < self._num_classes) | (labels == self._ignore_label)
        if not known.all():
            raise ValueError(
                f"A label must be below {self._num_classes}, the number of classes, or "
                f"{self._ignore_label}, got label={labels[~known][0]} in {path}. "
                "Prepare the label files again with the data set's categories."
            )
        return labels
