"""Table 2: gains of eleven activations at three widths, beside the paper's and a Monte Carlo check.

The paper's text was not at hand when this was written: neither its numbers nor its list of eleven
activations is known here, and none is made up. ``read_paper`` takes them from a CSV file.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from gn_practical.activation_gain import (
    activation_gain,
    elementwise_squares,
    resolve_activation,
)
from gn_practical.analysis import Row
from paper_tables.files import read_rows

# Our choice: the activations in common use, first those with one scale (B/F = 1 at every σ).
TABLE2_ACTIVATIONS = (
    *("relu", "leaky_relu", "prelu", "elu", "selu", "gelu", "silu", "mish"),
    *("softplus", "tanh", "sigmoid"),
)
SIGMAS = (0.1, 1.0, 10.0)
PAPER_SAMPLES = 10_000_000
NOT_AT_HAND = "not at hand"
QUANTITIES = ("F", "B", "B/F")
_CHUNK = 50_000

PaperNumbers = dict[tuple[str, float, str], str]


def table2_rows(
    activations: Iterable[str] = TABLE2_ACTIVATIONS,
    sigmas: Iterable[float] = SIGMAS,
    samples: int = 0,
    seed: int = 0,
    paper: PaperNumbers | None = None,
) -> list[Row]:
    """Compute F, B and B/F by quadrature, beside the paper's numbers and a Monte Carlo check.

    ``off`` says where the paper's number differs by more than half a unit of its last digit and
    three standard errors of the paper's own 10⁷ samples; ``sampled`` and ``z`` are the check by
    ``samples`` points: its mean, and its distance from the quadrature in standard errors.

    Args:
        activations: names in ``activation_gain.ACTIVATIONS``.
        sigmas: standard deviations σ.
        samples: Monte Carlo points per activation and σ; 0 for none.
        seed: of the Monte Carlo points.
        paper: the paper's numbers as printed, from :func:`read_paper`.

    Raises:
        ValueError: as ``activation_gain``.

    Example:
        >>> rows = table2_rows(["relu"], [1.0])
        >>> [row["ours"] for row in rows]
        [0.5, 0.5, 1.0]
    """
    cases = [(name, sigma) for name in activations for sigma in sigmas]
    rows = []
    for name, sigma in tqdm(cases, desc="gains", disable=None if samples else True):
        forward, backward = activation_gain(name, sigma)
        ours = dict(zip(QUANTITIES, (forward, backward, backward / forward), strict=True))
        sampled = _sampled_gain(name, sigma, samples, seed) if samples else {}
        for quantity in QUANTITIES:
            printed = (paper or {}).get((name, sigma, quantity))
            row = {"activation": name, "sigma": sigma, "gain": quantity, "ours": ours[quantity]}
            row |= {"paper": printed or NOT_AT_HAND, "off": ""}
            if printed:
                spread = _sampled_errors(name, sigma, PAPER_SAMPLES)[quantity]
                row["off"] = "OFF" if _differs(ours[quantity], printed, spread) else ""
            if samples:
                mean, error = sampled[quantity]
                row |= {"sampled": mean, "z": (mean - ours[quantity]) / max(error, 1e-12)}
            rows.append(row)
    return rows


def read_paper(path: str | Path) -> PaperNumbers:
    """Read the paper's numbers from a CSV file with the columns activation, sigma, F, B and B/F.

    The numbers stay text: the digits that are printed tell how they were rounded.

    Raises:
        ValueError: for a file that is missing, lacks a column, or holds something else.

    Example:
        >>> read_paper("paper_table2.csv")  # doctest: +SKIP
    """
    numbers = {}
    for row in read_rows(path, ("activation", "sigma", *QUANTITIES)):
        for quantity in QUANTITIES:
            try:
                float(row[quantity])
                numbers[row["activation"].lower(), float(row["sigma"]), quantity] = row[quantity]
            except ValueError:
                raise ValueError(
                    f"{path} must hold numbers, got {quantity}={row[quantity]!r} for "
                    f"{row['activation']} at sigma={row['sigma']!r}. Correct that line."
                ) from None
    return numbers


def _differs(ours: float, printed: str, error: float) -> bool:
    mantissa, _, exponent = printed.lower().partition("e")
    digits = len(mantissa.partition(".")[2]) - int(exponent or 0)
    return abs(ours - float(printed)) > 0.5 * 10.0**-digits + 3 * error


def _sampled_gain(
    name: str, sigma: float, samples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Return mean and standard error of F, B and B/F over Gaussian samples.

    The samples are float32, as in a network; small chunks keep their sums exact enough.
    """
    generator = torch.Generator().manual_seed(seed)
    means, products = torch.zeros(2).double(), torch.zeros(2, 2).double()
    for start in range(0, samples, _CHUNK):
        z = torch.randn(min(_CHUNK, samples - start), generator=generator) * sigma
        squares = elementwise_squares(*resolve_activation(name), z)
        means += squares.sum(dim=1) / samples
        products += squares @ squares.T / samples
    scale = torch.tensor([sigma**-2, 1.0], dtype=torch.float64)
    return _moments(means * scale, products * scale * scale[:, None], samples)


def _sampled_errors(name: str, sigma: float, samples: int) -> dict[str, float]:
    """Return the standard errors that ``samples`` points would have, from fewer of them."""
    few = 200_000
    found = _sampled_gain(name, sigma, few, seed=1)
    return {quantity: error * (few / samples) ** 0.5 for quantity, (_, error) in found.items()}


def _moments(means: Tensor, products: Tensor, samples: int) -> dict[str, tuple[float, float]]:
    forward, backward = means.tolist()
    ratio = backward / forward
    covariance = products - torch.outer(means, means)
    # The ratio's by the delta method: that of (B - ratio F) / F.
    slopes = {"F": (1.0, 0.0), "B": (0.0, 1.0), "B/F": (-ratio / forward, 1 / forward)}
    values = {"F": forward, "B": backward, "B/F": ratio}
    result = {}
    for quantity, slope in slopes.items():
        slope = torch.tensor(slope, dtype=torch.float64)
        variance = (slope @ covariance @ slope).clamp(min=0) / samples
        result[quantity] = (values[quantity], variance.sqrt().item())
    return result
