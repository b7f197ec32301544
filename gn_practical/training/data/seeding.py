"""Random numbers as a function of where a run stands, in place of what it drew before."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm


def run_seed(cfg: CfgNode) -> int:
    """Return ``cfg.SEED``, or for -1 a random number that all ranks share."""
    return cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()


def seed_all(*key: int | str) -> None:
    """Seed Python's, NumPy's and PyTorch's generators, that of this rank's GPU too, by a key.

    Two runs that call it with the same key draw the same numbers after it, whatever they drew
    before: a resumed run needs no generator's state from the one it continues.
    The key is what makes this place in the run unlike any other: seed, rank and iteration, say.
    """
    _seed_cpu(key)
    if torch.cuda.is_initialized():  # torch.manual_seed asks for it in a slow way
        torch.cuda.manual_seed(random.getrandbits(63))


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Seed the generators of the CPU by a key, and leave them afterwards as they were before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    _seed_cpu(key)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _seed_cpu(key: tuple[int | str, ...]) -> None:
    random.seed("/".join(map(str, key)))  # a string is hashed by SHA-512, the same everywhere
    np.random.seed(random.getrandbits(32))
    torch.default_generator.manual_seed(random.getrandbits(63))
