"""Faster R-CNN with PGN and weight standardization: that of configs/faster_rcnn_gn_ws_pgn.yaml."""

from detectron2 import model_zoo

constants = model_zoo.get_config("common/data/constants.py").constants
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
optimizer = model_zoo.get_config("common/optim.py").SGD
train = model_zoo.get_config("common/train.py").train

# Every convolution that a norm follows: backbone, neck and the 4conv1fc box head.
ws = {"enabled": True}

model.input_format = "RGB"
model.pixel_mean = constants.imagenet_rgb256_mean
model.pixel_std = constants.imagenet_rgb256_std
model.backbone.norm = "PGN"
model.backbone.bottom_up.freeze_at = 0
model.backbone.bottom_up.stem.norm = "PGN"
model.backbone.bottom_up.stages.norm = "PGN"
model.backbone.bottom_up.stages.stride_in_1x1 = False
model.roi_heads.box_head.conv_dims = [256, 256, 256, 256]
model.roi_heads.box_head.conv_norm = "PGN"
model.roi_heads.box_head.fc_dims = [1024]
for name in ("mask_in_features", "mask_pooler", "mask_head"):
    del model.roi_heads[name]

dataloader.train.mapper.image_format = "RGB"
dataloader.train.mapper.use_instance_mask = False
dataloader.train.mapper.augmentations[0].short_edge_length = [800]

train.output_dir = "output/lazy_faster_rcnn_gn_ws_pgn"
train.init_checkpoint = (
    "https://download.openmmlab.com/pretrain/third_party/resnet50_gn_ws-15beedd8.pth"
)
