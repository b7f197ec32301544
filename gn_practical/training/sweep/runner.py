"""Run the runs of a sweep, several at once, each in a process of its own."""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gn_practical.training.evaluation.results import write_results
from gn_practical.training.processes import end_with_parent
from gn_practical.training.sweep.plan import Plan, Run

_RECORD = "run.json"
_POLL_S = 0.2


def run_all(plan: Plan, output: str, jobs: int = 0, num_gpus: int = 1) -> list[Run]:
    """Run what is not finished yet; a run that had begun goes on from its last checkpoint.

    A run is finished when its process ended with 0; this is written into its folder, together with
    its overrides. What each prints is in ``console.log`` there.

    Args:
        plan: from :func:`gn_practical.training.sweep.read_plan`.
        output: the folder of the sweep.
        jobs: runs at once; 0 for as many as there are GPUs for, or one a core without a GPU.
        num_gpus: GPUs of each run.

    Returns:
        The runs that failed.

    Raises:
        ValueError: if another process runs this sweep, or a run's folder holds other overrides.
    """
    jobs = jobs or _default_jobs(num_gpus)
    with _lock(output):
        for run in plan.runs:
            _refuse_another(plan, run)
        waiting = [run for run in plan.runs if not is_finished(run)]
        done = len(plan.runs) - len(waiting)
        with tqdm(total=len(plan.runs), initial=done, unit="run", smoothing=0) as bar:
            return _work_off(plan, waiting, min(jobs, max(1, len(waiting))), num_gpus, bar)


def is_finished(run: Run) -> bool:
    """Return whether the run ended well."""
    return read_record(run).get("finished", False)


def command(plan: Plan, run: Run, num_gpus: int) -> list[str]:
    """Return the command line of a run."""
    return [
        *(sys.executable, plan.tool),
        *("--config-file", plan.config, "--resume", "--num-gpus", str(num_gpus)),
        *(*run.overrides, "SEED", str(run.seed), "OUTPUT_DIR", run.folder),
    ]


def _default_jobs(num_gpus: int) -> int:
    if torch.cuda.is_available():
        return max(1, torch.cuda.device_count() // num_gpus)
    return max(1, (os.cpu_count() or 1) // num_gpus)


def _refuse_another(plan: Plan, run: Run) -> None:
    """Refuse to mix two different runs in one folder."""
    record = read_record(run)
    wanted = {"tool": plan.tool, "config": plan.config, "overrides": list(run.overrides)}
    found = {key: record.get(key) for key in wanted}
    if record and found != wanted:
        raise ValueError(
            f"{run.folder} must hold the same run, got one with {found} where {wanted} is asked "
            "for. Choose another --output, or remove that folder."
        )


def read_record(run: Run) -> dict[str, Any]:
    """Return a run's overrides, seconds, and whether it is finished; nothing if it never began."""
    try:
        return json.loads(Path(run.folder, _RECORD).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def _write_record(plan: Plan, run: Run, finished: bool, seconds: float) -> None:
    record = {
        "tool": plan.tool,
        "config": plan.config,
        "overrides": list(run.overrides),
        "finished": finished,
        "seconds": round(seconds, 1),
    }
    write_results(record, os.path.join(run.folder, _RECORD))


def _work_off(plan: Plan, waiting: list[Run], jobs: int, num_gpus: int, bar: tqdm) -> list[Run]:
    """Keep ``jobs`` processes busy until nothing waits; leave none behind."""
    queue, failed = list(reversed(waiting)), []
    running: dict[int, _Job] = {}  # slot → its job
    try:
        while queue or running:
            for slot in range(jobs):
                if queue and slot not in running:
                    running[slot] = _Job(plan, queue.pop(), slot, jobs, num_gpus)
                    bar.write(f"{running[slot].run.name}: started ({running[slot].log})")
            time.sleep(_POLL_S)
            for slot, job in list(running.items()):
                if job.process.poll() is None:
                    continue
                del running[slot]
                if not job.close():
                    failed.append(job.run)
                bar.update()
                bar.write(job.message)
    finally:
        for job in running.values():
            job.stop()
    return failed


class _Job:
    """A run and its process."""

    def __init__(self, plan: Plan, run: Run, slot: int, jobs: int, num_gpus: int) -> None:
        self.plan, self.run, self.start = plan, run, time.time()
        self.log = os.path.join(run.folder, "console.log")
        os.makedirs(run.folder, exist_ok=True)
        self.before = read_record(run).get("seconds", 0.0)
        _write_record(plan, run, False, self.before)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command(plan, run, num_gpus),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(slot, jobs, num_gpus),
                # When the sweep is killed, so is its run: the next sweep starts it again.
                preexec_fn=end_with_parent,
            )

    def close(self) -> bool:
        """Record how the run ended; return whether it ended well."""
        seconds = time.time() - self.start
        good = self.process.returncode == 0
        _write_record(self.plan, self.run, good, self.before + seconds)
        end = "finished" if good else f"FAILED with {self.process.returncode} ({self.log})"
        self.message = f"{self.run.name}: {end} after {seconds:.0f} s"
        return good

    def stop(self) -> None:
        """End the process: it saves and leaves, or is killed."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _environment(slot: int, jobs: int, num_gpus: int) -> dict[str, str]:
    """Give each run its share of the cores, or its GPUs."""
    environment = dict(os.environ)
    if torch.cuda.is_available():
        visible = environment.get("CUDA_VISIBLE_DEVICES", "")
        devices = visible.split(",") if visible else map(str, range(torch.cuda.device_count()))
        mine = list(devices)[slot * num_gpus : (slot + 1) * num_gpus]
        return {**environment, "CUDA_VISIBLE_DEVICES": ",".join(mine)}
    threads = max(1, (os.cpu_count() or 1) // (jobs * num_gpus))
    return {"OMP_NUM_THREADS": str(threads), **environment}


@contextmanager
def _lock(output: str) -> Iterator[None]:
    """Keep a second process from running the same sweep; the lock ends with the process."""
    os.makedirs(output, exist_ok=True)
    with open(os.path.join(output, "sweep.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"a sweep must run once at a time, got output={output} that another process works "
                "in. Wait for it, or choose another --output."
            ) from None
        yield


def describe(plan: Plan, num_gpus: int) -> str:
    """Return the command line of each run that is not finished, one a line."""
    lines = [shlex.join(command(plan, run, num_gpus)) for run in plan.runs if not is_finished(run)]
    return "\n".join([*lines, f"{len(lines)} of {len(plan.runs)} runs are to do."])
