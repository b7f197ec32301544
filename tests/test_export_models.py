"""Exported detectors compute what their models do, on pictures of any size, and the tool says so."""

import json
import os
import runpy
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model as build_other_model
from PIL import Image
from torch import nn

from gn_practical import build_model
from gn_practical.inference.export import formats
from gn_practical.inference.export.agreement import agreement
from gn_practical.inference.export.check import check_backbone, inputs_of
from gn_practical.inference.export.contents import contents_of
from gn_practical.inference.export.standardization import fold_standardization
from gn_practical.inference.exported import ExportedModel
from gn_practical.training.checkpoint import GroupsCheckpointer
from gn_practical.training.config import load_cfg
from gn_practical.weights import Description

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[1]
TOOL = str(ROOT / "tools/export_model.py")
STORED = Description(class_names={"thing": ["disc", 'a "b"'], "stuff": ["grass"]})
NARROW = ["MODEL.RESNETS.DEPTH", 50, "MODEL.RESNETS.STEM_OUT_CHANNELS", 4]
NARROW += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 4]
NARROW += ["MODEL.FPN.OUT_CHANNELS", 8, "INPUT.MIN_SIZE_TEST", 64]
PROPOSALS = ["MODEL.RPN.PRE_NMS_TOPK_TEST", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 20]
RETINANET = {
    "MODEL.META_ARCHITECTURE": "RetinaNet",
    "MODEL.MASK_ON": False,
    "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.RETINANET.NUM_CLASSES": 5,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.RETINANET.NORM": "PGN",
}
FAMILIES = {
    "Faster R-CNN": ("faster_rcnn.yaml", [*NARROW, "MODEL.ROI_BOX_HEAD.NUM_CONV", 1]),
    "Mask R-CNN": ("tiny.yaml", ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"]),
    "RetinaNet": ("tiny.yaml", [word for pair in RETINANET.items() for word in pair]),
    "panoptic FPN": ("tiny.yaml", []),
}


def config(family):
    name, words = FAMILIES[family]
    words = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", *PROPOSALS, *words]
    return load_cfg(str(ROOT / "configs/quickstart" / name), list(map(str, words)))


def decided(cfg):
    """A random model whose scores differ, and that finds something."""
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for path, module in model.named_modules():
        if path.endswith(("cls_score", "objectness_logits", "sem_seg_head.predictor")):
            nn.init.normal_(module.weight, std=1)
    return model


def picture(height, width, seed=0):
    noise = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(seed))
    return 255 * F.interpolate(noise, size=(height, width), mode="bilinear")[0]


def written(model, cfg, path, kind="fast", opset=18):
    folded = deepcopy(model)
    assert fold_standardization(folded) == contents_of(model, cfg, STORED).standardized
    write = formats.write_onnx if path.suffix == ".onnx" else formats.write_torchscript
    write(folded, contents_of(model, cfg, STORED, kind), path, opset)
    return ExportedModel(path)


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, tmp_path_factory):
    cfg = config(request.param)
    model = decided(cfg)
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    return model, cfg, written(model, cfg, path)


def assert_same(model, exported, given):
    with torch.no_grad():
        expected = model([given])[0]
    found = exported([given])[0]
    compared = agreement(expected, found, exported.thresholds)
    assert compared.holds, compared
    assert set(found) == set(expected)
    assert found["instances"].image_size == expected["instances"].image_size
    fields = {key: each.dtype for key, each in expected["instances"].get_fields().items()
              if isinstance(each, torch.Tensor)}  # fmt: skip
    assert all(found["instances"].get(key).dtype == dtype for key, dtype in fields.items())
    return compared


def test_onnx_finds_what_the_model_finds_in_any_size(exported):
    model, _, file = exported
    for size in ((64, 64), (60, 101), (150, 90)):
        given = {"image": picture(*size), "height": 120, "width": 77}
        assert assert_same(model, file, given).detections > 3
    assert_same(model, file, {"image": picture(64, 1).to(torch.uint8)})
    assert_same(model, file, {"image": torch.zeros(3, 1, 30)})


def test_onnx_finds_nothing_where_the_model_finds_nothing(exported):
    model, cfg, _ = exported
    heads = getattr(model, "roi_heads", None)
    if heads is None:
        pytest.skip("RetinaNet keeps what passes its threshold, in a graph of its own")
    quiet = deepcopy(model)
    nn.init.zeros_(quiet.roi_heads.box_predictor.cls_score.weight)
    quiet.roi_heads.box_predictor.cls_score.bias.data[-1] = 50
    path = Path(exported[2].path).with_name("quiet.onnx")
    assert assert_same(quiet, written(quiet, cfg, path), {"image": picture(64, 80)}).detections == 0


