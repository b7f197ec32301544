"""Norm, residual sum and ReLU of a built model as one operator, by a rewrite in place.

Detectron2 and torchvision apply the ReLU after a norm in three places: ``Conv2d.activation``, the
ResNet blocks with their residual sum, and ``nn.Sequential``. Where one of these has the structure
known here, its class becomes a subclass whose forward calls ``norm(x, residual, relu=True)``.
Modules, parameters and state-dict keys stay what they are, and anything else is left untouched.

While a hook watches a part, the original forward runs, so hooks see what they always did.
"""

from collections.abc import Callable, Iterator

import torch.nn.functional as F
from detectron2.layers import Conv2d
from detectron2.modeling.backbone import resnet as d2
from torch import Tensor, nn
from torchvision.models import resnet as tv

from gn_practical.layers import PracticalGroupNorm, WSConv2d

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv2d, Conv2d, WSConv2d)


def fuse_norms(model: nn.Module) -> list[str]:
    """Let each :class:`PracticalGroupNorm` of ``model`` run with the sum and ReLU that follow it.

    Call it last, after :func:`bind_group_norms` and :func:`convert_to_ws`. A second call changes
    nothing. Values and gradients are those of the original modules, up to rounding.

    Args:
        model: any module; convolutions with ``activation``, the ResNet blocks of Detectron2 and
            torchvision, and ``nn.Sequential`` are known.

    Returns:
        Paths of the norms that take their activation along, in the order of the model.

    Example:
        >>> from torchvision.models import resnet18
        >>> model = resnet18(norm_layer=PracticalGroupNorm)
        >>> len(fuse_norms(model))
        16
    """
    for module in model.modules():
        fused = _FUSED.get(type(module))
        if fused is not None and fused.fits(module):
            module.__class__ = fused
    paths = {id(module): path for path, module in model.named_modules()}
    fused = [m for m in model.modules() if isinstance(m, tuple(_FUSED.values()))]
    chosen = {paths[id(norm)] for module in fused for norm in module.fused_norms()}
    return [path for path in paths.values() if path in chosen]


def _is_relu(activation: object) -> bool:
    return activation in (F.relu, F.relu_) or type(activation) is nn.ReLU


def _is_plain(conv: nn.Module) -> bool:
    """Whether a convolution of Detectron2 ends with a PGN norm."""
    norm = getattr(conv, "norm", None)
    plain = type(conv) in (Conv2d, WSConv2d) and conv.activation is None
    return plain and type(norm) is PracticalGroupNorm


def _watched(*modules: nn.Module | Callable[[Tensor], Tensor] | None) -> bool:
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in modules
        if isinstance(m, nn.Module)
    )


def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    weight = conv._standardized_weight() if isinstance(conv, WSConv2d) else conv.weight
    return conv._conv_forward(x, weight, conv.bias)


