"""What a forward pass costs: operations and activations of every module, and the norms' share.

fvcore counts on the traced graph, by Detectron2's rules: a multiply-add is one operation, a norm
has five a value (two, where its statistics are given), and elementwise functions have none.
"""

from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Any, NamedTuple

from detectron2.export import TracingAdapter
from detectron2.utils.analysis import FlopCountAnalysis
from fvcore.nn import ActivationCountAnalysis
from fvcore.nn.jit_analysis import JitModelAnalysis
from fvcore.nn.jit_handles import elementwise_flop_counter, generic_activation_jit
from torch import nn

from gn_practical.layers import WSConv2d
from gn_practical.layers.protocol import norm_channels

# Our fused norm is traced as aten::group_norm, which fvcore knows. SwitchNorm and FRN are told by
# the one operator that sees each of their values once. torch's own of the class are left out.
_OUR_NORMS = ("aten::var_mean", "aten::square")
_NORMS = ("aten::group_norm", "aten::batch_norm", "aten::layer_norm", "aten::instance_norm")
# Weight standardization: its result is kept while a model is evaluated.
_STANDARDIZATION = ("aten::std_mean", "aten::view_as")
_KEEP_ALL = {"test_score_thresh": 0.0, "test_nms_thresh": 1.0, "nms_thresh": 1.0}
_PREFIX = "model."  # of the paths, from the adapter that makes a detector traceable


class ModuleCost(NamedTuple):
    """What a module costs with all that is in it; of an image, where inputs were counted."""

    module: str
    kind: str
    parameters: int
    parameters_of_norms: int
    flops: float | None = None
    flops_of_norms: float | None = None
    activations: float | None = None
    activations_of_norms: float | None = None


class Count:
    """Operations or activations of one forward pass, by module.

    Args:
        model: a model as Detectron2's, in evaluation mode.
        inputs: its list of one input.
        what: "flops" or "activations".

    Example:
        >>> import torch
        >>> class Detector(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8)
        ...     def forward(self, inputs):
        ...         return self.norm(self.conv(inputs[0]["image"][None]))
        >>> count = Count(Detector(), [{"image": torch.zeros(3, 10, 10)}], "flops")
        >>> count.total, count.of_norms()
        (6400, 4000)
    """

    def __init__(self, model: nn.Module, inputs: list[dict[str, Any]], what: str) -> None:
        self._model = model
        self._norms = [path for path, _ in norms_of(model)]
        self._analysis = _analysis(model, inputs, what)
        # Told by the methods below, in a line each; tracing itself warns at every script.
        self._analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        self._analysis.tracer_warnings("none")
        self._analysis.total()  # traces

    @cached_property
    def by_module(self) -> Counter[str]:
        """Count of every module, with what is in it; "" is the model."""
        counts = self._analysis.by_module()
        return Counter({_own_path(path): n for path, n in counts.items()})

    @property
    def total(self) -> int:
        """Count of the whole model."""
        return self._analysis.total()

    def of_norms(self, path: str = "") -> int:
        """Count of the norms in a module, itself included."""
        return sum(self.by_module[norm] for norm in self._norms if _is_in(norm, path))

    def not_counted(self) -> Counter[str]:
        """Return operators without a rule, that are no part of a rule's, and how often they ran."""
        return self._analysis.unsupported_ops()

    def uncalled(self) -> list[str]:
        """Return the modules with parameters that did not run as modules."""
        modules = dict(self._model.named_modules())
        paths = map(_own_path, self._analysis.uncalled_modules())
        return sorted(p for p in paths if list(modules[p].parameters(recurse=False)))

    def norms_without_count(self) -> list[str]:
        """Return the norms that ran, or may have, and of which nothing was counted."""
        return [path for path in self._norms if not self.by_module[path]]


def cost_table(
    model: nn.Module, flops: Iterable[Count] = (), activations: Iterable[Count] = ()
) -> list[ModuleCost]:
    """List every module that has parameters or operations, outer ones first.

    Args:
        model: that of the counts.
        flops: counts of operations, whose mean is listed.
        activations: likewise.

    Example:
        >>> [tuple(row[:4]) for row in cost_table(nn.Sequential(nn.GroupNorm(2, 8)))]
        [('', 'Sequential', 16, 16), ('0', 'GroupNorm', 16, 16)]
    """
    flops, activations = list(flops), list(activations)
    own = {path for path, _ in norms_of(model)}
    table = []
    for path, module in model.named_modules():
        sizes = {f"{path}.{name}".strip("."): p.numel() for name, p in module.named_parameters()}
        in_norms = sum(size for name, size in sizes.items() if name.rpartition(".")[0] in own)
        counts = (*_means(flops, path), *_means(activations, path))
        if sizes or any(counts):
            row = (path, type(module).__name__, sum(sizes.values()), in_norms, *counts)
            table.append(ModuleCost(*row))
    return table


def keep_most_detections(model: nn.Module) -> None:
    """Let a model without trained weights keep as many proposals and detections as it may.

    Its parameters become 0, in place. Random ones let values grow beyond all bounds behind frozen
    norms, and shift boxes out of the image or on top of each other. So all boxes stay where they
    began, with equal scores, and none is dropped for its score or for overlapping.
    """
    for module in model.modules():
        for name, value in _KEEP_ALL.items():
            if hasattr(module, name):
                setattr(module, name, value)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)


def norms_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the normalization layers of any kind, with their paths."""
    return [(path, module) for path, module in model.named_modules() if norm_channels(module)]


def standardized_weights(model: nn.Module) -> tuple[int, int]:
    """Return how many convolutions standardize their weights, and how many weights these are."""
    sizes = [m.weight.numel() for m in model.modules() if isinstance(m, WSConv2d)]
    return len(sizes), sum(sizes)


def _analysis(model: nn.Module, inputs: list[dict[str, Any]], what: str) -> JitModelAnalysis:
    if what == "flops":
        analysis = FlopCountAnalysis(model, inputs)
        handles = dict.fromkeys(_OUR_NORMS, elementwise_flop_counter(5, 0))
    else:
        adapter = TracingAdapter(model, inputs, allow_non_tensor=True)
        analysis = ActivationCountAnalysis(adapter, adapter.flattened_inputs)
        handles = dict.fromkeys(_OUR_NORMS, elementwise_flop_counter(1, 0))
        handles |= dict.fromkeys(_NORMS, generic_activation_jit())
    return analysis.set_op_handle(**handles, **dict.fromkeys(_STANDARDIZATION))


def _own_path(path: str) -> str:
    return f"{path}.".removeprefix(_PREFIX).rstrip(".")


def _is_in(path: str, outer: str) -> bool:
    return not outer or f"{path}.".startswith(f"{outer}.")


def _means(counts: list[Count], path: str) -> tuple[float | None, float | None]:
    if not counts:
        return None, None
    sums = (sum(c.by_module[path] for c in counts), sum(c.of_norms(path) for c in counts))
    return sums[0] / len(counts), sums[1] / len(counts)
