"""Scales and shifts for new norms: the former moments return, and nothing else changes."""

import copy

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock, ResNet
from torch import nn

from gn_practical import PracticalGroupNorm, bind_group_norms, fuse_norms
from gn_practical.modeling import recalibrate_norms


def resnet(norm):
    """A narrow ResNet of Detectron2 with bottlenecks, its weights and scales not the initial."""
    torch.manual_seed(0)
    stages = ResNet.make_stage(
        *(BottleneckBlock, 2), in_channels=8, out_channels=16, bottleneck_channels=8, norm=norm
    )
    model = ResNet(BasicStem(3, 8, norm), [stages])
    return rough(model)


def rough(model):
    generator = torch.Generator().manual_seed(1)
    for name, values in model.state_dict().items():
        if values.dim() == 1:
            noise = torch.rand(values.shape, generator=generator)
            values.copy_(noise + 0.5 if name.endswith(("weight", "var")) else noise - 0.5)
    return model


def pictures(number=3, channels=3):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(2, channels, 24, 24, generator=generator) + 0.5 for _ in range(number)]


def outputs(model, batches):
    """Return what every norm returns on the batches, by path, flat for each channel."""
    kept, handles = {}, []
    for path, module in model.named_modules():
        if hasattr(module, "eps"):
            handles.append(
                module.register_forward_hook(
                    lambda module, args, y, path=path: kept.setdefault(path, []).append(
                        y.detach().double().transpose(0, 1).flatten(1)
                    )
                )
            )
    mode = model.training
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    model.train(mode)
    for handle in handles:
        handle.remove()
    return {path: torch.cat(values, 1) for path, values in kept.items()}


def assert_moments_equal(model, reference, batches, tolerance=2e-4):
    own, former = outputs(model, batches), outputs(reference, batches)
    assert own.keys() == former.keys()
    for path, values in own.items():
        expected = former[path]
        close = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(values.mean(1), expected.mean(1), **close, msg=path)
        torch.testing.assert_close(values.std(1), expected.std(1), **close, msg=path)


FORMERS = {
    "GN4": lambda channels: nn.GroupNorm(4, channels),
    "BN": nn.BatchNorm2d,
    "FrozenBN": FrozenBatchNorm2d,
}


@pytest.mark.parametrize("former", FORMERS)
@pytest.mark.parametrize("fused", [False, True])
def test_the_moments_of_the_former_norms_return(former, fused):
    reference = resnet(FORMERS[former])
    model = resnet(PracticalGroupNorm)
    model.load_state_dict(reference.state_dict(), strict=False)
    bind_group_norms(model)
    if fused:
        assert fuse_norms(model)
    with pytest.raises(AssertionError):
        assert_moments_equal(model, reference, pictures())
    paths = recalibrate_norms(model, pictures(), reference)
    assert len(paths) == 8
    assert paths.index("stem.conv1.norm") == 0
    assert_moments_equal(model, reference, pictures())


def test_the_outputs_come_nearer_to_those_of_before():
    reference = resnet(FORMERS["GN4"])
    model = resnet(lambda channels: nn.GroupNorm(1, channels))
    model.load_state_dict(reference.state_dict())
    other = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(5)) + 0.5

    def distance():
        with torch.no_grad():
            return (model(other)["res2"] - reference(other)["res2"]).square().mean().item()

    before = distance()
    recalibrate_norms(model, pictures(), reference)
    assert distance() < before / 2


def test_the_former_number_of_groups_stands_for_the_model():
    model = resnet(lambda channels: nn.GroupNorm(4, channels))
    reference = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = 1
    by_number = copy.deepcopy(model)
    recalibrate_norms(model, pictures(), reference)
    recalibrate_norms(by_number, pictures(), 4)
    state = by_number.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"divide the channels.*reference=3 for 8 channels at"):
        recalibrate_norms(model, pictures(), 3)


def test_equal_norms_keep_their_parameters():
    reference = resnet(FORMERS["GN4"])
    model = copy.deepcopy(reference)
    recalibrate_norms(model, pictures(), reference)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[key], rtol=1e-4, atol=1e-4)


