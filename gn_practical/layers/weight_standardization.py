"""Weight standardization of convolutions."""

from typing import Any, NamedTuple

import torch
import torch.fx
from detectron2.layers import Conv2d
from torch import Tensor

from gn_practical.layers.backends import (
    agrees,
    differentiable_grads,
    kernels_run,
    relative_difference,
)
from gn_practical.layers.torch_internals import convolve, is_plain, layer_norm_backward, version

EPS = 1e-5


@torch.fx.wrap  # one node of a traced graph: what it does depends on the weight
def standardize_weight(weight: Tensor, eps: float = EPS) -> Tensor:
    """Standardize each output filter: (W - mean) / (std + eps), with the unbiased std.

    This is the definition of Qiao et al., "Weight Standardization" (arXiv:1903.10520), as the
    weights that its authors published use it. Other codes differ: BiT and timm take the biased
    variance and put eps under the root. Computed in float32 at least and returned in the dtype of
    ``weight``.

    Args:
        weight: filters; the first dimension counts them.
        eps: added to the standard deviation.

    Shape:
        - Input and output: (out_channels, in_channels / groups, kernel height, kernel width)

    Raises:
        ValueError: if a filter holds a single number, which has no standard deviation.

    Example:
        >>> w = standardize_weight(torch.randn(8, 4, 3, 3) + 5)
        >>> w.flatten(1).std(1).allclose(torch.ones(8), atol=1e-4)
        True
    """
    if torch.jit.is_scripting():
        return _compose(weight, eps)
    fan_in = weight.shape[1:].numel()
    if fan_in < 2:
        raise ValueError(
            "Weight standardization needs filters of at least two numbers, got fan_in="
            f"{fan_in} for a weight of shape {tuple(weight.shape)}. Exclude the layer with "
            "MODEL.WS.EXCLUDE."
        )
    if eps and is_plain(weight) and kernels_run(weight, _kernels_agree):
        return _StandardizeOnKernels.apply(weight, eps)
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or not eps:
        return _compose(weight, eps)
    flat = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    return _Standardize.apply(flat, eps)[0].to(weight.dtype).view_as(weight)


def _compose(weight: Tensor, eps: float) -> Tensor:
    """The definition, in PyTorch's operators; differentiable any number of times."""
    flat = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    # torch's own std, for its gradient of zero where a filter is constant.
    std, mean = torch.std_mean(flat, 1, keepdim=True)
    return ((flat - mean) / (std + eps)).to(weight.dtype).view_as(weight)


class _Standardize(torch.autograd.Function):
    """The definition at the cost of PyTorch's layer norm, a fifth of what its parts cost.

    Layer norm gives z = (W - mean) r, r = 1 / (biased std). With κ² = K / (K - 1) for K numbers a
    filter, the unbiased std is s = κ / r, and y = z / t with t = r (s + eps) = κ + eps r.
    The gradient dW = (dy - mean(dy) - z mean(dy z) s / (s + eps)) / (s + eps) is that of layer
    norm at x̂ = z √(s / (s + eps)) = y √(κ t).
    """

    @staticmethod
    def forward(flat: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        # Against division by zero only, below what std + eps can show in this precision.
        floor = (eps * torch.finfo(flat.dtype).eps) ** 2
        y, _, r = torch.native_layer_norm(flat, flat.shape[1:], None, None, floor)
        y.div_(torch.rsub(r, _kappa(flat), alpha=-eps))
        return y, r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        flat, ctx.eps = inputs
        ctx.save_for_backward(flat, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, None]:
        flat, y, r = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *differentiable_grads(lambda w: _compose(w, ctx.eps), (flat,), dy), None
        kappa = _kappa(flat)
        t = torch.rsub(r, kappa, alpha=-ctx.eps)
        # In a constant filter x̂ is rounding error alone, and its term must vanish.
        factor = (t * kappa).sqrt_().masked_fill_(t > 1e6, 1.0)
        grad, _, _ = layer_norm_backward(
            dy, y, y.shape[1:], torch.zeros_like(r), factor, None, None, [True, False, False]
        )
        return grad.mul_(r / (t * factor)), None


class _StandardizeOnKernels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, eps: float) -> Tensor:
        from gn_practical.layers import weight_standardization_kernels  # Triton is optional

        ctx.kernels, ctx.eps = weight_standardization_kernels, eps
        y, stats = ctx.kernels.forward(weight, eps)
        ctx.save_for_backward(weight, stats)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:
        weight, stats = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *differentiable_grads(lambda w: _compose(w, ctx.eps), (weight,), dy), None
        return ctx.kernels.backward(dy, weight, stats, ctx.eps), None


