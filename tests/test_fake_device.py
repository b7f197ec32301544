"""Every tensor of a model is on the model's device, shown without one, by fake CUDA tensors.

Backbone, neck, heads and their norms, weight standardization, memory mode and mixed precision, for
every config. What depends on values runs in test_pretended_device.py.
"""

from pathlib import Path

import pytest
import torch

from gn_practical import PracticalGroupNorm, WSConv2d, build_model
from gn_practical.layers import fused_group_norm, recomputation, weight_standardization
from gn_practical.training.engine import load_cfg

pytest.importorskip("triton")  # whose kernels are looked at
import fake_cuda

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(set(CONFIGS.glob("**/*.yaml")) - set(CONFIGS.glob("sweeps/*.yaml")))
TINY = "quickstart/tiny.yaml"
MEMORY_MODE = ("MODEL.PGN.RECOMPUTE", "True")
FROZEN = ("MODEL.WS.ENABLED", "True", "MODEL.BACKBONE.FREEZE_AT", "2")


def build(name, *overrides):
    cfg = load_cfg(str(CONFIGS / name), ["MODEL.DEVICE", "meta", "MODEL.WEIGHTS", "", *overrides])
    with torch.device("meta"):
        return cfg, build_model(cfg).train()


def step(model, cfg, dtype=None):
    """Run forward and backward; every parameter that trains gets a gradient like itself."""
    fake_cuda.move(model)
    context = recomputation.recomputing() if cfg.MODEL.PGN.RECOMPUTE else torch.enable_grad()
    with context:
        loss = sum(fake_cuda.losses(model, cfg, dtype).values())
    gradients = fake_cuda.backward(loss)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in trained.items() if p not in gradients} == set()
    for parameter, gradient in gradients.items():
        assert gradient.device == parameter.device == fake_cuda.DEVICE
        assert (gradient.shape, gradient.dtype) == (parameter.shape, parameter.dtype)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_config_in_mixed_precision(path, monkeypatch):
    cfg, model = build(path.relative_to(CONFIGS))
    with fake_cuda.fake_cuda(monkeypatch) as launches:
        step(model, cfg, torch.bfloat16)
    norms = any(isinstance(module, PracticalGroupNorm) for module in model.modules())
    for kernel in ("_forward_groups", "_normalize", "_backward_groups", "_gradient"):
        assert (launches[kernel] > 0) == norms
    assert (launches["_standardize"] > 0) == cfg.MODEL.WS.ENABLED


@pytest.mark.parametrize(
    ("overrides", "eager"), [((), True), ((), False), (MEMORY_MODE, True), (FROZEN, True)]
)
def test_float32_and_what_is_off_by_default(overrides, eager, monkeypatch):
    """As the eager function and as the custom operator, which has no kernels here."""
    cfg, model = build(TINY, *overrides)
    with fake_cuda.fake_cuda(monkeypatch, eager) as launches:
        step(model, cfg)
        frozen = [m for m in model.modules() if isinstance(m, WSConv2d) and m._cache is not None]
        assert len(frozen) == (11 if overrides is FROZEN else 0)
    if overrides is MEMORY_MODE:  # outputs are computed again
        passes = launches["_forward_groups"] + launches["_normalize"]
        assert passes > launches["_backward_groups"] + launches["_gradient"]
    assert eager == (launches["_gradient"] > 0)


def on_cpu_statistics(monkeypatch):
    new = lambda x, groups: torch.empty((2, len(x), groups))  # noqa: E731
    monkeypatch.setattr(fused_group_norm, "_new_stats", new)


def on_cpu_kept_weight(monkeypatch):
    keep = weight_standardization._Cache
    cpu = lambda source, version, kept: keep(source, version, kept.cpu())  # noqa: E731
    monkeypatch.setattr(weight_standardization, "_Cache", cpu)


def on_cpu_recomputed(monkeypatch):
    compute = recomputation._Output.compute
    monkeypatch.setattr(recomputation._Output, "compute", lambda output: compute(output).cpu())


@pytest.mark.parametrize(
    ("plant", "overrides"),
    [(on_cpu_statistics, ()), (on_cpu_kept_weight, FROZEN), (on_cpu_recomputed, MEMORY_MODE)],
)
def test_a_tensor_of_the_cpu_is_found(plant, overrides, monkeypatch):
    cfg, model = build(TINY, *overrides)
    plant(monkeypatch)
    with (
        fake_cuda.fake_cuda(monkeypatch),
        pytest.raises(RuntimeError, match=r"on cpu|same device.* cpu"),
    ):
        step(model, cfg)
