"""Kill a training again and again, resume it, and compare it with one that was left alone.

The quickstart's model, made tiny, trains on one rank and on two, with and without workers. It is
killed with SIGKILL, SIGTERM and SIGUSR1 at random moments: while it starts, in a step, while a
checkpoint is written. After each kill it is started again with --resume, and at the end everything
in its last checkpoint must equal the uninterrupted run's to the bit, every step must have seen the
same images, and every epoch each image once. Then the same under the real launcher and torchrun.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

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
    f"DATASETS.TEST () SOLVER.IMS_PER_BATCH {BATCH} SOLVER.BASE_LR 0.01 "
    "SOLVER.CHECKPOINT_PERIOD 3 SOLVER.CHECKPOINT_KEEP_LAST 2"
).split()
STOPS = (signal.SIGTERM, signal.SIGUSR1)
SIGNALS = itertools.cycle((signal.SIGKILL, signal.SIGKILL, *STOPS))
# Seconds after the moment that is waited for.
LONGEST_DELAY = {"at the start": 2.0, "in a step": 0.2, "in a write": 0.01}


class WatchedTrainer(Trainer):
    """Writes down which images each step of this rank sees."""

    def __init__(self, cfg):
        super().__init__(cfg)
        path = f"{cfg.OUTPUT_DIR}/images.{os.environ.get('RANK', 0)}.jsonl"
        self.images = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.model.register_forward_pre_hook(self._write_down)

    def _write_down(self, _, inputs):
        seen = {"iteration": self.iter, "images": [each["image_id"] for each in inputs[0]]}
        os.write(self.images, f"{json.dumps(seen)}\n".encode())  # one call: whole or not at all


def train(args):
    """Train on this rank, as tools/train_net.py does."""
    torch.use_deterministic_algorithms(True)
    cfg = load_cfg(args.config_file, args.opts)
    default_setup(cfg, args)
    check_run(cfg, resume=args.resume)
    check_datasets(cfg)
    trainer = WatchedTrainer(cfg)
    trainer.resume_or_load(args.resume)
    trainer.train()


class Run:
    """A training in a folder, forked from this process, which has imported everything already."""

    def __init__(self, folder, ranks, workers, iterations):
        self.folder, self.ranks = folder, ranks
        self.words = arguments(folder, workers, iterations)
        self.next_iteration = None  # where it must go on after a signal that lets it save

    def start(self):
        """Start all ranks, as torchrun does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.started = time.time()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        process = multiprocessing.get_context("fork").Process
        self.processes = [process(target=self._rank, args=(n, port)) for n in range(self.ranks)]
        for each in self.processes:
            each.start()

    def _rank(self, rank, port):
        os.setsid()  # so that what it leaves behind can be found
        log = os.open(self.folder / f"console.{rank}.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if self.ranks > 1:
            os.environ.update(TORCHELASTIC_RUN_ID="crash", MASTER_ADDR="127.0.0.1")
            os.environ.update(dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)))
            os.environ.update(dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(self.ranks)))
            os.environ["MASTER_PORT"] = str(port)
        launch(train, argument_parser().parse_args(self.words))

    @property
    def ids(self):
        return [each.pid for each in self.processes]

    def ended(self):
        """Whether a rank has ended."""
        return not all(each.is_alive() for each in self.processes)

    def wait(self):
        """Wait for all ranks; where one fails, end the others as a launcher does."""
        first_failure = None
        while None in (codes := [each.exitcode for each in self.processes]):
            alive = [rank for rank, code in zip(self.ids, codes, strict=True) if code is None]
            if first_failure is None and any(codes):
                first_failure = time.monotonic()
                send(signal.SIGTERM, alive)
            elif first_failure and time.monotonic() - first_failure > 15:
                send(signal.SIGKILL, alive)
            time.sleep(0.002)
        return codes

    def steps(self, rank=0):
        """What was written down of every step, also of those that were repeated."""
        path = self.folder / f"images.{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def is_writing(self):
        """Whether this attempt has begun to write a checkpoint that is not whole yet."""
        with suppress(FileNotFoundError):  # it is now
            return any(f.stat().st_mtime > self.started for f in self.folder.glob("*.pth.tmp"))
        return False


