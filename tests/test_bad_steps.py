"""Steps whose loss or gradient is not finite: nothing of them stays, and all ranks decide alike."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import SimpleTrainer
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils.events import EventStorage
from torch import nn

from gn_practical.training.checkpoint.finite_weights import require_finite_weights
from gn_practical.training.engine.autocast import AutocastTrainer
from gn_practical.training.engine.bad_steps import BadSteps

ROOT = Path(__file__).parent.parent


class Toy(nn.Module):
    """Losses of a small network; a sample's "fault" is a function that spoils them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, data):
        first, second = self.layers(torch.stack([sample["x"] for sample in data])).unbind(1)
        losses = {"loss_a": first.square().mean(), "loss_b": second.square().mean()}
        for sample in data:
            losses["loss_b"] = sample.get("fault", lambda loss: loss)(losses["loss_b"])
        return losses


FAULTS = {
    "loss is nan": lambda loss: loss * torch.nan,
    "loss is inf, its gradient finite": lambda loss: loss + torch.inf,
    "loss is finite, its gradient nan": lambda loss: loss + (loss * 0).sqrt(),
    "loss is finite, its gradient inf": lambda loss: loss + Steep.apply(loss),
}


class Steep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.inf


def batches(faults=(), count=8):
    """Batch number i has the fault faults[i]."""
    faults = dict(faults)
    generator = torch.Generator().manual_seed(1)
    for index in range(count):
        batch = [
            {"x": torch.randn(4, generator=generator), "image_id": 2 * index + k,
             "file_name": f"{2 * index + k}.jpg"}
            for k in range(2)
        ]  # fmt: skip
        if index in faults:
            batch[0]["fault"] = FAULTS[faults[index]]
        yield batch


def trainer_of(data, kind=AutocastTrainer, clip=False, **arguments):
    torch.manual_seed(0)
    model = Toy()
    cfg = get_cfg()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = clip
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    make = maybe_add_gradient_clipping(cfg, torch.optim.SGD)
    return kind(model, data, make(model.parameters(), lr=0.1, momentum=0.9), **arguments)


def train(trainer, steps):
    with EventStorage() as storage:
        for trainer.iter in range(steps):
            storage.iter = trainer.iter
            trainer.run_step()
    return storage


def state_of(trainer):
    return deepcopy((trainer.model.state_dict(), trainer.optimizer.state_dict()["state"]))


def kept(folder):
    return [json.loads(line) for line in (folder / "bad_steps.json").read_text().splitlines()]


def assert_same(first, second):
    (weights, momentum), (other_weights, other_momentum) = first, second
    for name in weights:
        if "num_batches" not in name:
            assert torch.equal(weights[name], other_weights[name]), name
    for key in momentum:
        buffers = (m[key]["momentum_buffer"] for m in (momentum, other_momentum))
        assert torch.equal(*buffers)


def test_sound_steps_are_those_of_detectron2():
    ours, theirs = trainer_of(batches()), trainer_of(batches(), SimpleTrainer)
    train(ours, 8)
    train(theirs, 8)
    assert_same(state_of(ours), state_of(theirs))


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_of_a_bad_step_stays(fault, clip):
    """As if the batch had never been: weights, momentum and running statistics."""
    trainer = trainer_of(batches({3: fault}), clip=clip, bad_steps=BadSteps(max_skipped=1))
    storage = train(trainer, 8)
    sound = trainer_of((b for i, b in enumerate(batches()) if i != 3), clip=clip)
    train(sound, 7)
    assert_same(state_of(trainer), state_of(sound))
    assert storage.latest()["skipped_steps"] == (1, 7)
    assert trainer.state_dict()["skipped_steps"] == 1


