"""A run that is stopped and resumed ends as one that was not: data, random numbers, checkpoints."""

import json
import logging
import os
import random
import shlex
import signal
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode
from PIL import Image

from gn_practical.training.data import DatasetError
from gn_practical.training.data.loader import SeededDataset, build_train_loader
from gn_practical.training.data.sampler import BatchStream
from gn_practical.training.data.seeding import seed_all, seeded
from gn_practical.training.engine import Trainer, load_cfg
from gn_practical.training.engine.training_state import TrainingState

ROOT = Path(__file__).parent.parent
MODEL = shlex.split(
    "MODEL.DEVICE cpu MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.STEM_OUT_CHANNELS 8 "
    "MODEL.RESNETS.RES2_OUT_CHANNELS 16 MODEL.RESNETS.WIDTH_PER_GROUP 8 "
    "MODEL.FPN.OUT_CHANNELS 16 MODEL.RPN.CONV_DIMS [16] "
    "MODEL.ROI_BOX_HEAD.CONV_DIM 16 MODEL.ROI_BOX_HEAD.NUM_CONV 1 MODEL.ROI_BOX_HEAD.FC_DIM 16 "
    "DATASETS.TRAIN (\\'ten\\',) DATASETS.TEST () INPUT.MIN_SIZE_TRAIN (32,48,64) "
    "SOLVER.BASE_LR 0.01 SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 6 SOLVER.CHECKPOINT_PERIOD 4"
)


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr("gn_practical.training.engine.hooks.plot_metrics", lambda *paths: None)


@pytest.fixture
def ten(tmp_path, catalogs_as_before):
    """Ten images, four of them higher than wide, with a box each."""

    def entry(index):
        size = (40, 64) if index % 5 < 2 else (64, 40)
        path = tmp_path / f"{index}.png"
        pixels = np.random.default_rng(index).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        box = {"bbox": [5, 5, 30, 30], "bbox_mode": BoxMode.XYXY_ABS, "category_id": index % 5}
        shape = {"width": size[0], "height": size[1]}
        return {"file_name": str(path), "image_id": index, **shape, "annotations": [box]}

    entries = [entry(index) for index in range(10)]
    DatasetCatalog.register("ten", lambda: entries)
    MetadataCatalog.get("ten").thing_classes = list("abcde")


def config(output_dir, *overrides):
    os.makedirs(output_dir, exist_ok=True)
    words = [*MODEL, "OUTPUT_DIR", output_dir, *overrides]
    return load_cfg(str(ROOT / "configs/quickstart/faster_rcnn.yaml"), [str(w) for w in words])


class WatchedTrainer(Trainer):
    """Writes down the images of each step, and sends itself a signal in one of them."""

    stop_at = None

    def __init__(self, cfg):
        super().__init__(cfg)
        self.images = {}
        self.model.register_forward_pre_hook(self._look)

    def _look(self, _, inputs):
        self.images[self.iter] = [each["image_id"] for each in inputs[0]]
        if self.iter == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


def train(cfg, stop_at=None):
    torch.manual_seed(0)  # the same first weights
    trainer = WatchedTrainer(cfg)
    trainer.stop_at = stop_at
    trainer.resume_or_load(resume=True)
    if stop_at is None:
        trainer.train()
    else:
        with pytest.raises(SystemExit) as stopped:
            trainer.train()
        assert stopped.value.code == 75
    return trainer


def final(output_dir):
    """The last checkpoint without the config in it, which has the number of workers."""
    state = torch.load(Path(output_dir) / "model_final.pth", weights_only=True)
    assert state["description"].pop("config")
    return state


def equal(first, second):
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        return all(equal(first[key], second[key]) for key in first)
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    return first == second


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_twice_ends_with_the_same_bits(ten, tmp_path, workers):
    overrides = ["SEED", 5, "DATALOADER.NUM_WORKERS", workers]
    whole = train(config(tmp_path / "whole", "SEED", 5, "DATALOADER.NUM_WORKERS", 0))
    cfg = config(tmp_path / "stopped", *overrides)
    parts = [train(cfg, stop_at=1), train(cfg, stop_at=2), train(cfg)]
    assert [part.start_iter for part in parts] == [0, 2, 3]
    assert parts[0].images | parts[1].images | parts[2].images == whole.images
    assert equal(final(tmp_path / "stopped"), final(tmp_path / "whole"))
    lines = (tmp_path / "stopped/metrics.json").read_text().splitlines()
    iterations = [json.loads(line)["iteration"] for line in lines]
    assert iterations == sorted(set(iterations))


