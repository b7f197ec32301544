"""The config: its keys, how files are read, and what errors say of it."""

from gn_practical.training.config.keys import add_training_config
from gn_practical.training.config.load import load_cfg
from gn_practical.training.config.node import RunConfig

__all__ = ["RunConfig", "add_training_config", "load_cfg"]
