"""PracticalGroupNorm and WSConv2d against formulas in float64, and the life of the kept weight."""

import copy
import pickle

import pytest
import torch
from torch import nn

from gn_practical.layers import PracticalGroupNorm, WSConv2d, standardize_weight

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4e-2}


def bound_norm(in_channels, num_channels, num_groups, dtype=torch.float32):
    norm = PracticalGroupNorm(num_channels).to(dtype)
    norm.bind(in_channels, num_groups)
    return norm


def reference_group_norm(x, weight, bias, num_groups, eps):
    grouped = x.reshape(x.shape[0], num_groups, -1)
    mean = grouped.sum(-1, keepdim=True) / grouped.shape[-1]
    variance = ((grouped - mean) ** 2).sum(-1, keepdim=True) / grouped.shape[-1]
    normalized = ((grouped - mean) / (variance + eps) ** 0.5).reshape(x.shape)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    return normalized * weight.reshape(shape) + bias.reshape(shape)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_groups", [1, 4, 12])
@pytest.mark.parametrize("shape", [(2, 12, 5, 7), (3, 12, 4)])
def test_group_norm_equals_the_formula(dtype, num_groups, shape):
    torch.manual_seed(0)
    norm = bound_norm(24, 12, num_groups, dtype)
    with torch.no_grad():
        norm.weight.normal_(1, 0.3)
        norm.bias.normal_(0, 0.3)
    x = (torch.randn(shape, dtype=torch.float64) * 2 + 3).to(dtype)
    upstream = torch.randn(shape, dtype=torch.float64).to(dtype)
    inputs = [t.detach().requires_grad_() for t in (x, norm.weight, norm.bias)]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    expected = reference_group_norm(*doubles, num_groups, norm.eps)
    grads = torch.autograd.grad(expected, doubles, upstream.double())

    x = inputs[0]
    result = norm(x)
    result_grads = torch.autograd.grad(result, [x, norm.weight, norm.bias], upstream)
    for actual, wanted in zip((result, *result_grads), (expected, *grads), strict=True):
        error = (actual.double() - wanted).abs().max()
        assert error <= TOLERANCE[dtype] * (1 + wanted.abs().max())


def test_unbound_norm_refuses_to_run():
    norm = PracticalGroupNorm(64)
    assert "? -> 64, num_groups=unbound" in repr(norm)
    with pytest.raises(RuntimeError, match=r"must be bound .* Call gn_practical.bind_group_norms"):
        norm(torch.randn(2, 64, 4, 4))


def test_repr_shows_channels_and_groups():
    assert "256 -> 64, num_groups=32" in repr(bound_norm(256, 64, 32))


def test_bind_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match=r"num_groups must divide .* num_groups=7 for 64 channels"):
        PracticalGroupNorm(64).bind(64, 7)


def test_degenerate_groups_are_refused_and_only_those():
    norm = bound_norm(784, 512, 512)
    with pytest.raises(ValueError, match=r"got num_groups=512 for an input of shape \(16, 512\)"):
        norm(torch.randn(16, 512))
    with pytest.raises(ValueError, match="A group must hold more than one value"):
        norm(torch.randn(16, 512, 1, 1))
    assert norm(torch.randn(16, 512, 1, 2)).shape == (16, 512, 1, 2)
    assert norm(torch.randn(0, 512, 3, 3)).shape == (0, 512, 3, 3)
    assert bound_norm(784, 512, 256)(torch.randn(16, 512)).shape == (16, 512)


def test_checkpoints_of_gn_and_pgn_load_into_each_other():
    gn, pgn = nn.GroupNorm(4, 12), bound_norm(24, 12, 4)
    nn.init.normal_(gn.weight)
    pgn.load_state_dict(gn.state_dict())
    x = torch.randn(2, 12, 3, 3)
    assert torch.equal(gn(x), pgn(x))
    gn.load_state_dict(pgn.state_dict())


def reference_standardization(weight, eps=1e-5):
    rows = []
    for w in weight:
        mean = w.sum() / w.numel()
        std = (((w - mean) ** 2).sum() / (w.numel() - 1)) ** 0.5
        rows.append((w - mean) / (std + eps))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (5, 8, 1, 1), (4, 1, 3, 3)])
