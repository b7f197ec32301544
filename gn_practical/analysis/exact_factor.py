"""The exact factor by which group normalization scales the variance of the gradient.

For a group of n Gaussian values x with biased variance s² and gradient dL/dx = P dL/dy / s, where P
projects out two directions of n (the constant one and y itself), σ² Var[dL/dx] / Var[dL/dy] is

    (n - 2) / n  ·  E[σ² / s²]  =  (n - 2) / n  ·  n / (n - 3)  =  (n - 2) / (n - 3),

where Eq. 22 of arXiv:2302.03193 has 1 + 4/n. docs/theory.md derives it, and what changes on a
convolution.
"""

from collections.abc import Callable
from math import inf

import numpy as np


def exact_factor(group_size: int, slope: float = 1.0) -> float:
    """Return (n - 1 - ρ) / (n - 3), the exact factor of a group of n independent Gaussian values.

    (n - 2) / (n - 3) for the ReLU family. It is infinite for n <= 3, and its sample mean has
    infinite variance for n <= 5.

    Args:
        group_size: n, values in a group.
        slope: ρ, as for :func:`convolution_factor`.

    Raises:
        ValueError: for a group size that is no integer above 1.

    Example:
        >>> exact_factor(4), round(exact_factor(16), 4)
        (2.0, 1.0769)
    """
    n = check_group_size(group_size)
    return (n - 1 - slope) / (n - 3) if n > 3 else inf


def convolution_factor(
    channels_per_group: int,
    spatial_size: int,
    shared: float = 1 / np.pi,
    eps: float = 0.0,
    slope: float = 1.0,
) -> float:
    """Return the factor of a group of c channels with m pixels each, for He's weights.

    The pixels of a channel share the part r of their variance, because they see the same filter
    and the input's mean is not zero. s² is then a sum of c - 1 shared values, weighing r, and of
    about c·m others: the factor lies between (n - 2) / (n - 3) with n = c (all shared, as on
    Linear) and the same with n = c·m (nothing shared).

    Args:
        channels_per_group: c = C / G.
        spatial_size: m = H·W of the norm's input.
        shared: r in [0, 1]; 1/π for the ReLU of white noise, E[relu(z)]² / E[relu(z)²].
        eps: the norm's ε over the variance of its input.
        slope: ρ = E[y² f'(y)²] / E[f'(y)²] of the activation f that follows; 1 for the ReLU family.

    Raises:
        ValueError: for sizes that are not positive, a group of one value, or r outside [0, 1].

    Example:
        >>> round(convolution_factor(64, 1024), 3), round(convolution_factor(4, 1), 3)
        (1.008, 2.0)
    """
    if not 0 <= shared <= 1:
        raise ValueError(
            f"shared must lie in [0, 1], got shared={shared}. It is the part of the variance that "
            "the pixels of a channel have in common."
        )
    c, m = channels_per_group, spatial_size
    n, large, small = check_group_size(c * m), shared * m + 1 - shared, 1 - shared
    powers = (c - 1) / 2, c * (m - 1) / 2
    if eps == 0 and powers[0] * (large > 0) + powers[1] * (small > 0) <= 1:
        return inf

    def laplace(t: np.ndarray) -> np.ndarray:  # the transform of s² + ε
        logs = powers[0] * np.log1p(2 * t * large / n) + powers[1] * np.log1p(2 * t * small / n)
        return np.exp(-t * eps - logs)

    # E[1/(s² + ε)], and with ε > 0 ε² E[1/(s² + ε)³]: y is not projected out entirely then.
    left_over = slope / n * eps**2 * integral(lambda t: t**2 * laplace(t)) / 2 if eps else 0.0
    return (n - 1 - slope) / n * integral(laplace) + left_over


def integral(
    function: Callable[[np.ndarray], np.ndarray], low: float = -30, high: float = 40
) -> float:
    """Integrate over t > 0 as the sum over v, from ``low`` to ``high``, with t = exp(v).

    Where the integrand is analytic in v and vanishes at both ends, such a sum converges faster
    than any power of the step.
    """
    step = 0.01
    t = np.exp(np.arange(low, high, step))
    return float((function(t) * t).sum() * step)


def check_group_size(group_size: int) -> int:
    """Return a group size that is an integer above 1; raise ValueError for any other."""
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 2:
        raise ValueError(
            f"group_size must be an integer above 1, got group_size={group_size!r}. "
            "A group of one value has a constant output and no gradient; use fewer groups."
        )
    return group_size
