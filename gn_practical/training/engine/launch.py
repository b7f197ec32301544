"""Start one process a GPU, or take the processes that torchrun started."""

import multiprocessing
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from torch import distributed
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from gn_practical.training.engine.logs import quiet_torch
from gn_practical.training.engine.run import run
from gn_practical.training.engine.signals import EXIT_INTERRUPTED, stop_signals_to
from gn_practical.training.processes import end_with_parent


class RankError(Exception):
    """The line that a rank ends with, on its way to the launcher, which prints it last."""


def launch(main: Callable[[Namespace], Any], args: Namespace) -> Any:
    """Run ``main(args)`` on every rank: under torchrun as it says, else as ``--num-gpus`` says.

    Each rank stops on signals, which the launcher passes on, and ends with one clear error where
    the user can correct it. Without CUDA the ranks are processes on the CPU, which share its cores
    and talk through gloo. When a rank ends with an error, or is killed, the others are ended too.
    ``main`` must be importable by name; ``args`` are those of Detectron2's parser.

    Raises:
        SystemExit: with the exit code of the rank that ended first with another than 0:
            ``EXIT_INTERRUPTED`` after a signal, 128 + N if it was killed by signal N.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _run_under_torchrun(main, args)
    if args.num_gpus * args.num_machines == 1:
        return run(main, args)
    _share_cores(args.num_gpus)
    quiet_torch()
    with _signals_passed_on() as passed_on:
        try:
            return detectron2_launch(
                _run_rank,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(main, args),
            )
        except ProcessExitedException as error:
            # The rank has said what was wrong; the launcher's own traceback would bury it.
            raise SystemExit(_exit_code(error, passed_on)) from None
        except ProcessRaisedException as error:
            _, is_line, line = str(error).rpartition(f"{RankError.__name__}: ")
            if not is_line:
                raise
            raise SystemExit(line.strip()) from None


def _run_rank(main: Callable[[Namespace], Any], args: Namespace) -> None:
    try:
        run(main, args)
    except SystemExit as end:
        if isinstance(end.code, str):
            raise RankError(end.code) from None
        raise


@contextmanager
def _signals_passed_on() -> Iterator[set[int]]:
    """Pass signals to the ranks, and return the set of those that came."""
    passed_on: set[int] = set()

    def pass_on(number: int, _: Any) -> None:
        passed_on.add(number)
        for rank in multiprocessing.active_children():
            if number != signal.SIGINT:  # a terminal sends it to the ranks itself
                os.kill(rank.pid, number)

    with stop_signals_to(pass_on):
        yield passed_on


def _exit_code(error: ProcessExitedException, passed_on: set[int]) -> int:
    if error.exit_code >= 0:
        return error.exit_code or 1
    if -error.exit_code in passed_on:  # a rank that had not begun to handle signals
        return EXIT_INTERRUPTED
    print(f"error: rank {error.error_index} was killed by {error.signal_name}.", file=sys.stderr)
    return 128 - error.exit_code


def _run_under_torchrun(main: Callable[[Namespace], Any], args: Namespace) -> Any:
    end_with_parent(signal.SIGTERM)  # torchrun leaves its ranks behind when it is killed
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    _share_cores(local_size)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    _join_ranks()
    comm.create_local_process_group(local_size)
    try:
        return run(main, args)
    finally:
        distributed.destroy_process_group()


def _join_ranks() -> None:
    """Make the process group, apart from that of the ranks before a restart.

    torchrun keeps one store over its restarts, and with it the addresses of ranks that are gone
    (PyTorch issue 135712). On one machine the number of the restart tells them apart; for several
    see docs/cluster.md.
    """
    store, rank, world_size = next(distributed.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size)


def _share_cores(local_size: int) -> None:
    if local_size > 1 and not torch.cuda.is_available():
        threads = max(1, (os.cpu_count() or 1) // local_size)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes to come
        torch.set_num_threads(threads)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"No GPU: {local_size} processes on the CPU, {threads} threads each.", flush=True)
