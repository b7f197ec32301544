"""Measure what one unit block does to the variance of the gradient, with real layers and autograd.

A unit block is weight layer, group normalization, activation: x = W u, y = GN(x), z = f(y). With
V(t) the mean of (dL/dt)² over all values of t, four ratios are measured:

    A = V(u) / V(x)   the weight layer          theory  n_out Var[W] = 2 n_out / n_in
    B = V(x) / V(y)   the normalization         theory  (1 + 4/n_g) / σ², or the exact factor
    C = V(y) / V(z)   the activation            theory  its backward gain, ½ for ReLU
    D = V(u) / V(z)   the block, K = A B C      theory  (n_out + 4 G) / n_in, Eq. 31

Sampled anew for each draw: Gaussian weights of variance 2/fan_in (He), no bias; for each of the
draw's inputs: u = ReLU of unit Gaussians, so that σ² = Var[x] = 1, and the loss's own numbers.

The loss is L = Σ v·z with v ~ N(0, 1) independent of everything, so that dL/dz = v. This gives
C = ½. A plain sum has dL/dz = 1, whose variance is zero, and most of it is projected out by the
normalization. Half a sum of squares has dL/dz = z, which is zero where the ReLU is: C = 1. With
half the squared distance to a random target it is z - v: C = ⅔ in mean squares.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gn_practical.num_groups import check_num_groups

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "random": lambda z, v: (z * v).sum(),
    "distance": lambda z, v: 0.5 * (z - v).square().sum(),
    "sum": lambda z, v: z.sum(),
    "squares": lambda z, v: 0.5 * z.square().sum(),
}
RATIOS = {"A": (0, 1), "B": (1, 2), "C": (2, 3), "D": (0, 3)}


@dataclass(frozen=True)
class Estimate:
    """A measured ratio: mean and standard error over independent draws of the weights.

    Example:
        >>> Estimate(1.02, 0.01).agrees(1.0)
        True
    """

    mean: float
    error: float

    def agrees(self, theory: float, errors: float = 3, relative: float = 0.03) -> bool:
        """Say whether ``theory`` lies within some standard errors or a relative distance.

        Example:
            >>> Estimate(1.2, 0.01).agrees(1.0)
            False
        """
        return abs(self.mean - theory) <= max(errors * self.error, relative * abs(theory))


def gradient_squares(
    weight_layer: Callable[[Tensor], Tensor],
    u: Tensor,
    num_groups: int,
    *,
    draws: int = 1,
    loss: str = "random",
    activation: Callable[[Tensor], Tensor] = torch.relu,
    generator: torch.Generator | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Run one unit block forward and backward and return V(u), V(x), V(y), V(z).

    Args:
        weight_layer: maps u to x, the input of the norm.
        u: input; its first dimension counts the draws, or is a multiple of them.
        num_groups: G.
        draws: independent parts to average over one by one.
        loss: a name in ``LOSSES``.
        activation: f.
        generator: source of the loss's random numbers.
        eps: ε of the norm.

    Shape:
        output: (draws, 4), float64.

    Raises:
        ValueError: for an unknown loss, or groups that do not divide the channels of x.

    Example:
        >>> gradient_squares(torch.nn.Linear(16, 8), torch.randn(5, 16), 2).shape
        torch.Size([1, 4])
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got loss={loss!r}.")
    u = u.detach().requires_grad_()
    x = weight_layer(u)
    check_num_groups(num_groups, x.shape[1])
    y = F.group_norm(x, num_groups, eps=eps)
    z = activation(y)
    target = torch.randn(z.shape, generator=generator)
    gradients = torch.autograd.grad(LOSSES[loss](z, target), (u, x, y, z))
    squares = [g.reshape(draws, -1).square().mean(dim=1).double() for g in gradients]
    return torch.stack(squares, dim=1)


def linear_gradients(
    in_features: int,
    out_features: int,
    num_groups: int,
    draws: int,
    inputs_per_draw: int,
    *,
    activation: Callable[[Tensor], Tensor] = torch.relu,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw Linear unit blocks, as the module says, and return V(u), V(x), V(y), V(z) of each.

    Args:
        in_features: n_in.
        out_features: n_out.
        num_groups: G.
        draws: weight matrices, all held at once.
        inputs_per_draw: inputs through each of them.
        activation: f.
        generator: source of the random numbers.

    Shape:
        output: (draws, 4), float64.

    Raises:
        ValueError: as :func:`gradient_squares`.

    Example:
        >>> linear_gradients(16, 8, 2, draws=3, inputs_per_draw=5).shape
        torch.Size([3, 4])
    """
    weight = torch.randn(draws, in_features, out_features, generator=generator)
    weight *= (2 / in_features) ** 0.5
    u = torch.randn(draws, inputs_per_draw, in_features, generator=generator).relu_()
    return gradient_squares(
        lambda t: torch.bmm(t, weight).flatten(0, 1),
        u,
        num_groups,
        draws=draws,
        activation=activation,
        generator=generator,
    )


