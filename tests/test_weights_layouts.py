"""ResNets in the layouts of Detectron, pycls, jhu, MoCo, DINO, MMPretrain; and what is wrong."""

import pickle
import re
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from resnet_references import (
    Functional,
    assert_equal,
    bottleneck_shapes,
    difference,
    features_here,
    normalized,
    picture,
    randomize,
)
from torchvision.models.resnet import BasicBlock, ResNet

from gn_practical.weights import Standardization, read_weights

CAFFE_MEAN = torch.tensor((103.53, 116.28, 123.675))[:, None, None]
CAFFE_STD = torch.tensor((57.375, 57.12, 58.395))[:, None, None]


def caffe2_names(place, norm):
    if place == "stem":
        return "conv1_w", f"{'res_' if norm == 'bn' else ''}conv1_{norm}_"
    stage, conv = place.split(".")
    name = f"res{stage}_0_branch" + ("1", "2a", "2b", "2c")[int(conv)]
    return f"{name}_w", f"{name}_{norm}_"


def torchvision_names(place, norm):
    if place == "stem":
        return "conv1.weight", f"{norm}1."
    stage, conv = map(int, place.split("."))
    block = f"layer{stage - 1}.0."
    if conv == 0:
        return f"{block}downsample.0.weight", f"{block}downsample.1."
    return f"{block}conv{conv}.weight", f"{block}{norm}{conv}."


def pycls_names(place, norm):
    if place == "stem":
        return "stem.conv.weight", "stem.bn."
    stage, conv = map(int, place.split("."))
    block = f"s{stage - 1}.b1."
    if conv == 0:
        return f"{block}proj.weight", f"{block}bn."
    return f"{block}f.{'abc'[conv - 1]}.weight", f"{block}f.{'abc'[conv - 1]}_bn."


NAMES = {"caffe2": caffe2_names, "torchvision": torchvision_names, "pycls": pycls_names}


def layout(names, norm, *, parts, prefix="", groups=1):
    """A random state in somebody's names, and functions that look up its convolutions and norms."""
    generator = torch.Generator().manual_seed(0)
    state, convs, norms = {}, {}, {}
    for place, shape in bottleneck_shapes(groups=groups).items():
        conv, start = NAMES[names](place, norm)
        for key, size in [(conv, shape), *((start + part, shape[:1]) for part in parts)]:
            state[prefix + key] = torch.empty(size)
            randomize(key, state[prefix + key], generator)
        convs[place] = state[prefix + conv]
        norms[place] = {part: state[prefix + start + part] for part in parts}
    return state, convs, norms


def group_norm(norms, scale="weight", shift="bias"):
    return lambda x, place: F.group_norm(x, 32, norms[place][scale], norms[place][shift])


def batch_norm(norms):
    def norm(x, place):
        each = norms[place]
        return F.batch_norm(
            x, each["running_mean"], each["running_var"], each["weight"], each["bias"]
        )

    return norm


def qiao(weight):
    """Weight standardization as its authors' layers compute it."""
    mean = weight.mean((1, 2, 3), keepdim=True)
    std = (weight - mean).flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5
    return (weight - mean) / std


def bit(weight):
    """As BiT and timm's StdConv2d compute it."""
    var, mean = torch.var_mean(weight, (1, 2, 3), keepdim=True, unbiased=False)
    return (weight - mean) / (var + 1e-6).sqrt()


BN_PARTS = ("weight", "bias", "running_mean", "running_var")
GN_PARTS = ("weight", "bias")


def detectron_gn(folder):
    state, convs, norms = layout("caffe2", "gn", parts=("s", "b"))
    state |= {"pred_w": torch.zeros(10, 512), "conv1_w_momentum": torch.zeros(1)}
    arrays = {key: each.numpy() for key, each in state.items()}
    (folder / "R-50-GN.pkl").write_bytes(pickle.dumps({"blobs": arrays}, protocol=2))
    model = Functional(convs, group_norm(norms, "s", "b"))
    return "R-50-GN.pkl", model, picture().flip(0) - CAFFE_MEAN


def detectron_affine(folder, groups=1):
    state, convs, norms = layout("caffe2", "bn", parts=("s", "b"), groups=groups)
    arrays = {key: each.numpy() for key, each in state.items()}
    (folder / "a.pkl").write_bytes(pickle.dumps(arrays, protocol=2))

    def affine(x, place):
        return x * norms[place]["s"][:, None, None] + norms[place]["b"][:, None, None]

    std = CAFFE_STD if groups > 1 else 1
    image = (picture().flip(0) - CAFFE_MEAN) / std
    return "a.pkl", Functional(convs, affine, stride_in_1x1=groups == 1), image


