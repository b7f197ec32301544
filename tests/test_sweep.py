"""Sweeps: the plan, runs that are killed and taken up again, the table and the pictures."""

import importlib.util
import json
import math
import multiprocessing
import os
import pickle
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from gn_practical.training.engine.signals import EXIT_INTERRUPTED
from gn_practical.training.sweep import read_plan, report, run_all, runner, summarize
from gn_practical.training.sweep.cluster import _minutes, submit_all
from gn_practical.training.sweep.summary import holm
from gn_practical.training.sweep.task import Task, is_finished

SWEEP_FILES = sorted(
    [*Path("configs/sweeps").glob("*.yaml"), *Path("projects").glob("*/configs/sweeps/*.yaml")]
)

# A tool that keeps its progress in a file, as training keeps checkpoints, and whose result is a
# function of its overrides and of every step being done once.
STAND_IN = """
import json, os, sys, time
words = sys.argv[sys.argv.index("--num-gpus") + 2:]
cfg = dict(zip(words[::2], words[1::2]))
folder, groups, seed = cfg["OUTPUT_DIR"], float(cfg["G"]), float(cfg["SEED"])
if str(int(groups)) in cfg.get("FAIL", "").split():
    sys.exit(f"{folder}: this one fails at step {seed}" + cfg.get("ADD", "") * int(groups))
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
        "pictures": [{"x": "groups", "y": "bbox/AP"}],
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
        ({"labels": {"batch": "images"}}, "a label must name an axis of"),
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


def test_holm_s_correction():
    # R: p.adjust(c(0.01, 0.02, 0.03, 0.5), "holm")
    assert holm([0.02, 0.01, 0.5, 0.03]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    corrected = holm([math.nan, 0.4, 0.9])
    assert math.isnan(corrected[0])
    assert corrected[1:] == pytest.approx([0.8, 0.9])


def test_table_of_means_spreads_and_paired_differences(sweep):
    plan = plan_of(sweep)
    assert run_all(plan, str(sweep / "out"), jobs=4) == []
    text = report(plan, str(sweep / "out"))
    first, _, third, _ = summarize(plan)
    # AP = 10 G + seed + 0.1 G seed, by hand
    assert first["metrics"]["bbox/AP"]["by_seed"] == pytest.approx({1: 11.1, 2: 12.2})
    assert first["metrics"]["bbox/AP"]["std"] == pytest.approx(1.1 / 2**0.5)
    cell = third["metrics"]["bbox/AP"]
    assert cell["difference"] == pytest.approx(30.45)
    assert cell["difference_std"] == pytest.approx(0.3 / 2**0.5)
    # t = 30.45 / 0.15 = 203 with one degree of freedom: p = 1 - 2 atan(203) / pi
    assert cell["p_value"] == pytest.approx(0.0031360, rel=1e-3)
    assert cell["difference_interval"] == pytest.approx(12.706 * 0.3 / 2, rel=1e-3)
    # the last twentieth: the last step
    assert first["metrics"]["train_loss"]["by_seed"][2] == 1 + 2 + 9
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
    failing = plan_of(sweep, overrides={"FAIL": "4"})
    failed = run_all(failing, output, jobs=4)
    assert [run.setting["groups"] for run in failed] == ["4"] * 4
    assert "4 of 8 runs finished" in report(failing, output)
    assert "this one fails" in (Path(failed[0].folder) / "console.log").read_text()
    run_all(failing, output, jobs=4)
    for run in failing.runs:
        starts = Path(run.folder) / "starts"
        assert not starts.exists() if run in failed else starts.read_text() == "0\n"


def test_a_sweep_whose_runs_all_fail_alike_stops_and_says_why(sweep, capsys):
    output = str(sweep / "out")
    plan = plan_of(sweep, overrides={"FAIL": "1 4"})
    failed = run_all(plan, output, jobs=1)
    shown = capsys.readouterr().out
    assert [run.setting for run in failed] == [run.setting for run in plan.runs[:3]]
    assert shown.count("its last lines:") == 1
    assert shown.count("this one fails at step 1") == 1
    assert "5 runs were not started, for the first 3 failed for the same reason" in shown
    assert report(plan, output) == "No table: none of 8 runs is finished."
    assert not list((sweep / "out").glob("*.png"))
    assert len(run_all(plan, output, jobs=4, keep_going=True)) == 8


def test_runs_that_fail_for_different_reasons_do_not_stop_it(sweep):
    plan = plan_of(sweep, overrides={"FAIL": "1 4", "ADD": "!"})
    assert len(run_all(plan, str(sweep / "out"), jobs=1)) == 8


def test_some_settings_alone(sweep):
    plan = plan_of(sweep)
    chosen = plan.only(["groups=4", "rate=low"])
    assert [run.name for run in chosen.runs] == [f"groups 4, rate low, seed {s}" for s in (1, 2)]
    assert len(plan.only(["groups=4", "groups=1"]).runs) == len(plan.only([]).runs) == 8
    for word, text in (
        ("group=4", "--only must name an axis of .*'groups', 'rate'.*got group"),
        ("groups=2", "--only must be a label of axis groups, .*'1', '4'.*got 2"),
        ("groups", "got $|got ."),
    ):
        with pytest.raises(ValueError, match=text):
            plan.only([word])


def tool():
    spec = importlib.util.spec_from_file_location("sweep_tool", "tools/sweep.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_seeds_that_are_no_numbers_are_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--sweep-file", "a.yaml", "--seeds", "1,x"])
    with pytest.raises(SystemExit):
        tool().parse_args()
    assert "argument --seeds: must be numbers as 1,2,3, got '1,x'" in capsys.readouterr().err


def test_packages_that_are_missing_are_told(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("gn_practical.training.sweep")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--sweep-file", "a.yaml"])
    with pytest.raises(SystemExit, match=r"got no scipy\. pip install .*experiments"):
        tool().main()


def in_another_process(plan, output, **options):
    """Start ``run_all`` in a process; return when two runs are finished and two are running."""
    process = multiprocessing.get_context("fork").Process(
        target=run_all, args=(plan, output), kwargs=options
    )
    process.start()
    while sum(map(is_finished, plan.runs)) < 2 or len(list(Path(output).rglob("starts"))) < 4:
        time.sleep(0.02)
        assert process.is_alive()
    return process


def test_a_signal_stops_it_with_one_sentence(sweep, capfd):
    output = str(sweep / "out")
    plan = plan_of(sweep)
    process = in_another_process(plan, output, jobs=2)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    shown = "".join(capfd.readouterr())
    assert process.exitcode == EXIT_INTERRUPTED
    assert "runs were stopped" in shown
    assert "The same command goes on from there" in shown
    assert "Traceback" not in shown
    records = [json.loads(path.read_text()) for path in Path(output).glob("runs/*/*/*/run.json")]
    assert 2 <= sum(record["finished"] for record in records) < 8


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
    expected = [repr(row["metrics"]) for row in summarize(straight)]  # of NaN too

    output = str(sweep / "killed")
    killed = read_plan(str(sweep / "sweep.yaml"), output)
    process = in_another_process(killed, output, jobs=2)
    process.kill()
    process.join()
    time.sleep(0.2)
    begun = [path.read_text() for path in Path(output).glob("runs/*/*/*/metrics.json")]
    time.sleep(0.3)
    after = [path.read_text() for path in Path(output).glob("runs/*/*/*/metrics.json")]
    assert after == begun, "its runs must end with it"
    assert 2 <= sum(map(is_finished, killed.runs)) < 8

    run_all(killed, output, jobs=4)
    assert [repr(row["metrics"]) for row in summarize(killed)] == expected


def test_two_processes_do_not_work_in_one_folder(sweep):
    plan = plan_of(sweep)
    with (
        runner.locked(str(sweep / "out")),
        pytest.raises(ValueError, match="a sweep must run once at a time"),
    ):
        run_all(plan, str(sweep / "out"))


# Clusters ----------------------------------------------------------------------------------------


def test_the_jobs_of_submitit_end_with_the_results_of_a_sweep(sweep):
    plan = plan_of(sweep, seeds=[1]).only(["groups=4", "rate=low"])
    submit = {"output": str(sweep / "out"), "cluster": "local", "num_gpus": 0, "wait": True}
    assert submit_all(plan, **submit) == []
    assert summarize(plan)[0]["metrics"]["bbox/AP"]["by_seed"] == pytest.approx({1: 41.4})
    assert submit_all(plan, **submit) == []
    assert Path(plan.runs[0].folder, "starts").read_text() == "0\n", "finished runs are left alone"


def test_a_job_that_is_out_of_time_saves_and_goes_on_when_it_comes_back(sweep):
    plan = plan_of(sweep, seeds=[1])
    run, starts = plan.runs[0], Path(plan.runs[0].folder, "starts")
    first = Task(plan, run, 1)
    first.start()
    while not Path(run.folder, "metrics.json").exists():
        time.sleep(0.01)
    again = pickle.loads(pickle.dumps(first.checkpoint().function))
    assert first.process.poll() == -signal.SIGTERM
    assert not is_finished(run)
    assert again() == 0
    assert is_finished(run)
    assert [int(line) > 0 for line in starts.read_text().splitlines()] == [False, True]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """SLURM's commands, which note what they are asked; all jobs wait in the queue."""
    commands = {
        "sbatch": 'cp "$1" "$FAKE/script-$(ls "$FAKE" | wc -l)"; echo "Submitted batch job 7"',
        "srun": "exit 1",
        "sacct": 'printf "JobID|State|NodeList\\n7|PENDING|\\n"',
    }
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    (tmp_path / "asked").mkdir()
    monkeypatch.setenv("FAKE", str(tmp_path / "asked"))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path / "asked"


