"""Training: launch, set-up, checks, and the trainer."""

from gn_practical.engine.autocast import AutocastTrainer
from gn_practical.engine.checks import check_run
from gn_practical.engine.launch import launch
from gn_practical.engine.run import main
from gn_practical.engine.setup import argument_parser, load_cfg, setup
from gn_practical.engine.trainer import Trainer

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
