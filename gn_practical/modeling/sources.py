"""The weight layers that feed each norm, found by running a model once.

A weight layer marks its output, and every function of torch hands the marks of its arguments on to
its result: views, slices, concatenations, sums, pooling, activations, norms. What arrives at a norm
names the layers whose outputs its input is made of.

Not followed, and an error where a norm gets it: products of features with features outside of a
weight layer (attention). Left out: a factor that is broadcast over the features, such as a gate.
"""

import copy
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from gn_practical.layers.protocol import is_fusable

# Functions whose result mixes all channels of their input, as a weight layer does.
_MIXING = (
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("linear", "bilinear", "matmul", "rmatmul", "mm", "bmm", "addmm", "baddbmm", "einsum"),
    *("tensordot", "deform_conv2d", "scaled_dot_product_attention"),
    "multi_head_attention_forward",
)
_PRODUCTS = ("mul", "imul", "rmul", "multiply", "div", "idiv", "truediv", "itruediv", "divide")


class Source(NamedTuple):
    """A weight layer that ran, and a number for the tensor that it ran on."""

    path: str  # empty for features that were mixed outside of any weight layer
    tensor: int


class Feed(NamedTuple):
    """Paths of the weight layers that feed a norm, and the input channels of them together."""

    producers: tuple[str, ...]
    in_channels: int


def observe(
    model: nn.Module,
    run: Callable[[nn.Module], Any],
    layers: Iterable[str],
    norms: Container[str],
) -> tuple[dict[str, list[frozenset[Source]]], dict[str, int]]:
    """Run a copy of a model once, in evaluation mode, and see what feeds its norms.

    Returns each norm's sources, call by call, and when each module ran first. The copy shares the
    model's parameters and has its own buffers, so the run leaves nothing behind; the state of
    torch's random numbers is restored. In the copy norms run with one group, bound or not.
    """
    shadow = _copy(model)
    modules = dict(shadow.named_modules())
    for path, module in modules.items():
        module.training = False  # not eval(): some models merge weights there
        if path in norms or is_fusable(module):
            module.forward = _one_group
    devices = {p.device.index for p in shadow.parameters() if p.is_cuda}
    watch = _Watch(modules, set(layers), norms)
    with torch.random.fork_rng(devices), torch.no_grad(), watch:
        run(shadow)
    return watch.calls, watch.order


def combine(
    calls: list[frozenset[Source]], layers: dict[str, tuple[int, int]], num_channels: int
) -> Feed | str:
    """Return the one layer that all sources of a norm form, or why they form none.

    Concatenated or summed, the outputs of several layers are that of one layer whose input is all
    of theirs together. ``calls`` are the sources of each call of the norm, ``layers`` the input and
    output channels of the weight layers.
    """
    feeds: dict[int, dict[str, None]] = {}  # n_in -> paths of the layers
    for sources in calls:
        ran = {source.path for source in sources}
        if not ran or "" in ran:
            return "its input is mixed outside of any weight layer, as in attention"
        paths = [path for path in layers if path in ran]
        outputs = [layers[source.path][1] for source in sources]
        names = ", ".join(f"{path} ({layers[path][1]})" for path in paths)
        if max(outputs) > num_channels or sum(outputs) < num_channels:
            return f"its channels are not the output channels of what feeds it: {names}"
        n_in = sum({source.tensor: layers[source.path][0] for source in sources}.values())
        feeds.setdefault(n_in, {}).update(dict.fromkeys(paths))
    if len(feeds) > 1:
        each = "; ".join(f"{n_in} from {', '.join(paths)}" for n_in, paths in feeds.items())
        return f"its calls have different input channels: {each}"
    ((n_in, paths),) = feeds.items()
    return Feed(tuple(paths), n_in)


def _one_group(x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
    """Run in place of a norm's forward; as it has no parameters, it runs on any device."""
    x = nn.functional.group_norm(x, 1)
    return x if residual is None else x + residual


def _copy(model: nn.Module) -> nn.Module:
    """Copy the modules and their buffers; parameters are shared."""
    tensors = list(model.parameters())
    # What torch.nn.utils.weight_norm computes is an attribute that deepcopy refuses.
    tensors += [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor)]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class _Watch(TorchFunctionMode):
    """Marks what each function of torch returns while a model runs inside the context."""

    def __init__(
        self, modules: dict[str, nn.Module], layers: set[str], norms: Container[str]
    ) -> None:
        super().__init__()
        self.calls: dict[str, list[frozenset[Source]]] = {}
        self.order: dict[str, int] = {}
        self._modules, self._layers, self._norms = modules, layers, norms
        self._running: list[tuple[str, int]] = []  # modules, each with the number of its input
        self._sources = WeakTensorKeyDictionary()
        self._numbers = WeakTensorKeyDictionary()
        self._count = count(1)
        self._hooks = ExitStack()

    def __enter__(self) -> "_Watch":
        for path, module in self._modules.items():
            before, after = partial(self._before, path), partial(self._after, path)
            attach = self._hooks.enter_context  # a handle is a context that removes its hook
            attach(module.register_forward_pre_hook(before, with_kwargs=True))
            attach(module.register_forward_hook(after, with_kwargs=True, always_call=True))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.close()

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run a function of torch and mark its result."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "").strip("_")
        inputs = list(tensors((args, kwargs)))
        outputs = inputs[:1] if name == "setitem" else list(tensors(result))
        if name in _MIXING:
            sources = self._mixed(inputs)
        else:
            if name in _PRODUCTS and outputs:
                inputs = [t for t in inputs if t.shape == outputs[0].shape]
            sources = self._of(inputs)
        self._mark(outputs, sources)
        return result

    def _mixed(self, inputs: list[Tensor]) -> frozenset[Source]:
        path, number = self._running[-1] if self._running else ("", 0)
        if path in self._layers:
            return frozenset({Source(path, number)})
        return frozenset({Source("", 0)}) if self._of(inputs) else frozenset()

    def _of(self, tensors: Iterable[Tensor]) -> frozenset[Source]:
        return frozenset().union(*(self._sources.get(t, ()) for t in tensors))

    def _mark(self, tensors: Iterable[Tensor], sources: frozenset[Source]) -> None:
        for tensor in tensors:
            if sources and tensor.is_floating_point():
                self._sources[tensor] = sources

    def _before(self, path: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs = list(tensors((args, kwargs)))[:1]
        for tensor in inputs:
            if tensor not in self._numbers:
                self._numbers[tensor] = next(self._count)
        self._running.append((path, self._numbers[inputs[0]] if inputs else 0))
        self.order.setdefault(path, len(self.order))
        if path in self._norms:
            self.calls.setdefault(path, []).append(self._of(inputs))

    def _after(self, path: str, module: nn.Module, args: tuple, kwargs: dict, result: Any) -> None:
        _, number = self._running.pop()
        if any(module.children()):
            return
        outputs = list(tensors(result))
        if path in self._layers:  # whatever it ran
            self._mark(outputs, frozenset({Source(path, number)}))
        else:  # may have run a function that torch does not show
            hidden = [t for t in outputs if t not in self._sources]
            self._mark(hidden, self._of(tensors((args, kwargs))))


def tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from tensors(tuple(values.values()))
    elif isinstance(values, tuple | list):
        for value in values:
            yield from tensors(value)
