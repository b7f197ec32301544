"""What this package uses of torch that torch does not document, each with its reason.

``tests/test_torch_internals.py`` fails by name where a release of torch has lost one.
"""

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

# The vectorized backward passes of torch's norms on the CPU, which its autograd reaches through
# its own forward functions alone; ours come with other statistics.
batch_norm_backward = torch.ops.aten.native_batch_norm_backward
layer_norm_backward = torch.ops.aten.native_layer_norm_backward


def version(tensor: Tensor) -> int:
    """How often a tensor was written to in place.

    Autograd compares it for what it stores, but not for what saved-tensor hooks replace, nor for
    a weight that is kept standardized.
    """
    return tensor._version


def storage_key(tensor: Tensor) -> int:
    """Identify the storage of a tensor: autograd packs views, which are other objects."""
    return tensor.untyped_storage()._cdata


def reserve_storage(tensor: Tensor) -> StorageWeakRef:
    """Keep the storage's key from being given to another one, and not its memory."""
    return StorageWeakRef(tensor.untyped_storage())


def transforms_active() -> bool:
    """Whether a ``torch.func`` transform runs, under which no value can be looked at."""
    return torch._C._are_functorch_transforms_active()


def is_plain(tensor: Tensor) -> bool:
    """Whether nothing but autograd sees operators on a tensor: no tracer, mode or subclass."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook on this very module sees its calls or its gradients."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """Convolve with another weight, by the padding mode of the layer."""
    return conv._conv_forward(x, weight, conv.bias)
