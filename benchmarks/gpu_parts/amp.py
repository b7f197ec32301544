"""Training steps in mixed precision, whose losses must be finite."""

import torch

from gpu_parts.record import Record
from gpu_parts.runs import WatchedTrainer, config
from gpu_parts.settings import Settings

HEADERS = ["dtype", "steps", "not finite", "last loss", "scale at the end"]


def run(settings: Settings, record: Record) -> None:
    """Train the quickstart's Panoptic FPN from scratch, in bfloat16 too in the long form."""
    rows = []
    for dtype in settings.choose(["bfloat16"], ["float16"], ["float16", "bfloat16"]):
        trainer = train(settings, dtype)
        loss = trainer.storage.history("total_loss").latest()
        scale = trainer._trainer.grad_scaler.get_scale()
        rows.append([dtype, trainer.steps, trainer.bad_losses(), loss, scale])
        record.table("Steps", HEADERS, rows)
    record.value("losses", sum(row[2] for row in rows))


def train(settings: Settings, dtype: str) -> WatchedTrainer:
    """Train; a bad step is left out and counted in place of ending the run."""
    steps = settings.choose(1, 200)
    cfg = config(
        settings, settings.choose("tiny.yaml", "pfpn.yaml"), f"amp_{dtype}",
        "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", dtype, "SOLVER.MAX_ITER", steps,
        "SOLVER.MAX_SKIPPED_STEPS", steps, "SOLVER.CHECKPOINT_PERIOD", 1000, "DATASETS.TEST", (),
        "SEED", 1,
    )  # fmt: skip
    torch.manual_seed(1)
    trainer = WatchedTrainer(cfg)
    trainer.train()
    return trainer
