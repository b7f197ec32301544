"""What weights were trained with, compared with the model that has taken them."""

from collections.abc import Iterable, Iterator, Mapping
from math import isclose
from statistics import median
from typing import Any

from torch import Tensor, nn

from gn_practical.modeling.binding import find_producers
from gn_practical.weights.description import Description, Standardization
from gn_practical.weights.folding import standardized

_GREY_LEVELS = 0.5  # by which means and deviations of pixels may differ
_RELATIVE = 1e-3  # by which standardized weights and eps may; bfloat16 makes more
_NAMED = 3  # layers of those that differ


def differences(
    trained: Description, present: Description, model: nn.Module, filled: Mapping[str, Tensor]
) -> list[str]:
    """Compare what weights were trained with and the model that they were loaded into.

    What either side does not know is not compared, nor are layers that the weights did not fill.

    Args:
        trained: of the weights.
        present: of the model (:func:`gn_practical.weights.describe.describe`).
        model: the model.
        filled: the weights that it took, by its names.

    Returns:
        A text for each difference, with both values and the config key.

    Example:
        >>> from gn_practical.weights.describe import describe
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8))
        >>> trained = Description(num_groups=4, norm_eps=1e-6)
        >>> for text in differences(trained, describe(model), model, model.state_dict()):
        ...     print(text)
        other groups in 1 layers: 1 (4 in the checkpoint, 2 in the model), MODEL.PGN
        eps of the norms=1e-05 (1e-06 in the checkpoint)
    """
    if not filled:
        return []
    unfilled = {_layer(key) for key in model.state_dict()} - {_layer(key) for key in filled}
    groups = {p: g for p, g in (present.num_groups or {}).items() if p not in unfilled}
    return [
        *_other_groups(trained, groups),
        *_other_standardization(trained, present, model, filled),
        *_other_values(trained, present),
    ]


def class_differences(trained: Description, present: Description) -> list[str]:
    """Compare the classes, of which a model that is trained on may have others.

    Example:
        >>> class_differences(
        ...     Description(class_names={"thing": ["cat", "dog"]}),
        ...     Description(class_names={"thing": ["dog", "cat"]}),
        ... )
        ["thing class 0='dog' ('cat' in the checkpoint), DATASETS"]
    """
    found = []
    for kind in ("thing", "stuff"):
        old, new = ((each.class_names or {}).get(kind) for each in (trained, present))
        if not old or not new or old == new:
            continue
        if len(old) != len(new):
            found.append(f"{len(new)} {kind} classes ({len(old)} in the checkpoint), DATASETS")
            continue
        first = next(i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b)
        found.append(
            f"{kind} class {first}={new[first]!r} ({old[first]!r} in the checkpoint), DATASETS"
        )
    return found


def _other_groups(trained: Description, groups: dict[str, int]) -> Iterator[str]:
    before = {path: _of_layer(trained.num_groups, path) for path in groups}
    other = {p: (before[p], groups[p]) for p in groups if before[p] not in (None, groups[p])}
    if other:
        yield f"other groups in {_layers(other)}, MODEL.PGN"


def _other_standardization(
    trained: Description, present: Description, model: nn.Module, filled: Mapping[str, Tensor]
) -> Iterator[str]:
    """Compare which convolutions are standardized, and how; with what it does to their weights."""
    if trained.weight_standardization is None or present.standardized_layers is None:
        return
    weights = _normalized_convolutions(model, filled)
    was = [path for path in weights if _is_standardized(trained, path)]
    now = [path for path in weights if path in present.standardized_layers]
    old, new = (each.standardization or Standardization() for each in (trained, present))
    switched = {p: ("on", "off") for p in was if p not in now}
    switched |= {p: ("off", "on") for p in now if p not in was}
    if switched:
        middle, most = _change((weights[path] for path in switched), old if was else new, None)
        yield (
            f"other weight standardization in {_layers(switched)}, MODEL.WS: it changes the "
            f"weights by {middle:.2g} % (median of these layers) to {most:.2g} %"
        )
    kept = [weights[path] for path in now if path in was and old != new]
    middle, most = _change(kept, old, new)
    if most > 100 * _RELATIVE:
        yield (
            f"weight standardization by {_formula(new)} ({_formula(old)} in the checkpoint): it "
            f"changes the weights by {middle:.2g} % (median of the layers) to {most:.2g} %"
        )


