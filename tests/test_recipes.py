"""What people who have a Detectron2 project do with this package."""

from detectron2 import model_zoo
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.structures import BoxMode
from PIL import Image

import gn_practical


class Trainer(DefaultTrainer):
    """Detectron2's own trainer, with a model that has PGN norms."""

    @classmethod
    def build_model(cls, cfg):
        return gn_practical.build_model(cfg)


def test_detectron2s_trainer_trains_a_pgn_model(tmp_path, catalogs_as_before):
    """The recipe of the README: no key of our trainer, no other class of ours."""
    Image.new("RGB", (64, 64), "white").save(tmp_path / "white.png")
    box = {"bbox": [8, 8, 40, 40], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    entry = {"file_name": str(tmp_path / "white.png"), "image_id": 1, "height": 64, "width": 64}
    DatasetCatalog.register("white", lambda: [{**entry, "annotations": [box]}])
    MetadataCatalog.get("white").thing_classes = ["box"]

    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    gn_practical.add_pgn_config(cfg)
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "PGN"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 8
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("white",), ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 1, 2, ()
    cfg.OUTPUT_DIR = str(tmp_path)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()

    norms = [m for m in trainer.model.modules() if isinstance(m, gn_practical.PracticalGroupNorm)]
    assert len(norms) == 61
    assert all(norm.num_groups for norm in norms)
    assert trainer.iter == 2
    assert (tmp_path / "model_final.pth").is_file()
