"""The loaders of a LazyConfig: those it describes, with positions and errors that name the file."""

import inspect
from collections.abc import Iterable
from typing import Any

from detectron2.config import instantiate
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from omegaconf import DictConfig
from torch.utils.data import Dataset, IterableDataset, Sampler

from gn_practical.training.data import SkippedSamples, skipped_samples
from gn_practical.training.data.loader import loader_of
from gn_practical.training.data.mapper import CheckedMapper
from gn_practical.training.data.seeding import run_seed, seeded
from gn_practical.training.lazy.config import LazyRunConfig
from gn_practical.training.lazy.text import target_of

_PARTS = (
    "dataset",
    "mapper",
    "sampler",
    "total_batch_size",
    "aspect_ratio_grouping",
    "num_workers",
)


def build_train_loader(cfg: LazyRunConfig) -> Iterable[Any]:
    """Return the loader of ``dataloader.train``.

    One of Detectron2's ``build_detection_train_loader`` can be positioned by a checkpoint; any
    other is what the config makes of it, and a resumed run begins its data anew.

    Raises:
        ValueError: if the batch cannot be shared out among the ranks.
    """
    node, seed = cfg.lazy.dataloader.train, run_seed(cfg)
    skipped = skipped_samples(cfg)
    with seeded(seed, "sampler"):  # they ask NumPy for a seed
        parts = _arguments(node)
        _check_mapper(parts, skipped if skipped.limit else None)
        if not _can_be_positioned(node, parts):
            return target_of(node)(**parts)
        given = parts.get("sampler")
        parts["sampler"] = TrainingSampler(len(parts["dataset"])) if given is None else given

    def make_sampler(seed: int, dataset: Dataset) -> Sampler:
        with seeded(seed, "sampler"):
            sampler = instantiate(node.get("sampler"))
            return TrainingSampler(len(dataset)) if sampler is None else sampler

    defaults = inspect.signature(build_detection_train_loader).parameters
    parts = {name: parts.get(name, defaults[name].default) for name in _PARTS}
    return loader_of(parts, seed, make_sampler)


def build_test_loader(test: DictConfig) -> Iterable[Any]:
    """Return the loader of ``dataloader.test``."""
    parts = _arguments(test)
    _check_mapper(parts)
    return target_of(test)(**parts)


def _arguments(node: DictConfig) -> dict[str, Any]:
    return {key: instantiate(value) for key, value in node.items() if key != "_target_"}


def _check_mapper(parts: dict[str, Any], skipped: SkippedSamples | None = None) -> None:
    """Let the errors of a loader's mapper name the file."""
    if parts.get("mapper") is not None:
        parts["mapper"] = CheckedMapper(parts["mapper"], skipped)


def _can_be_positioned(node: DictConfig, parts: dict[str, Any]) -> bool:
    """Whether these are Detectron2's loader, and a sampler that has a stream of all ranks."""
    whole = {"dataset", "mapper", "total_batch_size"} <= set(parts) <= set(_PARTS)
    if target_of(node) is not build_detection_train_loader or not whole:
        return False
    sampler = parts.get("sampler")
    known = isinstance(sampler, TrainingSampler | RepeatFactorTrainingSampler)
    return known or (sampler is None and not isinstance(parts["dataset"], IterableDataset))
