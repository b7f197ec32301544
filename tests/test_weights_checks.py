"""What is said, warned of and refused when weights are loaded, and what checkpoints describe."""

import csv
import logging
import pickle
import re
import runpy
import sys
from argparse import Namespace
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from detectron2.data import MetadataCatalog
from torch import nn

from gn_practical import WSConv2d
from gn_practical.modeling import build_model
from gn_practical.training.checkpoint import GroupsCheckpointer
from gn_practical.training.engine import load_cfg
from gn_practical.weights import Standardization, config_from_checkpoint, load_description
from gn_practical.weights.comparison import differences
from gn_practical.weights.describe import describe, describe_config

ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "configs/quickstart/faster_rcnn.yaml")
# Bottlenecks, for the stride, and narrow heads: a model in a fifth of a second.
TINY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 16,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.RPN.CONV_DIMS": (16,),
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.WS.ENABLED": False,
}


def config(output_dir, changes=None):
    keys = {**TINY, "OUTPUT_DIR": output_dir, **(changes or {})}
    return load_cfg(QUICKSTART, [str(word) for pair in keys.items() for word in pair])


@cache
def built(changes):
    """A model of other keys; it is loaded into again and again."""
    cfg = config("nowhere", dict(changes))
    return build_model(cfg), cfg


def checkpointer(folder, changes=None, **options):
    model, cfg = built(tuple((changes or {}).items()))
    return GroupsCheckpointer(model, str(folder), cfg=cfg, **options)


