"""Training steps and inference of Panoptic FPN R-50."""

from gpu_parts.record import Record
from gpu_parts.settings import Settings
from gpu_parts.training import time_model


def run(settings: Settings, record: Record) -> None:
    """Time it with each norm."""
    time_model("pfpn_pgn_all", "pfpn", settings, record)