@pytest.mark.parametrize("fault", FAULTS)
def test_stop_names_what_led_to_it_and_keeps_it(fault, tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    trainer = trainer_of(batches({2: fault}), bad_steps=BadSteps(str(tmp_path)))
    train(trainer, 2)
    before = state_of(trainer)[1]
    what = "loss_b=(nan|inf)" if "finite," not in fault else "the gradient of layers.0.weight"
    message = rf"got {what}.* at iteration=0 on 4\.jpg, 5\.jpg\. .*model_0000001\.pth"
    with pytest.raises(FloatingPointError, match=message) as error:
        train(trainer, 1)
    assert "\n" not in str(error.value)
    for key, value in before.items():
        assert torch.equal(value["momentum_buffer"], state_of(trainer)[1][key]["momentum_buffer"])
    [step] = kept(tmp_path)
    assert [image["image_id"] for image in step["ranks"][0]["images"]] == [4, 5]
    assert isinstance(step["ranks"][0]["losses"]["loss_a"], float)
    assert step["checkpoint"] == "model_0000001.pth"


def test_the_limit_holds_over_a_resume(tmp_path):
    faults = dict.fromkeys((1, 4, 6), "loss is nan")
    trainer = trainer_of(batches(faults), bad_steps=BadSteps(str(tmp_path), max_skipped=2))
    train(trainer, 5)
    resumed = trainer_of(batches({0: "loss is nan"}), bad_steps=BadSteps(str(tmp_path), 2))
    resumed.load_state_dict(trainer.state_dict())
    with pytest.raises(FloatingPointError, match="after 2 steps left out"):
        train(resumed, 1)
    assert [step["skipped_steps"] for step in kept(tmp_path)] == [1, 2, 3]


def test_states_of_other_trainers_load():
    theirs = trainer_of(batches(), SimpleTrainer)
    train(theirs, 2)
    trainer = trainer_of(batches(), dtype="float16")
    trainer.load_state_dict(theirs.state_dict())
    assert trainer.bad_steps.skipped == 0
    assert trainer.grad_scaler.get_scale() == 65536


def test_the_search_for_a_loss_scale_is_not_counted():
    """An overflow at a large scale halves it; at scale 1 the gradient itself is not finite."""
    trainer = trainer_of(
        batches({0: "loss is finite, its gradient inf", 1: "loss is finite, its gradient inf"}),
        dtype="float16",
    )
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2)
    before = state_of(trainer)[0]
    storage = train(trainer, 1)
    assert trainer.bad_steps.skipped == 0
    assert storage.latest()["grad_scale"][0] == 1
    assert torch.equal(before["layers.0.weight"], trainer.model.layers[0].weight)
    with pytest.raises(FloatingPointError, match="the gradient of"):
        train(trainer, 1)


def test_weights_that_are_not_finite_are_not_saved():
    model = Toy()
    require_finite_weights(model.state_dict())
    model.layers[1].running_var[3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"got 1 tensors .*: layers\.1\.running_var\."):
        require_finite_weights(model.state_dict())


RANKS = """
import sys
sys.path.insert(0, "tests")
import torch
from detectron2.utils import comm
from torch import distributed, multiprocessing
from torch.nn.parallel import DistributedDataParallel
from test_bad_steps import BadSteps, batches, train, trainer_of

def main(rank, folder, fault):
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    # The batches of rank 1 have a fault that rank 0 does not see.
    trainer = trainer_of(
        batches({3: fault} if rank == 1 else {}), bad_steps=BadSteps(folder, max_skipped=1)
    )
    trainer.model = DistributedDataParallel(trainer.model, broadcast_buffers=False)
    train(trainer, 8)
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    first, second = comm.all_gather(weights)
    assert torch.equal(first, second) and weights.isfinite().all()
    assert trainer.bad_steps.skipped == 1
    trainer.reset_data_loader(lambda: batches({0: fault} if rank == 1 else {}))
    try:
        train(trainer, 1)
    except FloatingPointError as error:
        assert comm.all_gather(str(error)) == [str(error)] * 2
        open(f"{folder}/stopped{rank}", "w").close()

if __name__ == "__main__":
    torch.set_num_threads(1)
    multiprocessing.start_processes(main, sys.argv[1:], nprocs=2, start_method="fork")
"""


@pytest.mark.parametrize("fault", ["loss is inf, its gradient finite"])
def test_a_fault_on_one_rank_is_the_decision_of_both(tmp_path, fault):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = subprocess.run(
        [sys.executable, script, tmp_path, fault],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"stopped0", "stopped1"} <= set(os.listdir(tmp_path))
    losses = [[rank["losses"]["loss_b"] for rank in step["ranks"]] for step in kept(tmp_path)]
    assert all(isinstance(first, float) and second == "inf" for first, second in losses)