def pycls(folder):
    state, convs, norms = layout("pycls", "bn", parts=BN_PARTS)
    torch.save({"epoch": 1, "model_state": state}, folder / "a.pyth")
    return (
        "a.pyth",
        Functional(convs, batch_norm(norms)),
        (picture().flip(0) - CAFFE_MEAN) / CAFFE_STD,
    )


def jhu_in_mmcv(folder):
    state, convs, norms = layout("torchvision", "gn", parts=GN_PARTS)
    torch.save({"state_dict": state}, folder / "resnet50_gn_ws.pth")
    model = Functional(convs, group_norm(norms), standardize=qiao)
    return "resnet50_gn_ws.pth", model, normalized(picture())


def jhu(folder):
    state, convs, norms = layout("torchvision", "bn", parts=GN_PARTS, prefix="module.")
    torch.save(state, folder / "R-50-GN-WS.pth.tar")
    model = Functional(convs, group_norm(norms), standardize=qiao)
    return "R-50-GN-WS.pth.tar", model, normalized(picture())


def detectron_in_mmcv(folder):
    state, convs, norms = layout("torchvision", "gn", parts=GN_PARTS)
    torch.save({"state_dict": state}, folder / "a.pth")
    return "a.pth", Functional(convs, group_norm(norms)), picture().flip(0) - CAFFE_MEAN


def msra_in_mmcv(folder, fold):
    state, convs, norms = layout("torchvision", "bn", parts=BN_PARTS)
    if fold:
        for key, each in state.items():
            if key.endswith(("running_mean", "running_var")):
                each.fill_(key.endswith("var"))
    else:
        convs["stem"].div_(58)  # what pictures from 0 to 255 need for such statistics
    torch.save({"state_dict": state}, folder / "a.pth")
    model = Functional(convs, batch_norm(norms), stride_in_1x1=True)
    return "a.pth", model, picture().flip(0) - CAFFE_MEAN


def moco(folder, prefix="module."):
    prefix = f"{prefix}encoder_q."
    wanted, convs, norms = layout("torchvision", "bn", parts=BN_PARTS, prefix=prefix)
    other = {k.replace("_q", "_k"): torch.zeros_like(v) for k, v in wanted.items()}
    heads = {"queue": torch.zeros(128, 8), f"{prefix}fc.weight": torch.zeros(2, 3)}
    torch.save({"arch": "resnet50", "state_dict": {**other, **wanted, **heads}}, folder / "a.pth")
    return "a.pth", Functional(convs, batch_norm(norms)), normalized(picture())


def dino(folder):
    wanted, convs, norms = layout("torchvision", "bn", parts=BN_PARTS, prefix="module.backbone.")
    other = {key: torch.zeros_like(each) for key, each in wanted.items()}
    beside = {"epoch": 3, "args": Namespace(arch="resnet50", lr=0.1)}
    torch.save({"student": other, "teacher": wanted, **beside}, folder / "a.pth")
    return "a.pth", Functional(convs, batch_norm(norms)), normalized(picture())


def mmpretrain(folder):
    state, convs, norms = layout("torchvision", "bn", parts=BN_PARTS, prefix="backbone.")
    state["head.fc.weight"] = torch.zeros(10, 512)
    torch.save({"meta": {}, "state_dict": state}, folder / "a.pth")
    return "a.pth", Functional(convs, batch_norm(norms)), normalized(picture())


def ema(folder):
    wanted, convs, norms = layout("torchvision", "bn", parts=BN_PARTS, prefix="module.")
    other = {key: torch.zeros_like(each) for key, each in wanted.items()}
    torch.save({"state_dict": other, "state_dict_ema": wanted}, folder / "a.pth")
    return "a.pth", Functional(convs, batch_norm(norms)), normalized(picture())


def safetensors(folder):
    from safetensors.torch import save_file

    state, convs, norms = layout("torchvision", "bn", parts=BN_PARTS)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return "model.safetensors", Functional(convs, batch_norm(norms)), normalized(picture())


LAYOUTS = {
    "detectron_gn": detectron_gn,
    "detectron_msra": detectron_affine,
    "detectron_resnext": lambda folder: detectron_affine(folder, groups=4),
    "jhu": jhu,
    "jhu in MMCV's names": jhu_in_mmcv,
    "mmcv_detectron_gn": detectron_in_mmcv,
    "pycls": pycls,
    "statistics folded, in MMCV's names": lambda folder: msra_in_mmcv(folder, fold=True),
    "from 0 to 255, in MMCV's names": lambda folder: msra_in_mmcv(folder, fold=False),
    "moco": moco,
    "moco without module": lambda folder: moco(folder, ""),
    "dino": dino,
    "mmpretrain": mmpretrain,
    "ema": ema,
    "safetensors": safetensors,
}


