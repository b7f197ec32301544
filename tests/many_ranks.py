"""Train on four ranks and eight, on one machine and on two, by every launcher, and compare.

    python tests/many_ranks.py                   # everything: see docs/cluster.md
    python tests/many_ranks.py resume launchers  # some of it

The quickstart's smallest model, on the CPU. Every run of four ranks must end with the same bits,
whoever starts its processes, whatever stops them, and on all ranks. "Two machines" are two
launchers on the loopback address, and SLURM's commands are stand-ins that run what they are given.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is imported
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

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
BATCH, ITERATIONS, PERIOD = 8, 10, 2
WORDS = (
    "--config-file configs/quickstart/tiny.yaml --resume MODEL.DEVICE cpu SEED 7 "
    "DATASETS.TRAIN ('scenes_val_panoptic_separated',) DATASETS.TEST () DATALOADER.NUM_WORKERS 0 "
    f"SOLVER.IMS_PER_BATCH {BATCH} SOLVER.MAX_ITER {ITERATIONS} SOLVER.CHECKPOINT_PERIOD {PERIOD}"
).split()
PYTHON = sys.executable
TORCHRUN = [PYTHON, "-m", "torch.distributed.run"]
SCRIPT, TRAIN_NET = (str(ROOT / path) for path in ("tests/many_ranks.py", "tools/train_net.py"))


# ---- on each rank ----


class WatchedTrainer(Trainer):
    """Writes down the images of each step, and takes its time, so that it can be stopped in one."""

    def run_step(self):
        """Run a step, then write down what it has seen."""
        super().run_step()
        seen = {"iteration": self.iter, "images": self.images}
        with open(f"{self.cfg.OUTPUT_DIR}/images.{rank()}.jsonl", "a") as file:
            file.write(f"{json.dumps(seen)}\n")
        time.sleep(float(os.environ.get("SLOWER", 0)))

    def look(self, _, inputs):
        """Keep the images of a forward pass."""
        self.images = [each["image_id"] for each in inputs[0]]


def rank():
    """Return the number of this rank among all."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def train(args):
    """Train on this rank, and write down a digest of its parameters."""
    torch.use_deterministic_algorithms(True)
    cfg = load_cfg(args.config_file, args.opts)
    default_setup(cfg, args)
    check_run(cfg, resume=args.resume)
    check_datasets(cfg)
    trainer = WatchedTrainer(cfg)
    trainer.model.register_forward_pre_hook(trainer.look)
    trainer.resume_or_load(args.resume)
    trainer.train()
    digest = hashlib.sha256()
    for parameter in trainer.model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    Path(cfg.OUTPUT_DIR, f"digest.{rank()}").write_text(digest.hexdigest())


# ---- who starts the ranks ----


def words_of(folder, *overrides):
    """Return the command line of a training."""
    return [*WORDS, "OUTPUT_DIR", str(folder), *map(str, overrides)]


def free_port():
    """Return a port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork(folder, ranks, *overrides, stop_after=None):
    """Train on forked ranks, which have imported everything; return their exit codes.

    With ``stop_after``, one rank gets SIGTERM once it has written down so many iterations.
    """
    port = free_port()
    processes = [
        multiprocessing.get_context("fork").Process(
            target=_forked, args=(folder, number, ranks, port, overrides)
        )
        for number in range(ranks)
    ]
    for each in processes:
        each.start()
    steps = folder / f"images.{ranks - 1}.jsonl"
    while stop_after and len(lines(steps)) < stop_after:
        time.sleep(0.01)
        if not all(each.is_alive() for each in processes):
            break
    if stop_after:
        os.kill(processes[-1].pid, signal.SIGTERM)
    for each in processes:
        each.join()
    return [each.exitcode for each in processes]


def _forked(folder, number, ranks, port, overrides):
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / f"console.{number}.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(TORCHELASTIC_RUN_ID="many", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(dict.fromkeys(("RANK", "LOCAL_RANK"), str(number)))
    os.environ.update(dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks)))
    launch(train, argument_parser().parse_args(words_of(folder, *overrides)))


def start(folder, name, command, **environment):
    """Start a launcher; what it prints is in ``<name>.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    inherited = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open(folder / f"{name}.txt", "a") as log:
        return subprocess.Popen(
            [str(word) for word in command], cwd=ROOT, stdout=log, stderr=log,
            env={**inherited, **environment},
        )  # fmt: skip


