"""Which folders hold runs, and what the runs are called."""

import os
from collections.abc import Sequence

_SIGNS = ("metrics.json", "config.yaml")


def find_runs(folders: Sequence[str]) -> dict[str, str]:
    """Map a name to the folder of each run; of a folder of runs, as of a sweep, take all below it.

    Names are the shortest ends of the paths that differ. A folder that is named twice counts once.

    Raises:
        ValueError: for what is no folder, or a folder without runs.
    """
    found: dict[str, None] = {}
    for folder in folders:
        if not os.path.isdir(folder):
            raise ValueError(f"a run must be a folder, got {folder}. Give the OUTPUT_DIR of a run.")
        below = _below(folder)
        if not below:
            raise ValueError(
                f"a run must be a folder with {' or '.join(_SIGNS)}, got {folder} without, also in "
                "the folders below it. Give the OUTPUT_DIR of a run, or the folder of a sweep."
            )
        found |= dict.fromkeys(os.path.realpath(run) for run in below)
    return dict(zip(_names(list(found)), found, strict=True))


def _below(folder: str) -> list[str]:
    runs = []
    for root, subfolders, files in os.walk(folder):
        if any(sign in files for sign in _SIGNS):
            runs.append(root)
            subfolders.clear()  # what a run holds is its own
        subfolders.sort(key=_by_number)
    return runs


def _by_number(name: str) -> tuple:
    """Order names as people do: seed-2 before seed-10."""
    digits = "".join(c if c.isdigit() else " " for c in name).split()
    return "".join(c for c in name if not c.isdigit()), [int(d) for d in digits], name


def _names(folders: list[str]) -> list[str]:
    if len(folders) == 1:
        return [os.path.basename(folders[0])]
    common = os.path.commonpath(folders)
    names = [os.path.relpath(folder, common) for folder in folders]
    return [os.path.basename(f) if n == "." else n for f, n in zip(folders, names, strict=True)]
