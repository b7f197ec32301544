"""Weights changed so that another config computes the same with them."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from gn_practical.layers.weight_standardization import EPS
from gn_practical.weights.description import Standardization
from gn_practical.weights.read import Weights

# Largest standard deviation that a standardized filter is made to have: 1 is out of reach, because
# eps is added to the divisor, and near it the filter's size is lost to rounding.
_LARGEST_STD = 0.999
_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


def fold_input_order(weights: Weights, input_format: str) -> Weights:
    """Let weights take pictures in another order of channels; exact.

    Weight standardization takes all numbers of a filter alike, so it does not mind.

    Args:
        weights: with a known order.
        input_format: "BGR" or "RGB".

    Raises:
        ValueError: if the order is not known.
    """
    description = weights.description
    if description.input_format == input_format:
        return weights
    if description.input_format is None:
        raise _unknown("the order of its channels", "input_format=RGB")
    flipped = {key: value.flip(1) for key, value in _first_convolution(weights)}
    return replace(
        weights,
        state=weights.state | flipped,
        description=replace(
            description,
            input_format=input_format,
            pixel_mean=description.pixel_mean and description.pixel_mean[::-1],
            pixel_std=description.pixel_std and description.pixel_std[::-1],
        ),
    )


def fold_std(weights: Weights) -> Weights:
    """Divide the first convolution by ``pixel_std``, which becomes 1; exact but for rounding.

    The mean cannot follow: it would become a bias, and the padding of the first convolution, 0
    after the mean is subtracted, would be a black frame before it. It stays ``MODEL.PIXEL_MEAN``.

    Args:
        weights: with a known ``pixel_std``, not standardized.

    Raises:
        ValueError: if the std is not known, or standardization would undo the division.
    """
    description = weights.description
    if description.pixel_std is None:
        raise _unknown("pixel_std", "'pixel_std=[58.395, 57.12, 57.375]'")
    if description.weight_standardization is not False:
        raise ValueError(
            "pixel_std must be folded into weights that are not standardized, got "
            f"weight_standardization={description.weight_standardization}: standardizing would "
            "undo it. Fold the standardization too (--fold-ws plain), or keep MODEL.PIXEL_STD."
        )
    std = torch.tensor(description.pixel_std, dtype=torch.float64).view(1, -1, 1, 1)
    divided = {
        key: _like(value, value.double() / std) for key, value in _first_convolution(weights)
    }
    return replace(
        weights,
        state=weights.state | divided,
        description=replace(description, pixel_std=(1.0,) * std.numel()),
    )


def fold_ws(weights: Weights, into: str) -> Weights:
    """Take weight standardization out of the config, or bring it to this package's definition.

    Args:
        weights: standardized, by a known definition.
        into: "plain": what the convolutions compute with, for ``MODEL.WS.ENABLED False``. "ws": the
            weights from which ``WSConv2d`` computes the same, for other definitions than its own.
            Where that gives filters of std 1 or more, which it cannot, all filters of a layer
            shrink by the same factor, within 1 part in 1000 of 1, which the norm after them undoes.

    Raises:
        ValueError: if they are not standardized, or the definition is not known.
    """
    description = weights.description
    if into not in ("plain", "ws"):
        raise ValueError(f"into must be plain or ws, got into={into}. Correct it.")
    if not description.weight_standardization or description.standardization is None:
        raise ValueError(
            "standardization can be folded where the weights have it, got weight_standardization="
            f"{description.weight_standardization}, standardization={description.standardization}. "
            "Leave the folding out, or say what is known with --describe."
        )
    if into == "ws" and description.standardization == Standardization():
        return weights
    fold = _plain if into == "plain" else _for_ws_conv
    folded = _map_convolutions(weights, lambda w: fold(w, description.standardization))
    known = {"weight_standardization": into == "ws"}
    known["standardization"] = Standardization() if into == "ws" else None
    known["standardized_layers"] = description.standardized_layers if into == "ws" else None
    return replace(weights, state=folded, description=replace(description, **known))


def fold_bn(weights: Weights) -> Weights:
    """Make each batch norm with statistics a scale and a shift, as Caffe2's files have it.

    For ``FrozenBN``, with mean 0 and variance 1. Not into the convolutions: those of Detectron2's
    ResNet have no bias.

    Args:
        weights: with batch norms; the backbone's eps is taken for all.

    Raises:
        ValueError: if there are none, or eps is not known.
    """
    state, eps = dict(weights.state), weights.description.norm_eps
    prefixes = [key.removesuffix("running_var") for key in state if key.endswith(".running_var")]
    if not prefixes:
        raise ValueError(
            "batch norms can be folded where the weights have running_var, got "
            f"norm={weights.description.norm}. Leave --fold-bn out."
        )
    if eps is None:
        raise _unknown("eps of its norms", "norm_eps=1e-5")
    for prefix in prefixes:
        weight, bias, mean, var = (state[prefix + name].double() for name in _NORM_PARTS)
        scale = weight * (var + eps).rsqrt()
        one = torch.ones_like(var) - eps  # FrozenBN adds eps again
        folded = (scale, bias - mean * scale, torch.zeros_like(mean), one)
        for name, value in zip(_NORM_PARTS, folded, strict=True):
            state[prefix + name] = _like(state[prefix + name], value)
    return replace(weights, state=state)


def standardized(weight: Tensor, definition: Standardization) -> Tensor:
    """Return filters as a definition of weight standardization makes them, in float64.

    Args:
        weight: (out_channels, ...).
        definition: which.

    Example:
        >>> standardized(torch.tensor([[1.0, 3.0]]), Standardization(eps=1.0, biased=True))
        tensor([[-0.5000,  0.5000]], dtype=torch.float64)
    """
    flat = weight.double().flatten(1)
    if flat.shape[1] < 2:
        raise ValueError(
            "a filter must have two numbers at least to be standardized, got a weight of shape "
            f"{tuple(weight.shape)}. Such a layer was not standardized; say what was."
        )
    var, mean = torch.var_mean(flat, 1, correction=int(not definition.biased), keepdim=True)
    eps = definition.eps
    divisor = (var + eps).sqrt() if definition.eps_under_root else var.sqrt() + eps
    return ((flat - mean) / divisor).view(weight.shape)


def _plain(weight: Tensor, definition: Standardization) -> Tensor:
    return standardized(weight, definition)


def _for_ws_conv(weight: Tensor, definition: Standardization) -> Tensor:
    """Solve u a / (s a + EPS) = u for the factor a of each filter u with std s."""
    wanted = standardized(weight, definition).flatten(1)
    std = wanted.std(1, keepdim=True)
    shrink = (_LARGEST_STD / std.max()).clamp(max=1)
    return (wanted * shrink * EPS / (1 - std * shrink)).view(weight.shape)


def _map_convolutions(weights: Weights, fold: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Fold the convolutions that are standardized: as described, else those that a norm follows."""
    state, layers = dict(weights.state), weights.description.standardized_layers
    if layers is None:
        paths = (key.removesuffix(".weight") for key, each in state.items() if each.dim() == 4)
        layers = [path for path in paths if f"{path}.norm.weight" in state]
    for path in layers:
        value = weights.state[f"{path}.weight"]
        state[f"{path}.weight"] = _like(value, fold(value))
    return state


def _first_convolution(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    pattern = r"(^|\.)stem\.conv1\.weight$"
    found = [(key, value) for key, value in weights.state.items() if re.search(pattern, key)]
    if len(found) != 1:
        raise ValueError(
            "the input must be folded into the one stem.conv1.weight of a ResNet, got "
            f"{len(found)} of that name. Keep the input's keys in the config."
        )
    yield from found


def _like(value: Tensor, folded: Tensor) -> Tensor:
    return folded.to(torch.promote_types(value.dtype, torch.float32))


def _unknown(what: str, example: str) -> ValueError:
    return ValueError(
        f"{what} must be known to be folded, got weights that do not tell. Say it with --describe "
        f"{example}, or where the file comes from with --source."
    )
