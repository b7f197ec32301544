"""ResNets of torchvision, timm and those who share their names, read for Detectron2."""

import pytest
import timm.models.resnet as timm_resnet
import torch
import torchvision.models.resnet as tv_resnet
from resnet_references import (
    assert_equal,
    features_here,
    normalized,
    picture,
    randomized,
    stages_of,
)

from gn_practical.weights import read_weights

ONE_EACH = [1, 1, 1, 1]


def torchvision_resnet(**kwargs):
    return randomized(tv_resnet.ResNet(tv_resnet.Bottleneck, ONE_EACH, **kwargs))


def timm_gn(**kwargs):
    return randomized(
        timm_resnet.ResNet(
            timm_resnet.Bottleneck, ONE_EACH, norm_layer="groupnorm", base_width=32, **kwargs
        )
    )


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
    weights = read_weights(str(tmp_path / "a.pth"))
    assert_equal(features_here(weights, picture()), reference(model))
    assert not weights.unused
    assert name.split()[0] in weights.description.source
    assert "linear.weight" in weights.state
