"""A training loader that knows which samples were used, and can start behind them."""

import logging
import os
import random
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from threading import Thread
from typing import Any, Protocol, runtime_checkable

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.build import trivial_batch_collator
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from gn_practical.training.data.errors import DatasetError
from gn_practical.training.data.sampler import BatchStream, Sample
from gn_practical.training.data.seeding import run_seed, seeded
from gn_practical.training.processes import end_with_parent

_MAX_SUBSTITUTES = 100


@runtime_checkable
class PositionedLoader(Protocol):
    """A loader that can say where it stands and go there.

    ``state_dict`` is asked for on the main rank, between two steps, and counts the batches that
    were yielded, not those prefetched; ``load_state_dict`` is called on every rank, before
    iterating. What the batches hold must follow from the state alone.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return numbers, strings, tensors, and lists and dicts of these."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where another loader of the same data was."""


class SeededDataset(Dataset):
    """Maps samples, each with random numbers that follow from its position in the stream.

    So an augmentation is the same whichever worker makes it, and when; so is the sample that takes
    the place of one of which the mapper makes None.
    """

    def __init__(self, dataset: Dataset, mapper: Callable[[Any], Any], seed: int) -> None:
        self.dataset, self.mapper, self.seed = dataset, mapper, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: Sample) -> Any:
        position, index = sample
        with seeded(self.seed, "sample", position):
            for _ in range(_MAX_SUBSTITUTES):
                mapped = self.mapper(self.dataset[index])
                if mapped is not None:
                    return mapped
                index = random.randrange(len(self.dataset))
        raise DatasetError(
            f"the training data must hold samples that can be used, got {_MAX_SUBSTITUTES} in turn "
            f"that cannot. Check the files with tools/validate_dataset.py."
        )


class TrainLoader:
    """Endless batches of training samples that go on where a checkpoint left off.

    Args:
        dataset: of all samples; its seed is the run's.
        stream: the order of the samples, from that seed.
        make_sampler: makes the sampler of another seed, for the run that is resumed.
        num_workers: processes that decode; 0 for this one. What they yield does not depend on it.
    """

    def __init__(
        self,
        dataset: SeededDataset,
        stream: BatchStream,
        make_sampler: Callable[[int], Sampler],
        num_workers: int,
    ) -> None:
        self.dataset, self.stream = dataset, stream
        self.make_sampler, self.num_workers = make_sampler, num_workers

    def __iter__(self) -> Iterator[list[Any]]:
        prefetched = DataLoader(
            self.dataset,
            batch_sampler=self.stream.copy(),
            collate_fn=trivial_batch_collator,
            num_workers=self.num_workers,
            worker_init_fn=follow_rank,
            generator=torch.Generator(),  # in place of the one that the model draws from
        )
        # The copy runs ahead as far as is prefetched; the stream itself counts what is yielded.
        for batch, _ in zip(prefetched, self.stream, strict=True):
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return seed, size of the data set, and the place in its stream."""
        place = self.stream.state_dict()
        return {"seed": self.dataset.seed, "num_samples": len(self.dataset), **place}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place in the stream of the run that saved it, or to the start of other data."""
        if state["seed"] != self.dataset.seed:
            self.dataset.seed = state["seed"]
            self.stream.sampler = self.make_sampler(state["seed"])
        if state["num_samples"] == len(self.dataset):
            self.stream.load_state_dict(state)
            return
        logging.getLogger(__name__).warning(
            "The checkpoint's run had %d training samples, this one has %d: their order begins "
            "anew.",
            *(state["num_samples"], len(self.dataset)),
        )


def build_train_loader(cfg: CfgNode, mapper: Callable[[Any], Any]) -> Iterable[list[Any]]:
    """Return a loader of the data, sampler and batches that Detectron2's keys ask for.

    The mapper makes an input of the model of an entry of the data set, or None to skip it.

    Raises:
        ValueError: if the batch cannot be shared out among the ranks.
    """

    def make_sampler(seed: int, dataset: Dataset) -> Sampler:
        return _parts(cfg, seed, mapper=mapper, dataset=dataset)["sampler"]

    seed = run_seed(cfg)
    return loader_of(_parts(cfg, seed, mapper=mapper), seed, make_sampler)


def loader_of(
    parts: Mapping[str, Any], seed: int, make_sampler: Callable[[int, Dataset], Sampler]
) -> Iterable[list[Any]]:
    """Return a loader of the arguments that ``build_detection_train_loader`` takes.

    Args:
        parts: dataset, mapper, sampler, total_batch_size, aspect_ratio_grouping, num_workers.
        seed: of the run.
        make_sampler: makes the sampler of another seed, of the same data.

    Raises:
        ValueError: if the batch cannot be shared out among the ranks.
    """
    dataset = parts["dataset"]
    if isinstance(dataset, IterableDataset):  # has no positions
        return build_detection_train_loader(**parts)
    batch_size, rest = divmod(parts["total_batch_size"], comm.get_world_size())
    if rest or not batch_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH must be a multiple of the number of ranks, got "
            f"{parts['total_batch_size']} on {comm.get_world_size()} ranks."
        )
    groups = _aspect_ratio_groups(dataset, parts["aspect_ratio_grouping"])
    ranks = (comm.get_rank(), comm.get_world_size())
    stream = BatchStream(parts["sampler"], batch_size, groups, *ranks)
    if isinstance(dataset, list):
        dataset = DatasetFromList(dataset, copy=False)
    seeded_dataset = SeededDataset(dataset, parts["mapper"], seed)
    sampler_of = partial(make_sampler, dataset=dataset)
    return TrainLoader(seeded_dataset, stream, sampler_of, parts["num_workers"])


def _parts(cfg: CfgNode, seed: int, **arguments: Any) -> dict[str, Any]:
    """Return what Detectron2 reads of a config, with samplers of a seed: they ask NumPy for one."""
    with seeded(seed, "sampler"):
        return build_detection_train_loader.from_config(cfg, **arguments)


def _aspect_ratio_groups(dataset: Iterable[Any], grouping: bool) -> bytes:
    """Return a number for each sample: 1 for those wider than high, if that is to be told."""
    if not grouping:
        return bytes(len(dataset))
    try:
        return bytes(entry["width"] > entry["height"] for entry in dataset)
    except KeyError as error:
        raise ValueError(
            f"samples must have a width and a height to be grouped by aspect ratio, got one "
            f"without {error}. Set DATALOADER.ASPECT_RATIO_GROUPING False."
        ) from None


def follow_rank(worker: int) -> None:
    """Let a worker end when its rank does, or asks for it, and not by a signal to the whole job."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=_end_with_rank, daemon=True).start()


def _end_with_rank() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
