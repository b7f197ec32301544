"""Checkpoints: whole or not there, written in the background, read without running code."""

from gn_practical.checkpoint.best import BestCheckpoint
from gn_practical.checkpoint.checkpointer import GroupsCheckpointer

__all__ = ["BestCheckpoint", "GroupsCheckpointer"]
