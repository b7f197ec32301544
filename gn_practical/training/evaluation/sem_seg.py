"""Mean IoU of semantic segmentation, with label files read so that NumPy 2 accepts it."""

import numpy as np
from detectron2 import evaluation
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager
from PIL import Image


def read_label_image(path: str, dtype: np.typing.DTypeLike = np.int64) -> np.ndarray:
    """Read a PNG with one channel, gray or palette, whose ``(H, W)`` values are class labels.

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
        ValueError: if a class has no id in the data set; from ``process``, naming the file, if a
            label file cannot be read or holds a label that is no class of the data set, or if the
            model scores more classes than the data set has.

    Example:
        >>> evaluator = SemSegEvaluator("coco_2017_val_panoptic_stuffonly")  # doctest: +SKIP
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None) -> None:
        super().__init__(dataset_name, output_dir=output_dir, sem_seg_loading_fn=self._load)
        metadata = MetadataCatalog.get(dataset_name)
        self._count, self._ignored = len(metadata.stuff_classes), metadata.ignore_label
        ids = metadata.get("stuff_dataset_id_to_contiguous_id") or {}
        without_id = set(range(self._count)) - set(ids.values())
        if ids and without_id:  # two classes share an id: 0 is taken by "things"
            raise ValueError(
                f"Stuff classes of {dataset_name} must each have an id of their own, got none for "
                f"{metadata.stuff_classes[min(without_id)]!r}. Give category ids from 1."
            )

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Count the pixels of a batch, from "sem_seg" of each output, the scores of each class."""
        scored = max((len(output["sem_seg"]) for output in outputs), default=0)
        if scored > self._count:
            raise ValueError(
                f"The model must score at most {self._count} stuff classes, those of the data set, "
                f"got {scored}. Set MODEL.SEM_SEG_HEAD.NUM_CLASSES {self._count}."
            )
        super().process(inputs, outputs)

    def _load(self, path: str, dtype: np.typing.DTypeLike) -> np.ndarray:
        labels = read_label_image(path, dtype)
        known = (labels < self._count) | (labels == self._ignored)
        if not known.all():
            raise ValueError(
                f"A label must be below {self._count}, the number of classes, or "
                f"{self._ignored}, got label={labels[~known][0]} in {path}. "
                "Prepare the label files again with the data set's categories."
            )
        return labels
