"""Checkpoints: whole or not there, written in the background, read without running code."""

from gn_practical.training.checkpoint.checkpointer import GroupsCheckpointer

__all__ = ["GroupsCheckpointer"]