def agents(folder, port, nodes):
    """Start torchrun on "machines", two ranks each, as docs/cluster.md does."""
    options = [
        *("--nnodes", 2, "--nproc-per-node", 2, "--max-restarts", 3, "--rdzv-id", "many"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"),
    ]
    return [
        start(
            folder, f"agent{node}",
            [*TORCHRUN, *options, "--local-addr", "127.0.0.1", SCRIPT, *words_of(folder)],
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", SLOWER="0.5",
        )
        for node in nodes
    ]  # fmt: skip


def lines(path):
    """Return the lines of a file that may not be there yet."""
    return path.read_text().splitlines() if path.exists() else []


# ---- what must be ----


class Failure(Exception):
    """What is not as it should be."""


def expect(true, otherwise):
    """Raise unless something is so."""
    if not true:
        raise Failure(otherwise)


def expect_equal_ranks(folder, ranks):
    """The parameters of all ranks must be the same, to the bit."""
    digests = [lines(folder / f"digest.{number}") for number in range(ranks)]
    expect(all(digests), f"{folder}: a rank did not end")
    expect(all(each == digests[0] for each in digests), f"{folder}: parameters differ by rank")


def expect_same_bits(folder, expected):
    """The last checkpoints of two runs must hold the same weights, momentum, schedule and data."""
    states = [torch.load(f / "model_final.pth", weights_only=True) for f in (expected, folder)]
    for state in states:
        state["description"].pop("config")  # has the folder
    unequal = list(_differences(*states))
    expect(not unequal, f"{folder}: {len(unequal)} differ from {expected.name}, as {unequal[:3]}")


def _differences(first, second, path=""):
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        for key in first:
            yield from _differences(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if not torch.equal(first, second):
            yield path
    elif first != second:
        yield path


# ---- the scenarios ----


def alone(folder):
    """Return the folder of four forked ranks that nothing disturbs."""
    if not (folder / "alone/model_final.pth").exists():
        expect(fork(folder / "alone", 4) == [0] * 4, f"{folder}/alone: the ranks must end with 0")
        expect_equal_ranks(folder / "alone", 4)
    return folder / "alone"


def resume(folder):
    """Four ranks, stopped and resumed: the bits of four ranks that were left alone."""
    stopped = folder / "stopped"
    codes = fork(stopped, 4, stop_after=3)
    expect(codes == [EXIT_INTERRUPTED] * 4, f"{stopped}: exit codes {codes}")
    expect(not (stopped / "model_final.pth").exists(), f"{stopped}: it was not stopped")
    expect(fork(stopped, 4) == [0] * 4, f"{stopped}: it did not go on")
    expect_equal_ranks(stopped, 4)
    expect_same_bits(stopped, alone(folder))


def change(folder):
    """Four ranks, then two, then four: no image twice or left out, equal parameters."""
    run = folder / "changed"
    for ranks, until in ((4, 3), (2, 6), (4, None)):
        codes = fork(run, ranks, stop_after=until)
        expected = [EXIT_INTERRUPTED if until else 0] * ranks
        expect(codes == expected, f"{run}: exit codes {codes} of {ranks} ranks")
    expect_equal_ranks(run, 4)
    seen = [json.loads(line) for path in run.glob("images.*") for line in lines(path)]
    images = [image for step in seen for image in step["images"]]
    once = len(images) == len(set(images)) == BATCH * ITERATIONS
    expect(once, f"{run}: {len(images)} images, {len(set(images))} different")


def launchers(folder):
    """4 and 8 ranks by --num-gpus and torchrun: equal parameters, the same bits."""
    for ranks in (4, 8):
        by_us = [PYTHON, SCRIPT, "--num-gpus", ranks, "--dist-url", "auto"]
        by_torch = [*TORCHRUN, "--standalone", "--nproc-per-node", ranks, SCRIPT]
        folders = [folder / f"{name}{ranks}" for name in ("num_gpus", "torchrun")]
        for run, command in zip(folders, (by_us, by_torch), strict=True):
            code = start(run, "console", [*command, *words_of(run)]).wait()
            expect(code == 0, f"{run}: exit code {code}")
            expect_equal_ranks(run, ranks)
        expect_same_bits(*folders)
    expect_same_bits(folder / "num_gpus4", alone(folder))


def machines(folder):
    """Two launchers of two ranks each, as on two machines: the bits of one machine's four."""
    run, url = folder / "machines", f"tcp://127.0.0.1:{free_port()}"
    command = [PYTHON, SCRIPT, "--num-gpus", 2, "--num-machines", 2, "--dist-url", url]
    both = [
        start(run, f"machine{node}", [*command, "--machine-rank", node, *words_of(run)])
        for node in range(2)
    ]
    codes = ends(both)
    expect(codes == [0, 0], f"{run}: exit codes {codes}")
    expect_equal_ranks(run, 4)
    expect_same_bits(run, alone(folder))


def agent(folder):
    """Two torchrun agents; one is killed with its ranks, and started again: the same bits."""
    run, port = folder / "agents", free_port()
    # The first one holds the rendezvous; on one address either would.
    (first,) = agents(run, port, nodes=[0])
    while not listens(port):
        expect(first.poll() is None, f"{run}: the first agent has ended")
        time.sleep(0.05)
    (second,) = agents(run, port, nodes=[1])
    wait_for_checkpoint(run, (first, second))
    second.kill()
    second.wait()
    codes = ends([first, *agents(run, port, nodes=[1])])
    expect(codes == [0, 0], f"{run}: exit codes {codes}")
    expect_equal_ranks(run, 4)
    expect_same_bits(run, alone(folder))
    starts = [line.split()[-1] for line in lines(run / "log.txt") if "Starting training" in line]
    expect(len(starts) == 2 and starts[1] != "0", f"{run}: it began at {starts}")


def listens(port):
    """Return whether somebody listens at a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def ends(processes):
    """Wait for launchers and return their exit codes; where one fails, the others are ended."""
    while not all(each.poll() == 0 for each in processes):
        if any(each.poll() for each in processes):
            time.sleep(10)  # they may find out by themselves
            for each in processes:
                each.terminate()
            break
        time.sleep(0.1)
    return [each.wait() for each in processes]


def wait_for_checkpoint(run, processes):
    """Wait until there is a checkpoint, while all processes live."""
    while not (run / "last_checkpoint").exists():
        expect(all(each.poll() is None for each in processes), f"{run}: a launcher has ended")
        time.sleep(0.05)


SRUN = """#!/bin/sh
# Stand-in: every node is this machine. Leaves with the largest exit code, as srun does.
shift
: > "$FAKE/tasks"
for node in 0 1; do
    SLURM_NODEID=$node SLURM_NNODES=2 SLURM_GPUS_ON_NODE=2 "$@" &
    echo $! >> "$FAKE/tasks"
done
largest=0
for task in $(cat "$FAKE/tasks"); do
    wait "$task"
    code=$?
    [ "$code" -gt "$largest" ] && largest=$code
done
exit "$largest"
"""
SCONTROL = """#!/bin/sh
case $1 in
    show) echo 127.0.0.1; echo 127.0.0.1 ;;
    requeue) echo "$2" >> "$FAKE/requeued" ;;
