"""The quickstart's Panoptic FPN on the embedded data set: that of configs/quickstart/pfpn.yaml."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

dataloader = model_zoo.get_config("common/data/coco_panoptic_separated.py").dataloader
model = model_zoo.get_config("common/models/panoptic_fpn.py").model
optimizer = model_zoo.get_config("common/optim.py").SGD
train = model_zoo.get_config("common/train.py").train

backbone = model.backbone
backbone.out_channels = 64
backbone.bottom_up.freeze_at = 0
backbone.bottom_up.stages.depth = 18
del backbone.bottom_up.stages.stride_in_1x1  # no argument of R-18's blocks
backbone.norm = backbone.bottom_up.stem.norm = backbone.bottom_up.stages.norm = "PGN"

rpn = model.proposal_generator
rpn.anchor_generator.sizes = [[8], [16], [32], [64], [128]]
rpn.head.in_channels = 64
rpn.head.conv_dims = [64]
rpn.pre_nms_topk, rpn.post_nms_topk = [500, 200], [200, 100]

heads = model.roi_heads
heads.num_classes = 5
heads.batch_size_per_image = 64
heads.box_head.input_shape = ShapeSpec(channels=64, height=7, width=7)
heads.box_head.conv_dims = [64, 64]
heads.box_head.fc_dims = [256]
heads.box_predictor.input_shape = ShapeSpec(channels=256)
heads.mask_head.input_shape = ShapeSpec(channels=64, height=14, width=14)
heads.mask_head.conv_dims = [64, 64, 64]
heads.box_head.conv_norm = heads.mask_head.conv_norm = "PGN"

model.sem_seg_head.num_classes = 5
model.sem_seg_head.conv_dims = 64
model.sem_seg_head.loss_weight = 1.0
model.sem_seg_head.norm = "PGN"
model.combine_stuff_area_thresh = 64

dataloader.train.dataset.names = "scenes_train_panoptic_separated"
dataloader.test.dataset.names = "scenes_val_panoptic_separated"
dataloader.train.mapper.instance_mask_format = "bitmask"
dataloader.train.mapper.augmentations[0].short_edge_length = [128]
dataloader.test.mapper.augmentations[0].short_edge_length = 128
dataloader.train.num_workers = dataloader.test.num_workers = 1
dataloader.train.total_batch_size = 4

optimizer.lr = 0.04
train.max_iter = 800
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.0),
    warmup_length=100 / 800,
    warmup_factor=0.001,
)
train.clip_gradients = {"enabled": True, "clip_type": "norm", "clip_value": 1.0}
train.device = "auto"
train.eval_period = train.checkpointer.period = 400
train.output_dir = "output/lazy_quickstart"
