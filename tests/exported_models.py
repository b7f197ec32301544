"""Small random detectors that find something, and their exports."""

from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from gn_practical import build_model
from gn_practical.inference.export import formats
from gn_practical.inference.export.agreement import agreement
from gn_practical.inference.export.contents import contents_of
from gn_practical.inference.export.standardization import fold_standardization
from gn_practical.inference.exported import ExportedModel
from gn_practical.training.config import load_cfg
from gn_practical.weights import Description

ROOT = Path(__file__).parents[1]
STORED = Description(class_names={"thing": ["disc", 'a "b"'], "stuff": ["grass"]})
# Fewer layers than tiny.yaml's: exporting takes as long as there are many.
SHORT = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.STEM_OUT_CHANNELS", 64]
SHORT += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.FPN.OUT_CHANNELS", 8]
SHORT += ["INPUT.MIN_SIZE_TEST", 64, "MODEL.SEM_SEG_HEAD.CONVS_DIM", 8]
PROPOSALS = ["MODEL.RPN.PRE_NMS_TOPK_TEST", 50, "MODEL.RPN.POST_NMS_TOPK_TEST", 20]
# Group norms are in the others: each of them takes as long to export as ten other layers.
FROZEN = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.FPN.NORM", "", "MODEL.WS.ENABLED", "False"]
RETINANET = {
    "MODEL.META_ARCHITECTURE": "RetinaNet",
    "MODEL.MASK_ON": False,
    "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.RETINANET.NUM_CLASSES": 5,
    "MODEL.RETINANET.NUM_CONVS": 1,
    "MODEL.RETINANET.NORM": "PGN",
}
FAMILIES = {
    "Faster R-CNN": ("faster_rcnn.yaml", ["MODEL.ROI_BOX_HEAD.NUM_CONV", 1]),
    "Mask R-CNN": ("tiny.yaml", [*FROZEN, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"]),
    "RetinaNet": ("tiny.yaml", [*FROZEN, *(word for pair in RETINANET.items() for word in pair)]),
    "panoptic FPN": ("tiny.yaml", []),
}


def config(family):
    name, words = FAMILIES[family]
    words = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", *SHORT, *PROPOSALS, *words]
    return load_cfg(str(ROOT / "configs/quickstart" / name), list(map(str, words)))


def decided(cfg):
    """A random model whose scores differ, and that finds something."""
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for path, module in model.named_modules():
        if path.endswith(("cls_score", "objectness_logits", "sem_seg_head.predictor")):
            nn.init.normal_(module.weight, std=1)
    return model


def picture(height, width, seed=0):
    noise = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(seed))
    return 255 * F.interpolate(noise, size=(height, width), mode="bilinear")[0]


def written(model, cfg, path, kind="fast", opset=18):
    folded = deepcopy(model)
    assert fold_standardization(folded) == contents_of(model, cfg, STORED).standardized
    write = formats.write_onnx if path.suffix == ".onnx" else formats.write_torchscript
    write(folded, contents_of(model, cfg, STORED, kind), path, opset)
    return ExportedModel(path)


def assert_same(model, exported, given):
    with torch.no_grad():
        expected = model([given])[0]
    found = exported([given])[0]
    compared = agreement(expected, found, exported.thresholds)
    assert compared.holds, compared
    assert set(found) == set(expected)
    assert found["instances"].image_size == expected["instances"].image_size
    fields = {key: each.dtype for key, each in expected["instances"].get_fields().items()
              if isinstance(each, torch.Tensor)}  # fmt: skip
    assert all(found["instances"].get(key).dtype == dtype for key, dtype in fields.items())
    return compared
