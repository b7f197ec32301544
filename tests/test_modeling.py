"""Registration, binding and weight standardization on the models that users have."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import detectron2.model_zoo
import pytest
import torch
import torchvision
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model as detectron2_build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn
from torch.overrides import TorchFunctionMode

from gn_practical import (
    PracticalGroupNorm,
    WSConv2d,
    add_pgn_config,
    bind_group_norms,
    build_model,
    convert_to_ws,
)
from gn_practical.activation_gain import gain_ratio
from gn_practical.modeling.binding import find_producers

ZOO = Path(detectron2.model_zoo.__file__).parent / "configs"


def zoo_configs(deformable):
    files = sorted(ZOO.glob("**/*.yaml"))
    names = [str(f.relative_to(ZOO)) for f in files if not f.name.startswith("Base")]
    return [name for name in names if ("dconv" in name) == deformable]


def set_every_norm(node, norm="PGN"):
    for key, value in list(node.items()):
        if key == "NORM":
            node[key] = norm
        elif isinstance(value, CfgNode):
            set_every_norm(value, norm)


def zoo_cfg(name):
    cfg = get_cfg()
    cfg.merge_from_file(str(ZOO / name))
    add_pgn_config(cfg)
    set_every_norm(cfg)
    return cfg


def on_meta(cfg, build=detectron2_build_model):
    """Build without memory or initial values, in hundredths of a second."""
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build(cfg)


def expected_groups(in_channels, out_channels):
    divisors = [d for d in range(1, out_channels + 1) if out_channels % d == 0]
    ideal = min(max((in_channels - out_channels) / 4, 1), out_channels)
    return min(divisors, key=lambda d: max(d / ideal, ideal / d))


@pytest.mark.parametrize("name", zoo_configs(deformable=False))
def test_binds_every_norm_of_the_zoo(name):
    model = on_meta(zoo_cfg(name))
    table = bind_group_norms(model)
    norms = [m for m in model.modules() if isinstance(m, PracticalGroupNorm)]
    assert len(table) == len(norms) > 0
    assert all(norm.num_groups and norm.in_channels for norm in norms)
    assert len(convert_to_ws(model)) == len(norms)


def test_binds_deformable_convolutions():
    """In a process of its own: without its compiled part Detectron2 has only dummies of them."""
    code = """
import sys, types
import detectron2
detectron2._C = sys.modules["detectron2._C"] = types.ModuleType("detectron2._C")
from tests.test_modeling import *
for name in zoo_configs(deformable=True):
    model = on_meta(zoo_cfg(name))
    table = bind_group_norms(model)
    deformable = {p for p, m in model.named_modules() if "DeformConv" in type(m).__name__}
    assert deformable and deformable <= {b.producer for b in table}, name
    try:
        convert_to_ws(model)
    except ValueError as error:
        assert "MODEL.WS.EXCLUDE" in str(error) and sorted(deformable)[0] in str(error)
    else:
        raise AssertionError("deformable convolutions were standardized")
    assert convert_to_ws(model, exclude=sorted(deformable))
    print("bound", len(table))
"""
    root = Path(__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bound") == len(zoo_configs(deformable=True))


def resnet_blocks(depth_blocks, width=64):
    """(in, out) of every convolution of a bottleneck ResNet, from the architecture's definition."""
    yield 3, 64
    channels = 64
    for stage, count in enumerate(depth_blocks):
        narrow, wide = width * 2**stage, 256 * 2**stage
        for block in range(count):
            yield from ((channels, narrow), (narrow, narrow), (narrow, wide))
            if block == 0:
                yield channels, wide
            channels = wide


def fpn():
    for wide in (256, 512, 1024, 2048):
        yield wide, 256
        yield 256, 256


R50, R101 = (3, 4, 6, 3), (3, 4, 23, 3)
MASK_HEAD = [(256, 256)] * 4
SEMANTIC_HEAD = [(256, 128)] * 4 + [(128, 128)] * 3
RETINA_HEAD = [(256, 256)] * 8


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_3x.yaml",
         [*resnet_blocks(R50), *fpn(), *MASK_HEAD, *SEMANTIC_HEAD]),
        ("COCO-PanopticSegmentation/panoptic_fpn_R_101_3x.yaml",
         [*resnet_blocks(R101), *fpn(), *MASK_HEAD, *SEMANTIC_HEAD]),
        ("Misc/mask_rcnn_R_50_FPN_3x_gn.yaml",
         [*resnet_blocks(R50), *fpn(), *MASK_HEAD, *[(256, 256)] * 4]),
        ("COCO-Detection/retinanet_R_50_FPN_3x.yaml",
         [*resnet_blocks(R50), *list(fpn())[2:], *RETINA_HEAD]),
        ("COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml",
         [*resnet_blocks(R101, width=32 * 8), *fpn()]),
    ],
)  # fmt: skip
def test_group_tables_equal_the_architecture(name, layers):
    table = bind_group_norms(on_meta(zoo_cfg(name)))
    expected = Counter((i, o, expected_groups(i, o)) for i, o in layers)
    assert Counter((b.in_channels, b.out_channels, b.num_groups) for b in table) == expected


