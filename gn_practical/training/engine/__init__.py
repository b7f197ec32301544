"""Training: launch, set-up, checks, and the trainer."""

from gn_practical.training.config import load_cfg
from gn_practical.training.engine.arguments import argument_parser
from gn_practical.training.engine.autocast import AutocastTrainer
from gn_practical.training.engine.checks import check_run
from gn_practical.training.engine.launch import launch
from gn_practical.training.engine.run import one_clear_error
from gn_practical.training.engine.setup import default_setup
from gn_practical.training.engine.trainer import Trainer

__all__ = [
    "AutocastTrainer",
    "Trainer",
    "argument_parser",
    "check_run",
    "default_setup",
    "launch",
    "load_cfg",
    "one_clear_error",
]
