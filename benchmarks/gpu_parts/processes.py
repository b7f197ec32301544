"""A section in a process of its own, with a time limit; needs no PyTorch itself."""

import faulthandler
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpu_parts.record import Record
from gpu_parts.sections import Section
from gpu_parts.settings import Settings

LAST_LINES = 20
_HANG = "Timeout (0:"  # with which faulthandler begins


def run_section(section: Section, settings: Settings, limit: float) -> dict[str, Any]:
    """Run a section for at most ``limit`` seconds and return what it found, and how it ended.

    Whatever ends it, an error of CUDA, a signal or the limit, what it had recorded is kept. All
    that it started ends with it.

    Returns:
        The content of its :class:`Record` with "status", "seconds" and "last_lines".
    """
    log = settings.scratch / f"{section.name}.log"
    context = multiprocessing.get_context(settings.start_method)
    start = time.monotonic()
    settings = settings._replace(deadline=start + limit)
    process = context.Process(target=_child, args=(section, settings))
    process.start()
    try:
        process.join(limit)
        stopped = process.is_alive()
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # with all that it has left behind
        process.kill()
        process.join()
    if stopped:
        status = f"failed: stopped at its limit of {limit:.0f} s"
    elif process.exitcode:
        status = f"failed: {_reason(process.exitcode, log)}"
    else:
        status = "done"
    found = _found(section, settings)
    lines = _last_lines(log, stopped) if status != "done" else []
    seconds = round(time.monotonic() - start, 1)
    return {**found, "status": status, "seconds": seconds, "last_lines": lines}


def _child(section: Section, settings: Settings) -> None:
    """Run in the new process."""
    os.setsid()  # its own group, which is ended as one
    log = (settings.scratch / f"{section.name}.log").open("a", buffering=1, encoding="utf-8")
    sys.stdout = sys.stderr = log
    for descriptor in (1, 2):  # of what libraries in C write, and of the processes it starts
        os.dup2(log.fileno(), descriptor)
    faulthandler.enable(2)
    faulthandler.dump_traceback_later(max(0.2, settings.left() - 1), file=2)  # where it hangs
    os.chdir(settings.scratch)  # what writes to the present folder writes here
    try:
        from gn_practical.training.processes import end_with_parent

        end_with_parent()
        if settings.dry:
            _interpret(section.interpreted)
        record = Record(settings.scratch / f"{section.name}.json", settings.output)
        importlib.import_module(section.path).run(settings, record)
        code = 0
    except BaseException:  # also SystemExit, with which a run ends on an error
        traceback.print_exc()
        code = 1
    log.flush()
    os._exit(code)  # a context that is broken may hang where Python ends


def _interpret(on: bool) -> None:
    """Let the kernels take tensors of the CPU, or not: models would be slow there."""
    from gn_practical.layers import backends, fused_group_norm

    backends.INTERPRETED = fused_group_norm.INTERPRETED = on


def _found(section: Section, settings: Settings) -> dict[str, Any]:
    empty = Record(settings.scratch / "none", settings.output).content
    with suppress(OSError, ValueError):
        text = (settings.scratch / f"{section.name}.json").read_text(encoding="utf-8")
        return json.loads(text)
    return empty


def _lines(log: Path) -> list[str]:
    with suppress(OSError):
        return [x for x in log.read_text("utf-8", "replace").splitlines() if x.strip()]
    return []


def _reason(code: int, log: Path) -> str:
    if code < 0:
        with suppress(ValueError):
            return f"ended by {signal.Signals(-code).name}"
    return (_lines(log) or [f"exit code {code}"])[-1][:300]


def _last_lines(log: Path, stopped: bool) -> list[str]:
    """Return the end of what it printed; where it hung, the innermost calls first."""
    lines = _lines(log)
    hang = next((i for i, line in enumerate(lines) if line.startswith(_HANG)), None)
    if stopped and hang is not None:
        return lines[hang : hang + LAST_LINES]
    return lines[-LAST_LINES:]
