"""The group table, as a function and as a tool."""

import csv
import io
import json
import runpy
import subprocess
import sys
from math import inf
from pathlib import Path

import pytest
from torch import nn

from gn_practical import PracticalGroupNorm, bind_group_norms
from gn_practical.analysis.group_table import group_table

ROOT = Path(__file__).parent.parent


def block(in_features, out_features, groups=1):
    return nn.Sequential(nn.Linear(in_features, out_features), nn.GroupNorm(groups, out_features))


def test_rows_by_hand():
    (row,) = group_table(block(256, 64))
    assert (row["layer"], row["in"], row["out"], row["G_ideal"]) == ("1", 256, 64, 48)
    # paper: 64 groups of one; n_g = 3 + 64/192 = 3.33, G = 19.2, so 16 groups of four
    assert (row["practical G"], row["practical K"], row["practical K exact"]) == (64, 1.25, None)
    assert (row["exact G"], row["exact K"], row["exact K exact"]) == (16, 0.5, 0.5)
    assert (row["G=32 G"], row["G=32 K"], row["G=32 K exact"]) == (32, 0.75, inf)
    assert row["G=1 K exact"] == pytest.approx(0.25 * 62 / 61)


def test_numbers_that_do_not_divide_are_left_empty():
    (row,) = group_table(block(32, 24, 2), ["32", "model"])
    assert row["G=32 G"] is row["G=32 K"] is row["G=32 K exact"] is None
    assert row["model G"] == 2


def test_instance_norm_and_the_activation_of_the_norm():
    model = nn.Sequential(nn.Linear(64, 32), PracticalGroupNorm(32))
    bind_group_norms(model, gain_ratio=0.75)
    (row,) = group_table(model, ["practical", "instance"])
    assert (row["G_ideal"], row["practical G"], row["practical K"]) == (4, 4, 1)
    assert row["practical K exact"] == pytest.approx(0.5 * 6 / 5 / 0.75)
    assert (row["instance G"], row["instance K exact"]) == (32, None)


def test_errors():
    with pytest.raises(ValueError, match=r"groups must be model, practical.* got groups='instanc'"):
        group_table(block(32, 24), ["instanc"])
    with pytest.raises(ValueError, match="must have group norms, got none in Linear"):
        group_table(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"must follow a weight layer of its channels.*for 0"):
        group_table(nn.Sequential(nn.GroupNorm(2, 4), nn.Linear(4, 4)))


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run the tool in this process: importing Detectron2 anew takes seconds."""

    def run(config, *arguments):
        path = str(ROOT / "tools/group_table.py")
        config = str(ROOT / f"configs/{config}.yaml")
        monkeypatch.setattr(sys, "argv", [path, "--config-file", config, *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(path, run_name="__main__")
        return end.value.code, capsys.readouterr().out

    return run


def test_tool_prints_every_norm_of_resnet_101(tool):
    code, text = tool("pfpn_pgn_all", "--format", "csv", "MODEL.RESNETS.DEPTH", "101")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert code is None
    assert len(rows) == 127
    last = {row["layer"]: row for row in rows}["backbone.bottom_up.res5.2.conv1.norm"]
    assert (last["in"], last["out"], last["practical G"]) == ("2048", "512", "512")


def test_tool_prints_lines_that_fit_into_a_screen(tool):
    _, text = tool("pfpn_pgn_all")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[1].split() == ["layer", "in", "out", "G_ideal", "G", "K", "G", "K", "K", "K"]
    names = [line.split()[0] for line in lines[3:]]
    assert len(set(names)) == len(names) == 76


@pytest.mark.parametrize("name", ["group_table", "audit_isometry"])
def test_help_comes_before_any_heavy_import(name):
    code = f"""
import runpy, sys
sys.argv = ["tool", "--help"]
try:
    runpy.run_path({str(ROOT / "tools" / f"{name}.py")!r}, run_name="__main__")
finally:
    assert not {{"torch", "numpy", "gn_practical"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--groups" in done.stdout


def test_tool_writes_a_file_and_takes_overrides_after_groups(tool, tmp_path):
    path = tmp_path / "groups.json"
    options = ["--format", "json", "--output", str(path), "--groups", "model", "16"]
    assert tool("pfpn_pgn", *options, "MODEL.PGN.NUM_GROUPS", "32") == (None, "")
    rows = json.loads(path.read_text())
    assert {row["model G"] for row in rows} == {32}
    assert {row["G=16 G"] for row in rows} == {16}


def test_tool_ends_with_one_clear_error(tool):
    code, _ = tool("pfpn_pgn", "MODEL.SEM_SEG_HEAD.NORM", "FrozenBN")
    assert code.startswith("error: the model must have group norms, got none in PanopticFPN")
