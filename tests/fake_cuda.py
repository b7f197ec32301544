"""Models on a CUDA device that does not exist, under PyTorch's fake tensors.

A fake tensor has a shape, a dtype and a device, and no values; an operator that gets tensors of two
devices raises. PyTorch's engine does not run backward on CUDA tensors where there is no driver, so
:func:`backward` calls the nodes of autograd in its place.
"""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction

from gn_practical.layers import fused_group_norm, group_norm_kernels, weight_standardization
from gn_practical.layers import weight_standardization_kernels as standardization_kernels
from gn_practical.layers.kernel import Kernel

DEVICE = torch.device("cuda", 0)


@contextlib.contextmanager
def fake_cuda(monkeypatch, eager: bool = True) -> Iterator[Counter]:
    """Within it fake CUDA tensors go the way of real ones, up to the launch of a kernel.

    A launch looks at the devices of its tensors instead. Yields how often each kernel was launched.
    With ``eager`` False the operator runs as under ``torch.compile``.
    """
    launches = Counter()

    def launch(kernel, cut, args, key, stream, flags=()):
        for tensor in args:
            if isinstance(tensor, Tensor) and tensor.device != DEVICE:
                raise RuntimeError(f"{kernel.jit.__name__} got a tensor on {tensor.device}")
        launches[kernel.jit.__name__] += 1

    monkeypatch.setattr(Kernel, "__call__", launch)
    monkeypatch.setattr(group_norm_kernels, "_compiled", set())
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    for module in (group_norm_kernels, standardization_kernels):
        monkeypatch.setattr(module, "dense", _dense)
        monkeypatch.setattr(module, "current_stream", lambda device: 0)
    for module in (fused_group_norm, weight_standardization):
        monkeypatch.setattr(module, "_kernels_agree", lambda device: True)
        if eager:
            monkeypatch.setattr(module, "is_plain", lambda tensor: True)
    with FakeTensorMode(allow_non_fake_inputs=False):
        yield launches


def _dense(x: Tensor, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    """As the kernels' own, without the address, which a fake tensor has not."""
    return x.contiguous(memory_format=layout)


def move(model: nn.Module) -> nn.Module:
    """Give a model of the meta device parameters and buffers on the fake one."""

    def moved(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        new = torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE)
        return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: moved(tensor) for name, tensor in tensors.items()})
    return model


def losses(model: nn.Module, cfg: CfgNode, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Run all of a model that does not depend on values, to scalars."""
    images = torch.empty(1, 3, 64, 64, device=DEVICE)
    regions = torch.empty(2, cfg.MODEL.FPN.OUT_CHANNELS, 7, 7, device=DEVICE)
    outputs = {}
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        features = model.backbone((images - model.pixel_mean) / model.pixel_std)
        outputs["backbone"] = list(features.values())
        objectness, deltas = model.proposal_generator.rpn_head(outputs["backbone"])
        outputs["rpn"] = objectness + deltas
        outputs["box_head"] = model.roi_heads.box_predictor(model.roi_heads.box_head(regions))
        if cfg.MODEL.MASK_ON:
            outputs["mask_head"] = [model.roi_heads.mask_head.layers(regions)]
        if hasattr(model, "sem_seg_head"):
            targets = torch.zeros(1, 64, 64, dtype=torch.int64, device=DEVICE)
            outputs["sem_seg_head"] = model.sem_seg_head(features, targets)[1].values()
    return {name: sum(t.float().mean() for t in each) for name, each in outputs.items()}


def backward(loss: Tensor) -> dict[Tensor, Tensor]:
    """Return the gradients of the leaves; each gradient must be where its tensor is.

    As the engine does, a gradient is summed to the shape of its tensor and gets its dtype. It is
    looked at between any two nodes.
    """
    waiting = _uses(loss.grad_fn)
    arrived: dict = defaultdict(dict)
    arrived[loss.grad_fn][0] = torch.ones_like(loss)
    ready, leaves = [loss.grad_fn], {}
    while ready:
        node = ready.pop()
        grads = arrived.pop(node, {})
        if hasattr(node, "variable"):
            if grads:
                leaves[node.variable] = grads[0]
            continue
        for (following, index), grad in zip(node.next_functions, _run(node, grads), strict=True):
            if following is None:
                continue
            if grad is not None:
                _add(arrived[following], following, index, grad)
            waiting[following] -= 1
            if not waiting[following]:
                ready.append(following)
    return leaves


def _uses(root) -> Counter:
    uses, stack, seen = Counter(), [root], {root}
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is not None:
                uses[following] += 1
                if following not in seen:
                    seen.add(following)
                    stack.append(following)
    return uses


def _run(node, grads: dict[int, Tensor]) -> tuple:
    """Call a node; one of PyTorch's own takes no None for a gradient that is zero."""
    count = len(node.next_functions)
    if not grads:
        return (None,) * count
    metadata = node._input_metadata
    with torch.no_grad():
        if isinstance(node, BackwardCFunction):
            result = node.apply(*map(grads.get, range(len(metadata))))
        else:
            zeros = lambda m: torch.zeros(m.shape, dtype=m.dtype, device=m.device)  # noqa: E731
            result = node(*(grads[i] if i in grads else zeros(m) for i, m in enumerate(metadata)))
    result = result if isinstance(result, tuple) else (result,)
    assert all(each is None for each in result[count:])  # of arguments that are no tensors
    return result[:count]


def _add(arrived: dict[int, Tensor], node, index: int, grad: Tensor) -> None:
    wanted = node._input_metadata[index]
    if grad.device != wanted.device:
        raise RuntimeError(f"{node.name()} got a gradient on {grad.device} for {wanted.device}")
    grad = grad.sum_to_size(wanted.shape).to(wanted.dtype)
    arrived[index] = arrived[index] + grad if index in arrived else grad
