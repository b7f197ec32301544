"""What the forward pass stores for the backward pass, and the peak of a step."""

import memory

from gpu_parts.record import Record
from gpu_parts.settings import Settings
from gpu_parts.training import TINY

HEADERS = ["model", "precision", "run", "stored MiB", "ratio", "peak MiB", "ratio"]
MODELS = {"chain": "chain", "pfpn": "pfpn_pgn_all", "faster_rcnn": "faster_rcnn_gn_ws_pgn"}


def run(settings: Settings, record: Record) -> None:
    """Count the allocator's bytes, on the CPU those of live tensors."""
    record.note("Without parameters; with what operators need inside them. The chain has images of "
                "its own, all else two images of 800 × 1333.")  # fmt: skip
    rows = []
    for key, name in MODELS.items():
        size = (256, 320) if key == "chain" else (800, 1333)
        size = settings.choose((16, 16) if key == "chain" else (64, 64), size)
        images, overrides = settings.choose(1, 2), settings.choose(TINY, ())
        for amp in settings.choose((False,), (True, False)):  # CPUs are slow in half precision
            found = memory.measure(name, size, images, amp, settings.device, overrides)
            rows += memory.rows(found)
            record.table("Bytes", HEADERS, rows)
            if (amp or settings.dry) and key != "faster_rcnn":
                give(key, found, record)
        if settings.dry and key == "pfpn":
            break


def give(key: str, found: list[dict], record: Record) -> None:
    """Give the values of the goals, against PyTorch as CUDA runs it."""
    stored = {each["run"]: each["stored"] for each in found}
    theirs = stored.get("PyTorch GN(32) as on CUDA", stored["PyTorch GN(32)"])
    record.value(f"{key} stored", stored["PGN"] / theirs)
    record.value(f"{key} recomputed", stored["PGN, memory mode"] / theirs)