class Backwards(nn.Module):
    """Lists its layers in the other order than it runs them."""

    def __init__(self):
        super().__init__()
        self.norm2, self.conv2 = nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 3)
        self.norm1, self.conv1 = nn.GroupNorm(4, 8), nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))


class Shared(nn.Module):
    """A tower on three levels, as RetinaNet's, whose norm is under two names."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU())
        self.alias = self.tower[1]
        self.levels = [1, 2, 3]

    def forward(self, x):
        return [self.tower(x[..., ::level, ::level]) for level in self.levels]


@pytest.mark.parametrize("kind", [Backwards, Shared])
def test_the_order_is_that_of_the_runs_and_shared_norms_count_all_calls(kind):
    torch.manual_seed(0)
    model = rough(kind())
    reference = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.num_groups = 1
    paths = recalibrate_norms(model, pictures(), reference)
    assert paths == {Backwards: ["norm1", "norm2"], Shared: ["tower.1"]}[kind]
    assert_moments_equal(model, reference, pictures())


def test_signs_zeros_and_dead_channels():
    torch.manual_seed(0)
    reference = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    with torch.no_grad():
        reference[1].weight.copy_(torch.tensor([1.0, -1, 0, 2, -2, 1, 1, 1]))
        reference[0].weight[7], reference[0].bias[7] = 0, 0.3
    model = copy.deepcopy(reference)
    model[1].num_groups = 1
    recalibrate_norms(model, pictures(), reference)
    signs = [1.0, -1, 0, 1, -1, 1, 1]
    assert model[1].weight[:7].sign().tolist() == signs
    assert model.state_dict()["1.weight"].isfinite().all()
    assert_moments_equal(model, reference, pictures())


def test_only_scales_and_shifts_change():
    reference = resnet(FORMERS["BN"])
    model = resnet(lambda channels: nn.GroupNorm(1, channels))
    model.load_state_dict(reference.state_dict(), strict=False)
    seen = []
    model.stem.conv1.norm.register_forward_hook(lambda *_: seen.append(1))
    model.train()
    model.stem.eval()
    modes = [module.training for module in model.modules()]
    for parameter in model.stem.parameters():
        parameter.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    theirs = {key: value.clone() for key, value in reference.state_dict().items()}
    reference.train()
    recalibrate_norms(model, pictures(), reference)
    assert [module.training for module in model.modules()] == modes
    assert all(module.training for module in reference.modules())
    assert all(len(m._forward_hooks) == (m is model.stem.conv1.norm) for m in model.modules())
    assert not any(m._forward_hooks for m in reference.modules())
    assert all(torch.equal(value, theirs[key]) for key, value in reference.state_dict().items())
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {key for key in before if ".norm." in key}
    assert not any(p.requires_grad for p in model.stem.parameters())
    assert all(p.grad is None and p.is_leaf for p in model.parameters())


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.idle = nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.GroupNorm(1, 8)

    def forward(self, x):
        return self.norm(self.conv(x))


def test_what_cannot_be_recalibrated_is_named_and_nothing_changes():
    model = Idle()
    before = copy.deepcopy(model.state_dict())
    cases = [
        (model, r"must run on the batches, got 1 of 2 .*: idle\. Give more", copy.deepcopy(model)),
        (model, r"must be another model .*got Idle without one at norm, idle", model),
        (model, r"got Sequential without one at norm, idle", nn.Sequential()),
        (nn.Conv2d(3, 8, 3), r"with scale and shift, got none in Conv2d", nn.Conv2d(3, 8, 3)),
        (nn.Sequential(nn.GroupNorm(1, 3, affine=False)), r"got 0 in Sequential", nn.Sequential()),
    ]
    for each, message, reference in cases:
        with pytest.raises(ValueError, match=message):
            recalibrate_norms(each, pictures(), reference)
    with pytest.raises(ValueError, match=r"got 2 of 2 that do not"):
        recalibrate_norms(model, [], copy.deepcopy(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