def test_an_evaluation_is_left_with_a_checkpoint(ten, tmp_path):
    class Signalled(DatasetEvaluator):
        batches = 0

        def process(self, inputs, outputs):
            Signalled.batches += 1
            os.kill(os.getpid(), signal.SIGUSR1)

    class Evaluated(WatchedTrainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name, output_folder=None):
            return Signalled()

    cfg = config(tmp_path, "TEST.EVAL_PERIOD", 2, "DATASETS.TEST", "('ten',)")
    with pytest.raises(SystemExit) as stopped:
        Evaluated(cfg).train()
    assert stopped.value.code == 75
    assert Signalled.batches == 1
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    resumed = Evaluated(config(tmp_path, "SOLVER.MAX_ITER", 3, "DATASETS.TEST", "('ten',)"))
    resumed.resume_or_load()
    with pytest.raises(SystemExit) as stopped:  # in the final one
        resumed.train()
    assert min(resumed.images) == 2
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_a_run_without_a_seed_goes_on_with_its_own(ten, tmp_path):
    cfg = config(tmp_path, "SEED", -1)
    stopped = train(cfg, stop_at=0)
    resumed = WatchedTrainer(cfg)
    assert resumed.state.seed != stopped.state.seed
    expected = list(islice(stopped.state.loader.stream, 3))
    resumed.resume_or_load()
    assert resumed.state.seed == stopped.state.seed
    assert list(islice(resumed.state.loader.stream, 3)) == expected
    assert cfg.SEED == -1


def test_a_finished_run_is_left_as_it_is_and_a_longer_one_goes_on(ten, tmp_path):
    train(config(tmp_path, "SEED", 5, "SOLVER.MAX_ITER", 2))
    before = final(tmp_path)["model"]
    assert train(config(tmp_path, "SOLVER.MAX_ITER", 2)).images == {}
    assert equal(final(tmp_path)["model"], before)
    longer = train(config(tmp_path, "SOLVER.MAX_ITER", 3))
    assert list(longer.images) == [2]
    assert final(tmp_path)["iteration"] == 2


def test_a_checkpoint_of_before_is_resumed_with_a_warning(ten, tmp_path, caplog):
    train(config(tmp_path, "SOLVER.MAX_ITER", 1))
    state = final(tmp_path)
    del state["training_state"]
    torch.save(state, tmp_path / "model_final.pth")
    with caplog.at_level(logging.WARNING):
        train(config(tmp_path, "SOLVER.MAX_ITER", 2))
    assert "does not say where in the data" in caplog.text


GROUPS = bytes([0, 1, 0, 0, 1, 0, 0])


def stream(batch_size=2, rank=0, num_ranks=1, seed=3):
    sampler = TrainingSampler(len(GROUPS), seed=seed)
    return BatchStream(sampler, batch_size, GROUPS, rank, num_ranks)


def test_batches_are_of_one_aspect_ratio_and_use_each_sample_once():
    batches = list(islice(stream(), 40))
    for batch in batches:
        assert len({GROUPS[index] for _, index in batch}) == 1
    positions = [position for batch in batches for position, _ in batch]
    assert len(set(positions)) == 80
    assert set(range(76)) <= set(positions)  # at most one of each group waits
    counts = Counter(index for batch in batches for _, index in batch)
    assert max(counts.values()) - min(counts.values()) <= 2


def test_the_stream_is_that_of_the_sampler():
    indices = {p: i for batch in islice(stream(), 20) for p, i in batch}
    expected = list(islice(TrainingSampler(len(GROUPS), seed=3), 30))
    assert [indices[position] for position in range(30)] == expected


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_stream_goes_on_where_another_was(steps):
    whole, stopped, resumed = stream(), stream(), stream()
    expected = list(islice(whole, steps + 9))
    assert list(islice(stopped, steps)) == expected[:steps]
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    assert list(islice(resumed, 9)) == expected[steps:]


def test_other_numbers_of_ranks_and_batch_sizes_repeat_and_miss_nothing():
    used, state = [], {"position": 0, "pending": []}
    for num_ranks, batch_size in [(1, 4), (2, 3), (3, 1), (1, 2)]:
        ranks = [stream(batch_size, rank, num_ranks) for rank in range(num_ranks)]
        for each in ranks:
            each.load_state_dict(state)
            used += [sample for batch in islice(each, 5) for sample in batch]
        states = [each.state_dict() for each in ranks]
        assert all(other == states[0] for other in states)
        state = states[0]
    waiting = [tuple(sample) for sample in state["pending"]]
    assert sorted(used + waiting) == sorted(set(used + waiting))
    assert [position for position, _ in sorted(used + waiting)] == list(range(state["position"]))