def said_in(caplog, level=logging.WARNING):
    """What loading says; a run in this process before may have set loggers to more."""
    mine = [r for r in caplog.records if r.name.endswith("weights.loading")]
    return [record.getMessage() for record in mine if record.levelno >= level]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder with a checkpoint of the tiny model."""
    folder = tmp_path_factory.mktemp("trained")
    saved = checkpointer(folder)
    saved.save("model_0000009", iteration=9)
    saved.wait()
    return folder


@pytest.fixture
def weights(trained):
    return str(trained / "model_0000009.pth")


# Key, another value, and what is said of it.
OTHERS = {
    "groups": (
        {"MODEL.PGN.NUM_GROUPS": 4},
        r"other groups in \d+ layers: .* \(\d+ in the checkpoint, 4 in the model\).*, MODEL\.PGN",
    ),
    "order": ({"INPUT.FORMAT": "BGR"}, r"INPUT\.FORMAT=BGR \(RGB in the checkpoint\)"),
    "mean": (
        {"MODEL.PIXEL_MEAN": (0.0, 0.0, 0.0)},
        r"MODEL\.PIXEL_MEAN=\[0, 0, 0\] \(\[\d+.*\] in the checkpoint\)",
    ),
    "std": (
        {"MODEL.PIXEL_STD": (255.0, 255.0, 255.0)},
        r"MODEL\.PIXEL_STD=\[255, 255, 255\] \(",
    ),
    "stride": (
        {"MODEL.RESNETS.STRIDE_IN_1X1": True},
        r"MODEL\.RESNETS\.STRIDE_IN_1X1=True \(False in the checkpoint\)",
    ),
    "standardization": (
        {"MODEL.WS.ENABLED": True},
        r"other weight standardization in \d+ layers: .*\(off in the checkpoint, on in the model\)"
        r".*, MODEL\.WS: it changes the weights by [\d.]+ % ",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_differs_is_an_error_for_an_evaluation_and_on_resume(trained, weights, name, caplog):
    changes, said = OTHERS[name]
    with pytest.raises(ValueError, match=f"as its weights were trained for evaluation, got {said}"):
        checkpointer(trained, changes, evaluation=True).load(weights)
    with pytest.raises(ValueError, match=f"as its weights were trained for resuming, got {said}"):
        checkpointer(trained, changes).resume_or_load("", resume=True)
    with caplog.at_level(logging.WARNING):
        checkpointer(trained, changes).load(weights)
    (warning,) = said_in(caplog)
    assert re.search(f"were trained: {said}", warning)
    assert "Fine-tuning adapts" in warning


def test_what_is_the_same_is_said_in_one_line(trained, weights, caplog):
    for options, load in (
        ({}, lambda c: c.load(weights)),
        ({"evaluation": True}, lambda c: c.load(weights)),
        ({}, lambda c: c.resume_or_load("", resume=True)),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="gn_practical"):
            load(checkpointer(trained, **options))
        (line,) = [r for r in caplog.records if r.name.endswith("weights.loading")]
        assert line.levelno == logging.INFO
        assert "100 % of the model (backbone.bottom_up 100 %) filled, 100 % of the" in line.message
        assert not [r for r in caplog.records if r.levelno > logging.INFO]


def test_other_differences_can_be_evaluated_on_purpose(weights, tmp_path, caplog):
    changes = {"MODEL.PGN.NUM_GROUPS": 4, "TEST.ALLOW_DIFFERENCES": True}
    checkpointer(tmp_path, changes, evaluation=True).load(weights)
    assert "other groups in" in caplog.text


def test_heads_of_other_classes_are_named_before_training_and_refused_after(
    weights, tmp_path, caplog
):
    changes = {"MODEL.ROI_HEADS.NUM_CLASSES": 7}
    with caplog.at_level(logging.INFO, logger="gn_practical"):
        checkpointer(tmp_path, changes).load(weights)
    assert re.search(r"cls_score\.weight \(6×16 in the file, 8×16 in the model\)", caplog.text), (
        caplog.text
    )
    with pytest.raises(ValueError, match=r"fill the whole model for evaluation, got .*cls_score"):
        checkpointer(tmp_path, changes, evaluation=True).load(weights)


def test_other_classes_are_an_error_for_an_evaluation(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    state["description"]["class_names"]["thing"].reverse()
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"thing class 0='disc' \('ring' in the checkpoint\)"):
        checkpointer(tmp_path, evaluation=True).load(str(tmp_path / "a.pth"))
    checkpointer(tmp_path).load(str(tmp_path / "a.pth"))


def test_a_checkpoint_without_description_is_evaluated(weights, tmp_path, caplog):
    """As an older version wrote it: with its groups alone."""
    state = torch.load(weights, weights_only=True)
    state["num_groups"] = state.pop("description")["num_groups"]
    torch.save(state, tmp_path / "a.pth")
    path = str(tmp_path / "a.pth")
    checkpointer(tmp_path, evaluation=True).load(path)
    checkpointer(tmp_path, {"INPUT.FORMAT": "BGR"}, evaluation=True).load(path)
    with pytest.raises(ValueError, match="other groups in"):
        checkpointer(tmp_path, {"MODEL.PGN.NUM_GROUPS": 4}, evaluation=True).load(path)


def test_a_backbone_passes_and_another_architecture_does_not(tmp_path, caplog):
    loader = checkpointer(tmp_path)
    torch.save(loader.model.backbone.bottom_up.state_dict(), tmp_path / "backbone.pth")
    with caplog.at_level(logging.INFO, logger="gn_practical"):
        loader.load(str(tmp_path / "backbone.pth"))
    assert "(backbone.bottom_up 100 %) filled" in caplog.text
    assert "Not in the file: " in caplog.text
    with torch.device("meta"):
        vgg = torchvision.models.vgg11(num_classes=2).features
    state = {f"features.{key}": torch.zeros(value.shape) for key, value in vgg.state_dict().items()}
    torch.save(state, tmp_path / "vgg.pth")
    with pytest.raises(
        ValueError,
        match=r"must fill 90 % of backbone\.bottom_up, got .*vgg\.pth: 0\.0 % of the model .*"
        r"Not in the file: backbone\.bottom_up\..* \(nearest in the file: features\.\d+\.",
    ) as error:
        loader.load(str(tmp_path / "vgg.pth"))
    assert len(str(error.value)) < 800
    changes = {"MODEL.WEIGHTS_MIN_SHARE": 0.0}
    checkpointer(tmp_path, changes).load(str(tmp_path / "vgg.pth"))


def as_blob(name):
    """Detectron's name of a tensor of Detectron2's ResNet."""
    name = name.replace("stem.conv1", "conv1").replace(".shortcut", ".branch1")
    name = re.sub(
        r"(res\d)\.(\d)\.conv(\d)", lambda m: f"{m[1]}.{m[2]}.branch2{'_abc'[int(m[3])]}", name
    )
    ends = {".norm.weight": "_gn_s", ".norm.bias": "_gn_b", ".weight": "_w"}
    end = next(end for end in ends if name.endswith(end))
    return name.removesuffix(end).replace(".", "_") + ends[end]


def test_files_of_detectron_reach_the_backbone_and_say_what_they_need(tmp_path, caplog):
    """By Detectron2's matching, whose own warnings are in the line."""
    loader = checkpointer(tmp_path)
    state = loader.model.backbone.bottom_up.state_dict()
    blobs = {as_blob(name): torch.randn_like(value).numpy() for name, value in state.items()}
    blobs |= {"fc1000_w": np.ones((3, 4), np.float32), "conv1_w_momentum": blobs["conv1_w"]}
    (tmp_path / "R-50-GN.pkl").write_bytes(pickle.dumps(blobs, protocol=2))
    with caplog.at_level(logging.INFO, logger="gn_practical"):
        loader.load(str(tmp_path / "R-50-GN.pkl"))
    for name, value in loader.model.backbone.bottom_up.state_dict().items():
        np.testing.assert_array_equal(value, blobs[as_blob(name)])
    line, warning = said_in(caplog, logging.INFO)
    assert "Detectron's GN ResNets): " in line
    assert "(backbone.bottom_up 100 %) filled" in line
    assert "INPUT.FORMAT=RGB (BGR in the checkpoint)" in warning
    assert "MODEL.PIXEL_STD=[58.395, 57.12, 57.375] ([1, 1, 1] in the checkpoint)" in warning
    assert "(32 in the checkpoint, " in warning


