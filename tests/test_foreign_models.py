"""Fusion, standardization and tracing on stand-ins for other people's models."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from detectron2.layers import Conv2d
from detectron2.layers.blocks import DepthwiseSeparableConv2d
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from gn_practical import PracticalGroupNorm, bind_group_norms, convert_to_ws, fuse_norms


def conv_norm(n_in, n_out, size=3):
    return [nn.Conv2d(n_in, n_out, size, padding=size // 2), PracticalGroupNorm(n_out)]


class Tower(nn.Module):
    """As FCOS: towers from a list that lives on, empty ones too, run over several levels."""

    def __init__(self):
        super().__init__()
        self.tower = []
        for _ in range(2):
            self.tower += [*conv_norm(4, 4), nn.ReLU()]
        self.cls_tower = nn.Sequential(*self.tower)
        self.share_tower = nn.Sequential()

    def forward(self, x):
        levels = [self.cls_tower(self.share_tower(level)) for level in (x, x[:, :, ::2, ::2])]
        for layer in self.tower:
            x = layer(x)
        return torch.cat([x.flatten(2), *(level.flatten(2) for level in levels)], 2)


class PixelDecoder(nn.Module):
    """As Mask2Former: convolutions with activation in a reversed plain list, empty projections."""

    def __init__(self):
        super().__init__()
        convs = [
            Conv2d(4, 4, 1, norm=PracticalGroupNorm(4)),
            Conv2d(4, 4, 3, padding=1, norm=PracticalGroupNorm(4), activation=F.relu),
        ]
        for i, conv in enumerate(convs):
            self.add_module(f"layer_{i}", conv)
        self.convs = convs[::-1]
        self.input_proj = nn.ModuleList([nn.Sequential(), nn.Sequential(*conv_norm(4, 4, 1))])

    def forward(self, x):
        for proj in self.input_proj:
            x = proj(x)
        for conv in self.convs:
            x = conv(x)
        return x


class Shuffle(nn.Module):
    """As ShuffleNet: one branch is empty in a block without stride."""

    def __init__(self):
        super().__init__()
        self.branch1 = nn.Sequential()
        self.branch2 = nn.Sequential(*conv_norm(4, 4, 1), nn.ReLU(inplace=True), *conv_norm(4, 4))

    def forward(self, x):
        return torch.cat([self.branch1(x), self.branch2(x)], 1)


class Taps(nn.Sequential):
    """A container with a forward of its own, which looks at what lies before the ReLU."""

    def __init__(self):
        super().__init__(*conv_norm(4, 4), nn.ReLU())

    def forward(self, x):
        outputs = []
        for layer in self:
            x = layer(x)
            outputs.append(x * 1)
        return torch.cat(outputs, 1)


class Shared(nn.Module):
    """One norm with a ReLU behind it and without, one ReLU for all, and an alias."""

    def __init__(self):
        super().__init__()
        norm, relu = PracticalGroupNorm(4), nn.ReLU()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.active = nn.Sequential(norm, relu)
        self.plain = nn.Sequential(norm, nn.Identity())
        self.alias = self.active
        self.relu = relu

    def forward(self, x):
        x = self.conv(x)
        return torch.cat([self.active(x), self.plain(x), self.alias(x), self.relu(x)], 1)


class Own(PracticalGroupNorm):
    """Somebody's norm, which takes no residual and no ReLU."""

    def forward(self, input):
        return super().forward(input) * 2


MODELS = {
    "tower": (Tower, 2),
    "pixel_decoder": (PixelDecoder, 1),
    "shuffle": (Shuffle, 1),
    "taps": (Taps, 0),
    "shared": (Shared, 1),
    "own": (lambda: nn.Sequential(nn.Conv2d(4, 4, 1), Own(4), nn.ReLU()), 0),
    "empty": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.Sequential()), 0),
}


@pytest.mark.parametrize("name", MODELS)
def test_fused_and_unfused_run_alike(name):
    torch.manual_seed(0)
    build, count = MODELS[name]
    model = build()
    in_channels = [("*", 4)] if any(True for m in model.modules() if hasattr(m, "bind")) else ()
    bind_group_norms(model, in_channels=in_channels)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.2, 0.5)
    fused = copy.deepcopy(model)
    assert len(fuse_norms(fused)) == count
    assert list(fused.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 4, 8, 8)
    outputs = [m(x) for m in (model, fused, pickle.loads(pickle.dumps(fused)))]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0])
    grads = [torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (model, fused)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
def test_feature_extractors_of_torchvision(fused):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(norm_layer=PracticalGroupNorm).eval()
    bind_group_norms(model)
    convert_to_ws(model)
    if fused:
        fuse_norms(model)
    features = {}
    handle = model.layer2.register_forward_hook(lambda m, args, y: features.update(layer2=y))
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    handle.remove()
    extracted = create_feature_extractor(model, ["layer2", "fc"])(x)
    torch.testing.assert_close(extracted, {**features, "fc": expected})


class ScaledConv2d(nn.Conv2d):
    """A foreign standardized convolution."""


class TridentConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_channels, self.out_channels = 4, 8
        self.weight = nn.Parameter(torch.randn(8, 4, 3, 3))
        self.norm = PracticalGroupNorm(8)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: nn.ConvTranspose2d(4, 8, 2), "a ConvTranspose2d"),
        (lambda: ScaledConv2d(4, 8, 2), "a ScaledConv2d"),
        (TridentConv, "a TridentConv"),
        (lambda: nn.Conv2d(8, 8, 1, groups=8), "filters of a single number"),
    ],
)
def test_what_cannot_be_standardized_is_named_with_its_type(layer, reason):
    layer = layer()
    layers = [layer] if isinstance(layer, TridentConv) else [layer, PracticalGroupNorm(8)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), PracticalGroupNorm(4), *layers)
    with pytest.raises(ValueError, match=rf"2 \({reason}\).*MODEL.WS.EXCLUDE.*exclude="):
        convert_to_ws(model)
    assert convert_to_ws(model, exclude=["2"]) == ["0"]


def test_depthwise_separable_convolutions_of_detectron2():
    model = DepthwiseSeparableConv2d(4, 8, padding=1, norm1="PGN", activation1=F.relu,
                                     norm2="PGN", activation2=F.relu)  # fmt: skip
    bind_group_norms(model)
    x = torch.randn(2, 4, 6, 6)
    expected = model(x)
    assert len(fuse_norms(model)) == 2
    torch.testing.assert_close(model(x), expected)


def test_factories_that_pass_device_and_dtype():
    """As timm calls ``norm_layer``."""
    norm = PracticalGroupNorm(8, device="meta", dtype=torch.bfloat16)
    assert norm.weight.is_meta
    assert norm.bias.dtype is torch.bfloat16
    assert PracticalGroupNorm(8, eps=1e-3, affine=False, device="cpu").weight is None