def he_filters(
    in_channels: int, out_channels: int, kernel: int, generator: torch.Generator | None = None
) -> Tensor:
    """Draw convolution weights of variance 2 / (n_in k²).

    Example:
        >>> he_filters(4, 8, 3).shape
        torch.Size([8, 4, 3, 3])
    """
    weight = torch.randn(out_channels, in_channels, kernel, kernel, generator=generator)
    return weight * (2 / (in_channels * kernel**2)) ** 0.5


def relu_maps(
    images: int,
    channels: int,
    size: int,
    shared: float = 0.0,
    blur: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the ReLU of Gaussian feature maps of unit variance.

    Args:
        images: N.
        channels: C.
        size: height and width.
        shared: part of the variance before the ReLU that all pixels of a channel have in common.
        blur: side of the box that correlates neighbouring pixels; 1 for none.
        generator: source of the random numbers.

    Shape:
        output: (N, C, size, size).

    Example:
        >>> relu_maps(2, 3, 8).shape
        torch.Size([2, 3, 8, 8])
    """
    wide = size + blur - 1
    noise = torch.randn(images, channels, wide, wide, generator=generator)
    noise = F.avg_pool2d(noise, blur, stride=1) * blur
    common = torch.randn(images, channels, 1, 1, generator=generator)
    return ((1 - shared) ** 0.5 * noise + shared**0.5 * common).relu_()


def estimate_ratios(squares: Tensor) -> dict[str, Estimate]:
    """Turn V(u), V(x), V(y), V(z) of independent draws into A, B, C and D with standard errors.

    Args:
        squares: from :func:`linear_gradients` or several :func:`gradient_squares`.

    Shape:
        squares: (draws, 4).

    Raises:
        ValueError: for a gradient that is zero or not finite, or fewer than two draws.

    Example:
        >>> estimate_ratios(torch.tensor([[2.0, 2, 1, 2], [2, 2, 1, 2]]))["B"].mean
        2.0
    """
    if len(squares) < 2 or not squares.isfinite().all() or (squares.mean(dim=0) == 0).any():
        raise ValueError(
            "gradients must be finite and not all zero in at least two draws, got means "
            f"{squares.mean(dim=0).tolist()} over {len(squares)} draws. Use groups of more than "
            "two values and more draws."
        )
    return {name: ratio_of_means(squares[:, i], squares[:, j]) for name, (i, j) in RATIOS.items()}


def ratio_of_means(numerator: Tensor, denominator: Tensor) -> Estimate:
    """Estimate mean(numerator) / mean(denominator) from paired draws, with its standard error.

    Shape:
        numerator, denominator: (draws,).

    Example:
        >>> ratio_of_means(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 2.0]))
        Estimate(mean=2.0, error=0.0)
    """
    # The scatter of numerator minus ratio times denominator is that of a ratio estimator.
    mean = numerator.mean() / denominator.mean()
    scatter = (numerator - mean * denominator).std() / denominator.mean()
    return Estimate(mean.item(), (scatter / len(numerator) ** 0.5).item())
