import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from paper_tables.beyond import Stack, convolution_rows, extended_rows, stack_rows
from paper_tables.files import check_output, save_rows
from paper_tables.paper_numbers import TABLE2, TABLE2_ACTIVATIONS
from paper_tables.table1 import exact_ratios, table1_rows, two_block_ratios
from paper_tables.table2 import SIGMAS, summary, table2_rows
from paper_tables.theory import (
    exact_factor,
    linear_input_correction,
    paper_factor,
    predicted_gradient_variance_ratio,
    relu_shared,
    shared_fraction,
    slope_moments,
)
from paper_tables.unit_block import (
    estimate_ratios,
    gradient_squares,
    linear_gradients,
    relu_maps,
)

from gn_practical.activation_gain import ACTIVATIONS, activation_gain
from gn_practical.analysis import exact_factor as package
from gn_practical.analysis import format_rows
from gn_practical.analysis.exact_factor import convolution_factor
from gn_practical.num_groups import exact_ideal_num_groups

PROJECT = Path(__file__).parents[1]


def sampled_factor(n, activation, eps=0.0):
    """E|P D g|² / (n E f'²): the backward pass of GN written out, in float64."""
    groups = 1_600_000 // n
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(groups, n, generator=generator, dtype=torch.float64)
    s = x.var(dim=1, correction=0, keepdim=True).add(eps).sqrt()
    y = ((x - x.mean(dim=1, keepdim=True)) / s).requires_grad_()
    slope = torch.autograd.grad(activation(y).sum(), y)[0]
    y = y.detach()
    g = slope * torch.randn(groups, n, generator=generator, dtype=torch.float64)
    dx = (g - g.mean(dim=1, keepdim=True) - y * (g * y).mean(dim=1, keepdim=True)) / s
    return (dx.square().mean() / slope.square().mean()).item()


@pytest.mark.parametrize("n", [8, 16, 64])
@pytest.mark.parametrize("name", ["relu", "prelu", "gelu", "tanh"])
def test_exact_factor_equals_sampled_groups(name, n):
    assert exact_factor(n, name) == pytest.approx(sampled_factor(n, ACTIVATIONS[name]), rel=0.01)


def test_eps_bounds_small_groups():
    assert exact_factor(3) == exact_factor(2) == math.inf
    expected = sampled_factor(3, torch.relu, eps=0.1)
    assert exact_factor(3, eps=0.1) == pytest.approx(expected, rel=0.02)
    expected = sampled_factor(2, torch.relu, eps=0.1)
    assert exact_factor(2, eps=0.1) == pytest.approx(expected, rel=0.02)


def test_factors_meet_at_four_alone():
    assert exact_factor(4) == package.exact_factor(4) == paper_factor(4) == 2
    assert [exact_factor(n) for n in range(2, 99)] == [
        package.exact_factor(n) for n in range(2, 99)
    ]
    assert all(exact_factor(n) < paper_factor(n) for n in range(5, 200))


@pytest.mark.parametrize("pair", [(256, 128), (784, 512), (64, 48)])
def test_exact_rule_solves_the_exact_factor(pair):
    n_g = pair[1] / exact_ideal_num_groups(*pair)
    assert float((n_g - 2) / (n_g - 3)) == pytest.approx(pair[0] / pair[1])


def test_convolution_factor_has_its_limits():
    assert convolution_factor(8, 1) == pytest.approx(exact_factor(8), rel=1e-6)
    assert convolution_factor(2, 16, shared=0) == pytest.approx(exact_factor(32), rel=1e-6)
    # All shared: s² has c - 1 degrees of freedom, but only 2 of c·m directions are lost.
    assert convolution_factor(8, 10_000, shared=1) == pytest.approx(8 / 5, rel=1e-3)
    assert convolution_factor(1, 10_000, shared=0.5) == pytest.approx(2, rel=1e-3)


def test_finite_backward_gain_tends_to_the_gaussian():
    assert slope_moments("gelu", 4000)[0] == pytest.approx(activation_gain("gelu")[1], rel=1e-3)
    assert slope_moments("gelu", 4)[0] != pytest.approx(activation_gain("gelu")[1], rel=1e-3)


def test_shared_fraction_of_relu_maps():
    maps = relu_maps(4, 512, 32, shared=0.5, generator=torch.Generator().manual_seed(0))
    assert shared_fraction(maps) == pytest.approx(relu_shared(0.5), rel=0.05)
    with pytest.raises(ValueError, match="features must be a non-zero"):
        shared_fraction(torch.zeros(1, 2, 4, 4))


