"""Group normalization that learns its number of groups from the layer that feeds it."""

import logging
from functools import cache

import torch
import torch.fx
from torch import Tensor, nn

from gn_practical.layers.fused_group_norm import fused_group_norm
from gn_practical.num_groups import gradient_variance_ratio


class FusedGroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` on this package's operator, with residual and ReLU in the same pass.

    See :func:`~gn_practical.layers.fused_group_norm.fused_group_norm`; arguments and shapes are
    those of ``nn.GroupNorm``.

    Raises:
        ValueError: at run time, where a group holds a single value, C/G * H * W = 1: its output
            would be constant and its gradient zero.

    Example:
        >>> FusedGroupNorm(8, 64)(torch.randn(2, 64, 8, 8), relu=True).shape
        torch.Size([2, 64, 8, 8])
    """

    # Run groups of a single value, with a warning, for an experiment that shows what they do.
    allow_degenerate = False

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Normalize ``input`` of shape (N, C, *), then add ``residual``, then apply ReLU."""
        groups, weight, bias, eps = self.num_groups, self.weight, self.bias, self.eps
        if torch.jit.is_scripting():
            return fused_group_norm(input, groups, weight, bias, eps, residual, relu)
        return _run(input, groups, weight, bias, eps, residual, relu, self.allow_degenerate)


class PracticalGroupNorm(FusedGroupNorm):
    """Group normalization with the practical number of groups (Algorithm 1 of arXiv:2302.03193).

    A norm layer is made from its number of channels alone, as in ``get_norm("PGN", C)``, and the
    rule needs the input channels of the weight layer before it as well. So the layer is made
    unbound and refuses to run until :meth:`bind` sets its groups in place, by
    ``gn_practical.bind_group_norms`` for a whole model or by hand. It normalizes as
    :class:`FusedGroupNorm` does.

    Differences from the paper: groups of a single value are refused.

    Args:
        num_channels: C, channels of the input, and ``out_channels`` of the layer that feeds it.
        eps: as that of ``nn.GroupNorm``, and so are ``affine``, ``device`` and ``dtype``.

    Shape:
        - Input and output: (N, C, *)

    Raises:
        RuntimeError: at run time, while unbound.
        ValueError: at run time, where a group holds a single value.

    Example:
        >>> norm = PracticalGroupNorm(64)
        >>> norm.bind(in_channels=256, num_groups=64)
        >>> norm
        PracticalGroupNorm(256 -> 64, num_groups=64, eps=1e-05, affine=True)
        >>> norm(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    in_channels: int | None

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(1, num_channels, eps=eps, affine=affine, device=device, dtype=dtype)
        self.num_groups = 0
        self.in_channels = None

    @torch.jit.unused
    def bind(self, in_channels: int, num_groups: int) -> None:
        """Set the input channels of the weight layer that feeds this norm, and G, in place.

        Raises:
            ValueError: for anything that is no positive integer, or groups that do not divide.
        """
        gradient_variance_ratio(in_channels, self.num_channels, num_groups)  # checks all three
        self.in_channels = in_channels
        self.num_groups = num_groups

    def extra_repr(self) -> str:
        """Show both channels, the groups and the options."""
        channels = f"{self.in_channels or '?'} -> {self.num_channels}"
        groups = self.num_groups or "unbound"
        return f"{channels}, num_groups={groups}, eps={self.eps}, affine={self.affine}"


@torch.fx.wrap  # one node of a traced graph: what it does depends on the input
def _run(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    relu: bool,
    allow_degenerate: bool,
) -> Tensor:
    if not num_groups:
        raise RuntimeError(
            "PracticalGroupNorm must be bound to the layer that feeds it before it runs, got "
            f"num_groups={num_groups} for {input.shape[1]} channels. Call "
            "gn_practical.bind_group_norms(model) once, or norm.bind(in_channels, num_groups)."
        )
    if not torch.jit.is_tracing() and num_groups == input.shape[1]:
        refuse_single_values(input, f"num_groups={num_groups}", allow_degenerate)
    return fused_group_norm(input, num_groups, weight, bias, eps, residual, relu)


def refuse_single_values(input: Tensor, what: str, allow: bool) -> None:
    """Refuse an input (N, C, *) with one value a channel, for norms of each channel by itself.

    Raises:
        ValueError: if there is one; it names ``what`` has such groups, and ``allow`` makes it a
            warning.
    """
    if input.numel() != input.shape[0] * input.shape[1] or not input.numel():
        return
    message = (
        "A group must hold more than one value, or its output is constant and its gradient "
        f"zero, got {what} for an input of shape {tuple(input.shape)}. "
        "Choose fewer groups for this layer: MODEL.PGN.LAYER_NUM_GROUPS or "
        "norm.bind(in_channels, num_groups). MODEL.PGN.ALLOW_DEGENERATE True runs it as it is."
    )
    if not allow:
        raise ValueError(message)
    _warn_once(message)


@cache
def _warn_once(message: str) -> None:
    logging.getLogger(__name__).warning("Degenerate groups run as they were told to. %s", message)
