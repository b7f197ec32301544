"""The isometry audit against theory, by hand, on Detectron2's and torchvision's models."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.models import resnet18

from gn_practical import PracticalGroupNorm, bind_group_norms, build_model
from gn_practical.analysis.audit import audit_isometry
from gn_practical.analysis.audit_report import format_audit, save_audit
from gn_practical.analysis.blocks import choose_groups, find_unit_blocks
from gn_practical.analysis.channel_statistics import ChannelStatistics
from gn_practical.analysis.recorder import BlockRecorder, _inside
from gn_practical.training.engine import load_cfg
from gn_practical.training.engine.hooks import IsometryHook

ROOT = Path(__file__).parent.parent


def random_loss(model, batch):
    output = model(batch)
    return (output * torch.randn(output.shape)).sum()


class LinearBlocks(nn.Module):
    """Ten unit blocks n_in = 2 n_out in a chain; fresh features fill up the inputs."""

    def __init__(self, width):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(2 * width, width, bias=False), nn.GroupNorm(1, width), nn.ReLU()
            )
            for _ in range(10)
        )

    def forward(self, x):
        for block in self.blocks:
            x = block(torch.cat([x, torch.randn_like(x).relu()], 1))
        return x


def paper_loss(model, batch):
    """The paper's conditions: weights are drawn anew, and the loss is linear and random."""
    for block in model.blocks:
        nn.init.kaiming_normal_(block[0].weight)
    return random_loss(model, batch)


def small_conv_net():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(inplace=True)),
        *(nn.Conv2d(16, 8, 3, stride=2), nn.GroupNorm(2, 8)),
    )


def test_ten_linear_blocks_are_isometric_for_groups_of_four_only():
    # 1/s² of a group of four has an infinite variance: 1.5 million groups a block are needed for
    # a scatter of 2 %.
    torch.manual_seed(0)
    model, width = LinearBlocks(512), 512
    batches = [torch.randn(64, width).relu() for _ in range(160)]
    rows = audit_isometry(model, batches, paper_loss, groups=["practical"], seed=1)
    assert [row.num_groups for row in rows] == [128] * 10
    assert [row.K for row in rows] == pytest.approx([1] * 10, abs=0.05)
    rows = audit_isometry(model, batches[:8], paper_loss, groups=[32])
    assert [row.K for row in rows] == pytest.approx([0.5 * 14 / 13] * 10, rel=0.06)
    assert all(row.K_paper == 0.625 for row in rows)


def test_ratios_are_those_of_autograd():
    model, x = small_conv_net(), torch.randn(2, 3, 12, 12)
    (row, _) = audit_isometry(model, [x], random_loss, seed=3)
    torch.manual_seed(3)
    v = torch.randn(2, 8, 5, 5)
    u = x.clone().requires_grad_()
    conv = model[0](u)
    norm = model[1](conv)
    relu = F.relu(norm)
    loss = (model[4](model[3](relu)) * v).sum()
    squares = [g.square().mean().item() for g in torch.autograd.grad(loss, (u, conv, norm, relu))]
    assert squares[0] / squares[1] == pytest.approx(row.A, rel=1e-4)
    assert squares[1] / squares[2] == pytest.approx(row.B, rel=1e-4)
    assert squares[2] / squares[3] == pytest.approx(row.C, rel=1e-4)
    assert squares[0] / squares[3] == pytest.approx(row.K, rel=1e-4)


