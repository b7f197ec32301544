"""Each norm gets the channels of the weight layer that feeds it, and from them its groups."""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from posixpath import join, normpath, relpath
from typing import Any, NamedTuple

from torch import nn

from gn_practical.layers.protocol import BindableNorm, norm_channels
from gn_practical.modeling.sources import Feed, combine, observe
from gn_practical.num_groups import RULES, check_rule, gradient_variance_ratio, resolve_num_groups

# One (pattern, value) entry of a config key.
PatternValues = Sequence[tuple[str, int]]


@dataclass(frozen=True)
class GroupNormBinding:
    """A norm layer, the weight layer that feeds it, and what follows for its groups.

    Attributes:
        norm: path of the norm in the model.
        producer: path of the weight layer before it, several separated by commas; empty where the
            user gave the channels.
        in_channels: n_in of the weight layer.
        out_channels: n_out of the weight layer, the channels of the norm.
        rule: the rule that applies, a name in ``gn_practical.num_groups.RULES``.
        ideal_num_groups: G_ideal of that rule, before clipping.
        num_groups: G as set.
        gradient_variance_ratio: K(G) of Eq. 31.
    """

    norm: str
    producer: str
    in_channels: int
    out_channels: int
    rule: str
    ideal_num_groups: float
    num_groups: int
    gradient_variance_ratio: float


class Producer(NamedTuple):
    """A norm layer and the weight layer that feeds it, each with its path in the model."""

    norm_path: str
    norm: nn.Module
    path: str
    layer: nn.Module


class BoundTo(NamedTuple):
    """What ``bind_group_norms`` leaves on a norm, as ``norm.bound_to``, for the table of groups.

    ``producers`` are the ways to the layers that feed it, as "../conv1" of a ResNet's "bn1".
    """

    producers: tuple[str, ...] = ()
    rule: str = "paper"
    gain_ratio: float = 1.0


def bound_to(norm: nn.Module) -> BoundTo:
    """Return what a norm was bound to; the defaults for one bound by hand, or of another kind."""
    return getattr(norm, "bound_to", BoundTo())


def bind_group_norms(
    model: nn.Module,
    num_groups: int | str = 0,
    *,
    rule: str = "paper",
    gain_ratio: float = 1,
    layer_num_groups: PatternValues = (),
    in_channels: PatternValues = (),
    example_inputs: Any = None,
) -> list[GroupNormBinding]:
    """Bind every ``PracticalGroupNorm`` of ``model`` to the layer that feeds it, in place.

    Without ``example_inputs`` a norm belongs to the layer whose attribute it is (``conv.norm``), or
    else to the nearest weight layer before it among its siblings (``conv1, bn1, conv2, bn2``;
    ``Sequential``). Where that layer's output channels differ from the norm's, or two norms claim
    one layer, nothing is guessed. Modules do not tell in which order they run: where a norm may
    come before its convolution, or be fed by several layers, give ``example_inputs``.

    With them a copy of the model runs once, and each norm that runs is bound to the layers whose
    outputs its input is made of, whatever the modules look like; the model is left as it was.
    Several layers that feed a norm, by concatenation (DenseNet) or by sums (a residual stream),
    count as the one layer that they form: n_in is the channels of all their inputs, an input that
    they share once. Norms that do not run keep what the modules tell.

    Args:
        model: any module; Detectron2's, torchvision's or your own.
        num_groups: 0 for ``rule``, layer by layer; or a number for all layers, or a name that
            :func:`~gn_practical.num_groups.resolve_num_groups` knows.
        rule: "paper" (Algorithm 1) or "exact", see :func:`practical_num_groups`.
        gain_ratio: F / B of the activation after the norms, 1 for the ReLU family; see
            :func:`gn_practical.activation_gain.gain_ratio`.
        layer_num_groups: (pattern, number of groups) for single norms, by shell-style pattern on
            their path; the last match wins.
        in_channels: (pattern, input channels) for norms whose producer cannot be inferred.
        example_inputs: what the model is called with, a tuple for several arguments; or a function
            that runs the model it is given.

    Returns:
        One entry a norm, in the order of the model; empty, with a warning, if there is none.

    Raises:
        ValueError: if a norm's producer cannot be inferred, a number of groups does not divide a
            layer's channels, or a pattern matches no norm; with the paths of the layers.

    Example:
        >>> from gn_practical import PracticalGroupNorm
        >>> from torchvision.models import resnet18
        >>> model = resnet18(norm_layer=PracticalGroupNorm)
        >>> table = bind_group_norms(model)
        >>> len(table), model.bn1
        (20, PracticalGroupNorm(3 -> 64, num_groups=1, eps=1e-05, affine=True))
    """
    norms = _norms(model)
    if not norms:
        warnings.warn(
            f"{type(model).__name__} has no PGN norm, so nothing was bound. What built it may have "
            "dropped the norm_layer or NORM that it was given.",
            stacklevel=2,
        )
    check_rule(rule)
    given = _match(in_channels, norms, "in_channels")
    groups = _match(layer_num_groups, norms, "layer_num_groups")
    feeds, reasons = _find_feeds(model, norms, example_inputs)
    feeds.update({path: Feed((), channels) for path, channels in given.items()})
    _raise_unbound(model, {path: reasons[path] for path in norms if path not in feeds})
    for path, norm in norms.items():
        choice = groups.get(path, num_groups) or rule
        producers, n_in = feeds[path]
        ways = tuple(relpath(_folders(producer), _folders(path)) for producer in producers)
        try:
            number = resolve_num_groups(choice, n_in, norm.num_channels, gain_ratio)
            norm.bind(n_in, number)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        norm.bound_to = BoundTo(ways, rule, gain_ratio)
    return group_norm_bindings(model)


