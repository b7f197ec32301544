"""IN, LN1, SwitchNorm and FRN against their formulas in float64, and in detectors by config."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.solver import get_default_optimizer_params
from test_fusion import MODELS, detectron2_config, losses_and_gradients
from torch import nn
from torchvision.models import resnet18

from gn_practical import WSConv2d, build_model, convert_to_ws, fuse_norms
from gn_practical.layers.baselines import BASELINES, FilterResponseNorm, SwitchNorm

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4e-2}


def shape_of(parameter):
    return parameter.reshape(1, -1, 1, 1)


def group_norm(groups):
    def reference(norm, x, weight, bias):
        grouped = x.reshape(x.shape[0], groups or x.shape[1], -1)
        mean = grouped.mean(-1, keepdim=True)
        var = (grouped - mean).square().mean(-1, keepdim=True)
        y = ((grouped - mean) / (var + 1e-5).sqrt()).reshape(x.shape)
        return y * shape_of(weight) + shape_of(bias)

    return reference


def switch_norm(norm, x, weight, bias, mean_weight, var_weight):
    """Equations 3 to 5 of arXiv:1806.10779, each statistic from all of its values."""
    w = mean_weight.exp() / mean_weight.exp().sum()
    v = var_weight.exp() / var_weight.exp().sum()
    mean = var = 0
    for i, dims in enumerate([(2, 3), (1, 2, 3), (0, 2, 3)]):
        mu = x.mean(dims, keepdim=True)
        mean = mean + w[i] * mu
        var = var + v[i] * (x - mu).square().mean(dims, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * shape_of(weight) + shape_of(bias)


def filter_response_norm(norm, x, weight, bias, tau):
    """Equations 1, 3 and 5 of arXiv:1911.09737."""
    nu2 = x.square().sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3])
    y = x / (nu2 + 1e-6).sqrt() * shape_of(weight) + shape_of(bias)
    return torch.where(y > shape_of(tau), y, shape_of(tau))


REFERENCES = {
    "IN": group_norm(0),
    "LN1": group_norm(1),
    "SwitchNorm": switch_norm,
    "FRN": filter_response_norm,
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", BASELINES)
def test_equals_the_formula(name, dtype):
    torch.manual_seed(0)
    norm = get_norm(name, 6)
    options = {}
    if name == "FRN":
        norm.take_relu()
        options = {"relu": True}
    norm = norm.to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 0.5, 0.5)
    x = (torch.randn(3, 6, 5, 7, dtype=torch.float64) * 2 + 3).to(dtype).requires_grad_()
    upstream = torch.randn(x.shape, dtype=torch.float64).to(dtype)
    inputs = [x, *norm.parameters()]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    wanted = REFERENCES[name](norm, *doubles)
    wanted = (wanted, *torch.autograd.grad(wanted, doubles, upstream.double()))
    result = norm(x, **options)
    assert result.dtype is dtype
    result = (result, *torch.autograd.grad(result, inputs, upstream))
    for i, (a, b) in enumerate(zip(result, wanted, strict=True)):
        assert (a.double() - b).abs().max() <= TOLERANCE[dtype] * (1 + b.abs().max()), i


def test_switch_norm_follows_the_batch_and_uses_the_averages():
    norm, x = SwitchNorm(4), torch.randn(3, 4, 5, 5) * 2 + 1
    norm(x)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * var)
    norm.eval()
    averages = norm.running_mean.clone()
    together = norm(x)
    torch.testing.assert_close(together, torch.cat([norm(t) for t in x.split(1)]))
    assert torch.equal(norm.running_mean, averages)
    with torch.no_grad():  # of the batch alone
        norm.mean_weight.copy_(torch.tensor([-99.0, -99, 99]))
        norm.var_weight.copy_(norm.mean_weight)
    expected = F.batch_norm(x, norm.running_mean, norm.running_var)
    torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-5)


def test_switch_norm_survives_an_empty_batch():
    norm = SwitchNorm(4)
    norm(torch.empty(0, 4, 3, 3)).sum().backward()
    assert torch.equal(norm.running_mean, torch.zeros(4))
    assert not any(p.grad.any() for p in norm.parameters())  # and no NaN


@pytest.mark.parametrize("name", ["IN", "FRN"])
def test_a_single_value_a_channel_is_refused(name):
    with pytest.raises(ValueError, match=r"must hold more than one value.*\(2, 8, 1, 1\)"):
        get_norm(name, 8)(torch.randn(2, 8, 1, 1))


def relu_after_frn(block, x):
    """Detectron2's block by hand, each ReLU replaced by max(y, tau)."""

    def tlu(y, norm):
        return torch.maximum(y, norm.tau.view(1, -1, 1, 1))

    def conv_norm(conv, x):
        return conv.norm(F.conv2d(x, conv.weight, None, conv.stride, conv.padding))

    y = tlu(conv_norm(block.conv1, x), block.conv1.norm)
    y = conv_norm(block.conv2, y) + conv_norm(block.shortcut, x)
    return tlu(y, block.conv2.norm)


