"""Sweeps: the plan, runs that are killed and taken up again, the table and the pictures."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from gn_practical.training.sweep import read_plan, report, run_all, runner, summarize

SWEEP_FILES = sorted(Path("configs/sweeps").glob("*.yaml"))

# A tool that keeps its progress in a file, as training keeps checkpoints, and whose result is a
# function of its overrides and of every step being done once.
STAND_IN = """
import json, os, sys, time
words = sys.argv[sys.argv.index("--num-gpus") + 2:]
cfg = dict(zip(words[::2], words[1::2]))
folder, groups, seed = cfg["OUTPUT_DIR"], float(cfg["G"]), float(cfg["SEED"])
if groups == float(cfg.get("FAIL", -1)):
    sys.exit("this one fails")
steps = os.path.join(folder, "metrics.json")
done = len(open(steps).readlines()) if os.path.exists(steps) else 0
open(os.path.join(folder, "starts"), "a").write(f"{done}\\n")
for step in range(done, 10):
    time.sleep(0.05)
    with open(steps, "a") as file:
        file.write(json.dumps({"iteration": step, "total_loss": groups + seed + step}) + "\\n")
with open(os.path.join(folder, "results.json"), "w") as file:
    json.dump({"bbox": {"AP": 10 * groups + seed + 0.1 * groups * seed, "AP50": None}}, file)
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A sweep of 2 x 2 settings over 2 seeds, of the stand-in for a tool."""
    (tmp_path / "train_net.py").write_text(STAND_IN)
    (tmp_path / "cfg.yaml").write_text("")
    content = {
        "tool": "train_net.py",
        "config": "cfg.yaml",
        "overrides": {"SOLVER.STEPS": "(3,)"},
        "axes": {
            "groups": {"key": "G", "values": [1, 4]},
            "rate": {"low": {"SOLVER.BASE_LR": 0.1}, "high": {"SOLVER.BASE_LR": 1}},
        },
        "seeds": [1, 2],
        "metrics": ["bbox/AP", "train_loss"],
        "baseline": {"groups": "1"},
        "pictures": [{"x": "groups", "y": "bbox/AP", "lines": "rate"}],
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path


def plan_of(sweep, **changes):
    path = sweep / "sweep.yaml"
    content = {**yaml.safe_load(path.read_text()), **changes}
    path.write_text(
        yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False)
    )
    return read_plan(str(path), str(sweep / "out"))


def test_every_combination_is_a_run_of_its_own(sweep):
    runs = plan_of(sweep).runs
    assert len(runs) == len({run.folder for run in runs}) == 8
    assert runs[0].setting == {"groups": "1", "rate": "low"}
    assert runs[0].overrides == ("SOLVER.STEPS", "(3,)", "G", "1", "SOLVER.BASE_LR", "0.1")
    assert [run.seed for run in runs] == [1] * 4 + [2] * 4


def test_overrides_of_the_command_line_replace_those_of_the_file(sweep):
    plan = read_plan(str(sweep / "sweep.yaml"), "out", ["SOLVER.STEPS", "(9,)"], [5])
    assert {run.overrides[:2] for run in plan.runs} == {("SOLVER.STEPS", "(9,)")}
    assert {run.seed for run in plan.runs} == {5}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"seeds": None}, r"without \['seeds'\]"),
        ({"seed": [1]}, r"unknown \['seed'\]"),
        ({"tool": "train"}, "tool must be a file"),
        ({"config": "nowhere.yaml"}, "config must be a file"),
        ({"axes": {"groups": [1, 2]}}, "an axis must be"),
        ({"baseline": {"group": "1"}}, "baseline must name an axis of"),
        ({"baseline": {"groups": "2"}}, "must be a label of axis groups"),
        ({"pictures": [{"x": "G", "y": "bbox/AP"}]}, "x must name an axis"),
        ({"pictures": [{"x": "groups", "y": "AP"}]}, "y must be one of metrics"),
        ({"pictures": [{"y": "bbox/AP"}]}, "a picture must be"),
        ({"seeds": [1, 1]}, "two runs of one folder"),
        ({"seeds": ["a"]}, "seeds must be numbers"),
    ],
)
def test_a_wrong_file_is_refused_with_the_way_out(sweep, changes, text):
    with pytest.raises(ValueError, match=text):
        plan_of(sweep, **changes)


@pytest.mark.parametrize("path", SWEEP_FILES, ids=lambda path: path.stem)
def test_the_sweeps_of_the_project_can_be_read(path):
    plan = read_plan(str(path), "output")
    assert len(plan.seeds) >= 3
    keys = {key for run in plan.runs for key in run.overrides[::2]}
    assert "OUTPUT_DIR" not in keys
    assert "SEED" not in keys


def test_table_of_means_spreads_and_paired_differences(sweep):
    plan = plan_of(sweep)
    assert run_all(plan, str(sweep / "out"), jobs=4) == []
    text = report(plan, str(sweep / "out"))
    first, _, third, _ = summarize(plan)
    # AP = 10 G + seed + 0.1 G seed, by hand
    assert first.cells["bbox/AP"].by_seed == pytest.approx({1: 11.1, 2: 12.2})
    assert first.cells["bbox/AP"].std == pytest.approx(1.1 / 2**0.5)
    cell = third.cells["bbox/AP"]
    assert cell.difference == pytest.approx(30.45)
    assert cell.difference_std == pytest.approx(0.3 / 2**0.5)
    # t = 30.45 / 0.15 = 203 with one degree of freedom: p = 1 - 2 atan(203) / pi
    assert cell.p_value == pytest.approx(0.0031360, rel=1e-3)
    assert first.cells["train_loss"].by_seed[2] == 1 + 2 + 9  # the last twentieth: the last step
    assert "42.10 ± 0.99 (2)" in text
    assert "8 of 8 runs finished" in text
    lines = (sweep / "out" / "results.csv").read_text().splitlines()
    assert lines[0] == "groups,rate,seed,bbox/AP,train_loss"
    assert len(lines) == 9
    assert json.loads((sweep / "out" / "results.json").read_text())["rows"][0]["metrics"]
    for name in ("curves.png", "bbox_AP_against_groups.png"):
        assert (sweep / "out" / name).read_bytes()[:4] == b"\x89PNG"


def test_a_finished_run_is_never_run_again_and_a_failed_one_is(sweep):
    output = str(sweep / "out")
    failing = plan_of(sweep, overrides={"FAIL": 4})
    failed = run_all(failing, output, jobs=4)
    assert [run.setting["groups"] for run in failed] == ["4"] * 4
    assert "4 of 8 runs finished" in report(failing, output)
    assert "this one fails" in (Path(failed[0].folder) / "console.log").read_text()
    run_all(failing, output, jobs=4)
    for run in failing.runs:
        starts = Path(run.folder) / "starts"
        assert not starts.exists() if run in failed else starts.read_text() == "0\n"


def test_a_folder_with_other_overrides_is_not_mixed_in(sweep):
    run_all(plan_of(sweep, seeds=[1]), str(sweep / "out"), jobs=4)
    other = plan_of(sweep, seeds=[1], overrides={"SOLVER.STEPS": "(5,)"})
    with pytest.raises(ValueError, match="must hold the same run"):
        run_all(other, str(sweep / "out"))


def test_a_metric_that_no_run_has_is_an_error_with_those_there_are(sweep):
    plan = plan_of(sweep, metrics=["bbox/APP"], pictures=[])
    run_all(plan, str(sweep / "out"), jobs=4)
    with pytest.raises(ValueError, match=r"got bbox/APP where .* has bbox/AP, bbox/AP50"):
        summarize(plan)


def test_killed_half_way_and_started_again_it_ends_with_the_same_table(sweep):
    straight = plan_of(sweep)
    run_all(straight, str(sweep / "out"), jobs=4)
    expected = [repr(row.cells) for row in summarize(straight)]  # of NaN too

    script = (
        "import sys; from gn_practical.training.sweep import *;"
        "run_all(read_plan(sys.argv[1] + '/sweep.yaml', sys.argv[2]), sys.argv[2], jobs=2)"
    )
    output = str(sweep / "killed")
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(sweep), output], env=environment, stderr=subprocess.PIPE
    )
    killed = read_plan(str(sweep / "sweep.yaml"), output)
    while sum(map(runner.is_finished, killed.runs)) < 2:
        time.sleep(0.02)
        assert process.poll() is None, process.stderr.read().decode()
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.2)
    begun = [path.read_text() for path in Path(output).glob("runs/*/*/*/metrics.json")]
    time.sleep(0.3)
    after = [path.read_text() for path in Path(output).glob("runs/*/*/*/metrics.json")]
    assert after == begun, "its runs must end with it"
    assert 2 <= sum(map(runner.is_finished, killed.runs)) < 8

    run_all(killed, output, jobs=4)
    assert [repr(row.cells) for row in summarize(killed)] == expected


def test_two_processes_do_not_work_in_one_folder(sweep):
    plan = plan_of(sweep)
    with (
        runner._lock(str(sweep / "out")),
        pytest.raises(ValueError, match="a sweep must run once at a time"),
    ):
        run_all(plan, str(sweep / "out"))
