"""What a run logs does not grow, is cut where a resumed run goes on, and ends no training."""

import errno
import json

import pytest
from detectron2.engine import TrainerBase
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils.events import CommonMetricPrinter, EventStorage, JSONWriter

from gn_practical.training.detectron2_internals import bound_histories
from gn_practical.training.engine.events import SteadyWriter, forget_metrics


def test_histories_are_bounded():
    with EventStorage() as storage:
        bound_histories(storage, length=5)
        for storage.iter in range(20):
            storage.put_scalar("loss", storage.iter)
    assert len(storage.history("loss").values()) == 5
    assert storage.history("loss").latest() == 19
    assert storage.history("loss").global_avg() == 9.5


def test_metrics_of_steps_to_be_repeated_are_forgotten(tmp_path):
    path = tmp_path / "metrics.json"
    forget_metrics(str(path), 3)
    lines = [json.dumps({"iteration": iteration}) for iteration in (0, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"iter')
    forget_metrics(str(path), 9)
    assert path.read_text() == "\n".join(lines) + "\n"
    forget_metrics(str(path), 3)
    assert path.read_text() == "\n".join(lines[:2]) + "\n"
    path.write_text(f'{lines[0]}\n{{"iter{lines[1]}\n{lines[2]}\n')  # as a full disk leaves it
    forget_metrics(str(path), 3)
    assert path.read_text() == f'{lines[0]}\n{{"iter{lines[1]}\n'


class Loop(TrainerBase):
    """A training that logs a loss."""

    def __init__(self, writer):
        super().__init__()
        self.register_hooks([PeriodicWriter([SteadyWriter(writer)], period=2)])

    def run_step(self):
        self.storage.put_scalar("total_loss", self.iter)


def test_a_full_disk_does_not_end_a_training(tmp_path, caplog, monkeypatch):
    writer = JSONWriter(str(tmp_path / "metrics.json"))
    flush, full = writer._file_handle.flush, [True]

    class File:
        def __getattr__(self, name):
            return getattr(handle, name)

        def flush(self):
            if full:
                raise OSError(errno.ENOSPC, "No space left on device")
            flush()

    handle, writer._file_handle = writer._file_handle, File()
    loop = Loop(writer)
    monkeypatch.setattr(loop, "after_train", lambda: None)
    loop.train(0, 4)
    assert caplog.text.count("JSONWriter could not write metrics: [Errno 28] No space left") == 1
    full.clear()
    loop.train(4, 6)
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert lines[-1] == {"iteration": 5, "total_loss": 4.5}


def test_other_errors_of_a_writer_are_not_hidden():
    class Broken(CommonMetricPrinter):
        def write(self):
            raise KeyError("bug")

    with pytest.raises(KeyError, match="bug"):
        Loop(Broken(4)).train(0, 4)


def test_a_run_can_end_where_it_has_just_printed():
    """Detectron2's printer divides by zero there, before there is a time for a step."""
    stopped = Loop(CommonMetricPrinter(9))

    def stop():
        TrainerBase.after_step(stopped)
        if stopped.iter == 3:
            raise KeyboardInterrupt

    stopped.after_step = stop
    with pytest.raises(KeyboardInterrupt):
        stopped.train(2, 9)
