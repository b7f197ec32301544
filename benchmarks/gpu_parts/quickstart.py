"""The quickstart, as ``make quickstart`` runs it."""

import json
import time
from pathlib import Path

from gn_practical.training.evaluation.results import flat_results
from gpu_parts.record import Record
from gpu_parts.runs import WatchedTrainer, config
from gpu_parts.settings import Settings


def run(settings: Settings, record: Record) -> None:
    """Train, evaluate, and write down all metrics."""
    small = ("SOLVER.MAX_ITER", 1, "SOLVER.CHECKPOINT_PERIOD", 5, "TEST.EVAL_PERIOD", 1)
    name = settings.choose("tiny.yaml", "pfpn.yaml")
    start = time.perf_counter()
    cfg = config(settings, name, "quickstart", *settings.choose(small, ()))
    trainer = WatchedTrainer(cfg)
    trainer.train()
    seconds = time.perf_counter() - start
    results = json.loads(Path(cfg.OUTPUT_DIR, "results.json").read_text())
    rows = [[task, metric, value] for task, metric, value in flat_results(results)]
    record.table("Metrics", ["task", "metric", "value"], rows)
    record.value("quickstart PQ", next(value for _, metric, value in rows if metric == "PQ"))
    record.value("quickstart seconds", seconds)
    record.note(f"{trainer.steps} steps; with drawing the data, {cfg.DATALOADER.NUM_WORKERS} "
                "worker(s), evaluations, pictures and curves.")  # fmt: skip
