"""The report of a GPU in its dry form: all sections, and what becomes of those that fail."""

import json
import os
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import gn_practical.training  # noqa: F401 -- before the processes that are forked here

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
gpu_report = import_module("gpu_report")
GOALS, Goal = (getattr(import_module("gpu_parts.goals"), name) for name in ("GOALS", "Goal"))
SECTIONS, Section, Settings = gpu_report.SECTIONS, gpu_report.Section, gpu_report.Settings

LEFT_OUT = {"float32", "bfloat16", "float16"}  # of PFPN's precisions: the dry form runs the last
PLANTED = {
    "fails": "record.value('repeats', 0)\n    raise RuntimeError('CUDA error: planted')",
    "crashes": "import os\n    os.abort()",
    "hangs": "record.note('Got so far.')\n    import time\n    time.sleep(60)",
    "leaves": "record.note('Did it.')",
}


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The folder of a whole report, made by the command of the documentation."""
    folder = tmp_path_factory.mktemp("report") / "gpu-report"
    command = [sys.executable, "benchmarks/gpu_report.py", "--dry", "--output", str(folder)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Runs sections that end in other ways than they should, and returns the report."""
    monkeypatch.syspath_prepend(tmp_path)

    def run(*names, limit=20, budget=60):
        for name in names:
            body = f"def run(settings, record):\n    {PLANTED[name]}\n"
            (tmp_path / f"planted_{name}.py").write_text(body)
        sections = [Section(name, name.title(), limit, module=f"planted_{name}") for name in names]
        settings = Settings(True, False, tmp_path / "report", tmp_path / "scratch")
        settings.output.mkdir()
        settings.scratch.mkdir()
        gpu_report.run_all(sections, list(names), settings, budget, "Planted.")
        text = (settings.output / "report.md").read_text()
        found = json.loads((settings.output / "report.json").read_text())["sections"]
        return {part["name"]: part for part in found}, text

    return run


def test_every_section_of_the_dry_form_is_done(dry):
    report = json.loads((dry / "report.json").read_text())
    ended = {part["name"]: part["status"] for part in report["sections"]}
    assert ended == {section.name: "done" for section in SECTIONS}
    assert report["failed"] == []
    text = (dry / "report.md").read_text()
    assert [s.title for s in SECTIONS if f"## {s.title}\n" not in text] == []
    assert [goal.text for goal in GOALS if f"| {goal.text} " not in text] == []
    pictures = {name for part in report["sections"] for name in part["pictures"]}
    assert {p.name for p in dry.iterdir()} == {"report.json", "report.md", *pictures}
    assert pictures


def test_a_goal_is_not_run_only_where_a_device_is_needed(dry):
    goals = json.loads((dry / "report.json").read_text())["goals"]
    assert [goal["key"] for goal in goals] == [goal.key for goal in GOALS]
    for goal in goals:
        if goal["needs"]:
            assert goal["verdict"] == "not run"
            assert goal["reason"] == f"needs {goal['needs']}"
        else:
            assert goal["verdict"] == "holds", goal
        # What computes it has run all the same.
        precision = " ".join(goal["key"].split()[2:])
        assert goal["value"] is not None or precision in LEFT_OUT, goal


def test_a_report_names_no_place(dry):
    for name in ("report.json", "report.md"):
        text = (dry / name).read_text()
        assert str(ROOT) not in text
        assert str(dry.parent) not in text
        assert sys.prefix not in text
        assert len(socket.gethostname()) <= 3 or socket.gethostname() not in text


def test_what_fails_is_said_and_spoils_nothing(planted):
    found, text = planted("fails", "crashes", "leaves")
    assert found["fails"]["status"] == "failed: RuntimeError: CUDA error: planted"
    assert any("planted_fails.py" in line for line in found["fails"]["last_lines"])
    assert found["fails"]["values"] == {"repeats": 0}  # what it had found before
    assert found["crashes"]["status"] == "failed: ended by SIGABRT"
    assert found["leaves"]["status"] == "done"
    assert "Did it." in text
    assert "Failed sections: fails, crashes." in text


def test_what_hangs_is_stopped_and_says_where(planted):
    found, text = planted("hangs", limit=3)
    assert found["hangs"]["status"] == "failed: stopped at its limit of 3 s"
    assert any("planted_hangs.py" in line for line in found["hangs"]["last_lines"])
    assert "Got so far." in text


def test_the_budget_ends_the_report(planted):
    found, _ = planted("leaves", budget=1)
    assert found["leaves"]["status"] == "not run: the time of the report was used up"


def test_what_was_found_before_ctrl_c_is_kept(planted, monkeypatch, tmp_path):
    def interrupted(section, *_):
        if section.name == "fails":
            raise KeyboardInterrupt
        return run_section(section, *_)

    run_section = gpu_report.run_section
    monkeypatch.setattr(gpu_report, "run_section", interrupted)
    with pytest.raises(KeyboardInterrupt):
        planted("leaves", "fails", "hangs")
    text = (tmp_path / "report/report.md").read_text()
    assert "Did it." in text
    assert "`fails`: not run: stopped by the user" in text
    assert "`hangs`: not run: its turn has not come" in text


