"""Scales and shifts for norms that came to a trained model after its training."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gn_practical.layers.protocol import norm_channels, norm_groups
from gn_practical.modeling.binding import some

_TINY = 1e-6  # standard deviation of a normalized channel that does not vary


class _Reached(Exception):
    """A forward pass has come as far as it is needed."""


@torch.no_grad()
def recalibrate_norms(
    model: nn.Module, batches: Iterable[Any], reference: nn.Module | int
) -> list[str]:
    """Set scale and shift of each group norm so that its outputs have the moments of before.

    Weights that were trained with other norms compute something else with the new ones: other
    groups, or batch norm's running statistics. This gives every channel of every norm's output the
    mean and the standard deviation, over pixels and batches, that it has in the model with its
    former norms on the same pictures. Norms are set in the order in which they run, each seeing
    what those before it now return. The sign of a scale is that of the former norm, and a channel
    that does not vary keeps its scale.

    Only two moments of each channel return: what a norm does to a single picture stays other than
    it was, and training has to take care of the rest.

    Args:
        model: has the weights and its new norms, bound. A norm that several parts share is set
            once, over all of its calls. Not yet wrapped for data parallelism.
        batches: what the model is called with, one after another; a tuple for several arguments.
            A few will do. Each is run once for every norm, up to that norm.
        reference: the model with its former norms, whose paths are the same; it may have batch
            norms, frozen or not, which use their running statistics. Or the former number of
            groups of all norms.

    Returns:
        Paths of the norms, in the order in which they run.

    Raises:
        ValueError: if there are no batches or norms, or a norm has no scale, does not run, or has
            no counterpart; with the paths. Nothing has been changed then.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU())
        >>> batches = [torch.randn(2, 3, 9, 9)]
        >>> before = copy.deepcopy(model)
        >>> model[1].num_groups = 1
        >>> recalibrate_norms(model, batches, before)
        ['1']
        >>> x, y = model[:2](batches[0]), before[:2](batches[0])
        >>> torch.allclose(x.std((0, 2, 3)), y.std((0, 2, 3)), rtol=1e-4)
        True
    """
    batches = list(batches)
    if isinstance(reference, int):
        reference = _with_groups(model, reference)
    norms = _norms(model)
    formers = _counterparts(norms, reference)
    with _evaluating(model), _evaluating(reference):
        targets = _moments(reference, formers, batches)
        order = list(_moments(model, norms, batches))
        _require_all(norms, order, targets)
        for path in order:
            _set_moments(model, path, norms, formers[path], batches, targets[path])
    return order


class Moments:
    """Mean and standard deviation of each channel of tensors of shape (N, C, *), in float64."""

    def __init__(self) -> None:
        self.calls, self._count, self._sum, self._squares = 0, 0, 0, 0

    def add(self, x: Tensor) -> None:
        """Count a tensor."""
        self.calls += 1
        x = x.double().transpose(0, 1).flatten(1)
        self._count += x.shape[1]
        self._sum = self._sum + x.sum(1)
        self._squares = self._squares + x.square().sum(1)

    @property
    def mean(self) -> Tensor:
        """Mean of each channel."""
        return self._sum / self._count

    @property
    def std(self) -> Tensor:
        """Standard deviation of each channel."""
        return (self._squares / self._count - self.mean.square()).clamp(min=0).sqrt()


def _with_groups(model: nn.Module, num_groups: int) -> nn.Module:
    former = copy.deepcopy(model)
    for path, norm in _norms(former).items():
        if norm.num_channels % num_groups:
            raise ValueError(
                f"the former number of groups must divide the channels of every norm, got "
                f"reference={num_groups} for {norm.num_channels} channels at {path}. Give the "
                "model with its former norms."
            )
        norm.num_groups = num_groups
    return former


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    norms = {path: m for path, m in model.named_modules() if norm_groups(m) is not None}
    plain = [path for path, norm in norms.items() if norm.weight is None or norm.bias is None]
    if plain or not norms:
        raise ValueError(
            "a model to recalibrate must have group norms with scale and shift, got "
            f"{some(plain)} in {type(model).__name__}. Give the part of the "
            "model that has them."
        )
    return norms


def _counterparts(norms: dict[str, nn.Module], reference: nn.Module) -> dict[str, nn.Module]:
    theirs = dict(reference.named_modules(remove_duplicate=False))
    formers = {path: theirs.get(path) for path in norms}
    wrong = [
        path
        for path, norm in norms.items()
        if formers[path] in (None, norm) or norm_channels(formers[path]) != norm.num_channels
    ]
    if wrong:
        raise ValueError(
            "the reference must be another model with a norm of the same channels at each path, "
            f"got {type(reference).__name__} without one at {some(wrong)}. Copy the model before "
            "its norms are changed, copy.deepcopy(model), or build it with its former norms."
        )
    return formers


def _require_all(
    norms: dict[str, nn.Module], order: list[str], targets: dict[str, Moments]
) -> None:
    idle = [path for path in norms if path not in order or path not in targets]
    if idle:
        raise ValueError(
            f"every norm must run on the batches, got {len(idle)} of {len(norms)} that do not: "
            f"{some(idle)}. Give more batches, or the part of the model that runs: "
            "recalibrate_norms(model.backbone, images, before.backbone)."
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _moments(
    model: nn.Module, norms: dict[str, nn.Module], batches: list[Any], last: str = ""
) -> dict[str, Moments]:
    """Return the moments of what norms return, by path, in the order in which they run.

    Each batch is left where the norm ``last``, which runs once in a forward pass, has run.
    """
    found: dict[str, Moments] = {}

    def watch(path: str, norm: nn.Module, args: tuple, output: Tensor) -> None:
        if output.numel():
            found.setdefault(path, Moments()).add(output)
        if path == last:
            raise _Reached

    with ExitStack() as hooks:
        for path, norm in norms.items():
            hooks.callback(norm.register_forward_hook(partial(watch, path)).remove)
        for batch in batches:
            with suppress(_Reached):
                model(*batch) if isinstance(batch, tuple) else model(batch)
    return found


def _set_moments(
    model: nn.Module,
    path: str,
    norms: dict[str, nn.Module],
    former: nn.Module,
    batches: list[Any],
    target: Moments,
) -> None:
    """Set the scale and shift of one norm; those before it have theirs."""
    norm = norms[path]
    norm.weight.fill_(1)
    norm.bias.zero_()
    last = "" if target.calls > len(batches) else path
    own = _moments(model, {path: norm}, batches, last)[path]
    scale = torch.ones_like(target.std) if former.weight is None else former.weight.double()
    varies = own.std > _TINY
    scale = torch.where(varies, (target.std / own.std).copysign(scale), scale)
    norm.weight.copy_(scale)
    norm.bias.copy_(target.mean - scale * own.mean)
