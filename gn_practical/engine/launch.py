"""Start one process a GPU, or take the processes that torchrun started."""

import os
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm
from torch import distributed
from torch.multiprocessing import ProcessExitedException


def launch(main: Callable[[Namespace], Any], args: Namespace) -> Any:
    """Run ``main(args)`` on every rank: under torchrun as it says, else as ``--num-gpus`` says.

    Without CUDA the ranks are processes on the CPU, which share its cores and talk through gloo.

    Args:
        main: called once a rank; must be importable by name.
        args: what ``detectron2.engine.default_argument_parser`` parsed.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _run_under_torchrun(main, args)
    _share_cores(args.num_gpus)
    try:
        return detectron2_launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except ProcessExitedException as error:
        # The rank has said what was wrong; the launcher's own traceback would bury it.
        raise SystemExit(error.exit_code or 1) from None


def _run_under_torchrun(main: Callable[[Namespace], Any], args: Namespace) -> Any:
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    _share_cores(local_size)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    comm.create_local_process_group(local_size)
    try:
        return main(args)
    finally:
        distributed.destroy_process_group()


def _share_cores(local_size: int) -> None:
    if local_size > 1 and not torch.cuda.is_available():
        threads = max(1, (os.cpu_count() or 1) // local_size)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes to come
        torch.set_num_threads(threads)
