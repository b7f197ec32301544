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


def train(output, device, *overrides):
    from tool_train_net import run

    pretended_device.WAITS.clear()
    fixed = ("SOLVER.MAX_ITER", 2, "DATALOADER.NUM_WORKERS", 0, "SEED", 7)
    run("--config-file", TINY, "MODEL.DEVICE", device, "OUTPUT_DIR", output, *fixed, *overrides)
    lines = (output / "metrics.json").read_text().splitlines()
    return [json.loads(line)["total_loss"] for line in lines if "total_loss" in line]


def waits():
    """Places of this project at which the host waits."""
    return {place for _, place in pretended_device.WAITS if "gn_practical" in place}


@pretended
def test_a_run_with_evaluation_and_pictures_is_that_of_the_cpu(tmp_path):
    losses = train(tmp_path / "pretended", "pretended", "TEST.NUM_PICTURES", 1)
    assert losses == pytest.approx(train(tmp_path / "cpu", "cpu", "DATASETS.TEST", "()"), rel=1e-4)
