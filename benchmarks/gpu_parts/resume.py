"""A run that is stopped and resumed, against runs that are not."""

import os
from typing import Any

import torch

from gpu_parts.record import Record
from gpu_parts.runs import WatchedTrainer, config
from gpu_parts.settings import Settings


def run(settings: Settings, record: Record) -> None:
    """Stop a run in float16 by a signal, resume it, and compare with two that go through."""
    repeat_to_the_bit()
    stop_at = settings.choose(0, 9)
    start(settings, "stopped", stop_at)
    resumed = trainer_of(settings, "stopped")
    resumed.resume_or_load()
    state = last(settings, "stopped")
    changed = differences({key: state[key] for key in ("model", "trainer", "training_state")},
                          state_of(resumed))  # fmt: skip
    record.value("resumed state", len(changed))
    record.note(f"Stopped in iteration {stop_at}; it goes on with {resumed.start_iter}.")
    resumed.train()

    start(settings, "first")
    end = last(settings, "first")
    if settings.choose(False, True):
        start(settings, "second")
        own = differences(weights(end), weights(last(settings, "second")))
        if own:
            reason = f"two runs that go through differ in {len(own)} tensors by themselves"
            record.value("resumed end", reason)
            record.data(differ=own)
            return
    record.value("resumed end", len(differences(weights(end), weights(last(settings, "stopped")))))


def repeat_to_the_bit() -> None:
    """Ask PyTorch for operators that repeat, and torchvision's without compiling them."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.compiler.set_stance("force_eager")


def trainer_of(settings: Settings, folder: str) -> WatchedTrainer:
    """Return a trainer of the tiny model, with the same first weights each time."""
    torch.manual_seed(0)
    cfg = config(
        settings, "tiny.yaml", folder, "SOLVER.MAX_ITER", settings.choose(2, 20), "SEED", 5,
        "SOLVER.AMP.ENABLED", not settings.dry, "SOLVER.AMP.DTYPE", "float16",
        "SOLVER.CHECKPOINT_PERIOD", 1000, "DATASETS.TEST", (),
    )  # fmt: skip
    return WatchedTrainer(cfg)


def start(settings: Settings, folder: str, stop_at: int | None = None) -> None:
    """Train from the beginning, to the end or until the signal."""
    trainer = trainer_of(settings, folder)
    trainer.stop_at = stop_at
    try:
        trainer.train()
    except SystemExit:
        if stop_at is None:
            raise


def last(settings: Settings, folder: str) -> dict[str, Any]:
    """Return the last checkpoint of a run."""
    output = settings.scratch / folder
    name = (output / "last_checkpoint").read_text().strip()
    return torch.load(output / name, map_location="cpu", weights_only=True)


def state_of(trainer: WatchedTrainer) -> dict[str, Any]:
    """Return what a checkpoint of a trainer holds."""
    return {
        "model": trainer.model.state_dict(),
        "trainer": trainer.state_dict(),
        "training_state": trainer.state.state_dict(),
    }


def weights(state: dict[str, Any]) -> dict[str, Any]:
    """Return what training changes."""
    return {key: state[key] for key in ("model", "trainer")}


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Return the paths of what is not the same to the bit."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = {str(key): key for key in (*first, *second)}
        missing = object()
        return [
            found
            for name, key in keys.items()
            for found in differences(
                first.get(key, missing), second.get(key, missing), f"{path}/{name}"
            )
        ]
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return differences(dict(enumerate(first)), dict(enumerate(second)), path)
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        same = first.dtype is second.dtype and torch.equal(first.cpu(), second.cpu())
        return [] if same else [path]
    return [] if first == second else [path]
