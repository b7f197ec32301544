"""The sections of the report, the most important first; needs no PyTorch."""

from typing import NamedTuple


class Section(NamedTuple):
    """A part of the report.

    Attributes:
        name: on the command line.
        title: in the report.
        limit: seconds that it may take, ten times as many in the long form.
        interpreted: whether its dry form runs the kernels in Triton's interpreter.
        module: has the function ``run(settings, record)``; by default of the section's name.
    """

    name: str
    title: str
    limit: float
    interpreted: bool = False
    module: str = ""

    @property
    def path(self) -> str:
        """The module to import."""
        return self.module or f"gpu_parts.{self.name}"


SECTIONS = [
    Section("environment", "Device and versions", 90, interpreted=True),
    Section("agreement", "Agreement of the kernels with float64", 150, interpreted=True),
    Section("pytorch_g1", "PyTorch's G = 1 against 32", 40),
    Section("operator", "The operator", 90),
    Section("training_pfpn", "Training and inference of Panoptic FPN", 120),
    Section("memory", "Memory", 60),
    Section("compilations", "Compilations over six image sizes", 90),
    Section("amp", "200 steps of mixed precision", 60),
    Section("resume", "Exact resume", 60),
    Section("ranks", "Several GPUs", 90),
    Section("host", "Launches and host time", 40, interpreted=True),
    Section("training_faster_rcnn", "Training and inference of Faster R-CNN", 100),
    Section("quickstart", "The quickstart", 180),
    Section("compiled", "Against torch.compile", 90),
]
