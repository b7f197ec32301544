"""Training steps and inference of Faster R-CNN R-50."""

from gpu_parts.record import Record
from gpu_parts.settings import Settings
from gpu_parts.training import time_model


def run(settings: Settings, record: Record) -> None:
    """Time it with each norm."""
    time_model("faster_rcnn_gn_ws_pgn", "faster_rcnn", settings, record)
