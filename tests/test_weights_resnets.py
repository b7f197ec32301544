"""ResNets of torchvision, timm and those who share their names, read for Detectron2."""

import pytest
import timm.models.resnet as timm_resnet
import torch
import torchvision.models.resnet as tv_resnet
from resnet_references import (
    assert_equal,
    build,
    features_here,
    normalized,
    picture,
    randomized,
    stages_of,
)
from timm.models.resnetv2 import ResNetV2
from torch import nn

from gn_practical.weights import names_for, read_weights

ONE_EACH = [1, 1, 1, 1]


def torchvision_resnet(**kwargs):
    return randomized(tv_resnet.ResNet(tv_resnet.Bottleneck, ONE_EACH, **kwargs))


def timm_gn(norm_layer="groupnorm", **kwargs):
    kwargs = {"norm_layer": norm_layer, "base_width": 32, **kwargs}
    return randomized(timm_resnet.ResNet(timm_resnet.Bottleneck, ONE_EACH, **kwargs))


def reference(model):
    with torch.no_grad():
        return stages_of(model, normalized(picture()))


MODELS = {
    "torchvision": torchvision_resnet,
    "torchvision basic": lambda: randomized(tv_resnet.ResNet(tv_resnet.BasicBlock, ONE_EACH)),
    "torchvision next": lambda: torchvision_resnet(groups=32, width_per_group=4),
    "timm": lambda: randomized(timm_resnet.ResNet(timm_resnet.Bottleneck, ONE_EACH)),
    "timm gn": timm_gn,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_library_s_model_has_the_same_features(tmp_path, name):
    model = MODELS[name]()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    # The same keys could be anyone's, with another number of groups.
    weights = read_weights(str(tmp_path / "a.pth"), "timm_gn" if name == "timm gn" else None)
    assert_equal(features_here(weights, picture()), reference(model))
    assert not weights.unused
    assert name.split()[0] in weights.description.source
    assert "linear.weight" in weights.state


def test_group_norms_of_anyone_have_groups_of_their_own(tmp_path):
    torch.save(timm_gn().state_dict(), tmp_path / "a.pth")
    weights = read_weights(str(tmp_path / "a.pth"))
    assert weights.description.num_groups is None
    assert weights.description.input_format == "RGB"
    assert "timm_gn and of torchvision_gn" in weights.notes[0]
    (tmp_path / "a.pth").rename(tmp_path / "resnet50_gn_a1h2-8fe6c4d0.pth")
    named = read_weights(str(tmp_path / "resnet50_gn_a1h2-8fe6c4d0.pth"))
    assert named.description.num_groups == 32


def deep(stem_type="deep", stem_width=32, **kwargs):
    return timm_gn(stem_type=stem_type, stem_width=stem_width, **kwargs)


@pytest.mark.parametrize("make", [deep, lambda: deep(stem_width=64)], ids=["c", "s"])
def test_a_deep_stem_is_that_of_deeplab(tmp_path, make):
    model = make()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    weights = read_weights(str(tmp_path / "a.pth"))
    assert_equal(features_here(weights, picture()), reference(model))


def test_a_deep_stem_of_mmpretrain_is_that_of_deeplab(tmp_path):
    model = deep()
    rename = {"conv1.": "stem.", "bn1.": "stem.7."}
    state = {
        "backbone." + next((k.replace(a, b) for a, b in rename.items() if k.startswith(a)), k): v
        for k, v in model.state_dict().items()
        if not k.startswith("fc")
    }
    state["head.fc.weight"] = torch.zeros(10, 8)
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    weights = read_weights(str(tmp_path / "a.pth"))
    assert weights.description.source == "MMPretrain with group norm"
    assert_equal(features_here(weights, picture()), reference(model))


REFUSED = {
    "d, plain stem": (
        lambda: timm_gn(avg_down=True),
        "average 2x2 .* must .* have a deep stem, got .* a 7x7 stem",
    ),
    "tiered": (lambda: deep("deep_tiered", norm_layer="batchnorm"), "w, w, 2w .* got 24, 32, 64"),
    "attention": (
        lambda: timm_gn(block_args={"attn_layer": "se"}),
        r"parts of Detectron2's, got layer1\.0\.se\.fc1\.weight",
    ),
    "bit": (
        lambda: ResNetV2((1, 1, 1, 1)),
        "norms after its convolutions, got one of pre-activation",
    ),
    "small stem": (lambda: timm_gn(stem_type="", replace_stem_pool=False), "7x7"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_detectron2_cannot_express_is_refused_with_the_reason(tmp_path, name):
    make, message = REFUSED[name]
    model = make()
    if name == "small stem":
        model.conv1 = nn.Conv2d(3, 64, 3, bias=False)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message) as error:
        read_weights(str(tmp_path / "a.pth"))
    assert "a.pth" in str(error.value)


def test_the_backbone_alone_of_torchvision_s_detectors_is_taken(tmp_path):
    state = {f"backbone.body.{key}": v for key, v in torchvision_resnet().state_dict().items()}
    state["rpn.head.cls_logits.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "a.pth")
    weights = read_weights(str(tmp_path / "a.pth"))
    assert "stem.conv1.weight" in weights.state
    assert weights.unused == ("rpn.head.cls_logits.weight",)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.net = nn.ModuleDict({"bottom_up": inner})


def test_a_backbone_is_placed_under_the_model_s_prefix(tmp_path):
    source = torchvision_resnet()
    torch.save(source.state_dict(), tmp_path / "a.pth")
    weights = read_weights(str(tmp_path / "a.pth"))
    wanted = source.state_dict()
    backbone = build(weights.state, weights.description)
    state = names_for(Around(backbone), weights)
    assert torch.equal(state["net.bottom_up.res2.0.conv1.norm.bias"], wanted["layer1.0.bn1.bias"])
    assert set(Around(backbone).state_dict()) <= set(state)
    assert names_for(backbone, weights).keys() == weights.state.keys()
    # Into torchvision's own structure the names go back.
    for model, prefix in ((Around(torchvision_resnet()), "net.bottom_up."), (source, "")):
        state = names_for(model, weights)
        model.load_state_dict(state, strict=not prefix)
        for key, each in wanted.items():
            if "num_batches" not in key:
                assert torch.equal(model.state_dict()[prefix + key], each)


def test_names_of_nobody_are_the_model_s(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3))
    torch.save(model.state_dict(), tmp_path / "a.pth")
    weights = read_weights(str(tmp_path / "a.pth"))
    assert names_for(model, weights).keys() == model.state_dict().keys()
