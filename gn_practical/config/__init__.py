"""The config: its keys, how files are read, and what of their values can be told to be wrong."""

from gn_practical.config.keys import add_pgn_config

__all__ = ["add_pgn_config"]
