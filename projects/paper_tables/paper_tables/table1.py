"""Table 1 of the paper in its own design: two unit blocks with weights of unit variance.

Unit Gaussians x0 go through two blocks (Linear without bias, group norm, ReLU), W1 n_in × n_in and
W2 n_in × n_out, all entries N(0, 1). Everything is measured on the second block, y = W2 u, z =
GN(y), x = ReLU(z), with V(t) the biased variance of dL/dt over the features of one input:

    A = V(u) / V(y)             Eq. 9    n_out Var[W] = n_out
    B = σ² V(y) / V(z)          Eq. 22   1 + 4/n_g, with σ² the variance of y over its features
    C = V(z) / V(x)             Eq. 26   the backward gain, ½
    D = V(u) / V(x)             Eq. 30   (n_out / n_in) (1 + 4/n_g)

A measured value is the mean of such ratios over inputs, as "an average over 10⁵ experiments" reads.
Not said in the paper and chosen here: the first block has G groups too, 100 inputs share a pair of
weight matrices, and L = Σ v·x with random v (``unit_block.LOSSES``: most other losses miss C).
"""

from collections.abc import Iterable
from math import acos, pi, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from gn_practical.analysis import Row
from gn_practical.num_groups import check_num_groups
from paper_tables.paper_numbers import TABLE1
from paper_tables.theory import exact_factor, paper_factor
from paper_tables.unit_block import LOSSES, Estimate

BLOCKS = tuple(TABLE1)  # (n_in, n_out, G)
RATIOS = ("A", "B", "C", "D")
INPUTS_PER_DRAW = 100


def table1_rows(
    blocks: Iterable[tuple[int, int, int]] = BLOCKS,
    experiments: int = 100_000,
    seed: int = 0,
    loss: str = "random",
) -> list[Row]:
    """Measure A, B, C and D beside the paper's measured and theoretical numbers and exact theory.

    Args:
        blocks: (n_in, n_out, G) of each row.
        experiments: inputs per row, 100 of them through each pair of weight matrices.
        seed: of the random numbers; the same table again for the same seed and thread count.
        loss: a name in ``unit_block.LOSSES``.

    Raises:
        ValueError: for fewer than 200 experiments, groups that do not divide, an unknown loss, or
            one whose gradient has no variance.

    Example:
        >>> rows = table1_rows([(16, 8, 1)], experiments=400)
        >>> [row["ratio"] for row in rows]
        ['A', 'B', 'C', 'D']
    """
    check_experiments(experiments)
    blocks, draws = list(blocks), experiments // INPUTS_PER_DRAW
    rows = []
    with tqdm(total=len(blocks) * draws, unit="draw", disable=None) as progress:
        for block in blocks:
            generator = torch.Generator().manual_seed(seed)
            progress.set_description("{} -> {}, G = {}".format(*block))
            means = []
            for _ in range(draws):
                means.append(two_block_ratios(*block, INPUTS_PER_DRAW, loss, generator).mean(0))
                progress.update()
            rows += _rows_of_block(block, torch.stack(means))
    return rows


def check_experiments(experiments: int) -> None:
    """Raise ValueError where too few experiments give no standard error."""
    if experiments < 2 * INPUTS_PER_DRAW:
        raise ValueError(
            f"experiments must be at least {2 * INPUTS_PER_DRAW}, got experiments={experiments}. "
            f"{INPUTS_PER_DRAW} share their weights, and an error needs two draws of weights."
        )


