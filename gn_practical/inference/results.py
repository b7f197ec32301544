"""The folder of results: pictures, videos and COCO's files, kept whole while they grow."""

import os
from collections.abc import Iterable
from contextlib import ExitStack
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util

from gn_practical.atomic import refuse_overwriting, replace_file
from gn_practical.inference.classes import Classes
from gn_practical.inference.dataset_ids import DatasetIds
from gn_practical.inference.frames import Frame
from gn_practical.inference.json_list import JsonList
from gn_practical.inference.prediction import Prediction
from gn_practical.inference.video_file import VideoFile

IMAGES = "images.json"
INSTANCES = "coco_instances_results.json"
PANOPTIC = "predictions.json"
SEMANTIC = "sem_seg_predictions.json"
FILES = (IMAGES, INSTANCES, PANOPTIC, SEMANTIC)
PICTURES, VIDEOS, MAPS = "pictures", "videos", "panoptic"
_JPEG = (cv2.IMWRITE_JPEG_QUALITY, 92)
_PNG = (cv2.IMWRITE_PNG_COMPRESSION, 1)
_MOST_BYTES = 200  # of a file's stem: file systems allow 255 with all that is added


class ResultsFolder:
    """Writes predictions into a folder, as they come; what was written stays whatever happens.

    ``pictures/*.jpg`` and ``videos/*.mp4``; ``images.json`` with names, sizes and ids;
    ``coco_instances_results.json`` (boxes, scores, masks as RLE), ``predictions.json`` with
    ``panoptic/*.png``, or ``sem_seg_predictions.json``, as COCO's tools and an evaluation of this
    package have them. Nothing that is there is written over, but earlier results with ``replace``.

    Args:
        path: of the folder, which is made.
        classes: of the model.
        pictures: whether to draw.
        coco: whether to write COCO's files.
        replace: write over the results of an earlier run.
        inputs: files that are read, which are never written over.
        ids: of pictures, from a data set's json; by default numbers from 1.

    Raises:
        ValueError: if it cannot be written, or has earlier results and ``replace`` is False.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        classes: Classes,
        *,
        pictures: bool = True,
        coco: bool = True,
        replace: bool = False,
        inputs: Iterable[str] = (),
        ids: DatasetIds | None = None,
    ) -> None:
        self.path = os.fspath(path)
        inputs = list(inputs)
        check_folder(self.path, replace, inputs)
        self._classes, self._pictures, self._coco, self._ids = classes, pictures, coco, ids
        self._replace = replace
        self._inputs = {os.path.realpath(each) for each in inputs}
        self._taken: set[str] = set()
        self._number = 0
        self._lists: dict[str, JsonList] = {}
        self._video: VideoFile | None = None
        self._open = ExitStack()

    def add(self, frame: Frame, prediction: Prediction) -> None:
        """Write the prediction of a picture.

        Raises:
            ValueError: if it cannot be written, or the picture is not in the data set.
        """
        image_id = self._image_id(frame)
        try:
            entry = self._write(frame, prediction, image_id)
            width, height = prediction.size
            self._add(IMAGES, [{"id": image_id, "width": width, "height": height, **entry}])
        except OSError as error:
            reason = error.strerror or str(error)
            raise ValueError(
                f"results must be written to {self.path}, got {frame.source.path}: {reason}. What "
                "was written before is kept; make room, or choose another folder."
            ) from error

    def _write(self, frame: Frame, prediction: Prediction, image_id: Any) -> dict[str, Any]:
        source = frame.source
        entry: dict[str, Any] = {"file_name": source.path}
        stem = source.stem
        if source.kind != "picture":
            entry["frame"] = frame.number
            stem = f"{stem}_{frame.number:06d}"
        stem = self._free(stem)
        if self._pictures:
            entry["picture"] = self._draw(frame, prediction, stem)
        if self._coco:
            self._write_coco(prediction, image_id, stem)
        return entry

    def _draw(self, frame: Frame, prediction: Prediction, stem: str) -> str:
        picture = prediction.draw()
        if frame.source.kind == "picture":
            name = f"{PICTURES}/{stem}.jpg"
            self._write_image(name, picture, _JPEG)
            return name
        if self._video is None or self._video.source != frame.source:
            self._close_video()
            name = f"{VIDEOS}/{self._free(frame.source.stem)}.mp4"
            self._make_folder(name)
            self._video = VideoFile(self.path, name, frame.source, frame.rate)
        self._video.add(picture)
        return self._video.name

    def _write_coco(self, prediction: Prediction, image_id: Any, stem: str) -> None:
        if prediction.instances is not None:
            self._add(INSTANCES, prediction.coco_instances(image_id))
        if prediction.panoptic is not None:
            name = f"{stem}.png"
            self._write_image(f"{MAPS}/{name}", _as_rgb(prediction.panoptic), _PNG)
            segments = prediction.coco_segments()
            entry = {"image_id": image_id, "file_name": name, "segments_info": segments}
            self._add(PANOPTIC, [entry])
        if prediction.class_map is not None:
            self._add(SEMANTIC, _semantic(prediction, image_id))

    def _image_id(self, frame: Frame) -> Any:
        self._number += 1
        return self._number if self._ids is None else self._ids.image_id(frame.source.path)

    def _add(self, name: str, entries: list[Any]) -> None:
        if name not in self._lists:
            key = {IMAGES: "images", PANOPTIC: "annotations"}.get(name, "")
            head = {"categories": self._classes.categories()} if key else None
            path = os.path.join(self.path, name)
            self._lists[name] = self._open.enter_context(JsonList(path, key, head))
        self._lists[name].add(entries)

    def _write_image(self, name: str, rgb: np.ndarray, options: tuple[int, int]) -> None:
        self._make_folder(name)
        there, data = cv2.imencode(os.path.splitext(name)[1], rgb[..., ::-1], options)
        if not there:
            raise OSError(f"no picture of {rgb.shape[1]}x{rgb.shape[0]} pixels")
        path = os.path.join(self.path, name)
        with replace_file(path, durable=False) as temporary, open(temporary, "wb") as file:
            file.write(data)

    def _make_folder(self, name: str) -> None:
        os.makedirs(os.path.dirname(os.path.join(self.path, name)), exist_ok=True)

    def _free(self, stem: str) -> str:
        """Return a name for files that no other has, and take it."""
        stem = os.fsdecode(os.fsencode(stem)[:_MOST_BYTES])
        name, number = stem, 1
        while name.casefold() in self._taken or not self._may_write(name):
            number += 1
            name = f"{stem}_{number}"
        self._taken.add(name.casefold())
        return name

    def _may_write(self, name: str) -> bool:
        names = (f"{PICTURES}/{name}.jpg", f"{VIDEOS}/{name}.mp4", f"{MAPS}/{name}.png")
        paths = [os.path.join(self.path, each) for each in names]
        there = [path for path in paths if os.path.lexists(path)]
        return not there or (
            self._replace and not any(os.path.realpath(path) in self._inputs for path in there)
        )

    def _close_video(self) -> None:
        if self._video is not None:
            self._video.close()
            self._video = None

    def close(self) -> None:
        """Close all files."""
        self._close_video()
        self._open.close()

    def __enter__(self) -> "ResultsFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.close()


def check_folder(path: str, replace: bool = False, inputs: Iterable[str] = ()) -> None:
    """Check that results may be written to a folder, and make it; earlier ones are removed.

    Args:
        path: of the folder.
        replace: whether it may have earlier results.
        inputs: files that are read.

    Raises:
        ValueError: if it cannot be written, or has results and ``replace`` is False.
    """
    refuse_overwriting((os.path.join(path, name) for name in FILES), inputs)
    earlier = [name for name in FILES if os.path.lexists(os.path.join(path, name))]
    if earlier and not replace:
        raise ValueError(
            f"the output must be a folder without earlier results, got {path} with "
            f"{', '.join(earlier)}. Choose another, or add --replace."
        )
    try:
        os.makedirs(path, exist_ok=True)
        with TemporaryFile(dir=path):  # whether it can be written
            pass
        for name in earlier:
            os.remove(os.path.join(path, name))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"the output must be a folder that can be written, got {path}: {reason}. Choose "
            "another."
        ) from error


def _as_rgb(ids: np.ndarray) -> np.ndarray:
    """Return ids as COCO's panoptic PNGs have them: id = R + 256 G + 256² B."""
    return np.stack([ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)


def _semantic(prediction: Prediction, image_id: Any) -> list[dict[str, Any]]:
    """Return the classes of pixels as Detectron2's evaluator does, a mask of each class."""
    entries = []
    for number in np.unique(prediction.class_map[prediction.class_map >= 0]).tolist():
        mask = np.asfortranarray(prediction.class_map == number, np.uint8)
        rle = mask_util.encode(mask)
        segmentation = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
        category = prediction.classes.dataset_id(number, thing=False)
        entries.append(
            {"image_id": image_id, "category_id": category, "segmentation": segmentation}
        )
    return entries
