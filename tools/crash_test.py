"""Kill a training again and again, resume it, and compare it with one that was left alone.

The quickstart's model, made tiny, trains on one rank and on two, with and without workers. It is
killed with SIGKILL, SIGTERM and SIGUSR1 at random moments: while it starts, in a step, while a
checkpoint is written. After each kill it is started again with --resume, and at the end everything
in its last checkpoint must equal the uninterrupted run's to the bit, every step must have seen the
same images, and every epoch each image once. Then the same under the real launcher and torchrun.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is imported; processes are forked below
os.environ.setdefault("GOMP_SPINCOUNT", "50000")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

import psutil
import torch

from gn_practical.training.engine import (
    Trainer,
    argument_parser,
    check_run,
    default_setup,
    launch,
    load_cfg,
)
from gn_practical.training.engine.signals import EXIT_INTERRUPTED
from gn_practical.training.validation import check_datasets

ROOT = Path(__file__).resolve().parent.parent
BATCH, NUM_IMAGES = 4, 100
ARGUMENTS = (
    "--config-file configs/quickstart/pfpn.yaml --resume MODEL.DEVICE cpu SEED 7 "
    "MODEL.FPN.OUT_CHANNELS 16 MODEL.RPN.CONV_DIMS [16] MODEL.ROI_BOX_HEAD.CONV_DIM 16 "
    "MODEL.ROI_BOX_HEAD.FC_DIM 16 MODEL.ROI_MASK_HEAD.CONV_DIM 16 MODEL.SEM_SEG_HEAD.CONVS_DIM 16 "
    "INPUT.MIN_SIZE_TRAIN (64,) DATASETS.TRAIN ('scenes_val_panoptic_separated',) "
    "DATASETS.TEST () "
    f"SOLVER.IMS_PER_BATCH {BATCH} SOLVER.BASE_LR 0.01 "
    "SOLVER.CHECKPOINT_PERIOD 3 SOLVER.CHECKPOINT_KEEP_LAST 2"
).split()
STOPS = (signal.SIGTERM, signal.SIGUSR1)
SIGNALS = (signal.SIGKILL, signal.SIGKILL, *STOPS)
# Seconds after the moment that is waited for.
LONGEST_DELAY = {"at the start": 2.0, "in a step": 0.2, "in a write": 0.01}


class WatchedTrainer(Trainer):
    """Writes down which images each step of this rank sees."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        path = f"{cfg.OUTPUT_DIR}/images.{os.environ.get('RANK', 0)}.jsonl"
        self.images = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.model.register_forward_pre_hook(self._write_down)

    def _write_down(self, _: Any, inputs: tuple[list[dict[str, Any]]]) -> None:
        seen = {"iteration": self.iter, "images": [each["image_id"] for each in inputs[0]]}
        os.write(self.images, f"{json.dumps(seen)}\n".encode())  # one call: whole or not at all


def train(args: argparse.Namespace) -> None:
    """Train on this rank, as tools/train_net.py does."""
    torch.use_deterministic_algorithms(True)
    cfg = load_cfg(args.config_file, args.opts)
    default_setup(cfg, args)
    check_run(cfg, resume=args.resume)
    check_datasets(cfg)
    trainer = WatchedTrainer(cfg)
    trainer.resume_or_load(args.resume)
    trainer.train()


