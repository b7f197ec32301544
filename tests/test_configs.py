"""Every file under configs/ builds, and the recipes have the norms that they name."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from gn_practical import PracticalGroupNorm, WSConv2d, build_model
from gn_practical.training.engine import load_cfg

CONFIGS = Path(__file__).parent.parent / "configs"
# A sweep is a plan of runs of these, not a config: tests/test_sweep.py.
FILES = sorted(set(CONFIGS.glob("**/*.yaml")) - set(CONFIGS.glob("sweeps/*.yaml")))


def build(name):
    cfg = load_cfg(str(CONFIGS / name), ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        return cfg, build_model(cfg)


def groups(model):
    return [m.num_groups for m in model.modules() if isinstance(m, PracticalGroupNorm)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_builds(path):
    cfg, model = build(path.relative_to(CONFIGS))
    assert all(groups(model))
    assert cfg.SOLVER.MAX_ITER not in cfg.SOLVER.STEPS
    if path.parent.name != "base":
        assert Path(cfg.OUTPUT_DIR).parts[0] == "output"


def test_output_folders_differ():
    recipes = [path for path in FILES if path.parent.name != "base"]
    folders = [yaml.safe_load(path.read_text())["OUTPUT_DIR"] for path in recipes]
    assert len(set(folders)) == len(recipes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pfpn_pgn.yaml", {32: 4, 1: 3}),
        ("pfpn_gn32.yaml", {32: 7}),
        ("pfpn_gn1.yaml", {1: 7}),
    ],
)
def test_semantic_head_of_table_5(name, expected):
    _, model = build(name)
    assert Counter(groups(model)) == expected
    assert Counter(groups(model.sem_seg_head)) == expected


def test_pgn_in_every_norm():
    _, model = build("pfpn_pgn_all.yaml")
    counted = Counter(groups(model))
    assert sum(counted.values()) == 76
    assert counted[1] == 54
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize(("name", "expected"), [("gn32", {32}), ("gn1", {1})])
def test_faster_rcnn_of_table_6(name, expected):
    cfg, model = build(f"faster_rcnn_gn_ws_{name}.yaml")
    assert set(groups(model)) == expected
    assert len(groups(model)) == 53 + 8 + 4
    standardized = {p for p, m in model.named_modules() if isinstance(m, WSConv2d)}
    assert len(standardized) == 53 + 8 + 4
    assert not any(p.startswith("proposal_generator") for p in standardized)
    strides = [block.conv2.stride for block in model.backbone.bottom_up.res3[:1]]
    assert strides == [(2, 2)]
    assert cfg.INPUT.FORMAT == "RGB"