def test_linear_measurement_agrees_with_theory_in_each_stage():
    generator = torch.Generator().manual_seed(0)
    squares = linear_gradients(256, 128, 8, draws=60, inputs_per_draw=50, generator=generator)
    ratios = estimate_ratios(squares)
    assert ratios["A"].mean == pytest.approx(255 / 256, rel=0.02)
    assert ratios["B"].mean == pytest.approx(exact_factor(16), rel=0.03)
    assert ratios["C"].mean == pytest.approx(0.5, rel=0.02)
    expected = 0.5 * exact_factor(16) * linear_input_correction(256)
    assert ratios["D"].mean == pytest.approx(expected, rel=0.03)
    assert ratios["D"].agrees(expected)
    assert not ratios["D"].agrees(0.5 * paper_factor(16))


def test_plain_sum_is_projected_out():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 8
    u = torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    _, x, y, z = gradient_squares(lambda t: t @ weight, u, 1, loss="sum")[0]
    assert y / z == pytest.approx(0.5, rel=0.05)
    assert x / y == pytest.approx(1 - 0.5 - 1 / math.pi, rel=0.1)
    with pytest.raises(ValueError, match="gradients must be finite and not all zero"):
        estimate_ratios(torch.zeros(3, 4))


def test_table1_is_reproducible():
    first, second = (table1_rows([(32, 16, 2)], experiments=400, seed=3) for _ in range(2))
    assert first == second
    assert table1_rows([(32, 16, 2)], experiments=400, seed=4) != first


def test_table1_agrees_with_the_paper_and_with_exact_theory():
    rows = table1_rows([(128, 64, 16)], experiments=20_000)
    assert [row["agrees"] for row in rows] == ["yes"] * 4
    assert [row["paper, theory"] for row in rows] == [64, 2, 0.5, 1]
    assert [row["paper, measured"] for row in rows] == ["63.185", "1.900", "0.500", "0.992"]
    # 64 is refuted, and the paper's own digits are met: its "empirical" A is no noise about 64.
    assert abs(rows[0]["measured"] - 63.185) < 3 * rows[0]["error"] < 0.5 < 64 - 63.185


def test_exact_ratios_with_large_groups_where_nothing_has_heavy_tails():
    means = torch.stack(
        [
            two_block_ratios(64, 48, 4, 100, generator=torch.Generator().manual_seed(seed)).mean(0)
            for seed in range(60)
        ]
    )
    errors = means.std(0) / 60**0.5
    exact = torch.tensor(list(exact_ratios(64, 48, 4).values())).double()
    assert ((means.mean(0) - exact).abs() < 4 * errors + 2e-3 * exact).all()
    plain = torch.tensor([48.0, 1 + 4 / 12, 0.5, 48 / 64 * (1 + 4 / 12)]).double()
    assert ((means.mean(0) - plain).abs() > 4 * errors + 2e-3 * exact).tolist() == [
        *(True, True, False, True)
    ]


@pytest.mark.parametrize(("loss", "backward"), [("random", 0.5), ("squares", 1.0)])
def test_only_a_gradient_that_ignores_the_output_gives_the_backward_gain(loss, backward):
    generator = torch.Generator().manual_seed(0)
    ratios = two_block_ratios(64, 32, 8, 2000, loss, generator)
    assert ratios[:, 2].mean() == pytest.approx(backward, rel=0.02)
    with pytest.raises(ValueError, match="dL/dx must vary over the features, got loss='sum'"):
        two_block_ratios(16, 8, 2, 5, "sum")


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_extended_table_confirms_the_exact_factor(activation):
    rows = extended_rows([6, 16], [2], 96, experiments=20_000, activation=activation)
    for row in rows:
        assert row["factor"] == pytest.approx(row["exact factor"], rel=0.03)
        assert row["factor"] != pytest.approx(row["paper factor"], rel=0.1)


@pytest.mark.parametrize("layout", [(3, 1, 1, 16, 1, 0.0), (3, 2, 1, 16, 1, 0.0)])
def test_convolution_prediction(layout):
    for row in convolution_rows([layout], [1, 32], draws=12):
        assert abs(row["off %"]) < 6
    assert abs(row["K"] / row["K by Eq. 31"] - 1) > 0.5


def test_linear_prediction_is_the_exact_factor():
    assert predicted_gradient_variance_ratio(256, 128, 8) == pytest.approx(0.5 * exact_factor(16))
    with pytest.raises(ValueError, match="num_groups must divide"):
        predicted_gradient_variance_ratio(256, 128, 7)


