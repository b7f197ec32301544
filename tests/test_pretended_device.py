"""A whole run on a device that is not the CPU: training, evaluation, pictures, checkpoint, resume.

PyTorch's device for other hardware is given to tensors that wrap those of the CPU, see
pretended_device.py: a tensor left on the CPU raises, and what the host waits for is known. Once a
process has such a device it keeps it, so these tests run in a process of their own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pretended_device
import pytest
import torch
from torch import nn

from gn_practical.layers import PracticalGroupNorm, recomputation

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "configs/quickstart/tiny.yaml")
APART = os.environ.get("PRETENDED_DEVICE") == "1"
pretended = pytest.mark.skipif(not APART, reason="runs with PRETENDED_DEVICE=1")


@pytest.mark.skipif(APART, reason="this is that process")
@pytest.mark.skipif(not pretended_device.SUPPORTED, reason="this PyTorch takes no such device")
def test_in_a_process_of_its_own():
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "PRETENDED_DEVICE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


@pytest.fixture(scope="module", autouse=True)
def device():
    """Make the device known, and few scenes."""
    if not APART:
        return
    from gn_practical.training.checkpoint import snapshot
    from gn_practical.training.data import scenes

    pretended_device.register()
    scenes.NUM_IMAGES = {"train": 6, "val": 3}
    # Its tensors have no memory of their own that could be copied as one piece.
    plain = snapshot._is_plain
    snapshot._is_plain = lambda t: not isinstance(t, pretended_device.Pretended) and plain(t)


def train(output, device, *overrides, flags=()):
    from tool_train_net import run

    pretended_device.WAITS.clear()
    fixed = (
        "DATALOADER.NUM_WORKERS",
        0,
        "SEED",
        7,
        "SOLVER.LR_SCHEDULER_NAME",
        "WarmupMultiStepLR",
    )
    where = ("MODEL.DEVICE", device, "OUTPUT_DIR", output)
    run("--config-file", TINY, *flags, *where, *fixed, *overrides)
    model = torch.load(output / "model_final.pth", weights_only=True)["model"]
    assert all(t.isfinite().all() for t in model.values() if t.is_floating_point())
    return model


ONE_STEP = ("SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()")


@pretended
def test_a_run_is_that_of_the_cpu(tmp_path):
    """With evaluation and pictures; it waits once in a step, to know if gradients are finite."""
    on_device, on_cpu = tmp_path / "pretended", tmp_path / "cpu"
    two_steps = ("SOLVER.MAX_ITER", 2, "TEST.NUM_PICTURES", 1)
    model = train(on_device, "pretended", *two_steps)
    training = "gn_practical/training/"
    ours = {
        (name, path): count
        for (name, path), count in pretended_device.WAITS.items()
        if path.startswith("gn_practical/") and not path.startswith(f"{training}evaluation/")
    }
    assert ours.pop(("_to_copy", f"{training}checkpoint/snapshot.py")) > 100
    assert ours == {("_local_scalar_dense", f"{training}checkpoint/finite_weights.py"): 2}

    for name, weight in train(on_cpu, "cpu", *two_steps).items():
        torch.testing.assert_close(model[name], weight, rtol=1e-3, atol=1e-5)
    results = [json.loads((d / "results.json").read_text()) for d in (on_device, on_cpu)]
    assert results[0].keys() == results[1].keys() >= {"panoptic_seg", "bbox", "segm", "sem_seg"}
    for task in results[0]:
        assert results[0][task] == pytest.approx(results[1][task], abs=0.1, nan_ok=True)
    assert len(list(on_device.glob("pictures/**/*.png"))) == 1

    train(on_device, "pretended", "SOLVER.MAX_ITER", 3, "DATASETS.TEST", "()", flags=["--resume"])
    assert torch.load(on_device / "model_final.pth", weights_only=True)["iteration"] == 2


@pretended
def test_options_together(tmp_path):
    """Faster R-CNN, mixed precision, memory mode, batches in parts, frozen weights, the audit."""
    train(
        *(tmp_path, "pretended", *ONE_STEP, "DATASETS.TRAIN", "('scenes_train',)"),
        *("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.MASK_ON", False),
        *("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"),
        *("MODEL.PGN.RECOMPUTE", True, "SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.AUDIT_PERIOD", 1),
        *("MODEL.WS.ENABLED", True, "MODEL.BACKBONE.FREEZE_AT", 2),
    )


@pretended
def test_a_bad_step_leaves_no_trace(tmp_path, monkeypatch):
    from gn_practical.training.engine.autocast import AutocastTrainer

    losses = AutocastTrainer._losses
    spoil = lambda self, data: {k: v * torch.nan for k, v in losses(self, data).items()}  # noqa: E731
    monkeypatch.setattr(AutocastTrainer, "_losses", spoil)
    train(tmp_path, "pretended", "SOLVER.MAX_SKIPPED_STEPS", 5, *ONE_STEP)
    assert len((tmp_path / "bad_steps.json").read_text().splitlines()) == 1


@pretended
def test_distributed_data_parallel(tmp_path):
    """Its buckets, hooks and copies are on the device too; gloo moves their values."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        norm = PracticalGroupNorm(8)
        norm.bind(in_channels=4, num_groups=2)
        model = nn.Sequential(nn.Conv2d(4, 8, 3), norm, nn.Conv2d(8, 2, 3)).to("pretended")
        wrapped = nn.parallel.DistributedDataParallel(model)
        recomputation.recompute_outputs(wrapped)
        wrapped(torch.randn(2, 4, 8, 8, device="pretended")).square().sum().backward()
        assert all(p.grad.device == p.device for p in model.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pretended
def test_a_tensor_of_the_cpu_is_found(tmp_path, monkeypatch):
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

    forward = DefaultAnchorGenerator.forward
    on_cpu = lambda self, features: [b.to("cpu") for b in forward(self, features)]  # noqa: E731
    monkeypatch.setattr(DefaultAnchorGenerator, "forward", on_cpu)
    with pytest.raises(SystemExit, match="tensors of one device, got one of the CPU"):
        train(tmp_path, "pretended", *ONE_STEP)