def group_norm_bindings(model: nn.Module) -> list[GroupNormBinding]:
    """Return the table of groups of a model, as its norms are bound now.

    Args:
        model: any module; norms that are not bound are left out.

    Example:
        >>> from gn_practical import PracticalGroupNorm
        >>> model = nn.Sequential(nn.Linear(64, 32), PracticalGroupNorm(32))
        >>> table = bind_group_norms(model)
        >>> group_norm_bindings(model) == table
        True
    """
    rows = []
    for path, norm in _norms(model).items():
        n_in, n_out, groups = norm.in_channels, norm.num_channels, norm.num_groups
        if n_in:
            _, rule, ratio = bound_to(norm)
            producer = ", ".join(producer_paths(path, norm))
            ideal = float(RULES[rule](n_in, n_out, ratio))
            paper = gradient_variance_ratio(n_in, n_out, groups, ratio)
            rows.append(GroupNormBinding(path, producer, n_in, n_out, rule, ideal, groups, paper))
    return rows


def find_producers(model: nn.Module) -> list[Producer]:
    """List the norms of a model with the weight layer that feeds each, where the modules tell.

    Norms of any kind are listed. A norm is left out where the layer before it has other channels,
    where another norm claims the same layer, or where the norm, shared, claims several.
    """
    claims = list(dict.fromkeys(_claims(model)))  # two parents may make the same
    norms, layers = Counter(c.norm_path for c in claims), Counter(c.path for c in claims)
    return [c for c in claims if norms[c.norm_path] == layers[c.path] == 1]


def producer_paths(norm_path: str, norm: nn.Module) -> list[str]:
    """Return the paths of the weight layers that a norm, now at ``norm_path``, was bound to."""
    ways = bound_to(norm).producers
    return [normpath(join(_folders(norm_path), way))[1:].replace("/", ".") for way in ways]


def layer_channels(layer: nn.Module) -> tuple[int, int] | None:
    """Return (n_in, n_out) of a convolution, deformable ones too, or a Linear; None of others."""
    if not hasattr(layer, "weight"):
        return None
    for n_in, n_out in (("in_channels", "out_channels"), ("in_features", "out_features")):
        if isinstance(getattr(layer, n_in, None), int) and hasattr(layer, n_out):
            return getattr(layer, n_in), getattr(layer, n_out)
    return None


