"""PyTorch's own operator with one group against 32, on which the model of time rests."""

from group_norm import measure, median

from gpu_parts.record import Record
from gpu_parts.settings import Settings

SHAPE = [2, 256, 200, 336]  # of FPN's largest map at 800 × 1333


def run(settings: Settings, record: Record) -> None:
    """Time the forward pass of both operators at G = 1 and 32, in float32 and under autocast."""
    shape = settings.choose([1, 32, 4, 4], SHAPE)
    results = {}
    for dtype in ("float32", "bfloat16"):
        for groups in (1, 32):
            case = {"shape": shape, "groups": groups, "channels_last": False, "dtype": dtype}
            results[dtype, groups] = measure(case, settings.device, settings.choose(2, 15, 50))
            rows = [row(found) for found in results.values()]
            record.table("Forward pass, ms", ["dtype", "G", "copy", "PyTorch", "ours"], rows)
    one, many = results["float32", 1], results["float32", 32]
    record.value("g1 pytorch", median(one, "pytorch forward") / median(many, "pytorch forward"))
    record.value("g1 forward", median(one, "fused forward") / median(one, "pytorch forward"))
    record.data(results=list(results.values()))


def row(result: dict) -> list:
    """Lay out medians in ms, ours with its quartiles."""
    low, ours, high = (1e3 * each for each in result["times"]["fused forward"])
    return [
        result["dtype"], result["groups"], median(result, "copy") * 1e3,
        median(result, "pytorch forward") * 1e3, f"{ours:.3f} ({low:.3f} to {high:.3f})",
    ]  # fmt: skip
