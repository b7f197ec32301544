"""Run the runs of a sweep on this machine, several at once, each in a process of its own."""

import fcntl
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import joblib
import torch
from tqdm import tqdm

from gn_practical.training.engine.signals import Interrupted, stop_signals_to
from gn_practical.training.sweep.plan import Plan, Run
from gn_practical.training.sweep.task import POLL_S, Task, is_finished, stop

_ALIKE = 3  # failures for the same reason, without any success, after which no more is started
_SHOWN_LINES = 10


def run_all(
    plan: Plan, output: str, jobs: int = 0, num_gpus: int = 1, keep_going: bool = False
) -> list[Run]:
    """Run what is not finished yet; a run that had begun goes on from its last checkpoint.

    A run is finished when its process ended with 0; this is written into its folder, together with
    its overrides. When the first three all fail for the same reason, the others are started only
    to ``keep_going``. As many ``jobs`` run at once; with 0, as many as there are GPUs for, or one a
    core without a GPU. Those that failed are returned.

    Raises:
        ValueError: if another process runs this sweep, or a run's folder holds other overrides.
        Interrupted: if a signal stopped it, the runs with it.
    """
    jobs = jobs or (torch.cuda.device_count() or joblib.cpu_count()) // num_gpus
    with locked(output):
        waiting = unfinished_tasks(plan, num_gpus)
        done = len(plan.runs) - len(waiting)
        with tqdm(total=len(plan.runs), initial=done, unit="run", smoothing=0) as bar:
            slots = max(1, min(jobs, len(waiting)))
            return _Workers(waiting, slots, num_gpus, keep_going, bar).work()


def unfinished_tasks(plan: Plan, num_gpus: int) -> list[Task]:
    """Return the runs that are to do, each on so many GPUs, or CPU processes.

    Raises:
        ValueError: if a run's folder holds other overrides.
    """
    tasks = [Task(plan, run, num_gpus) for run in plan.runs]
    for task in tasks:
        task.refuse_another()
    return [task for task in tasks if not is_finished(task.run)]


def describe(plan: Plan, num_gpus: int) -> str:
    """Return the command line of each run that is not finished, one a line."""
    lines = [shlex.join(task.command) for task in unfinished_tasks(plan, num_gpus)]
    return "\n".join([*lines, f"{len(lines)} of {len(plan.runs)} runs are to do."])


@dataclass
class _Workers:
    """Slots that are kept busy with tasks until none waits; none is left behind."""

    waiting: list[Task]
    slots: int
    num_gpus: int
    keep_going: bool
    bar: tqdm
    running: dict[int, Task] = field(default_factory=dict)  # slot → its task
    failed: list[Task] = field(default_factory=list)
    succeeded: int = 0

    def work(self) -> list[Run]:
        """Run the tasks; return those that failed."""
        signals: list[int] = []
        with stop_signals_to(lambda number, _: signals.append(number)):
            try:
                while not signals and (self.running or (self.waiting and not self._hopeless())):
                    self._start()
                    time.sleep(POLL_S)
                    self._gather()
            finally:
                stop(self.running.values(), at_once=lambda: len(signals) > 1)
        if signals:
            self.bar.write(
                f"Stopped by a signal: {len(self.running)} runs were stopped, {len(self.waiting)} "
                "were not started. The same command goes on from there."
            )
            raise Interrupted
        if self.waiting:
            self.bar.write(
                f"{len(self.waiting)} runs were not started, for the first {len(self.failed)} "
                "failed for the same reason. --keep-going starts them all the same."
            )
        return [task.run for task in self.failed]

    def _start(self) -> None:
        for slot in range(self.slots):
            if self.waiting and slot not in self.running and not self._hopeless():
                task = self.running[slot] = self.waiting.pop(0)
                task.start(_environment(slot, self.slots, self.num_gpus))
                self.bar.write(f"{task.run.name}: started ({task.log})")

    def _gather(self) -> None:
        ended = [slot for slot, task in self.running.items() if task.process.poll() is not None]
        for task in map(self.running.pop, ended):
            seconds = f"after {time.time() - task.start_time:.0f} s"
            if task.end():
                self.succeeded += 1
                text = f"{task.run.name}: finished {seconds}"
            else:
                code = task.process.returncode
                text = f"{task.run.name}: FAILED with {code} {seconds} ({task.log})"
                if task.reason() not in (other.reason() for other in self.failed):
                    lines = task.last_lines(_SHOWN_LINES)
                    text = "\n    ".join([f"{text}; its last lines:", *lines])
                self.failed.append(task)
            self.bar.write(text)
            self.bar.update()

    def _hopeless(self) -> bool:
        reasons = {task.reason() for task in self.failed}
        alike = len(self.failed) >= _ALIKE and len(reasons) == 1
        return alike and not self.succeeded and not self.keep_going


def _environment(slot: int, jobs: int, num_gpus: int) -> dict[str, str]:
    """Give each run its share of the cores, or its GPUs."""
    environment = dict(os.environ)
    if torch.cuda.is_available():
        visible = environment.get("CUDA_VISIBLE_DEVICES", "")
        devices = visible.split(",") if visible else map(str, range(torch.cuda.device_count()))
        mine = list(devices)[slot * num_gpus : (slot + 1) * num_gpus]
        return {**environment, "CUDA_VISIBLE_DEVICES": ",".join(mine)}
    threads = max(1, joblib.cpu_count() // (jobs * num_gpus))
    return {"OMP_NUM_THREADS": str(threads), **environment}


@contextmanager
def locked(output: str) -> Iterator[Any]:
    """Keep a second process from running the sweep in ``output``; ends with the process.

    Raises:
        ValueError: if another process works in it.
    """
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
