"""Gradients added up over parts of a batch are those of the batch, once for all ranks."""

import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from gn_practical import build_model
from gn_practical.training import add_training_config
from gn_practical.training.config.load import load_cfg
from gn_practical.training.engine.accumulation import (
    backward_in_parts,
    check_accumulation,
    scaling_world_size,
    split_batch,
)
from gn_practical.training.engine.autocast import AutocastTrainer
from gn_practical.training.engine.bad_steps import BadSteps
from gn_practical.training.engine.hooks import IsometryHook
from gn_practical.training.engine.trainer import Trainer

ROOT = Path(__file__).parent.parent


class Toy(nn.Module):
    """Two losses, each a mean over images, of a network with group norms."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3), nn.GroupNorm(1, 8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2)),
        )
        self.sizes = []

    def forward(self, data):
        self.sizes.append(len(data))
        dtype = self.layers[0].weight.dtype
        first, second = self.layers(torch.stack([x["image"] for x in data]).to(dtype)).unbind(1)
        losses = {"loss_a": first.square().mean(), "loss_b": second.square().mean()}
        if any("fault" in sample for sample in data):
            losses["loss_b"] = losses["loss_b"] + torch.inf
        return losses


def samples(number=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randn(number, 3, 6, 6, generator=generator) + 1
    return [{"image": x, "image_id": i, "file_name": f"{i}.jpg"} for i, x in enumerate(pictures)]


def trainer_of(steps, data=None, dtype=torch.float32, **arguments):
    torch.manual_seed(0)
    model = Toy().to(dtype)
    data = data or [samples(seed=i) for i in range(6)]
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return AutocastTrainer(model, data, sgd, accumulate_steps=steps, **arguments)


def train(trainer, number):
    with EventStorage() as storage:
        for trainer.iter in range(number):
            storage.iter = trainer.iter
            trainer.run_step()
    return storage


def gradients(model, data, steps):
    model.zero_grad()
    losses = backward_in_parts(model, data, steps, model, torch.Tensor.backward)
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return flat.clone(), losses


def assert_close(parts, whole, tolerance):
    assert (parts - whole).norm() <= tolerance * whole.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("steps", [2, 4, 16])
def test_parts_have_the_gradients_of_the_batch(dtype, tolerance, steps):
    torch.manual_seed(0)
    model = Toy().to(dtype)
    whole, losses = gradients(model, samples(), 1)
    parts, means = gradients(model, samples(), steps)
    assert_close(parts, whole, tolerance)
    assert model.sizes == [16, *[16 // steps] * steps]
    for name, loss in losses.items():
        torch.testing.assert_close(means[name], loss.detach(), rtol=tolerance, atol=0)


def test_batch_norms_are_another_matter():
    """The test above can fail: with statistics of the batch the gradients differ."""
    model = Toy().double()
    model.layers[1] = nn.BatchNorm2d(8).double()
    whole, _ = gradients(model, samples(), 1)
    parts, _ = gradients(model, samples(), 4)
    assert (parts - whole).norm() > 0.01 * whole.norm()


class FixedSamples(nn.Module):
    """A Panoptic FPN that samples nothing at random: it takes all anchors and all proposals."""

    def __init__(self, losses=""):
        super().__init__()
        overrides = ["MODEL.DEVICE", "cpu", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "100000"]
        overrides += ["MODEL.RPN.POSITIVE_FRACTION", "1.0", "MODEL.ROI_HEADS.POSITIVE_FRACTION"]
        overrides += ["1.0", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "1000"]
        torch.manual_seed(0)
        self.model = build_model(load_cfg(str(ROOT / "configs/quickstart/tiny.yaml"), overrides))
        self.model.double().train()
        self.losses = losses

    def forward(self, data):
        losses = self.model(data)
        return {name: loss for name, loss in losses.items() if self.losses in name}


def picture(number):
    generator = torch.Generator().manual_seed(number)
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 5 + number : 30, 8:40], masks[1, 36:60, 20 : 50 + number] = True, True
    instances = Instances((64, 64), gt_classes=torch.tensor([number % 5, 1]))
    instances.gt_boxes = Boxes(BitMasks(masks).get_bounding_boxes().tensor.double())
    instances.gt_masks = BitMasks(masks)
    sem_seg = torch.randint(5, (64, 64), generator=generator)
    image = torch.randint(256, (3, 64, 64), generator=generator).byte()
    return {"image": image, "instances": instances, "sem_seg": sem_seg, "height": 64, "width": 64}


@pytest.mark.parametrize(
    ("losses", "numbers", "tolerance"),
    [
        ("", [0, 1, 2, 3, 3, 2, 1, 0], 1e-9),  # all losses; the parts have equal counts
        ("loss_rpn", [0, 1, 2, 3, 4, 5, 6, 7], 1e-9),  # constant counts, any pictures
        ("loss_sem_seg", [0, 1, 2, 3, 4, 5, 6, 7], 1e-9),  # equal numbers of pixels
    ],
)
def test_a_detector_s_parts_have_the_gradients_of_the_batch(
    losses, numbers, tolerance, monkeypatch
):
    nms = proposal_utils.batched_nms  # takes boxes as float32, whatever the scores are
    monkeypatch.setattr(
        proposal_utils,
        "batched_nms",
        lambda boxes, scores, *rest: nms(boxes, scores.float(), *rest),
    )
    model = FixedSamples(losses)
    data = [picture(number) for number in numbers]
    with EventStorage():
        whole, first = gradients(model, data, 1)
        parts, second = gradients(model, data, 2)
    assert len(first) == {"": 6, "loss_rpn": 2, "loss_sem_seg": 1}[losses]
    assert first.keys() == second.keys()
    assert whole.norm() > 0
    assert_close(parts, whole, tolerance)


# Training ----------------------------------------------------------------------------------------


def test_training_in_parts_is_training():
    whole, parts = trainer_of(1, dtype=torch.float64), trainer_of(4, dtype=torch.float64)
    logged = [train(trainer, 6).latest()["total_loss"] for trainer in (whole, parts)]
    assert logged[1][0] == pytest.approx(logged[0][0], rel=1e-6)
    assert logged[1][1] == 5  # an iteration is an optimizer step
    for first, second in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-12)
    assert parts.model.sizes == [4] * 24


def test_nothing_of_a_step_with_a_bad_part_stays():
    data = [samples(seed=i) for i in range(3)]
    data[1][13]["fault"] = True  # in the last of four parts
    trainer = trainer_of(4, deepcopy(data), bad_steps=BadSteps(max_skipped=1))
    sound = trainer_of(4, [data[0], data[2]])
    storage = train(trainer, 3)
    train(sound, 2)
    assert storage.latest()["skipped_steps"][0] == 1
    for first, second in zip(trainer.model.parameters(), sound.model.parameters(), strict=True):
        assert torch.equal(first, second)
    data[2][0]["fault"] = True  # in the first
    with pytest.raises(FloatingPointError, match=r"got loss_b=inf at iteration=2 on 0\.jpg.*15"):
        train(trainer_of(4, data, bad_steps=BadSteps(max_skipped=1)), 3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision(dtype):
    whole, parts = (trainer_of(n) for n in (1, 4))
    for trainer in (whole, parts):
        trainer.dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
        trainer.grad_scaler = torch.amp.GradScaler("cpu", 2.0**10, enabled=dtype == "float16")
        train(trainer, 4)
    assert parts.grad_scaler.state_dict() == whole.grad_scaler.state_dict()
    for first, second in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=0.05, atol=0.02)


def test_the_audit_sees_all_parts():
    ratios = []
    for steps in (1, 4):
        trainer, hook = trainer_of(steps, dtype=torch.float64), IsometryHook(1)
        trainer.register_hooks([hook])
        with EventStorage() as storage:
            trainer.iter = 0
            hook.before_step()
            trainer.run_step()
            hook.after_step()
        ratios.append({k: v[0] for k, v in storage.latest().items() if k.startswith("isometry")})
    assert len(ratios[0]) == 2 * 8
    assert ratios[1] == pytest.approx(ratios[0], rel=1e-6)


RANKS = """
import sys
sys.path.insert(0, "tests")
import torch
from detectron2.utils import comm
from torch import distributed, multiprocessing
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from test_accumulation import samples, train, trainer_of

