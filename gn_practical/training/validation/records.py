"""Faults of a data set without a COCO json: the files of Detectron2's own records."""

from collections.abc import Iterator
from typing import NamedTuple

from detectron2.data import DatasetCatalog

from gn_practical.training.validation.coco import Session
from gn_practical.training.validation.findings import Fault

_FILES = {
    "file_name": "image",
    "sem_seg_file_name": "stuff PNG",
    "pan_seg_file_name": "panoptic PNG",
}


class RecordsTarget(NamedTuple):
    """A data set of another format than COCO's, as Detectron2 loads it: its files alone.

    Attributes:
        json: the name in Detectron2's catalog.
    """

    json: str

    def check(self, session: Session) -> Iterator[Fault]:
        """Yield all faults of files; see `InstancesTarget.check`."""
        try:
            records = DatasetCatalog.get(self.json)
        except Exception as error:  # whatever the user's own loader raises
            yield Fault("json unusable", self.json, detail=f"its loader raised {error!r}")
            return
        tasks = [
            (index, record, key)
            for index, record in enumerate(records)
            for key in _FILES
            if key in record
        ]
        paths = [record[key] for _, record, key in tasks]
        found = session.look_at("", paths, self.json)
        for (index, record, key), facts in zip(tasks, found, strict=True):
            stated = (record.get("width"), record.get("height"))
            place = (self.json, (index,), record[key], record.get("image_id"), None)
            for reason, detail in facts.findings(_FILES[key], [] if None in stated else [stated]):
                yield Fault(reason, *place, detail)
