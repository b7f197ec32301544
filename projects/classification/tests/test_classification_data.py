"""The images of classification: data sets, splits, batches, augmentation."""

import struct

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.utils import comm
from gn_classification import datasets, loaders
from gn_classification.config import add_classification_config
from gn_classification.datasets import open_dataset
from gn_classification.loaders import (
    TrainBatches,
    build_test_loader,
    build_train_loader,
    crop_flip,
    load_images,
)
from PIL import Image

from gn_practical import add_pgn_config
from gn_practical.training import add_training_config
from gn_practical.training.data import DatasetError


@pytest.fixture(autouse=True)
def nothing_loaded():
    yield
    loaders._LOADED.clear()
    datasets._open_torchvision.cache_clear()


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DATASETS_ROOT", str(tmp_path))
    return tmp_path


def config(**keys):
    cfg = get_cfg()
    add_pgn_config(cfg)
    add_training_config(cfg)
    add_classification_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.SEED = 3
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATASETS.TRAIN = ("my_train",)
    for key, value in keys.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def write_images(folder, count, size=(12, 10), first=0):
    """Images of one colour each, by which they can be told apart."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", size, (first + i, 2 * i, 200)).save(folder / f"{i:03}.png")


def folder_of_classes(root, counts=(("cat", 10), ("dog", 5))):
    for number, (name, count) in enumerate(counts):
        write_images(root / name, count, first=100 * number)
    return config(CLASSIFICATION__IMAGE_FOLDERS=(("my", str(root)),), CLASSIFICATION__IMAGE_SIZE=8)


# Data sets ---------------------------------------------------------------------------------------


def test_a_tree_without_val_is_split_by_class_and_always_alike(tmp_path):
    cfg = folder_of_classes(tmp_path)
    train, val = open_dataset(cfg, "my_train"), open_dataset(cfg, "my_val")
    labels = [[item[1] for item in split] for split in (train, val)]
    assert [labels[1].count(label) for label in (0, 1)] == [2, 1]
    assert sorted((*train.indices, *val.indices)) == list(range(15))
    assert open_dataset(cfg, "my_val").indices == val.indices
    assert train.classes == ["cat", "dog"]
    cfg.CLASSIFICATION.VAL_FRACTION = 0.5
    assert len(open_dataset(cfg, "my_val")) == 5 + 2


@pytest.mark.parametrize("val", ["val", "test"])
def test_a_tree_with_train_and_val(tmp_path, val):
    write_images(tmp_path / "train/a", 3)
    write_images(tmp_path / "train/b", 2, first=50)
    write_images(tmp_path / val / "a", 1)
    write_images(tmp_path / val / "b", 1)
    cfg = config(CLASSIFICATION__IMAGE_FOLDERS=(("my", str(tmp_path)),))
    assert [len(open_dataset(cfg, f"my_{split}")) for split in ("train", "val")] == [5, 2]


def test_mnist_as_torchvision_keeps_it(root):
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    pixels = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28)
    for name, count in (("train", 3), ("t10k", 2)):
        header = struct.pack(">iiii", 2051, count, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + pixels[:count].tobytes())
        labels = struct.pack(">ii", 2049, count) + bytes([7, 2, 9][:count])
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(labels)
    cfg = config(MODEL__PIXEL_MEAN=[1.0], CLASSIFICATION__IMAGE_SIZE=28)
    loaded = load_images(cfg, "mnist_train")
    assert torch.equal(loaded.images, torch.from_numpy(pixels)[:, None])
    assert loaded.labels.tolist() == [7, 2, 9]
    assert len(load_images(cfg, "mnist_val")) == 2
    assert load_images(cfg, "mnist_train") is loaded


def test_caltech101_and_pet_as_torchvision_keeps_them(root):
    folder = root / "caltech101/101_ObjectCategories"
    for name, count in (("BACKGROUND_Google", 1), ("ant", 5), ("beaver", 10)):
        write_images(folder / name, 0)
        for i in range(count):
            Image.new("RGB", (9, 7)).save(folder / name / f"image_{i + 1:04}.jpg")
    (root / "caltech101/Annotations").mkdir()
    pet = root / "oxford-iiit-pet"
    write_images(pet / "images", 0)
    (pet / "annotations").mkdir()
    for split, names in (("trainval", ("a_cat", "a_dog", "b_cat")), ("test", ("a_bird", "b_owl"))):
        lines = [f"{name} {1 + (name[0] == 'b')} 1 1" for name in names]
        (pet / f"annotations/{split}.txt").write_text("\n".join(lines) + "\n")
        for name in names:
            Image.new("RGB", (6, 8)).save(pet / f"images/{name}.jpg")
    cfg = config()
    sizes = {name: len(open_dataset(cfg, name)) for name in ("pet_train", "pet_val")}
    assert sizes == {"pet_train": 3, "pet_val": 2}
    assert open_dataset(cfg, "pet_val")[1][1] == 1
    train, val = (open_dataset(cfg, f"caltech101_{split}") for split in ("train", "val"))
    assert (len(train), len(val)) == (4 + 8, 1 + 2)
    assert "BACKGROUND_Google" not in train.classes


@pytest.mark.parametrize("name", ["mnist", "cifar10", "pet", "caltech101"])
def test_missing_data_says_where_it_was_looked_for_and_what_to_do(root, name):
    with pytest.raises(DatasetError, match=f"'{name}_val' must lie .*Add --download") as error:
        open_dataset(config(), f"{name}_val")
    assert str(root) in str(error.value)
    assert "DETECTRON2_DATASETS" in str(error.value)


def test_a_failed_download_is_one_clear_error(root, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.tv, "MNIST", fail)
    with pytest.raises(DatasetError, match="The download failed: no route to host"):
        open_dataset(config(), "mnist_train", download=True)


def test_folders_that_cannot_be_used(tmp_path):
    cfg = config(CLASSIFICATION__IMAGE_FOLDERS=(("my", str(tmp_path / "none")),))
    with pytest.raises(DatasetError, match=r"must exist, got .*none"):
        open_dataset(cfg, "my_train")
    cfg = config(CLASSIFICATION__IMAGE_FOLDERS=(("my", str(tmp_path)),))
    with pytest.raises(DatasetError, match="must hold train/ and val/"):
        open_dataset(cfg, "my_train")
    with pytest.raises(DatasetError, match=r"must be one of my_train, my_val, .* got 'my_test'"):
        open_dataset(cfg, "my_test")
    cfg = folder_of_classes(tmp_path)
    (tmp_path / "cat/003.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"Images must be readable, got .*003\.png"):
        load_images(cfg, "my_train"), load_images(cfg, "my_val")


# Batches -----------------------------------------------------------------------------------------


def test_each_epoch_has_every_image_once_over_all_ranks():
    ranks = [TrainBatches(10, batch_size=6, seed=1, rank=r, num_ranks=2) for r in range(2)]
    stream = [i for it in range(5) for r in ranks for i in r.indices(it).tolist()]
    epochs = [stream[i : i + 10] for i in range(0, 30, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = TrainBatches(10, batch_size=6, seed=1)
    assert torch.cat([again.indices(it) for it in (0, 4)]).tolist() == stream[:6] + stream[24:]
    other = TrainBatches(10, batch_size=6, seed=2)
    assert other.indices(0).tolist() != stream[:6]


def test_batches_larger_than_the_data_set():
    stream = TrainBatches(3, batch_size=8, seed=0).indices(0).tolist()
    assert [sorted(stream[i : i + 3]) for i in (0, 3)] == [[0, 1, 2]] * 2


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_loader_goes_on_where_another_was(tmp_path, in_memory):
    cfg = folder_of_classes(tmp_path)
    cfg.CLASSIFICATION.IN_MEMORY = in_memory
    cfg.CLASSIFICATION.AUGMENTATION = "crop_flip"
    first = build_train_loader(cfg)
    batches = [batch for batch, _ in zip(first, range(5), strict=False)]
    state = {**first.state_dict(), "iteration": 2}
    cfg.SEED = 4
    resumed = build_train_loader(cfg)
    resumed.load_state_dict(state)
    for expected, batch in zip(batches[2:], resumed, strict=False):
        assert torch.equal(expected.images, batch.images)
        assert torch.equal(expected.labels, batch.labels)
    assert [sample["image_id"] for sample in batches[0]] == first.indices(0).tolist()


def test_files_give_the_same_batches_whatever_the_workers(tmp_path):
    cfg = folder_of_classes(tmp_path)
    cfg.CLASSIFICATION.IN_MEMORY = False
    cfg.CLASSIFICATION.AUGMENTATION = "resized_crop"
    before = torch.get_rng_state()
    seen = []
    for cfg.DATALOADER.NUM_WORKERS in (0, 2):
        loader = build_train_loader(cfg)
        seen.append([b.images for b, _ in zip(loader, range(3), strict=False)])
        assert loader.state_dict()["iteration"] in (3, 4)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert seen[0][0].dtype == torch.uint8
    assert torch.equal(torch.get_rng_state(), before)


def test_memory_holds_what_the_files_show(tmp_path):
    cfg = folder_of_classes(tmp_path)
    cfg.CLASSIFICATION.IMAGE_SIZE = 8
    loaded, source = load_images(cfg, "my_train"), open_dataset(cfg, "my_train")
    assert loaded.images.shape == (len(source), 3, 8, 8)
    for i, (image, label) in enumerate(source):
        assert loaded.images[i, :, 4, 4].tolist() == list(image.getpixel((0, 0)))
        assert loaded.labels[i] == label
    cfg.MODEL.PIXEL_MEAN = [1.0]
    assert load_images(cfg, "my_train").images.shape == (len(source), 1, 8, 8)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 8), (3, 32)])
def test_the_digits_take_the_model_s_shape(channels, size):
    cfg = config(MODEL__PIXEL_MEAN=[1.0] * channels, CLASSIFICATION__IMAGE_SIZE=size)
    digits = load_images(cfg, "digits_train")
    assert digits.images.shape == (1438, channels, size, size)
    assert digits.images.max() == 255
    assert torch.equal(digits.images[:, :1], digits.images[:, -1:])


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_an_evaluation_sees_each_image_once(tmp_path, monkeypatch, in_memory, num_ranks):
    cfg = folder_of_classes(tmp_path)
    cfg.CLASSIFICATION.IN_MEMORY = in_memory
    cfg.CLASSIFICATION.IMS_PER_BATCH_TEST = 2
    monkeypatch.setattr(comm, "get_world_size", lambda: num_ranks)
    seen = []
    for rank in range(num_ranks):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        loader = build_test_loader(cfg, "my_val")
        batches = list(loader)
        assert len(batches) == len(loader)
        seen += [index for batch in batches for index in batch.indices.tolist()]
    assert seen == [0, 1, 2]


def test_no_batch_of_an_evaluation_is_a_single_image(tmp_path):
    cfg = folder_of_classes(tmp_path)
    cfg.CLASSIFICATION.IMS_PER_BATCH_TEST = 11  # of 12 images
    assert [len(batch.labels) for batch in build_test_loader(cfg, "my_train")] == [6, 6]


def test_crops_are_windows_of_the_padded_image_or_its_mirror():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (64, 3, 5, 6), generator=generator).byte()
    padded = torch.nn.functional.pad(images, [4] * 4)
    tops, flips = set(), 0
    for original, crop in zip(padded, crop_flip(images, generator), strict=True):
        windows = original.unfold(1, 5, 1).unfold(2, 6, 1)  # (3, 9, 9, 5, 6)
        is_crop = (windows == crop[:, None, None]).all(-1).all(-1).all(0)
        is_flip = (windows == crop.flip(2)[:, None, None]).all(-1).all(-1).all(0)
        assert is_crop.any() or is_flip.any()
        flips += bool(is_flip.any() and not is_crop.any())
        tops |= {position[0] for position in (is_crop | is_flip).nonzero().tolist()}
    assert len(tops) == 9
    assert 16 < flips < 48