def _conv_norm_relu(conv: nn.Conv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    return conv.norm(_convolve(conv, x), residual, relu=True)


class _FusedActivation:
    """A convolution of Detectron2 with a PGN norm and ReLU."""

    @staticmethod
    def fits(conv: Conv2d) -> bool:
        return type(conv.norm) is PracticalGroupNorm and _is_relu(conv.activation)

    def fused_norms(self) -> list[nn.Module]:
        return [self.norm]

    def forward(self, x: Tensor) -> Tensor:
        if _watched(self.norm, self.activation):
            return super().forward(x)
        return _conv_norm_relu(self, x)


class FusedConv2d(_FusedActivation, Conv2d):
    """A ``detectron2.layers.Conv2d`` whose PGN norm applies the ReLU."""


class FusedWSConv2d(_FusedActivation, WSConv2d):
    """A :class:`WSConv2d` whose PGN norm applies the ReLU."""


class FusedStem(d2.BasicStem):
    """Detectron2's ResNet stem with a PGN norm."""

    @staticmethod
    def fits(stem: d2.BasicStem) -> bool:
        """Whether the stem is as built, with a PGN norm."""
        return _is_plain(stem.conv1)

    def fused_norms(self) -> list[nn.Module]:
        """List the norms that apply the ReLU."""
        return [self.conv1.norm]

    def forward(self, x: Tensor) -> Tensor:
        """Run convolution, norm with ReLU, and pooling."""
        if _watched(self.conv1, self.conv1.norm):
            return super().forward(x)
        return F.max_pool2d(_conv_norm_relu(self.conv1, x), kernel_size=3, stride=2, padding=1)


class _FusedBlock:
    """A residual block of Detectron2, whose convolutions are ``conv1`` to ``convN``."""

    NAMES: tuple[str, ...]

    @classmethod
    def fits(cls, block: nn.Module) -> bool:
        return all(_is_plain(getattr(block, name)) for name in cls.NAMES)

    def fused_norms(self) -> list[nn.Module]:
        return [getattr(self, name).norm for name in self.NAMES]

    def forward(self, x: Tensor) -> Tensor:
        convs = [getattr(self, name) for name in self.NAMES]
        if any(_watched(conv, conv.norm) for conv in convs):
            return super().forward(x)
        out = x
        for conv in convs[:-1]:
            out = _conv_norm_relu(conv, out)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return _conv_norm_relu(convs[-1], out, shortcut)


class FusedBasicBlock(_FusedBlock, d2.BasicBlock):
    """Detectron2's block of ResNet-18 and -34 with PGN norms."""

    NAMES = ("conv1", "conv2")


class FusedBottleneckBlock(_FusedBlock, d2.BottleneckBlock):
    """Detectron2's block of ResNet-50, 101 and 152 with PGN norms."""

    NAMES = ("conv1", "conv2", "conv3")


class _FusedTorchvisionBlock:
    """A residual block of torchvision: ``conv1, bn1, relu`` to ``convN, bnN``, sum, ``relu``."""

    DEPTH: int

    @classmethod
    def fits(cls, block: nn.Module) -> bool:
        norms = [getattr(block, f"bn{i}") for i in range(1, cls.DEPTH + 1)]
        convs = [getattr(block, f"conv{i}") for i in range(1, cls.DEPTH + 1)]
        norms_fit = all(type(norm) is PracticalGroupNorm for norm in norms)
        return norms_fit and _is_relu(block.relu) and all(type(c) in CONVOLUTIONS for c in convs)

    def fused_norms(self) -> list[nn.Module]:
        return [getattr(self, f"bn{i}") for i in range(1, self.DEPTH + 1)]

    def forward(self, x: Tensor) -> Tensor:
        norms = self.fused_norms()
        if _watched(self.relu, *norms):
            return super().forward(x)
        out = x
        for i, norm in enumerate(norms[:-1], 1):
            out = norm(getattr(self, f"conv{i}")(out), relu=True)
        out = getattr(self, f"conv{self.DEPTH}")(out)
        shortcut = x if self.downsample is None else self.downsample(x)
        return norms[-1](out, shortcut, relu=True)


class FusedTorchvisionBasicBlock(_FusedTorchvisionBlock, tv.BasicBlock):
    """torchvision's block of ResNet-18 and -34 with PGN norms."""

    DEPTH = 2


class FusedTorchvisionBottleneck(_FusedTorchvisionBlock, tv.Bottleneck):
    """torchvision's block of ResNet-50, 101 and 152 with PGN norms."""

    DEPTH = 3


class FusedSequential(nn.Sequential):
    """An ``nn.Sequential`` in which PGN norms apply the ReLU that follows them."""

    @staticmethod
    def fits(layers: nn.Sequential) -> bool:
        """Whether there is such a pair."""
        return any(_pairs(layers))

    def fused_norms(self) -> list[nn.Module]:
        """List the norms that apply the ReLU."""
        return [norm for norm, is_pair in zip(self, _pairs(self), strict=True) if is_pair]

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers, each pair as one."""
        skip = False
        for i, (layer, is_pair) in enumerate(zip(self, _pairs(self), strict=True)):
            if skip:
                skip = False
                continue
            skip = is_pair and not _watched(layer, self[i + 1])
            x = layer(x, relu=True) if skip else layer(x)
        return x


def _pairs(layers: nn.Sequential) -> Iterator[bool]:
    """For each layer, whether it is a PGN norm with a ReLU behind it."""
    following = [*list(layers)[1:], None]
    for layer, after in zip(layers, following, strict=True):
        yield type(layer) is PracticalGroupNorm and type(after) is nn.ReLU


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