def _norms(model: nn.Module) -> dict[str, BindableNorm]:
    return {p: m for p, m in model.named_modules() if isinstance(m, BindableNorm)}


def _claims(model: nn.Module) -> Iterator[Producer]:
    paths = {id(module): path for path, module in model.named_modules()}
    for parent in model.modules():
        last = parent if layer_channels(parent) else None
        for child in parent.children():
            if layer_channels(child):
                last = child
            elif any(map(layer_channels, child.modules())):
                last = None  # its last layer, whichever that is, is nearer
            channels = norm_channels(child)
            if channels and last is not None and layer_channels(last)[1] == channels:
                yield Producer(paths[id(child)], child, paths[id(last)], last)


def _find_feeds(
    model: nn.Module, norms: dict[str, BindableNorm], example_inputs: Any
) -> tuple[dict[str, Feed], dict[str, str]]:
    """Return what feeds each norm, and why that is not known of the others."""
    feeds = {
        norm_path: Feed((path,), layer_channels(layer)[0])
        for norm_path, _, path, layer in find_producers(model)
    }
    reasons = dict.fromkeys(norms, "its siblings do not tell which weight layer runs before it")
    if example_inputs is None:
        return feeds, reasons
    layers = {path: n for path, m in model.named_modules() if (n := layer_channels(m))}
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    run = example_inputs if callable(example_inputs) else lambda shadow: shadow(*arguments)
    calls, order = observe(model, run, layers, norms)
    for path, sources in calls.items():
        if any(sources):
            found = combine(sources, layers, norms[path].num_channels)
        elif path in feeds and order.get(feeds[path].producers[0], len(order)) < order[path]:
            continue  # its layer ran before it, by functions that torch does not show
        else:
            found = "no weight layer was seen to feed it"
        feeds.pop(path, None)
        if isinstance(found, str):
            reasons[path] = found
        else:
            feeds[path] = found
    return feeds, reasons


def _folders(path: str) -> str:
    """Turn the path of a module into that of a file, whose ways to others posixpath knows."""
    return "/" + path.replace(".", "/")


def _match(entries: PatternValues, norms: dict[str, Any], name: str) -> dict[str, int]:
    """Expand patterns to paths; later entries win."""
    matched: dict[str, int] = {}
    for entry in entries:
        if not (isinstance(entry, Sequence) and len(entry) == 2 and isinstance(entry[0], str)):
            raise ValueError(
                f"{name} must hold (pattern, number) pairs, got {entry!r}. "
                'Write it like (("backbone.*.norm", 32),).'
            )
        paths = [path for path in norms if fnmatchcase(path, entry[0])]
        if not paths:
            raise ValueError(
                f"{name} must match at least one PGN layer, got pattern {entry[0]!r}. The model "
                f"has {len(norms)} such layers: {some(list(norms))}."
            )
        matched.update(dict.fromkeys(paths, entry[1]))
    return matched


def _raise_unbound(model: nn.Module, reasons: dict[str, str]) -> None:
    if not reasons:
        return
    modules = dict(model.named_modules())
    lines = [
        f"{type(modules[path]).__name__} of {modules[path].num_channels} channels at {path!r} in "
        f"{type(modules[path.rpartition('.')[0]]).__name__} ({reason})"
        for path, reason in reasons.items()
    ]
    raise ValueError(
        f"every PGN layer must follow a weight layer of its channels, got {len(lines)} in "
        f"{type(model).__name__} whose input channels are not known: {some(lines)}. Let a run "
        "show them, bind_group_norms(model, example_inputs=...), or give them: "
        f'MODEL.PGN.IN_CHANNELS (("{next(iter(reasons))}", 256),) or '
        "bind_group_norms(model, in_channels=...)."
    )


def some(items: Sequence[str], most: int = 8) -> str:
    """Join the first items for a message, and say how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return (", ".join(items[:most]) or "none") + more
