"""What a checkpoint costs: the time it keeps a step waiting, and the times to write and read it.

Example:
  OMP_NUM_THREADS=1 python benchmarks/checkpoint.py --config-file configs/pfpn_pgn.yaml --repeat 5
"""

import argparse
import logging
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer
from torch import nn

from gn_practical import build_model
from gn_practical.training.checkpoint import GroupsCheckpointer
from gn_practical.training.checkpoint.files import check_whole, write_checkpoint
from gn_practical.training.engine import load_cfg
from gn_practical.weights.safe_loading import load_torch


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawText)
    parser.add_argument("--config-file", default="configs/pfpn_pgn.yaml")
    parser.add_argument("--folder", help="where to write; a temporary folder by default")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument(
        "--operator-size",
        type=int,
        default=256,
        help="rows of the matrices that the steps multiply: 256 takes as long as a small layer; "
        "with 32 the steps do little but ask for the interpreter's lock",
    )
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    cfg = load_cfg(args.config_file, ["MODEL.DEVICE", "auto"])
    model = build_model(cfg)
    optimizer = stepped_optimizer(cfg, model)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        print(f"{cfg.MODEL.DEVICE}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        measure_files(state, folder, args.repeat)
        measure_waiting(model, optimizer, folder, args.repeat, args.operator_size)


class RawText(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Help with line breaks and defaults."""


def stepped_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Return the config's optimizer with a state, as after a first step."""
    optimizer = build_optimizer(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def measure_files(state: Any, folder: str, repeat: int) -> None:
    """Time what is done to a file, beside plain ``torch.save`` and ``torch.load``."""
    plain, ours = os.path.join(folder, "plain.pth"), os.path.join(folder, "ours.pth")
    report("torch.save, not synced", lambda: torch.save(state, plain), repeat)
    report("torch.save, synced", lambda: save_and_sync(state, plain), repeat)
    report("write_checkpoint", lambda: write_checkpoint(state, ours), repeat)
    report("check_whole", lambda: check_whole(ours), repeat)
    report("torch.load", lambda: torch.load(plain, weights_only=True), repeat)
    report("check_whole and load", lambda: (check_whole(ours), load_torch(ours)), repeat)
    print(f"{os.path.getsize(ours) / 1e6:.0f} MB")


def save_and_sync(state: Any, path: str) -> None:
    """Save as one would by hand to be sure that it is on the disk."""
    with open(path, "wb") as file:
        torch.save(state, file)
        os.fsync(file.fileno())


def report(what: str, action: Callable[[], Any], repeat: int) -> None:
    """Print the median time of an action, and its range."""
    times = sorted(time_of(action) for _ in range(repeat))
    print(f"{what:24}{statistics.median(times):7.3f} s  ({times[0]:.3f} to {times[-1]:.3f})")


def time_of(action: Callable[[], Any]) -> float:
    """Return the seconds that an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def measure_waiting(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: str,
    repeat: int,
    operator_size: int,
) -> None:
    """Time ``save`` and what steps beside the write lose to the interpreter's lock.

    Seconds in which a thread could run but had no core are left out of all (Linux): so the load
    of the machine counts little.
    """
    checkpointer = GroupsCheckpointer(model, folder, optimizer=optimizer)
    checkpointer.copy_beside(optimizer)
    checkpointer.save("model_0000001", iteration=1)
    checkpointer.wait()
    writer = next(each for each in threading.enumerate() if each.name.startswith("checkpoint"))
    shares = []
    for number in range(repeat):
        before = times_of(writer)
        saving = own_time(lambda: checkpointer.save("model_0000001", iteration=1))
        writing = time.perf_counter()
        locked = steps_beside(checkpointer, operator_size)
        writing = time.perf_counter() - writing - (times_of(writer)[1] - before[1])
        shares.append((saving + locked) / writing)
        print(
            f"save {number + 1}: the step waits {saving * 1e3:.0f} ms in it and "
            f"{locked * 1e3:.0f} ms for the lock, of {writing:.2f} s of writing: {shares[-1]:.1%}"
        )
    print(f"median {statistics.median(shares):.1%}")


def own_time(action: Callable[[], Any]) -> float:
    """Return the seconds that an action takes, without those of waiting for a core."""
    before = times_of()
    took = time_of(action)
    return took - (times_of()[1] - before[1])


def steps_beside(checkpointer: GroupsCheckpointer, operator_size: int) -> float:
    """Run small steps until the write is done.

    Returns:
        Seconds in which this thread neither ran nor waited for a core: it waited for the lock.
    """
    start, before = time.perf_counter(), times_of()
    weight = torch.ones(operator_size, operator_size)
    while not checkpointer._writing.done():
        for _ in range(20):
            weight = weight @ weight.t() / operator_size
    took, after = time.perf_counter() - start, times_of()
    return max(0.0, took - sum(after) + sum(before))


def times_of(thread: threading.Thread | None = None) -> tuple[float, float]:
    """Return the seconds that a thread, this one by default, has run and has waited for a core."""
    number = thread.native_id if thread else threading.get_native_id()
    with open(f"/proc/self/task/{number}/schedstat") as file:
        running, waiting, _ = file.read().split()
    return int(running) / 1e9, int(waiting) / 1e9


if __name__ == "__main__":
    main()
