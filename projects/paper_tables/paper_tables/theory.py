"""What theory predicts of the tables: the paper's factor, and the exact one of any activation."""

from math import cos, pi, sin

import numpy as np
import torch

from gn_practical.activation_gain import (
    Activation,
    elementwise_squares,
    resolve_activation,
)
from gn_practical.analysis.exact_factor import check_group_size, convolution_factor, integral
from gn_practical.analysis.exact_factor import exact_factor as of_linear
from gn_practical.num_groups import check_num_groups


def paper_factor(group_size: int) -> float:
    """Return 1 + 4/n, the paper's factor of a group of n values (Eq. 22).

    Example:
        >>> paper_factor(4), paper_factor(16)
        (2.0, 1.25)
    """
    return 1 + 4 / check_group_size(group_size)


def exact_factor(group_size: int, activation: Activation = "relu", eps: float = 0.0) -> float:
    """Return the exact factor of a group of n independent Gaussian values.

    (n - 1 - ρ) / (n - 3), with ρ = E[y² f'(y)²] / E[f'(y)²] over the normalized values y of such a
    group. ρ = 1 for the ReLU family (f' depends on the sign alone), whence (n - 2) / (n - 3). The
    expectation is infinite for n <= 3 without ``eps``, and its sample mean has infinite variance
    for n <= 5.

    Args:
        group_size: n, values in a group.
        activation: what follows the norm, as for ``activation_gain``.
        eps: the norm's ε over the variance σ² of its input.

    Raises:
        ValueError: for a group size that is no integer above 1.

    Example:
        >>> exact_factor(4), round(exact_factor(16), 4)
        (2.0, 1.0769)
    """
    n = check_group_size(group_size)
    rho = 1.0 if activation == "relu" else slope_moments(activation, n)[1]
    return convolution_factor(n, 1, 1.0, eps, rho) if eps else of_linear(n, rho)


def predicted_gradient_variance_ratio(
    in_channels: int,
    out_channels: int,
    num_groups: int,
    *,
    in_size: int = 1,
    out_size: int = 1,
    shared: float = 1 / pi,
    gain_ratio: float = 1.0,
    eps: float = 0.0,
) -> float:
    """Predict K of a unit block with a Linear or convolutional weight layer.

    K = (n_out·m_out) / (n_in·m_in) · factor / (F/B): Eq. 31 with the exact factor and with values
    in place of channels. A stride s makes m_in / m_out = s²; the kernel and "same" padding cancel,
    because forward and backward count the same connections.

    Differences from the paper: the factor, see :func:`convolution_factor`, and the two sizes.

    Args:
        in_channels: n_in of the weight layer.
        out_channels: n_out of the weight layer.
        num_groups: G of the norm.
        in_size: m_in = H·W of the weight layer's input, in pixels; 1 for Linear.
        out_size: m_out = H·W of its output, in pixels; 1 for Linear.
        shared: r, the shared part of the variance, for ``out_size`` > 1.
        gain_ratio: F/B of the activation. Where the input is no activation of a norm but, say, a
            residual sum with second moment M, give M/B; a norm with scale γ multiplies B by γ².
        eps: the norm's ε over the variance of its input.

    Raises:
        ValueError: for groups that do not divide ``out_channels``, and as
            :func:`convolution_factor`.

    Example:
        >>> round(predicted_gradient_variance_ratio(256, 128, 32), 6)
        1.0
        >>> round(predicted_gradient_variance_ratio(128, 64, 1, in_size=1024, out_size=256), 3)
        0.126
    """
    check_num_groups(num_groups, out_channels)
    factor = convolution_factor(out_channels // num_groups, out_size, shared, eps)
    return out_channels * out_size / (in_channels * in_size) * factor / gain_ratio


def shared_fraction(features: torch.Tensor) -> float:
    """Measure r, the part of the second moment that the pixels of a channel have in common.

    The mean over channels of (mean over pixels)², over that of the mean of squares. Taken from the
    input of a norm whose convolution has independent filters, it is what
    :func:`convolution_factor` wants; a convolution hands on the r of its own input, less what zero
    padding takes at the border.

    Args:
        features: input of the norm.

    Shape:
        features: (N, C, H, W).

    Raises:
        ValueError: for features that are not four-dimensional, or all zero.

    Example:
        >>> shared_fraction(torch.ones(1, 2, 4, 4))
        1.0
    """
    if features.dim() != 4 or not features.any():
        raise ValueError(
            f"features must be a non-zero (N, C, H, W) tensor, got shape={tuple(features.shape)}. "
            "Give the output of a convolution."
        )
    features = features.detach().double()
    return (features.mean(dim=(2, 3)).square().mean() / features.square().mean()).item()


def relu_shared(shared: float) -> float:
    """Map r of a norm's output to r of its ReLU: the arc-cosine kernel of order one.

    Repeated, it tends to 1: with depth the pixels of a channel become alike and groups of channels
    count as on Linear.

    Example:
        >>> round(relu_shared(0.0) * pi, 6), relu_shared(1.0)
        (1.0, 1.0)
    """
    angle = np.arccos(shared)
    return float((sin(angle) + (pi - angle) * cos(angle)) / pi)


def linear_input_correction(in_features: int) -> float:
    """Return (n_in - 1) E[F / |u|²], by which few input features change K of a Linear block.

    For u the ReLU of n_in independent unit Gaussians. The block's backward pass loses one of n_in
    directions (dL/dx is orthogonal to x = W u), and 1/σ² fluctuates with |u|²: 1 + 4/n_in in all.
    For some tens of features and more; with few, all may be zero at once, which is left out.

    Example:
        >>> round(linear_input_correction(128), 3)
        1.033
    """
    # E[1/q] = ∫ E[exp(-t q)] dt
    reciprocal = integral(lambda t: (0.5 + 0.5 / (1 + 2 * t) ** 0.5) ** in_features, -25, 12)
    return 0.5 * (in_features - 1) * reciprocal


def slope_moments(activation: Activation, n: int) -> tuple[float, float]:
    """Return E[f'(y)²] and ρ = E[y² f'(y)²] / E[f'(y)²] in a group of n values.

    A normalized value of n Gaussians is √(n-1) sin θ, θ with density cos(θ)^(n-3). The first tends
    to the backward gain B as n grows.

    Args:
        activation: as for ``activation_gain``.
        n: values in a group, 2 or more.

    Example:
        >>> [round(value, 6) for value in slope_moments("relu", 8)]
        [0.5, 1.0]
    """
    if n == 2:
        y, weights = torch.tensor([-1.0, 1.0], dtype=torch.float64), torch.full((2,), 0.5)
    else:
        theta = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000 * pi - pi / 2
        y, weights = (n - 1) ** 0.5 * theta.sin(), theta.cos() ** (n - 3)
    slopes = elementwise_squares(*resolve_activation(activation), y)[1] * weights
    return (slopes.sum() / weights.sum()).item(), ((y**2 * slopes).sum() / slopes.sum()).item()
