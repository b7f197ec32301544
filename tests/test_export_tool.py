"""Other formats, other norms, and the tool that writes and checks."""

import os
import re
import runpy
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model as build_other_model
from exported_models import STORED, assert_same, config, decided, picture, written
from PIL import Image
from torch import nn

from gn_practical.inference.export.check import inputs_of
from gn_practical.inference.export.contents import Contents, contents_of
from gn_practical.inference.export.exact import predict_in_float64
from gn_practical.inference.exported import ExportedModel
from gn_practical.training.checkpoint import GroupsCheckpointer

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

TOOL = str(Path(__file__).parents[1] / "tools/export_model.py")


# Other ways of writing -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def panoptic():
    cfg = config("panoptic FPN")
    return decided(cfg), cfg


def test_the_operator_group_normalization_stands_for_norms_of_the_picture(panoptic, tmp_path):
    model, cfg = panoptic
    file = written(model, cfg, tmp_path / "model.onnx", "onnx", 21)
    graph = onnx.load(file.path)
    norms = [each for each in model.modules() if isinstance(each, nn.GroupNorm)]
    of_parts = [each for each in model.roi_heads.modules() if isinstance(each, nn.GroupNorm)]
    nodes = [node for node in graph.graph.node if node.op_type == "GroupNormalization"]
    assert len(nodes) >= len(norms) - len(of_parts) > 30  # a shared one runs several times
    assert {node.domain for node in graph.graph.node} == {""}
    assert [(each.domain, each.version) for each in graph.opset_import] == [("", 21)]
    assert_same(model, file, {"image": picture(60, 100)})


def test_torchscript_finds_what_the_model_finds(panoptic, tmp_path):
    model, cfg = panoptic
    file = written(model, cfg, tmp_path / "model.ts")
    assert file.description.class_names == STORED.class_names
    for size in ((60, 100), (128, 70)):
        assert_same(model, file, {"image": picture(*size)})


def test_what_cannot_be_exported_is_said_at_once(panoptic):
    model, cfg = panoptic
    other = cfg.clone()
    other.defrost()
    other.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    with pytest.raises(ValueError, match=r"got MODEL\.META_ARCHITECTURE=SemanticSegmentor"):
        contents_of(build_other_model(other), other, STORED)
    changed = deepcopy(model)
    changed.roi_heads.keypoint_on = True
    with pytest.raises(ValueError, match=r"got MODEL\.KEYPOINT_ON=True"):
        contents_of(changed, cfg, STORED)


def test_float64_tells_whose_rounding_it_is(panoptic):
    model, _ = panoptic
    given = {"image": picture(64, 90).to(torch.uint8)}
    exact = predict_in_float64(model, given)["instances"]
    with torch.no_grad():
        found = model([given])[0]["instances"]
    assert exact.scores.dtype == torch.float64
    assert 0 < (exact.scores - found.scores).abs().max() < 1e-5
    assert next(model.parameters()).dtype == torch.float32


def test_pictures_are_checked_in_three_sizes(panoptic):
    _, cfg = panoptic
    one = picture(50, 80).permute(1, 2, 0).to(torch.uint8).numpy()
    sizes = [tuple(each["image"].shape[1:]) for each in inputs_of([one], cfg)]
    assert sizes == [(64, 102), (48, 77), (80, 128)]
    assert len(list(inputs_of([one] * 5, cfg))) == 5


# The tool ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    cfg = config("Mask R-CNN")
    model = decided(cfg)
    folder = tmp_path_factory.mktemp("trained")
    checkpointer = GroupsCheckpointer(model, str(folder), cfg=cfg)
    checkpointer.save("model_final")
    checkpointer.wait()
    return folder / "model_final.pth"


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run the tool in this process: importing Detectron2 anew takes seconds."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(TOOL, run_name="__main__")
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err + str(end.value.code)

    return run


def test_the_tool_writes_checks_and_says_both_times(checkpoint, tool, tmp_path):
    Image.fromarray(picture(50, 80).permute(1, 2, 0).byte().numpy()).save(tmp_path / "a.png")
    words = ["--weights", checkpoint, "--output", tmp_path / "out", "--check", tmp_path / "a.png"]
    code, out, _ = tool(*words)
    assert code == 0
    assert out.count(" yes\n") == 3
    assert "of PyTorch's time" in out
    assert os.listdir(tmp_path / "out") == ["model.onnx"]
    assert ExportedModel(tmp_path / "out/model.onnx").contents.group_norm == "fast"
    code, _, error = tool(*words)
    assert "model.onnx. Choose another, or add --force" in error


def test_an_export_that_computes_something_else_gets_no_good_name(
    checkpoint, tool, tmp_path, monkeypatch
):
    monkeypatch.setattr("gn_practical.inference.export.agreement.LEAST_EQUAL", 1.1)
    words = ["--weights", checkpoint, "--output", tmp_path, "--format", "torchscript"]
    code, out, error = tool(*words)
    assert code == 1
    assert " NO\n" in out
    assert "error: the export must compute the same" in error
    assert os.listdir(tmp_path) == ["model.ts.failed"]


def test_torch_export_says_that_it_is_a_part(checkpoint, tool, tmp_path):
    code, _, error = tool("--weights", checkpoint, "--output", tmp_path, "--format", "torch.export")
    assert code == 2
    assert "takes the backbone and its neck alone" in error
    assert os.listdir(tmp_path) == ["model.pt2"]
    files = {"gn_practical.json": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=files)
    contents = Contents.from_json(files["gn_practical.json"], "model.pt2")
    assert contents.outputs == ["p2", "p3", "p4", "p5", "p6"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "none.pth"], "none.pth"),
        (["--check", "{text}"], "--check must name pictures, got .*text.jpg"),
        (["--opts", "MODEL.RPN.NMS_TRESH", "0.5"], "NMS_TRESH"),
        (["--output", "{text}"], "--output must be a folder to write to, got "),
    ],
)
def test_what_a_user_got_wrong_is_one_line(checkpoint, tool, tmp_path, words, message):
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    words = [word.format(text=text) for word in words]
    given = {"--weights": checkpoint, "--output": tmp_path / "out"}
    options = [word for pair in given.items() if pair[0] not in words for word in pair]
    code, _, error = tool(*options, *words)
    assert code not in (0, None)
    (line,) = [each for each in error.splitlines() if each.startswith("error: ")]
    assert re.search(message, line)
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


@pytest.mark.parametrize(
    "words",
    [
        ["--format", "torchscript", "--group-norm", "plain"],
        ["--group-norm", "onnx", "--opset", "18"],
        ["--check", "a.jpg", "--no-check"],
        ["--opts", "MODEL.DEVICE"],
        ["--opset", "99"],
    ],
)
def test_wrong_arguments_are_answered_before_anything_is_imported(words):
    given = [TOOL, "--weights", "w", "--output", "o", *words]
    script = f"import runpy, sys; sys.argv = {given}; sys.modules['torch'] = None; "
    script += "runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "error: " in done.stderr
