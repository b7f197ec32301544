"""What comes before a classifier's last layer: an MLP, and ResNets of three kinds."""

from collections.abc import Callable

import torchvision
from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet, build_resnet_backbone
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

# What get_norm calls the norms that are named otherwise here: its own "LN" normalizes each pixel by
# itself, and its "GN" has 32 groups; "PGN" has MODEL.PGN.NUM_GROUPS where they are given.
_NAMES = {"LN": "LN1", "GN": "PGN"}
_TORCHVISION_DEPTHS = (18, 34, 50, 101, 152)


class MLP(Backbone):
    """One hidden layer, a norm and ReLU: with the classifier, the two-layer MLP of Table 3.

    Weights and bias begin as PyTorch's ``nn.Linear`` sets them; the paper does not say.

    Args:
        in_features: values of an image.
        hidden: units of the hidden layer.
        norm: makes the norm of a number of channels.

    Shape:
        - Input: (N, *), flattened to (N, in_features).
        - Output: {"hidden": (N, hidden)}.

    Example:
        >>> import torch
        >>> MLP(784, 512, nn.BatchNorm1d)(torch.randn(2, 1, 28, 28))["hidden"].shape
        torch.Size([2, 512])
    """

    def __init__(
        self, in_features: int, hidden: int, norm: Callable[[int], nn.Module | None]
    ) -> None:
        super().__init__()
        layer = nn.Linear(in_features, hidden)
        self.layers = nn.Sequential(layer, norm(hidden) or nn.Identity(), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the hidden units."""
        return {"hidden": self.layers(x.flatten(1))}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return the channels of the hidden units."""
        return {"hidden": ShapeSpec(channels=self.layers[0].out_features)}


class CifarStem(CNNBlockBase):
    """A 3×3 convolution at full resolution with norm and ReLU.

    Args:
        in_channels: of the images.
        out_channels: of the first stage.
        norm: as for ``detectron2.layers.get_norm``.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: str) -> None:
        super().__init__(in_channels, out_channels, 1)
        self.conv1 = Conv2d(
            in_channels,
            out_channels,
            kernel_size=3,
            padding=1,
            bias=False,
            norm=get_norm(norm, out_channels),
            activation=nn.functional.relu_,
        )
        c2_msra_fill(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        """Run the convolution with its norm and ReLU."""
        return self.conv1(x)


class TorchvisionResNet(Backbone):
    """A ResNet of torchvision without its last layer, with He's initialization.

    The last norm of each block begins at zero.

    Args:
        name: such as "resnet50".
        norm: as for ``detectron2.layers.get_norm``.

    Shape:
        - Input: (N, 3, H, W).
        - Output: {"pooled": (N, C)}.
    """

    def __init__(self, name: str, norm: str) -> None:
        super().__init__()
        self.resnet = torchvision.models.get_model(
            name,
            weights=None,
            norm_layer=lambda channels: get_norm(norm, channels) or nn.Identity(),
            zero_init_residual=bool(norm),
        )
        self.channels = self.resnet.fc.in_features
        self.resnet.fc = nn.Identity()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the pooled features."""
        return {"pooled": self.resnet(x)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Return the channels of the pooled features."""
        return {"pooled": ShapeSpec(channels=self.channels)}


@BACKBONE_REGISTRY.register()
def build_mlp_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MLP:
    """Build the MLP of ``CLASSIFICATION.HIDDEN`` units for images of ``CLASSIFICATION.IMAGE_SIZE``.

    Args:
        cfg: config with the keys of :func:`add_classification_config`.
        input_shape: channels of the images.
    """
    norm = _norm(cfg)

    def layer(channels: int) -> nn.Module | None:  # Detectron2's BN takes feature maps alone
        return nn.BatchNorm1d(channels) if norm == "BN" else get_norm(norm, channels)

    in_features = input_shape.channels * cfg.CLASSIFICATION.IMAGE_SIZE**2
    return MLP(in_features, cfg.CLASSIFICATION.HIDDEN, layer)


@BACKBONE_REGISTRY.register()
def build_cifar_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Build the ResNet for CIFAR of ``CLASSIFICATION.DEPTH`` = 6n + 2 layers, such as 56.

    Three stages of n blocks with 16, 32 and 64 channels (He et al. 2015, Section 4.2) and He's
    initialization; the last norm of each block begins at zero.

    Differences from He et al.: where the channels change, the shortcut is their option B, a 1×1
    convolution with a norm, as in their ImageNet models; not option A, padding with zeros.

    Args:
        cfg: config with the keys of :func:`add_classification_config`.
        input_shape: channels of the images.

    Raises:
        ValueError: for a depth that is not 6n + 2.
    """
    depth, norm = cfg.CLASSIFICATION.DEPTH, _norm(cfg)
    num_blocks, rest = divmod(depth - 2, 6)
    if rest or num_blocks < 1:
        raise ValueError(
            "CLASSIFICATION.DEPTH must be 6n + 2 for a ResNet for CIFAR, got "
            f"CLASSIFICATION.DEPTH={depth}. Choose 20, 32, 44, 56 or 110."
        )
    stages, in_channels = [], 16
    for stride, channels in ((1, 16), (2, 32), (2, 64)):
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                num_blocks,
                in_channels=in_channels,
                out_channels=channels,
                stride_per_block=[stride] + [1] * (num_blocks - 1),
                norm=norm,
            )
        )
        in_channels = channels
    resnet = ResNet(CifarStem(input_shape.channels, 16, norm), stages)
    zero_last_norms(resnet)
    return resnet


