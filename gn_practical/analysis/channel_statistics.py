"""What the channels of a norm's output do: which are always or never positive, how many count."""

import torch
from torch import Tensor

_POSITIONS = 1024  # of a call, evenly spaced: enough to compare some hundred channels


class ChannelStatistics:
    """Ranges and covariance of the channels of a tensor over images, pixels and calls.

    Example:
        >>> statistics = ChannelStatistics()
        >>> statistics.add(torch.tensor([[-1.0, 2.0], [-3.0, 4.0]]))
        >>> statistics.dead(), statistics.always_on(), statistics.effective_rank()
        (0.5, 0.5, 1.0)
    """

    def __init__(self) -> None:
        self._low: Tensor | None = None

    def add(self, values: Tensor) -> None:
        """Count a tensor in.

        Shape:
            values: (N, C, *).
        """
        values = values.detach()
        dims = [dim for dim in range(values.dim()) if dim != 1]
        low, high = values.amin(dims), values.amax(dims)
        rows = values.movedim(1, -1).reshape(-1, values.shape[1])
        rows = rows[:: -(-len(rows) // _POSITIONS)].float()
        if self._low is None:
            self._low, self._high, self._count = low, high, 0
            self._sum = rows.new_zeros(values.shape[1])
            self._products = rows.new_zeros(values.shape[1], values.shape[1])
        self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)
        self._count += len(rows)
        self._sum += rows.sum(dim=0)
        self._products += rows.T @ rows

    def dead(self) -> float | None:
        """Return the share of channels that are positive nowhere, which a ReLU turns to zero."""
        return None if self._low is None else (self._high <= 0).double().mean().item()

    def always_on(self) -> float | None:
        """Return the share of channels that are positive everywhere, which a ReLU leaves alone."""
        return None if self._low is None else (self._low > 0).double().mean().item()

    def effective_rank(self) -> float | None:
        """Return (tr Σ)² / tr Σ² of the channels' covariance Σ over images and pixels.

        The number of equally strong, uncorrelated channels with the same ratio: from 1, where all
        channels are multiples of one, to C. None where nothing varies.
        """
        if self._low is None:
            return None
        mean = self._sum.double() / self._count
        covariance = self._products.double() / self._count - torch.outer(mean, mean)
        square = covariance.square().sum()
        if not square > 1e-24 * (self._products.double() / self._count).square().sum():
            return None
        return (covariance.trace().square() / square).item()
