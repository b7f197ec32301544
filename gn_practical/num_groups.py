"""The rule: how many groups keep the variance of the gradient through a unit block.

A unit block is a weight layer with ``in_channels`` inputs and ``out_channels`` outputs, followed
by group normalization and an activation. Equations and algorithms are those of Kim et al., "On
the Ideal Number of Groups for Isometric Gradient Propagation" (arXiv:2302.03193).

All in exact integers or fractions: no rounding decides a number of groups. A new rule is a function
like :func:`ideal_num_groups` and a line in ``RULES``.
"""

from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from math import isfinite


def gradient_variance_ratio(
    in_channels: int, out_channels: int, num_groups: int, gain_ratio: float | Fraction = 1
) -> float:
    """Predict by how much a unit block scales the variance of the gradient (Eq. 31).

    K(G) = (n_out + 4 G) / (r n_in), with r = F / B the gain ratio of the activation. K = 1 leaves
    the variance as it is; with K > 1 it grows from the block's output to its input.

    Args:
        in_channels: n_in, input channels of the weight layer.
        out_channels: n_out, output channels of the weight layer.
        num_groups: G, groups of the normalization; divides ``out_channels``.
        gain_ratio: r = F / B, forward over backward gain of the activation (Section 2.3); 1 for
            the ReLU family.

    Raises:
        ValueError: for anything that is no positive integer, or groups that do not divide.

    Example:
        >>> gradient_variance_ratio(256, 128, 32)
        1.0
    """
    ratio = _check(in_channels, out_channels, gain_ratio)
    check_num_groups(num_groups, out_channels)
    return float(Fraction(out_channels + 4 * num_groups, in_channels) / ratio)


def ideal_num_groups(
    in_channels: int, out_channels: int, gain_ratio: float | Fraction = 1
) -> Fraction:
    """Solve K(G) = 1 for G (Eq. 32), before clipping: G_ideal = (r n_in - n_out) / 4.

    Args:
        in_channels: n_in, input channels of the weight layer.
        out_channels: n_out, output channels of the weight layer.
        gain_ratio: r = F / B of the activation at unit variance (Section 2.3); 1 for ReLU.

    Returns:
        The exact value; negative or above ``out_channels`` where no number of groups gives K = 1.

    Raises:
        ValueError: for channels that are no positive integer, or a ratio that is not positive.

    Example:
        >>> ideal_num_groups(256, 64)
        Fraction(48, 1)
    """
    ratio = _check(in_channels, out_channels, gain_ratio)
    return (ratio * in_channels - out_channels) / 4


def exact_ideal_num_groups(
    in_channels: int, out_channels: int, gain_ratio: float | Fraction = 1
) -> Fraction:
    """Solve K(G) = 1 for G with the factor that measurement confirms, before clipping.

    In place of the paper's 1 + 4/n_g, a group of n_g values contributes the factor
    (n_g - 2) / (n_g - 3) to the variance, so that n_g = 3 + n_out / (r n_in - n_out) and
    G = n_out / n_g. Where r n_in <= n_out every G gives K > 1 and the smallest is the best: 0 is
    returned, which clips to one group. Arguments and errors are those of :func:`ideal_num_groups`.

    Example:
        >>> exact_ideal_num_groups(256, 128)
        Fraction(32, 1)
    """
    ratio = _check(in_channels, out_channels, gain_ratio)
    surplus = ratio * in_channels - out_channels
    if surplus <= 0:
        return Fraction(0)
    return out_channels / (3 + out_channels / surplus)


def sixteen_channels(
    in_channels: int, out_channels: int, gain_ratio: float | Fraction = 1
) -> Fraction:
    """Return n_out / 16: groups of sixteen channels, a convention for layers of few channels.

    Arguments and errors are those of :func:`ideal_num_groups`.

    Example:
        >>> sixteen_channels(256, 64)
        Fraction(4, 1)
    """
    _check(in_channels, out_channels, gain_ratio)
    return Fraction(out_channels, 16)


def ideal_or_32(in_channels: int, out_channels: int, gain_ratio: float | Fraction = 1) -> Fraction:
    """Return G_ideal (Eq. 32) where the layer narrows, r n_in > n_out, and 32 elsewhere.

    Where a layer does not narrow no G gives K = 1, and the paper takes the smallest. On
    convolutions K hardly depends on G, so nothing is lost by 32 there. Arguments and errors are
    those of :func:`ideal_num_groups`.

    Example:
        >>> ideal_or_32(256, 128), ideal_or_32(64, 64), ideal_or_32(512, 64)
        (Fraction(32, 1), Fraction(32, 1), Fraction(112, 1))
    """
    ideal = ideal_num_groups(in_channels, out_channels, gain_ratio)
    return ideal if ideal > 0 else Fraction(32)


