"""What operators cost a GPU that is not at hand: bytes, flops, launches, and the time of these.

All that is assumed of GPUs stands at the top, each figure with where it comes from.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gn_practical.layers import group_norm_kernels


class Gpu(NamedTuple):
    """Published peaks, dense: bytes and flops a second, and clock in Hz."""

    bandwidth: float
    single: float  # of convolutions in float32: TF32, PyTorch's default, where there is
    half: float
    clock: float
    single_share: float = 0.5  # of the peak that convolutions reach: assumed, as FLOPS_SHARE


# A100 80GB SXM: nvidia-a100-datasheet-us-nvidia-1758950. H100: nvidia.com/en-us/data-center/h100,
# SXM, half of what is given with sparsity. H200 SXM: nvidia.com/en-us/data-center/h200. V100 SXM2:
# nvidia.com/en-us/data-center/v100; it stands here for its measured times, those of Detectron2's
# model zoo, R-50 FPN 1x with FrozenBN, two images a GPU of 640 to 800 pixels.
GPUS = {
    "V100": Gpu(0.900e12, 15.7e12, 125e12, 1.53e9, single_share=0.8),  # not on tensor cores
    "A100": Gpu(2.039e12, 156e12, 312e12, 1.41e9),
    "H100": Gpu(3.35e12, 494.7e12, 989.4e12, 1.83e9),
    "H200": Gpu(4.8e12, 494.7e12, 989.4e12, 1.83e9),
}
BANDWIDTH_SHARE = 0.8  # of the peak, by kernels that move much: assumed
FLOPS_SHARE = 0.5  # of the peak of tensor cores, by convolutions and matrix products: assumed
SHORTEST = 3e-6  # s a kernel occupies the GPU at least, with the gap to the next: assumed
# PyTorch's CUDA group norm takes the moments of a group in one block of 512 threads, a value each
# in an iteration, whose latency is read off its machine code.
MOMENTS_THREADS, MOMENTS_CYCLES = 512, 650


class Work(NamedTuple):
    """What an operator, or a part of it, costs."""

    name: str
    launches: int
    bytes: float = 0.0
    flops: float = 0.0
    values: int = 0  # that each block of a group norm's moments reads by itself

    def seconds(self, gpu: Gpu, half: bool) -> float:
        """Return the time of its kernels on a GPU."""
        if not self.launches:
            return 0.0
        peak = gpu.half * FLOPS_SHARE if half else gpu.single * gpu.single_share
        return max(
            self.bytes / (gpu.bandwidth * BANDWIDTH_SHARE),
            self.flops / peak,
            -(-self.values // MOMENTS_THREADS) * MOMENTS_CYCLES / gpu.clock,
            self.launches * SHORTEST,
        )


class Trace(TorchDispatchMode):
    """Notes what the operators cost that run while it is active.

    Args:
        half: the float32 of what runs stands for half precision under autocast.
    """

    def __init__(self, half: bool = False) -> None:
        super().__init__()
        self.half = half
        self.works: list[Work] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.works += self._costs(func, args, kwargs or {}, result)
        return result

    def _costs(self, func: Any, args: tuple, kwargs: dict, result: Any) -> Iterator[Work]:
        name = func.overloadpacket.__name__
        if name in _COSTS:
            yield from _COSTS[name](args, self.half)
            return
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        storages = {t.untyped_storage()._cdata for t in tensors}
        computes = func._schema.is_mutable or any(
            t.untyped_storage()._cdata not in storages for t in made
        )
        if not computes or name.startswith(("empty", "new_empty")) or not made:
            yield Work(name, 0)
            return
        moved = sum(map(bytes_of, tensors + made)) / (2 if self.half else 1)
        formula = flop_registry.get(func.overloadpacket)
        flops = formula(*args, **kwargs, out_val=result) if formula else 0
        launches = 2 if name == "convolution_backward" else 1
        yield Work(name, launches, moved, flops)


def bytes_of(tensor: Tensor) -> int:
    """Return the size of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def _group_norm(args: tuple, half: bool) -> Iterator[Work]:
    """PyTorch's: moments, then parameters of channels, then y; under autocast in float32."""
    x, groups = args[0], args[6]
    size = bytes_of(x)
    yield Work("moments", 1, size, values=x.numel() // (x.shape[0] * groups))
    yield Work("normalize", 2, 2 * size)
    if half:  # casts before and after, and float32 for the ReLU, which is counted as half
        yield Work("casts", 2, 3 * size + size)


def _group_norm_backward(args: tuple, half: bool) -> Iterator[Work]:
    size = bytes_of(args[1])
    yield Work("group norm backward", 5, 5 * size)
    if half:
        yield Work("casts", 2, 3 * size + 1.5 * size)


def _fused(args: tuple, half: bool) -> Iterator[Work]:
    x, residual, groups = args[0], args[3], args[4]
    small = _plan(x, groups, half).small[0]
    size = bytes_of(x) / (2 if half else 1)
    accesses = 3 + (residual is not None) - small  # a small group is found in the cache
    yield Work("fused", 1 if small else 3, accesses * size)


def _fused_backward(args: tuple, half: bool) -> Iterator[Work]:
    x, y, stats = args[1], args[2], args[5]
    small = _plan(x, stats.shape[2], half).small[1]
    size = bytes_of(x) / (2 if half else 1)
    accesses = (3 if small else 5) + 2 * (y is not None)
    yield Work("fused backward", 1 if small else 3, accesses * size)


def _plan(x: Tensor, groups: int, half: bool) -> group_norm_kernels.Plan:
    return group_norm_kernels._plan(x.shape, 2 if half else 4, False, groups)


_COSTS = {
    "native_group_norm": _group_norm,
    "native_group_norm_backward": _group_norm_backward,
    "group_norm": _fused,
    "group_norm_backward": _fused_backward,
}
