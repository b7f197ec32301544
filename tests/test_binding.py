"""Which layer a norm is bound to, by modules and by a run, on stand-ins for foreign models."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gn_practical import PracticalGroupNorm, bind_group_norms, build_model
from gn_practical.modeling import group_norm_bindings
from gn_practical.num_groups import gradient_variance_ratio
from tests.test_modeling import zoo_cfg


def bound(model, example_inputs=None):
    """Return {norm: (producer, n_in)} of a model's table."""
    table = bind_group_norms(model, example_inputs=example_inputs)
    return {b.norm: (b.producer, b.in_channels) for b in table}


class Before(nn.Module):
    """Pre-activation with the convolution registered first, all of equal channels."""

    def __init__(self, channels=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 1))
        self.conv = nn.Conv2d(channels, channels, 1)
        self.norm = PracticalGroupNorm(channels)

    def forward(self, x):
        return self.conv(self.norm(self.stem(x)))


def test_norm_that_runs_before_the_convolution_registered_before_it():
    assert bound(Before()) == {"norm": ("conv", 8)}  # all that the modules tell
    assert bound(Before(), torch.randn(1, 3, 4, 4)) == {"norm": ("stem.0", 3)}


def test_norm_that_no_weight_layer_feeds_is_an_error():
    model = Before(3)
    model.stem = nn.Sequential()
    with pytest.raises(ValueError, match=r"3 channels at 'norm' in Before \(no weight layer was"):
        bind_group_norms(model, example_inputs=torch.randn(1, 3, 4, 4))
    assert not model.norm.num_groups
    table = bind_group_norms(
        model, in_channels=(("norm", 24),), example_inputs=torch.randn(1, 3, 4, 4)
    )
    assert (table[0].producer, table[0].in_channels) == ("", 24)


class Concatenation(nn.Module):
    """A dense block; the second layer can see the first one's input as well."""

    def __init__(self, shared):
        super().__init__()
        self.norm = PracticalGroupNorm(12)
        self.a, self.b = nn.Conv2d(6, 8, 1), nn.Conv2d(6 if shared else 8, 4, 1)
        self.shared = shared

    def forward(self, x):
        a = self.a(x)
        b = self.b(x if self.shared else a.relu())
        return self.norm(torch.cat([F.max_pool2d(a, 3, 1, 1), b], 1))


def test_layers_that_are_concatenated_are_one_layer_of_all_their_inputs():
    assert bound(Concatenation(False), torch.randn(1, 6, 4, 4)) == {"norm": ("a, b", 6 + 8)}
    assert bound(Concatenation(True), torch.randn(1, 6, 4, 4)) == {"norm": ("a, b", 6)}


class Joined(nn.Module):
    """Linear layers in parallel, joined, normalized, ReLU."""

    def __init__(self, widths, n_out, join):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, n_out, bias=False) for width in widths)
        self.join = join
        self.norm = PracticalGroupNorm(n_out * (1 if join == "sum" else len(widths)))

    def forward(self, *inputs):
        outputs = [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]
        return self.norm(sum(outputs) if self.join == "sum" else torch.cat(outputs, 1)).relu()


@pytest.mark.parametrize("join", ["sum", "cat"])
def test_equation_31_holds_over_all_inputs_of_joined_layers(join):
    torch.manual_seed(0)
    widths, n_out = (128, 384), 128
    model, squares = Joined(widths, n_out, join), torch.zeros(3)
    (row,) = bind_group_norms(
        model, example_inputs=tuple(torch.randn(2, width) for width in widths)
    )
    assert row.in_channels == sum(widths)
    model.norm.num_groups = 1  # where Eq. 31 and the exact factor agree
    for _ in range(20):
        for layer in model.layers:
            nn.init.kaiming_normal_(layer.weight)
        inputs = [torch.randn(32, width).relu().requires_grad_() for width in widths]
        z = model(*inputs)
        v = torch.randn(z.shape)
        gradients = torch.autograd.grad(z, inputs, v)
        squares += torch.tensor(
            [sum(float(g.square().sum()) for g in gradients), 32 * sum(widths), v.square().mean()]
        )
    measured = squares[0] / squares[1] * 20 / squares[2]
    expected = gradient_variance_ratio(sum(widths), row.out_channels, 1)
    assert float(measured) == pytest.approx(expected, rel=0.08)


class Heads(nn.Module):
    """One norm behind several convolutions, as some detectors share theirs between levels."""

    def __init__(self, *widths):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, 8, 1) for width in widths)
        self.norm = PracticalGroupNorm(8)

    def forward(self, x):
        return [self.norm(conv(x[:, : conv.in_channels])) for conv in self.convs]


