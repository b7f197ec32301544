import math

import pytest
import torch
from scipy import integrate, stats

from gn_practical.activation_gain import ACTIVATIONS, activation_gain, gain_ratio

SIGMAS = (0.1, 1.0, 10.0)


def hard_tanh_gains(sigma):
    inside = math.erf(1 / sigma / math.sqrt(2))
    density = math.exp(-0.5 / sigma**2) / math.sqrt(2 * math.pi)
    return inside - 2 * density / sigma + (1 - inside) / sigma**2, inside


@pytest.mark.parametrize("sigma", [*SIGMAS, 0.003, 300.0])
@pytest.mark.parametrize(("name", "gain"), [("relu", 0.5), ("identity", 1.0), ("prelu", 0.53125)])
def test_homogeneous_activations_have_one_gain_at_every_width(name, gain, sigma):
    assert activation_gain(name, sigma) == pytest.approx((gain, gain), abs=1e-9)


@pytest.mark.parametrize("slope", [-0.5, 0.01, 0.3, 2.0])
def test_prelu_gain_is_half_of_one_plus_slope_squared(slope):
    expected = (1 + slope**2) / 2
    module = torch.nn.PReLU(init=slope)
    assert activation_gain(module) == pytest.approx((expected, expected), rel=1e-6)
    assert gain_ratio(module) == 1.0


@pytest.mark.parametrize("sigma", SIGMAS)
def test_kinks_away_from_zero_match_the_closed_form(sigma):
    assert activation_gain("hardtanh", sigma) == pytest.approx(hard_tanh_gains(sigma), abs=1e-9)


def test_unknown_kink_is_found():
    a = 0.123456789
    forward, backward = activation_gain(lambda z: (z - a).relu())
    tail, density = stats.norm.sf(a), stats.norm.pdf(a)
    assert forward == pytest.approx((1 + a * a) * tail - a * density, abs=1e-9)
    assert backward == pytest.approx(tail, abs=1e-9)


def test_jump_adds_nothing_to_the_backward_gain():
    forward, backward = activation_gain(lambda z: torch.where(z > 0.7, z + 3, z))
    expected = 1 + 6 * stats.norm.pdf(0.7) + 9 * stats.norm.sf(0.7)
    assert forward == pytest.approx(expected, abs=1e-9)
    assert backward == pytest.approx(1.0, abs=1e-9)


REFERENCES = {
    "tanh": (math.tanh, lambda z: 1 - math.tanh(z) ** 2),
    "softplus": (
        lambda z: max(z, 0) + math.log1p(math.exp(-abs(z))),
        lambda z: 0.5 + 0.5 * math.tanh(z / 2),
    ),
    "gelu": (lambda z: z * stats.norm.cdf(z), lambda z: stats.norm.cdf(z) + z * stats.norm.pdf(z)),
    "elu": (lambda z: z if z > 0 else math.expm1(z), lambda z: 1 if z > 0 else math.exp(z)),
}


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("name", REFERENCES)
def test_smooth_activations_match_an_independent_quadrature(name, sigma):
    value, slope = REFERENCES[name]
    expected = [
        integrate.quad(
            lambda t, f=f: f(sigma * t) ** 2 * math.exp(-t * t / 2) / math.sqrt(2 * math.pi),
            *(-12, 12),
            points=[-0.3, 0, 0.3],
            limit=500,
            epsabs=1e-12,
        )[0]
        for f in (value, slope)
    ]
    forward, backward = activation_gain(name, sigma)
    assert forward == pytest.approx(expected[0] / sigma**2, rel=1e-6, abs=1e-6)
    assert backward == pytest.approx(expected[1], abs=1e-6)


def test_growth_beyond_any_polynomial_is_integrated():
    forward, backward = activation_gain(torch.exp)
    assert forward == pytest.approx(math.exp(2), rel=1e-6)
    assert backward == pytest.approx(math.exp(2), rel=1e-6)


def test_selu_keeps_unit_variance():
    assert activation_gain("selu")[0] == pytest.approx(1.0, abs=1e-6)


def test_inplace_and_float32_modules_are_accepted_and_left_alone():
    module = torch.nn.PReLU().train()
    assert activation_gain(torch.nn.ReLU(inplace=True)) == pytest.approx((0.5, 0.5))
    activation_gain(module)
    assert module.training
    assert module.weight.dtype == torch.float32


def test_gain_ratio_is_forward_over_backward():
    forward, backward = activation_gain("tanh")
    assert gain_ratio("tanh") == pytest.approx(forward / backward, abs=1e-8)


def test_names_are_case_insensitive():
    assert activation_gain("ReLU") == activation_gain("relu")


@pytest.mark.parametrize(
    ("activation", "message"),
    [
        ("rellu", "Known names: relu, leaky_relu"),
        (3, "must be a known name or a callable, got activation=3"),
        (torch.ones_like, "must have a gradient, got activation=ones_like"),
        (lambda z: z * 0 + 2, "must have a gradient"),
        (torch.sign, "must have a gradient, got activation=sign"),
        (torch.sqrt, "NaN or infinity at z=-"),
        (lambda z: z.sum(), "must be elementwise"),
        (lambda z: None, "must be elementwise, got NoneType"),
    ],
)
def test_bad_activations_are_refused(activation, message):
    with pytest.raises(ValueError, match=message):
        activation_gain(activation)


@pytest.mark.parametrize("sigma", [0, -1.0, math.inf, math.nan])
def test_sigma_must_be_positive(sigma):
    with pytest.raises(ValueError, match="sigma must be positive and finite, got sigma="):
        activation_gain("relu", sigma)


def test_every_name_has_gains():
    assert all(min(activation_gain(name)) > 0 for name in ACTIVATIONS)
