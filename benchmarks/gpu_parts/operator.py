"""The fused operator against PyTorch's, FrozenBN and a copy of the same bytes."""

import math

from group_norm import cases, draw, measure, median, summary
from group_norm import row as full_row

from gpu_parts.record import Record
from gpu_parts.settings import Settings

HEADERS = ["shape", "G", "layout", "dtype", "copy ms", "PyTorch ms", "ours ms", "spread ms",
           "forward/PyTorch", "both/PyTorch", "both/copy", "both/FrozenBN"]  # fmt: skip
LARGE = 64e6  # bytes, above which the memory alone counts
RESERVE = 5  # seconds for the picture


def run(settings: Settings, record: Record) -> None:
    """Time all shapes with two images, then with others as long as the time lasts."""
    listed = sorted(cases("cuda", large=True), key=lambda case: case["shape"][0] != 2)
    if settings.dry:
        some = [case for case in listed if case["groups"] < 64 and not case["channels_last"]]
        listed = [{**case, "shape": [1, 32, 3, 4]} for case in some[:4]]
    results = []
    for case in listed:
        if settings.left() < RESERVE:
            record.note(f"{len(results)} of {len(listed)} cases fitted into the time.")
            break
        results.append(measure(case, settings.device, settings.choose(2, 7, 25)))
        record.table("Forward and backward", HEADERS, [full_row(each)[:12] for each in results])
    ratios = summary(results)
    record.table("Ratios", ["ratio", "least", "median", "most"], ratios)
    record.data(results=results)
    for key, value in worst(results, 0 if settings.dry else LARGE).items():
        record.value(key, value)
    record.picture("operator.png", lambda path: draw(results, path))


def worst(results: list[dict], large: float) -> dict[str, float]:
    """Return the values of the goals; ``large`` is in bytes."""
    g1 = {place(r): r for r in results if r["groups"] == 1}
    g32 = {place(r): r for r in results if r["groups"] == 32}
    big = [r for r in results if number_of_bytes(r) >= large]
    half = [r for r in big if r["dtype"] != "float32" and r["groups"] == 32]
    return {
        "g1 g32": max(median(g1[p], "fused both") / median(g32[p], "fused both")
                      for p in g1.keys() & g32.keys()),
        "copies": max(median(r, "fused both") / median(r, "copy") for r in big),
        "autocast": min(median(r, "pytorch both") / median(r, "fused both") for r in half),
    }  # fmt: skip


def place(result: dict) -> tuple:
    """Return what two results differ in beside the number of groups."""
    return *result["shape"], result["channels_last"], result["dtype"]


def number_of_bytes(result: dict) -> int:
    """Return the size of the tensor."""
    return math.prod(result["shape"]) * (4 if result["dtype"] == "float32" else 2)
