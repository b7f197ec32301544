"""Run the runs of a sweep as jobs of a SLURM cluster, through submitit."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

try:
    import submitit
except ImportError as error:
    raise ValueError(
        f"--executor slurm must find the package submitit, got: {error}. pip install submitit"
    ) from error

from gn_practical.training.sweep.plan import Plan, Run
from gn_practical.training.sweep.runner import locked, unfinished_tasks
from gn_practical.training.sweep.task import is_finished

_JOB = "slurm_job"  # the file in a run's folder that holds the number of its job
_MOST_TIMEOUTS = 1000  # how often a run that is longer than the time limit may come back
_POLL_S = 1
_CPUS_PER_GPU = 6  # as in tools/slurm/train.sh
_SIGNAL_S = 120  # before the time limit, for a step and a checkpoint


def submit_all(
    plan: Plan,
    output: str,
    cluster: str = "slurm",
    num_gpus: int = 1,
    options: Sequence[str] = (),
    wait: bool = False,
) -> list[Run]:
    """Submit each run that is neither finished nor in the queue as a job of its own.

    A job that reaches its time limit, or is preempted, saves, and comes back in the queue. Scripts
    and logs of the jobs are in ``jobs`` in the folder of the sweep. Where it has waited until all
    jobs have ended, the runs that failed are returned. The cluster "local" is submitit's processes
    on this machine, to try it out; options are of ``sbatch``, as "time=12:00:00".

    Raises:
        ValueError: if there is no SLURM, or an option is not OPTION=VALUE; and as ``run_all``.
    """
    folder = Path(output, "jobs").absolute()
    executor = _executor(Path(plan.path).stem, folder, cluster, num_gpus, options)
    jobs = {}
    with locked(output):
        for task in unfinished_tasks(plan, num_gpus):
            queued = _queued(folder, task.run)
            job = jobs[task.run.folder] = queued or executor.submit(task)
            what = "is in the queue as job" if queued else "job"
            print(f"{task.run.name}: {what} {job.job_id} ({task.log})")
            if cluster == "slurm":
                os.makedirs(task.run.folder, exist_ok=True)
                Path(task.run.folder, _JOB).write_text(job.job_id)
    while wait and not all(job.done() for job in jobs.values()):
        time.sleep(_POLL_S)
    return [run for run in plan.runs if wait and not is_finished(run)]


def _queued(folder: Path, run: Run) -> submitit.SlurmJob | None:
    """Return the job of a run that SLURM knows and that has not ended."""
    file = Path(run.folder, _JOB)
    job = submitit.SlurmJob(folder, file.read_text()) if file.is_file() else None
    return None if job is None or job.done() else job


def _executor(
    name: str, folder: Path, cluster: str, num_gpus: int, options: Sequence[str]
) -> submitit.AutoExecutor:
    wrong = [option for option in options if not all(option.partition("="))]
    if wrong:
        raise ValueError(
            f"--slurm must be OPTION=VALUE, got {wrong[0]}. For example time=12:00:00."
        )
    given = dict(option.split("=", 1) for option in options)
    given = {key.strip("-").replace("-", "_"): value for key, value in given.items()}
    time_limit = given.pop("time", "24:00:00")
    try:
        executor = submitit.AutoExecutor(folder, cluster, slurm_max_num_timeout=_MOST_TIMEOUTS)
    except RuntimeError as error:
        raise ValueError(
            f"--executor slurm must find SLURM's commands, got: {error}. Run it where sbatch is."
        ) from error
    executor.update_parameters(
        name=name,
        timeout_min=_minutes(time_limit),
        gpus_per_node=num_gpus,
        cpus_per_task=_CPUS_PER_GPU * num_gpus,
        slurm_signal_delay_s=_SIGNAL_S,
        slurm_additional_parameters={"requeue": True, **given},
    )
    return executor


def _minutes(limit: str) -> int:
    """Turn sbatch's time formats into minutes: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, dash, rest = limit.rpartition("-")
    try:
        parts = [int(part) for part in rest.split(":")]
        if len(parts) < 3:
            parts = [*parts, 0] if dash else [0, *parts]
        return (24 * int(days or 0) + parts[0]) * 60 + parts[1]
    except ValueError:
        raise ValueError(
            f"--slurm time must be a time as sbatch takes it, got {limit}. For example 12:00:00."
        ) from None