def test_shared_norm_must_get_the_same_input_channels():
    x = torch.randn(1, 8, 2, 2)
    assert bound(Heads(6, 6), x) == {"norm": ("convs.0, convs.1", 6)}
    with pytest.raises(ValueError, match=r"input channels: 6 from convs.0; 8 from convs.1\)"):
        bound(Heads(6, 8), x)


class Lambda(nn.Module):
    """Layers, and a function of them and the input."""

    def __init__(self, function, **layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.function = function

    def forward(self, x):
        return self.function(self.layers, x)


def conv_and_norm(function, n_out=8, channels=8, **more):
    return Lambda(function, norm=PracticalGroupNorm(channels), conv=nn.Conv2d(4, n_out, 1), **more)


def test_functions_of_the_features_are_followed():
    def function(m, x):
        x = m["conv"](x)
        parts = [F.gelu(part) for part in x.split(2, 1)]
        x = torch.stack([torch.cat(parts, 1), x]).mean(0)
        x = F.interpolate(x, scale_factor=2).transpose(2, 3).clone()
        x[:, 0] = x[:, 1]
        x *= torch.sigmoid(m["gate"](x.mean((2, 3), keepdim=True)))
        return m["norm"](F.dropout(x.flatten(2)))

    model = conv_and_norm(function, gate=nn.Conv2d(8, 8, 1))
    found = bound(model, torch.randn(1, 4, 4, 4))
    assert found == {"layers.norm": ("layers.conv", 4)}


@pytest.mark.parametrize(
    ("function", "n_out", "reason"),
    [
        (lambda m, x: m["norm"](F.pixel_shuffle(m["conv"](x), 2)), 32, r"conv \(32\)\)"),
        (lambda m, x: m["norm"](torch.cat([m["conv"](x)] * 2, 1)), 4, r"not the .*\(4\)\)"),
        (lambda m, x: m["norm"](m["conv"](x)[:, :8]), 16, r"not the output channels .*\(16\)\)"),
        (
            lambda m, x: m["norm"](torch.einsum("nchw,cd->ndhw", m["conv"](x), torch.eye(8))),
            8,
            "mixed outside of any weight layer, as in attention",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_with_its_reason(function, n_out, reason):
    with pytest.raises(ValueError, match=rf"at 'layers.norm' in ModuleDict \(.*{reason}"):
        bound(conv_and_norm(function, n_out), torch.randn(1, 4, 4, 4))


class Hidden(torch.autograd.Function):
    """Not shown to torch function modes."""

    @staticmethod
    def forward(ctx, x):
        return x * 2


class Opaque(nn.Conv2d):
    def __init__(self, *args, norm=None):
        super().__init__(*args)
        self.norm = norm

    def forward(self, x):
        x = Hidden.apply(x[:, :1].expand(-1, 8, -1, -1))
        return x if self.norm is None else self.norm(x)


class OpaqueActivation(nn.Module):
    def forward(self, x):
        return Hidden.apply(x)


def test_functions_that_torch_does_not_show():
    x = torch.randn(1, 4, 2, 2)
    model = nn.Sequential(Opaque(4, 8, 1), OpaqueActivation(), PracticalGroupNorm(8))
    assert bound(model, x) == {"2": ("0", 4)}
    model = nn.Sequential(Opaque(4, 8, 1, norm=PracticalGroupNorm(8)))
    assert bound(model, x) == {"0.norm": ("0", 4)}


class Odd(nn.Module):
    """Everything that surprises who walks over modules."""

    def __init__(self):
        super().__init__()
        self.empty, self.nothing = nn.Sequential(), nn.ModuleList()
        self.none = None
        self.conv, self.norm = nn.Conv2d(3, 8, 1), PracticalGroupNorm(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), PracticalGroupNorm(8))
        self.aliases = nn.ModuleDict({"conv": self.block[0], "norm": self.block[1]})
        self.plain_list = [self.block, self.block]  # runs twice, as a head over two levels
        self.batch_norm = nn.BatchNorm2d(8)
        self.old = nn.utils.weight_norm(nn.Conv2d(8, 8, 1))
        self.last = PracticalGroupNorm(8)

    def forward(self, x):
        x = self.empty(self.norm(self.conv(x)))
        for block in self.plain_list:
            x = block(x)
        return self.last(self.old(F.dropout(self.batch_norm(x), 0.5, self.training)))


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("example", [None, torch.randn(2, 3, 4, 4)])
def test_containers_aliases_lists_and_shared_modules(example):
    assert bound(Odd(), example) == {
        "norm": ("conv", 3), "block.1": ("block.0", 8), "last": ("old", 8)
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("fails", [False, True])
def test_run_leaves_nothing_behind(fails):
    model = Odd()
    model.norm.eval()
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    calls = []
    model.last.register_forward_hook(lambda *args: calls.append(args))
    before = copy.deepcopy({k: v.detach() for k, v in model.state_dict().items()})
    parameters = [(id(p), id(p.grad)) for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    x = torch.randn(2, 3, 4, 4)
    state = torch.random.get_rng_state()

    def run(shadow):
        assert not any(m.training for m in shadow.modules())
        shadow(x + torch.randn_like(x))
        if fails:
            raise KeyError("in the model")

    if fails:
        with pytest.raises(KeyError, match="in the model"):
            bind_group_norms(model, example_inputs=run)
    else:
        bind_group_norms(model, example_inputs=run)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert [(id(p), id(p.grad)) for p in model.parameters()] == parameters
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any("forward" in vars(m) for m in model.modules())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()].count(
        1
    ) == 2
    assert not vars(x)


def test_convolution_before_a_stage_is_not_taken_for_its_last():
    """An isotropic network: stem, stage and norm have the same channels."""
    stage = nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), stage, PracticalGroupNorm(8))
    with pytest.raises(ValueError, match="Let a run show them"):
        bind_group_norms(model)
    assert bound(model, torch.randn(1, 3, 4, 4)) == {"2": ("1.1", 16)}


def test_convnext():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    model = ConvNeXt(
        [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 1)], norm_layer=PracticalGroupNorm
    )
    assert bound(model, torch.randn(1, 3, 32, 32)) == {
        "features.0.1": ("features.0.0", 3),
        # the residual stream: the stem and two blocks, whose last layers are 32 -> 8
        "features.2.0": ("features.0.0, features.1.0.block.5, features.1.1.block.5", 3 + 2 * 32),
        "classifier.0": ("features.2.1, features.3.0.block.5", 8 + 64),
    }


def with_group_norms(model):
    """Put PGN in place of batch norms."""
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(model, name, PracticalGroupNorm(child.num_features))
        else:
            with_group_norms(child)
    return model


def test_densenet():
    model = torchvision.models.DenseNet(
        growth_rate=4, block_config=(2, 1), num_init_features=8, bn_size=2
    )
    found = bound(with_group_norms(model), torch.randn(1, 3, 64, 64))
    block = "features.denseblock1.denselayer"
    assert len(found) == 1 + 2 * 3 + 1 + 1
    assert found["features.norm0"] == ("features.conv0", 3)
    assert found[f"{block}1.norm1"] == ("features.conv0", 3)
    assert found[f"{block}1.norm2"] == (f"{block}1.conv1", 8)
    assert found[f"{block}2.norm1"] == (f"features.conv0, {block}1.conv2", 3 + 8)
    assert found["features.transition1.norm"][1] == 3 + 8 + 8
    assert found["features.norm5"][1] == 16 + 8  # the transition's convolution, and one layer


@pytest.mark.parametrize("name", ["resnet26d", "res2net50_26w_4s"])
def test_timm(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = with_group_norms(timm.create_model(name))
    modules = dict(model.named_modules())
    found = bound(model, torch.empty(1, 3, 64, 64, device="meta"))
    assert len(found) > 25
    assert all(modules[layer].in_channels == n_in for layer, n_in in found.values())
    first = "conv1.6" if name == "resnet26d" else "conv1"  # the deep stem
    assert found["bn1"] == (first, modules[first].in_channels)
    if name == "res2net50_26w_4s":
        assert found["layer1.0.bns.2"] == ("layer1.0.convs.2", 26)


KINDS = ("conv", "act", "pool", "norm", "cat", "add", "gate", "setitem")


def random_program(draw):
    """Draw layers and steps; return a model of them and the expected n_in of each norm.

    A value is (tensor, channels, sources), with sources {number of the value a layer ran on:
    channels}; each layer runs once. Steps refer to values by their number.
    """
    steps, values, layers, expected = [], [(6, {})], {}, {}
    for index in range(draw(st.integers(2, 14))):
        kind = draw(st.sampled_from(["conv", *KINDS]))
        first = draw(st.integers(0, len(values) - 1))
        second = draw(st.integers(0, len(values) - 1))
        channels, sources = values[first]
        if kind == "conv":
            out = draw(st.sampled_from([4, 6, 8]))
            layers[f"l{index}"] = nn.Conv2d(channels, out, 1)
            values.append((out, {first: channels}))
        elif kind in ("cat", "add") and first != second and values[second][1] and sources:
            if kind == "add" and values[second][0] != channels:
                continue
            if kind == "cat" and sources.keys() & values[second][1]:
                continue  # a layer's output twice is no layer's output: an error, tested above
            total = channels + values[second][0] * (kind == "cat")
            values.append((total, {**sources, **values[second][1]}))
        elif kind == "norm" and sources:
            layers[f"l{index}"] = PracticalGroupNorm(channels)
            expected[f"l{index}"] = sum(sources.values())
            values.append((channels, sources))
        elif kind in ("act", "pool", "gate", "setitem") and sources:
            values.append((channels, sources))
        else:
            continue
        steps.append((kind, f"l{index}", first, second))
    order = draw(st.permutations(sorted(layers)))
    return steps, nn.ModuleDict({name: layers[name] for name in order}), expected


def run_program(steps, layers, x):
    values = [x]
    for kind, name, first, second in steps:
        value = values[first]
        if kind in ("conv", "norm"):
            value = layers[name](value)
        elif kind in ("act", "pool"):
            value = F.relu(value) if kind == "act" else F.avg_pool2d(value, 1)
        elif kind == "cat":
            value = torch.cat([value, values[second]], 1)
        elif kind == "add":
            value = value + values[second]
        elif kind == "gate":
            value = value * values[second].mean((1, 2, 3), keepdim=True)
        else:
            value = value.clone()
            value[:, :1] = value[:, 1:2]
        values.append(value)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_network_of_layers_joins_and_functions(data):
    steps, layers, expected = random_program(data.draw)
    model = Lambda(lambda m, x: run_program(steps, m, x), **layers)
    if not expected:
        return
    found = bound(model, torch.randn(2, 6, 3, 3))
    assert {name.removeprefix("layers."): n_in for name, (_, n_in) in found.items()} == expected


def test_table_is_read_off_the_norms_wherever_the_model_is():
    model = torchvision.models.resnet18(norm_layer=PracticalGroupNorm)
    table = bind_group_norms(model, rule="exact", gain_ratio=0.9)
    assert group_norm_bindings(model) == table
    assert group_norm_bindings(copy.deepcopy(model)) == table
    moved = group_norm_bindings(nn.ModuleDict({"net": model}))
    assert [(b.norm, b.producer) for b in moved] == [
        (f"net.{b.norm}", f"net.{b.producer}") for b in table
    ]
    (first, second) = group_norm_bindings(model.layer1[0])
    assert (first.norm, first.producer, second.producer) == ("bn1", "conv1", "conv2")
    model.bn1.num_groups = 4
    assert group_norm_bindings(model)[0].num_groups == 4


def test_ideal_number_of_groups_is_that_of_the_rule_that_ran():
    model = nn.Sequential(nn.Linear(256, 64), PracticalGroupNorm(64))
    (row,) = bind_group_norms(model)
    assert (row.rule, row.ideal_num_groups, row.num_groups) == ("paper", 48, 64)
    (row,) = bind_group_norms(model, rule="exact")
    assert (row.rule, row.ideal_num_groups, row.num_groups) == ("exact", 19.2, 16)
    with pytest.raises(ValueError, match=r"rule must be one of paper, exact, .* got rule='best'"):
        bind_group_norms(model, 8, rule="best")


def test_model_without_such_norms_is_warned_of():
    with pytest.warns(UserWarning, match=r"^ResNet has no PGN norm, .*dropped the norm_layer"):
        assert bind_group_norms(torchvision.models.resnet18()) == []


def test_error_names_type_position_and_remedy():
    with pytest.raises(ValueError, match="every PGN layer must follow a weight layer") as error:
        bind_group_norms(nn.Sequential(nn.ReLU(), PracticalGroupNorm(16)))
    text = str(error.value)
    assert "PracticalGroupNorm of 16 channels at '1' in Sequential (its siblings do not" in text
    assert "example_inputs" in text
    assert 'MODEL.PGN.IN_CHANNELS (("1", 256),)' in text


@pytest.fixture
def backbone():
    """Register a backbone that its modules misrepresent."""
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import BACKBONE_REGISTRY, Backbone

    class Misleading(Backbone):
        fails = False

        def __init__(self, cfg, input_shape):
            super().__init__()
            self.net = Before(8)
            self.out = nn.Conv2d(8, 64, 3, 4, 1)

        def output_shape(self):
            return {"res4": ShapeSpec(channels=64, stride=4)}

        def forward(self, x):
            if self.fails:
                raise NotImplementedError("not on the meta device")
            return {"res4": self.out(self.net(x))}

    BACKBONE_REGISTRY._do_register("Misleading", Misleading)
    yield Misleading
    del BACKBONE_REGISTRY._obj_map["Misleading"]


def test_build_model_runs_the_backbone(backbone):
    cfg = zoo_cfg("COCO-Detection/rpn_R_50_C4_1x.yaml")
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.DEVICE = "Misleading", "cpu"
    torch.manual_seed(0)
    model = build_model(cfg)
    state = torch.random.get_rng_state()
    assert [b.producer for b in group_norm_bindings(model)] == ["backbone.net.stem.0"]
    assert all(p.device.type == "cpu" for p in [*model.parameters(), *model.buffers()])
    backbone.fails = True
    torch.manual_seed(0)
    assert [b.producer for b in group_norm_bindings(build_model(cfg))] == ["backbone.net.conv"]
    assert torch.equal(torch.random.get_rng_state(), state)
