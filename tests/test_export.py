"""What exports are made of: norms, folding, comparison, and what files say about themselves."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from detectron2.layers import Conv2d
from detectron2.structures import Boxes, Instances
from torch import nn

from gn_practical import WSConv2d
from gn_practical.inference.export import formats
from gn_practical.inference.export.agreement import agreement, panoptic_agreement
from gn_practical.inference.export.contents import Contents
from gn_practical.inference.export.group_norm import GroupNormAs
from gn_practical.inference.export.standardization import fold_standardization
from gn_practical.inference.export.suppression import (
    by_class_in_onnx,
    by_class_in_torchscript,
    suppressing_by,
)
from gn_practical.inference.exported import ExportedModel
from gn_practical.modeling.fusion import fuse_norms
from gn_practical.weights import Description

THRESHOLDS = {"score": 0.05, "nms": 0.5, "detections": 100}


# Group norms ---------------------------------------------------------------------------------


class Parts(nn.Module):
    """A model with a norm of the whole picture, and one of its parts."""

    def __init__(self, num_groups):
        super().__init__()
        self.backbone = nn.GroupNorm(num_groups, 8)
        self.roi_heads = nn.GroupNorm(num_groups, 8)
        for norm in (self.backbone, self.roi_heads):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)


@pytest.mark.parametrize("kind", ["fast", "plain", "onnx"])
@pytest.mark.parametrize("num_groups", [1, 2, 8])
@pytest.mark.parametrize("part", ["backbone", "roi_heads"])
def test_group_norms_are_as_close_to_their_definition_as_pytorchs(kind, num_groups, part):
    torch.manual_seed(0)
    model = Parts(num_groups)
    norm = getattr(model, part)
    size = (1, 8, 90, 130) if part == "backbone" else (5, 8, 7, 7)
    x = torch.randn(size) + 3 * torch.randn(1, 8, 1, 1) + 5
    exact = F.group_norm(x.double(), num_groups, norm.weight.double(), norm.bias.double())
    with torch.no_grad(), GroupNormAs(kind, model):
        found = norm(x)
    error = (norm(x).double() - exact).abs().max()
    assert (found.double() - exact).abs().max() <= 2 * error + 1e-6
    assert found.dtype == torch.float32


@pytest.mark.parametrize("kind", ["fast", "plain", "onnx"])
def test_norms_of_no_part_give_nothing(kind):
    model = Parts(2)
    with torch.no_grad(), GroupNormAs(kind, model):
        assert model.roi_heads(torch.zeros(0, 8, 7, 7)).shape == (0, 8, 7, 7)


def test_other_group_norms_stay():
    norm, x = nn.GroupNorm(2, 8, affine=False), torch.randn(2, 8, 5)
    with GroupNormAs("fast", nn.Identity()):
        found = norm(x)
    torch.testing.assert_close(found, norm(x))


# Non-maximum suppression -----------------------------------------------------------------------


class Suppressed(nn.Module):
    """Looks the function up as Detectron2 does."""

    def forward(self, boxes, scores, classes):
        return torchvision.ops.boxes.batched_nms(boxes, scores, classes, 0.5)


def crowd(seed):
    """1000 boxes of 80 classes, in clusters: many pairs overlap by about a half."""
    torch.manual_seed(seed)
    cluster = torch.randint(0, 60, (1000,))
    center = (1300 * torch.rand(60, 2))[cluster] + 4 * torch.randn(1000, 2)
    size = (80 * torch.rand(60, 2) + 8)[cluster] * (1 + 0.2 * torch.randn(1000, 2)).clamp(0.5, 1.5)
    return torch.cat([center - size / 2, center + size / 2], 1), torch.rand(1000), cluster % 80


def test_suppression_in_graphs_keeps_what_pytorch_keeps(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    original = torchvision.ops.boxes.batched_nms
    names = ["boxes", "scores", "classes"]
    axes = {name: {0: "n"} for name in names}
    path, model = str(tmp_path / "nms.onnx"), Suppressed()
    with suppressing_by(by_class_in_onnx):
        options = {"input_names": names, "dynamic_axes": axes, "opset_version": 18}
        torch.onnx.export(model, crowd(99), path, dynamo=False, **options)
    with suppressing_by(by_class_in_torchscript):
        traced = torch.jit.trace(model, crowd(99))
    assert torchvision.ops.boxes.batched_nms is original
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    aside = 0
    for seed in range(60):
        given = crowd(seed)
        expected = model(*given)  # 4000 numbers: torchvision takes all at once, up to there
        (found,) = session.run(None, dict(zip(names, map(torch.Tensor.numpy, given), strict=True)))
        exact = by_class_in_torchscript(*given, 0.5)
        assert torch.equal(torch.from_numpy(found), exact)
        assert torch.equal(traced(*given), exact)
        aside += not torch.equal(expected, exact)
    assert aside > 0  # else these boxes show nothing
    for run in (lambda *x: session.run(None, dict(zip(names, x, strict=True)))[0],):
        empty = (torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
        assert len(run(*(each.numpy() for each in empty))) == len(traced(*empty)) == 0


# Weight standardization ----------------------------------------------------------------------


def test_folded_weights_compute_the_same():
    torch.manual_seed(0)
    relu = WSConv2d(4, 4, 3, norm=nn.GroupNorm(2, 4), activation=F.relu_)
    model = nn.Sequential(WSConv2d(3, 4, 3, bias=False), relu, Conv2d(4, 2, 1)).eval()
    fuse_norms(model)
    x = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        before, left_alone = model(x), model[2].weight.clone()
        assert fold_standardization(model) == 2
        assert torch.equal(model(x), before)
    assert not any(isinstance(each, WSConv2d) for each in model.modules())
    assert torch.equal(model[2].weight, left_alone)


def test_an_unknown_standardized_convolution_is_refused():
    class Mine(WSConv2d):
        pass

    with pytest.raises(ValueError, match="got a convolution of the class Mine"):
        fold_standardization(nn.Sequential(Mine(3, 4, 3)))


# Agreement -----------------------------------------------------------------------------------


def prediction(boxes, scores, classes):
    found = Instances((50, 50))
    found.pred_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
    found.scores, found.pred_classes = torch.tensor(scores), torch.tensor(classes)
    return {"instances": found}


TWO = ([[1.0, 2, 30, 40], [5.0, 5, 20, 20]], [0.9, 0.6], [3, 1])


def test_detections_are_the_same_in_any_order():
    boxes, scores, classes = (each[::-1] for each in TWO)
    found = agreement(prediction(*TWO), prediction(boxes, scores, classes), THRESHOLDS)
    assert found.holds
    assert found.detections == 2
    assert found.box == 0


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("box", [[1.0, 2, 30, 40], [5.0, 5, 20, 20.002]]),
        ("score", [0.9, 0.6002]),
        ("class", [3, 2]),
        ("far", [[1.0, 2, 30, 40], [9.0, 5, 20, 20]]),
    ],
)
def test_any_difference_is_seen(change, value):
    other = list(TWO)
    other[{"box": 0, "far": 0, "score": 1, "class": 2}[change]] = value
    found = agreement(prediction(*TWO), prediction(*other), THRESHOLDS)
    assert not found.holds
    assert len(found.alone) == (2 if change in ("class", "far") else 0)


def test_a_detection_at_the_threshold_may_be_missing_and_no_other():
    boxes, _, classes = TWO
    one = prediction(boxes[:1], [0.9], classes[:1])
    for score, holds in ((0.05004, True), (0.0502, False)):
        both = prediction(boxes, [0.9, score], classes)
        assert agreement(both, one, THRESHOLDS).holds is holds
        assert agreement(one, both, THRESHOLDS).holds is holds


def test_rounding_is_that_of_float32_itself():
    exact = prediction([[1.0, 2, 30, 40]], [0.9], [3])
    for ours, theirs, holds in ((0.002, -0.003, True), (0.002, -0.005, False), (0.0, 0.004, False)):
        first, second = (prediction([[1.0, 2, 30, 40 + d]], [0.9], [3]) for d in (ours, theirs))
        found = agreement(first, second, THRESHOLDS)
        assert not found.holds
        both = (agreement(exact, each, THRESHOLDS) for each in (first, second))
        assert found.beside(*both).holds is holds


def test_where_nothing_is_found_nothing_differs():
    empty = prediction([], [], [])
    assert agreement(empty, empty, THRESHOLDS).holds
    assert not agreement(empty, prediction(*TWO), THRESHOLDS).holds


def test_a_mask_of_other_pixels_is_seen():
    first, second = prediction(*TWO), prediction(*TWO)
    for each in (first, second):
        each["instances"].pred_masks = torch.zeros(2, 50, 50, dtype=torch.bool)
    second["instances"].pred_masks[1, :3, 0] = True
    found = agreement(first, second, THRESHOLDS)
    assert found.masks == pytest.approx(1 - 3 / 2500)
    assert not found.holds


def test_a_segment_of_another_class_is_another_segment():
    ids = torch.tensor([[1, 1], [2, 0]])
    segments = [{"id": i, "category_id": i, "isthing": False} for i in (1, 2)]
    other = [segments[0], {**segments[1], "category_id": 7}]
    assert panoptic_agreement((ids, segments), (ids, segments)) == 1
    assert panoptic_agreement((ids, segments), (ids, other)) == 0.75
    assert panoptic_agreement((ids, segments), (torch.zeros_like(ids), [])) == 0.25


# What files say ------------------------------------------------------------------------------

CONTENTS = Contents(
    architecture="GeneralizedRCNN",
    outputs=["boxes", "scores", "classes"],
    input={"name": "image", "channels": "BGR"},
    inside=[],
    thresholds=THRESHOLDS,
    group_norm="fast",
    standardized=0,
    description=Description(class_names={"thing": ['a "b"', "Käse</script>", "猫"]}),
    versions={"torch": "2"},
)


def test_contents_come_back_from_texts_and_json():
    pairs = CONTENTS.to_texts()
    assert all(isinstance(each, str) for each in pairs.values())
    assert Contents.from_texts({**pairs, "other": "1"}, "x") == CONTENTS
    assert Contents.from_json(CONTENTS.to_json(), "x") == CONTENTS
    pixels = replace(CONTENTS, description=Description(pixel_mean=(1.0, 2.0, 3.0)))
    assert Contents.from_json(pixels.to_json(), "x") == pixels


def test_files_that_cannot_be_run_are_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.onnx or \.ts, got .*model\.pt2"):
        ExportedModel(tmp_path / "model.pt2")
    with pytest.raises(ValueError, match=r"must be a file, got .*none\.onnx"):
        ExportedModel(tmp_path / "none.onnx")
    for name in ("broken.onnx", "broken.ts"):
        (tmp_path / name).write_bytes(b"not a model")
        with pytest.raises(ValueError, match=f"must be a whole file, got .*{name}: .*again"):
            ExportedModel(tmp_path / name)


def test_files_of_other_programs_are_one_line(tmp_path):
    onnx = pytest.importorskip("onnx")
    torch.jit.save(torch.jit.trace(nn.ReLU(), torch.zeros(1)), str(tmp_path / "other.ts"))
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    opsets = [onnx.helper.make_opsetid("", 18)]
    graph = onnx.helper.make_graph([node], "g", [value], [out])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "o.onnx"
    )
    for name in ("other.ts", "o.onnx"):
        with pytest.raises(ValueError, match=f"{name} without architecture, .*export_model.py"):
            ExportedModel(tmp_path / name)


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    (tmp_path / "model.onnx").write_bytes(b"")
    for name, run in (
        ("onnxruntime", lambda: ExportedModel(tmp_path / "model.onnx")),
        ("onnx", lambda: formats.write_onnx(nn.Identity(), CONTENTS, tmp_path / "new.onnx")),
    ):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(
            ValueError, match=rf"^{name} must be installed .*gn_practical\[export\]"
        ):
            run()


def test_opsets_that_cannot_be_written_are_refused():
    for opset in (17, 22):
        with pytest.raises(ValueError, match=f"from 18 to 21, got opset={opset}"):
            formats.check_opset(opset)
