"""Relatives of group normalization, as baselines by config: ``NORM: "IN"``, "LN1", ...

A norm type is a class made from its number of channels, and an entry of ``BASELINES``. The
optimizer finds norms by the classes of torch, so each is one of these.
"""

import torch
import torch.fx
from torch import Tensor, nn

from gn_practical.layers.group_norm import FusedGroupNorm, refuse_single_values


class InstanceNorm(FusedGroupNorm):
    """Instance normalization (arXiv:1607.08022): as many groups as channels, and affine.

    Raises:
        ValueError: at run time, for one value a channel.

    Example:
        >>> InstanceNorm(64).num_groups
        64
    """

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__(num_channels, num_channels, eps)


class LayerNorm1(FusedGroupNorm):
    """Layer normalization as group norm knows it (arXiv:1803.08494): one group of all channels.

    Differences from Detectron2's "LN": statistics are of a whole sample, not of each pixel.

    Example:
        >>> LayerNorm1(64).num_groups
        1
    """

    def __init__(self, num_channels: int, eps: float = 1e-5) -> None:
        super().__init__(1, num_channels, eps)


class SwitchNorm(nn.InstanceNorm2d):
    """Switchable normalization (Luo et al., arXiv:1806.10779).

    y = γ (x − Σ w_k μ_k) / √(Σ w'_k σ²_k + eps) + β over k = instance, layer and batch statistics,
    with w and w' the softmax of three learned numbers each, which all channels of the layer share
    and which begin equal. Statistics are computed in float32 at least.

    The batch's statistics are those of the images of this GPU while training and moving averages
    in evaluation, with the momentum 0.1 of torch (0.9 in the authors' code), which is what that
    code does by default. So, unlike group norm, it depends on the batch; images are few in
    detection, and the weights w can turn to the other statistics. Frozen layers that train go on
    using the batch, which Detectron2's FREEZE_AT replaces for batch norm alone.

    Differences from the authors' code: the variance is the biased one, as in the paper, where
    their code takes the unbiased one of each instance; and the paper's inference by averages over
    several batches of a frozen network is not provided.

    Shape:
        - Input and output: (N, C, *)

    Example:
        >>> SwitchNorm(64)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps, momentum, affine=True, track_running_stats=True)
        self.mean_weight = nn.Parameter(torch.ones(3))
        self.var_weight = nn.Parameter(torch.ones(3))

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input`` of shape (N, C, *)."""
        averages = (self.running_mean, self.running_var)
        weights = (self.mean_weight.softmax(0), self.var_weight.softmax(0))
        momentum = self.momentum if self.training else 0.0
        return _switch_norm(input, *averages, *weights, self.weight, self.bias, momentum, self.eps)


@torch.fx.wrap  # one node of a traced graph: what it does depends on the input
def _switch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    mean_weight: Tensor,
    var_weight: Tensor,
    weight: Tensor,
    bias: Tensor,
    momentum: float,
    eps: float,
) -> Tensor:
    x = _pixels(input)
    var_in, mean_in = torch.var_mean(x, 2, correction=0, keepdim=True)  # of (N, C, 1)
    mean_ln, var_ln = _pool(mean_in, var_in, 1)
    mean_bn, var_bn = running_mean.view(1, -1, 1), running_var.view(1, -1, 1)
    if momentum > 0 and input.numel() > 0:
        mean_bn, var_bn = _pool(mean_in, var_in, 0)
        with torch.no_grad():
            running_mean.lerp_(mean_bn.flatten().to(running_mean.dtype), momentum)
            running_var.lerp_(var_bn.flatten().to(running_var.dtype), momentum)
    mean = mean_weight[0] * mean_in + mean_weight[1] * mean_ln + mean_weight[2] * mean_bn
    var = var_weight[0] * var_in + var_weight[1] * var_ln + var_weight[2] * var_bn
    y = (x - mean) * (var + eps).rsqrt() * weight[:, None] + bias[:, None]
    return y.to(input.dtype).reshape(input.shape)


