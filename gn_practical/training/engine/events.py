"""Writers of what a run logs, which never end a training, and the log of a resumed run."""

import json
import logging
import os
from collections.abc import Callable

from detectron2.utils.events import CommonMetricPrinter, EventWriter, get_event_storage


class SteadyWriter(EventWriter):
    """Writes as another writer does, but a full disk does not end the training.

    Nor does Detectron2's printer, which divides by zero where it is asked twice in an iteration:
    at the end of a run that a signal stops within three steps of its start.
    """

    def __init__(self, writer: EventWriter) -> None:
        self.writer = writer
        self._last, self._failed = -1, False

    def write(self) -> None:
        """Write what is new in the storage; warn of the first failure."""
        iteration = get_event_storage().iter
        if iteration != self._last or not isinstance(self.writer, CommonMetricPrinter):
            self._attempt(self.writer.write)
        self._last = iteration

    def close(self) -> None:
        """Close the writer."""
        self._attempt(self.writer.close)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            if not self._failed:
                logging.getLogger(__name__).warning(
                    "%s could not write metrics: %s. Training goes on; some of them may be lost.",
                    *(type(self.writer).__name__, error),
                )
            self._failed = True


def forget_metrics(path: str, iteration: int) -> None:
    """Cut off the lines of ``metrics.json``, if there is one, from the resumed iteration on."""
    if not os.path.isfile(path):
        return
    kept = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n") or _iteration(line) >= iteration:
                break
            kept += len(line)
    os.truncate(path, kept)


def _iteration(line: bytes) -> int:
    """Return a line's iteration; -1 for one that a full disk or a crash has garbled."""
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):
        return -1
