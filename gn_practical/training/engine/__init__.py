"""Training: launch, set-up, checks, and the trainer."""

from gn_practical.training.engine.autocast import AutocastTrainer
from gn_practical.training.engine.checks import check_run
from gn_practical.training.engine.launch import launch
from gn_practical.training.engine.run import main
from gn_practical.training.engine.setup import argument_parser, load_cfg, setup
from gn_practical.training.engine.trainer import Trainer

__all__ = [
    "AutocastTrainer",
    "Trainer",
    "argument_parser",
    "check_run",
    "launch",
    "load_cfg",
    "main",
    "setup",
]