@dataclass
class Run:
    """A training in a folder, forked from this process, which has imported everything already.

    Args:
        folder: ``OUTPUT_DIR``.
        ranks: number of processes.
        workers: of each rank's data loader.
        iterations: of a whole training.
    """

    folder: Path
    ranks: int
    workers: int
    iterations: int
    children: list[int] = field(default_factory=list)
    started: float = 0
    next_iteration: int | None = None  # where it must go on after a signal that lets it save

    def start(self) -> None:
        """Start all ranks, as torchrun does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.started = time.time()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.children = [self._fork(rank, port) for rank in range(self.ranks)]

    def _fork(self, rank: int, port: int) -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            os.setsid()  # so that what it leaves behind can be found
            console = self.folder / f"console.{rank}.txt"
            log = os.open(console, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if self.ranks > 1:
                os.environ.update(TORCHELASTIC_RUN_ID="crash", MASTER_ADDR="127.0.0.1")
                os.environ.update(MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
                os.environ.update(WORLD_SIZE=str(self.ranks), LOCAL_WORLD_SIZE=str(self.ranks))
            words = arguments(self.folder, self.workers, self.iterations)
            launch(train, argument_parser().parse_args(words))
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
            print(error)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def ended(self) -> bool:
        """Return whether a rank has ended."""
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return any(os.waitid(os.P_PID, child, options) for child in self.children)

    def wait(self) -> list[int]:
        """Wait for all ranks; where one fails, end the others as a launcher does."""
        codes: dict[int, int] = {}
        first_failure = None
        while len(codes) < self.ranks:
            for child in set(self.children) - set(codes):
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
            alive = set(self.children) - set(codes)
            if alive and any(codes.values()) and first_failure is None:
                first_failure = time.monotonic()
                send(signal.SIGTERM, alive)
            elif alive and first_failure and time.monotonic() - first_failure > 15:
                send(signal.SIGKILL, alive)
            time.sleep(0.002)
        return [codes[child] for child in self.children]

    def steps(self, rank: int = 0) -> list[dict[str, Any]]:
        """Return what was written down of every step, also of those that were repeated."""
        path = self.folder / f"images.{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def is_writing(self) -> bool:
        """Return whether this attempt has begun to write a checkpoint that is not whole yet."""
        with suppress(FileNotFoundError):  # it is now
            return any(f.stat().st_mtime > self.started for f in self.folder.glob("*.pth.tmp"))
        return False


@dataclass
class CrashTest:
    """Kills, resumes and compares.

    Args:
        folder: for all runs.
        iterations: of each.
        random: chooses the moments.
    """

    folder: Path
    iterations: int
    random: random.Random
    number: int = 0  # of kills
    differences: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # from start to first step

    def scenario(self, ranks: int, workers: int, kills: int) -> None:
        """Kill a training so many times; if it ends before, compare it and start another."""
        name = f"{ranks} rank{'s' * (ranks > 1)}, {workers} workers"
        settings = (ranks, workers, self.iterations)
        alone = Run(self.folder / f"alone_{ranks}_{workers}", *settings)
        alone.start()
        self.expect(alone.wait() == [0] * ranks, f"{name}: the run left alone failed")
        self._check_epochs(alone, name)
        done = trainings = 0
        while done < kills:
            trainings += 1
            run = Run(self.folder / f"killed_{ranks}_{workers}_{trainings}", *settings)
            codes = [-1]
            while any(codes):
                killed, codes = self._attempt(run, name, done < kills)
                done += killed
                print(f"\r{name}: {done} of {kills} kills", end="", flush=True)
                if not killed and any(codes):
                    self.expect(False, f"{name}: exit codes {codes} without a kill; {run.folder}")
                    return
            self._compare(alone, run, name)
        print(f" in {trainings} trainings")

    def _attempt(self, run: Run, name: str, kill: bool) -> tuple[bool, list[int]]:
        """Start or resume a run, and kill it or not; return whether it was, and the exit codes."""
        begun = len(run.steps())
        start = time.monotonic()
        run.start()
        number, moment, victims = SIGNALS[self.number % len(SIGNALS)], "", []
        if kill:
            self.number += 1
            moment = self._await_moment(run, begun, start)
            groups = [-rank for rank in run.children]  # with their workers
            one = [self.random.choice(run.children)]
            victims = self.random.choice([run.children, groups, one])
            victims = [] if run.ended() else victims
            send(number, victims)
        codes = run.wait()
        self._check_ends(run, name, begun, number if victims else None, codes)
        if victims:
            self.kills[f"{number.name} {moment}"] += 1
            if run.is_writing():
                self.kills["of these, left a checkpoint half written"] += 1
        return bool(victims), codes

    def _await_moment(self, run: Run, begun: int, start: float) -> str:
        """Wait for a random moment, or the end of the run; return which kind of moment it is."""
        moment = self.random.choice(("at the start", "in a step", "in a step", "in a write"))
        steps = 0 if moment == "at the start" else self.random.randint(1, 8)
        while len(run.steps()) < begun + steps and not run.ended():
            if steps and len(run.steps()) > begun and start:
                self.seconds.append(time.monotonic() - start)
                start = 0.0
            time.sleep(0.001)
        if moment == "in a write":
            while not run.is_writing() and not run.ended():
                time.sleep(0.0005)
        time.sleep(self.random.random() * LONGEST_DELAY[moment])
        return moment

    def _check_ends(
        self, run: Run, name: str, begun: int, number: signal.Signals | None, codes: list[int]
    ) -> None:
        """Check exit codes, that nothing lives on, and that a stop lost no step."""
        iterations = [step["iteration"] for step in run.steps()]
        where = f"{name}, {run.folder.name}"
        if iterations[begun:] and run.next_iteration is not None:
            at = iterations[begun]
            self.expect(at == run.next_iteration, f"{where}: a stop lost steps, resumed at {at}")
        if iterations[begun:]:
            run.next_iteration = None
        if number in STOPS and EXIT_INTERRUPTED in codes:
            run.next_iteration = iterations[-1] + 1 if iterations[begun:] else run.next_iteration
        allowed = {0, EXIT_INTERRUPTED, -signal.SIGKILL, 1 if run.ranks > 1 else 0}
        if number and not iterations[begun:]:
            allowed.add(-number)  # it did not handle signals yet
            allowed.add(-signal.SIGTERM)
        self.expect(set(codes) <= allowed, f"{where}: exit codes {codes} after {number}")
        left = leftovers(lambda process: os.getsid(process.pid) in run.children)
        self.expect(not left, f"{where}: processes live on: {left}")

    def _check_epochs(self, run: Run, name: str) -> None:
        """Check that each epoch of the run left alone sees every image once."""
        ranks = [run.steps(rank) for rank in range(run.ranks)]
        images = [i for steps in zip(*ranks, strict=True) for step in steps for i in step["images"]]
        epochs = [images[i : i + NUM_IMAGES] for i in range(0, len(images), NUM_IMAGES)]
        once = all(len(set(epoch)) == len(epoch) for epoch in epochs)
        every = len(images) == BATCH * self.iterations
        self.expect(once and every, f"{name}: an epoch misses or repeats images")

    def _compare(self, alone: Run, run: Run, name: str) -> None:
        """Compare the images of every step, and all that the last checkpoints hold."""
        for rank in range(run.ranks):
            expected = {step["iteration"]: step["images"] for step in alone.steps(rank)}
            steps = run.steps(rank)
            same = all(step["images"] == expected.get(step["iteration"]) for step in steps)
            every = {step["iteration"] for step in steps} == set(expected)
            self.expect(same and every, f"{name}, {run.folder.name}: other images on rank {rank}")
        self.compare_files(alone.folder, run.folder)

    def compare_files(self, alone: Path, killed: Path) -> None:
        """Compare the last checkpoints of two folders."""
        states = [torch.load(f / "model_final.pth", weights_only=True) for f in (alone, killed)]
        unequal = list(differences(*states))
        self.expect(not unequal, f"{killed.name}: {len(unequal)} differ, as {unequal[:3]}")

    def expect(self, true: bool, otherwise: str) -> None:
        """Keep and print what is not as it should be."""
        if not true:
            self.differences.append(otherwise)
            print(f"\nerror: {otherwise}")

    def launchers(self) -> None:
        """Kill a rank, and the launcher, of trainings that tools/train_net.py runs."""
        train_net = [str(ROOT / "tools/train_net.py")]
        folder = self.folder / "launcher"
        ranks = ["--num-gpus", "2", "--dist-url", "auto"]
        words = [*train_net, *ranks, *arguments(folder, 0, self.iterations)]
        for number, whom, expected in (
            (signal.SIGTERM, "launcher", EXIT_INTERRUPTED),
            (signal.SIGKILL, "rank", 128 + signal.SIGKILL),
            (signal.SIGKILL, "launcher", -signal.SIGKILL),
            (None, "", 0),
        ):
            self._launched(words, folder, number, whom, expected)
        folder = self.folder / "torchrun"
        options = ["--standalone", "--nproc-per-node=2", "--max-restarts=2"]
        words = ["-m", "torch.distributed.run", *options, *train_net]
        words += arguments(folder, 0, self.iterations)
        self._launched(words, folder, signal.SIGKILL, "rank", 0)

    def _launched(
        self,
        words: list[str],
        folder: Path,
        number: signal.Signals | None,
        whom: str,
        expected: int,
    ) -> None:
        kill = f"{signal.Signals(number).name} to a {whom}" if number else "the rest"
        what = f"{folder.name}: {kill}"
        before = set(folder.glob("model_0*.pth"))
        folder.mkdir(exist_ok=True)
        with open(folder / "console.txt", "a") as log:
            environment = {**os.environ, "CRASH_TEST": str(folder), "PYTHONPATH": str(ROOT)}
            process = subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=log
            )
            while number and process.poll() is None and before >= set(folder.glob("model_0*.pth")):
                time.sleep(0.05)
            if number:
                send(number, [process.pid if whom == "launcher" else a_rank_of(process.pid)])
                self.kills[what] += 1
            code = process.wait()
        left = leftovers(lambda each: each.environ().get("CRASH_TEST") == str(folder), 60)
        self.expect(not left, f"{what}: processes live on: {left}")
        self.expect(code == expected, f"{what}: exit code {code} in place of {expected}")
        print(f"{what}: exit code {code}")
        if code == 0:
            self.compare_files(self.folder / "alone_2_0", folder)


def arguments(folder: Path, workers: int, iterations: int) -> list[str]:
    """Return the command line of a training."""
    words = ("DATALOADER.NUM_WORKERS", workers, "SOLVER.MAX_ITER", iterations, "OUTPUT_DIR", folder)
    return [*ARGUMENTS, *map(str, words)]


def send(number: int, processes: Iterable[int]) -> None:
    """Send a signal to processes that are not waited for yet."""
    for process in processes:
        os.kill(process, number)


def a_rank_of(launcher: int) -> int:
    """Return the process id of the last rank that a launcher has started."""
    children = psutil.Process(launcher).children()
    ranks = [each for each in children if "resource_tracker" not in " ".join(each.cmdline())]
    return ranks[-1].pid


def leftovers(belongs: Callable[[psutil.Process], bool], patience: float = 2) -> list[str]:
    """Return the processes that belong to a run and live on, once they had time to end."""
    deadline = time.monotonic() + patience
    found = [""]
    while found and time.monotonic() < deadline:
        time.sleep(0.05)
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError, PermissionError):  # ended, or another's
                if process.status() != psutil.STATUS_ZOMBIE and belongs(process):
                    found.append(f"{process.pid} ({' '.join(process.cmdline())[:80]})")
    return found


def differences(first: Any, second: Any, path: str = "") -> Iterator[str]:
    """Yield the paths at which two states differ in a bit."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        for key in first:
            yield from differences(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if not torch.equal(first, second):
            yield path
    elif first != second:
        yield path


def run_all(args: argparse.Namespace) -> int:
    """Run the scenarios that are asked for, print the summary, and return the exit code."""
    start = time.monotonic()
    folder = Path(args.output or tempfile.mkdtemp(prefix="crash_test_"))
    test = CrashTest(folder, args.iterations, random.Random(args.seed))
    scenarios = [(ranks, workers) for ranks in args.ranks for workers in args.workers]
    for number, (ranks, workers) in enumerate(scenarios):
        share = args.kills // len(scenarios) + (number < args.kills % len(scenarios))
        test.scenario(ranks, workers, share)
    if args.launchers and (2, 0) in scenarios:
        test.launchers()
    print("\n" + "\n".join(f"{times:4}  {what}" for what, times in sorted(test.kills.items())))
    longest = max(test.seconds, default=0)
    print(f"From the start of a process to its first step: at most {longest:.1f} s.")
    print(f"{(time.monotonic() - start) / 60:.1f} minutes; {len(test.differences)} differences.")
    if test.differences:
        print(f"The runs are kept in {folder}.")
    else:
        shutil.rmtree(folder)
    return bool(test.differences)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=56, help="in all, besides the launchers'")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--iterations", type=int, default=50, help="of a training; 25: an epoch")
    parser.add_argument(
        "--launchers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="kills under tools/train_net.py and torchrun too; they need 2 ranks, 0 workers",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--output", help="folder for the runs; else one that is removed")
    return parser.parse_args()


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(run_all(parse()))