def _other_values(trained: Description, present: Description) -> Iterator[str]:
    of_bottlenecks = "MODEL.RESNETS.STRIDE_IN_1X1"
    averages = "shortcuts that average pixels, MODEL.BACKBONE.NAME"
    for key, old, new, differ in (
        ("INPUT.FORMAT", trained.input_format, present.input_format, _unequal),
        ("MODEL.PIXEL_MEAN", trained.pixel_mean, present.pixel_mean, _other_pixels),
        ("MODEL.PIXEL_STD", trained.pixel_std, present.pixel_std, _other_pixels),
        ("norms of the backbone", trained.norm, present.norm, _unequal),
        (of_bottlenecks, trained.stride_in_1x1, present.stride_in_1x1, _unequal),
        (averages, trained.pooled_shortcuts, present.pooled_shortcuts, _unequal),
        ("eps of the norms", trained.norm_eps, present.norm_eps, _far),
    ):
        if old is not None and new is not None and differ(old, new):
            yield f"{key}={_text(new)} ({_text(old)} in the checkpoint)"


def _normalized_convolutions(model: nn.Module, filled: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the loaded weights of the convolutions that a norm follows, by path."""
    weights = {
        each.path: filled.get(f"{each.path}.weight")
        for each in find_producers(model)
        if isinstance(each.layer, nn.Conv2d) and each.layer.weight[0].numel() > 1
    }
    return {path: weight.double() for path, weight in weights.items() if weight is not None}


def _is_standardized(description: Description, path: str) -> bool:
    if not description.weight_standardization or description.standardized_layers is None:
        return bool(description.weight_standardization)  # of all that a norm follows
    return bool(_of_layer(dict.fromkeys(description.standardized_layers, True), path))


def _of_layer(values: Any, path: str) -> Any:
    """Return the value of a layer, whose path may begin deeper or higher up in the other model."""
    if not isinstance(values, dict):
        return values
    same = (k for k in values if f".{path}".endswith(f".{k}") or f".{k}".endswith(f".{path}"))
    return values.get(max(same, key=len, default=None))


def _change(
    weights: Iterable[Tensor], old: Standardization | None, new: Standardization | None
) -> tuple[float, float]:
    """Return by how many per cent weights change: the median of the layers, and the most.

    Where they are standardized in one case alone, the scale of a layer, which its norm takes out,
    is left out.
    """
    changes = [0.0]
    for weight in weights:
        before, after = (standardized(weight, each) if each else weight for each in (old, new))
        if new is None:
            after = after * (before * after).sum() / after.square().sum()
        change = (before - after).norm() / before.norm()
        changes.append(100 * change.nan_to_num().item())  # constant filters become zero
    return median(changes[1:] or changes), max(changes)


def _layers(values: dict[str, tuple[Any, Any]]) -> str:
    named = [
        f"{path} ({old} in the checkpoint, {new} in the model)"
        for path, (old, new) in list(values.items())[:_NAMED]
    ]
    more = " ..." if len(values) > _NAMED else ""
    return f"{len(values)} layers: {', '.join(named)}{more}"


def _formula(definition: Standardization) -> str:
    spread = "biased" if definition.biased else "unbiased"
    if definition.eps_under_root:
        return f"(W - mean) / sqrt(var + {definition.eps:g}), {spread}"
    return f"(W - mean) / (std + {definition.eps:g}), {spread}"


def _text(value: Any) -> str:
    return (
        f"[{', '.join(f'{each:g}' for each in value)}]" if isinstance(value, tuple) else str(value)
    )


def _layer(key: str) -> str:
    return key.rpartition(".")[0]


def _unequal(old: Any, new: Any) -> bool:
    return old != new


def _far(old: float, new: float) -> bool:
    return not isclose(old, new, rel_tol=_RELATIVE)


def _other_pixels(old: tuple[float, ...], new: tuple[float, ...]) -> bool:
    pairs = zip(old, new, strict=False)
    return len(old) != len(new) or any(abs(a - b) > _GREY_LEVELS for a, b in pairs)
