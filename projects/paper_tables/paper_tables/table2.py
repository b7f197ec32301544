"""Table 2: gains of eleven activations at three widths, beside the paper's and sampled ones."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from gn_practical.activation_gain import (
    activation_gain,
    elementwise_squares,
    resolve_activation,
)
from gn_practical.analysis import Row
from paper_tables.paper_numbers import TABLE2, TABLE2_ACTIVATIONS, TABLE2_SAMPLES

SIGMAS = (0.1, 1.0, 10.0)
QUANTITIES = ("F", "B", "B/F")
_CHUNK = 50_000


def table2_rows(
    activations: Iterable[str] = TABLE2_ACTIVATIONS,
    sigmas: Iterable[float] = SIGMAS,
    samples: int = 0,
    seed: int = 0,
    paper: Mapping[tuple[str, float, str], str] = TABLE2,
) -> list[Row]:
    """Compute F, B and B/F by quadrature, beside the paper's numbers and a Monte Carlo check.

    ``off`` says where the paper's number differs by more than half a unit of its last digit:
    "sampling" where that and three standard errors of the paper's own 10⁷ samples contain ours,
    "OFF" where they do not; ``sampled`` and ``z`` are the check by
    ``samples`` points: its mean, and its distance from the quadrature in standard errors.

    Args:
        activations: names in ``activation_gain.ACTIVATIONS``.
        sigmas: standard deviations σ.
        samples: Monte Carlo points per activation and σ; 0 for none.
        seed: of the Monte Carlo points.
        paper: numbers as printed, {(activation, σ, "F", "B" or "B/F"): digits}.

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
        spread = _sampled_errors(name, sigma, TABLE2_SAMPLES)
        for quantity in QUANTITIES:
            printed = paper.get((name, sigma, quantity))
            row = {"activation": name, "sigma": sigma, "gain": quantity, "ours": ours[quantity]}
            row |= {"paper": printed or "", "off": ""}
            if printed:
                row["off"] = _difference(ours[quantity], printed, spread[quantity])
            if samples:
                mean, error = sampled[quantity]
                row |= {"sampled": mean, "z": (mean - ours[quantity]) / max(error, 1e-12)}
            rows.append(row)
    return rows


def summary(rows: Sequence[Row]) -> str:
    """Return one sentence on how many of the paper's numbers differ, and by what.

    Example:
        >>> summary([{"paper": "0.53", "off": "OFF"}])[:43]
        '1 of 1 numbers differ by more than rounding'
    """
    printed = [row["off"] for row in rows if row["paper"]]
    off = printed.count("OFF")
    return (
        f"{len(printed) - printed.count('')} of {len(printed)} numbers differ by more than "
        f"rounding: {printed.count('sampling')} within 3 standard errors of 10⁷ samples, {off} not."
    )


def _difference(ours: float, printed: str, error: float) -> str:
    rounding = 0.5 * 10.0 ** -len(printed.partition(".")[2])
    distance = abs(ours - float(printed))
    if distance <= rounding + 1e-12:
        return ""
    return "sampling" if distance <= rounding + 3 * error else "OFF"


def _sampled_gain(
    name: str, sigma: float, samples: int, seed: int
) -> dict[str, tuple[float, float]]:
    """Return mean and standard error of F, B and B/F over Gaussian samples.

    F is over the samples' own variance, as Definition 2 reads. The samples are float32, as in a
    network; small chunks keep their sums exact enough.
    """
    generator = torch.Generator().manual_seed(seed)
    means, products = torch.zeros(3).double(), torch.zeros(3, 3).double()
    for start in range(0, samples, _CHUNK):
        z = torch.randn(min(_CHUNK, samples - start), generator=generator) * sigma
        squares = torch.vstack([elementwise_squares(*resolve_activation(name), z), z.square()])
        means += squares.double().sum(dim=1) / samples
        products += (squares @ squares.T).double() / samples
    return _gains(means, products, samples)


def _sampled_errors(name: str, sigma: float, samples: int) -> dict[str, float]:
    """Return the standard errors that ``samples`` points would have, from fewer of them."""
    few = 200_000
    found = _sampled_gain(name, sigma, few, seed=1)
    return {quantity: error * (few / samples) ** 0.5 for quantity, (_, error) in found.items()}


def _gains(means: Tensor, products: Tensor, samples: int) -> dict[str, tuple[float, float]]:
    """Turn moments of f(z)², f'(z)² and z² into the gains, errors by the delta method."""
    forward, backward, width = means.tolist()
    covariance = products - torch.outer(means, means)
    slopes = {
        "F": (1 / width, 0.0, -forward / width**2),
        "B": (0.0, 1.0, 0.0),
        "B/F": (-backward * width / forward**2, width / forward, backward / forward),
    }
    values = {
        "F": forward / width,
        "B": backward,
        "B/F": backward * width / forward,
    }
    result = {}
    for quantity, slope in slopes.items():
        slope = torch.tensor(slope, dtype=torch.float64)
        variance = (slope @ covariance @ slope).clamp(min=0) / samples
        result[quantity] = (values[quantity], variance.sqrt().item())
    return result
