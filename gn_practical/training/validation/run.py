"""One validation of several data sets."""

from collections.abc import Sequence

from gn_practical.training.data.errors import DatasetError
from gn_practical.training.data.pool import Pool
from gn_practical.training.validation.findings import Fault
from gn_practical.training.validation.images import Session
from gn_practical.training.validation.report import Report
from gn_practical.training.validation.targets import Target


def validate(
    targets: Sequence[Target],
    workers: int | None = None,
    show_progress: bool = True,
    decode: bool = True,
) -> Report:
    """Find everything that is wrong with data sets: all images, PNGs and annotations.

    An image that several jsons list is decoded once. Ctrl-C ends it with the report so far.

    Args:
        targets: what to check, e.g. from `targets_of`.
        workers: processes; all cores by default, 0 for this process alone.
        show_progress: draw progress bars.
        decode: False to ask of files only whether they are there.

    Returns:
        The report.

    Raises:
        RuntimeError: if a worker dies.

    Example:
        >>> validate([InstancesTarget("train.json", "train")])  # doctest: +SKIP
    """
    report = Report(unchecked=[target.json for target in targets])
    try:
        with Pool(workers, show_progress) as pool:
            session = Session(pool, decode)
            for target in targets:
                try:
                    report.faults.extend(target.check(session))
                except DatasetError as error:
                    report.faults.append(Fault("json unusable", target.json, detail=str(error)))
                report.checked.append(report.unchecked.pop(0))
    except KeyboardInterrupt:
        pass  # `unchecked` says so
    return report
