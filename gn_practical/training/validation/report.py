"""A validation of several data sets, and its result on the screen and in a file."""

import csv
import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gn_practical.atomic import refuse_overwriting, replace_file, write_json
from gn_practical.training.data.errors import DatasetError, writing
from gn_practical.training.data.pool import Pool
from gn_practical.training.validation.coco import Session
from gn_practical.training.validation.findings import ERROR, OF_FILES, REASONS, WARNING, Fault
from gn_practical.training.validation.targets import Target

_COLUMNS = ("severity", "reason", "file", "image_id", "annotation_id", "detail", "json", "entry")


@dataclass
class Report:
    """What was found in which jsons (or data sets of other formats)."""

    faults: list[Fault] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)  # to the end
    unchecked: list[str] = field(default_factory=list)  # after an interruption

    def check(self, targets: Sequence[Target], session: Session) -> None:
        """Add what is wrong with data sets."""
        self.unchecked = [target.json for target in targets]
        for target in targets:
            try:
                self.faults.extend(target.check(session))
            except DatasetError as error:
                self.faults.append(Fault("json unusable", target.json, detail=str(error)))
            self.checked.append(self.unchecked.pop(0))

    def distinct(self) -> list[Fault]:
        """Return the faults, those of a file once, though several jsons list it."""
        distinct = {}
        for fault in self.faults:
            is_of_file = fault.reason in OF_FILES
            key = (fault.reason, fault.file, fault.detail) if is_of_file else repr(fault)
            distinct.setdefault(key, fault)
        return list(distinct.values())

    def count(self, severity: str) -> int:
        """Return the number of faults of a severity."""
        return sum(fault.severity == severity for fault in self.distinct())

    @property
    def exit_code(self) -> int:
        """0 if no error was found, 1 if one was, 130 after an interruption."""
        return 130 if self.unchecked else int(self.count(ERROR) > 0)

    def table(self, first: int = 5) -> str:
        """Write what was found where, the `first` few faults of each reason."""
        groups = defaultdict(list)
        for fault in self.distinct():
            groups[fault.reason].append(fault)
        lines = []
        for reason in sorted(groups, key=lambda r: (REASONS[r] != ERROR, -len(groups[r]))):
            found = groups[reason]
            lines.append(f"{REASONS[reason]}: {reason} ({len(found)})")
            lines += [f"  {describe(fault)}" for fault in found[:first]]
            if len(found) > first:
                lines.append(f"  ... and {len(found) - first} more")
        counts = f"{self.count(ERROR)} errors, {self.count(WARNING)} warnings"
        lines.append(f"{counts} in {', '.join(self.checked) or 'nothing'}.")
        if self.unchecked:
            left = f"{', '.join(self.unchecked)} not checked to the end."
            lines.append(f"INTERRUPTED: this report is partial, {left}")
        return "\n".join([*lines, ""])

    def save(self, path: str | os.PathLike) -> None:
        """Save all faults as .json or .csv, by the ending of `path`.

        Raises:
            ValueError: if the ending is another or the file cannot be written.
        """
        check_ending(path)
        rows = [_row(fault) for fault in self.distinct()]
        content = {
            "complete": not self.unchecked,
            "checked": self.checked,
            "unchecked": self.unchecked,
            "errors": self.count(ERROR),
            "warnings": self.count(WARNING),
            "faults": rows,
        }
        with writing(path):
            refuse_overwriting([path], [*self.checked, *self.unchecked])
            if Path(path).suffix == ".json":
                write_json(path, content, indent=1)
                return
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with replace_file(path) as temporary, open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, _COLUMNS)
                writer.writeheader()
                writer.writerows(rows)


def validate(
    targets: Sequence[Target], workers: int | None = None, show_progress: bool = True
) -> Report:
    """Find everything that is wrong with data sets: all images, PNGs and annotations.

    An image that several jsons list is decoded once. Ctrl-C ends it with the report so far.

    Args:
        targets: what to check, e.g. from `targets_of`.
        workers: processes; all cores by default, 0 for this process alone.
        show_progress: draw progress bars.

    Raises:
        RuntimeError: if a worker dies.
    """
    report = Report()
    with suppress(KeyboardInterrupt), Pool(workers, show_progress) as pool:
        report.check(targets, Session(pool))
    return report  # `unchecked` says what an interruption left


def check_ending(path: str | os.PathLike) -> None:
    """Raise ValueError unless a report can be saved under this name."""
    if Path(path).suffix not in (".json", ".csv"):
        raise ValueError(
            f"output must end in .json or .csv, got output={path}. Name the report like that."
        )


def _row(fault: Fault) -> dict[str, Any]:
    values = {**fault._asdict(), "severity": fault.severity}
    values["entry"] = "/".join(map(str, fault.entry))
    return {column: values[column] for column in _COLUMNS}


def describe(fault: Fault) -> str:
    """Write a fault: where, which, what."""
    kind = "segment" if "PNG" in fault.reason or "segment" in fault.reason else "annotation"
    ids = {"image": fault.image_id, kind: fault.annotation_id}
    which = ", ".join(f"{name} {value}" for name, value in ids.items() if value is not None)
    entry = f" [{'/'.join(map(str, fault.entry))}]" if fault.entry else ""
    return f"{fault.file or fault.json + entry}{f' ({which})' if which else ''}: {fault.detail}"
