"""The rule against an independent implementation and the values that the paper gives."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest

from gn_practical.num_groups import (
    RULES,
    exact_ideal_num_groups,
    gradient_variance_ratio,
    ideal_num_groups,
    practical_num_groups,
    resolve_num_groups,
)


@pytest.mark.parametrize(
    ("in_channels", "out_channels", "expected"),
    [(256, 64, 64), (128, 64, 16), (784, 512, 64), (256, 128, 32), (128, 128, 1), (64, 256, 1)],
)
def test_known_layers(in_channels, out_channels, expected):
    assert practical_num_groups(in_channels, out_channels) == expected


def test_equals_an_independent_implementation_everywhere():
    """All pairs up to 400 against a search over all divisors by |log2 d - log2 G_ideal|."""
    for out_channels in range(1, 401):
        divisors = [d for d in range(1, out_channels + 1) if out_channels % d == 0]
        # Thresholds in quarter groups: G changes from d1 to d2 where (4 G)^2 passes 16 d1 d2.
        bounds = [16 * a * b for a, b in pairwise(divisors)]
        for in_channels in range(1, 401):
            quarters = min(max(in_channels - out_channels, 4), 4 * out_channels)
            expected = divisors[sum(quarters**2 > bound for bound in bounds)]
            if practical_num_groups(in_channels, out_channels) != expected:
                pytest.fail(f"{in_channels} -> {out_channels}: expected {expected}")


def test_is_the_nearest_divisor_in_log2():
    for in_channels, out_channels in [(1000, 360), (77, 60), (2048, 720), (97, 96), (5, 7)]:
        ideal = min(max((in_channels - out_channels) / 4, 1), out_channels)
        divisors = [d for d in range(1, out_channels + 1) if out_channels % d == 0]
        nearest = min(divisors, key=lambda d: abs(math.log2(d) - math.log2(ideal)))
        assert practical_num_groups(in_channels, out_channels) == nearest


def test_ideal_number_of_groups_solves_the_equation():
    assert ideal_num_groups(256, 128) == 32
    assert gradient_variance_ratio(256, 128, 32) == 1
    assert gradient_variance_ratio(64, 256, 1) == 260 / 64


def test_gain_ratio_scales_the_input_channels():
    assert ideal_num_groups(100, 60, gain_ratio=2) == 35
    assert ideal_num_groups(100, 60, gain_ratio=Fraction(1, 2)) == Fraction(-5, 2)
    assert practical_num_groups(100, 60, gain_ratio=2) == 30
    assert gradient_variance_ratio(100, 60, 30, gain_ratio=2) == 180 / 200


@pytest.mark.parametrize(("in_channels", "out_channels"), [(256, 128), (128, 64), (300, 200)])
def test_exact_rule_solves_its_equation(in_channels, out_channels):
    n_g = Fraction(out_channels) / exact_ideal_num_groups(in_channels, out_channels)
    factor = (n_g - 2) / (n_g - 3)
    assert Fraction(out_channels, in_channels) * factor == 1


def test_exact_rule_meets_the_paper_at_groups_of_four_only():
    assert practical_num_groups(256, 128, rule="exact") == practical_num_groups(256, 128) == 32
    # n_g = 3 + 512 / 272 = 4.88: G = 104.9, nearest divisor 128; the paper's rule gives 64.
    assert practical_num_groups(784, 512, rule="exact") == 128
    assert practical_num_groups(64, 256, rule="exact") == 1


@pytest.mark.parametrize("value", [0, -4, 2.0, True, "64", None])
def test_refuses_what_is_no_positive_integer(value):
    with pytest.raises(ValueError, match=r"in_channels must be a positive integer, got in_ch"):
        practical_num_groups(value, 64)
    with pytest.raises(ValueError, match=r"out_channels must be a positive integer"):
        ideal_num_groups(64, value)
    with pytest.raises(ValueError, match=r"num_groups must be a positive integer"):
        gradient_variance_ratio(64, 64, value)


def test_refuses_other_bad_arguments():
    with pytest.raises(ValueError, match=r"num_groups=48 for 64 channels. Choose one of 1, 2, 4,"):
        gradient_variance_ratio(64, 64, 48)
    with pytest.raises(ValueError, match=r"rule must be one of paper, exact, .* got rule='best'"):
        practical_num_groups(64, 64, rule="best")
    for ratio in (0, -1.0, float("nan"), float("inf"), None):
        with pytest.raises(ValueError, match="gain_ratio must be a positive finite number"):
            practical_num_groups(64, 64, gain_ratio=ratio)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("practical", 64),
        ("paper", 64),
        ("exact", 16),
        ("instance", 64),
        (-1, 64),
        (32, 32),
        ("1", 1),
    ],
)
def test_one_resolver_of_names_and_numbers(choice, expected):
    assert resolve_num_groups(choice, 256, 64) == expected


@pytest.mark.parametrize("choice", ["instanc", "0", -2, "3.5", None])
def test_resolver_refuses_what_it_does_not_know(choice):
    with pytest.raises(
        ValueError,
        match=r"groups must be .*\(paper, exact, .*\).* got groups=",
    ):
        resolve_num_groups(choice, 256, 64)


def test_rule_is_one_line_of_the_dict(monkeypatch):
    """A new rule reaches the norm, its table and the choices of the tools by its name alone."""
    from torch import nn

    from gn_practical import PracticalGroupNorm, bind_group_norms
    from gn_practical.analysis.group_table import group_table

    monkeypatch.setitem(RULES, "half", lambda n_in, n_out, ratio: Fraction(n_out, 2))
    model = nn.Sequential(nn.Linear(64, 32), PracticalGroupNorm(32))
    (row,) = bind_group_norms(model, rule="half")
    assert (row.ideal_num_groups, row.num_groups) == (16, 16)
    assert group_table(model, ["half"])[0]["half G"] == resolve_num_groups("half", 64, 32) == 16


@pytest.mark.parametrize("out_channels", [64, 128, 256, 512])
def test_definition_3_ties_where_algorithm_1_takes_the_upper_divisor(out_channels):
    in_channels = 4 * out_channels
    distances = {
        groups: abs(gradient_variance_ratio(in_channels, out_channels, groups) - 1)
        for groups in range(1, out_channels + 1)
        if out_channels % groups == 0
    }
    nearest = [g for g, distance in distances.items() if distance == min(distances.values())]
    assert nearest == [out_channels // 2, out_channels]
    assert practical_num_groups(in_channels, out_channels) == out_channels


def test_rules_for_comparison():
    assert [practical_num_groups(1, n, rule="16_channels") for n in (8, 16, 64, 96)] == [1, 1, 4, 6]
    for pair in ((256, 128), (512, 64), (2048, 512)):
        assert practical_num_groups(*pair, rule="paper_or_32") == practical_num_groups(*pair)
    assert [practical_num_groups(n, n, rule="paper_or_32") for n in (16, 48, 64)] == [16, 24, 32]
