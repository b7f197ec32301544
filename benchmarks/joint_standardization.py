"""What one launch for the weights of all layers would cost: when gradients come, and memory.

    OMP_NUM_THREADS=1 python benchmarks/joint_standardization.py

A pass over a ResNet-50 of torchvision with group norm, whose convolutions are standardized layer
by layer, and all at once by one node of autograd, as one launch each way needs it. That node runs
when the gradients of all standardized weights are there. So it is asked when the gradients of the
weights come, which DistributedDataParallel sends while the backward pass goes on, and how many
bytes of tensors live at most.
"""

import time

import torch
from live_bytes import LiveBytes
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.models import resnet50

from gn_practical import convert_to_ws, standardize_weight


class Together(torch.autograd.Function):
    """Standardizes several weights in one node."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *weights: Tensor) -> tuple[Tensor, ...]:
        """Standardize all."""
        ctx.save_for_backward(*weights)
        return tuple(map(standardize_weight, weights))

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, ...]:
        """Differentiate all."""
        return tuple(map(differentiate, ctx.saved_tensors, grads))


def differentiate(weight: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of one weight."""
    with torch.enable_grad():
        leaf = weight.detach().requires_grad_()
        return torch.autograd.grad(standardize_weight(leaf), leaf, grad)[0]


def measure(model: nn.Module, names: list[str]) -> list[float]:
    """Return the time in which half the bytes of gradients came, and the peak of live MiB.

    With ``names`` these weights are standardized at once.
    """
    arrived: list[tuple[float, int]] = []
    hooks = [
        p.register_post_accumulate_grad_hook(
            lambda p: arrived.append((time.thread_time(), p.numel()))
        )
        for p in model.parameters()
    ]
    images = torch.randn(2, 3, 128, 128)
    with LiveBytes(model) as live:
        weights = Together.apply(*map(model.get_parameter, names)) if names else ()
        chosen = dict(zip(names, weights, strict=True))
        loss = torch.func.functional_call(model, chosen, images).square().mean()
        start = time.thread_time()
        loss.backward()
        duration = time.thread_time() - start
    for each in hooks:
        each.remove()
    model.zero_grad()
    numbers = torch.tensor([n for _, n in arrived]).cumsum(0)
    half = arrived[int((numbers * 2 < numbers[-1]).sum())][0]
    return [(half - start) / duration, live.peak / 2**20]


def main() -> None:
    """Measure and print."""
    torch.manual_seed(0)
    model = resnet50(norm_layer=lambda channels: nn.GroupNorm(32, channels))
    names = [f"{k}.weight" for k, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    results = {"at once": [measure(model, names) for _ in range(4)][1:]}
    convert_to_ws(model)
    results["layer by layer"] = [measure(model, []) for _ in range(4)][1:]
    rows = [[k, *torch.tensor(found).median(0).values.tolist()] for k, found in results.items()]
    headers = ("standardized", "half of the gradients after, of backward", "peak MiB")
    print(f"torch {torch.__version__}")
    print(tabulate(rows, headers=headers, floatfmt=".2f"))


if __name__ == "__main__":
    main()