@pytest.mark.parametrize("watched", [False, True])
def test_tlu_stands_where_the_relu_stood(watched):
    torch.manual_seed(0)
    block = BasicBlock(3, 8, norm="FRN")
    x = torch.randn(2, 3, 6, 6)
    expected = block(x)
    paths = fuse_norms(block, required_only=True)
    assert paths == ["conv1.norm", "conv2.norm"] == fuse_norms(block)
    assert block.shortcut.norm.tau is None
    torch.testing.assert_close(block(x), expected)  # at 0 it is a ReLU
    for norm in (block.conv1.norm, block.conv2.norm):
        nn.init.uniform_(norm.tau, -1, 1)
    seen = []
    if watched:
        for module in (block.conv1, block.conv2.norm):
            module.register_forward_hook(lambda m, args, y: seen.append(y.clone()))
    torch.testing.assert_close(block(x), relu_after_frn(block, x))
    assert len(seen) == 3 * watched  # one of them by the reference
    block(x).square().sum().backward()
    assert all(p.grad is not None for p in block.parameters())


def test_tlu_in_sequences_and_convolutions_with_activation():
    sequence = nn.Sequential(nn.Conv2d(3, 8, 3), FilterResponseNorm(8), nn.ReLU())
    conv = Conv2d(3, 8, 3, norm=FilterResponseNorm(8), activation=F.relu)
    model = nn.ModuleList([sequence, conv])
    model[0][1].requires_grad_(False)
    assert fuse_norms(model) == ["0.1", "1.norm"]
    assert [model[0][1].tau.requires_grad, conv.norm.tau.requires_grad] == [False, True]
    with torch.no_grad():
        sequence[1].tau.fill_(0.3)
        conv.norm.tau.fill_(-0.3)
    x = torch.randn(2, 3, 8, 8)
    assert sequence(x).min().item() == pytest.approx(0.3)
    assert conv(x).min().item() == pytest.approx(-0.3)
    sequence[2].register_forward_hook(lambda m, args, y: y)
    assert sequence(x).min().item() == pytest.approx(0.3)


def test_relu_that_cannot_be_replaced_is_named(caplog):
    fuse_norms(resnet18(norm_layer=FilterResponseNorm))
    assert "plain ReLU in structures that are not known: ResNet." in caplog.text
    with pytest.raises(RuntimeError, match=r"got tau=None. Call gn_practical.fuse_norms"):
        FilterResponseNorm(8)(torch.randn(2, 8, 3, 3), relu=True)


@pytest.mark.parametrize("model", ["pfpn", "faster_rcnn"])
@pytest.mark.parametrize("name", BASELINES)
def test_detectors_train_by_config(name, model):
    config, options, _ = MODELS[model]
    keys = {f"MODEL.{k}.NORM": name for k in ("RESNETS", "FPN", "SEM_SEG_HEAD", "ROI_BOX_HEAD")}
    # The TLU of FRN must take the ReLU's place without being asked to.
    keys |= {"MODEL.RESNETS.RES2_OUT_CHANNELS": 64, "MODEL.FPN.OUT_CHANNELS": 32,
             "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32, "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
             "MODEL.ROI_BOX_HEAD.CONV_DIM": 32}  # fmt: skip
    torch.manual_seed(0)
    cfg = detectron2_config(config, **options, **keys, **{"MODEL.PGN.FUSED": name != "FRN"})
    model = build_model(cfg)
    norms = [m for m in model.modules() if type(m) is BASELINES[name]]
    optimizer = torch.optim.SGD(
        get_default_optimizer_params(model, weight_decay=1.0, weight_decay_norm=0.0), lr=1e-3
    )
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert not any(decay[p] for norm in norms for p in norm.parameters())
    losses, grads = losses_and_gradients(model, size=96)
    assert all(loss.isfinite() for loss in losses.values())
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n in names - grads.keys() if "mask" not in n} == set()
    optimizer.step()
    model.eval()
    if cfg.MODEL.WS.ENABLED:
        followed = [m for m in model.modules() if getattr(m, "norm", None) in norms]
        assert all(isinstance(conv, WSConv2d) for conv in followed)


@pytest.mark.parametrize("name", BASELINES)
def test_weight_standardization_sees_them(name):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), get_norm(name, 8), nn.ReLU())
    assert convert_to_ws(model) == ["0"]


@pytest.mark.parametrize("name", BASELINES)
def test_compiles_scripts_and_traces(name):
    norm, x = get_norm(name, 8).eval(), torch.randn(2, 8, 4, 5)
    if name == "FRN":
        norm.take_relu()
    expected = norm(x)
    torch.testing.assert_close(torch.jit.script(norm)(x), expected)
    torch.testing.assert_close(torch.jit.trace(norm, x)(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(norm)(x), expected)
    if name in ("SwitchNorm", "FRN"):  # the others run PGN's operator
        compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected)
