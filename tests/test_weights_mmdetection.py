"""A Faster R-CNN with GN+WS in MMDetection's names, against its formulas."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import Boxes, ImageList
from resnet_references import normalized, picture, randomize, randomized, stages_of
from test_weights_layouts import qiao
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import roi_align

from gn_practical import add_pgn_config, build_model, convert_to_ws
from gn_practical.weights import read_weights
from gn_practical.weights.config_keys import config_keys
from gn_practical.weights.mm_config import described_by

CLASSES, WIDTH = ("a", "b", "c"), 32
CONFIG = """
model = dict(
    type='FasterRCNN',
    backbone=dict(
        type='ResNet', depth=50, style='pytorch',
        conv_cfg=dict(type='ConvWS'),
        norm_cfg=dict(type='GN', num_groups=32, requires_grad=True)),
    neck=dict(type='FPN', in_channels=[256, 512, 1024, 2048]),
    train_cfg=dict(nms=dict(iou_threshold=0.7), f=some_function(1)))
img_norm_cfg = dict(
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
train_pipeline = [dict(type='LoadImageFromFile'), dict(type='Normalize', **img_norm_cfg)]
"""


def backbone(blocks=(1, 1, 1, 1)):
    norm = lambda channels: nn.GroupNorm(32, channels)  # noqa: E731
    return randomized(ResNet(Bottleneck, blocks, norm_layer=norm, width_per_group=32))


def head_shapes():
    """{name: shape} of everything after the backbone, as MMDetection's models name it."""
    shapes = {}

    def conv_with_norm(name, size):
        shapes[f"{name}.conv.weight"] = size
        shapes[f"{name}.gn.weight"] = shapes[f"{name}.gn.bias"] = size[:1]

    def layer(name, *size):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = size, size[:1]

    for level, channels in enumerate((256, 512, 1024, 2048)):
        conv_with_norm(f"neck.lateral_convs.{level}", (WIDTH, channels, 1, 1))
        conv_with_norm(f"neck.fpn_convs.{level}", (WIDTH, WIDTH, 3, 3))
        conv_with_norm(f"roi_head.bbox_head.shared_convs.{level}", (WIDTH, WIDTH, 3, 3))
    layer("rpn_head.rpn_conv", WIDTH, WIDTH, 3, 3)
    layer("rpn_head.rpn_cls", 3, WIDTH, 1, 1)
    layer("rpn_head.rpn_reg", 12, WIDTH, 1, 1)
    layer("roi_head.bbox_head.shared_fcs.0", 24, WIDTH * 49)
    layer("roi_head.bbox_head.fc_cls", len(CLASSES) + 1, 24)
    layer("roi_head.bbox_head.fc_reg", 4 * len(CLASSES), 24)
    return shapes


def mmdetection_state(model):
    generator = torch.Generator().manual_seed(3)
    state = {}
    for key, value in model.state_dict().items():
        if not key.startswith("fc"):
            name = key.replace("bn", "gn")
            state[f"backbone.{name}"] = value
    for key, shape in head_shapes().items():
        state[key] = torch.empty(shape)
        randomize(key, state[key], generator)
        if len(shape) == 2:
            state[key].div_(shape[1] ** 0.5 / 5)
        if "_reg." in key:
            state[key].div_(10)  # sizes below the limits, at which the two differ
    return state


class MMDetection:
    """Its Faster R-CNN, written from its documentation."""

    def __init__(self, model, state):
        self.backbone, self.state = model, state
        with torch.no_grad():
            for each in model.modules():
                if isinstance(each, nn.Conv2d):
                    each.weight.copy_(qiao(each.weight))

    def conv(self, x, name):
        weight = qiao(self.state[f"{name}.conv.weight"])
        x = F.conv2d(x, weight, padding=weight.shape[2] // 2)
        scale, shift = (self.state[f"{name}.gn.{part}"] for part in ("weight", "bias"))
        return F.group_norm(x, 32, scale, shift)

    def plain(self, x, name):
        weight, bias = (self.state[f"{name}.{part}"] for part in ("weight", "bias"))
        if weight.dim() == 2:
            return F.linear(x, weight, bias)
        return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)

    def pyramid(self, image):
        stages = list(stages_of(self.backbone, image).values())
        inner = [self.conv(x, f"neck.lateral_convs.{i}") for i, x in enumerate(stages)]
        for i in (3, 2, 1):
            size = inner[i - 1].shape[2:]
            inner[i - 1] = inner[i - 1] + F.interpolate(inner[i], size=size, mode="nearest")
        levels = [self.conv(x, f"neck.fpn_convs.{i}") for i, x in enumerate(inner)]
        return [*levels, F.max_pool2d(levels[-1], 1, stride=2)]

    def proposals(self, levels):
        """Scores and boxes of all anchors, level after level, row after row."""
        scores, boxes = [], []
        for x, stride in zip(levels, (4, 8, 16, 32, 64), strict=True):
            hidden = F.relu(self.plain(x, "rpn_head.rpn_conv"))
            score = self.plain(hidden, "rpn_head.rpn_cls")[0].permute(1, 2, 0).reshape(-1)
            delta = self.plain(hidden, "rpn_head.rpn_reg")[0].permute(1, 2, 0).reshape(-1, 4)
            scores.append(score)
            boxes.append(decode(anchors(stride, x.shape[2:]), delta, (1, 1, 1, 1)))
        return torch.cat(scores), torch.cat(boxes)

    def classify(self, levels, rois):
        size = ((rois[:, 2] - rois[:, 0]) * (rois[:, 3] - rois[:, 1])).sqrt()
        target = (size / 56 + 1e-6).log2().floor().clamp(0, 3).long()
        x = rois.new_zeros(len(rois), WIDTH, 7, 7)
        for i in range(4):
            chosen = [rois[target == i]]
            x[target == i] = roi_align(levels[i], chosen, 7, 1 / (4 * 2**i), 0, aligned=True)
        for i in range(4):
            x = F.relu(self.conv(x, f"roi_head.bbox_head.shared_convs.{i}"))
        x = F.relu(self.plain(x.flatten(1), "roi_head.bbox_head.shared_fcs.0"))
        delta = self.plain(x, "roi_head.bbox_head.fc_reg").view(len(rois), -1, 4)
        boxes = decode(rois[:, None].expand_as(delta), delta, (0.1, 0.1, 0.2, 0.2))
        return self.plain(x, "roi_head.bbox_head.fc_cls").softmax(1), boxes.flatten(1)


def anchors(stride, size):
    """Of scale 8 and ratios 0.5, 1, 2 (height by width), around the grid's points."""
    ratio = torch.tensor((0.5, 1.0, 2.0)).sqrt()
    width, height = 8 * stride / ratio, 8 * stride * ratio
    base = torch.stack((-width / 2, -height / 2, width / 2, height / 2), 1)
    y, x = torch.meshgrid(*(torch.arange(n) * stride for n in size), indexing="ij")
    shifts = torch.stack((x, y, x, y), 2).view(-1, 1, 4)
    return (base + shifts).view(-1, 4)


def decode(boxes, delta, std):
    delta = delta * torch.tensor(std)
    size = boxes[..., 2:] - boxes[..., :2]
    center = (boxes[..., 2:] + boxes[..., :2]) / 2 + size * delta[..., :2]
    size = size * delta[..., 2:].exp()
    return torch.cat((center - size / 2, center + size / 2), -1)


def detectron2_model(weights):
    cfg = get_cfg()
    add_pgn_config(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.WS.ENABLED = "cpu", weights.description.weight_standardization
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_resnet_fpn_backbone", 0
    cfg.MODEL.RESNETS.merge_from_list(
        ["NORM", "GN", "STRIDE_IN_1X1", weights.description.stride_in_1x1, "WIDTH_PER_GROUP", 32]
    )
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.NORM, cfg.MODEL.FPN.OUT_CHANNELS = "GN", WIDTH
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    heads, head = cfg.MODEL.ROI_HEADS, cfg.MODEL.ROI_BOX_HEAD
    heads.NAME, heads.IN_FEATURES = "StandardROIHeads", ["p2", "p3", "p4", "p5"]
    heads.NUM_CLASSES, head.NAME, head.NORM = len(CLASSES), "FastRCNNConvFCHead", "GN"
    head.NUM_CONV, head.CONV_DIM, head.NUM_FC, head.FC_DIM = 4, WIDTH, 1, 24
    head.POOLER_RESOLUTION = 7
    cfg.MODEL.PIXEL_MEAN = list(weights.description.pixel_mean)
    cfg.MODEL.PIXEL_STD = list(weights.description.pixel_std)
    cfg.INPUT.FORMAT = weights.description.input_format
    model = build_model(cfg).eval()
    missing, unexpected = model.load_state_dict(weights.state, strict=False)
    assert not unexpected
    assert set(missing) <= {"pixel_mean", "pixel_std"}
    return model


def assert_close(found, wanted):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-6 * wanted.abs().max()


@torch.no_grad()
def test_a_whole_detector_computes_what_mmdetection_does(tmp_path):
    source = backbone((3, 4, 6, 3))
    # In float64: in float32 the two sum in another order, and 50 layers make 6e-5 of it.
    source = source.double()
    state = {key: each.double().clone() for key, each in mmdetection_state(source).items()}
    file = {"meta": {"config": CONFIG, "CLASSES": CLASSES}, "state_dict": state}
    torch.save(file, tmp_path / "a.pth")
    weights = read_weights(str(tmp_path / "a.pth"))
    assert not weights.unused
    assert weights.description.class_names == {"thing": list(CLASSES)}
    theirs, ours = MMDetection(source, state), detectron2_model(weights).double()
    image = picture(64).double()
    for name in ("pixel_mean", "pixel_std"):  # the built ones are rounded to float32
        exact = torch.tensor(getattr(weights.description, name), dtype=torch.float64)
        getattr(ours, name).copy_(exact[:, None, None])
    levels = theirs.pyramid(normalized(image))
    images = ours.preprocess_image([{"image": image}])
    features = ours.backbone(images.tensor)
    for i, level in enumerate(levels):
        assert_close(features[f"p{i + 2}"], level)
    compare_proposals(theirs, ours, levels, images)
    rois = [[3.0, 5, 40, 33], [0, 0, 300, 300], [10, 9, 150, 127], [40, 4, 50, 9]]
    rois = torch.tensor(rois, dtype=torch.float64)
    scores, boxes = classify_here(ours, features, rois)
    wanted_scores, wanted_boxes = theirs.classify(levels, rois)
    assert_close(scores, wanted_scores)
    assert_close(boxes, wanted_boxes)
    assert (scores[:, 0] - scores[:, -1]).abs().max() > 0.01  # the order would show


def compare_proposals(theirs, ours, levels, images: ImageList):
    generator = ours.proposal_generator
    features = [ours.backbone(images.tensor)[f] for f in generator.in_features]
    places = generator.anchor_generator(features)
    logits, deltas = generator.rpn_head(features)
    logits = torch.cat([each.permute(0, 2, 3, 1).flatten() for each in logits])
    deltas = [each.view(1, 3, 4, *each.shape[2:]).permute(0, 3, 4, 1, 2) for each in deltas]
    boxes = generator._decode_proposals(places, [each.reshape(1, -1, 4) for each in deltas])
    scores, wanted = theirs.proposals(levels)
    assert_close(logits, scores)
    assert_close(torch.cat(boxes, 1)[0], wanted)


def classify_here(model, features, rois):
    heads = model.roi_heads
    x = heads.box_pooler([features[f] for f in heads.box_in_features], [Boxes(rois)])
    scores, deltas = heads.box_predictor(heads.box_head(x))
    boxes = heads.box_predictor.box2box_transform.apply_deltas(deltas, rois)
    return scores.softmax(1), boxes


def mask_state():
    """The mask head's part of a state, in MMDetection's names."""
    generator, state = torch.Generator().manual_seed(4), {}
    head = "roi_head.mask_head"
    shapes = {
        **{f"{head}.convs.{i}.conv.weight": (WIDTH, WIDTH, 3, 3) for i in range(4)},
        **{f"{head}.convs.{i}.gn.{p}": (WIDTH,) for i in range(4) for p in ("weight", "bias")},
        **{f"{head}.upsample.weight": (WIDTH, WIDTH, 2, 2), f"{head}.upsample.bias": (WIDTH,)},
        **{f"{head}.conv_logits.weight": (3, WIDTH, 1, 1), f"{head}.conv_logits.bias": (3,)},
    }
    for key, shape in shapes.items():
        state[key] = torch.empty(shape)
        randomize(key, state[key], generator)
    return state


@torch.no_grad()
def test_the_mask_head_computes_what_mmdetection_s_does(tmp_path):
    state = mask_state()
    whole = {"meta": {"config": CONFIG}, "state_dict": mmdetection_state(backbone()) | state}
    torch.save(whole, tmp_path / "a.pth")
    weights = read_weights(str(tmp_path / "a.pth"))
    head = MaskRCNNConvUpsampleHead(
        ShapeSpec(channels=WIDTH), num_classes=3, conv_dims=[WIDTH] * 5, conv_norm="GN"
    )
    prefix = "roi_heads.mask_head."
    head.load_state_dict(
        {k.removeprefix(prefix): v for k, v in weights.state.items() if k.startswith(prefix)}
    )
    convert_to_ws(head)
    x = wanted = torch.randn(2, WIDTH, 14, 14, generator=torch.Generator().manual_seed(5))
    theirs = MMDetection(nn.Module(), state)
    for i in range(4):
        wanted = F.relu(theirs.conv(wanted, f"roi_head.mask_head.convs.{i}"))
    weight, bias = (state[f"roi_head.mask_head.upsample.{part}"] for part in ("weight", "bias"))
    wanted = F.relu(F.conv_transpose2d(wanted, weight, bias, stride=2))
    wanted = theirs.plain(wanted, "roi_head.mask_head.conv_logits")
    assert (head.layers(x) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    keys = config_keys(weights)
    assert keys["MODEL.MASK_ON"] is True
    assert keys["MODEL.ROI_MASK_HEAD.NUM_CONV"] == 4
    assert keys["MODEL.ROI_MASK_HEAD.NORM"] == "GN"


def write(folder, name, meta):
    state = mmdetection_state(backbone())
    torch.save({"meta": meta, "state_dict": state}, folder / name)
    return read_weights(str(folder / name))


def test_the_config_in_the_file_tells_what_its_keys_do_not(tmp_path):
    silent = write(tmp_path, "a.pth", {})
    assert silent.description.input_format is None
    assert "mmdetection_gn_ws and of mmdetection_gn" in silent.notes[0]
    assert write(tmp_path, "gn_ws.pth", {}).description.weight_standardization is True
    gn = """
normal = dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False)
norm = dict(type='GN', num_groups=16)
model = dict(data_preprocessor=normal, backbone=dict(style='caffe', norm_cfg=norm))
"""
    description = write(tmp_path, "gn_ws.pth", {"cfg": gn}).description
    assert description.input_format == "BGR"
    assert description.pixel_std == (1, 1, 1)
    assert description.stride_in_1x1 is True
    assert description.num_groups == 16
    assert description.weight_standardization is False


@pytest.mark.parametrize("config", ["a = (", "_base_ = 'x.py'\nmodel = dict()", "x", "def f(): 1"])
def test_a_config_that_cannot_be_read_tells_nothing(config):
    assert described_by({"meta": {"config": config}}) == {}


def test_a_config_is_parsed_and_not_run(tmp_path):
    marker = tmp_path / "ran"
    config = f"model = dict(backbone=dict(style=open({str(marker)!r}, 'w'), norm_cfg=exec('1')))"
    described_by({"meta": {"config": config}})
    assert not marker.exists()


REFUSED = {
    "1.x": ({"bbox_head.fc_cls.weight": torch.zeros(4, 24)}, "version 2 or later"),
    "cascade": ({"roi_head.bbox_head.0.fc_cls.weight": torch.zeros(4, 24)}, "one box head"),
    "three levels": ({"neck.lateral_convs.0.conv.weight": torch.zeros(1, 1, 1, 1)}, "res2 to res5"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_detectors_that_detectron2_has_otherwise_are_refused(tmp_path, name):
    heads, message = REFUSED[name]
    state = mmdetection_state(backbone())
    state = {key: each for key, each in state.items() if key.startswith("backbone.")}
    torch.save({"state_dict": state | heads}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message):
        read_weights(str(tmp_path / "a.pth"))
