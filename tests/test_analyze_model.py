"""Costs of a model, against Detectron2's own counts and by hand; tools/analyze_model.py."""

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2 import modeling
from detectron2.utils.analysis import (
    FlopCountAnalysis,
    activation_count_operators,
    parameter_count,
)
from torch import nn

from gn_practical import build_model
from gn_practical.analysis.cost import (
    Count,
    cost_table,
    keep_most_detections,
    norms_of,
    standardized_weights,
)
from gn_practical.analysis.cost_report import Total, format_costs, norm_lines, omission_lines
from gn_practical.layers import WSConv2d
from gn_practical.layers.baselines import BASELINES
from gn_practical.training.checkpoint import GroupsCheckpointer
from gn_practical.training.config import load_cfg

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "analyze_model.py"
TINY = ROOT / "configs/quickstart/tiny.yaml"
SMALL = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RPN.POST_NMS_TOPK_TEST", "20"]
FEW_BOXES = ["TEST.DETECTIONS_PER_IMAGE", "10"]


def replace_norm(cfg, old, new):
    """Return a copy of a config with other norms everywhere."""
    cfg = cfg.clone()
    cfg.defrost()
    for node in (cfg.MODEL, *cfg.MODEL.values()):
        if isinstance(node, dict) and node.get("NORM") == old:
            node.NORM = new
    return cfg


def image(size=(64, 96)):
    generator = torch.Generator().manual_seed(0)
    return [{"image": torch.rand(3, *size, generator=generator) * 255}]


@pytest.fixture(scope="module")
def pair():
    """PFPN R-50 with 32 groups: Detectron2's own, and ours with fused norms; of equal weights."""
    # Detectron2's count of activations stops at a panoptic output.
    without = ["MODEL.PANOPTIC_FPN.COMBINE.ENABLED", "False"]
    opts = [*SMALL, *FEW_BOXES, *without, "MODEL.PGN.FUSED", "True", "MODEL.PGN.NUM_GROUPS", "32"]
    ours = load_cfg(str(ROOT / "configs/pfpn_pgn_all.yaml"), opts)
    assert ours.MODEL.RESNETS.DEPTH == 50
    torch.manual_seed(0)
    plain = modeling.build_model(replace_norm(ours, "PGN", "GN")).eval()
    fused = build_model(ours).eval()
    keep_most_detections(plain)
    keep_most_detections(fused)
    return plain, fused


def test_a_pfpn_r50_costs_what_detectron2_says(pair):
    plain, fused = pair
    assert any("Fused" in type(m).__name__ for m in fused.modules())
    theirs = FlopCountAnalysis(plain, image())
    theirs.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    count = Count(fused, image(), "flops")
    norms = sum(theirs.by_module()[f"model.{path}"] for path, _ in norms_of(plain))
    assert count.total == theirs.total()
    assert count.of_norms() == norms > 0.001 * count.total
    assert count.norms_without_count() == []
    by_module = theirs.by_module()
    assert all(count.by_module[p] == by_module[f"model.{p}"] for p, _ in plain.named_modules() if p)
    parameters = parameter_count(plain)
    rows = {row.module: row.parameters for row in cost_table(fused)}
    assert rows == {path: n for path, n in parameters.items() if path in rows}


def test_activations_are_those_of_detectron2_and_the_norms(pair):
    plain, fused = pair
    theirs = 1e6 * sum(activation_count_operators(plain, image()).values())
    count = Count(fused, image(), "activations")
    assert count.total - count.of_norms() == pytest.approx(theirs, rel=1e-9)
    sizes = []
    for _, norm in norms_of(fused):
        norm.register_forward_hook(lambda *args: sizes.append(args[2].numel()))
    with torch.no_grad():
        fused(image())
    assert count.of_norms() == sum(sizes) > 0


def test_a_model_of_random_weights_keeps_as_many_boxes_as_it_may():
    opts = ["MODEL.RPN.POST_NMS_TOPK_TEST", "30", "MODEL.RPN.PRE_NMS_TOPK_TEST", "30"]
    cfg = load_cfg(str(TINY), ["MODEL.DEVICE", "cpu", *opts, "TEST.DETECTIONS_PER_IMAGE", "12"])
    model, seen = build_model(cfg).eval(), []
    keep_most_detections(model)
    model.roi_heads.mask_head.register_forward_hook(lambda *args: seen.append(len(args[1][0])))
    model.roi_heads.box_head.register_forward_hook(lambda *args: seen.append(len(args[1][0])))
    with torch.no_grad():
        model(image((64, 64)))
    assert seen == [30, 12]


class Detector(nn.Module):
    """A convolution and what follows it, called as Detectron2 calls a detector."""

    def __init__(self, *after):
        super().__init__()
        self.conv, self.after = nn.Conv2d(3, 8, 1), nn.Sequential(*after)

    def forward(self, inputs):
        return self.after(self.conv(inputs[0]["image"][None]))


@pytest.mark.parametrize("kind", BASELINES)
def test_every_norm_type_counts_five_operations_a_value(kind):
    norm = BASELINES[kind](8)
    count = Count(Detector(norm).eval(), image((10, 12)), "flops")
    values = 8 * 10 * 12
    # SwitchNorm pools statistics of its eight channels beside.
    assert count.of_norms() == pytest.approx(5 * values, rel=0.02)
    assert count.total == count.of_norms() + 3 * values
    activations = Count(Detector(norm).eval(), image((10, 12)), "activations")
    assert activations.of_norms() == pytest.approx(values, rel=0.02)


