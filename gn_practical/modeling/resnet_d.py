"""ResNet-D, as timm's "d" variants have it: a deep stem, and averages in the shortcuts.

Instead of a 7x7 convolution the stem has three of 3x3, and a shortcut with a stride averages 2x2
pixels before its 1x1 convolution, where Detectron2's reads every second pixel (He et al., "Bag of
Tricks for Image Classification", Section 4).
"""

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import ResNet, build_resnet_backbone
from detectron2.projects.deeplab.resnet import DeepLabStem
from torch import Tensor, nn


def pool_shortcuts(resnet: ResNet) -> ResNet:
    """Let the shortcuts with a stride average 2x2 pixels before their convolution, in place.

    Modules, parameters and names stay what they are.

    Args:
        resnet: of Detectron2's blocks.

    Example:
        >>> from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem
        >>> resnet = ResNet(BasicStem(), [[BasicBlock(64, 128, stride=2)]])
        >>> pool_shortcuts(resnet).res2[0].shortcut.stride
        (1, 1)
    """
    for block in (block for stage in resnet.stages for block in stage):
        if block.stride == 2 and block.shortcut.stride == (2, 2):
            block.shortcut.stride = (1, 1)
            # A hook: weight standardization and fused norms change the classes of convolutions and
            # blocks, and know Detectron2's own alone.
            block.shortcut.register_forward_pre_hook(_average)
    return resnet


def _average(shortcut: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    # At the border of an odd size fewer pixels are averaged, and none is left out.
    return F.avg_pool2d(inputs[0], 2, 2, ceil_mode=True, count_include_pad=False)


@BACKBONE_REGISTRY.register()
def build_resnet_d_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Build the ResNet-D of ``MODEL.RESNETS``, with Detectron2's keys and names.

    The widths of the stem's convolutions are half, half and all of
    ``MODEL.RESNETS.STEM_OUT_CHANNELS``.

    Args:
        cfg: a Detectron2 config.
        input_shape: channels of the images.

    Raises:
        ValueError: if ``MODEL.RESNETS.RES5_DILATION`` is not 1.
    """
    keys = cfg.MODEL.RESNETS
    if keys.RES5_DILATION != 1:
        raise ValueError(
            "MODEL.RESNETS.RES5_DILATION must be 1 for a ResNet-D, got "
            f"MODEL.RESNETS.RES5_DILATION={keys.RES5_DILATION}. Set it to 1, or take "
            "build_resnet_backbone."
        )
    resnet = pool_shortcuts(build_resnet_backbone(cfg, input_shape))
    resnet.stem = DeepLabStem(input_shape.channels, keys.STEM_OUT_CHANNELS, keys.NORM)
    return resnet.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


@BACKBONE_REGISTRY.register()
def build_resnet_d_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build an FPN on :func:`build_resnet_d_backbone`, as Detectron2 does on its ResNet.

    Args:
        cfg: a Detectron2 config.
        input_shape: channels of the images.
    """
    return FPN(
        bottom_up=build_resnet_d_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
