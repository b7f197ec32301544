"""One validation of several data sets."""

from collections.abc import Sequence

from gn_practical.training.data.errors import DatasetError
from gn_practical.training.data.pool import Pool
from gn_practical.training.validation.files import Decoded
from gn_practical.training.validation.findings import Fault
from gn_practical.training.validation.report import Report
from gn_practical.training.validation.targets import Target


def validate(
    targets: Sequence[Target], workers: int | None = None, show_progress: bool = True
) -> Report:
    """Find everything that is wrong with data sets: all images, PNGs and annotations.

    An image that several jsons list is decoded once. Ctrl-C ends it with the report so far.

    Args:
        targets: what to check, e.g. from `targets_of`.
        workers: processes; all cores by default.
        show_progress: draw progress bars.

    Returns:
        The report.

    Raises:
        RuntimeError: if a worker dies.

    Example:
        >>> validate([InstancesTarget("train.json", "train")])  # doctest: +SKIP
    """
    report, decoded = Report(unchecked=[target.json for target in targets]), {}
    try:
        with Pool(workers, show_progress) as pool:
            for target in targets:
                _check(target, pool, decoded, report)
                report.checked.append(report.unchecked.pop(0))
    except KeyboardInterrupt:
        pass  # `unchecked` says so
    return report


def _check(target: Target, pool: Pool, decoded: dict[str, Decoded], report: Report) -> None:
    try:
        for fault in target.check(pool, decoded):
            report.add(fault)
    except DatasetError as error:
        report.add(Fault("json unusable", target.json, detail=str(error)))