def test_what_is_not_counted_is_said():
    class Odd(nn.GroupNorm):
        def forward(self, x):
            return x.cumsum(1) * self.weight[:, None, None]

    model = Detector(Odd(2, 8))
    model.unused = nn.Linear(3, 4)
    lines = list(omission_lines(Count(model.eval(), image((10, 12)), "flops")))
    assert len(lines) == 3
    assert "aten::cumsum (1)" in lines[0]
    assert lines[1].startswith("1 modules")
    assert lines[1].endswith(": unused.")
    assert lines[2].startswith("1 norms")
    assert lines[2].endswith(": after.0.")


def test_standardized_weights_are_named_and_cost_nothing_in_evaluation():
    models = [Detector(kind(8, 4, 3, bias=False)).eval() for kind in (WSConv2d, nn.Conv2d)]
    assert [standardized_weights(model) for model in models] == [(1, 288), (0, 0)]
    assert "1 convolutions with 288 weights" in list(norm_lines(models[0]))[-1]
    assert "convolutions" not in "".join(norm_lines(models[1]))
    counts = [Count(model, image((10, 12)), "flops") for model in models]
    assert counts[0].total == counts[1].total == 3 * 8 * 120 + 288 * 80
    assert not any("std_mean" in line for line in omission_lines(counts[0]))


def test_the_table_has_the_mean_of_several_images():
    model = Detector(nn.GroupNorm(2, 8)).eval()
    counts = [Count(model, image(size), "flops") for size in ((10, 10), (10, 30))]
    table = {row.module: row for row in cost_table(model, flops=counts)}
    assert table[""].flops == 8 * 200 * 8
    assert table["after.0"].flops_of_norms == 5 * 200 * 8
    assert str(Total("FLOPs", counts)) == (
        "FLOPs: 12.8 k ± 6.4 k over 2 images, of which norms 8 k (62.50 %); without them 4.8 k."
    )
    text = format_costs(list(table.values()), 2)
    assert "after.0" not in text
    assert "62.5 %" in text
    assert "activations" not in text


# ---- the tool ----


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the tool in this process; return what it prints."""
    spec = importlib.util.spec_from_file_location("analyze_model", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def do(*words):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, words)])
        tool.main()
        return capsys.readouterr().out

    return do


def test_the_tool_counts_without_data(run, tmp_path):
    output = tmp_path / "new" / "costs.csv"
    words = ["--config-file", TINY, "--output", output, "--image-size", "64", "96"]
    printed = run(*words, "--tasks", "parameter", "flop", "MODEL.WS.ENABLED", "True")
    assert "64x96 pixels" in printed
    assert "Weight standardization" in printed
    rows = list(csv.DictReader(output.open()))
    assert rows[0]["kind"] == "PanopticFPN"
    assert float(rows[0]["flops"]) > 1e6
    assert "activations" not in rows[0]


def test_a_checkpoint_alone_is_enough(run, tmp_path):
    cfg = load_cfg(str(TINY), SMALL)
    model = build_model(cfg)
    checkpointer = GroupsCheckpointer(model, str(tmp_path), cfg=cfg)
    checkpointer.save("model_final")
    checkpointer.wait()
    output = tmp_path / "costs.json"
    checkpoint = tmp_path / "model_final.pth"
    run("--checkpoint", checkpoint, "--tasks", "parameter", "--output", output)
    rows = json.loads(output.read_text())
    assert rows[0]["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_python_config_is_run(run, tmp_path):
    lazy = tmp_path / "lazy.py"
    lazy.write_text(
        "from detectron2.config import LazyCall as L\n"
        "from detectron2.layers import Conv2d, get_norm\n"
        "model = L(Conv2d)(in_channels=64, out_channels=8, kernel_size=1, bias=False,\n"
        "                  norm=L(get_norm)(norm='PGN', out_channels=8))\n"
    )
    printed = run("--config-file", lazy, "--tasks", "parameter", "structure", "model.bias=True")
    assert "64 -> 8, num_groups=8" in printed
    assert "Parameters: 536," in printed


def test_a_wrong_input_is_one_line(run, tmp_path):
    with pytest.raises(SystemExit, match=r"^error: the config must be a file of .* does not exist"):
        run("--config-file", tmp_path / "none.yaml", "--tasks", "parameter")
    with pytest.raises(SystemExit, match=r"^error: output must be a file that can be written"):
        run("--config-file", TINY, "--tasks", "parameter", "--output", "/proc/no/costs.csv")


def test_a_model_that_cannot_run_is_one_line(run, tmp_path):
    lazy = tmp_path / "lazy.py"
    lazy.write_text(
        "from detectron2.config import LazyCall as L\n"
        "from torch.nn import Linear\n"
        "model = L(Linear)(in_features=3, out_features=8)\n"
    )
    with pytest.raises(SystemExit, match=r"^error: the model must run on one image"):
        run("--config-file", lazy, "--tasks", "flop")


def test_wrong_arguments_are_answered_before_anything_is_imported():
    cases = [
        (["--tasks", "flops", "--config-file", "a.yaml"], "got ['flops']"),
        (["--tasks", "flop"], "--config-file or --checkpoint"),
        (["--tasks", "flop", "--config-file", "a.yaml", "--output", "a.txt"], ".csv"),
        (["--tasks", "flop", "--config-file", "a.yaml", "-n", "-1"], "at least 1"),
    ]
    for words, expected in cases:
        command = [sys.executable, "-X", "importtime", str(TOOL), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert expected in done.stderr
        assert " torch\n" not in done.stderr
