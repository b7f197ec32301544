"""The rewrite of models: same values, gradients, parameters and hooks as without it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from detectron2 import model_zoo
from detectron2.layers import Conv2d
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.models import resnet18, resnet50

from gn_practical import PracticalGroupNorm, add_pgn_config, bind_group_norms, build_model
from gn_practical.modeling.conversion import convert_to_ws
from gn_practical.modeling.fusion import fuse_norms


def detectron2_config(name, **options):
    cfg = model_zoo.get_config(name)
    add_pgn_config(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "PGN"
    cfg.MODEL.SEM_SEG_HEAD.NORM = cfg.MODEL.ROI_BOX_HEAD.NORM = "PGN"
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 20
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
    cfg.merge_from_list([x for pair in options.items() for x in pair])
    return cfg


MODELS = {
    "pfpn": ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", {}, 24),
    "pfpn_r50": (
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
        {"MODEL.RESNETS.DEPTH": 50, "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
         "MODEL.WS.ENABLED": True},
        56,
    ),
    "faster_rcnn": (
        "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
        {"MODEL.WS.ENABLED": True, "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
         "MODEL.ROI_BOX_HEAD.NUM_CONV": 4, "MODEL.ROI_BOX_HEAD.NUM_FC": 1},
        21,
    ),
}  # fmt: skip


def batch(size=64):
    generator = torch.Generator().manual_seed(0)
    instances = Instances((size, size))
    instances.gt_boxes = Boxes(torch.tensor([[4.0, 4, 40, 40], [20, 10, 60, 50]]))
    instances.gt_classes = torch.tensor([1, 3])
    instances.gt_masks = BitMasks(torch.ones(2, size, size, dtype=torch.bool))
    image = torch.randint(0, 255, (3, size, size), generator=generator, dtype=torch.uint8)
    sem_seg = torch.randint(0, 50, (size, size), generator=generator)
    return [{"image": image, "instances": instances, "sem_seg": sem_seg}]


def losses_and_gradients(model, size=64):
    model.train()
    torch.manual_seed(0)
    with EventStorage():
        losses = model(batch(size))
    model.zero_grad()
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def build_twins(name):
    config, options, count = MODELS[name]
    torch.manual_seed(0)
    plain = build_model(detectron2_config(config, **options, **{"MODEL.PGN.FUSED": False}))
    torch.manual_seed(0)
    fused = build_model(detectron2_config(config, **options))
    assert not any("Fused" in type(m).__name__ for m in plain.modules())
    assert len(fuse_norms(fused)) == count  # a second call, which changes nothing
    return plain, fused


@pytest.mark.parametrize("name", MODELS)
def test_detection_models_train_alike(name):
    plain, fused = build_twins(name)
    assert list(plain.state_dict()) == list(fused.state_dict())
    fused.load_state_dict(plain.state_dict())
    wanted, wanted_grads = losses_and_gradients(plain)
    losses, grads = losses_and_gradients(copy.deepcopy(fused))
    for key, value in wanted.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-5, atol=1e-6)
    assert grads.keys() == wanted_grads.keys()
    scale = max(g.abs().max() for g in wanted_grads.values())
    for key, grad in wanted_grads.items():
        assert (grads[key] - grad).abs().max() <= 1e-5 * scale, key


@pytest.mark.parametrize("build", [resnet18, resnet50])
def test_torchvision_models_run_alike(build):
    plain = build(norm_layer=PracticalGroupNorm)
    bind_group_norms(plain)
    convert_to_ws(plain, exclude=["layer1.*"])
    fused = copy.deepcopy(plain)
    norms = [p for p, m in fused.named_modules() if isinstance(m, PracticalGroupNorm)]
    blocks = [p for p in norms if p.startswith("layer") and "downsample" not in p]
    assert fuse_norms(fused) == blocks
    x = torch.randn(1, 3, 64, 64)
    expected, result = plain(x), pickle.loads(pickle.dumps(fused))(x)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_the_norm_runs_with_the_activation(monkeypatch):
    calls = []
    forward = PracticalGroupNorm.forward
    monkeypatch.setattr(
        PracticalGroupNorm,
        "forward",
        lambda self, x, residual=None, relu=False: (
            calls.append((residual is not None, relu)) or forward(self, x, residual, relu)
        ),
    )
    model = resnet50(norm_layer=PracticalGroupNorm).layer1[1]
    bind_group_norms(model)
    fuse_norms(model)
    model(torch.randn(1, 256, 4, 4))
    assert calls == [(False, True), (False, True), (True, True)]


def test_hooks_see_the_norm_alone():
    _, fused = build_twins("pfpn")
    block = fused.backbone.bottom_up.res3[0]
    x = torch.randn(1, 64, 16, 16)
    expected = block(x)
    seen = []
    handles = [
        conv.norm.register_forward_hook(lambda m, args, y: seen.append(y.min()))
        for conv in (block.conv1, block.conv2)
    ]
    torch.testing.assert_close(block(x), expected)
    assert len(seen) == 2
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(block(x), expected)
    assert len(seen) == 2
    assert min(seen) < 0  # as before the activation


def test_sequential_pairs_run_alike_and_the_rest_is_left():
    layers = [nn.Conv2d(4, 8, 1), PracticalGroupNorm(8), nn.ReLU(),
              nn.Conv2d(8, 8, 1), PracticalGroupNorm(8), nn.GELU()]  # fmt: skip
    model = nn.Sequential(*layers)
    bind_group_norms(model)
    x = torch.randn(2, 4, 5, 5)
    expected = model(x)
    assert fuse_norms(model) == ["1"]
    torch.testing.assert_close(model(x), expected)
    model[2].register_forward_hook(lambda m, args, y: y + 1)
    assert not torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "conv",
    [
        Conv2d(4, 8, 1, norm=nn.GroupNorm(2, 8), activation=F.relu),
        Conv2d(4, 8, 1, norm=PracticalGroupNorm(8), activation=F.gelu),
        Conv2d(4, 8, 1, norm=PracticalGroupNorm(8)),
        Conv2d(4, 8, 1, activation=F.relu),
    ],
)
def test_other_structures_stay_untouched(conv):
    assert fuse_norms(nn.ModuleList([conv])) == []
    assert type(conv) is Conv2d


def test_autocast_keeps_half_precision_through_a_block():
    _, fused = build_twins("pfpn")
    block = fused.backbone.bottom_up.res3[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert block(torch.randn(1, 64, 16, 16)).dtype is torch.bfloat16
