"""What the log of a run says of the machine, the speed and the memory."""

import os
import re

_ENVIRONMENT = {  # as Detectron2's collect_env calls them → as the page does
    "PyTorch": "PyTorch",
    "detectron2": "Detectron2",
    "Python": "Python",
    "CUDA compiler": "CUDA compiler",
    "cuDNN": "cuDNN",
    "Driver version": "driver",
}
_SPEED = re.compile(r"Overall training speed: .*\((.+?) s / it\)")
_EVALUATION = re.compile(r"Total inference pure compute time: .*\((.+?) s / iter per device")
_MEMORY = re.compile(r"max_mem: (\d+)M")
_MODEL = re.compile(r"^\s+Model\s{2,}(\S.*)$")


def read_machine(log: str) -> dict[str, str]:
    """Read what a log says last: a run that was resumed elsewhere shows where it ended.

    Memory is the largest that any line of the log has. What the log does not say is left out.
    """
    if not os.path.isfile(log):
        return {}
    found: dict[str, str] = {}
    memory = 0
    with open(log, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            found |= _of_line(line.rstrip())
            if match := _MEMORY.search(line):
                memory = max(memory, int(match[1]))
    if memory:
        found["GPU memory, MB"] = str(memory)
    return found


def _of_line(line: str) -> dict[str, str]:
    if match := _SPEED.search(line):
        return {"training, s an iteration": match[1]}
    if match := _EVALUATION.search(line):
        return {"evaluation, s a batch": match[1]}
    if match := _MODEL.match(line):
        return {"model": match[1]}
    key, _, value = line.partition("  ")
    if key in _ENVIRONMENT and value.strip():
        return {_ENVIRONMENT[key]: value.partition("@")[0].strip()}
    if re.fullmatch(r"GPU [\d,]+", key):
        return {key: value.strip()}
    return {}