def _kernels_agree(device: torch.device) -> bool:
    return agrees(_largest_difference, device)


def _largest_difference(device: torch.device) -> float:
    weight = torch.linspace(0, 99, 8 * 3000, device=device).sin().view(8, -1)
    return relative_difference(
        lambda w: _StandardizeOnKernels.apply(w, EPS), lambda w: _compose(w, EPS), (weight,)
    )


def _kappa(flat: Tensor) -> float:
    return (flat.shape[1] / (flat.shape[1] - 1)) ** 0.5


class _Cache(NamedTuple):
    source: Tensor  # an alias of the weight: keeps its memory, so that no other takes the address
    version: int
    standardized: Tensor

    def holds(self, weight: Tensor) -> bool:
        return (
            self.source.data_ptr() == weight.data_ptr()
            and self.source.dtype == weight.dtype
            and self.version == version(weight)
        )


class WSConv2d(Conv2d):
    """A ``detectron2.layers.Conv2d`` whose filters are standardized before each use.

    See :func:`standardize_weight` for the definition. Where no gradient flows to the weight (at
    inference, and in frozen stages) the standardized weight is computed once and kept until the
    weight changes in place or is replaced, as an optimizer, ``load_state_dict`` or ``.to()`` do.
    Only writes through ``weight.data``, which PyTorch does not count, go unseen, until the next
    ``train()`` or ``eval()``.

    Parameters, state-dict keys and arguments are those of ``detectron2.layers.Conv2d``, so
    ``conv.__class__ = WSConv2d`` converts a layer in place.

    Shape:
        - Input: (N, in_channels, H, W)
        - Output: (N, out_channels, H', W')

    Raises:
        ValueError: at run time, if a filter holds a single number.

    Example:
        >>> conv = WSConv2d(4, 8, kernel_size=3, padding=1)
        >>> conv(torch.randn(2, 4, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
    """

    _cache: _Cache | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` with the standardized weight, then apply ``norm`` and ``activation``."""
        x = self.convolve(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x

    def convolve(self, x: Tensor) -> Tensor:
        """Convolve ``x`` with the standardized weight."""
        if torch.jit.is_scripting():
            return self._conv_forward(x, standardize_weight(self.weight), self.bias)
        return convolve(self, x, self._standardized_weight(x))

    @torch.jit.unused
    def _standardized_weight(self, x: Tensor) -> Tensor:
        weight = self.weight
        if isinstance(x, torch.fx.Proxy):
            return standardize_weight(weight)
        needs_grad = torch.is_grad_enabled() and weight.requires_grad
        if needs_grad or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return standardize_weight(weight)
        if self._cache is None or not self._cache.holds(weight):
            # Not in inference mode: such a tensor could not take part in training later on.
            with torch.inference_mode(False), torch.no_grad():
                standardized = standardize_weight(weight.detach())
            self._cache = _Cache(weight.detach(), version(weight), standardized)
        return self._cache.standardized

    def train(self, mode: bool = True) -> "WSConv2d":
        """Switch the mode and drop the kept weight."""
        self._cache = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle gets its own weight, so it must not take the kept one along.
        return {key: value for key, value in self.__dict__.items() if key != "_cache"}
