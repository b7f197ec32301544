"""What decides the next step besides model, optimizer and schedule: random numbers and data."""

import logging
from collections.abc import Iterable
from typing import Any

from detectron2.utils import comm

from gn_practical.training.data.loader import PositionedLoader
from gn_practical.training.data.seeding import seed_all

_logger = logging.getLogger(__name__)


class TrainingState:
    """The part of a checkpoint that makes a resumed run end with the bits of an uninterrupted one.

    Every step's random numbers follow from seed, rank and iteration, those of every sample from
    seed and position (:class:`~gn_practical.training.data.loader.SeededDataset`). So one state is
    enough for all ranks, their workers and their GPUs: the seed, and the place in the data.
    """

    def __init__(self, seed: int, loader: Iterable[Any]) -> None:
        self.seed, self.loader = seed, loader
        self.was_loaded = False

    def begin_step(self, iteration: int) -> None:
        """Seed the generators of this rank for an iteration."""
        seed_all(self.seed, "step", comm.get_rank(), iteration)

    def state_dict(self) -> dict[str, Any]:
        """Return numbers and lists of numbers; the same on every rank."""
        state = {"seed": self.seed, "num_ranks": comm.get_world_size()}
        if isinstance(self.loader, PositionedLoader):
            state["loader"] = self.loader.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take seed and place from a checkpoint, and say where the run cannot be the same."""
        self.seed, self.was_loaded = state["seed"], True
        if isinstance(self.loader, PositionedLoader) and "loader" in state:
            self.loader.load_state_dict(state["loader"])
        else:
            _logger.warning("The training loader has no position: its data start over.")
        if state["num_ranks"] != comm.get_world_size():
            _logger.warning(
                "The checkpoint was written by %d ranks, this run has %d. No sample is repeated or "
                "left out, and the iterations go on counting; batches are shared out and random "
                "numbers drawn otherwise, so the weights will not be those of the first run to the "
                "bit. Where the batch has changed too, so have the epochs of the iterations left.",
                *(state["num_ranks"], comm.get_world_size()),
            )

    def warn_if_fresh(self) -> None:
        """Say so where a run is resumed from a checkpoint without this state."""
        if not self.was_loaded:
            _logger.warning(
                "The checkpoint does not say where in the data it was written: their order "
                "starts from the beginning, and the run will not end as the uninterrupted one."
            )