class CrashTest:
    """Kills, resumes and compares."""

    def __init__(self, folder, iterations, seed):
        self.folder, self.iterations, self.random = folder, iterations, random.Random(seed)
        self.differences, self.kills = [], Counter()

    def expect(self, true, otherwise):
        """Keep and print what is not as it should be."""
        if not true:
            self.differences.append(otherwise)
            print(f"\nerror: {otherwise}")

    def scenario(self, ranks, workers, kills):
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
            run, codes = Run(self.folder / f"killed_{ranks}_{workers}_{trainings}", *settings), [-1]
            while any(codes):
                killed, codes = self._attempt(run, f"{name}, {run.folder.name}", done < kills)
                done += killed
                print(f"\r{name}: {done} of {kills} kills", end="", flush=True)
                if not killed and any(codes):
                    self.expect(False, f"{name}: exit codes {codes} without a kill; {run.folder}")
                    return
            self._compare(alone, run)
        print(f" in {trainings} trainings")

    def _attempt(self, run, name, kill):
        """Start or resume a run, and kill it or not; return whether it was, and the exit codes."""
        begun = len(run.steps())
        run.start()
        victims = []
        if kill:
            moment = self._await_moment(run, begun)
            number = next(SIGNALS)
            groups = [-rank for rank in run.ids]  # with their workers
            victims = self.random.choice([run.ids, groups, [self.random.choice(run.ids)]])
            victims = [] if run.ended() else victims
            send(number, victims)
        codes = run.wait()
        self._check_ends(run, name, begun, number if victims else None, codes)
        if victims:
            self.kills[f"{number.name} {moment}"] += 1
            self.kills["of these, left a checkpoint half written"] += run.is_writing()
        return bool(victims), codes

    def _await_moment(self, run, begun):
        """Wait for a random moment, or the end of the run; return which kind of moment it is."""
        moment = self.random.choice(("at the start", "in a step", "in a step", "in a write"))
        steps = 0 if moment == "at the start" else self.random.randint(1, 8)
        while len(run.steps()) < begun + steps and not run.ended():
            time.sleep(0.001)
        while moment == "in a write" and not run.is_writing() and not run.ended():
            time.sleep(0.0005)
        time.sleep(self.random.random() * LONGEST_DELAY[moment])
        return moment

    def _check_ends(self, run, name, begun, number, codes):
        """Check exit codes, that nothing lives on, and that a stop lost no step."""
        iterations = [step["iteration"] for step in run.steps()]
        new = iterations[begun:]
        if new:
            as_saved = run.next_iteration in (None, new[0])
            self.expect(as_saved, f"{name}: a stop lost steps, resumed at {new[0]}")
            run.next_iteration = None
            if number in STOPS and EXIT_INTERRUPTED in codes:
                run.next_iteration = iterations[-1] + 1
        allowed = {0, EXIT_INTERRUPTED, -signal.SIGKILL, 1 if run.ranks > 1 else 0}
        if number and not new:
            allowed |= {-number, -signal.SIGTERM}  # it did not handle signals yet
        self.expect(set(codes) <= allowed, f"{name}: exit codes {codes} after {number}")
        left = leftovers(lambda process: os.getsid(process.pid) in run.ids)
        self.expect(not left, f"{name}: processes live on: {left}")

    def _check_epochs(self, run, name):
        """Check that each epoch of the run left alone sees every image once."""
        ranks = [run.steps(rank) for rank in range(run.ranks)]
        images = [i for steps in zip(*ranks, strict=True) for step in steps for i in step["images"]]
        epochs = [images[i : i + NUM_IMAGES] for i in range(0, len(images), NUM_IMAGES)]
        once = all(len(set(epoch)) == len(epoch) for epoch in epochs)
        every = len(images) == BATCH * self.iterations
        self.expect(once and every, f"{name}: an epoch misses or repeats images")

    def _compare(self, alone, run):
        """Compare the images of every step, and all that the last checkpoints hold."""
        for rank in range(run.ranks):
            expected = {step["iteration"]: step["images"] for step in alone.steps(rank)}
            steps = run.steps(rank)
            same = all(step["images"] == expected.get(step["iteration"]) for step in steps)
            every = {step["iteration"] for step in steps} == set(expected)
            self.expect(same and every, f"{run.folder.name}: other images on rank {rank}")
        self._compare_checkpoints(alone.folder, run.folder)

    def _compare_checkpoints(self, alone, killed):
        states = [torch.load(f / "model_final.pth", weights_only=True) for f in (alone, killed)]
        unequal = list(differences(*states))
        self.expect(not unequal, f"{killed.name}: {len(unequal)} differ, as {unequal[:3]}")

    def launchers(self):
        """Kill a rank, and the launcher, of trainings that tools/train_net.py runs."""
        train_net = str(ROOT / "tools/train_net.py")
        ranks = [train_net, "--num-gpus", "2", "--dist-url", "auto"]
        for number, whom, expected in (
            (signal.SIGTERM, "launcher", EXIT_INTERRUPTED),
            (signal.SIGKILL, "rank", 128 + signal.SIGKILL),
            (signal.SIGKILL, "launcher", -signal.SIGKILL),
            (None, "nobody", 0),
        ):
            self._launched("launcher", ranks, number, whom, expected)
        options = ["--standalone", "--nproc-per-node=2", "--max-restarts=2"]
        words = ["-m", "torch.distributed.run", *options, train_net]
        self._launched("torchrun", words, signal.SIGKILL, "rank", 0)

    def _launched(self, name, words, number, whom, expected):
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        what = f"{name}: {number.name if number else 'no signal'} to {whom}"
        before = set(folder.glob("model_0*.pth"))
        command = [sys.executable, *words, *arguments(folder, 0, self.iterations)]
        environment = {**os.environ, "CRASH_TEST": str(folder), "PYTHONPATH": str(ROOT)}
        with open(folder / "console.txt", "a") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        while number and process.poll() is None and before >= set(folder.glob("model_0*.pth")):
            time.sleep(0.05)
        if number:
            send(number, [process.pid if whom == "launcher" else a_rank_of(process.pid)])
            self.kills[what] += 1
        code = process.wait()
        print(f"{what}: exit code {code}")
        left = leftovers(lambda each: each.environ().get("CRASH_TEST") == str(folder), 60)
        self.expect(not left, f"{what}: processes live on: {left}")
        self.expect(code == expected, f"{what}: exit code {code} in place of {expected}")
        if code == 0:
            self._compare_checkpoints(self.folder / "alone_2_0", folder)


