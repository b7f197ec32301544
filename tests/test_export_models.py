"""Exported detectors compute what their models do, on pictures of any size."""

import json

import pytest
import torch
from exported_models import FAMILIES, STORED, assert_same, config, decided, picture, written
from torch import nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request, tmp_path_factory):
    cfg = config(request.param)
    model = decided(cfg)
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    kind = "plain" if request.param == "Faster R-CNN" else "fast"
    return model, cfg, written(model, cfg, path, kind)


def test_onnx_finds_what_the_model_finds_in_any_size(exported):
    model, _, file = exported
    for size in ((64, 64), (60, 101), (150, 90)):
        given = {"image": picture(*size), "height": 120, "width": 77}
        assert assert_same(model, file, given).detections > 3
    assert_same(model, file, {"image": picture(64, 1).to(torch.uint8)})
    assert_same(model, file, {"image": torch.zeros(3, 1, 40)})


def test_onnx_finds_nothing_where_the_model_finds_nothing(tmp_path):
    cfg = config("Mask R-CNN")
    model = decided(cfg)
    predictor = model.roi_heads.box_predictor.cls_score
    nn.init.zeros_(predictor.weight)
    with torch.no_grad():
        predictor.bias[-1] = 50  # background
    file = written(model, cfg, tmp_path / "model.onnx")
    assert assert_same(model, file, {"image": picture(64, 80)}).detections == 0


def test_plain_norms_are_means_and_products(exported):
    *_, file = exported
    kinds = {node.op_type for node in onnx.load(file.path).graph.node}
    assert not kinds & {"GroupNormalization", "InstanceNormalization"}
    assert ("LayerNormalization" in kinds) is (file.contents.group_norm == "fast")


def test_the_file_says_what_it_takes_and_gives(exported):
    model, cfg, file = exported
    assert file.description.class_names == STORED.class_names
    assert file.description.resize == {"MIN_SIZE_TEST": 64, "MAX_SIZE_TEST": 1333}
    assert file.description.config
    assert file.description.num_groups
    assert file.contents.input["channels"] == cfg.INPUT.FORMAT
    assert file.contents.architecture == type(model).__name__
    thresholds = cfg.MODEL.RETINANET if "Retina" in type(model).__name__ else cfg.MODEL.ROI_HEADS
    assert file.thresholds["score"] == thresholds.SCORE_THRESH_TEST
    properties = {each.key: each.value for each in onnx.load(file.path).metadata_props}
    assert json.loads(properties["gn_practical.outputs"]) == file.contents.outputs


def test_what_is_no_picture_is_one_line(exported):
    for shape in ((3, 0, 5), (1, 40, 40), (1, 3, 40, 40)):
        message = r"shape \(3, height, width\), in (BGR|RGB), got shape="
        with pytest.raises(ValueError, match=message) as error:
            exported[2]([{"image": torch.zeros(shape)}])
        assert str(shape) in str(error.value)
