"""Pictures of predictions beside the ground truth, drawn while a data set is evaluated."""

import logging
import os
from functools import cached_property
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from detectron2.utils.file_io import PathManager
from detectron2.utils.visualizer import ColorMode
from PIL import Image

from gn_practical.inference.drawing import HoleKeepingVisualizer, with_colors
from gn_practical.training.data.coco_format import read_json, rgb_to_id
from gn_practical.training.data.registration import contiguous
from gn_practical.training.evaluation.ids import unused
from gn_practical.training.evaluation.panels import panel_scale, side_by_side
from gn_practical.training.evaluation.sem_seg import read_label_image

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
            state = np.random.get_state()
            np.random.seed(0)  # the shades of instances, and not those of the training's next batch
            try:
                self._save(image["file_name"], self._draw(image, output))
            except Exception:  # a picture is never worth an evaluation
                logger.warning("No picture of %s", image.get("file_name"), exc_info=True)
            finally:
                np.random.set_state(state)

    def evaluate(self) -> None:
        """Say where the pictures are; there are no results."""
        if self._names:
            logger.info("%d pictures saved to %s", len(self._names), self._output_dir)
        for name in ("_records", "_panoptic_annotations"):  # no need to keep them until next time
            self.__dict__.pop(name, None)

    def _draw(self, image: dict, output: dict) -> np.ndarray:
        pixels = read_image(image["file_name"], format="RGB")
        scale = panel_scale(*pixels.shape[:2])
        prediction, truth = (
            HoleKeepingVisualizer(
                pixels, with_colors(self._metadata), scale, ColorMode.SEGMENTATION
            )
            for _ in range(2)
        )
        title = "prediction"
        # The truth first: its shades do not depend on what is predicted.
        if "panoptic_seg" in output:
            ids, segments = output["panoptic_seg"]
            truth.draw_panoptic_seg(*self._true_panoptic(image))
            prediction.draw_panoptic_seg(ids.cpu(), segments)
        elif "instances" in output:
            instances = output["instances"].to("cpu")
            kept = instances[instances.scores >= self._min_score]
            record = self._records[image["file_name"]]
            truth.draw_dataset_dict({"annotations": record.get("annotations")})
            prediction.draw_instance_predictions(kept)
            title += f": score >= {self._min_score:g} ({len(kept)} of {len(instances)})"
        else:
            record = self._records[image["file_name"]]
            truth.draw_sem_seg(read_label_image(record["sem_seg_file_name"]))
            prediction.draw_sem_seg(output["sem_seg"].argmax(dim=0).cpu())
        panels = [visualizer.get_output().get_image() for visualizer in (prediction, truth)]
        return side_by_side(panels, [title, "ground truth"])

    def _true_panoptic(self, image: dict) -> tuple[torch.Tensor, list[dict]]:
        annotation = self._panoptic_annotations[image["image_id"]]
        path = os.path.join(self._metadata.panoptic_root, annotation["file_name"])
        with PathManager.open(path, "rb") as f:
            ids = rgb_to_id(np.array(Image.open(f).convert("RGB")))
        segments = [contiguous(segment, self._metadata) for segment in annotation["segments_info"]]
        return torch.from_numpy(ids.astype(np.int64)), segments

    def _save(self, image_file: str, picture: np.ndarray) -> None:
        name = unused(os.path.splitext(os.path.basename(image_file))[0], self._names)
        os.makedirs(self._output_dir, exist_ok=True)
        Image.fromarray(picture).save(os.path.join(self._output_dir, f"{name}.png"))
        if has_event_storage():
            get_event_storage().put_image(f"pictures/{name}", picture.transpose(2, 0, 1))

    @cached_property
    def _records(self) -> dict[str, dict]:
        return {record["file_name"]: record for record in DatasetCatalog.get(self._dataset_name)}

    @cached_property
    def _panoptic_annotations(self) -> dict[Any, dict]:
        content = read_json(PathManager.get_local_path(self._metadata.panoptic_json))
        return {annotation["image_id"]: annotation for annotation in content["annotations"]}