esac
"""


def slurm(folder):
    """tools/slurm/train.sh on two nodes, out of time once and requeued: the same bits."""
    run, fake = folder / "slurm", folder / "slurm_commands"
    fake.mkdir(parents=True)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (fake / name).write_text(text)
        (fake / name).chmod(0o755)
    path = f"{fake}:{Path(PYTHON).parent}:{os.environ['PATH']}"
    job = {"SLURM_JOB_ID": str(free_port() - 20000), "SLURM_JOB_NODELIST": "node[1-2]"}
    command = ["sh", ROOT / "tools/slurm/train.sh", *words_of(run)]
    first = start(run, "job", command, PATH=path, FAKE=str(fake), **job)
    wait_for_checkpoint(run, [first])
    for task in lines(fake / "tasks"):  # as --signal does: the job's steps, not its script
        os.kill(int(task), signal.SIGUSR1)
    code = first.wait()
    expect(code == EXIT_INTERRUPTED, f"{run}: exit code {code} after SIGUSR1")
    expect(lines(fake / "requeued") == [job["SLURM_JOB_ID"]], f"{run}: not requeued once")
    code = start(run, "job", command, PATH=path, FAKE=str(fake), **job).wait()
    expect(code == 0, f"{run}: exit code {code} after it was requeued")
    expect(len(lines(fake / "requeued")) == 1, f"{run}: requeued again")
    expect_same_bits(run, alone(folder))


SCENARIOS = {each.__name__: each for each in (resume, change, machines, agent, slurm, launchers)}


@contextmanager
def named(name, problems):
    """Print how a scenario went; keep what failed."""
    begun = time.monotonic()
    try:
        yield
        end = "holds"
    except Failure as failure:
        problems.append(str(failure))
        end = f"FAILS: {failure}"
    print(f"{name}: {end} ({time.monotonic() - begun:.0f} s)", flush=True)


def main():
    """Run what is asked for; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scenarios", nargs="*", help=f"of {', '.join(SCENARIOS)}; all by default")
    parser.add_argument("--output", help="folder for the runs; else one that is removed")
    args = parser.parse_args()
    unknown = set(args.scenarios) - set(SCENARIOS)
    if unknown:
        parser.error(f"scenarios must be of {', '.join(SCENARIOS)}, got {min(unknown)}")
    folder = Path(args.output or tempfile.mkdtemp(prefix="many_ranks_"))
    problems = []
    with named("four ranks left alone", problems):
        alone(folder)
    for name in args.scenarios or SCENARIOS:
        with named(SCENARIOS[name].__doc__.partition("\n")[0].rstrip("."), problems):
            SCENARIOS[name](folder)
    if not problems and not args.output:
        shutil.rmtree(folder)
    elif problems:
        print(f"The runs are kept in {folder}.")
    return bool(problems)


if __name__ == "__main__":
    os.chdir(ROOT)
    if "--config-file" in sys.argv:  # a rank, or a launcher of ranks
        launch(train, argument_parser().parse_args())
    else:
        sys.exit(main())
