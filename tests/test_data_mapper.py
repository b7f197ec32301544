from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from detectron2.structures import BoxMode
from PIL import Image
from torch.utils.data import DataLoader

from gn_practical.data import CheckedDatasetMapper, DatasetError


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
