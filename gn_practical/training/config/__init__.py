"""The config: its keys, how files are read, and what of their values can be told to be wrong."""

from gn_practical.training.config.keys import add_training_config

__all__ = ["add_training_config"]