class Branches(nn.Module):
    """One tensor feeds two convolutions and a skip; the addition is in place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 8, 1), nn.GroupNorm(2, 8))
        self.left = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8))
        self.right = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(4, 8))

    def forward(self, x):
        x = F.relu_(self.first(x))
        self.right_gradient = 1e6 * self.right(x)  # must not be counted with left's
        y = self.left(x)
        y += x
        return F.relu_(y) + self.right_gradient


def test_gradient_at_a_shared_input_is_this_blocks_alone():
    torch.manual_seed(0)
    model = Branches()
    rows = {r.layer: r for r in audit_isometry(model, [torch.randn(2, 4, 8, 8)], random_loss)}
    assert rows["first.1"].activation == "relu"
    assert rows["left.1"].activation == "add"
    assert rows["right.1"].activation == ""
    assert rows["left.1"].C == rows["right.1"].C == 1
    assert rows["left.1"].K < 10  # against about 1e12 at the shared tensor
    assert rows["left.1"].parent == rows["right.1"].parent == "first.1"
    for row in rows.values():
        assert pytest.approx(row.K) == row.A * row.B * row.C
    assert rows["left.1"].product == pytest.approx(rows["first.1"].K * rows["left.1"].K)


@pytest.mark.parametrize("stride", [1, 2])
def test_prediction_holds_on_convolutions(stride):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(64, 64, 3, stride=stride, padding=1, bias=False), nn.GroupNorm(16, 64), nn.ReLU()
    )
    nn.init.kaiming_normal_(model[0].weight)
    (row,) = audit_isometry(model, [torch.randn(16, 64, 12, 12).relu()], random_loss)
    assert row.K_exact == pytest.approx(row.K, rel=0.1)
    assert row.K_paper == 2


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation"),
    [(5, 3, 1, 1, 1), (8, 5, 2, 2, 1), (8, 3, 2, 2, 2), (5, 1, 2, 0, 1), (8, 3, 1, 0, 2)],
)
def test_taps_inside_the_input(size, kernel, stride, padding, dilation):
    conv = nn.Conv2d(1, 1, kernel, stride, padding, dilation, bias=False)
    nn.init.ones_(conv.weight)
    taps = conv(torch.ones(1, 1, size, size)).detach()
    share = _inside(conv, (size, size))
    assert share == pytest.approx(taps.mean().item() / kernel**2)


def test_torchvision_resnet_and_frozen_weights():
    model = resnet18(norm_layer=PracticalGroupNorm)
    bind_group_norms(model)
    model.requires_grad_(False).fc.requires_grad_(True)
    rows = audit_isometry(
        model, [torch.randn(2, 3, 64, 64)], random_loss, ["practical", "instance"]
    )
    assert len(rows) == 2 * 20
    assert all(row.K and row.K_exact for row in rows)
    by_layer = {row.layer: row for row in rows[:20]}
    assert by_layer["layer2.0.bn2"].parent == "layer2.0.bn1"
    assert by_layer["layer2.0.downsample.1"].parent == "layer1.1.bn2"
    assert by_layer["layer4.1.bn2"].depth == 17
    assert [row.activation for row in rows[:3]] == ["relu", "relu", "add"]


def test_model_is_left_as_it_was():
    model = nn.Sequential(small_conv_net(), nn.BatchNorm2d(8))
    model[0][0].weight.grad = grad = torch.ones_like(model[0][0].weight)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    audit_isometry(
        model, [torch.randn(2, 3, 12, 12, generator=torch.Generator())], random_loss, [1, 2]
    )
    assert model[0][0].weight.grad is grad
    assert model[0][3].weight.grad is None
    assert model[0][1].num_groups == 4
    assert model[1].running_mean.abs().sum() == model[1].num_batches_tracked == 0
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_choices_run_the_same_random_numbers():
    model = small_conv_net()
    model[4].num_groups = 4
    rows = audit_isometry(model, [torch.randn(2, 3, 12, 12)], random_loss, ["model", 4])
    assert [row.num_groups for row in rows] == [4] * 4
    assert [row.K for row in rows[:2]] == [row.K for row in rows[2:]]


def test_model_without_norm_is_refused():
    with pytest.raises(ValueError, match=r"must have group norms, got none in Sequential"):
        audit_isometry(nn.Sequential(nn.Linear(4, 4)), [torch.randn(2, 4)])
    with pytest.raises(ValueError, match=r"must be bound, got 1 that are not, at 1\. Call"):
        find_unit_blocks(nn.Sequential(nn.Linear(4, 4), PracticalGroupNorm(4)))


def test_groups_that_do_not_divide_name_the_layers():
    model = small_conv_net()
    with pytest.raises(ValueError, match=r"got groups=16 for 4 \(8\)\. Choose"):
        audit_isometry(model, [torch.randn(2, 3, 12, 12)], random_loss, groups=[16])
    with pytest.raises(ValueError, match=r"groups must be .* got groups='pratical'"):
        choose_groups("pratical", find_unit_blocks(model))


def test_group_of_one_value_names_the_layer():
    model = nn.Sequential(nn.Linear(8, 4), nn.GroupNorm(1, 4))
    with pytest.raises(ValueError, match=r"more than one value.* at 1\. Choose fewer"):
        audit_isometry(model, [torch.randn(2, 8)], random_loss, groups=["instance"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activation_that_is_not_finite_names_the_layer(value):
    model = small_conv_net()
    model[3].weight.data[0] = value
    with pytest.raises(FloatingPointError, match=r"at the input of 4, which comes from 3\."):
        audit_isometry(model, [torch.randn(2, 3, 12, 12)], random_loss)
    assert not any(m._forward_hooks for m in model.modules())


def test_gradient_that_is_not_finite_names_the_layer():
    model = small_conv_net()
    with pytest.raises(FloatingPointError, match=r"at the output of the unit block 4\. Check"):
        audit_isometry(model, [torch.randn(2, 3, 12, 12)], lambda m, x: m(x).sum() * float("nan"))


def test_batch_without_gradient_is_refused():
    batch = torch.randn(2, 3, 12, 12)
    with pytest.raises(ValueError, match=r"with a gradient, got one that requires none from Seq"):
        audit_isometry(small_conv_net(), [batch], lambda m, x: m(x).detach().sum())
    with pytest.raises(ValueError, match=r"single number with a gradient, got \(2, 8, 5, 5\)"):
        audit_isometry(small_conv_net(), [batch])
    with pytest.raises(ValueError, match=r"at least one batch, got none"):
        audit_isometry(small_conv_net(), [])


def test_norm_without_a_known_producer_is_listed():
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.GroupNorm(2, 8)
            self.conv = nn.Conv2d(4, 8, 1)
            self.unused = nn.GroupNorm(2, 6)

        def forward(self, x):
            return F.gelu(self.norm(self.conv(x)))

    rows = audit_isometry(Loose(), [torch.randn(2, 4, 4, 4)], random_loss)
    assert [row.layer for row in rows] == ["norm", "unused"]
    assert rows[0].activation == "gelu"
    assert rows[0].B
    assert rows[0].C
    assert rows[0].A is rows[0].K is rows[0].K_paper is None
    assert rows[1].depth == 0
    assert rows[1].B is None
    with pytest.raises(ValueError, match=r"every norm must follow .* for norm, unused\."):
        audit_isometry(Loose(), [torch.randn(2, 4, 4, 4)], random_loss, ["practical"])


def test_block_of_a_norm_that_was_bound_by_a_run():
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(PracticalGroupNorm(8) for _ in range(2))
            self.convs = nn.ModuleList(nn.Conv2d(width, 8, 1) for width in (4, 8))

        def forward(self, x):
            first = self.norms[0](self.convs[0](x)).relu()
            return self.norms[1](first + self.convs[1](first)).relu()

    model, x = Loose(), torch.randn(2, 4, 6, 6)
    bind_group_norms(model, example_inputs=x)
    first, second = audit_isometry(model, [x], random_loss)
    assert (first.weight_layer, first.in_channels) == ("convs.0", 4)
    assert first.A
    assert first.K_exact
    assert (second.weight_layer, second.in_channels) == ("convs.0, convs.1", 12)
    assert second.A is second.K is None
    assert second.K_paper == 12 / 12


def test_diagnosis_of_channels():
    """Of four channels one is dead, one always on, and the last two are each other's mirror."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 1, 8, 8, generator=generator)
    base = pixels * torch.tensor([1.0, 1.0, 1.0, -1.0]).view(1, 4, 1, 1)
    norm = nn.GroupNorm(4, 4)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([-9.0, 9.0, 0.0, 0.0]))
    model = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), norm, nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4)[..., None, None])
    (row,) = audit_isometry(model, [base, base], random_loss)
    assert (row.dead, row.always_on) == (0.25, 0.25)
    assert row.effective_rank == pytest.approx(1, abs=0.1)  # one pattern in all four
    common = base.mean(dim=(2, 3)).square().mean() / base.square().mean()
    assert row.shared == pytest.approx(common.item(), rel=1e-5)


