"""Gradient variance ratios beyond Table 1: group sizes, activations, convolutions, depth.

``unit_block`` says what is sampled. Grids of single blocks, Linear with other group sizes than the
paper's and convolutions; and stacks of blocks, where depth and residual sums enter. Every function
returns rows, dicts ready to be printed or saved.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from gn_practical.activation_gain import ACTIVATIONS, activation_gain
from gn_practical.analysis import Row
from gn_practical.num_groups import check_num_groups, gradient_variance_ratio
from paper_tables.table1 import INPUTS_PER_DRAW, check_experiments
from paper_tables.theory import (
    exact_factor,
    linear_input_correction,
    paper_factor,
    predicted_gradient_variance_ratio,
    shared_fraction,
    slope_moments,
)
from paper_tables.unit_block import (
    estimate_ratios,
    gradient_squares,
    he_filters,
    linear_gradients,
    ratio_of_means,
    relu_maps,
)

GROUP_SIZES = (4, 5, 6, 8, 12, 16, 32, 64)
CHANNEL_RATIOS = (1.5, 2, 4)

EPS = 1e-5  # GroupNorm's; the variance of its input is 1 here
_CHUNK = 8_000_000  # weights held at once


def extended_rows(
    group_sizes: Iterable[int] = GROUP_SIZES,
    channel_ratios: Iterable[float] = CHANNEL_RATIOS,
    out_features: int = 384,
    experiments: int = 100_000,
    seed: int = 0,
    activation: str = "relu",
) -> list[Row]:
    """Measure K of Linear blocks over group sizes and n_in/n_out, beside both theories.

    ``factor`` is K over (n_out/n_in) (B/F), without the part that is due to few input features, so
    as to be read against ``exact factor`` and ``paper factor``. B is that of a group of n_g.

    Args:
        group_sizes: n_g; n_out is ``out_features`` less what makes it a multiple of 2 n_g.
        channel_ratios: n_in / n_out.
        out_features: about n_out.
        experiments: inputs per row, 100 of them through each weight matrix.
        seed: of the random numbers.
        activation: name of the activation after the norm; the block's input remains a ReLU's.

    Raises:
        ValueError: for fewer than 200 experiments, groups that do not divide, an unknown name.

    Example:
        >>> row = extended_rows([8], [2], out_features=16, experiments=400)[0]
        >>> row["n_in"], row["n_out"], row["n_g"]
        (32, 16, 8)
    """
    blocks = []
    for size, ratio in product(group_sizes, channel_ratios):
        n_out = out_features - out_features % (2 * size)
        blocks.append((round(ratio * n_out), n_out, n_out // size))
    rows, backward = [], activation_gain(activation)[1]
    for block, squares in _measure(blocks, experiments, seed, activation):
        n_in, n_out, groups = block
        measured, size = estimate_ratios(squares)["D"], n_out // groups
        gain = 2 * slope_moments(activation, size)[0]  # B/F; the input's F is ½
        scale = n_in / n_out / gain / linear_input_correction(n_in)
        exact = exact_factor(size, activation)
        rows.append(
            {
                **{"n_g": size, "n_in": n_in, "n_out": n_out, "G": groups},
                "K": measured.mean,
                "K by Eq. 31": gradient_variance_ratio(*block, 0.5 / backward),
                "factor": measured.mean * scale,
                "error": measured.error * scale,
                "exact factor": exact,
                "paper factor": paper_factor(size),
                "agrees": "yes" if measured.agrees(exact / scale) else "NO",
            }
        )
    return rows


# kernel, stride, padding, size, blur, shared before the ReLU
_LAYOUTS = (
    (1, 1, 0, 16, 1, 0.0),
    (3, 1, 1, 16, 1, 0.0),
    (3, 1, 1, 32, 1, 0.0),
    (3, 1, 0, 16, 1, 0.0),
    (3, 2, 1, 16, 1, 0.0),
    (7, 2, 3, 16, 1, 0.0),
    (3, 1, 1, 4, 1, 0.0),
    (3, 1, 1, 16, 1, 0.5),
    (3, 1, 1, 16, 1, 0.9),
    (1, 1, 0, 16, 1, 0.9),
    (3, 1, 1, 16, 5, 0.0),
)


def convolution_rows(
    layouts: Iterable[tuple[int, int, int, int, int, float]] = _LAYOUTS,
    groups: Iterable[int] = (1, 8, 16, 32),
    in_channels: int = 128,
    out_channels: int = 64,
    draws: int = 48,
    seed: int = 0,
) -> list[Row]:
    """Measure K of convolutions over kernel, stride, padding, size and spatial correlation.

    Args:
        layouts: (kernel, stride, padding, size, blur, shared) of each case; the last two are those
            of ``unit_block.relu_maps``.
        groups: G of each row.
        in_channels: n_in.
        out_channels: n_out.
        draws: weights and pairs of images per row.
        seed: of the random numbers.

    Raises:
        ValueError: for fewer than two draws or groups that do not divide.

    Example:
        >>> convolution_rows([(3, 2, 1, 8, 1, 0.0)], [1], 8, 4, draws=4)[0]["stride"]
        2
    """
    cases = list(product(layouts, groups))
    rows = []
    for layout, num_groups in tqdm(cases, desc="convolutions", disable=None):
        generator = torch.Generator().manual_seed(seed)
        shape = in_channels, out_channels, num_groups
        rows.append(_convolution_row(shape, layout, draws, generator))
    return rows


def _convolution_row(
    shape: tuple[int, int, int],
    layout: tuple[int, int, int, int, int, float],
    draws: int,
    generator: torch.Generator,
) -> Row:
    (n_in, n_out, groups), (kernel, stride, padding, size, blur, shared) = shape, layout
    squares, fraction, x = [], 0.0, None
    for _ in range(draws):
        weight = he_filters(n_in, n_out, kernel, generator)
        u = relu_maps(2, n_in, size, shared, blur, generator)
        layer = partial(F.conv2d, weight=weight, stride=stride, padding=padding)
        squares.append(gradient_squares(layer, u, groups, generator=generator))
        x = layer(u)
        fraction += shared_fraction(x) / draws
    measured = estimate_ratios(torch.cat(squares))["D"]
    predicted = predicted_gradient_variance_ratio(
        *shape, in_size=size**2, out_size=x.shape[2] * x.shape[3], shared=fraction, eps=EPS
    )
    names = ("kernel", "stride", "padding", "size", "blur", "shared")
    return {
        **dict(zip(names, layout, strict=True)),
        "r": fraction,
        "G": groups,
        "K": measured.mean,
        "error": measured.error,
        "predicted": predicted,
        "off %": 100 * (measured.mean / predicted - 1),
        "K by Eq. 31": gradient_variance_ratio(*shape),
    }


@dataclass(frozen=True)
class Stack:
    """A stack of 3×3 convolutional unit blocks on square maps.

    Attributes:
        blocks: (n_in, n_out, stride) of each.
        residual: add each block's input to its output.
        pooled: the loss sees means over pixels only, as behind a global average pooling.
        calibrated: scale each norm's output by the γ that predicts K = 1.
    """

    blocks: tuple[tuple[int, int, int], ...] = ((64, 64, 1),) * 8
    residual: bool = False
    pooled: bool = False
    calibrated: bool = False


_STAGES = ((32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2))
STACKS = {
    "plain": Stack(),
    "residual": Stack(residual=True),
    "pooled": Stack(pooled=True),
    "stages": Stack(_STAGES),
    "calibrated": Stack(_STAGES, calibrated=True),
}


def stack_rows(
    stack: Stack, num_groups: int = 16, size: int = 16, draws: int = 100, seed: int = 0
) -> list[Row]:
    """Measure K along a stack of convolutional unit blocks, beside the prediction.

    Args:
        stack: what to build; see ``STACKS``.
        num_groups: G of every block.
        size: height and width of the input.
        draws: networks, each with two images.
        seed: of the random numbers.

    Raises:
        ValueError: for groups that do not divide.

    Example:
        >>> len(stack_rows(Stack(((8, 8, 1), (8, 16, 2))), num_groups=2, size=4, draws=2))
        2
    """
    for _, n_out, _ in stack.blocks:
        check_num_groups(num_groups, n_out)
    generator = torch.Generator().manual_seed(seed)
    runs = [
        _run_stack(stack, num_groups, size, generator)
        for _ in tqdm(range(draws), desc="stacks", disable=None)
    ]
    gradients = torch.stack([run[0] for run in runs])
    facts = torch.stack([run[1] for run in runs]).mean(dim=0).tolist()
    rows = []
    for i, (n_in, n_out, stride) in enumerate(stack.blocks):
        moment, shared, predicted = facts[i]
        measured = ratio_of_means(gradients[:, i], gradients[:, i + 1])
        rows.append(
            {
                **{"block": i + 1, "n_in": n_in, "n_out": n_out, "stride": stride},
                **{"G": num_groups, "E[u²]": moment, "r": shared},
                **{"K": measured.mean, "error": measured.error, "predicted": predicted},
                "K by Eq. 31": gradient_variance_ratio(n_in, n_out, num_groups),
            }
        )
    return rows


def _run_stack(
    stack: Stack, num_groups: int, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return V(u) of each block's input and of the output, and E[u²], r and predicted K."""
    values = [relu_maps(2, stack.blocks[0][0], size, generator=generator).requires_grad_()]
    facts = []
    for n_in, n_out, stride in stack.blocks:
        u = values[-1]
        x = F.conv2d(u, he_filters(n_in, n_out, 3, generator), stride=stride, padding=1)
        moment, shared = u.detach().square().mean().item(), shared_fraction(x)
        sizes = {"in_size": u[0, 0].numel(), "out_size": x[0, 0].numel()}
        ratio = predicted_gradient_variance_ratio(
            n_in, n_out, num_groups, **sizes, shared=shared, gain_ratio=2 * moment
        )
        scale = ratio**-0.5 if stack.calibrated else 1.0
        branch = scale * F.group_norm(x, num_groups).relu()
        values.append(branch + u if stack.residual else branch)
        facts.append((moment, shared, ratio * scale**2 + stack.residual))
    output = values[-1].mean(dim=(2, 3)) if stack.pooled else values[-1]
    upstream = torch.randn(output.shape, generator=generator)
    gradients = torch.autograd.grad((output * upstream).sum(), values)
    return torch.stack([g.square().mean() for g in gradients]).double(), torch.tensor(facts)


def _measure(
    blocks: Iterable[tuple[int, int, int]],
    experiments: int,
    seed: int,
    activation: str,
) -> Iterator[tuple[tuple[int, int, int], Tensor]]:
    """Run the experiments of each block in chunks of weight matrices, with a progress bar."""
    check_experiments(experiments)
    blocks = list(blocks)
    draws = experiments // INPUTS_PER_DRAW
    with tqdm(total=len(blocks) * draws, unit="draw", disable=None) as progress:
        for block in blocks:
            generator = torch.Generator().manual_seed(seed)
            progress.set_description("{} -> {}, G = {}".format(*block))
            chunk = max(1, _CHUNK // (block[0] * block[1]))
            parts = []
            for start in range(0, draws, chunk):
                now = min(chunk, draws - start)
                part = linear_gradients(
                    *(*block, now, INPUTS_PER_DRAW),
                    activation=ACTIVATIONS[activation],
                    generator=generator,
                )
                parts.append(part)
                progress.update(now)
            yield block, torch.cat(parts)
