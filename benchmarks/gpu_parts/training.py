"""Training steps and inference of a model with each norm in each precision."""

import statistics
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
from torch import nn
from train_step import VARIANTS, batch, build, take_turns

from gpu_parts.record import Record
from gpu_parts.settings import Settings

mpl.use("Agg")
import matplotlib.pyplot as plt

PGN, GN32, FROZEN = "PGN", "GN(32)", "FrozenBN of the zoo"
MAIN = [PGN, GN32, FROZEN]
# A model small enough for the dry form, whose channels 32 groups divide.
TINY = (
    "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
    "MODEL.FPN.OUT_CHANNELS", 32,
    "MODEL.ROI_BOX_HEAD.CONV_DIM", 32, "MODEL.ROI_BOX_HEAD.FC_DIM", 32,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 32, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", 10, "MODEL.RPN.POST_NMS_TOPK_TEST", 10,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8,
)  # fmt: skip
HEADERS = ["precision", "norm", "step ms", "least", "most", "to GN(32)", "to FrozenBN",
           "inference ms", "to GN(32)", "peak GiB", "to GN(32)"]  # fmt: skip


class Precision(NamedTuple):
    """How a model runs."""

    name: str
    dtype: torch.dtype | None = None
    channels_last: bool = False


PRECISIONS = [
    Precision("float32"),
    Precision("bfloat16", torch.bfloat16),
    Precision("float16", torch.float16),
    Precision("bfloat16 channels_last", torch.bfloat16, channels_last=True),
]


def time_model(config: str, prefix: str, settings: Settings, record: Record) -> None:
    """Time the models of a config; ``prefix`` begins the keys of its goals."""
    data = batch(*settings.choose((64, 64), (800, 1333)), settings.choose(1, 2))
    variants = settings.choose(MAIN, [*MAIN, "PGN + WS", "PGN, memory mode"], list(VARIANTS))
    overrides = settings.choose(TINY, ())
    models = build(config, variants, data, settings.device, overrides)
    results: list[dict] = []
    dry = PRECISIONS[-1:] if prefix == "pfpn" else PRECISIONS[:1]
    for precision in settings.choose(dry, PRECISIONS):
        chosen = models
        if precision.name not in ("float32", "bfloat16") and not settings.long:
            chosen = {name: models[name] for name in MAIN}
        try:
            results += time_precision(config, chosen, data, precision, settings)
        except (torch.OutOfMemoryError, FloatingPointError) as error:
            reason = f"{precision.name}: {type(error).__name__}: {error}".splitlines()[0]
            record.note(f"Not measured: {reason}")
            give(prefix, precision.name, reason, reason, record)
            continue
        record.table("Steps and inference", HEADERS, rows(results))
        record.data(results=results)
        steps = {r["norm"]: middle(r) for r in results if r["precision"] == precision.name}
        give(prefix, precision.name, steps[PGN] / steps[GN32], steps[PGN] / steps[FROZEN], record)
    record.picture(f"{prefix}.png", lambda path: draw(results, path))


def give(
    prefix: str, precision: str, gn32: float | str, frozen: float | str, record: Record
) -> None:
    """Give the values of the goals, where there are goals for the model."""
    if prefix == "pfpn":
        record.value(f"pfpn gn32 {precision}", gn32)
        record.value(f"pfpn frozen {precision}", frozen)


def time_precision(
    config: str,
    models: dict[str, nn.Module],
    data: list[dict],
    precision: Precision,
    settings: Settings,
) -> list[dict]:
    """Let the models take turns in one precision."""
    if precision.channels_last:
        for model in models.values():
            model.to(memory_format=torch.channels_last)
    dtype = None if settings.dry else precision.dtype  # which CPUs are slow in
    repeats, warm_up = settings.choose(1, 5, 25), settings.choose(0, 1)
    found = take_turns(config, models, data, repeats, dtype, warm_up, count=not settings.dry)
    return [{"precision": precision.name, **each} for each in found]


def middle(result: dict) -> float:
    """Return the median time of a training step."""
    return statistics.median(result["train"])


def rows(results: list[dict]) -> list[list]:
    """Lay out medians in ms, their range, and ratios within a precision."""
    table = []
    for r in results:
        same = {o["norm"]: o for o in results if o["precision"] == r["precision"]}
        gn32, frozen = same[GN32], same[FROZEN]
        inference = statistics.median(r["inference"])
        table.append([
            r["precision"], r["norm"], middle(r) * 1e3, min(r["train"]) * 1e3,
            max(r["train"]) * 1e3, middle(r) / middle(gn32), middle(r) / middle(frozen),
            inference * 1e3, inference / statistics.median(gn32["inference"]),
            r["peak_bytes"] / 2**30, r["peak_bytes"] / gn32["peak_bytes"],
        ])  # fmt: skip
    return table


def draw(results: list[dict], path: Path) -> None:
    """Draw the steps' medians and ranges."""
    labels = [f"{r['precision']}, {r['norm']}" for r in results]
    middles = [middle(r) * 1e3 for r in results]
    low = [m - min(r["train"]) * 1e3 for m, r in zip(middles, results, strict=True)]
    high = [max(r["train"]) * 1e3 - m for m, r in zip(middles, results, strict=True)]
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(results) + 1), layout="constrained")
    colours = [f"C{list(VARIANTS).index(r['norm'])}" for r in results]
    axes.barh(labels, middles, xerr=[low, high], color=colours)
    axes.set_xlabel("ms a training step, two images of 800 × 1333")
    axes.invert_yaxis()
    figure.savefig(path)
