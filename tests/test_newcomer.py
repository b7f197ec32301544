"""A norm type and a model family from one place each; rules and evaluators: see their own tests."""

import pytest
import torch
from detectron2.config import get_cfg
from torch import nn

from gn_practical import add_pgn_config, build_model, convert_to_ws, register_norm
from gn_practical.layers import WSConv2d
from gn_practical.modeling.registration import _factories
from gn_practical.training import architectures, validation
from gn_practical.training.data import DatasetError


class HalfNorm(nn.GroupNorm):
    """Half as many groups as channels."""

    def __init__(self, num_channels):
        super().__init__(num_channels // 2, num_channels)


def test_a_registered_norm_is_built_standardized_and_trained(monkeypatch):
    monkeypatch.delitem(_factories, "Half", raising=False)
    register_norm("Half", HalfNorm)
    cfg = get_cfg()
    add_pgn_config(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 50, 16
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "Half"
    cfg.MODEL.WS.ENABLED = True
    model = build_model(cfg)
    monkeypatch.delitem(_factories, "Half")
    norms = [module for module in model.modules() if isinstance(module, HalfNorm)]
    assert len(norms) > 20
    assert sum(isinstance(module, WSConv2d) for module in model.modules()) == len(norms)
    features = model.backbone(torch.randn(1, 3, 64, 64))
    sum(feature.square().mean() for feature in features.values()).backward()
    assert all(norm.weight.grad is not None for norm in norms if norm.weight.requires_grad)


def test_a_norm_of_another_library_is_standardized_before():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), HalfNorm(8))
    assert convert_to_ws(model) == ["0"]


def test_a_model_family_is_one_entry(monkeypatch):
    """Its number of classes is compared with the data as soon as it is listed."""
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "MyDetector"
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("scenes_train",)
    cfg.MODEL.RETINANET.NUM_CLASSES = 99
    entry = architectures.Architecture(frozenset({"instances"}), "MODEL.RETINANET.NUM_CLASSES")
    monkeypatch.setitem(architectures.ARCHITECTURES, "MyDetector", entry)
    with pytest.raises(DatasetError, match=r"MODEL.RETINANET.NUM_CLASSES must be the number of"):
        validation.check_datasets(cfg)
