"""Training runs of the embedded data set, which is drawn, in the report's own folder."""

import os
import signal
from pathlib import Path

import torch
from torch import nn

from gn_practical.training import Trainer
from gn_practical.training.config import RunConfig, load_cfg
from gn_practical.training.data import ensure_scenes, scenes
from gn_practical.training.data.registration import SCENES_ROOT
from gn_practical.training.engine import hooks
from gpu_parts.settings import Settings

CONFIGS = Path(__file__).parents[2] / "configs/quickstart"


class WatchedTrainer(Trainer):
    """Counts losses that are not finite, and can stop itself as a signal does.

    Attributes:
        stop_at: iteration in which it sends itself SIGTERM.
    """

    stop_at: int | None = None

    def __init__(self, cfg: RunConfig) -> None:
        if not cfg.DATASETS.TEST:
            hooks.plot_metrics = lambda *_: None  # nobody looks at their curves
        super().__init__(cfg)
        self._bad: list[torch.Tensor] = []
        self.model.register_forward_hook(self._look)

    def _look(self, model: nn.Module, _: tuple, losses: dict[str, torch.Tensor]) -> None:
        if model.training:
            self._bad.append(~torch.isfinite(sum(losses.values()).detach()))
            if self.iter == self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

    @property
    def steps(self) -> int:
        """Steps that it made."""
        return len(self._bad)

    def bad_losses(self) -> int:
        """Steps whose loss was not finite."""
        return int(torch.stack(self._bad).sum())


def config(settings: Settings, name: str, folder: str, *overrides: object) -> RunConfig:
    """Return a config of the quickstart, whose data the dry form draws fewer of."""
    if settings.dry:
        scenes.NUM_IMAGES.update(train=6, val=2)
    ensure_scenes(SCENES_ROOT)
    output = settings.scratch / folder
    output.mkdir(parents=True, exist_ok=True)
    words = ["MODEL.DEVICE", settings.device, "OUTPUT_DIR", output, *overrides]
    if settings.dry:
        words += ["DATALOADER.NUM_WORKERS", 0]
    return load_cfg(str(CONFIGS / name), [str(word) for word in words])
