"""Norm, residual sum and ReLU of a built model as one operator, by a rewrite in place.

Where ``Conv2d.activation``, a ResNet block or ``nn.Sequential`` has the structure known here, its
class becomes a subclass whose forward calls ``norm(x, residual, relu=True)``. Modules, parameters
and state-dict keys stay what they are. A flag on the norm would do with fewer classes, but not for
a norm or a ReLU that is used twice. While a hook watches a part, the parts run one by one.
"""

import logging
from collections.abc import Callable
from itertools import pairwise

import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling.backbone import resnet as d2
from torch import Tensor, nn
from torchvision.models import resnet as tv

from gn_practical.layers import WSConv2d
from gn_practical.layers.protocol import OwnActivation, is_fusable
from gn_practical.layers.torch_internals import convolve, has_hooks

Activation = Callable[[Tensor], Tensor]


def fuse_norms(model: nn.Module, required_only: bool = False) -> list[str]:
    """Let the norms of ``model`` run with the sum and ReLU that follow them.

    Call it last, after :func:`bind_group_norms` and :func:`convert_to_ws`. A second call changes
    nothing. Values and gradients are those of the original modules, up to rounding; but a norm
    with an activation of its own ("FRN") has it in place of the ReLU from here on.

    Args:
        model: any module; convolutions with ``activation``, the ResNet blocks of Detectron2 and
            torchvision, and ``nn.Sequential`` are known.
        required_only: fuse norms with an activation of their own, and leave the others.

    Returns:
        Paths of the norms that take their activation along, in the order of the model.

    Example:
        >>> from torchvision.models import resnet18
        >>> from gn_practical import PracticalGroupNorm
        >>> model = resnet18(norm_layer=PracticalGroupNorm)
        >>> len(fuse_norms(model))
        16
    """
    chosen: set[nn.Module] = set()
    for module in model.modules():
        fused = _FUSED.get(type(module))
        norms = fused.norms(module) if fused is not None else []
        own = [norm for norm in norms if isinstance(norm, OwnActivation)]
        if own or (norms and not required_only):
            module.__class__ = fused
            chosen.update(norms)
        for norm in own:
            norm.take_relu()
    _warn_of_plain_relu(model)
    return [path for path, module in model.named_modules() if module in chosen]


def _warn_of_plain_relu(model: nn.Module) -> None:
    """Name the parts of a structure not known here that apply ReLU after, say, FRN."""
    plain = [
        path
        for path, module in model.named_modules()
        if type(module) not in _FUSED.values()
        and (isinstance(module, d2.CNNBlockBase) or any(map(_is_relu, module.children())))
        and any(isinstance(m, OwnActivation) for c in module.children() for m in (c, *c.children()))
    ]
    if plain:
        logging.getLogger(__name__).warning(
            "Norms with an activation of their own are followed by a plain ReLU in structures that "
            "are not known: %s.",
            ", ".join(path or type(model).__name__ for path in plain),
        )


def _is_relu(activation: object) -> bool:
    return activation in (F.relu, F.relu_) or type(activation) is nn.ReLU


def _norm_relu(
    norm: nn.Module, x: Tensor, residual: Tensor | None = None, relu: Activation = F.relu_
) -> Tensor:
    if has_hooks(norm) or (isinstance(relu, nn.Module) and has_hooks(relu)):
        return _add_relu(norm, norm(x), residual, relu)
    return norm(x, residual, relu=True)


def _add_relu(norm: nn.Module, y: Tensor, residual: Tensor | None, relu: Activation) -> Tensor:
    if residual is not None:
        y += residual  # in place, as in the blocks
    return norm.activate(y) if isinstance(norm, OwnActivation) else relu(y)


def _convolve(conv: Conv2d, x: Tensor) -> Tensor:
    if isinstance(conv, WSConv2d):
        return conv.convolve(x)
    return convolve(conv, x, conv.weight)


