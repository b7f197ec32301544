r"""What exact resume, bad steps, signals and safe checkpoints cost a training step.

Steps of ``gn_practical.training.Trainer`` and of Detectron2's ``DefaultTrainer`` take turns in one
process, with the same model and the same images in the same order. So each step has its partner:
the difference is the median of theirs. It drowns in the noise of a CPU; so what is added is timed
by itself in the same steps too.

Examples:
  OMP_NUM_THREADS=1 python benchmarks/step_overhead.py
  OMP_NUM_THREADS=1 python benchmarks/step_overhead.py --config-file configs/pfpn_pgn_all.yaml \
      DATASETS.TRAIN "('scenes_train_panoptic_separated',)" INPUT.MIN_SIZE_TRAIN "(320,)" \
      INPUT.MASK_FORMAT bitmask SOLVER.IMS_PER_BATCH 2 SOLVER.REFERENCE_WORLD_SIZE 0
"""

import argparse
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import torch
from clock import clock
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.engine.hooks import EvalHook, PeriodicWriter
from torch import nn

from gn_practical import build_model
from gn_practical.training.engine import Trainer, autocast, load_cfg
from gn_practical.training.engine.autocast import AutocastTrainer
from gn_practical.training.engine.signals import Agreement
from gn_practical.training.engine.training_state import TrainingState

# What is added to a step, and where.
PARTS = {
    "seeding": (TrainingState, "begin_step"),
    "finite gradients": (autocast, "gradients_are_finite"),
    "counts": (AutocastTrainer, "_write_counts"),
    "vote on signals": (Agreement, "stop"),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="configs/quickstart/pfpn.yaml")
    parser.add_argument("--steps", type=int, default=10, help="of a turn (default: 10)")
    parser.add_argument("--turns", type=int, default=10, help="of each trainer (default: 10)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="overrides of the config")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        own = ["MODEL.DEVICE", "auto", "MODEL.WEIGHTS", "", "OUTPUT_DIR", folder, "SEED", "1"]
        own += ["DATALOADER.NUM_WORKERS", "0", "SOLVER.CHECKPOINT_PERIOD", "1000000"]
        cfg = load_cfg(args.config_file, own + args.opts)
        print(f"{cfg.MODEL.DEVICE}, torch {torch.__version__}, {torch.get_num_threads()} threads")
        logging.disable(logging.WARNING)
        parts = {name: time_calls(*place, cfg.MODEL.DEVICE) for name, place in PARTS.items()}
        trainers = [make(cfg) for make in (PlainTrainer, SeededTrainer)]
        clocks = [StepClock(cfg.MODEL.DEVICE) for _ in trainers]
        for trainer, steps in zip(trainers, clocks, strict=True):
            trainer.register_hooks([steps])
            # What these do at the end of each turn belongs to no step.
            trainer._hooks = [
                each for each in trainer._hooks if not isinstance(each, (EvalHook, PeriodicWriter))
            ]
        for turn in range(args.turns):
            for trainer in trainers if turn % 2 else reversed(trainers):
                train_for(trainer, args.steps)
    report(*(each.seconds for each in clocks), parts)


def time_calls(place: Any, name: str, device: str) -> list[float]:
    """Have all calls of a function timed; returns the list that they will fill."""
    function, now, seconds = getattr(place, name), clock(device), []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = now()
        result = function(*args, **kwargs)
        seconds.append(now() - start)
        return result

    setattr(place, name, timed)
    return seconds


class PlainTrainer(DefaultTrainer):
    """Detectron2's, with this project's model."""

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the model that ``Trainer`` builds, with the same weights."""
        torch.manual_seed(0)
        return build_model(cfg)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[Any]:
        """Load the images that ``Trainer`` loads."""
        return Trainer.build_train_loader(cfg)


class SeededTrainer(Trainer):
    """This project's."""

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build its model, with the weights of the other."""
        torch.manual_seed(0)
        return super().build_model(cfg)


class StepClock(HookBase):
    """Measures from the start of a step to that of the next, all hooks included."""

    def __init__(self, device: str) -> None:
        self._now: Callable[[], float] = clock(device)
        self._start = 0.0
        self.seconds: list[float] = []

    def before_train(self) -> None:
        """Begin a turn; its first step warms the caches up."""
        self._start = 0.0

    def before_step(self) -> None:
        """End the step before."""
        start, self._start = self._start, self._now()
        if start and self.trainer.iter > self.trainer.start_iter + 1:
            self.seconds.append(self._start - start)


def train_for(trainer: DefaultTrainer, steps: int) -> None:
    """Go on for some steps and one, whose end nothing measures."""
    trainer.start_iter = getattr(trainer, "iter", 0)
    trainer.max_iter = trainer.start_iter + steps + 2
    trainer.train()


def report(plain: list[float], ours: list[float], parts: dict[str, list[float]]) -> None:
    """Print medians with quartiles of both, of the differences of partners, and of the parts."""
    differences = [b - a for a, b in zip(plain, ours, strict=True)]
    rows = {"Detectron2's": plain, "gn_practical's": ours, "difference": differences, **parts}
    for name, seconds in rows.items():
        low, median, high = (each * 1e3 for each in statistics.quantiles(seconds, n=4))
        print(f"{name:22}{median:9.2f} ms a step ({low:.2f} to {high:.2f}, {len(seconds)} steps)")
    step, added = statistics.median(plain), sum(map(statistics.median, parts.values()))
    print(f"overhead {statistics.median(differences) / step:.2%}, by its parts {added / step:.2%}")


if __name__ == "__main__":
    main()