def test_effective_rank_is_that_of_the_covariance():
    statistics = ChannelStatistics()
    values = torch.randn(4, 6, 300, generator=torch.Generator().manual_seed(0)) + 5
    values[:, 4:] *= 10
    statistics.add(values[:2])
    statistics.add(values[2:])
    rows = values.movedim(1, -1).reshape(-1, 6)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(rows.T.double()))
    expected = eigenvalues.sum() ** 2 / eigenvalues.square().sum()
    assert statistics.effective_rank() == pytest.approx(expected.item(), rel=0.05)
    constant = ChannelStatistics()
    constant.add(torch.ones(2, 3, 4))
    assert constant.effective_rank() is None
    assert ChannelStatistics().dead() is None


def test_text_fits_into_a_screen(tmp_path):
    model = nn.Sequential(small_conv_net())
    for _ in range(4):
        model = nn.ModuleDict({"a_rather_long_name": model})
    net = model.a_rather_long_name.a_rather_long_name.a_rather_long_name.a_rather_long_name
    rows = audit_isometry(
        model, [torch.randn(2, 3, 12, 12)], lambda m, x: random_loss(net, x), ["instance", 1]
    )
    text = save_audit(rows, tmp_path, {})
    assert max(map(len, text.splitlines())) == 120
    assert "…" in text
    header = (tmp_path / "audit.csv").read_text().splitlines()[0].split(",")
    assert {"A", "B", "C", "gradient", "parent", "product_exact"} <= set(header)