def _pool(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean and variance of all values, from those of equally large parts along ``dim``.

    The paper's mean(σ² + μ²) − mean(μ)², without what cancels in it.
    """
    var_of_means, pooled = torch.var_mean(mean, dim, correction=0, keepdim=True)
    return pooled, var.mean(dim, keepdim=True) + var_of_means


class FilterResponseNorm(nn.InstanceNorm2d):
    """Filter response normalization with its TLU (Singh and Krishnan, arXiv:1911.09737).

    y = γ x / √(ν² + eps) + β with ν² the mean of x² over the pixels of each channel and sample: no
    mean is taken off. The activation is the thresholded linear unit z = max(y, τ), τ learned for
    each channel from 0 on, and takes the place of the ReLU. That is up to
    :func:`gn_practical.modeling.fusion.fuse_norms`, which gives τ to the norms that a ReLU follows,
    after the residual sum where there is one; a norm that none follows, as on a shortcut, has no
    τ. Statistics are computed in float32 at least.

    Differences from the paper: eps is fixed at its 1e-6 for all layers; where a channel holds one
    value, for which the paper learns eps, the layer refuses to run. Where the TLU stands in
    residual blocks is our choice: the paper says only that FRN and TLU replace norm and ReLU.

    Shape:
        - Input and output: (N, C, *)

    Raises:
        ValueError: at run time, for one value a channel.

    Example:
        >>> norm = FilterResponseNorm(64)
        >>> norm.take_relu()
        >>> norm(torch.randn(2, 64, 8, 8), relu=True).shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(self, num_features: int, eps: float = 1e-6) -> None:
        super().__init__(num_features, eps, affine=True)
        self.allow_degenerate = False  # as that of FusedGroupNorm
        self.register_parameter("tau", None)

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Normalize ``input`` of shape (N, C, *), add ``residual``, and with ``relu`` apply TLU."""
        return _filter_response_norm(
            input, self.weight, self.bias, self.tau, self.eps, residual, relu, self.allow_degenerate
        )

    def take_relu(self) -> None:
        """Make τ; frozen where the other parameters are."""
        if self.tau is None:
            zeros = torch.zeros_like(self.weight)
            self.tau = nn.Parameter(zeros, requires_grad=self.weight.requires_grad)

    def activate(self, y: Tensor) -> Tensor:
        """Apply the TLU."""
        return _threshold(y, self.tau)


@torch.fx.wrap
def _filter_response_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    tau: Tensor | None,
    eps: float,
    residual: Tensor | None,
    relu: bool,
    allow_degenerate: bool,
) -> Tensor:
    if not (torch.jit.is_scripting() or torch.jit.is_tracing()):
        refuse_single_values(input, "FilterResponseNorm", allow_degenerate)
    x = _pixels(input)
    scale = (x.square().mean(2, keepdim=True) + eps).rsqrt()
    y = (x * (weight[:, None] * scale) + bias[:, None]).reshape(input.shape)
    y = y if residual is None else y + residual
    return (_threshold(y, tau) if relu else y).to(input.dtype)


def _threshold(y: Tensor, tau: Tensor | None) -> Tensor:
    if tau is None:
        raise RuntimeError(
            "FilterResponseNorm must have taken the place of a ReLU before it applies its TLU, got "
            "tau=None. Call gn_practical.fuse_norms(model), or norm.take_relu()."
        )
    return torch.maximum(y, tau.to(y.dtype).view([-1] + [1] * (y.dim() - 2)))


def _pixels(input: Tensor) -> Tensor:
    """Return the input as (N, C, pixels), in float32 at least."""
    x = input.flatten(2) if input.dim() > 2 else input.unsqueeze(-1)
    return x if x.dtype == torch.float64 else x.float()


BASELINES: dict[str, type[nn.Module]] = {
    "IN": InstanceNorm,
    "LN1": LayerNorm1,
    "SwitchNorm": SwitchNorm,
    "FRN": FilterResponseNorm,
}
