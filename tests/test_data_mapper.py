from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.data.common import MapDataset
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from PIL import Image
from torch.utils.data import DataLoader

from gn_practical import add_pgn_config
from gn_practical.training import add_training_config
from gn_practical.training.data import CheckedDatasetMapper, DatasetError, SkippedSamples
from gn_practical.training.engine.hooks import CountSkippedSamples


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MASK_FORMAT = "bitmask"
    return cfg


@pytest.fixture
def sample(tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(tmp_path / "a.jpg")
    Image.fromarray(rng.integers(0, 3, (40, 60), np.uint8)).save(tmp_path / "a.png")
    instance = {
        "bbox": [5, 5, 20, 10],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 1,
        "segmentation": [[5, 5, 25, 5, 25, 15]],
    }
    return {
        "file_name": str(tmp_path / "a.jpg"),
        "sem_seg_file_name": str(tmp_path / "a.png"),
        "image_id": 4,
        "width": 60,
        "height": 40,
        "annotations": [instance],
    }


def halve(path):
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize("is_train", [True, False])
def test_a_sound_sample_is_what_detectron2_makes(cfg, sample, is_train):
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    ours = CheckedDatasetMapper(cfg, is_train)(sample)
    theirs = DatasetMapper(cfg, is_train)(sample)
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["image"], theirs["image"])
    assert torch.equal(ours["sem_seg"], theirs["sem_seg"])
    if is_train:
        assert torch.equal(ours["instances"].gt_masks.tensor, theirs["instances"].gt_masks.tensor)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: halve(s["file_name"]), r"a\.jpg must be a whole image, got: .*truncated.*bytes"),
        (lambda s: halve(s["sem_seg_file_name"]), r"a\.png must be a whole image"),
        (lambda s: open(s["file_name"], "w").close(), r"a\.jpg must be a whole image.*\(0 bytes\)"),
        (lambda s: s.update(file_name="gone.jpg"), r"gone\.jpg must exist. Restore the file"),
        (lambda s: s.update(width=61), r"a\.jpg must be 61x40 pixels .*got 60x40"),
        (
            lambda s: Image.new("L", (30, 40)).save(s["sem_seg_file_name"]),
            r"a\.png must be 60x40 pixels .*got 30x40",
        ),
        (
            lambda s: s["annotations"][0].pop("bbox"),
            r"annotations of \S+a\.jpg must be valid, got KeyError: 'bbox'.*image_id=4",
        ),
    ],
)
def test_errors_name_the_file(cfg, sample, damage, message):
    damage(sample)
    mapper = CheckedDatasetMapper(cfg, is_train=True)
    with pytest.raises(DatasetError, match=rf"^\S*.*{message}") as error:
        mapper(sample)
    assert "\n" not in str(error.value)


def test_an_error_comes_out_of_a_worker_as_it_is(cfg, sample):
    halve(sample["file_name"])
    mapper = CheckedDatasetMapper(cfg, is_train=True)
    with pytest.raises(DatasetError) as direct:
        mapper(sample)
    loader = DataLoader(MappedList([sample], mapper), num_workers=1, batch_size=None)
    with pytest.raises(DatasetError) as from_worker:
        next(iter(loader))
    assert str(from_worker.value) == str(direct.value)


class MappedList(torch.utils.data.Dataset):
    def __init__(self, samples, mapper):
        self.samples, self.mapper = samples, mapper

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.mapper(self.samples[index])


def skipping(cfg, folder, limit):
    add_pgn_config(cfg)
    add_training_config(cfg)
    cfg.OUTPUT_DIR = str(folder)
    cfg.DATALOADER.MAX_SKIPPED_SAMPLES = limit
    return cfg


def damaged(sample, numbers):
    """Copies of the sample whose images are numbered; those are missing."""
    names = {number: f"missing{number}.jpg" for number in numbers}
    return [{**sample, "image_id": k, "file_name": names.get(k, sample["file_name"])}
            for k in range(8)]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_samples_are_counted_over_workers_and_epochs(cfg, sample, tmp_path, workers):
    mapper = CheckedDatasetMapper(skipping(cfg, tmp_path, 3), is_train=True)
    samples = MapDataset(damaged(sample, [1, 4, 6]), mapper)
    for _ in range(2):
        loader = DataLoader(samples, num_workers=workers, batch_size=None)
        assert [s["file_name"] for s in loader] == [sample["file_name"]] * 8
    listed = mapper.skipped.read()
    assert sorted(entry["file_name"] for entry in listed) == [f"missing{k}.jpg" for k in (1, 4, 6)]
    assert {entry["image_id"] for entry in listed} == {1, 4, 6}
    assert "must exist" in listed[0]["reason"]


@pytest.mark.parametrize("workers", [0, 2])
def test_one_more_than_may_be_skipped_is_an_error(cfg, sample, tmp_path, workers):
    mapper = CheckedDatasetMapper(skipping(cfg, tmp_path, 2), is_train=True)
    loader = DataLoader(
        MapDataset(damaged(sample, [1, 4, 6]), mapper), num_workers=workers, batch_size=None
    )
    message = r"MAX_SKIPPED_SAMPLES=2 images may be skipped, got 3, .*The last: missing\d\.jpg must"
    with pytest.raises(DatasetError, match=rf"^At most \S*{message}") as error:
        list(loader)
    assert "\n" not in str(error.value)
    assert len(mapper.skipped.read()) == 3


def test_without_a_limit_and_in_evaluation_nothing_is_skipped(cfg, sample, tmp_path):
    sample["file_name"] = "gone.jpg"
    for limit, is_train in ((0, True), (5, False)):
        mapper = CheckedDatasetMapper(skipping(cfg, tmp_path, limit), is_train)
        with pytest.raises(DatasetError, match=r"gone\.jpg must exist"):
            mapper(sample)
    assert not list(tmp_path.glob("skipped*"))


def test_the_count_is_logged_and_forgotten_by_a_new_run(tmp_path):
    samples = SkippedSamples(str(tmp_path / "skipped.json"), limit=5)
    samples.add({"file_name": "a.jpg"}, "a reason")
    hook = CountSkippedSamples(samples, period=2)
    hook.trainer = SimpleNamespace(start_iter=3, iter=3)
    with EventStorage() as storage:
        hook.before_train()
        hook.after_step()
    assert storage.latest()["skipped_samples"][0] == 1
    hook.trainer.start_iter = 0
    hook.before_train()
    assert samples.read() == []