@pytest.mark.parametrize("depth", [50, 101])
def test_grouped_convolutions_count_their_whole_channels(depth):
    cfg = zoo_cfg("COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml")
    cfg.MODEL.RESNETS.DEPTH = depth
    table = {b.norm: b for b in bind_group_norms(on_meta(cfg))}
    grouped = table["backbone.bottom_up.res2.1.conv2.norm"]
    assert (grouped.in_channels, grouped.out_channels) == (256, 256)


def test_regnet_and_lazy_configs():
    from detectron2.config import instantiate
    from detectron2.model_zoo import get_config

    cfg = get_config("new_baselines/mask_rcnn_regnetx_4gf_dds_FPN_100ep_LSJ.py")
    cfg.model.backbone.bottom_up.norm = cfg.model.backbone.norm = "PGN"
    with torch.device("meta"):
        model = instantiate(cfg.model)
    table = bind_group_norms(model)
    stages = [b for b in table if ".bottom_up." in b.norm]
    convolutions = [
        m for m in model.backbone.bottom_up.modules() if isinstance(m, nn.Conv2d) and m.weight.dim()
    ]
    assert len(stages) == len(convolutions)
    by_path = dict(model.named_modules())
    for binding in stages:
        weight = by_path[binding.producer].weight
        assert binding.out_channels == weight.shape[0]
        assert binding.in_channels == weight.shape[1] * by_path[binding.producer].groups
        assert binding.num_groups == expected_groups(binding.in_channels, binding.out_channels)


class ProducerRecorder(TorchFunctionMode):
    """Remembers the weight that made each tensor."""

    WEIGHT_LAYERS = (nn.functional.conv2d, nn.functional.linear, torch.conv2d)

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func in self.WEIGHT_LAYERS:
            self.made.append((output, args[1]))
        return output

    def weight_of(self, tensor):
        return next((weight for output, weight in self.made if output is tensor), None)


def assert_runs_as_bound(model, run):
    """Run a model and compare each norm's input with the output of the layer it was bound to."""
    table = {b.norm: b.producer for b in bind_group_norms(model)}
    modules = dict(model.named_modules())
    recorder, seen = ProducerRecorder(), set()

    def check(path):
        def hook(module, inputs):
            assert recorder.weight_of(inputs[0]) is modules[table[path]].weight, path
            seen.add(path)

        return hook

    handles = [modules[path].register_forward_pre_hook(check(path)) for path in table]
    with EventStorage(), recorder:
        run()
    for handle in handles:
        handle.remove()
    assert seen == set(table)


def fake_batch(size=64):
    target = Instances((size, size))
    target.gt_boxes = Boxes(torch.tensor([[8.0, 8.0, 40.0, 48.0]]))
    target.gt_classes = torch.tensor([1])
    mask = torch.zeros(1, size, size, dtype=torch.bool)
    mask[0, 8:48, 8:40] = True
    target.gt_masks = BitMasks(mask)
    semantic = torch.randint(0, 54, (size, size))
    image = torch.randint(0, 256, (3, size, size), dtype=torch.uint8)
    return [
        {"image": image, "instances": target, "sem_seg": semantic, "height": size, "width": size}
    ]


@pytest.mark.parametrize(
    "name",
    [
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
        "Misc/mask_rcnn_R_50_FPN_3x_gn.yaml",
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    ],
)
def test_norms_run_after_the_layer_they_are_bound_to(name):
    cfg = zoo_cfg(name)
    cfg.MODEL.DEVICE = "cpu"
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.MODEL.RESNETS.NUM_GROUPS = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    model = detectron2_build_model(cfg).train()
    assert_runs_as_bound(model, lambda: model(fake_batch()))


def test_torchvision_resnet_runs_as_bound():
    model = torchvision.models.resnet50(norm_layer=PracticalGroupNorm)
    assert_runs_as_bound(model, lambda: model(torch.randn(1, 3, 64, 64)))
    layers = Counter((b.in_channels, b.out_channels) for b in bind_group_norms(model))
    assert layers == Counter(resnet_blocks(R50))


def test_regnet_runs_as_bound():
    from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem

    model = RegNet(
        stem_class=SimpleStem, stem_width=16, block_class=ResBottleneckBlock, depth=4,
        w_a=8, w_0=16, w_m=2, group_width=8, norm="PGN", out_features=["s1"],
    )  # fmt: skip
    assert_runs_as_bound(model, lambda: model(torch.randn(1, 3, 64, 64)))


