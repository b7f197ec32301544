"""The internals of Detectron2 that the trainer uses, each with its reason.

Methods that Detectron2 means to be overridden, ``Checkpointer._load_file``, ``_load_model`` and
``_log_incompatible_keys``, are overridden where they belong, in
:class:`gn_practical.training.checkpoint.GroupsCheckpointer`. A test names what is gone when a
version of Detectron2 has changed any of them.
"""

from collections.abc import Iterator
from functools import partial

from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.engine.hooks import PeriodicWriter
from detectron2.utils.events import EventStorage
from fvcore.common.history_buffer import HistoryBuffer


def stream_of_all_ranks(sampler: TrainingSampler | RepeatFactorTrainingSampler) -> Iterator[int]:
    """Return the endless indices of all ranks; iterating the sampler gives one rank's alone."""
    return sampler._infinite_indices()


def set_write_period(writer: PeriodicWriter, period: int) -> None:
    """Let a hook write every so many iterations; ``DefaultTrainer`` makes it for 20."""
    writer._period = period


def bound_histories(storage: EventStorage, length: int) -> None:
    """Keep so many of the newest values alone of scalars that are new to a storage.

    There is no argument for it: the storage makes its histories by the default of a dict.
    """
    storage.histories().default_factory = partial(HistoryBuffer, length)
