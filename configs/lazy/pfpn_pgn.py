"""Panoptic FPN with PGN in the semantic head: the model and schedule of configs/pfpn_pgn.yaml."""

from detectron2 import model_zoo

dataloader = model_zoo.get_config("common/data/coco_panoptic_separated.py").dataloader
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_3x
model = model_zoo.get_config("common/models/panoptic_fpn.py").model
optimizer = model_zoo.get_config("common/optim.py").SGD
train = model_zoo.get_config("common/train.py").train

model.backbone.bottom_up.freeze_at = 2
model.sem_seg_head.norm = "PGN"

train.output_dir = "output/lazy_pfpn_pgn"
train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.max_iter = 270000