def test_half_of_the_keys_renamed_is_an_error_that_names_the_nearest(weights, tmp_path):
    state = torch.load(weights, weights_only=True)["model"]
    renamed = {
        key.replace("conv", "convolution") if number % 2 else key: value
        for number, (key, value) in enumerate(state.items())
    }
    torch.save(renamed, tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match=r"must fill 90 % .*conv\d\S* \(nearest in the file: \S*convolution"
    ):
        checkpointer(tmp_path).load(str(tmp_path / "a.pth"))
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    torch.save({"0.weight": torch.ones(4, 4), "1.w": torch.ones(4, 4)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"must fill 90 % of the model"):
        GroupsCheckpointer(plain).load(str(tmp_path / "b.pth"))


@pytest.mark.parametrize("name", ["page.pth", "cut.pth", "cut.pkl", "page.pkl", "cut.safetensors"])
def test_what_a_failed_download_leaves_is_one_clear_error(weights, tmp_path, name):
    path = tmp_path / name
    if name.startswith("page"):
        path.write_text("<!DOCTYPE html>\n<html><body>404: Not Found</body></html>" * 20)
        said = "a page of HTML"
    elif name == "cut.pkl":
        path.write_bytes(pickle.dumps({"blobs": {"conv1_w": torch.ones(99).numpy()}})[:200])
        said = "truncated|cut short"
    elif name == "cut.safetensors":
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file({"weight": torch.ones(99)}, path)
        path.write_bytes(path.read_bytes()[:-40])
        said = "no whole safetensors"
    else:
        path.write_bytes(Path(weights).read_bytes()[:9000])
        said = "cut short|not a zip"
    with pytest.raises(ValueError, match=rf"must be a whole file.*{name}: .*({said})") as error:
        GroupsCheckpointer(nn.Linear(2, 2)).load(str(path))
    assert "\n" not in str(error.value)


def test_a_checkpoint_says_what_it_was_trained_with(trained, weights):
    described = load_description(weights)
    cfg = config(trained)
    assert described.input_format == cfg.INPUT.FORMAT
    assert described.pixel_mean == tuple(cfg.MODEL.PIXEL_MEAN)
    assert described.class_names == {"thing": MetadataCatalog.get("scenes_val").thing_classes}
    assert described.resize["MIN_SIZE_TEST"] == cfg.INPUT.MIN_SIZE_TEST
    assert described.rule == "paper"
    assert described.stride_in_1x1 == cfg.MODEL.RESNETS.STRIDE_IN_1X1
    assert described.norm_eps == 1e-5
    assert described.norm == "GN"
    assert described.weight_standardization is False
    assert "torch" in described.versions
    assert str(trained) not in described.config


def test_a_model_is_rebuilt_from_its_checkpoint_alone(trained, weights):
    cfg = config_from_checkpoint(weights)
    assert cfg.MODEL.FPN.OUT_CHANNELS == 16
    assert isinstance(cfg.INPUT.MIN_SIZE_TRAIN, tuple)
    model = build_model(cfg)
    GroupsCheckpointer(model, cfg=cfg, evaluation=True).load(weights)
    saved = torch.load(weights, weights_only=True)["model"]
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())


