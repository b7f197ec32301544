"""Forward and backward gain of an activation, by quadrature (Definition 2).

For z ~ N(0, σ²) and an activation f,

    F = E[f(z)²] / σ²      the gain of the second moment in the forward pass,
    B = E[f'(z)²]          the gain of the gradient's variance in the backward pass.

Both are ½ for ReLU at every σ. Section 2.3 of arXiv:2302.03193 puts their ratio F / B at σ = 1,
where group normalization places its output, before n_in in the ideal number of groups.
"""

import copy
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SAME_NAME = (
    *("relu", "leaky_relu", "elu", "selu", "gelu", "silu", "mish", "softplus", "tanh", "sigmoid"),
    *("relu6", "hardtanh", "hardswish", "softsign", "logsigmoid"),
)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(F, name) for name in _SAME_NAME},  # leaky_relu: slope 0.01
    "prelu": lambda z: F.leaky_relu(z, 0.25),  # at its initial slope
    "identity": lambda z: z,
}
Activation = str | Callable[[Tensor], Tensor]

_REACH = 14.0  # standard deviations integrated on either side; beyond lies 1e-44
_NODES, _WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(16))
_TOLERANCE = 1e-11  # of a panel, relative to the integral
_MAX_BISECTIONS = 60  # a kink is then enclosed to the last bit of float64


def activation_gain(activation: Activation, sigma: float = 1.0) -> tuple[float, float]:
    """Compute the forward and backward gain of an activation (Definition 2).

    Composite Gauss-Legendre sums in float64, each panel halved until both integrands agree with
    their halves: panels close in on a kink or jump by themselves. Absolute error below 1e-9 for
    everything in ``ACTIVATIONS``. The derivative is autograd's: a jump of f adds nothing to B.

    Args:
        activation: a name in ``ACTIVATIONS``, or an elementwise callable on tensors (a function or
            an ``nn.Module``, which is copied to float64 and put into evaluation mode).
        sigma: standard deviation σ of the activation's input.

    Returns:
        (F, B).

    Raises:
        ValueError: for an unknown name, a σ that is not positive, an activation that is not
            elementwise, gives NaN or infinity, or is constant.

    Example:
        >>> forward, backward = activation_gain("relu")
        >>> round(forward, 9), round(backward, 9)
        (0.5, 0.5)
    """
    if not 0 < sigma < float("inf"):
        raise ValueError(
            f"sigma must be positive and finite, got sigma={sigma}. "
            "Give the standard deviation of the activation's input; after a norm it is 1."
        )
    name, function = resolve_activation(activation)
    with torch.device("cpu"):  # also while a model is built on another device
        moments = _gaussian_moments(partial(elementwise_squares, name, function), sigma)
    forward, backward = moments[0] / sigma**2, moments[1]
    if backward == 0:
        raise ValueError(
            f"activation must have a gradient, got activation={name} with f'(z) = 0 for every "
            f"z ~ N(0, {sigma:g}²): its gain is zero and no gradient passes. "
            "Choose an activation that is not constant."
        )
    return forward, backward


def gain_ratio(activation: Activation) -> float:
    """Return F / B at σ = 1, the factor before n_in in the ideal number of groups (Section 2.3).

    Arguments and errors are those of :func:`activation_gain`.

    Example:
        >>> round(gain_ratio("leaky_relu"), 9)
        1.0
    """
    forward, backward = activation_gain(activation)
    # Positively homogeneous activations have 1 exactly; the quadrature's last digits must not
    # tip a tie between two divisors.
    return round(forward / backward, 9)


def resolve_activation(activation: Activation) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Return the name and the float64 function of an activation given by name or as a callable.

    Raises:
        ValueError: for an unknown name or something that is not callable.
    """
    if isinstance(activation, str) and activation.lower() in ACTIVATIONS:
        return activation.lower(), ACTIVATIONS[activation.lower()]
    if isinstance(activation, nn.Module):
        return type(activation).__name__, copy.deepcopy(activation).cpu().double().eval()
    if callable(activation):
        return getattr(activation, "__name__", repr(activation)), activation
    raise ValueError(
        f"activation must be a known name or a callable, got activation={activation!r}. Give an "
        f"elementwise function of a tensor, or a name. Known names: {', '.join(ACTIVATIONS)}."
    )


def elementwise_squares(name: str, function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Return f(z)² and f'(z)² for every z, (2, N) for (N,), of a :func:`resolve_activation`.

    Raises:
        ValueError: as :func:`activation_gain`.

    Example:
        >>> elementwise_squares("relu", torch.relu, torch.tensor([-2.0, 3.0])).tolist()
        [[0.0, 9.0], [0.0, 1.0]]
    """
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        value = function(leaf + 0)  # not the leaf itself: in-place activations are welcome
        if not isinstance(value, Tensor) or value.shape != z.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"activation must be elementwise, got {got} from activation={name} for an input "
                f"of shape {tuple(z.shape)}. Give a function of each value alone."
            )
        slope = torch.zeros_like(z)
        if value.requires_grad:  # a constant may have no graph
            slope = torch.autograd.grad(value.sum(), leaf, materialize_grads=True)[0]
    squares = torch.stack((value.detach(), slope)) ** 2
    bad = ~squares.isfinite().all(dim=0)
    if bad.any():
        raise ValueError(
            f"activation must be finite with a finite derivative, got activation={name} with NaN "
            f"or infinity at z={z[bad][0].item():.6g}. Mend the activation or lower sigma."
        )
    return squares


def _gaussian_moments(integrand: Callable[[Tensor], Tensor], sigma: float) -> tuple[float, ...]:
    """Integrate several functions at once against N(0, σ²) by adaptive bisection."""
    # The first panels are at the scale of the Gaussian, and at that of the activation, about 1.
    reach, own = _REACH * sigma, 2.0 ** torch.arange(-6, 7, dtype=torch.float64)
    gaussian, own = torch.linspace(-reach, reach, 57, dtype=torch.float64), own[own < reach]
    edges = torch.cat((gaussian, own, -own)).unique()
    left, right = edges[:-1], edges[1:]
    total = whole = _panel_sums(integrand, left, right, sigma)
    accepted = torch.zeros_like(total.sum(dim=1))
    for _ in range(_MAX_BISECTIONS):
        middle = (left + right) / 2
        first = _panel_sums(integrand, left, middle, sigma)
        second = _panel_sums(integrand, middle, right, sigma)
        halves = first + second
        total = accepted + halves.sum(dim=1)
        open_ = ((halves - whole).abs() > _TOLERANCE * total[:, None]).any(dim=0)
        accepted = accepted + halves[:, ~open_].sum(dim=1)
        if not open_.any():
            break
        middle = middle[open_]
        left, right = torch.cat((left[open_], middle)), torch.cat((middle, right[open_]))
        whole = torch.cat((first[:, open_], second[:, open_]), dim=1)
    return tuple(total.tolist())


def _panel_sums(
    integrand: Callable[[Tensor], Tensor], left: Tensor, right: Tensor, sigma: float
) -> Tensor:
    half = (right - left)[:, None] / 2
    z = (left + right)[:, None] / 2 + half * _NODES
    density = torch.exp(-0.5 * (z / sigma) ** 2) / (sigma * (2 * torch.pi) ** 0.5)
    return (integrand(z.flatten()).view(-1, *z.shape) * (density * half * _WEIGHTS)).sum(dim=-1)
