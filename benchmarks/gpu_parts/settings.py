"""What every section is told."""

import math
import time
from pathlib import Path
from typing import Any, NamedTuple


class Settings(NamedTuple):
    """How the report is made.

    Attributes:
        dry: on the CPU, with Triton's interpreter and tiny sizes.
        long: with more cases and repeats.
        output: folder of the report, for pictures.
        scratch: folder for everything else, which is removed at the end.
        deadline: when the section is stopped, by ``time.monotonic``.
    """

    dry: bool
    long: bool
    output: Path
    scratch: Path
    deadline: float = math.inf

    @property
    def device(self) -> str:
        """Where tensors live."""
        return "cpu" if self.dry else "cuda"

    @property
    def start_method(self) -> str:
        """How a process starts: CUDA does not survive a fork, the dry form saves the imports."""
        return "fork" if self.dry else "spawn"

    def left(self) -> float:
        """Return the seconds that are left to the section."""
        return self.deadline - time.monotonic()

    def choose(self, dry: Any, normal: Any, long: Any = None) -> Any:
        """Return the value of this form; the long one has the normal one's by default."""
        if self.dry:
            return dry
        return long if self.long and long is not None else normal
