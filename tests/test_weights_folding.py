"""Weights folded into another config compute the same."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from resnet_references import (
    Functional,
    assert_equal,
    difference,
    features_here,
    normalized,
    picture,
)
from test_weights_layouts import (
    BN_PARTS,
    GN_PARTS,
    batch_norm,
    bit,
    group_norm,
    jhu,
    layout,
    qiao,
    shrink_filters,
)

from gn_practical import standardize_weight
from gn_practical.weights import Standardization, read_weights
from gn_practical.weights.folding import fold_bn, fold_input_order, fold_std, fold_ws, standardized

BIT = Standardization(eps=1e-6, eps_under_root=True, biased=True)


@pytest.fixture
def bn(tmp_path):
    """Plain weights with batch norms, and the features that they should have."""
    state, convs, norms = layout("torchvision", "bn", parts=BN_PARTS)
    torch.save(state, tmp_path / "a.pth")
    wanted = Functional(convs, batch_norm(norms))(normalized(picture()))
    return read_weights(str(tmp_path / "a.pth")), wanted


@pytest.fixture
def ws(tmp_path):
    """Standardized weights, and the features that they should have."""
    file_name, model, image = jhu(tmp_path)
    return read_weights(str(tmp_path / file_name)), model(image)


def test_order_and_std_go_into_the_first_convolution(bn):
    weights, wanted = bn
    folded = fold_std(fold_input_order(weights, "BGR"))
    description = folded.description
    assert description.input_format == "BGR"
    assert description.pixel_mean == (103.53, 116.28, 123.675)
    assert description.pixel_std == (1, 1, 1)
    assert_equal(features_here(folded, picture()), wanted)
    # The input is as it was, and one without the other shows.
    assert_equal(features_here(weights, picture()), wanted)
    wrong = replace(description, input_format="RGB", pixel_mean=description.pixel_mean[::-1])
    assert difference(features_here(folded, picture(), description=wrong), wanted) > 0.01


def test_the_mean_in_a_bias_would_differ_at_the_border(bn):
    """Why it stays in the config: padding is 0 after the mean is subtracted."""
    weights, _ = bn
    weight = fold_std(weights).state["stem.conv1.weight"]
    mean = torch.tensor(weights.description.pixel_mean)[:, None, None]
    wanted = F.conv2d((picture() - mean)[None], weight, padding=3, stride=2)
    bias = -(weight * mean).sum((1, 2, 3))
    folded = F.conv2d(picture()[None], weight, bias, padding=3, stride=2)
    wrong = (folded - wanted).abs() > 1e-2
    assert not wrong[..., 2:-2, 2:-2].any()
    assert wrong[..., 0, :].any()


def test_the_order_folds_under_standardization_and_the_std_does_not(ws):
    weights, wanted = ws
    assert_equal(features_here(fold_input_order(weights, "BGR"), picture()), wanted)
    with pytest.raises(ValueError, match=r"standardizing would undo it\. .*--fold-ws plain"):
        fold_std(weights)
    plain = fold_std(fold_ws(weights, "plain"))
    assert plain.description.weight_standardization is False
    assert_equal(features_here(plain, picture()), wanted)


@pytest.mark.parametrize("into", ["plain", "ws"])
def test_standardization_by_another_definition_folds(tmp_path, into):
    state, convs, norms = layout("torchvision", "gn", parts=GN_PARTS)
    shrink_filters(state)
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    weights = read_weights(str(tmp_path / "a.pth"), "jhu")
    weights = replace(weights, description=replace(weights.description, standardization=BIT))
    wanted = Functional(convs, group_norm(norms), standardize=bit)(normalized(picture()))
    folded = fold_ws(weights, into)
    assert folded.description.weight_standardization is (into == "ws")
    assert_equal(features_here(folded, picture()), wanted)


def test_only_layers_that_are_standardized_fold(ws):
    weights, _ = ws
    known = replace(weights.description, standardized_layers=["res2.0.conv1"])
    folded = fold_ws(replace(weights, description=known), "plain")
    changed = [key for key in weights.state if folded.state[key] is not weights.state[key]]
    assert changed == ["res2.0.conv1.weight"]
    assert folded.description.standardized_layers is None


def test_definitions_are_their_authors_formulas():
    weight = torch.randn(8, 4, 3, 3) * torch.logspace(-4, 0, 8)[:, None, None, None] + 0.1
    for definition, formula in ((Standardization(), qiao), (BIT, bit)):
        assert torch.allclose(standardized(weight, definition), formula(weight.double()))
    ours = standardize_weight(weight.double())
    assert torch.allclose(standardized(weight, Standardization()), ours)


def test_this_package_s_definition_stays_bit_for_bit(ws):
    assert fold_ws(ws[0], "ws") is ws[0]


def test_batch_norms_become_a_scale_and_a_shift(bn):
    weights, wanted = bn
    folded = fold_bn(weights)
    assert_equal(features_here(folded, picture()), wanted)
    means = [value for key, value in folded.state.items() if key.endswith("running_mean")]
    assert len(means) == 17
    assert not any(mean.any() for mean in means)


def test_what_cannot_be_folded_is_refused(bn, ws):
    unknown = replace(bn[0], description=replace(bn[0].description, pixel_std=None, norm_eps=None))
    for fold, message in (
        (lambda: fold_std(unknown), "pixel_std must be known"),
        (lambda: fold_bn(unknown), "eps of its norms must be known"),
        (lambda: fold_bn(ws[0]), "have running_var, got norm=GN"),
        (lambda: fold_ws(bn[0], "plain"), "got weight_standardization=False"),
        (lambda: fold_ws(ws[0], "bit"), "got into=bit"),
        (lambda: standardized(torch.ones(3, 1, 1, 1), BIT), "two numbers at least"),
        (lambda: fold_std(replace(bn[0], state={})), "one stem.conv1.weight .* got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            fold()
    unknown = replace(ws[0], description=replace(ws[0].description, input_format=None))
    with pytest.raises(ValueError, match="order of its channels must be known"):
        fold_input_order(unknown, "BGR")