def test_standardization_equals_the_formula(dtype, shape):
    torch.manual_seed(0)
    # Filters of a small spread show where eps stands and which variance is taken.
    weight = (torch.randn(shape, dtype=torch.float64) * 1e-3 + 0.01).to(dtype).requires_grad_()
    double = weight.detach().double().requires_grad_()
    upstream = torch.randn(shape, dtype=torch.float64).to(dtype)
    expected = reference_standardization(double)
    (wanted,) = torch.autograd.grad(expected, double, upstream.double())
    result = standardize_weight(weight)
    (grad,) = torch.autograd.grad(result, weight, upstream)
    assert (result.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    assert (grad.double() - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max()


def test_a_filter_of_one_number_is_refused():
    with pytest.raises(ValueError, match=r"got fan_in=1 .*MODEL.WS.EXCLUDE"):
        WSConv2d(8, 8, 1, groups=8)(torch.randn(1, 8, 4, 4))


def fresh(conv, x):
    """What the layer must give, computed from its present weight by the formula."""
    weight = reference_standardization(conv.weight.detach().double()).to(conv.weight.dtype)
    return nn.functional.conv2d(x, weight, conv.bias, conv.stride, conv.padding)


@pytest.fixture
def conv():
    torch.manual_seed(0)
    return WSConv2d(4, 6, 3, padding=1).eval()


@pytest.fixture
def x():
    return torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))


def check(conv, x):
    torch.testing.assert_close(conv(x), fresh(conv, x), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_weight_is_standardized_once_at_inference(conv, x, monkeypatch):
    calls = []
    module = "gn_practical.layers.weight_standardization.standardize_weight"
    monkeypatch.setattr(module, lambda w: calls.append(1) or standardize_weight(w))
    for _ in range(3):
        check(conv, x)
    assert len(calls) == 1


def test_kept_weight_follows_every_change(conv, x):
    with torch.no_grad():
        check(conv, x)
        conv.load_state_dict({k: v + torch.rand_like(v) for k, v in conv.state_dict().items()})
        check(conv, x)
    optimizer = torch.optim.SGD(conv.parameters(), lr=1.0)
    conv.train()
    conv(x).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        check(conv, x)
        conv.eval()
        check(conv, x)
        optimizer.step()  # without a switch of mode in between
        check(conv, x)
        conv.weight = nn.Parameter(torch.randn_like(conv.weight))
        check(conv, x)
        check(conv.to(torch.float64), x.double())
        check(conv.to(torch.float32), x)
        conv.weight.data = torch.randn_like(conv.weight)
        check(conv, x)
        conv.train()
        conv.weight.data.mul_(torch.rand(6, 4, 3, 3))
        conv.eval()
        check(conv, x)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_have_a_weight_of_their_own(conv, x, duplicate):
    with torch.no_grad():
        check(conv, x)
        other = duplicate(conv)
        other.weight.add_(torch.rand_like(other.weight))
        check(other, x)
        check(conv, x)


def test_frozen_layer_keeps_its_weight_and_passes_the_gradient_on(conv, x):
    conv.weight.requires_grad_(False)
    x.requires_grad_()
    conv(x).square().sum().backward()
    assert conv._cache is not None
    assert x.grad.abs().sum() > 0


def test_training_after_inference_mode(conv, x):
    conv.weight.requires_grad_(False)
    with torch.inference_mode():
        conv(x)
    x.requires_grad_()
    conv(x).sum().backward()  # would raise on a weight made in inference mode


def test_gradient_reaches_the_weight(conv, x):
    conv.train()
    conv(x).square().sum().backward()
    assert conv.weight.grad.abs().sum() > 0
    # Standardized weights do not change with the mean of a filter: its gradient sums to zero.
    assert conv.weight.grad.flatten(1).sum(1).abs().max() < 1e-3 * conv.weight.grad.abs().max()


def test_norm_and_activation_of_detectron2_apply(x):
    conv = WSConv2d(4, 6, 3, padding=1, norm=nn.GroupNorm(2, 6), activation=nn.ReLU())
    expected = torch.relu(conv.norm(fresh(conv, x)))
    torch.testing.assert_close(conv(x), expected, atol=1e-4, rtol=1e-4)


def test_constant_filter_has_a_finite_gradient():
    weight = torch.ones(2, 3, 3, 3, requires_grad=True)
    standardize_weight(weight).sum().backward()
    assert torch.isfinite(weight.grad).all()


def test_modules_script_and_trace():
    norm, x = bound_norm(24, 12, 4), torch.randn(2, 12, 5, 6)
    nn.init.normal_(norm.weight)
    for module in (norm, WSConv2d(12, 12, 3, norm=norm, activation=nn.ReLU()).eval()):
        expected = module(x)
        for made in (torch.jit.script(module), torch.jit.trace(module, x)):
            torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.fx.symbolic_trace(module)(x), expected)
    torch.testing.assert_close(torch.jit.script(norm)(x, x, True), norm(x, x, True))