def test_residual_stack_only_amplifies_and_calibration_levels():
    plan = ((32, 32, 1), (32, 64, 2))
    residual = stack_rows(Stack(plan[:1] * 3, residual=True), 8, 8, draws=16)
    assert [row["K"] > 1 for row in residual] == [True] * 3
    assert residual[0]["K"] > residual[1]["K"] > residual[2]["K"]
    plain, level = (stack_rows(Stack(plan, calibrated=c), 8, 8, draws=16) for c in (False, True))
    assert plain[1]["K"] == pytest.approx(plain[1]["predicted"], rel=0.1)
    assert plain[1]["K"] < 0.7
    assert level[1]["K"] == pytest.approx(1, abs=0.12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: table1_rows(experiments=100), "experiments must be at least 200"),
        (lambda: table1_rows([(8, 6, 4)], 400), "num_groups must divide"),
        (lambda: table1_rows([(8, 4, 2)], 400, loss="mean"), "loss must be one of random"),
        (lambda: exact_factor(1), "group_size must be an integer above 1, got group_size=1"),
        (lambda: convolution_factor(4, 4, shared=1.5), r"shared must lie in \[0, 1\]"),
        (lambda: check_output("table.xls"), "output must end with one of .md"),
        (lambda: table2_rows(["swash"]), "Known names"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_table2_is_complete_and_sampling_agrees():
    rows = table2_rows(samples=20_000)
    assert len(rows) == 3 * len(TABLE2_ACTIVATIONS) * len(SIGMAS) == 99
    assert max(abs(row["z"]) for row in rows) < 4.5
    assert sum(row["paper"] != "" for row in rows) == 99


def test_the_paper_s_table2_differs_by_its_own_samples_alone():
    rows = table2_rows()
    assert len(TABLE2) == 99
    assert summary(rows).startswith("17 of 99 numbers differ by more than rounding: 17 within")
    wrong = {("relu", 1.0, "F"): "0.500", ("relu", 1.0, "B"): "0.53", ("relu", 1.0, "B/F"): "1.0"}
    assert [r["off"] for r in table2_rows(["relu"], [1.0], paper=wrong)] == ["", "OFF", ""]


@pytest.mark.parametrize("suffix", [".md", ".csv", ".json", ".txt"])
def test_rows_are_saved(tmp_path, suffix):
    path = tmp_path / "new" / f"table{suffix}"
    save_rows([{"G": 1, "K": 0.5}], path)
    assert "0.5" in path.read_text()
    assert json.loads(format_rows([{"G": 1}], "json")) == [{"G": 1}]


def run_script(monkeypatch, name, *args):
    monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
    runpy.run_path(str(PROJECT / name), run_name="__main__")


def test_scripts_print_and_save_their_tables(tmp_path, monkeypatch, capsys):
    output = tmp_path / "table.csv"
    block = ("--blocks", "32,16,2", "--experiments", 400, "--output", output)
    run_script(monkeypatch, "reproduce_table1.py", *block)
    assert output.read_text().startswith("n_in,n_out,G,ratio,measured,error,exact,agrees,")
    for grid in ("--extended", "--convolutions", "--stack=plain"):
        with pytest.raises(SystemExit, match="error: output must end with one of"):
            run_script(monkeypatch, "reproduce_table1.py", grid, "--output", "table.xls")
    with pytest.raises(SystemExit, match="error: blocks must be triples"):
        run_script(monkeypatch, "reproduce_table1.py", "--blocks", "32x16")
    capsys.readouterr()
    run_script(monkeypatch, "reproduce_table2.py", "--activations", "relu")
    assert "0 of 9 numbers differ" in capsys.readouterr().out


def test_scripts_run_from_the_repository_s_folder():
    root = PROJECT.parents[1]
    command = [sys.executable, "-W", "ignore", "projects/paper_tables/reproduce_table1.py"]
    command += ["--blocks", "32x16"]
    environment = {"PYTHONPATH": str(root), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: blocks must be triples")


def test_exact_factor_is_that_of_autograd():
    x = torch.randn(4000, 1, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    g = torch.randn(4000, 1, 8, generator=torch.Generator().manual_seed(1))
    (F.group_norm(x, 1).relu() * g).sum().backward()
    assert 2 * x.grad.square().mean().item() == pytest.approx(exact_factor(8), rel=0.06)


def chain(scale):
    """Two unit blocks; the first one's output times ``scale``. Returns output and gradients."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(8, 8, 3, 3, generator=generator) for _ in range(2)]
    u = torch.randn(2, 8, 6, 6, generator=generator)
    for weight in weights:
        weight.requires_grad_()
    middle = scale * F.group_norm(F.conv2d(u, weights[0], padding=1), 2, eps=0).relu()
    output = F.group_norm(F.conv2d(middle, weights[1], padding=1), 2, eps=0).relu()
    upstream = torch.randn(output.shape, generator=generator)
    return output, torch.autograd.grad((output * upstream).sum(), [*weights, middle])


def test_scale_changes_k_but_no_weight_gradient():
    (output, plain), (same, scaled) = chain(1.0), chain(3.0)
    torch.testing.assert_close(same, output)
    torch.testing.assert_close(scaled[:2], plain[:2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scaled[2], plain[2] / 3)
