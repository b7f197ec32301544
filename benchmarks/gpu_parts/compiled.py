"""The fused operator against ``torch.compile`` of PyTorch's norm and ReLU."""

from group_norm import measure, median

from gpu_parts.record import Record
from gpu_parts.settings import Settings

SHAPES = [[2, 256, 200, 336], [2, 512, 100, 168], [2, 256, 25, 42]]
HEADERS = ["shape", "G", "dtype", "layout", "copy ms", "compiled ms", "ours ms", "ratio"]


def run(settings: Settings, record: Record) -> None:
    """Time forward and backward; each case compiles anew."""
    shapes = settings.choose([[1, 32, 3, 4]], SHAPES[:1], SHAPES)
    listed = [
        {"shape": shape, "groups": groups, "channels_last": last, "dtype": dtype}
        for shape in shapes
        for last in (False, True)
        for dtype in ("float32", "bfloat16")
        for groups in (1, 32)
    ]
    compiler, rows = settings.choose("eager", "inductor"), []
    for case in listed[: settings.choose(1, None)]:
        result = measure(case, settings.device, settings.choose(2, 9), compiler)
        theirs, ours = median(result, "compiled both"), median(result, "fused both")
        layout = "NHWC" if case["channels_last"] else "NCHW"
        rows.append(["×".join(map(str, case["shape"])), case["groups"], case["dtype"], layout,
                     median(result, "copy") * 1e3, theirs * 1e3, ours * 1e3,
                     ours / theirs])  # fmt: skip
        record.table("Forward and backward", HEADERS, rows)
    record.value("compiled", max(row[-1] for row in rows))
