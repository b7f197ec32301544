"""One run of a sweep as a process: its command, its record, how it is stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from gn_practical.atomic import write_json
from gn_practical.training.processes import end_with_parent
from gn_practical.training.sweep.plan import Plan, Run

POLL_S = 0.2
_RECORD = "run.json"
_SAVE_S = 60  # seconds that a run has to save when it is stopped


class Task:
    """A run and its process; what it prints is in ``console.log``, how it ended in ``run.json``.

    Calling it starts the process and waits for it: so a cluster's job does. A task that has not
    been started can be pickled. ``num_gpus`` are GPUs, or CPU processes, of the run.
    """

    def __init__(self, plan: Plan, run: Run, num_gpus: int) -> None:
        self.arguments = plan, run, num_gpus
        self.run = run
        self.log = os.path.join(run.folder, "console.log")
        self.identity = {"tool": plan.tool, "config": plan.config, "overrides": list(run.overrides)}
        self.command = [
            *(sys.executable, plan.tool),
            *("--config-file", plan.config, "--resume", "--num-gpus", str(num_gpus)),
            *(*run.overrides, "SEED", str(run.seed), "OUTPUT_DIR", run.folder),
        ]

    def refuse_another(self) -> None:
        """Refuse to mix two different runs in one folder.

        Raises:
            ValueError: if the folder holds a run of another tool, config or other overrides.
        """
        record = read_record(self.run)
        found = {key: record.get(key) for key in self.identity}
        if record and found != self.identity:
            raise ValueError(
                f"{self.run.folder} must hold the same run, got one with {found} where "
                f"{self.identity} is asked for. Choose another --output, or remove that folder."
            )

    def start(self, environment: dict[str, str] | None = None) -> None:
        """Start the process, in this one's environment if it is None; it ends with this one."""
        os.makedirs(self.run.folder, exist_ok=True)
        self.before, self.start_time = read_record(self.run).get("seconds", 0.0), time.time()
        self._write_record(finished=False)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=_prepare,
                start_new_session=True,  # Ctrl-C reaches it through stop() alone
            )

    def end(self) -> bool:
        """Record how the process ended; return whether it ended well."""
        good = self.process.returncode == 0
        self._write_record(good)
        return good

    def __call__(self) -> int:
        """Run to the end, and return the exit code."""
        self.start()
        while self.process.poll() is None:
            time.sleep(POLL_S)
        self.end()
        return self.process.returncode

    def checkpoint(self) -> Any:
        """Stop and return what goes on from there, when submitit says that the time is up."""
        from submitit.helpers import DelayedSubmission

        stop([self])
        return DelayedSubmission(Task(*self.arguments))

    def last_lines(self, number: int) -> list[str]:
        """Return the last lines that the run printed, without empty ones."""
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return [line.rstrip() for line in log if line.strip()][-number:]

    def reason(self) -> str:
        """Return the exit code and the last line, alike for runs that failed alike."""
        last = "".join(self.last_lines(1)).replace(self.run.folder, "")
        return f"{self.process.returncode}: {re.sub(r'0x[0-9a-f]+|[0-9]+', '0', last)}"

    def _write_record(self, finished: bool) -> None:
        seconds = round(self.before + time.time() - self.start_time, 1)
        record = {**self.identity, "finished": finished, "seconds": seconds}
        write_json(os.path.join(self.run.folder, _RECORD), record, indent=1)


def stop(tasks: Collection[Task], at_once: Callable[[], bool] = lambda: False) -> None:
    """Ask tasks that run to save and leave; kill those that have not in time, or ``at_once``."""
    for task in tasks:  # once: a second signal would end them
        task.process.terminate()
    end = time.monotonic() + _SAVE_S
    # Not by wait(): a cluster's signal may have interrupted a poll(), whose lock it waits for.
    while any(task.process.poll() is None for task in tasks) and time.monotonic() < end:
        if at_once():
            break
        time.sleep(POLL_S)
    for task in tasks:
        task.process.kill()
        task.end()


def read_record(run: Run) -> dict[str, Any]:
    """Return a run's overrides, seconds, and whether it is finished; nothing if it never began."""
    try:
        return json.loads(Path(run.folder, _RECORD).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}


def is_finished(run: Run) -> bool:
    """Return whether the run ended well."""
    return read_record(run).get("finished", False)


def _prepare() -> None:
    """In the new process: end when the sweep is killed; the next sweep starts the run again."""
    end_with_parent()
    # submitit's signal, which may reach all processes of a job: the task passes it on as SIGTERM.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
