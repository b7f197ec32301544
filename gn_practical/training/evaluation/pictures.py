"""Pictures of predictions beside the ground truth, drawn while a data set is evaluated."""

import logging
import os
from functools import cached_property
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from PIL import Image

from gn_practical.training.evaluation.annotated import (
    Classes,
    found_shapes,
    from_catalog,
    instance_shapes,
    label_shapes,
    read_labels,
    read_segment_ids,
    segment_shapes,
)
from gn_practical.training.evaluation.ids import unused
from gn_practical.training.evaluation.panels import draw_shapes, side_by_side
from gn_practical.training.evaluation.panoptic import segments_of

logger = logging.getLogger(__name__)


class PictureEvaluator(DatasetEvaluator):
    """Draw the first predictions beside the ground truth; it measures nothing.

    Panoptic segments are drawn where the model predicts them, else instances, else semantic
    classes. Each picture is written to ``output_dir/<image>.png`` and, during training, put into
    the ``EventStorage`` ("pictures/<image>"), from where it reaches TensorBoard. The main rank
    alone draws, of its own images. What goes wrong is a warning and never stops an evaluation.

    Args:
        dataset_name: a registered data set.
        output_dir: folder of the pictures.
        num_pictures: drawn at each evaluation.
        min_score: instances below it, in [0, 1], are left out.

    Example:
        >>> evaluator = PictureEvaluator("coco_2017_val", "output/pictures", num_pictures=4)
    """

    def __init__(
        self, dataset_name: str, output_dir: str, num_pictures: int = 8, min_score: float = 0.5
    ) -> None:
        self._dataset_name, self._output_dir = dataset_name, output_dir
        self._metadata = MetadataCatalog.get(dataset_name)
        self._classes = Classes(self._metadata)
        self._num_pictures, self._min_score = num_pictures, min_score
        self.reset()

    def reset(self) -> None:
        """Begin again with the first image."""
        self._remaining = self._num_pictures if comm.is_main_process() else 0
        self._names: set[str] = set()

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """Draw what is still to be drawn, "panoptic_seg", "instances" or "sem_seg"."""
        for image, output in zip(inputs, outputs, strict=True):
            if self._remaining == 0:
                return
            self._remaining -= 1
            try:
                self._save(image["file_name"], self._draw(image, output))
            except Exception:  # a picture is never worth an evaluation
                logger.warning("No picture of %s", image.get("file_name"), exc_info=True)

    def evaluate(self) -> None:
        """Say where the pictures are; there are no results."""
        if self._names:
            logger.info("%d pictures saved to %s", len(self._names), self._output_dir)
        self.__dict__.pop("_records", None)  # no need to keep them until next time

    def _draw(self, image: dict, output: dict) -> np.ndarray:
        pixels = read_image(image["file_name"], format="RGB")
        record, classes = self._record(image), self._classes
        title = "prediction"
        if "panoptic_seg" in output:
            found = segment_shapes(*segments_of(*output["panoptic_seg"], self._metadata), classes)
            ids = read_segment_ids(record["pan_seg_file_name"])
            truth = segment_shapes(ids, record["segments_info"], classes)
        elif "instances" in output:
            instances = output["instances"].to("cpu")
            kept = instances[instances.scores >= self._min_score]
            found, truth = found_shapes(kept, classes), instance_shapes(record, classes)
            title += f": score >= {self._min_score:g} ({len(kept)} of {len(instances)})"
        else:
            found = label_shapes(output["sem_seg"].argmax(dim=0).cpu().numpy(), classes)
            truth = label_shapes(read_labels(record), classes)
        panels = [draw_shapes(pixels, shapes, classes.metadata) for shapes in (found, truth)]
        return side_by_side(panels, [title, "ground truth"])

    def _save(self, image_file: str, picture: np.ndarray) -> None:
        name = unused(os.path.splitext(os.path.basename(image_file))[0], self._names)
        os.makedirs(self._output_dir, exist_ok=True)
        Image.fromarray(picture).save(os.path.join(self._output_dir, f"{name}.png"))
        if has_event_storage():
            get_event_storage().put_image(f"pictures/{name}", picture.transpose(2, 0, 1))

    def _record(self, image: dict) -> dict:
        key = "image_id" if image.get("image_id") in self._records else "file_name"
        return self._records[image[key]]

    @cached_property
    def _records(self) -> dict[Any, dict]:
        """Records by file name and, but for semantic ones, by id."""
        records = from_catalog([self._dataset_name]).records
        by_id = {record["image_id"]: record for record in records if "image_id" in record}
        return {record["file_name"]: record for record in records} | by_id
