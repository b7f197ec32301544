"""Panoptic FPN on all GPUs against one: equal parameters and images a second."""

import hashlib
import json
import os
import socket
import statistics
from argparse import Namespace
from multiprocessing import get_context
from multiprocessing.connection import wait

import torch
from clock import clock
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import distributed, nn
from train_step import batch, build

from gn_practical.training.engine import argument_parser, launch
from gpu_parts.record import Record
from gpu_parts.settings import Settings
from gpu_parts.training import PGN, TINY


def run(settings: Settings, record: Record) -> None:
    """Train on one rank and on all."""
    number = settings.choose(2, torch.cuda.device_count())
    if number < 2:
        for goal in ("equal ranks", "scaling"):
            record.value(goal, f"needs two GPUs, here is {number}")
        return
    alone, together = (train(settings, count) for count in (1, number))
    different = {
        name for rank in together for name, digest in rank["parameters"].items()
        if together[0]["parameters"][name] != digest
    }  # fmt: skip
    record.value("equal ranks", len(different))
    times = [
        max(map(statistics.median, (r["seconds"] for r in ranks))) for ranks in (alone, together)
    ]
    record.value("scaling", times[0] / times[1])
    rows = [[count, each * 1e3, alone[0]["images"] * count / each]
            for count, each in zip((1, number), times, strict=True)]  # fmt: skip
    record.table("Training steps", ["ranks", "step ms", "images a second"], rows)
    record.note(f"Over {together[0]['backend']}; last losses {[r['loss'] for r in together]}.")
    record.data(alone=alone, together=together)


def train(settings: Settings, number: int) -> list[dict]:
    """Start ranks as torchrun does and return what each wrote down."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = get_context(settings.start_method)
    ranks = [context.Process(target=start, args=(settings, n, number, port)) for n in range(number)]
    for rank in ranks:
        rank.start()
    running = {rank.sentinel: rank for rank in ranks}
    while running:
        for ended in wait(list(running)):
            rank = running.pop(ended)
            rank.join()
            if rank.exitcode:  # the others would wait for it for ever; they end with the section
                raise RuntimeError(f"A rank must end without an error, got code {rank.exitcode}.")
    return [json.loads(file_of(settings, n, number).read_text()) for n in range(number)]


def file_of(settings: Settings, rank: int, number: int) -> "os.PathLike":
    """Return where a rank writes."""
    return settings.scratch / f"rank_{rank}_of_{number}.json"


def start(settings: Settings, rank: int, number: int, port: int) -> None:
    """Be one rank."""
    os.environ.update(
        TORCHELASTIC_RUN_ID="report", TORCHELASTIC_RESTART_COUNT="0", GROUP_WORLD_SIZE="1",
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number), LOCAL_WORLD_SIZE=str(number),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    args = argument_parser().parse_args([])
    args.settings = settings
    launch(train_rank, args)


def train_rank(args: Namespace) -> None:
    """Train for some steps, each rank on images of its own."""
    settings, rank = args.settings, comm.get_rank()
    data = batch(*settings.choose((64, 64), (800, 1333)), settings.choose(1, 2))
    data = [{**each, "image": each["image"].roll(rank + 1, 2)} for each in data]
    place = f"cuda:{rank}" if settings.device == "cuda" else "cpu"
    model = build("pfpn_pgn_all", [PGN], data, place, settings.choose(TINY, ()))[PGN]
    ids = {} if settings.device == "cuda" else {"device_ids": None}
    model = create_ddp_model(model, broadcast_buffers=False, **ids)
    seconds, loss = time_steps(model, data, settings.choose(2, 25), settings.device)
    parameters = {name: digest(p) for name, p in model.named_parameters()}
    found = {
        "backend": distributed.get_backend(), "images": len(data), "loss": loss,
        "seconds": seconds[len(seconds) // 4 :], "parameters": parameters,
    }  # fmt: skip
    file_of(settings, rank, comm.get_world_size()).write_text(json.dumps(found))


def time_steps(
    model: nn.Module, data: list[dict], steps: int, device: str
) -> tuple[list[float], float]:
    """Return the seconds of each step and the last loss."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    now, seconds = clock(device), []
    with EventStorage():
        for _ in range(steps):
            begin = now()
            loss = sum(model(data).values())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            seconds.append(now() - begin)
    return seconds, loss.item()


def digest(parameter: torch.Tensor) -> str:
    """Return what two parameters share only if they are the same to the bit."""
    return hashlib.sha256(parameter.detach().cpu().numpy().tobytes()).hexdigest()
