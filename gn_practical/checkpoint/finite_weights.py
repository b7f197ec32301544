"""Weights beyond repair must not take the place of good ones."""

from math import isfinite

import torch
from torch import nn
from torch.nn.utils import get_total_norm


def require_finite_weights(model: nn.Module) -> None:
    """Raise if a weight or statistic is not finite: before it takes the name of a checkpoint.

    Args:
        model: about to be saved.

    Raises:
        FloatingPointError: with the first names.
    """
    state = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    # The 2-norm takes a thirtieth of the time on the CPU, but large values make it overflow.
    norms = (get_total_norm(state.values(), norm_type=p) for p in (2.0, torch.inf))
    if any(isfinite(norm.item()) for norm in norms):
        return
    bad = [name for name, value in state.items() if not value.isfinite().all()]
    raise FloatingPointError(
        f"weights must be finite to be saved, got {len(bad)} tensors that are not: "
        f"{', '.join(bad[:3])}. The checkpoints before are kept; lower SOLVER.BASE_LR or add "
        "SOLVER.CLIP_GRADIENTS.ENABLED True, and resume."
    )