@pytest.mark.parametrize(
    ("found", "got"),
    [
        ({"status": "done", "seconds": 1.0, "data": {"device": None}}, "none"),
        ({"status": "failed: no torch", "seconds": 1.0}, "failed: no torch"),
    ],
)
def test_a_machine_without_a_gpu_is_told_at_once(tmp_path, monkeypatch, found, got):
    monkeypatch.setattr(gpu_report, "run_section", lambda *_: found)
    settings = Settings(False, False, tmp_path, tmp_path)
    with pytest.raises(SystemExit, match=f"must have a CUDA device that PyTorch sees, got {got}"):
        gpu_report.run_all(SECTIONS, ["environment", "amp"], settings, 60, "")


def test_an_earlier_report_is_moved_aside(tmp_path):
    for number in (1, 2):
        (tmp_path / "report.md").write_text(str(number))
        gpu_report.keep_earlier(tmp_path)
        assert (tmp_path / f"earlier-{number}/report.md").read_text() == str(number)
    assert not (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    ("goal", "value", "verdict"),
    [
        (Goal("k", "s", "t", 0.4), 0.404, "holds"),  # compared as the goal is given
        (Goal("k", "s", "t", 0.4), 0.406, "falls short"),
        (Goal("k", "s", "t", 4, at_least=True), 3.9, "falls short"),
        (Goal("k", "s", "t", 4, at_least=True), 4.1, "holds"),
        (Goal("k", "s", "t", None), 4.1, "no goal"),
        (Goal("k", "s", "t", 0), None, "not run"),
        (Goal("k", "s", "t", 0), "out of memory", "not run"),
    ],
)
def test_verdicts(goal, value, verdict):
    judged = goal.judge(value, "failed: a reason", dry=False)
    assert judged["verdict"] == verdict
    if verdict == "not run":
        assert judged["reason"] == (value or "failed: a reason")


class Logged:
    """Stands for CUDA's events and a buffer; writes down what is called."""

    log: ClassVar[list[str]] = []

    def __init__(self, *_, **__):
        pass

    def __getattr__(self, name):
        return lambda *_: Logged.log.append(name) or 3.0


def test_cuda_is_timed_by_its_events_behind_a_cold_cache(monkeypatch):
    clock = import_module("clock")
    monkeypatch.setattr(torch.cuda, "Event", Logged)
    monkeypatch.setattr(torch, "empty", Logged)
    Logged.log.clear()
    seconds = clock.Timer("cuda")(lambda: Logged.log.append("call"))
    assert seconds == 0.003  # of milliseconds
    writes = ["zero_"] * clock.WRITES
    assert Logged.log == [*writes, "record", "call", "record", "synchronize", "elapsed_time"]


def test_memory_of_cuda_is_counted_above_what_lived_before(monkeypatch):
    allocated, calls = [100], []
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated[-1])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: max(allocated))
    with import_module("live_bytes").AllocatorBytes() as live:
        allocated += [180, 130]
        assert live.now() == 30
    assert live.peak == 80
    assert calls == ["synchronize", "reset_peak_memory_stats", "synchronize"]


def test_device_and_driver_are_named(monkeypatch, tmp_path):
    environment = import_module("gpu_parts.environment")
    properties = SimpleNamespace(
        name="A GPU", major=9, minor=0, multi_processor_count=132, total_memory=2**30
    )
    assert vars(properties).keys() <= set(dir(torch._C._CudaDeviceProperties))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**29, 2**30))
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 570.1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    known = environment.device(found=True)
    assert known["compute capability"] == "9.0"
    assert known["free at the start"] == "0.5 GiB"
    assert known["driver version"] == "570.1"


@pytest.mark.parametrize(("factor", "is_wrong"), [(1.0, False), (1.0001, True)])
def test_a_wrong_kernel_is_found(monkeypatch, factor, is_wrong):
    agreement = import_module("gpu_parts.agreement")
    right = agreement.fused_group_norm
    monkeypatch.setattr(agreement, "fused_group_norm", lambda *args: right(*args) * factor)
    case = agreement.Case((2, 8, 5, 6), 4, "float32", False, True, True)
    assert (agreement.error_of(case, "cpu") > 1) == is_wrong


def test_what_does_not_repeat_is_found(monkeypatch):
    agreement = import_module("gpu_parts.agreement")
    case = agreement.Case((2, 8, 5, 6), 4, "float32", False, True, False)
    assert agreement.changes(case, "cpu") == 0
    right, factors = agreement.fused_group_norm, iter((1.0, 1.5))
    monkeypatch.setattr(agreement, "fused_group_norm", lambda *args: right(*args) * next(factors))
    assert agreement.changes(case, "cpu") == 4  # output and three gradients


def test_states_that_differ_are_named():
    differences = import_module("gpu_parts.resume").differences
    first = {"model": {"w": torch.ones(2)}, "steps": [1, {"rate": 0.1}], "gone": None}
    second = {"model": {"w": torch.tensor([1, 1 + 1e-6])}, "steps": [1, {"rate": 0.2}]}
    assert differences(first, first) == []
    assert differences(first, second) == ["/model/w", "/steps/1/rate", "/gone"]


def test_places_are_left_out_and_addresses_are_not():
    without_places = import_module("gpu_parts.record").without_places
    text = 'File "/data/a b/x/y.py", https://host/a/b, 1/2, ours / theirs'
    assert without_places([text]) == ['File "…/y.py", https://host/a/b, 1/2, ours / theirs']
