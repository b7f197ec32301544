"""Weights beyond repair must not take the place of good ones."""

from collections.abc import Iterable, Mapping
from math import isfinite

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no value of any floating-point tensor is infinite or NaN; one pass, by their norm.

    Example:
        >>> all_finite([torch.ones(2), torch.full((2,), 1e30)])
        True
        >>> all_finite([torch.ones(2), torch.full((2,), torch.nan)])
        False
    """
    tensors = [tensor for tensor in tensors if tensor.numel()]
    # The 2-norm takes a thirtieth of the time on the CPU, but large values make it overflow.
    norms = (get_total_norm(tensors, norm_type=p) for p in (2.0, torch.inf))
    return any(isfinite(norm.item()) for norm in norms)


def require_finite_weights(weights: Mapping[str, Tensor]) -> None:
    """Raise a FloatingPointError if a state dict about to be saved is not finite."""
    weights = {name: value for name, value in weights.items() if value.is_floating_point()}
    if all_finite(weights.values()):
        return
    bad = [name for name, value in weights.items() if not value.isfinite().all()]
    raise FloatingPointError(
        f"weights must be finite to be saved, got {len(bad)} tensors that are not: "
        f"{', '.join(bad[:3])}. The checkpoints before are kept; lower SOLVER.BASE_LR or add "
        "SOLVER.CLIP_GRADIENTS.ENABLED True, and resume."
    )