# What MODEL.PGN.RULE may be: (n_in, n_out, gain ratio) to G_ideal before clipping.
RULES: dict[str, Callable[[int, int, float | Fraction], Fraction]] = {
    "paper": ideal_num_groups,
    "exact": exact_ideal_num_groups,
    "16_channels": sixteen_channels,
    "paper_or_32": ideal_or_32,
}


def practical_num_groups(
    in_channels: int,
    out_channels: int,
    gain_ratio: float | Fraction = 1,
    rule: str = "paper",
) -> int:
    """Choose the number of groups of a unit block (Algorithm 1).

    G_ideal is clipped to [1, n_out]; the result is the divisor of n_out nearest to it in log2. Two
    neighbouring ones are never equally near: a divisor would lie between them.

    Differences from the paper: Definition 3 asks for the G whose K is closest to 1, a linear
    distance, and disagrees with Algorithm 1 for some pairs (256 -> 64 is a linear tie of 32 and
    64). Algorithm 1 wins here.

    Args:
        in_channels: n_in, input channels of the weight layer.
        out_channels: n_out, output channels of the weight layer.
        gain_ratio: r = F / B of the activation at unit variance (Section 2.3); 1 for ReLU.
        rule: what gives G_ideal, a name in ``RULES``: "paper" for Eq. 32, "exact" for
            :func:`exact_ideal_num_groups`, "16_channels" and "paper_or_32" for comparisons.

    Returns:
        A divisor of ``out_channels``.

    Raises:
        ValueError: for channels that are no positive integer, a ratio that is not positive, or an
            unknown rule.

    Example:
        >>> practical_num_groups(784, 512), practical_num_groups(256, 64)
        (64, 64)
    """
    check_rule(rule)
    ideal = min(max(RULES[rule](in_channels, out_channels, gain_ratio), 1), out_channels)
    lower = max(d for d in _divisors(out_channels) if d <= ideal)
    upper = min(d for d in _divisors(out_channels) if d >= ideal)
    return upper if ideal * ideal > lower * upper else lower


def resolve_num_groups(
    choice: str | int,
    in_channels: int,
    out_channels: int,
    gain_ratio: float | Fraction = 1,
) -> int:
    """Return the number of groups that a choice means for one layer.

    A choice is a rule in ``RULES`` by its name, "practical" for the paper's, "instance" or -1 for
    as many groups as channels, or the number itself, as an int or text. The other arguments are
    those of :func:`practical_num_groups`.

    Raises:
        ValueError: for an unknown choice. Whether a number divides is :func:`check_num_groups`.

    Example:
        >>> [resolve_num_groups(choice, 256, 64) for choice in ("practical", "exact", 8)]
        [64, 16, 8]
    """
    if str(choice).isdecimal() and int(choice) > 0:
        return int(choice)
    if choice in ("instance", -1):
        return out_channels
    rule = {"practical": "paper"}.get(choice, choice)
    if rule not in RULES:
        raise ValueError(
            f"groups must be model, practical, instance, a rule ({', '.join(RULES)}) or a positive "
            f"number, got groups={choice!r}. Choose among these."
        )
    return practical_num_groups(in_channels, out_channels, gain_ratio, rule)


def check_rule(rule: str) -> None:
    """Raise ValueError unless ``rule`` is a name in ``RULES``."""
    if rule not in RULES:
        raise ValueError(
            f"rule must be one of {', '.join(RULES)}, got rule={rule!r}. Choose among these."
        )


def check_num_groups(num_groups: int, num_channels: int) -> None:
    """Raise ValueError unless ``num_groups`` is a positive divisor of ``num_channels``."""
    _check_positive("num_groups", num_groups)
    if num_channels % num_groups:
        choice = ", ".join(map(str, _divisors(num_channels)))
        raise ValueError(
            f"num_groups must divide the number of channels, got num_groups={num_groups} for "
            f"{num_channels} channels. Choose one of {choice}."
        )


def _check(in_channels: int, out_channels: int, gain_ratio: float | Fraction) -> Fraction:
    _check_positive("in_channels", in_channels)
    _check_positive("out_channels", out_channels)
    number = isinstance(gain_ratio, int | float | Fraction) and isfinite(gain_ratio)
    if not (number and gain_ratio > 0):
        raise ValueError(
            f"gain_ratio must be a positive finite number, got gain_ratio={gain_ratio!r}. "
            "Give the forward over the backward gain of the activation, 1 for ReLU."
        )
    return Fraction(gain_ratio)


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{name} must be a positive integer, got {name}={value!r}. "
            "Give the channels or groups of the layer as an int."
        )


@lru_cache
def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