def test_the_file_says_what_it_takes_and_gives(exported):
    model, cfg, file = exported
    assert file.description.class_names == STORED.class_names
    assert file.description.resize == {"MIN_SIZE_TEST": 64, "MAX_SIZE_TEST": 1333}
    assert file.description.config and file.description.num_groups
    assert file.contents.input["channels"] == cfg.INPUT.FORMAT
    assert file.contents.architecture == type(model).__name__
    thresholds = cfg.MODEL.RETINANET if "Retina" in type(model).__name__ else cfg.MODEL.ROI_HEADS
    assert file.thresholds["score"] == thresholds.SCORE_THRESH_TEST
    properties = {each.key: each.value for each in onnx.load(file.path).metadata_props}
    assert json.loads(properties["gn_practical.outputs"]) == file.contents.outputs


def test_a_picture_without_pixels_is_one_line(exported):
    with pytest.raises(ValueError, match=r"image must be a picture .*got shape=\(3, 0, 5\)"):
        exported[2]([{"image": torch.zeros(3, 0, 5)}])


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
    assert len(nodes) >= len(norms) - len(of_parts) > 60  # a shared one runs several times
    assert {node.domain for node in graph.graph.node} == {""}
    assert [(each.domain, each.version) for each in graph.opset_import] == [("", 21)]
    assert_same(model, file, {"image": picture(60, 100)})


def test_plain_norms_are_neither(panoptic, tmp_path):
    model, cfg = panoptic
    file = written(model, cfg, tmp_path / "model.onnx", "plain")
    kinds = {node.op_type for node in onnx.load(file.path).graph.node}
    assert not kinds & {"GroupNormalization", "InstanceNormalization", "LayerNormalization"}
    assert_same(model, file, {"image": picture(60, 100)})


def test_torchscript_finds_what_the_model_finds(panoptic, tmp_path):
    model, cfg = panoptic
    file = written(model, cfg, tmp_path / "model.ts")
    assert file.description.class_names == STORED.class_names
    for size in ((60, 100), (128, 70)):
        assert_same(model, file, {"image": picture(*size)})


def test_torch_export_takes_the_backbone(panoptic, tmp_path):
    model, cfg = panoptic
    contents = contents_of(model, cfg, STORED, backbone_only=True)
    assert contents.outputs == ["p2", "p3", "p4", "p5", "p6"]
    formats.write_torch_export(model, contents, tmp_path / "model.pt2")
    assert check_backbone(model, tmp_path / "model.pt2") < 1e-5


def test_what_cannot_be_exported_is_said_at_once(panoptic):
    model, cfg = panoptic
    other = cfg.clone()
    other.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    with pytest.raises(ValueError, match="got MODEL.META_ARCHITECTURE=SemanticSegmentor"):
        contents_of(build_other_model(other), other, STORED)
    changed = deepcopy(model)
    changed.roi_heads.keypoint_on = True
    with pytest.raises(ValueError, match="got MODEL.KEYPOINT_ON=True"):
        contents_of(changed, cfg, STORED)


def test_pictures_are_checked_in_three_sizes(panoptic):
    _, cfg = panoptic
    one = picture(50, 80).permute(1, 2, 0).to(torch.uint8).numpy()
    sizes = [tuple(each["image"].shape[1:]) for each in inputs_of([one], cfg)]
    assert sizes == [(64, 102), (48, 77), (80, 128)]
    assert len(list(inputs_of([one] * 5, cfg))) == 5


# The tool ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(panoptic, tmp_path_factory):
    model, cfg = panoptic
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
    assert out.count(" yes\n") == 3 and "of PyTorch's time" in out
    assert os.listdir(tmp_path / "out") == ["model.onnx"]
    assert ExportedModel(tmp_path / "out/model.onnx").contents.group_norm == "fast"
    code, _, error = tool(*words)
    assert "model.onnx. Choose another, or add --force" in error


def test_an_export_that_computes_something_else_gets_no_good_name(
    checkpoint, tool, tmp_path, monkeypatch
):
    monkeypatch.setattr("gn_practical.inference.export.agreement.BOX_TOLERANCE", -1.0)
    words = ["--weights", checkpoint, "--output", tmp_path, "--format", "torchscript"]
    code, out, error = tool(*words)
    assert code == 1 and " NO\n" in out and "error: the export must compute the same" in error
    assert os.listdir(tmp_path) == ["model.ts.failed"]


def test_torch_export_says_that_it_is_a_part(checkpoint, tool, tmp_path):
    code, _, error = tool("--weights", checkpoint, "--output", tmp_path, "--format", "torch.export")
    assert code == 2 and "takes the backbone and its neck alone" in error
    assert os.listdir(tmp_path) == ["model.pt2"]


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
    pytest.importorskip("re").search(message, line) or pytest.fail(line)
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
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path(sys.argv[0], run_name='__main__')"  # noqa: E501
    script = f"import sys; sys.argv = {[TOOL, '--weights', 'w', '--output', 'o', *words]}; {code}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and "error: " in done.stderr, done.stderr