def main(rank, folder):
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    data = [samples(seed=i) for i in range(3)]
    trainer = trainer_of(4, [b[8 * rank : 8 * rank + 8] for b in data], dtype=torch.float64)
    exchanges = []

    def count(group, bucket):
        exchanges.append(bucket.index())
        return allreduce_hook(group, bucket)

    trainer.model = DistributedDataParallel(trainer.model, broadcast_buffers=False)
    trainer.model.register_comm_hook(distributed.group.WORLD, count)
    train(trainer, 3)
    assert exchanges == [0, 0, 0], exchanges
    alone = trainer_of(1, data, dtype=torch.float64)
    train_alone(alone)
    for mine, expected in zip(trainer.model.parameters(), alone.model.parameters()):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)
    open(f"{folder}/passed{rank}", "w").close()

def train_alone(trainer):
    for data in trainer.data_loader:
        trainer.optimizer.zero_grad()
        sum(trainer.model(data).values()).backward()
        trainer.optimizer.step()

if __name__ == "__main__":
    torch.set_num_threads(1)
    multiprocessing.start_processes(main, sys.argv[1:], nprocs=2, start_method="fork")
"""


def test_two_ranks_exchange_gradients_once_a_step(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"passed0", "passed1"} <= set(os.listdir(tmp_path))


# The config --------------------------------------------------------------------------------------


def config(**solver):
    cfg = get_cfg()
    add_training_config(cfg)
    cfg.SOLVER.update(solver)
    return cfg


def test_a_part_counts_as_a_rank_of_the_recipe():
    cfg = config(ACCUMULATE_STEPS=8, REFERENCE_WORLD_SIZE=8, IMS_PER_BATCH=16, BASE_LR=0.02)
    assert Trainer.auto_scale_workers(cfg, scaling_world_size(cfg)) == cfg
    cfg.SOLVER.ACCUMULATE_STEPS = 2
    scaled = Trainer.auto_scale_workers(cfg, scaling_world_size(cfg)).SOLVER
    assert (scaled.IMS_PER_BATCH, scaled.BASE_LR) == (4, 0.005)
    check_accumulation(config(IMS_PER_BATCH=16, ACCUMULATE_STEPS=4))


@pytest.mark.parametrize(
    ("batch", "steps", "message"),
    [
        (16, 0, "SOLVER.ACCUMULATE_STEPS must be 1 or more, got SOLVER.ACCUMULATE_STEPS=0"),
        (16, 3, "must be a multiple of the ranks times .*IMS_PER_BATCH=16 for 1 x 3"),
        (2, 4, "must be a multiple of the ranks times .*IMS_PER_BATCH=2 for 1 x 4"),
    ],
)
def test_batches_without_equal_parts_are_refused(batch, steps, message):
    with pytest.raises(ValueError, match=message):
        check_accumulation(config(IMS_PER_BATCH=batch, ACCUMULATE_STEPS=steps))


@pytest.mark.parametrize("number", [0, 2, 5])
def test_a_short_batch_is_refused(number):
    with pytest.raises(ValueError, match=rf"got {number} images and .*=4"):
        split_batch(samples(number), 4)