def test_jobs_of_slurm_have_the_options_of_sbatch_and_are_submitted_once(sweep, slurm, capsys):
    plan = plan_of(sweep, seeds=[1])
    options = ["partition=gpu", "time=1-02:30:00", "--cpus-per-task=10", "account=me"]
    assert submit_all(plan, str(sweep / "out"), num_gpus=2, options=options) == []
    scripts = [path.read_text().splitlines() for path in slurm.iterdir()]
    assert len(scripts) == 4
    directives = {line for line in scripts[0] if line.startswith("#SBATCH")}
    assert {
        "#SBATCH --partition=gpu",
        "#SBATCH --time=1590",
        "#SBATCH --cpus-per-task=10",
        "#SBATCH --account=me",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --requeue",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --job-name=sweep",
    } <= directives
    assert len([line for line in directives if "cpus-per-task" in line]) == 1
    assert any(line.startswith("srun ") and sys.executable in line for line in scripts[0])
    submit_all(plan, str(sweep / "out"), num_gpus=2, options=options)
    assert capsys.readouterr().out.count("is in the queue as job 7") == 4
    assert len(list(slurm.iterdir())) == 4


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [("90", 90), ("90:30", 90), ("2:30:00", 150), ("1-0", 1440), ("1-2:3", 1563), ("0-0:7:0", 7)],
)
def test_time_limits_of_sbatch(limit, minutes):
    assert _minutes(limit) == minutes


def test_a_cluster_that_cannot_be_used_is_told(sweep):
    plan = plan_of(sweep)
    with pytest.raises(ValueError, match="--executor slurm must find SLURM's commands"):
        submit_all(plan, str(sweep / "out"))
    for option in ("partition", "time=soon"):
        with pytest.raises(ValueError, match=r"--slurm .*must be .*got (partition|soon)"):
            submit_all(plan, str(sweep / "out"), "local", options=[option])