def _conv_norm_relu(conv: Conv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Run a convolution of Detectron2 that has a norm and no activation, and what follows it."""
    if has_hooks(conv):
        return _add_relu(conv.norm, conv(x), residual, F.relu_)
    return _norm_relu(conv.norm, _convolve(conv, x), residual)


# Each class lists the norms that take their activation along, ``norms``: none, where the module is
# not as it was built.


def _plain_norms(*convs: nn.Module) -> list[nn.Module]:
    known = all(type(c) in (Conv2d, WSConv2d) and c.activation is None for c in convs)
    norms = [conv.norm for conv in convs] if known else []
    return norms if all(map(is_fusable, norms)) else []


def _numbered(block: nn.Module, name: str) -> list[nn.Module]:
    """List name1, name2 and, of a bottleneck, name3."""
    numbers = "123" if isinstance(block, d2.BottleneckBlock | tv.Bottleneck) else "12"
    return [getattr(block, name + number) for number in numbers]


class _FusedActivation:
    @staticmethod
    def norms(conv: Conv2d) -> list[nn.Module]:
        return [conv.norm] if _is_relu(conv.activation) and is_fusable(conv.norm) else []

    def forward(self, x: Tensor) -> Tensor:
        return _norm_relu(self.norm, _convolve(self, x), relu=self.activation)


class FusedConv2d(_FusedActivation, Conv2d):
    """A ``detectron2.layers.Conv2d`` whose norm applies the ReLU."""


class FusedWSConv2d(_FusedActivation, WSConv2d):
    """A :class:`WSConv2d` whose norm applies the ReLU."""


class FusedStem(d2.BasicStem):
    """Detectron2's ResNet stem."""

    @staticmethod
    def norms(stem: d2.BasicStem) -> list[nn.Module]:
        """List its norm."""
        return _plain_norms(stem.conv1)

    def forward(self, x: Tensor) -> Tensor:
        """Run convolution, norm with ReLU, and pooling."""
        return F.max_pool2d(_conv_norm_relu(self.conv1, x), kernel_size=3, stride=2, padding=1)


class _FusedBlock:
    @staticmethod
    def norms(block: nn.Module) -> list[nn.Module]:
        return _plain_norms(*_numbered(block, "conv"))

    def forward(self, x: Tensor) -> Tensor:
        *convs, last = _numbered(self, "conv")
        out = x
        for conv in convs:
            out = _conv_norm_relu(conv, out)
        return _conv_norm_relu(last, out, x if self.shortcut is None else self.shortcut(x))


class FusedBasicBlock(_FusedBlock, d2.BasicBlock):
    """Detectron2's block of ResNet-18 and -34."""


class FusedBottleneckBlock(_FusedBlock, d2.BottleneckBlock):
    """Detectron2's block of ResNet-50, 101 and 152."""


class _FusedTorchvisionBlock:
    @staticmethod
    def norms(block: nn.Module) -> list[nn.Module]:
        norms = _numbered(block, "bn")
        return norms if _is_relu(block.relu) and all(map(is_fusable, norms)) else []

    def forward(self, x: Tensor) -> Tensor:
        (*convs, last), (*norms, last_norm) = _numbered(self, "conv"), _numbered(self, "bn")
        out = x
        for conv, norm in zip(convs, norms, strict=True):
            out = _norm_relu(norm, conv(out), relu=self.relu)
        out = last(out)
        shortcut = x if self.downsample is None else self.downsample(x)
        return _norm_relu(last_norm, out, shortcut, self.relu)


class FusedTorchvisionBasicBlock(_FusedTorchvisionBlock, tv.BasicBlock):
    """torchvision's block of ResNet-18 and -34."""


class FusedTorchvisionBottleneck(_FusedTorchvisionBlock, tv.Bottleneck):
    """torchvision's block of ResNet-50, 101 and 152."""


class FusedSequential(nn.Sequential):
    """An ``nn.Sequential`` in which norms apply the ReLU that follows them."""

    @staticmethod
    def norms(layers: nn.Sequential) -> list[nn.Module]:
        """List those that a ReLU follows."""
        return [norm for norm, after in pairwise(layers) if _is_pair(norm, after)]

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers, each pair as one."""
        layers = list(self)
        while layers:
            layer = layers.pop(0)
            if layers and _is_pair(layer, layers[0]):
                x = _norm_relu(layer, x, relu=layers.pop(0))
            else:
                x = layer(x)
        return x


def _is_pair(layer: nn.Module, after: nn.Module) -> bool:
    return type(after) is nn.ReLU and is_fusable(layer)


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    Conv2d: FusedConv2d,
    WSConv2d: FusedWSConv2d,
    d2.BasicStem: FusedStem,
    d2.BasicBlock: FusedBasicBlock,
    d2.BottleneckBlock: FusedBottleneckBlock,
    tv.BasicBlock: FusedTorchvisionBasicBlock,
    tv.Bottleneck: FusedTorchvisionBottleneck,
    nn.Sequential: FusedSequential,
}
_FUSED |= {fused: fused for fused in _FUSED.values()}  # for a second call
