"""Images that training skipped because they could not be used, in a list that workers share."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import portalocker

from gn_practical.training.data.errors import DatasetError


class SkippedSamples:
    """The images of a run that could not be used: a file that all workers and ranks append to.

    An image counts once, however many epochs meet it. The file is the count, so it holds over
    workers, ranks and resumed runs that share the folder. It has one line of JSON an image:
    file_name, image_id, reason. ``limit`` images may be skipped.
    """

    def __init__(self, path: str, limit: int) -> None:
        self.path, self.limit = path, limit

    def add(self, sample: dict[str, Any], reason: str) -> None:
        """Count an image, in Detectron2's format, that is new in the list.

        Raises:
            DatasetError: if there are more than the limit.
        """
        name, image_id = sample.get("file_name"), sample.get("image_id")
        with portalocker.Lock(self.path, "a+", timeout=60) as file:
            file.seek(0)
            known = [json.loads(line)["file_name"] for line in file]
            if name not in known:
                known.append(name)
                entry = {"file_name": name, "image_id": image_id, "reason": reason}
                file.write(json.dumps(entry) + "\n")
                logging.getLogger(__name__).warning(
                    "Skipped image %d of DATALOADER.MAX_SKIPPED_SAMPLES=%d: %s",
                    *(len(known), self.limit, reason),
                )
        if len(known) > self.limit:
            raise DatasetError(
                f"At most DATALOADER.MAX_SKIPPED_SAMPLES={self.limit} images may be skipped, got "
                f"{len(known)}, listed in {self.path}. The last: {reason} Repair them "
                "(tools/validate_dataset.py finds them all) and remove that list, or raise the "
                "limit."
            )

    def read(self) -> list[dict[str, Any]]:
        """Return the images skipped so far, each with its reason."""
        if not os.path.isfile(self.path):
            return []
        with open(self.path) as file:
            return [json.loads(line) for line in file]

    def forget(self) -> None:
        """Remove the list."""
        Path(self.path).unlink(missing_ok=True)


def skipped_samples(cfg: Any) -> SkippedSamples:
    """Return the list of a run, with ``DATALOADER.MAX_SKIPPED_SAMPLES``, 0 without such a key."""
    path = os.path.join(cfg.OUTPUT_DIR, "skipped_samples.json")
    return SkippedSamples(path, cfg.DATALOADER.get("MAX_SKIPPED_SAMPLES", 0))
