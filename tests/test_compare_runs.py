"""The page that compares runs, read as text and by a browser."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from bokeh.resources import Resources
from PIL import Image
from scipy import stats

from gn_practical.training.comparison import compare_runs
from gn_practical.training.comparison.charts import MOST_POINTS, extremes
from gn_practical.training.comparison.differences import difference, group_rows, mean_of
from gn_practical.training.comparison.finding import find_runs
from gn_practical.training.comparison.runs import read_run
from gn_practical.training.comparison.settings import group_by_seed
from gn_practical.training.comparison.tables import class_tables, final_tables
from gn_practical.training.evaluation.panels import side_by_side

TOOL = Path(__file__).parents[1] / "tools/compare_runs.py"
BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
ODD = "</script><b>\"Ångström\" & 'co'"


def make_run(folder, *, seed=1, groups=32, pq=50.0, steps=10, iterations=None, **classes):
    """Write what a run of the trainer leaves: config, metrics, results, groups, pictures, log."""
    folder.mkdir(parents=True)
    config = {"SEED": seed, "OUTPUT_DIR": str(folder), "SOLVER": {"MAX_ITER": steps}}
    config["MODEL"] = {"PGN": {"NUM_GROUPS": groups}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with open(folder / "metrics.json", "w") as file:
        for i in range(iterations or steps):
            row = {"iteration": i, "total_loss": 2.0 - i / steps, "lr": 0.1, "time": 0.5}
            if i == steps - 1:
                row |= {"panoptic_seg/PQ": pq}
            file.write(json.dumps(row) + "\n")
    names = {"PQ-cat": pq + 1, "PQ-dog": pq - 1, **classes}
    (folder / "results.json").write_text(json.dumps({"panoptic_seg": {"PQ": pq, **names}}))
    norms = [{"norm": f"layer{i}.norm", "num_groups": groups} for i in range(3)]
    (folder / "num_groups.json").write_text(json.dumps(norms))
    (folder / "log.txt").write_text("PyTorch      2.7.0 @/somewhere/torch\nmax_mem: 512M\n")
    (folder / "pictures").mkdir()
    panels = [np.full((40, 60, 3), value, np.uint8) for value in (groups, 200)]
    Image.fromarray(side_by_side(panels, ["prediction", "ground truth"])).save(
        folder / "pictures/000001.png"
    )
    return folder


@pytest.fixture
def sweep(tmp_path):
    for groups, gain in ((32, 0.0), (1, 2.0)):
        for seed in (1, 2, 3):
            make_run(
                tmp_path / f"out/groups-{groups}/seed-{seed}",
                seed=seed, groups=groups, pq=50 + seed + gain + 0.1 * gain * seed,
            )  # fmt: skip
    return tmp_path / "out"


def settings_of(*folders):
    return group_by_seed([read_run(n, f) for n, f in find_runs(list(map(str, folders))).items()])


def test_runs_of_one_setting_are_taken_together_and_compared_in_pairs(sweep):
    settings = settings_of(sweep)
    assert [(s.name, len(s.runs)) for s in settings] == [("groups-1", 3), ("groups-32", 3)]
    ours, other = settings
    found = difference(ours, other, lambda run: run.results["panoptic_seg", "PQ"])
    pairs = [2.2, 2.4, 2.6]
    low, high = stats.t.interval(0.95, 2, np.mean(pairs), stats.sem(pairs))
    assert found.mean == pytest.approx(2.4)
    assert found.interval == pytest.approx((high - low) / 2)
    assert found.how == "paired by 3 seeds"
    table = next(t for t in final_tables(settings, other) if t.title == "panoptic_seg")
    assert table.rows["PQ"][0].value == f"54.40 ± {mean_of([53.2, 54.4, 55.6]).interval:.2f} (3)"
    assert table.rows["PQ"][0].tone == "good"


def test_unequal_seeds_are_compared_by_their_means(tmp_path):
    values = {"a": [50.0, 52.0], "b": [40.0, 44.0, 45.0]}
    for number, (name, of_runs) in enumerate(values.items()):
        for i, pq in enumerate(of_runs):
            seed = 10 * number + i
            make_run(tmp_path / name / f"seed-{seed}", seed=seed, groups=number + 1, pq=pq)
    left, right = settings_of(tmp_path / "a", tmp_path / "b")
    found = difference(left, right, lambda run: run.results["panoptic_seg", "PQ"])
    expected = stats.ttest_ind(*values.values(), equal_var=False).confidence_interval(0.95)
    assert found.mean == pytest.approx(51 - 43)
    assert 2 * found.interval == pytest.approx(expected.high - expected.low)


def test_single_runs_have_no_interval_and_the_largest_class_comes_first(tmp_path):
    first = make_run(tmp_path / "a", pq=50, groups=1)
    second = make_run(tmp_path / "b", pq=51, groups=2, **{"PQ-sky": 9.0, f"PQ-{ODD}": 7.5})
    settings = settings_of(first, second)
    assert math.isnan(difference(*settings, lambda run: run.results["panoptic_seg", "PQ"]).interval)
    (table,) = class_tables(settings, settings[0])
    assert set(table.rows) == {"cat", "dog", "sky", ODD}
    assert table.rows["sky"][0].value == "-"
    runs = [run for setting in settings for run in setting.runs]
    assert group_rows(runs) == {f"layer{i}.norm": [1, 2] for i in range(3)}


def test_the_page_is_whole_and_asks_for_nothing(sweep, tmp_path):
    make_run(tmp_path / "odd <name>", groups=7, **{f"PQ-{ODD}": 1.0})
    page = tmp_path / "new/report.html"
    assert compare_runs([str(sweep), str(tmp_path / "odd <name>")], str(page)) == 7
    text = page.read_text()
    assert len(text) < 5_000_000
    assert "MODEL.PGN.NUM_GROUPS" in text
    assert "&lt;/script&gt;&lt;b&gt;" in text
    library = Resources(mode="inline", components=["bokeh"]).js_raw[0]
    assert library in text
    own = text.replace(library, "")
    assert not re.search(r"(src|href)=\"(?!data:)|@import|url\((?!data:)|https?://(?!www\.w3)", own)
    assert ODD not in own


def test_what_is_broken_is_said_and_no_error(tmp_path):
    stopped = make_run(tmp_path / "stopped", iterations=4)
    with open(stopped / "metrics.json", "a") as file:
        file.write('{"iteration": 4, "total_loss": NaN}\n{"iteration": 5, "tot')
    broken = make_run(tmp_path / "broken")
    (broken / "results.json").write_text("{")
    (broken / "pictures/000001.png").write_bytes(b"no picture")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text("SEED: 1\n")
    page = tmp_path / "report.html"
    assert compare_runs([str(f) for f in (stopped, broken, empty)], str(page)) == 3
    text = page.read_text()
    for note in ("stopped after iteration", "not finite", "results.json cannot be read"):
        assert note in text
    assert "no evaluation" in text


def test_pictures_of_other_annotations_are_not_set_beside_each_other(tmp_path):
    runs = [make_run(tmp_path / name, groups=i + 1) for i, name in enumerate("abc")]
    panels = [np.full((40, 60, 3), value, np.uint8) for value in (3, 100)]
    other = side_by_side(panels, ["prediction", "ground truth"])
    Image.fromarray(other).save(runs[2] / "pictures/000001.png")
    page = tmp_path / "page.html"
    compare_runs([str(run) for run in runs], str(page))
    assert re.findall(r'<figure data-of="(\d)">', page.read_text()) == ["0", "1"]
    compare_runs([str(run) for run in runs[1:]], str(page))
    assert "No two runs have a picture with the same name" in page.read_text()


def test_a_long_curve_keeps_its_spikes():
    values = np.zeros(100_000)
    values[12_345] = 9.0
    x, y = extremes(np.arange(100_000), values)
    assert len(x) <= MOST_POINTS
    assert (y.max(), x[y.argmax()]) == (9.0, 12_345)


def test_bad_input_is_named(tmp_path):
    run, page = make_run(tmp_path / "runs/run"), str(tmp_path / "page.html")
    (tmp_path / "empty").mkdir()
    for folders, options, message in (
        ([tmp_path / "none"], {}, "a run must be a folder, got"),
        ([tmp_path / "empty"], {}, "must be a folder with metrics.json or config.yaml, got"),
        ([run], {"baseline": "best"}, "the baseline must be one of run, got baseline=best"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_runs([str(folder) for folder in folders], page, **options)
    assert not Path(page).exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "page.html"], "error: a run must be a folder, got none"),
        (["--output", "page.txt"], "error: --output must end with .html, got page.txt"),
    ],
)
def test_the_tool_says_so_in_one_line(tmp_path, words, message):
    command = [sys.executable, TOOL, "none", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode in (1, 2)
    assert message in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_draws_every_point(sweep, tmp_path):
    page = tmp_path / "report.html"
    compare_runs([str(sweep)], str(page))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=30000", f"file://{page}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not [line for line in console if re.search("error|exception|refused", line, re.I)]
    assert 'data-ready="true"' in done.stdout
    charts = re.findall(r'<div class="chart" id="([^"]+)"[^>]*?data-title="([^"]+)"', done.stdout)
    points = dict(re.findall(r'id="([^"]+)"[^>]*?data-points="(\d+)"', done.stdout))
    drawn = {title: int(points.get(id, -1)) for id, title in charts}
    assert drawn["total_loss"] == 6 * 10 * 2  # as written, and smoothed
    assert drawn["lr"] == 6 * 10 * 2  # a line, and its points
    assert drawn["panoptic_seg/PQ"] == 6 * 2
    assert drawn["groups per layer"] == 6 * 3
