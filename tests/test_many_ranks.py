"""More ranks than two; tests/many_ranks.py has what takes longer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from gn_practical.training.engine.autocast import AutocastTrainer

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(
    "GN_PRACTICAL_LONG_TESTS" not in os.environ,
    reason="takes half a minute; set GN_PRACTICAL_LONG_TESTS, or tests/many_ranks.py resume",
)
def test_four_ranks_that_are_resumed_end_with_the_same_bits(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/many_ranks.py", "resume", "--output", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("holds") == 2


class Normalized(nn.Module):
    """A model with everything that a forward pass leaves behind."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def forward(self, data):
        return {"loss": self.layers(torch.stack(data)).square().mean()}


def trainer_of(steps=1):
    torch.manual_seed(0)
    model = Normalized()
    batches = torch.randn(5, 4, 3).unbind()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    trainer = AutocastTrainer(model, [list(b) for b in batches], optimizer, accumulate_steps=steps)
    trainer.iter = 0
    return trainer


@pytest.mark.parametrize("steps", [1, 2])
def test_a_rehearsal_leaves_nothing_behind(steps):
    plain, rehearsed = trainer_of(steps), trainer_of(steps)
    states = []
    for trainer in (plain, rehearsed):
        with EventStorage() as storage:
            for number in range(3):
                if trainer is rehearsed and number == 1:
                    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
                    trainer.rehearse()
                    after = trainer.model.state_dict()
                    assert all(torch.equal(after[k], v) for k, v in before.items())
                    assert all(p.grad is None for p in trainer.model.parameters())
                torch.manual_seed(number)
                trainer.run_step()
                trainer.iter += 1
            history = storage.history("total_loss").values()
            states.append((trainer.model.state_dict(), [value for value, _ in history]))
    (weights, losses), (others, other_losses) = states
    assert losses == other_losses
    assert len(losses) == 3
    assert all(torch.equal(weights[key], value) for key, value in others.items())
