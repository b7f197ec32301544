"""From a LazyConfig and overrides to the config that the trainer reads, which keeps the former."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.data import transforms
from omegaconf import DictConfig, ListConfig, OmegaConf

from gn_practical.config import add_pgn_config
from gn_practical.training.config import RunConfig, add_training_config
from gn_practical.training.data import register_datasets
from gn_practical.training.lazy.keys import KEYS
from gn_practical.training.lazy.read import check_keys, override, read_file
from gn_practical.training.lazy.text import as_yaml, target_of

_NAMES = ("DATASETS.TRAIN", "DATASETS.TEST")


class LazyRunConfig(RunConfig):
    """A config of the trainer's keys, as far as a LazyConfig has them, and the LazyConfig itself.

    Attributes:
        lazy: the LazyConfig, of which model, data, optimizer and schedule are built.
    """

    @property
    def lazy(self) -> DictConfig:
        """Return the LazyConfig."""
        return self.__dict__["of_lazy"].lazy

    def dump(self, *_: Any, **__: Any) -> str:
        """Return the LazyConfig as YAML: what a run's config.yaml and log hold of it."""
        return self.LAZY_CONFIG


class _Whole:
    """Keeps the clones of a config on one LazyConfig, for not all of its objects can be copied."""

    def __init__(self, lazy: DictConfig) -> None:
        self.lazy = lazy

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Whole":
        return self


def load_lazy_config(
    config_file: str, opts: Sequence[str] = (), *, eval_only: bool = False
) -> LazyRunConfig:
    """Run a Python config and take ``path.key=value`` overrides.

    Reading such a file runs its code. The data sets of ``datasets.coco_instances`` and
    ``datasets.coco_panoptic`` are registered.

    Args:
        config_file: path of a LazyConfig, ``.py`` or as YAML; or the name of one of Detectron2's,
            as "COCO-Detection/retinanet_R_50_FPN_1x.py".
        opts: overrides in hydra's syntax, of keys that exist; ``+path.key=value`` adds one.
        eval_only: the run is an evaluation, which needs ``dataloader.evaluator``.

    Returns:
        A frozen config.

    Raises:
        ValueError: if the file does not run, lacks a part, or a key is wrong.
    """
    lazy = read_file(config_file)
    recipe = _run_config(lazy)
    override(lazy, opts)
    check_keys(lazy)
    cfg = _run_config(lazy)
    cfg.LAZY_CONFIG, cfg.DATASETS.TEST = as_yaml(lazy), _tested(lazy)
    if eval_only and not cfg.DATASETS.TEST:
        raise ValueError(
            "dataloader.evaluator must be there for an evaluation, got "
            f"dataloader.evaluator={lazy.dataloader.get('evaluator')}. Add one to the config."
        )
    cfg.__dict__["recipe"] = recipe
    register_datasets(cfg)
    cfg.freeze()
    return cfg


def _run_config(lazy: DictConfig) -> LazyRunConfig:
    cfg = get_cfg()
    add_pgn_config(cfg)
    add_training_config(cfg)
    cfg = LazyRunConfig(cfg)
    cfg.__dict__["of_lazy"] = _Whole(lazy)
    for path, key in KEYS.items():
        value = OmegaConf.select(lazy, path)
        if value is not None:
            _set(cfg, key, path, value)
    for key, value in _inferred(lazy, cfg.SOLVER.MAX_ITER):
        _set(cfg, key, key, value)
    if cfg.MODEL.DEVICE == "auto":
        cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    return cfg


def _tested(lazy: DictConfig) -> tuple[str, ...]:
    """Return the data sets that the run evaluates on; none without an evaluator.

    Raises:
        ValueError: if there is an evaluator, and nothing says of which data set.
    """
    evaluator = lazy.dataloader.get("evaluator")
    if not evaluator:
        return ()
    first = evaluator[0] if isinstance(evaluator, ListConfig) else evaluator
    names = OmegaConf.select(lazy, "dataloader.test.dataset.names") or first.get("dataset_name")
    if not names:
        raise ValueError(
            "dataloader.test.dataset.names must name the data sets of dataloader.evaluator, got "
            f"{names!r}. Name them, or leave dataloader.evaluator out."
        )
    return (names,) if isinstance(names, str) else tuple(names)


def _set(cfg: RunConfig, key: str, path: str, value: Any) -> None:
    """Set a value of the type that the key has.

    Raises:
        ValueError: if it is of another one.
    """
    *parents, name = key.split(".")
    for parent in parents:
        cfg = cfg[parent]
    default = cfg[name]
    if isinstance(value, ListConfig):
        value = OmegaConf.to_container(value)
    if isinstance(value, list):
        value = _tuples(value)
    if key in _NAMES and isinstance(value, str):
        value = (value,)
    if isinstance(default, list | tuple) and isinstance(value, tuple):
        value = type(default)(value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise ValueError(
            f"{path} must be of type {type(default).__name__}, got {path}={value!r}. Correct it."
        )
    cfg[name] = value


def _tuples(values: list[Any]) -> tuple[Any, ...]:
    return tuple(_tuples(each) if isinstance(each, list) else each for each in values)


def _inferred(lazy: DictConfig, max_iter: int) -> Iterator[tuple[str, Any]]:
    """Yield what the trainer's keys say of a model and its data, and a LazyConfig by its parts."""
    meta = target_of(lazy.model)
    yield "MODEL.META_ARCHITECTURE", getattr(meta, "__name__", str(meta))
    yield "MODEL.MASK_ON", OmegaConf.select(lazy, "model.roi_heads.mask_head") is not None
    yield "MODEL.KEYPOINT_ON", OmegaConf.select(lazy, "model.roi_heads.keypoint_head") is not None
    for short, long in _test_sizes(lazy):
        yield "INPUT.MIN_SIZE_TEST", short
        yield "INPUT.MAX_SIZE_TEST", long
    schedule = lazy.lr_multiplier
    inner = target_of(schedule.get("scheduler")) or target_of(schedule)
    yield "SOLVER.LR_SCHEDULER_NAME", getattr(inner, "__name__", str(inner))
    yield "SOLVER.WARMUP_ITERS", round(schedule.get("warmup_length", 0) * max_iter)
    yield "SOLVER.STEPS", ()


def _test_sizes(lazy: DictConfig) -> Iterator[tuple[int, int]]:
    steps = OmegaConf.select(lazy, "dataloader.test.mapper.augmentations") or ()
    for step in steps:
        if target_of(step) is transforms.ResizeShortestEdge:
            short = step.short_edge_length
            yield short if isinstance(short, int) else short[0], step.get("max_size", 2**31 - 1)