def test_tools_take_a_checkpoint_in_the_place_of_a_config(weights, monkeypatch, capsys):
    table = str(ROOT / "tools/group_table.py")
    monkeypatch.setattr(sys, "argv", [table, "--checkpoint", weights, "--format", "csv"])
    with pytest.raises(SystemExit):
        runpy.run_path(table, run_name="__main__")
    rows = csv.DictReader(capsys.readouterr().out.splitlines())
    norms = {next(iter(row.values())) for row in rows}
    assert norms == set(load_description(weights).num_groups)
    audit = runpy.run_path(str(ROOT / "tools/audit_isometry.py"))
    args = Namespace(checkpoint=weights, image_size=64, images_per_batch=1, seed=0, opts=[])
    cfg = audit["read_config"](args)
    assert (weights, 16) == (cfg.MODEL.WEIGHTS, cfg.MODEL.FPN.OUT_CHANNELS)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (64,)


def test_a_checkpoint_without_a_config_is_an_error(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"must hold the config .*a\.pth, which holds none"):
        config_from_checkpoint(str(tmp_path / "a.pth"))


def test_reading_a_config_to_describe_it_uses_none_of_its_keys(tmp_path):
    cfg = config(tmp_path, {"SOLVER.GAMMA": 0.3})
    cfg.forget_reads()
    describe_config(cfg)
    assert "SOLVER.GAMMA" in cfg.unread_overrides()


def test_definitions_of_standardization_are_compared_by_what_they_change(tmp_path):
    """As eps under the root does to filters of small deviation; the biased std is a scale."""
    model = nn.Sequential(WSConv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1))
    nn.init.normal_(model[0].weight, std=1e-3)
    state, present = model.state_dict(), describe(model)
    assert differences(present, present, model, state) == []
    other = replace(present, standardization=Standardization(1e-6, eps_under_root=True))
    (said,) = differences(other, present, model, state)
    assert "sqrt(var + 1e-06), unbiased in the checkpoint" in said
    assert float(re.search(r"to ([\d.e+]+) %", said)[1]) > 30
    nearly = replace(present, standardization=Standardization(1.00001e-5))
    assert differences(nearly, present, model, state) == []


def test_groups_of_a_backbone_are_compared_in_a_detector(tmp_path, caplog):
    """One number for all, as published files are; the norms that it does not fill are left out."""
    same = checkpointer(tmp_path, {"MODEL.PGN.NUM_GROUPS": 4})
    backbone = same.model.backbone.bottom_up
    state = {"model": backbone.state_dict(), "description": {"num_groups": 4}}
    torch.save(state, tmp_path / "a.pth")
    same.load(str(tmp_path / "a.pth"))
    assert not said_in(caplog)
    checkpointer(tmp_path).load(str(tmp_path / "a.pth"))
    norms = sum(isinstance(each, nn.GroupNorm) for each in backbone.modules())
    assert 0 < int(re.search(r"other groups in (\d+) layers", caplog.text)[1]) <= norms