def test_picture_names_config_and_weights(tmp_path, monkeypatch):
    rows = audit_isometry(small_conv_net(), [torch.randn(2, 3, 12, 12)], random_loss)
    titles = []
    monkeypatch.setattr("matplotlib.figure.Figure.suptitle", lambda *a, **_: titles.append(a[1]))
    save_audit(rows, tmp_path, {"config_file": "configs/pfpn_pgn.yaml", "weights": "a/b.pth"})
    save_audit(rows, tmp_path, {"config_file": "configs/pfpn_pgn.yaml", "weights": ""})
    assert [title.splitlines()[0] for title in titles] == [
        "pfpn_pgn, weights: a/b.pth",
        "pfpn_pgn, weights: random",
    ]


def test_report_files(tmp_path):
    rows = audit_isometry(small_conv_net(), [torch.randn(2, 3, 12, 12)], random_loss, ["model", 1])
    text = save_audit(rows, tmp_path / "audit", {"seed": 0})
    assert text == format_audit(rows) == (tmp_path / "audit/audit.txt").read_text()
    assert "groups: model, 2 unit blocks" in text
    content = json.loads((tmp_path / "audit/audit.json").read_text())
    assert content["seed"] == 0
    assert [b["K"] for b in content["blocks"]] == [row.K for row in rows]
    assert len((tmp_path / "audit/audit.csv").read_text().splitlines()) == 5
    assert (tmp_path / "audit/audit.png").stat().st_size > 10_000


class Losses(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small_conv_net()

    def forward(self, batch):
        return {"loss": self.net(batch).square().mean()}


def test_training_hook_logs_every_period_and_detaches():
    from detectron2.engine import SimpleTrainer

    model = Losses()
    trainer = SimpleTrainer(
        model, [torch.randn(2, 3, 12, 12)] * 9, torch.optim.SGD(model.parameters(), 0.1)
    )
    seen = []

    class Watch(IsometryHook):
        def before_step(self):
            super().before_step()
            seen.append(len(model.net[1]._forward_hooks))

    trainer.register_hooks([Watch(period=3)])
    trainer.train(0, 7)
    assert seen == [0, 0, 1, 0, 0, 1, 0]
    assert not model.net[1]._forward_hooks
    history = trainer.storage.history("isometry/K/net.1").values()
    assert [iteration for _, iteration in history] == [2, 5]
    assert all(value > 0 for value, _ in history)
    with pytest.raises(ValueError, match=r"period must be a positive integer, got period=0"):
        IsometryHook(0)


def test_recorder_does_not_change_the_gradient():
    model, batch = Branches(), torch.randn(2, 4, 8, 8)
    model(batch).square().mean().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with BlockRecorder(model):
        model(batch).square().mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))


TINY = [
    *("MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", "18"),
    "MODEL.RESNETS.RES2_OUT_CHANNELS",
    "64",
    *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.SEM_SEG_HEAD.CONVS_DIM", "32"),
    *("MODEL.ROI_BOX_HEAD.CONV_DIM", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "32", "MODEL.RPN.CONV_DIMS", "[32]"),
]


@pytest.fixture
def tool(monkeypatch):
    """Run the tool in this process: importing Detectron2 anew takes seconds."""

    def run(config, *arguments):
        path = str(ROOT / "tools/audit_isometry.py")
        small = ["--synthetic", "--image-size", "64", "--num-batches", "1"]
        monkeypatch.setattr(sys, "argv", [path, "--config-file", config, *small, *arguments, *TINY])
        runpy.run_path(path, run_name="__main__")

    return run


@pytest.mark.parametrize("name", ["pfpn_pgn_all", "faster_rcnn_gn_ws_pgn"])
def test_tool_lists_every_norm(name, tool, tmp_path):
    config = str(ROOT / f"configs/{name}.yaml")
    with pytest.raises(SystemExit) as end:
        tool(config, "--groups", "model", "32", "OUTPUT_DIR", str(tmp_path))
    assert end.value.code is None
    blocks = json.loads((tmp_path / "audit/audit.json").read_text())["blocks"]
    norms = find_unit_blocks(build_model(load_cfg(config, TINY)))
    assert len(blocks) == 2 * len(norms) > 50
    assert all(block["K"] and block["K_exact"] for block in blocks)
    chains = {block["layer"]: block["parent"] for block in blocks}
    assert chains["roi_heads.box_head.conv2.norm"] == "roi_heads.box_head.conv1.norm"
    assert chains["roi_heads.box_head.conv1.norm"].startswith("backbone.fpn_output")


def test_tool_names_the_layers_of_groups_that_do_not_divide(tool):
    with pytest.raises(SystemExit, match=r"^error: groups must divide .* groups=64 for backbone\."):
        tool(str(ROOT / "configs/pfpn_pgn_all.yaml"), "--groups", "64")


def test_recorder_inside_event_storage_of_a_trainer():
    with EventStorage(5) as storage:
        audit_isometry(small_conv_net(), [torch.randn(2, 3, 12, 12)], random_loss)
        assert storage.iter == 5
