"""ResNet-D: timm's features from timm's weights, groups, and the wrong backbone caught."""

import copy
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm.models.resnet as timm_resnet
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.projects.deeplab.resnet import DeepLabStem
from resnet_references import (
    assert_equal,
    build,
    normalized,
    randomized,
    stages_of,
)
from torch import nn

from gn_practical import bind_group_norms, build_model, convert_to_ws
from gn_practical.layers.weight_standardization import standardize_weight
from gn_practical.modeling.fusion import fuse_norms
from gn_practical.modeling.resnet_d import pool_shortcuts
from gn_practical.training.checkpoint import GroupsCheckpointer
from gn_practical.training.config import load_cfg
from gn_practical.weights import read_weights
from gn_practical.weights.config_keys import config_keys

BOTTLENECK, BASIC = timm_resnet.Bottleneck, timm_resnet.BasicBlock
CONFIG = Path(__file__).parents[1] / "configs/quickstart/faster_rcnn_narrow50.yaml"


def timm_d(block=BOTTLENECK, layers=(1, 1, 1, 1), stem_width=32, **kwargs):
    kwargs = {"stem_type": "deep", "stem_width": stem_width, "avg_down": True, **kwargs}
    return randomized(timm_resnet.ResNet(block, list(layers), **kwargs))


def mmpretrain(model):
    """MMPretrain's V1d: the first stage has no place for a pool that it lacks."""
    state = {"head.fc.weight": torch.zeros(10, 8)}
    for key, value in model.state_dict().items():
        key = key.replace("conv1.", "stem.") if key.startswith("conv1.") else key
        key = key.replace("bn1.", "stem.7.") if key.startswith("bn1.") else key
        if key.startswith("layer1.0.downsample."):
            number = int(key.split(".")[3])
            key = key.replace(f"downsample.{number}", f"downsample.{number - 1}")
        if not key.startswith("fc"):
            state[f"backbone.{key}"] = value
    return {"state_dict": state}


def saved(state, folder):
    torch.save(state, folder / "d.pth")
    return str(folder / "d.pth")


def pictures(height, width):
    pixels = torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(0))
    return normalized(pixels.float())


MODELS = {
    "bn": {},
    "gn": {"norm_layer": "groupnorm"},
    "basic": {"block": BASIC},
    "wide stem, as e": {"stem_width": 64},
}


@pytest.mark.parametrize("name", MODELS)
def test_features_are_timm_s(name, tmp_path):
    model = timm_d(**MODELS[name])
    weights = read_weights(saved(model.state_dict(), tmp_path))
    assert weights.description.pooled_shortcuts
    assert not weights.unused
    ours = pool_shortcuts(build(weights.state, weights.description))
    for size in ((64, 64), (75, 101), (65, 97), (90, 67)):
        x = pictures(*size)
        with torch.no_grad():
            assert_equal(ours(x), stages_of(model, x))


def test_features_of_mmpretrain_s_v1d(tmp_path):
    model = timm_d()
    weights = read_weights(saved(mmpretrain(model), tmp_path))
    assert (weights.description.source, weights.unused) == ("MMPretrain", ("head.fc.weight",))
    ours = pool_shortcuts(build(weights.state, weights.description))
    with torch.no_grad():
        assert_equal(ours(pictures(75, 101)), stages_of(model, pictures(75, 101)))


# The registered backbones ------------------------------------------------------------------------


def config_of(*overrides):
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.BACKBONE.FREEZE_AT", 0, *overrides]
    return load_cfg(str(CONFIG), [str(each) for each in overrides])


def detector_of(keys, *overrides):
    return build_model(config_of(*(word for item in keys.items() for word in item), *overrides))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """timm's resnet18d with group norms, its file, and the keys that this needs."""
    model = timm_d(BASIC, (2, 2, 2, 2), norm_layer="groupnorm")
    path = saved(model.state_dict(), tmp_path_factory.mktemp("timm"))
    return SimpleNamespace(model=model, path=path, keys=config_keys(read_weights(path)))