def arguments(folder, workers, iterations):
    """The command line of a training."""
    words = ("DATALOADER.NUM_WORKERS", workers, "SOLVER.MAX_ITER", iterations, "OUTPUT_DIR", folder)
    return [*ARGUMENTS, *map(str, words)]


def send(number, processes):
    """Send a signal to processes that are not waited for yet."""
    for process in processes:
        os.kill(process, number)


def a_rank_of(launcher):
    """The process id of the last rank that a launcher has started."""
    children = psutil.Process(launcher).children()
    ranks = [each for each in children if "resource_tracker" not in " ".join(each.cmdline())]
    return ranks[-1].pid


def leftovers(belongs, patience=2):
    """The processes that belong to a run and live on, once they had time to end."""
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


def differences(first, second, path=""):
    """Yield the paths at which two states differ in a bit."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        for key in first:
            yield from differences(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if not torch.equal(first, second):
            yield path
    elif first != second:
        yield path


def main():
    """Run the scenarios that are asked for, print the summary, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=56, help="in all, besides the launchers'")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--iterations", type=int, default=50, help="of a training; 25: an epoch")
    parser.add_argument("--no-launchers", action="store_true", help="no kills under train_net.py")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--output", help="folder for the runs; else one that is removed")
    args = parser.parse_args()
    start = time.monotonic()
    folder = Path(args.output or tempfile.mkdtemp(prefix="crash_test_"))
    test = CrashTest(folder, args.iterations, args.seed)
    scenarios = list(itertools.product(args.ranks, args.workers))
    for number, (ranks, workers) in enumerate(scenarios):
        share = args.kills // len(scenarios) + (number < args.kills % len(scenarios))
        test.scenario(ranks, workers, share)
    if (2, 0) in scenarios and not args.no_launchers:
        test.launchers()
    print("\n" + "\n".join(f"{times:4}  {what}" for what, times in sorted(test.kills.items())))
    print(f"{(time.monotonic() - start) / 60:.1f} minutes; {len(test.differences)} differences.")
    if test.differences:
        print(f"The runs are kept in {folder}.")
    else:
        shutil.rmtree(folder)
    return bool(test.differences)


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
