"""Memory mode: the same gradients to the last bit, and fewer bytes alive after the forward pass."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.utils.events import EventStorage
from test_fusion import MODELS, batch, detectron2_config
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models import resnet18, resnet50

from gn_practical import PracticalGroupNorm, bind_group_norms, build_model
from gn_practical.layers.recomputation import LONGEST_CHAIN, recompute_outputs, recomputing
from gn_practical.modeling.fusion import fuse_norms


class Census(TorchDispatchMode):
    """Bytes of the tensors that were made under this mode and still live, each storage once."""

    def __init__(self, model):
        super().__init__()
        self.known = {p.untyped_storage()._cdata for p in model.parameters()}
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                s = t.untyped_storage()
                self.made[s._cdata] = (StorageWeakRef(s), s.nbytes())
        return result

    def alive(self):
        made = self.made.items()
        return sum(n for key, (ref, n) in made if key not in self.known and not ref.expired())


def stored_bytes(model, x):
    with Census(model) as census:
        loss = model(x).sum()
        alive = census.alive()
    loss.backward()
    return alive


def prepare(model, groups=0):
    """Bind and fuse; return it and its twin in memory mode."""
    torch.manual_seed(0)
    bind_group_norms(model, groups)
    for p in model.parameters():
        nn.init.normal_(p, 0.1, 0.3)
    fuse_norms(model)
    twin = copy.deepcopy(model)
    recompute_outputs(twin)
    recompute_outputs(twin)  # changes nothing
    assert len(twin._forward_pre_hooks) == len(twin._forward_hooks) == 1
    return model, twin


def chain(depth, channels=16):
    layers = [nn.Conv2d(3, channels, 3)]
    for _ in range(depth):
        layers += [PracticalGroupNorm(channels), nn.ReLU(), nn.Conv2d(channels, channels, 1)]
    return nn.Sequential(*layers)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_alike(plain, twin, run):
    wanted, result = run(plain), run(twin)
    assert torch.equal(wanted, result)
    wanted, result = gradients(plain, wanted), gradients(twin, result)
    assert wanted.keys() == result.keys()
    assert wanted
    for name, grad in wanted.items():
        assert torch.equal(result[name], grad), name


@pytest.mark.parametrize("groups", [0, 1, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_chain_stores_half_for_the_same_gradients(groups, dtype, layout):
    plain, twin = prepare(chain(12), groups)
    x = torch.randn(2, 3, 34, 34).contiguous(memory_format=layout)

    def run(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            return model(x).square().sum()

    check_alike(plain, twin, run)
    # The limit is 1/2: of x and y, y goes. Here the last output and the statistics come on top.
    assert 0.5 <= stored_bytes(twin, x) / stored_bytes(plain, x) <= 0.55


@pytest.mark.parametrize("build", [resnet18, resnet50])
def test_residual_blocks_store_little_more_than_half(build):
    model = build(norm_layer=PracticalGroupNorm)
    plain, twin = prepare(nn.Sequential(model.layer1, model.layer2, model.layer3))
    x = torch.randn(2, 64, 16, 16)
    check_alike(plain, twin, lambda model: model(x).square().sum())
    # Every x, and one output in each LONGEST_CHAIN + 1.
    assert 0.5 <= stored_bytes(twin, x) / stored_bytes(plain, x) <= 0.6


def test_chains_are_cut():
    """Otherwise the time of the backward pass would grow with the square of the depth."""
    norm = PracticalGroupNorm(4)
    norm.bind(4, 2)
    conv = nn.Conv2d(4, 4, 1)
    y = torch.randn(1, 4, 3, 3, requires_grad=True)
    blocks = 4 * (LONGEST_CHAIN + 1)
    with recomputing():
        for _ in range(blocks):
            y = norm(conv(y), y, relu=True)
        loss = y.square().sum()
    with torch.profiler.profile() as profile:
        loss.backward()
    calls = [e for e in profile.events() if e.name == "aten::native_group_norm"]
    # Of each chain the last output takes all before it, the one before it one fewer, and so on.
    assert len(calls) == 4 * LONGEST_CHAIN * (LONGEST_CHAIN + 1) // 2


class SeveralConsumers(nn.Module):
    """As in an FPN: a lateral, the next block, a view, and one that writes in place."""

    def __init__(self, write):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = PracticalGroupNorm(8)
        self.lateral, self.next = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1)
        self.linear = nn.Linear(8 * 36, 2)
        self.write = write

    def forward(self, x):
        x = self.conv(x)
        y = self.norm(x, x * 2, relu=True)
        outputs = [self.lateral(y), self.linear(y.flatten(1))[:, :, None, None]]
        if self.write:
            y = y * 1  # the ReLU's own output must not be written to: autograd needs it
            y += 1
        outputs.append(self.next(y.transpose(2, 3)[:, :, 1:]).tanh())
        return sum(o.square().mean() for o in outputs)


@pytest.mark.parametrize("write", [False, True])
def test_several_consumers_views_and_writes(write):
    model = SeveralConsumers(write)
    plain, twin = prepare(model)
    x = torch.randn(2, 3, 8, 8)
    check_alike(plain, twin, lambda model: model(x) + model(x * 2))  # used twice


def test_an_output_that_is_written_to_is_stored():
    """Without ReLU nothing needs the output itself, so a consumer may write to it."""
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    weight = torch.randn(4, 4, 1, 1, requires_grad=True)
    norm = PracticalGroupNorm(4)
    norm.bind(4, 2)

    def run():
        y = norm(x).mul_(3)
        return F.conv2d(y, weight).square().sum()

    wanted = torch.autograd.grad(run(), [x, weight])
    with recomputing():
        loss = run()
    for a, b in zip(torch.autograd.grad(loss, [x, weight]), wanted, strict=True):
        assert torch.equal(a, b)


def test_writing_to_what_the_gradient_needs_is_still_an_error():
    plain, twin = prepare(chain(2))
    for model in (plain, twin):
        loss = model(torch.randn(1, 3, 8, 8)).sum()
        with torch.no_grad():
            model[4].weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified"):
            loss.backward()
    loss = twin(torch.randn(1, 3, 8, 8)).sum()
    with torch.no_grad():
        twin[1].bias.add_(1)  # autograd alone does not need it
    with pytest.raises(RuntimeError, match="must not be modified in place, got version"):
        loss.backward()


def test_twice_through_one_graph_and_second_derivatives():
    plain, twin = prepare(chain(3))
    x = torch.randn(1, 3, 8, 8)

    def run(model):
        loss = model(x).square().sum()
        grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        return loss + sum(g.square().sum() for g in grads)

    check_alike(plain, twin, run)


def test_frozen_norms_and_stages():
    plain, twin = prepare(resnet18(norm_layer=PracticalGroupNorm))
    for model in (plain, twin):
        for name, p in model.named_parameters():
            p.requires_grad_(name.startswith(("layer2", "layer3", "fc")) and "bn" not in name)
    x = torch.randn(1, 3, 64, 64)
    check_alike(plain, twin, lambda model: model(x).square().sum())


def test_nothing_is_left_behind_without_gradients_or_after_an_error():
    plain, twin = prepare(chain(1))
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(twin(x), plain(x))
    with pytest.raises(RuntimeError):
        twin(torch.randn(1, 5, 8, 8))
    weight = torch.randn(3, requires_grad=True)
    product = weight * weight
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # autograd's own
        product.sum().backward()
    check_alike(plain.eval(), twin.eval(), lambda model: model(x).sum())


def test_copies_and_pickles_run():
    plain, twin = prepare(chain(2))
    x = torch.randn(1, 3, 8, 8)
    check_alike(plain, copy.deepcopy(twin), lambda model: model(x).sum())
    check_alike(plain, pickle.loads(pickle.dumps(twin)), lambda model: model(x).sum())


def test_distributed(tmp_path):
    plain, twin = prepare(chain(3))
    x = torch.randn(1, 3, 12, 12)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        check_alike(
            DistributedDataParallel(plain), DistributedDataParallel(twin), lambda m: m(x).sum()
        )
    finally:
        dist.destroy_process_group()


def test_switch_of_the_config():
    name, options, _ = MODELS["pfpn"]
    models = []
    for recompute in (False, True):
        torch.manual_seed(0)
        cfg = detectron2_config(name, **options, **{"MODEL.PGN.RECOMPUTE": recompute})
        models.append(build_model(cfg).train())
    plain, twin = models
    assert not plain._forward_pre_hooks
    assert not plain._forward_hooks
    assert list(plain.state_dict()) == list(twin.state_dict())

    def run(model):
        torch.manual_seed(0)
        with EventStorage():
            return sum(model(batch()).values())

    check_alike(plain, twin, run)
    with pytest.raises(ValueError, match=r"got 35 PGN norms and MODEL.PGN.FUSED=False"):
        build_model(
            detectron2_config(name, **{"MODEL.PGN.RECOMPUTE": True, "MODEL.PGN.FUSED": False})
        )