def test_the_keys_of_a_file_build_its_backbone_and_the_weights_go_in(source, caplog):
    assert source.keys["MODEL.BACKBONE.NAME"] == "build_resnet_d_fpn_backbone"
    assert (source.keys["MODEL.RESNETS.DEPTH"], source.keys["INPUT.FORMAT"]) == (18, "RGB")
    model = detector_of(source.keys, "MODEL.RESNETS.NORM", "PGN", "MODEL.PGN.NUM_GROUPS", 32).eval()
    with caplog.at_level(logging.INFO):
        GroupsCheckpointer(model).resume_or_load(source.path, resume=False)
    assert "(backbone.bottom_up 100 %) filled" in caplog.text
    assert not [each for each in caplog.records if each.levelno > logging.INFO]
    x = pictures(75, 101)
    with torch.no_grad():
        assert_equal(model.backbone.bottom_up(x), stages_of(source.model, x))


@pytest.mark.parametrize("stem", ["basic", "deep"])
def test_another_backbone_is_refused_with_the_name_of_the_right_one(stem, source):
    """With a deep stem it has the same names and shapes."""
    model = detector_of(source.keys, "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone")
    if stem == "deep":
        model.backbone.bottom_up.stem = DeepLabStem(3, 64, "GN")
    with pytest.raises(ValueError, match=r"be a ResNet-D .* build_resnet_d_fpn_backbone, or"):
        GroupsCheckpointer(model).resume_or_load(source.path, resume=False)


def test_plain_weights_in_a_resnet_d_are_told(source, tmp_path, caplog):
    plain = timm_d(BASIC, (2, 2, 2, 2), norm_layer="groupnorm", avg_down=False)
    path = saved(plain.state_dict(), tmp_path)
    assert not read_weights(path).description.pooled_shortcuts
    GroupsCheckpointer(detector_of(source.keys)).resume_or_load(path, resume=False)
    assert "average pixels, MODEL.BACKBONE.NAME=True (False in the checkpoint)" in caplog.text


@pytest.mark.parametrize("depth", [18, 50])
def test_its_norms_are_bound_and_its_convolutions_standardized(depth):
    out = {18: 64, 50: 256}[depth]
    cfg = config_of("MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES2_OUT_CHANNELS", out)
    build_backbone = BACKBONE_REGISTRY.get("build_resnet_d_backbone")
    model = build_backbone(cfg, ShapeSpec(channels=3)).eval()
    x = pictures(75, 101)
    for given in (None, x):
        table = {b.norm: b for b in bind_group_norms(model, example_inputs=given)}
        assert len(table) == sum(isinstance(each, nn.GroupNorm) for each in model.modules())
        feeds = {name: (b.producer, b.in_channels) for name, b in table.items()}
        assert feeds["stem.conv3.norm"] == ("stem.conv3", 16)
        assert feeds["res3.0.shortcut.norm"] == ("res3.0.shortcut", out)
    randomized(model)
    wanted = copy.deepcopy(model)
    paths = convert_to_ws(model)
    assert len(paths) == len(table)
    for path in paths:
        layer = wanted.get_submodule(path)
        layer.weight.data = standardize_weight(layer.weight.data)
    assert fuse_norms(model)
    with torch.no_grad():
        assert_equal(model(x), wanted(x))


def test_a_dilated_last_stage_is_refused_and_stages_are_frozen():
    cfg = config_of("MODEL.BACKBONE.FREEZE_AT", 2, "MODEL.RESNETS.NORM", "BN")
    build_backbone = BACKBONE_REGISTRY.get("build_resnet_d_backbone")
    model = build_backbone(cfg, ShapeSpec(channels=3))
    learned = {name.split(".")[0] for name, each in model.named_parameters() if each.requires_grad}
    assert learned == {"res3", "res4", "res5"}
    cfg = config_of("MODEL.RESNETS.RES5_DILATION", 2)
    with pytest.raises(ValueError, match="RES5_DILATION must be 1 for a ResNet-D, got"):
        build_backbone(cfg, ShapeSpec(channels=3))