class Untidy(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = PracticalGroupNorm(8)
        self.conv = nn.Conv2d(3, 8, 3)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.norm1 = PracticalGroupNorm(8)
        self.norm2 = PracticalGroupNorm(8)


@pytest.mark.parametrize("model", [nn.ModuleList([Untidy()]), nn.ModuleList([Shared()])])
def test_what_cannot_be_inferred_raises_with_its_path_and_can_be_said(model):
    paths = [p for p, m in model.named_modules() if isinstance(m, PracticalGroupNorm)]
    with pytest.raises(ValueError, match=rf"{paths[0]}.*MODEL.PGN.IN_CHANNELS"):
        bind_group_norms(model)
    table = bind_group_norms(model, in_channels=(("0.norm*", 24),))
    assert [b.norm for b in table] == paths
    assert {(b.in_channels, b.num_groups) for b in table} == {(24, 4)}


def sequence():
    return nn.Sequential(nn.Linear(64, 32), PracticalGroupNorm(32), nn.ReLU(),
                         nn.Linear(32, 16), PracticalGroupNorm(16))  # fmt: skip


def test_number_of_groups_for_all_and_for_single_layers():
    assert [b.num_groups for b in bind_group_norms(sequence())] == [8, 4]
    table = bind_group_norms(sequence(), 2, layer_num_groups=(("*", 4), ("4", 16)))
    assert [b.num_groups for b in table] == [4, 16]
    table = bind_group_norms(sequence(), rule="exact", layer_num_groups=(("4", 0),))
    assert [b.num_groups for b in table] == [8, 4]


def test_gain_ratio_of_the_activation_enters_the_rule():
    # tanh: F / B = 0.849, so 64 -> 32 has G_ideal = (54.3 - 32) / 4 = 5.6 in place of 8.
    table = bind_group_norms(sequence(), gain_ratio=gain_ratio("tanh"))
    assert [b.num_groups for b in table] == [4, 2]
    assert table[0].ideal_num_groups == pytest.approx(5.585, abs=1e-3)
    assert table[0].gradient_variance_ratio == pytest.approx(48 / (64 * 0.84903), abs=1e-3)
    cfg = zoo_cfg("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml")
    cfg.MODEL.PGN.ACTIVATION = "tanh"
    model = on_meta(cfg, build_model)
    assert model.backbone.bottom_up.res2[1].conv1.norm.num_groups == 32  # 38.3; 64 for ReLU
    cfg.MODEL.PGN.ACTIVATION = "rleu"
    with pytest.raises(ValueError, match=r"activation must be a known name .*'rleu'"):
        on_meta(cfg, build_model)


def test_errors_name_the_layer_and_the_pattern():
    with pytest.raises(ValueError, match=r"^4: num_groups must divide .* num_groups=32 for 16"):
        bind_group_norms(sequence(), 32)
    with pytest.raises(ValueError, match=r"got pattern 'head\.\*'. The model has 2 such layers: 1"):
        bind_group_norms(sequence(), layer_num_groups=(("head.*", 4),))
    with pytest.raises(ValueError, match=r"must hold \(pattern, number\) pairs, got 'head'"):
        bind_group_norms(sequence(), in_channels=("head", 4))


def test_weight_standardization_of_every_convolution_that_a_norm_follows():
    model = torchvision.models.resnet18()
    followed = {p.path for p in find_producers(model)}
    before = dict(model.named_modules())
    assert set(convert_to_ws(model)) == followed
    assert dict(model.named_modules()) == before  # the same objects, so Detectron2's lists hold
    convolutions = {p for p, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert {p for p, m in model.named_modules() if isinstance(m, WSConv2d)} == convolutions
    assert convert_to_ws(model) == list(convert_to_ws(model))
    assert model(torch.randn(2, 3, 64, 64)).isfinite().all()


def test_weight_standardization_leaves_out_what_is_excluded_or_not_normalized():
    cfg = zoo_cfg("Misc/mask_rcnn_R_50_FPN_3x_gn.yaml")
    cfg.MODEL.WS.ENABLED = True
    cfg.MODEL.WS.EXCLUDE = ("backbone.bottom_up.*",)
    model = on_meta(cfg, build_model)
    standardized = {p for p, m in model.named_modules() if isinstance(m, WSConv2d)}
    assert len(standardized) == 8 + 4 + 4
    assert not any("bottom_up" in p or "rpn" in p or "predictor" in p for p in standardized)
    with pytest.raises(ValueError, match=r"MODEL.WS.EXCLUDE must match .* got 'neck\.\*'"):
        convert_to_ws(model, ["neck.*"])


def test_frozen_parameters_stay_frozen():
    cfg = zoo_cfg("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml")
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    cfg.MODEL.WS.ENABLED = True
    frozen = {n for n, p in on_meta(cfg, build_model).named_parameters() if not p.requires_grad}
    plain = {n for n, p in on_meta(cfg).named_parameters() if not p.requires_grad}
    assert frozen == plain
    assert any(name.endswith("norm.weight") for name in frozen)
