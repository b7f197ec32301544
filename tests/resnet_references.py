"""ResNets as others compute them, and as Detectron2 does from what was read of their files."""

import re

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from detectron2.projects.deeplab.resnet import DeepLabStem

from gn_practical import WSConv2d
from gn_practical.layers.weight_standardization import EPS
from gn_practical.weights.resnet_shape import resnet_keys

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STAGES = ("res2", "res3", "res4", "res5")


def picture(size=64):
    """A picture as a file holds it: RGB, 0 to 255, in which the channels differ."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, size, size))
    return torch.from_numpy(pixels).float() * torch.tensor([1.0, 0.6, 0.3])[:, None, None]


def normalized(rgb):
    """As torchvision's transforms do: 0 to 1, then mean and std in RGB."""
    mean, std = (torch.tensor(each, dtype=rgb.dtype)[:, None, None] for each in (MEAN, STD))
    return ((rgb / 255 - mean) / std)[None]


def randomized(model, seed=0):
    """Random weights, scales, shifts and statistics in the place of a fresh model's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            randomize(name, value, generator)
    return model.eval()


def randomize(name, value, generator):
    if value.dim() == 4:
        fan_in = value[0].numel()
        # Filters with a mean, as trained ones have: without, standardizing would hardly show.
        value.normal_(0.5 / fan_in, (2 / fan_in) ** 0.5, generator=generator)
    elif name.endswith("running_var") or (value.dim() == 1 and name.endswith(("weight", "_s"))):
        value.uniform_(0.5, 1.5, generator=generator)
    elif value.is_floating_point():
        value.normal_(0, 0.1, generator=generator)


def stages_of(model, x):
    """The features of a ResNet in torchvision's structure, also timm's."""
    x = model.bn1(model.conv1(x))
    x = F.max_pool2d(F.relu(x), 3, 2, 1)
    features = {}
    for stage, layer in zip(
        STAGES, (model.layer1, model.layer2, model.layer3, model.layer4), strict=True
    ):
        x = features[stage] = layer(x)
    return features


def features_here(weights, rgb, state=None, description=None):
    """Detectron2's ResNet from what was read, on the picture as it was described."""
    state = weights.state if state is None else state
    description = weights.description if description is None else description
    model = build(state, description)
    mean, std = (
        torch.tensor(each)[:, None, None]
        for each in (description.pixel_mean, description.pixel_std)
    )
    image = rgb if description.input_format == "RGB" else rgb.flip(0)
    with torch.no_grad():
        return model(((image - mean) / std)[None])


def build(state, description):
    """A ResNet of the state's sizes with the described norms, stride and standardization."""
    state = {key: each for key, each in state.items() if not key.startswith("linear.")}
    keys, norm = resnet_keys(state), norm_of(description)
    make_stem = DeepLabStem if "stem.conv3.weight" in state else BasicStem
    stem = make_stem(state["stem.conv1.weight"].shape[1], keys["STEM_OUT_CHANNELS"], norm)
    width, stages = keys["STEM_OUT_CHANNELS"], []
    for index, stage in enumerate(STAGES):
        blocks = len({m[1] for key in state if (m := re.match(rf"{stage}\.(\d+)\.", key))})
        kwargs = {"norm": norm}
        block = BasicBlock
        if "res2.0.conv3.weight" in state:
            inside = keys["NUM_GROUPS"] * keys["WIDTH_PER_GROUP"] * 2**index
            kwargs |= {"bottleneck_channels": inside, "num_groups": keys["NUM_GROUPS"]}
            kwargs["stride_in_1x1"] = description.stride_in_1x1
            block = BottleneckBlock
        out = keys["RES2_OUT_CHANNELS"] * 2**index
        strides = [1 if index == 0 else 2] + [1] * (blocks - 1)
        stages.append(
            ResNet.make_stage(
                block,
                blocks,
                stride_per_block=strides,
                in_channels=width,
                out_channels=out,
                **kwargs,
            )
        )
        width = out
    model = ResNet(stem, stages, out_features=list(STAGES)).eval()
    # FrozenBN takes files without statistics.
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert not [key for key in missing if "num_batches" not in key], missing
    if description.weight_standardization:
        assert description.standardization.eps == EPS
        assert not description.standardization.eps_under_root
        for each in model.modules():
            if type(each).__name__ == "Conv2d":
                each.__class__ = WSConv2d
    return model


def norm_of(description):
    if description.norm == "GN":
        groups, eps = description.num_groups, description.norm_eps
        return lambda channels: torch.nn.GroupNorm(min(groups, channels), channels, eps=eps)
    return "FrozenBN"


def assert_equal(found, wanted):
    for stage in STAGES:
        scale = wanted[stage].abs().max()
        error = (found[stage] - wanted[stage]).abs().max() / scale
        assert error < 1e-5, (stage, error)


def difference(found, wanted):
    last = STAGES[-1]
    return ((found[last] - wanted[last]).norm() / wanted[last].norm()).item()


class Functional:
    """A bottleneck ResNet of one block a stage by formulas, over weights in anybody's names.

    Args:
        conv: {place: weight} with places "stem", "2.1" for the first convolution of res2, "2.0"
            for its shortcut.
        norm: function of (x, place).
        stride_in_1x1: where the stride is.
        standardize: function of a weight.
    """

    def __init__(self, conv, norm, stride_in_1x1=False, standardize=lambda weight: weight):
        self.conv, self.norm = conv, norm
        self.stride_in_1x1, self.standardize = stride_in_1x1, standardize

    def layer(self, x, place, stride=1):
        weight = self.standardize(self.conv[place])
        groups = x.shape[1] // weight.shape[1]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2, groups=groups)
        return self.norm(x, place)

    def __call__(self, x):
        x = F.max_pool2d(F.relu(self.layer(x, "stem", 2)), 3, 2, 1)
        features = {}
        for stage in range(2, 6):
            stride = 1 if stage == 2 else 2
            first, second = (stride, 1) if self.stride_in_1x1 else (1, stride)
            y = F.relu(self.layer(x, f"{stage}.1", first))
            y = F.relu(self.layer(y, f"{stage}.2", second))
            x = F.relu(self.layer(y, f"{stage}.3") + self.layer(x, f"{stage}.0", stride))
            features[f"res{stage}"] = x
        return features


def bottleneck_shapes(stem=32, inside=32, groups=1):
    """{place: shape} of the convolutions of a ResNet of one bottleneck a stage."""
    shapes, width = {"stem": (stem, 3, 7, 7)}, stem
    for stage in range(2, 6):
        middle, out = inside * 2 ** (stage - 2), 2 * inside * 2 ** (stage - 2)
        shapes[f"{stage}.0"] = (out, width, 1, 1)
        shapes[f"{stage}.1"] = (middle, width, 1, 1)
        shapes[f"{stage}.2"] = (middle, middle // groups, 3, 3)
        shapes[f"{stage}.3"] = (out, middle, 1, 1)
        width = out
    return shapes
