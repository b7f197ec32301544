"""The Python config of configs/quickstart/tiny.yaml, on the smallest data that a run can have."""

from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock

_quickstart = LazyConfig.load_rel("../configs/lazy/quickstart_pfpn.py")
dataloader = _quickstart.dataloader
lr_multiplier = _quickstart.lr_multiplier
model = _quickstart.model
optimizer = _quickstart.optimizer
train = _quickstart.train

backbone = model.backbone
backbone.out_channels = 8
backbone.bottom_up.stem.out_channels = 4
backbone.bottom_up.stages = [
    L(ResNet.make_stage)(
        block_class=BottleneckBlock,
        num_blocks=blocks,
        stride_per_block=[1 if index == 0 else 2] + [1] * (blocks - 1),
        in_channels=4 if index == 0 else 4 * 2**index,
        bottleneck_channels=4 * 2**index,
        out_channels=8 * 2**index,
        norm="PGN",
        stride_in_1x1=False,
    )
    for index, blocks in enumerate([3, 4, 6, 3])
]

rpn = model.proposal_generator
rpn.head.in_channels = 8
rpn.head.conv_dims = [8]
rpn.batch_size_per_image = 16
rpn.pre_nms_topk, rpn.post_nms_topk = [20, 20], [10, 10]

heads = model.roi_heads
heads.batch_size_per_image = 8
heads.box_head.input_shape = ShapeSpec(channels=8, height=7, width=7)
heads.box_head.conv_dims = heads.box_head.fc_dims = [8]
heads.box_predictor.input_shape = ShapeSpec(channels=8)
heads.mask_head.input_shape = ShapeSpec(channels=8, height=14, width=14)
heads.mask_head.conv_dims = [8, 8]
model.sem_seg_head.conv_dims = 8

dataloader.train.mapper.augmentations[0].short_edge_length = [64]
dataloader.test.mapper.augmentations[0].short_edge_length = 64
dataloader.train.num_workers = dataloader.test.num_workers = 0
dataloader.train.total_batch_size = 2
optimizer.lr = 0.02
train.device = "cpu"
train.output_dir = "output/lazy_tiny"
