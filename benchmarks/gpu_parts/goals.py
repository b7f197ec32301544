"""What the figures are measured against; docs/performance.md explains them. Needs no PyTorch."""

from typing import Any, NamedTuple

GPU, GPUS = "a GPU", "two GPUs"
HOLDS, SHORT, NOT_RUN, MEASURED = "holds", "falls short", "not run", "no goal"
PRECISIONS = ("float32", "bfloat16", "float16", "bfloat16 channels_last")


class Goal(NamedTuple):
    """A number that a section must find.

    Attributes:
        key: by which the section gives the value.
        section: name of the section.
        text: what is measured.
        limit: the goal; None where a figure is asked for and none was set.
        at_least: whether the limit is the least, and not the most.
        digits: after the point, in which the goal is given and compared.
        needs: the device without which the value says nothing.
    """

    key: str
    section: str
    text: str
    limit: float | None
    at_least: bool = False
    digits: int = 2
    needs: str | None = GPU

    @property
    def bound(self) -> str:
        """The limit as a text."""
        if self.limit is None:
            return "-"
        return f"{'≥' if self.at_least else '≤'} {self.limit:.{self.digits}f}"

    def judge(self, value: Any, status: str, dry: bool) -> dict[str, Any]:
        """Compare a value with the goal.

        Args:
            value: a number; a text that says why there is none; None where nothing was given.
            status: of the section, which then is the reason.
            dry: whether no device was there.
        """
        line = {**self._asdict(), "goal": self.bound, "value": value, "reason": ""}
        if dry and self.needs:
            return {**line, "verdict": NOT_RUN, "reason": f"needs {self.needs}"}
        if not isinstance(value, (int, float)):
            reason = value or (
                "the section gave no finite number"
                if status == "done"
                else status.removeprefix(f"{NOT_RUN}: ")
            )
            return {**line, "value": None, "verdict": NOT_RUN, "reason": reason}
        if self.limit is None:
            return {**line, "verdict": MEASURED}
        rounded = round(value, self.digits)
        reached = rounded >= self.limit if self.at_least else rounded <= self.limit
        return {**line, "verdict": HOLDS if reached else SHORT}


def _steps() -> list[Goal]:
    """The training step of PFPN in each precision."""
    text = "training step of PFPN R-50, PGN in every norm / {}, {}"
    return [
        Goal(f"pfpn {other} {precision}", "training_pfpn", text.format(name, precision), 1.0)
        for precision in PRECISIONS
        for other, name in (("gn32", "PyTorch's GN(32)"), ("frozen", "the zoo's FrozenBN"))
    ]


def _memory() -> list[Goal]:
    """What the forward pass stores."""
    text = "activation memory under autocast, PGN{} / PyTorch's GN(32), {}"
    return [
        Goal(f"{model} {mode}", "memory", text.format(how, name), limit)
        for model, name in (("chain", "20 × (conv, norm, ReLU)"), ("pfpn", "PFPN R-50"))
        for mode, how, limit in (("stored", "", 0.4), ("recomputed", " in memory mode", 0.2))
    ]


GOALS = [
    Goal("kernels run", "environment", "the kernels run here and agree with PyTorch's: 1, or 0",
         1, at_least=True, digits=0),
    Goal("errors", "agreement", "largest error of outputs and gradients / what is allowed: twice "
         "PyTorch's own against float64, at least 4 roundings", 1, needs=None),
    Goal("ws errors", "agreement", "the same of weight standardization", 1, needs=None),
    Goal("gamma", "agreement", "error of dγ at mean/std = 25, PyTorch's / ours", 5, True,
         digits=1, needs=None),
    Goal("repeats", "agreement", "results that differ when repeated", 0, digits=0, needs=None),
    Goal("g1 pytorch", "pytorch_g1", "PyTorch's forward at 2×256×200×336 float32, G = 1 / G = 32 "
         "(20 to 40 by the model)", None, digits=1),
    Goal("g1 forward", "pytorch_g1", "G = 1 forward at 2×256×200×336 float32, ours / PyTorch's",
         0.05, digits=3),
    Goal("g1 g32", "operator", "ours, forward + backward, G = 1 / G = 32, most over all shapes",
         1.05),
    Goal("copies", "operator", "GN + ReLU forward + backward in copies of the tensor, most over "
         "tensors of 64 MB and more (the limit of the bytes is 4.0)", 5, digits=1),
    Goal("autocast", "operator", "under autocast, forward + backward with G = 32, PyTorch's / "
         "ours, least over tensors of 64 MB and more", 4, True, digits=1),
    Goal("compilations", "compilations", "compilations after warm-up over six image sizes, "
         "most over precisions and layouts", 0, digits=0),
    *_steps(),
    *_memory(),
    Goal("losses", "amp", "losses of 200 steps in float16 that are not finite", 0, digits=0),
    Goal("resumed state", "resume", "parts of a stopped run's state that resuming changes",
         0, digits=0, needs=None),
    Goal("resumed end", "resume", "tensors at the end of a resumed run that differ from an "
         "uninterrupted one's", 0, digits=0, needs=None),
    Goal("quickstart PQ", "quickstart", "PQ of the quickstart (72.2 and 73.7 on a CPU)", 68, True,
         digits=1),
    Goal("quickstart seconds", "quickstart", "seconds of the quickstart (257 and 302 on a CPU)",
         None, digits=0),
    *(Goal(f"launches {size} {way}", "host", f"launches of {size} groups, {way}", most,
           digits=0, needs=None)
      for size, most in (("small", 1), ("large", 3)) for way in ("forward", "backward")),
    Goal("host", "host", "host time of small groups, forward + backward, ours / F.group_norm + "
         "relu_", 1),
    Goal("compiled", "compiled", "forward + backward, ours / torch.compile of the pair, most",
         None),
    Goal("equal ranks", "ranks", "parameters that differ between the ranks after training over "
         "NCCL", 0, digits=0, needs=GPUS),
    Goal("scaling", "ranks", "images a second on all GPUs / (their number × those on one)", None,
         needs=GPUS),
]  # fmt: skip