@BACKBONE_REGISTRY.register()
def build_detectron2_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Build the ResNet of ``MODEL.RESNETS`` as Detectron2's detectors have it, with nothing frozen.

    Its weights are theirs, name by name: see :mod:`gn_classification.export`. The norm is
    ``CLASSIFICATION.NORM``; the last one of each block begins at zero with
    ``CLASSIFICATION.ZERO_INIT_RESIDUAL``.

    Args:
        cfg: config with the keys of :func:`add_classification_config`.
        input_shape: channels of the images.
    """
    own = cfg.clone()
    own.defrost()
    own.MODEL.RESNETS.NORM, own.MODEL.RESNETS.OUT_FEATURES = _norm(cfg), ["res5"]
    own.MODEL.BACKBONE.FREEZE_AT = 0
    resnet = build_resnet_backbone(own, input_shape)
    if cfg.CLASSIFICATION.ZERO_INIT_RESIDUAL:
        zero_last_norms(resnet)
    return resnet


def zero_last_norms(resnet: ResNet) -> None:
    """Set the scale of the last norm of each residual block to zero: the block is an identity.

    Args:
        resnet: of Detectron2's blocks.
    """
    for block in (block for stage in resnet.stages for block in stage):
        last = getattr(block, "conv3", block.conv2).norm
        if last is not None:
            nn.init.zeros_(last.weight)


@BACKBONE_REGISTRY.register()
def build_torchvision_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TorchvisionResNet:
    """Build torchvision's ResNet of ``CLASSIFICATION.DEPTH`` layers.

    Args:
        cfg: config with the keys of :func:`add_classification_config`.
        input_shape: must have three channels.

    Raises:
        ValueError: for a depth that torchvision does not have, or images of other channels.
    """
    depth = cfg.CLASSIFICATION.DEPTH
    if depth not in _TORCHVISION_DEPTHS:
        raise ValueError(
            f"CLASSIFICATION.DEPTH must be one of torchvision's {_TORCHVISION_DEPTHS}, got "
            f"CLASSIFICATION.DEPTH={depth}. Correct the value."
        )
    if input_shape.channels != 3:
        raise ValueError(
            "MODEL.PIXEL_MEAN must have three values for torchvision's ResNets, got "
            f"MODEL.PIXEL_MEAN={list(cfg.MODEL.PIXEL_MEAN)}. Give it and MODEL.PIXEL_STD three."
        )
    return TorchvisionResNet(f"resnet{depth}", _norm(cfg))


def _norm(cfg: CfgNode) -> str:
    """The norm as ``get_norm`` knows it."""
    norm = cfg.CLASSIFICATION.NORM
    if norm == "GN" and not cfg.MODEL.PGN.NUM_GROUPS:
        raise ValueError(
            "MODEL.PGN.NUM_GROUPS must be given for CLASSIFICATION.NORM=GN, got "
            "MODEL.PGN.NUM_GROUPS=0. Add MODEL.PGN.NUM_GROUPS 8, or take CLASSIFICATION.NORM PGN."
        )
    return _NAMES.get(norm, norm)
