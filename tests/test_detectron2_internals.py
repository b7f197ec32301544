"""What the trainer uses of Detectron2's internals is there; else a message says what is gone."""

import inspect
from itertools import islice

import pytest
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data.samplers import TrainingSampler
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils.events import EventStorage

from gn_practical.training.detectron2_internals import (
    bound_histories,
    set_write_period,
    stream_of_all_ranks,
)


@pytest.mark.parametrize("method", ["_load_file", "_load_model", "_log_incompatible_keys"])
def test_the_methods_that_our_checkpointer_overrides(method):
    found = getattr(DetectionCheckpointer, method, None)
    assert found is not None, f"DetectionCheckpointer.{method} is gone, by which we read"
    arguments = list(inspect.signature(found).parameters)
    assert len(arguments) == 2, f"DetectionCheckpointer.{method} takes {arguments} now"


def test_the_stream_of_a_sampler():
    sampler = TrainingSampler(4, shuffle=False, seed=0)
    assert hasattr(sampler, "_infinite_indices"), "samplers have no stream of all ranks any more"
    assert list(islice(stream_of_all_ranks(sampler), 6)) == [0, 1, 2, 3, 0, 1]


def test_the_period_of_the_writers():
    writer = PeriodicWriter([])
    assert hasattr(writer, "_period"), "PeriodicWriter keeps its period elsewhere now"
    set_write_period(writer, 7)
    assert writer._period == 7


def test_the_length_of_histories():
    with EventStorage() as storage:
        bound_histories(storage, 3)
        for storage.iter in range(9):
            storage.put_scalar("loss", 1.0)
    kept = len(storage.history("loss").values())
    assert kept == 3, f"EventStorage keeps {kept} values: its histories are made otherwise now"
