"""Train a tiny model for thousands of iterations and watch memory, open files and processes.

    python benchmarks/leak.py                                  # 3,000 iterations, 100 evaluations
    python benchmarks/leak.py --iterations 600 --evaluations 20 --workers 0

A real run of configs/quickstart/tiny.yaml on a few drawn images, with workers, evaluations and
checkpoints. Prints a table, draws leak.png in the output folder, and exits with 1 if the resident
memory after warm-up grows by more than 2 %, an open file or a thread stays, or a worker outlives
the run.
"""

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import matplotlib
import psutil
import torch
from detectron2.engine import HookBase
from detectron2.utils.events import get_event_storage
from tabulate import tabulate

from gn_practical.training.data import ensure_scenes
from gn_practical.training.engine import Trainer, load_cfg

matplotlib.use("Agg")

CONFIG = Path(__file__).parent.parent / "configs/quickstart/tiny.yaml"
MOST_GROWTH = 0.02
WARM_UP = 0.2  # of the run
COLUMNS = ("iteration", "memory MB", "workers' memory MB", "open files", "threads", "processes")


@dataclass(frozen=True)
class Usage:
    """What the process holds after an iteration; memory is resident, in bytes."""

    iteration: int
    memory: int
    workers_memory: int
    files: int
    threads: int
    workers: int


class Watch(HookBase):
    """Notes the usage every `period` iterations, after all other hooks."""

    def __init__(self, period: int) -> None:
        self.period = period
        self.usages: list[Usage] = []

    def after_step(self) -> None:
        """Note the usage if it is time."""
        if (self.trainer.iter + 1) % self.period == 0:
            usage = measure(self.trainer.iter + 1)
            self.usages.append(usage)
            # To metrics.json and TensorBoard too, to be looked at while it runs.
            get_event_storage().put_scalars(memory=usage.memory, files=usage.files)


def measure(iteration: int) -> Usage:
    """Return what this process holds now."""
    me = psutil.Process()
    workers = me.children(recursive=True)
    return Usage(
        iteration=iteration,
        memory=me.memory_info().rss,
        workers_memory=sum(worker.memory_info().rss for worker in workers),
        files=me.num_fds(),
        threads=me.num_threads(),
        workers=len(workers),
    )


def train(
    output_dir: str, iterations: int, evaluations: int, workers: int, overrides: Sequence[str] = ()
) -> list[Usage]:
    """Train, and return the usages; the last one is that after the run."""
    arguments = ["OUTPUT_DIR", output_dir]
    arguments += tiny_data(os.path.join(output_dir, "scenes"))
    arguments += ["SOLVER.MAX_ITER", str(iterations), "DATALOADER.NUM_WORKERS", str(workers)]
    arguments += ["SOLVER.CHECKPOINT_PERIOD", str(max(1, iterations // 30))]
    arguments += ["TEST.EVAL_PERIOD", str(max(1, iterations // evaluations)), *overrides]
    trainer = Trainer(load_cfg(str(CONFIG), arguments))
    watch = Watch(max(1, iterations // 100))
    trainer.register_hooks([watch])
    trainer.train()
    usages = watch.usages
    del trainer, watch
    gc.collect()
    psutil.wait_procs(psutil.Process().children(recursive=True), timeout=10)
    return [*usages, measure(iterations)]


def tiny_data(root: str) -> list[str]:
    """Draw twelve training and two validation images; return the overrides that name them."""
    ensure_scenes(root, {"train": 12, "val": 2}, size=64)
    entries = [
        (
            f"tiny_{split}",
            *(f"{root}/{folder}" for folder in (f"images/{split}", f"panoptic_{split}")),
            f"{root}/panoptic_{split}.json",
            f"{root}/panoptic_stuff_{split}",
            f"{root}/instances_{split}.json",
        )
        for split in ("train", "val")
    ]
    return [
        *("DATASETS.COCO_PANOPTIC", str(entries)),
        *("DATASETS.TRAIN", '("tiny_train_separated",)'),
        *("DATASETS.TEST", '("tiny_val_separated",)'),
    ]


def problems(usages: Sequence[Usage]) -> list[str]:
    """Say what grew: medians of the fifth after the warm-up and of the last fifth are compared."""
    *running, end = usages
    fifth = max(1, int(WARM_UP * len(running)))
    first, last = running[fifth : 2 * fifth], running[-fifth:]
    found = []
    for name in ("memory", "workers_memory"):
        growth = _median(last, name) / max(1, _median(first, name)) - 1
        print(f"{name}: {growth:+.2%} after warm-up")
        if growth > MOST_GROWTH:
            found.append(f"{name} grew by {growth:.1%} after warm-up")
    for name in ("files", "threads"):
        if _median(last, name) > _median(first, name):
            found.append(f"{name}: {_median(first, name):.0f} became {_median(last, name):.0f}")
    if end.workers:
        found.append(f"{end.workers} workers outlived the run")
    return found


def _median(usages: Sequence[Usage], name: str) -> float:
    return median(getattr(usage, name) for usage in usages)


def table(usages: Sequence[Usage], rows: int = 12) -> str:
    """Format some of the usages."""
    some = [*usages[:: max(1, len(usages) // rows)], usages[-1]]
    megabyte = 2**20
    return tabulate(
        [
            (u.iteration, f"{u.memory / megabyte:.1f}", f"{u.workers_memory / megabyte:.1f}",
             u.files, u.threads, u.workers)
            for u in some
        ],
        headers=COLUMNS,
    )  # fmt: skip


def draw(usages: Sequence[Usage], path: str) -> None:
    """Draw memory, and open files and threads, over the iterations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    memory, counts = figure.subplots(2, sharex=True)
    iterations = [usage.iteration for usage in usages[:-1]]
    for name in ("memory", "workers_memory"):
        values = [getattr(usage, name) / 2**20 for usage in usages[:-1]]
        memory.plot(iterations, values, label=name.replace("_", "' "))
    for name in ("files", "threads", "workers"):
        counts.plot(iterations, [getattr(u, name) for u in usages[:-1]], label=name)
    memory.set(ylabel="resident memory (MB)", ylim=(0, None))
    counts.set(xlabel="iteration", ylabel="number", ylim=(0, None))
    for axes in (memory, counts):
        axes.axvline(WARM_UP * iterations[-1], color="grey", linestyle=":")
        axes.legend()
    figure.savefig(path)


def main() -> int:
    """Run, report, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2, help="processes that decode")
    parser.add_argument("--output-dir", default="output/leak")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="of the config")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the model is too small to gain by more
    usages = train(args.output_dir, args.iterations, args.evaluations, args.workers, args.overrides)
    print(table(usages))
    path = os.path.join(args.output_dir, "leak.png")
    draw(usages, path)
    found = problems(usages)
    print(f"Picture: {path}\n" + ("\n".join(found) or "Nothing leaks."))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