def test_repeat_factors_are_sampled_as_detectron2_does():
    sampler = RepeatFactorTrainingSampler(torch.tensor([1.0, 2.5, 1.0]), seed=1)
    batches = list(islice(BatchStream(sampler, 2, bytes(3)), 10))
    assert [index for batch in batches for _, index in batch] == list(islice(sampler, 20))


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
def test_the_loader_does_not_depend_on_workers(ten, tmp_path, sampler):
    def batches(workers):
        names = ["DATALOADER.NUM_WORKERS", workers, "DATALOADER.SAMPLER_TRAIN", sampler]
        cfg = config(tmp_path, "SEED", 5, *names, "DATALOADER.REPEAT_THRESHOLD", 0.5)
        loader = build_train_loader(cfg, random_mapper)
        return list(islice(loader, 8)), loader.state_dict()

    def random_mapper(entry):
        drawn = random.random(), np.random.rand(), torch.rand(1).item()
        return entry["image_id"], drawn

    state = torch.get_rng_state()
    alone = batches(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert batches(2) == alone
    drawn = [drawn for batch in alone[0] for _, drawn in batch]
    assert len(set(drawn)) == len(drawn)


def test_unusable_samples_are_replaced_alike_on_every_run(ten, tmp_path):
    cfg = config(tmp_path, "SEED", 5, "DATALOADER.NUM_WORKERS", 0)

    def images(mapper):
        return [i for batch in islice(build_train_loader(cfg, mapper), 10) for i in batch]

    def sound(entry):
        return entry["image_id"]

    def half(entry):
        return entry["image_id"] if entry["image_id"] % 2 else None

    replaced = images(half)
    assert replaced == images(half)
    assert all(new == old for new, old in zip(replaced, images(sound), strict=True) if old % 2)
    assert all(new % 2 for new in replaced)
    with pytest.raises(DatasetError, match="must hold samples that can be used"):
        SeededDataset([1, 2], lambda _: None, seed=0)[0, 0]


def test_other_data_begin_anew_with_a_warning(ten, tmp_path, caplog):
    loader = build_train_loader(config(tmp_path, "SEED", 5), lambda entry: entry)
    with caplog.at_level(logging.WARNING):
        loader.load_state_dict({**loader.state_dict(), "num_samples": 12, "position": 7})
    assert "had 12 training samples, this one has 10" in caplog.text
    assert loader.stream.position == 0


def test_another_number_of_ranks_is_explained(ten, tmp_path, caplog):
    loader = build_train_loader(config(tmp_path), lambda entry: entry)
    state = TrainingState(1, loader)
    with caplog.at_level(logging.WARNING):
        state.load_state_dict({**state.state_dict(), "num_ranks": 4})
    assert "written by 4 ranks, this run has 1. No sample is repeated" in caplog.text
    with caplog.at_level(logging.WARNING):
        TrainingState(1, [1, 2]).load_state_dict({"seed": 1, "num_ranks": 1})
    assert "has no position" in caplog.text


def test_iterable_data_have_detectron2s_own_loader(tmp_path, catalogs_as_before):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from ({"width": 3, "height": 2, "image_id": i} for i in range(100))

    DatasetCatalog.register("endless", Endless)
    MetadataCatalog.get("endless")
    cfg = config(tmp_path, "DATASETS.TRAIN", "('endless',)", "DATALOADER.NUM_WORKERS", 0)
    loader = build_train_loader(cfg, lambda entry: entry)
    expected = build_detection_train_loader(cfg, mapper=lambda entry: entry)
    assert next(iter(loader)) == next(iter(expected))


def test_samples_without_a_size_cannot_be_grouped(tmp_path, catalogs_as_before):
    DatasetCatalog.register("bare", lambda: [{"image_id": 1}])
    MetadataCatalog.get("bare")
    cfg = config(tmp_path, "DATASETS.TRAIN", "('bare',)")
    with pytest.raises(ValueError, match="ASPECT_RATIO_GROUPING False"):
        build_train_loader(cfg, lambda entry: entry)


def test_random_numbers_follow_from_their_key():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_all(1, "step", 0, 5)
    first = draw()
    before = draw()
    seed_all(1, "step", 0, 5)
    assert draw() == first
    with seeded(1, "sample", 5):
        inside = draw()
    assert draw() == before
    with seeded(1, "sample", 6):
        assert draw() != inside


def test_short_crash_test_on_two_ranks(tmp_path):
    words = shlex.split("--kills 2 --ranks 2 --workers 1 --iterations 8 --no-launchers")
    command = [sys.executable, str(ROOT / "tests/crash_test.py"), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "runs")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 kills" in done.stdout