def two_block_ratios(
    n_in: int,
    n_out: int,
    num_groups: int,
    inputs: int,
    loss: str = "random",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the weights of two blocks once and return A, B, C and D of each input.

    Shape:
        output: (inputs, 4), float64.

    Raises:
        ValueError: as :func:`table1_rows`.

    Example:
        >>> two_block_ratios(16, 8, 2, inputs=5).shape
        torch.Size([5, 4])
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got loss={loss!r}.")
    for channels in (n_in, n_out):
        check_num_groups(num_groups, channels)
    first = torch.randn(n_in, n_in, generator=generator)
    second = torch.randn(n_in, n_out, generator=generator)
    x0 = torch.randn(inputs, n_in, generator=generator)
    u = F.group_norm(x0 @ first, num_groups).relu().requires_grad_()
    y = u @ second
    z = F.group_norm(y, num_groups)
    x = z.relu()
    value = LOSSES[loss](x, torch.randn(x.shape, generator=generator))
    gradients = torch.autograd.grad(value, (u, y, z, x))
    of_u, of_y, of_z, of_x = (g.var(dim=1, correction=0).double() for g in gradients)
    if not (of_z.all() and of_x.all()):
        raise ValueError(
            f"dL/dx must vary over the features, got loss={loss!r}, whose gradient is the same for "
            "each or zero: no ratio can be taken. Choose another loss, or groups of more values."
        )
    sigma2 = y.detach().var(dim=1, correction=0).double()
    return torch.stack([of_u / of_y, sigma2 * of_y / of_z, of_z / of_x, of_u / of_x], dim=1)


def exact_ratios(n_in: int, n_out: int, num_groups: int) -> dict[str, float]:
    """Return what the measured A, B, C and D tend to, up to terms in 1/n_out².

    Where the paper has n_out Var[W], 1 + 4/n_g and their product, a mean over inputs of ratios of
    variances over features has small terms more:

    - dL/du is orthogonal to u (the norm takes out every rescaling of y), and the variance leaves
      out its mean; 1 and u have the cosine 1/√π, so A loses 1 and 1 - 1/π of n_in directions.
    - V(z) leaves out a mean, V(y) has none: B and D gain 1 / (1 - 1/n_out).
    - σ² of an input contains the s² of its groups, which 1/s² takes back: of σ²/s² = n/(n - 3) a
      group keeps 1 with itself, whence n/(n - 3) · (1 - 1/G) + 1/G in B.
    - |u|² fluctuates, and with it 1/s² against the mean: D (`_norm_fluctuation`).

    Example:
        >>> exact = exact_ratios(1024, 512, 128)
        >>> round(exact["A"], 2), round(exact["B"], 3), exact["C"], round(exact["D"], 3)
        (511.16, 1.992, 0.5, 1.001)
    """
    n_g = n_out // num_groups
    factor = exact_factor(n_g)
    weight = n_out * (1 - 1 / n_in) * (1 - (1 - 1 / pi) / (n_in - 1))
    lost_mean = 1 / (1 - 1 / n_out)
    with_itself = (1 - 1 / num_groups) + (1 - 3 / n_g) / num_groups
    fluctuation = 1 + _norm_fluctuation(n_in, num_groups)
    return {
        "A": weight,
        "B": factor * with_itself * lost_mean,
        "C": 0.5,
        "D": weight / n_in * factor * lost_mean * fluctuation,
    }


def _norm_fluctuation(channels: int, num_groups: int) -> float:
    """Return Var[|u|²] / E[|u|²]² of u = ReLU(GN), groups of independent Gaussians.

    In a group of n the normalized values lie on a sphere of radius √n, orthogonal to 1: two of them
    have the correlation -1/(n - 1), their moments of order four are (n - 1)/(n + 1) of Gaussians',
    and E[relu(a)² relu(b)²] of Gaussians is the arc-cosine kernel of order two.
    """
    n = channels // num_groups
    if n < 2:
        return 0.0
    cosine = -1 / (n - 1)
    angle = acos(cosine)
    kernel = 3 * sqrt(1 - cosine**2) * cosine + (pi - angle) * (1 + 2 * cosine**2)
    fourth = (n - 1) / (n + 1) * (n * 1.5 + n * (n - 1) * kernel / (2 * pi))
    return (fourth / (n / 2) ** 2 - 1) / num_groups


def _rows_of_block(block: tuple[int, int, int], means: Tensor) -> list[Row]:
    n_in, n_out, groups = block
    exact, factor = exact_ratios(*block), paper_factor(n_out // groups)
    eqs = {"A": n_out, "B": factor, "C": 0.5, "D": n_out / n_in * factor}
    rows = []
    for name, value, spread in zip(RATIOS, means.mean(0), means.std(0), strict=True):
        measured = Estimate(value.item(), (spread / len(means) ** 0.5).item())
        rows.append(
            {
                **{"n_in": n_in, "n_out": n_out, "G": groups, "ratio": name},
                **{"measured": measured.mean, "error": measured.error, "exact": exact[name]},
                "agrees": "yes" if measured.agrees(exact[name]) else "NO",
                "paper, theory": eqs[name],
                "paper, measured": TABLE1.get(block, {}).get(name, ""),
            }
        )
    return rows