def read(folder, name):
    file_name, model, image = LAYOUTS[name](folder)
    image = image if image.dim() == 4 else image[None]
    # Two files have the keys of others too.
    source = name if name == "mmcv_detectron_gn" else None
    return read_weights(str(folder / file_name), source), model(image)


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_has_the_same_features(tmp_path, name):
    weights, wanted = read(tmp_path, name)
    description = weights.description
    if name == "pycls":
        assert description.stride_in_1x1 is None  # its configs have either
        description = replace(description, stride_in_1x1=False)
    assert_equal(features_here(weights, picture(), description=description), wanted)
    if name.startswith(("moco", "dino")):
        assert not [key for key in weights.state if key.startswith("linear")]


WRONG = {
    "order of the channels": {"input_format": "RGB", "pixel_mean": (123.675, 116.28, 103.53)},
    "scale": {"pixel_std": (58.395, 57.12, 57.375)},
    "stride": {"stride_in_1x1": True},
    "groups": {"num_groups": 16},
    "standardization": {"weight_standardization": True, "standardization": Standardization()},
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_shows_in_the_features(tmp_path, what):
    weights, wanted = read(tmp_path, "detectron_gn")
    wrong = replace(weights.description, **WRONG[what])
    assert wrong != weights.description
    assert difference(features_here(weights, picture(), description=wrong), wanted) > 0.01


def shrink_filters(state):
    """Filters of very different sizes, some near eps, as long training leaves them."""
    generator = torch.Generator().manual_seed(1)
    for value in state.values():
        if value.dim() == 4:
            scale = torch.rand(len(value), 1, 1, 1, generator=generator)
            value.mul_(10 ** (-3 * scale))


def test_another_definition_of_standardization_shows(tmp_path):
    state, convs, norms = layout("torchvision", "gn", parts=GN_PARTS)
    shrink_filters(state)
    torch.save({"state_dict": state}, tmp_path / "gn_ws.pth")
    found = features_here(read_weights(str(tmp_path / "gn_ws.pth")), picture())
    image = normalized(picture())
    assert_equal(found, Functional(convs, group_norm(norms), standardize=qiao)(image))
    other = Functional(convs, group_norm(norms), standardize=bit)(image)
    assert difference(found, other) > 0.01


def test_keys_of_two_sources_leave_open_what_they_differ_in(tmp_path):
    state, *_ = layout("torchvision", "gn", parts=GN_PARTS)
    torch.save({"state_dict": state}, tmp_path / "a.pth")
    weights = read_weights(str(tmp_path / "a.pth"))
    assert weights.description.input_format is None
    assert weights.description.weight_standardization is None
    assert weights.description.num_groups == 32
    assert "of jhu and of mmcv_detectron_gn and of mmcv_contrib_gn;" in weights.notes[0]
    told = read_weights(str(tmp_path / "a.pth"), "jhu").description
    assert (told.input_format, told.weight_standardization) == ("RGB", True)
    with pytest.raises(
        ValueError, match=r"got source=timm_gn .* Choose jhu or mmcv_detectron_gn or"
    ):
        read_weights(str(tmp_path / "a.pth"), "timm_gn")


def test_grouped_networks_have_other_sources(tmp_path):
    for groups, parts, norm, wanted in (
        (4, GN_PARTS, "gn", "(jhu) or GN ResNeXts of jhu"),
        (4, BN_PARTS, "bn", "same names or Detectron's ResNeXts"),  # of 32x8d, 8 channels a group
        (2, BN_PARTS, "bn", "torchvision"),
    ):
        state, *_ = layout("torchvision", norm, parts=parts, groups=groups)
        torch.save(state, tmp_path / "a.pth")
        description = read_weights(str(tmp_path / "a.pth")).description
        assert wanted in description.source
        assert (description.input_format is None) == (groups == 4 and norm == "bn")


@pytest.mark.parametrize("fold", [True, False])
def test_values_tell_unless_the_user_does(tmp_path, fold):
    msra_in_mmcv(tmp_path, fold)
    weights = read_weights(str(tmp_path / "a.pth"))
    assert weights.notes == ("told by its values, not its keys: mmcv_detectron_msra",)
    told = read_weights(str(tmp_path / "a.pth"), "torchvision")
    assert (told.description.input_format, told.notes) == ("RGB", ())


def test_a_fresh_network_is_torchvision_s(tmp_path):
    torch.save(ResNet(BasicBlock, [1, 1, 1, 1]).state_dict(), tmp_path / "a.pth")
    assert read_weights(str(tmp_path / "a.pth")).description.input_format == "RGB"


def test_a_name_never_decides_against_the_keys(tmp_path):
    file_name, *_ = mmpretrain(tmp_path)
    (tmp_path / file_name).rename(tmp_path / "resnet50_gn_ws_bgr.pkl")
    description = read_weights(str(tmp_path / "resnet50_gn_ws_bgr.pkl")).description
    assert (description.source, description.norm) == ("MMPretrain", "BN")
    assert description.weight_standardization is False


@pytest.mark.parametrize("level", ["state_dict", "state_dict_ema"])
def test_which_of_two_sets_was_taken_is_said(tmp_path, level):
    file_name, *_ = ema(tmp_path)
    path = str(tmp_path / file_name)
    assert read_weights(path).notes[0] == "taken from state_dict_ema; the file has state_dict too"
    weights = read_weights(path, level=level)
    assert (weights.state["stem.conv1.weight"] == 0).all() == (level == "state_dict")
    assert weights.notes[0].startswith(f"taken from {level};")
    with pytest.raises(ValueError, match=r"one of state_dict_ema, state_dict, got level=teacher"):
        read_weights(path, level="teacher")


def blob_of(key):
    """Detectron's name of a tensor of Detectron2's Faster R-CNN with FPN and GN."""
    key = key.removeprefix("backbone.").removeprefix("bottom_up.").replace("stem.", "")
    for pattern, blob in (
        (r"(res\d)\.(\d+)\.", r"\1_\2_"),
        (r"shortcut\.", "branch1."),
        (r"_conv([123])\.", lambda m: f"_branch2{'abc'[int(m[1]) - 1]}."),
        (r"fpn_lateral5\.", "fpn_inner_res5_2_sum."),
        (r"fpn_lateral(\d)\.", r"fpn_inner_res\1_9_sum_lateral."),
        (r"fpn_output(\d)\.", r"fpn_res\1_2_sum."),
        (r"proposal_generator.rpn_head.conv\.", "conv_rpn_fpn2."),
        (r"proposal_generator.rpn_head.objectness_logits\.", "rpn_cls_logits_fpn2."),
        (r"proposal_generator.rpn_head.anchor_deltas\.", "rpn_bbox_pred_fpn2."),
        (r"roi_heads.box_head.conv", "head_conv"),
        (r"roi_heads.box_head.fc1\.", "fc6."),
        (r"roi_heads.box_predictor\.", ""),
        (r"\.norm\.weight", "_gn_s"),
        (r"\.norm\.bias", "_gn_b"),
        (r"\.weight", "_w"),
        (r"\.bias", "_b"),
    ):
        key = re.sub(pattern, blob, key)
    return key


def test_a_whole_detector_of_detectron_has_detectron2_s_names(tmp_path):
    wanted = {}
    for key, shape in DETECTOR.items():
        for part in ("weight", "norm.weight", "norm.bias") if "gn" in shape else ("weight", "bias"):
            wanted[f"{key}.{part}"] = torch.randn(8 if "cls" in key else 28, 2)
    blobs = {blob_of(key): each.numpy() for key, each in wanted.items()}
    assert len(blobs) == len(wanted)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"blobs": blobs}))
    state = read_weights(str(tmp_path / "a.pkl")).state
    assert state.keys() == wanted.keys()
    for key, each in state.items():
        if "cls_score" in key:  # background was the first class
            assert torch.equal(each, wanted[key].roll(-1, 0))
        elif "bbox_pred" in key:  # and had boxes
            assert torch.equal(each, wanted[key][4:])
        else:
            assert torch.equal(each, wanted[key])


DETECTOR = {
    "backbone.bottom_up.stem.conv1": "gn",
    **{f"backbone.bottom_up.res{i}.0.conv{j}": "gn" for i in (2, 5) for j in (1, 2, 3)},
    "backbone.bottom_up.res2.0.shortcut": "gn",
    **{f"backbone.fpn_{kind}{i}": "gn" for kind in ("lateral", "output") for i in (2, 3, 4, 5)},
    **{f"roi_heads.box_head.conv{i}": "gn" for i in (1, 2, 3, 4)},
    "roi_heads.box_head.fc1": "plain",
    "roi_heads.box_predictor.cls_score": "plain",
    "roi_heads.box_predictor.bbox_pred": "plain",
    **{
        f"proposal_generator.rpn_head.{name}": "plain"
        for name in ("conv", "objectness_logits", "anchor_deltas")
    },
}
