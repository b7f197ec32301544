"""Cost of a training step against the number of ranks and the size of the model, on one machine.

    python benchmarks/ranks.py                     # 1, 2, 4 and 8 ranks on the CPU
    python benchmarks/ranks.py --ranks 1 4 --configs configs/quickstart/pfpn.yaml

The batch is the same for any number of ranks, who share the machine's cores: what more ranks cost
is what they add. Beside the time stands what a rank sends in a step, as the kernel counts the
bytes of its TCP connections, and what it must send: 2 (n - 1) / n times its gradients, the least
for a sum that all n ranks get.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import socket
import statistics
import struct
import tempfile
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is imported; ranks are forked below
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

from detectron2.engine import HookBase
from tabulate import tabulate

from gn_practical.training import Trainer
from gn_practical.training.config import load_cfg
from gn_practical.training.engine import argument_parser, default_setup, launch
from gn_practical.training.evaluation.results import write_results
from gn_practical.training.validation import check_datasets

WARM_UP = 3  # steps that are not measured
_BYTES_ACKED = 120  # where Linux's struct tcp_info has tcpi_bytes_acked, 64 bits


def sent_bytes() -> int:
    """Return what this process has sent over the TCP connections that it has now."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile, or no TCP
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            total += struct.unpack_from("=Q", info, _BYTES_ACKED)[0]
    return total


class Meter(HookBase):
    """Measures each step, from its start to that of the next."""

    def __init__(self) -> None:
        self.at: list[tuple[float, int]] = []

    def before_step(self) -> None:
        """Read clock and counters."""
        self.at.append((time.perf_counter(), sent_bytes()))

    def steps(self) -> list[tuple[float, int]]:
        """Return seconds and bytes of the steps behind the warm-up."""
        at = self.at[WARM_UP:]
        return [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(at)]


def train(args: Namespace) -> None:
    """Train on this rank and write down what was measured."""
    cfg = load_cfg(args.config_file, args.opts)
    default_setup(cfg, args)
    check_datasets(cfg)
    trainer = Trainer(cfg)
    meter = Meter()
    trainer.register_hooks([meter])
    trainer.train()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    content = {"steps": meter.steps(), "parameters": sum(p.numel() for p in trained)}
    Path(cfg.OUTPUT_DIR, f"rank.{os.environ['RANK']}.json").write_text(json.dumps(content))


def measure(config: str, ranks: int, steps: int, batch: int) -> dict:
    """Train on so many ranks; return medians over the steps, and over the ranks."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        words = [
            *("--config-file", config, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""),
            *("DATASETS.TRAIN", "('scenes_val_panoptic_separated',)", "DATASETS.TEST", "()"),
            *("DATALOADER.NUM_WORKERS", 0, "INPUT.MIN_SIZE_TRAIN", "(64,)", "SEED", 1),
            *("SOLVER.IMS_PER_BATCH", batch, "SOLVER.MAX_ITER", steps + WARM_UP + 1),
            *("SOLVER.CHECKPOINT_PERIOD", 10**6, "OUTPUT_DIR", folder),
        ]
        processes = [
            multiprocessing.get_context("fork").Process(
                target=rank, args=(number, ranks, port, folder, list(map(str, words)))
            )
            for number in range(ranks)
        ]
        for each in processes:
            each.start()
        for each in processes:
            each.join()
        results = [json.loads(path.read_text()) for path in Path(folder).glob("rank.*.json")]
        if len(results) < ranks:
            raise SystemExit(f"error: a rank failed:\n{Path(folder, 'console.0').read_text()}")
    seconds = [step[0] for step in results[0]["steps"]]
    sent = statistics.median(step[1] for result in results for step in result["steps"])
    parameters = results[0]["parameters"]
    must = 2 * (ranks - 1) / ranks * 4 * parameters
    return {"config": Path(config).stem, "parameters": parameters, "ranks": ranks,
            "quartiles": statistics.quantiles(seconds, n=4, method="inclusive"),
            "sent": sent, "must": must}  # fmt: skip


def rank(number: int, ranks: int, port: int, folder: str, words: list[str]) -> None:
    """Be a rank, as torchrun starts it."""
    log = os.open(Path(folder, f"console.{number}"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(TORCHELASTIC_RUN_ID="ranks", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(dict.fromkeys(("RANK", "LOCAL_RANK"), str(number)))
    os.environ.update(dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks)))
    launch(train, argument_parser().parse_args(words))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    sizes = [f"configs/quickstart/{name}.yaml" for name in ("tiny", "pfpn_narrow50", "pfpn")]
    parser.add_argument("--configs", nargs="+", default=sizes)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"))
    args = parser.parse_args()
    results = []
    for config in args.configs:
        for ranks in args.ranks:
            results.append(measure(config, ranks, args.steps, args.batch))
            row = results[-1]
            print(f"{row['config']}, {ranks} ranks: {row['quartiles'][1] * 1e3:.0f} ms", flush=True)
    headers = ("config", "parameters", "ranks", "ms a step", "quartiles", "sent kB", "must kB")
    table = [
        [r["config"], r["parameters"], r["ranks"], f"{r['quartiles'][1] * 1e3:.0f}",
         "{:.0f} to {:.0f}".format(*(1e3 * r["quartiles"][i] for i in (0, 2))),
         f"{r['sent'] / 1e3:.1f}", f"{r['must'] / 1e3:.1f}"]
        for r in results
    ]  # fmt: skip
    print(tabulate(table, headers, "pipe"))
    write_results(results, str(args.output / "ranks.json"))


if __name__ == "__main__":
    main()
