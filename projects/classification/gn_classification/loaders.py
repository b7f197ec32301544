"""Batches of images: from memory, or from files as they are needed."""

import random
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import joblib
import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.utils import comm
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from gn_classification.classifier import Batch
from gn_classification.datasets import LabelledImages, open_dataset
from gn_practical.training.data.loader import follow_rank
from gn_practical.training.data.seeding import run_seed, seeded

AUGMENTATIONS = ("none", "crop_flip", "resized_crop")
_EVAL_CROP = 0.875  # of the resized image's side, as for ImageNet


class ImagesInMemory:
    """A split of a data set as one uint8 tensor on the model's device.

    Args:
        images: (N, C, H, W), uint8.
        labels: (N,), int64.
        classes: names of the classes.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: list[str]) -> None:
        self.images, self.labels, self.classes = images, labels, classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: Tensor) -> Batch:
        """Return the images of these indices."""
        on_device = indices.to(self.images.device)
        return Batch(self.images[on_device], self.labels[on_device], indices)


class TrainBatches:
    """Endless batches of one rank; what the i-th one holds follows from the seed and i alone.

    The images come in a new order in each epoch, in one stream for all ranks; a batch may end one
    epoch and begin the next, so that none is left out.

    Args:
        size: images in the data set.
        batch_size: of all ranks together.
        seed: of the run.
        rank: of this process.
        num_ranks: how many share a batch.

    Example:
        >>> batches = TrainBatches(size=10, batch_size=4, seed=0)
        >>> sorted(torch.cat([batches.indices(i) for i in range(5)]).tolist())[:6]
        [0, 0, 1, 1, 2, 2]
    """

    def __init__(
        self, size: int, batch_size: int, seed: int, rank: int = 0, num_ranks: int = 1
    ) -> None:
        self.size, self.seed, self.iteration = size, seed, 0
        self.batch_size, self.rank, self.num_ranks = batch_size, rank, num_ranks
        self._orders: dict[int, Tensor] = {}

    def indices(self, iteration: int) -> Tensor:
        """Return the indices of this rank's images in batch ``iteration``."""
        share = self.batch_size // self.num_ranks
        begin = iteration * self.batch_size + self.rank * share
        positions = torch.arange(begin, begin + share)
        epochs = positions // self.size
        orders = {epoch: self._order(epoch) for epoch in epochs.unique().tolist()}
        self._orders = orders
        parts = [order[positions[epochs == epoch] % self.size] for epoch, order in orders.items()]
        return torch.cat(parts)

    def _order(self, epoch: int) -> Tensor:
        if epoch in self._orders:
            return self._orders[epoch]
        return torch.randperm(self.size, generator=_generator(self.seed, epoch, -1))

    def state_dict(self) -> dict[str, int]:
        """Return the seed and the number of the next batch."""
        return {"seed": self.seed, "iteration": self.iteration}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another loader of the same data was."""
        self.seed, self.iteration = state["seed"], state["iteration"]
        self._orders = {}


class MemoryTrainLoader(TrainBatches):
    """Training batches from memory, augmented as whole batches.

    Args:
        dataset: the images.
        augmentation: "none" or "crop_flip", see :func:`crop_flip`.
        batches: arguments of :class:`TrainBatches`.
    """

    def __init__(self, dataset: ImagesInMemory, augmentation: str, **batches: int) -> None:
        super().__init__(len(dataset), **batches)
        self.dataset, self.augmentation = dataset, augmentation

    def __iter__(self) -> Iterator[Batch]:
        while True:
            batch = self.dataset[self.indices(self.iteration)]
            if self.augmentation == "crop_flip":
                generator = _generator(self.seed, self.iteration, self.rank)
                batch.images = crop_flip(batch.images, generator)
            self.iteration += 1
            yield batch


class FileTrainLoader(TrainBatches):
    """Training batches from files, decoded and augmented image by image in worker processes.

    Args:
        dataset: the files.
        num_workers: processes that decode; what the batches hold does not depend on it.
        batches: arguments of :class:`TrainBatches`.
    """

    def __init__(self, dataset: "FileImages", num_workers: int, **batches: int) -> None:
        super().__init__(len(dataset), **batches)
        self.dataset, self.num_workers = dataset, num_workers

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            self.dataset,
            batch_sampler=self._samples(),
            num_workers=self.num_workers,
            collate_fn=_collate,
            worker_init_fn=follow_rank,
            generator=torch.Generator(),  # in place of the one that the model draws from
        )
        for batch in loader:
            self.iteration += 1
            yield batch

    def _samples(self) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
        iteration = self.iteration
        while True:
            indices = self.indices(iteration).tolist()
            yield [(index, (self.seed, iteration, self.rank, i)) for i, index in enumerate(indices)]
            iteration += 1


class FileImages(Dataset):
    """Images of one size from files, with random numbers that follow from a key.

    Args:
        dataset: the files.
        transform: of a PIL image to a uint8 tensor of one size.
    """

    def __init__(self, dataset: LabelledImages, transform: v2.Transform) -> None:
        self.dataset, self.transform = dataset, transform
        self.classes = dataset.classes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, sample: tuple[int, tuple[int, ...]]) -> tuple[Tensor, int, int]:
        index, key = sample
        image, label = self.dataset[index]
        with seeded(*key):
            return self.transform(image), label, index


def build_train_loader(cfg: CfgNode) -> TrainBatches:
    """Return the training batches of a config.

    Args:
        cfg: complete; ``CLASSIFICATION``, ``DATASETS.TRAIN``, ``DATALOADER.NUM_WORKERS``,
            ``SOLVER.IMS_PER_BATCH`` and ``SEED`` are read.

    Raises:
        ValueError: for a config whose epochs have not been turned into iterations.
    """
    own, (name,) = cfg.CLASSIFICATION, cfg.DATASETS.TRAIN
    for key in ("EPOCHS", "STEP_FRACTIONS", "REFERENCE_BATCH"):
        if own[key]:
            raise ValueError(
                f"CLASSIFICATION.{key} must be turned into iterations before training, got "
                f"CLASSIFICATION.{key}={own[key]}. Call gn_classification.complete_config."
            )
    batches = {
        "batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "seed": run_seed(cfg),
        "rank": comm.get_rank(),
        "num_ranks": comm.get_world_size(),
    }
    if own.IN_MEMORY:
        return MemoryTrainLoader(load_images(cfg, name), own.AUGMENTATION, **batches)
    files = FileImages(open_dataset(cfg, name), _train_transform(cfg))
    return FileTrainLoader(files, cfg.DATALOADER.NUM_WORKERS, **batches)


def build_test_loader(cfg: CfgNode, name: str) -> DataLoader:
    """Return the batches of an evaluation: all images once, a contiguous share for each rank.

    Batches differ by one image in size at most, so that none holds a single one of many, which
    PyTorch's norms refuse where a group is one value.

    Args:
        cfg: as for :func:`build_train_loader`, with ``CLASSIFICATION.IMS_PER_BATCH_TEST`` for one
            rank.
        name: of the data set.
    """
    batch_size = cfg.CLASSIFICATION.IMS_PER_BATCH_TEST
    if cfg.CLASSIFICATION.IN_MEMORY:
        images = load_images(cfg, name)
        batches = _batches_of_rank(len(images), batch_size)
        return DataLoader(images, batch_size=None, sampler=batches, collate_fn=lambda batch: batch)
    files = FileImages(open_dataset(cfg, name), _test_transform(cfg))
    batches = _batches_of_rank(len(files), batch_size)
    return DataLoader(
        files,
        batch_sampler=[[(index, ()) for index in batch.tolist()] for batch in batches],
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=_collate,
    )


def _batches_of_rank(size: int, batch_size: int) -> list[Tensor]:
    indices = torch.arange(size).tensor_split(comm.get_world_size())[comm.get_rank()]
    return list(indices.tensor_split(-(-len(indices) // batch_size))) if len(indices) else []


def load_images(cfg: CfgNode, name: str) -> ImagesInMemory:
    """Load a split of a data set into memory, once in a process.

    Images are scaled to ``CLASSIFICATION.IMAGE_SIZE`` squared where they differ, and made gray or
    RGB as ``MODEL.PIXEL_MEAN`` has one or three values.

    Args:
        cfg: config of the run.
        name: of the split, see :func:`gn_classification.datasets.open_dataset`.
    """
    key = (name, cfg.CLASSIFICATION.IMAGE_SIZE, len(cfg.MODEL.PIXEL_MEAN), cfg.MODEL.DEVICE)
    key += (str(cfg.CLASSIFICATION.IMAGE_FOLDERS), cfg.CLASSIFICATION.VAL_FRACTION)
    if key not in _LOADED:
        dataset, (_, size, channels, device, *_) = open_dataset(cfg, name), key
        arrays = dataset.arrays()
        if arrays is None:
            images, labels = _decode(dataset, name, size, channels)
        else:
            images, labels = _fit(arrays[0], size, channels), arrays[1]
        _LOADED[key] = ImagesInMemory(images.to(device), labels.to(device), dataset.classes)
    return _LOADED[key]


_LOADED: dict[tuple, ImagesInMemory] = {}


def _fit(images: Tensor, size: int, channels: int) -> Tensor:
    """Bring (N, H, W[, C]) to (N, channels, size, size)."""
    images = images.unsqueeze(-1) if images.dim() == 3 else images
    images = images.permute(0, 3, 1, 2)
    if images.shape[1] < channels:
        images = images.expand(-1, channels, -1, -1)
    elif images.shape[1] > channels:
        images = v2.functional.rgb_to_grayscale(images)
    if images.shape[2:] != (size, size):
        images = v2.functional.resize(images, [size, size], antialias=True)
    return images.contiguous()


def _decode(dataset: LabelledImages, name: str, size: int, channels: int) -> tuple[Tensor, Tensor]:
    """Read files by all cores: PIL's decoder lets other threads run."""
    images = torch.empty(len(dataset), channels, size, size, dtype=torch.uint8)
    labels = torch.empty(len(dataset), dtype=torch.int64)

    def decode(index: int) -> None:
        image, labels[index] = dataset[index]
        image = image.convert("RGB" if channels == 3 else "L")
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        images[index] = torch.from_numpy(np.array(image)).view(size, size, -1).permute(2, 0, 1)

    bar = {"desc": f"reading {name}", "total": len(dataset), "mininterval": 1, "delay": 1}
    with ThreadPoolExecutor(joblib.cpu_count()) as pool:
        done = pool.map(decode, range(len(dataset)))
        for _ in tqdm(done, **bar, disable=not comm.is_main_process()):
            pass
    return images, labels


def crop_flip(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Pad each image with zeros, crop it at random to its size, flip every other one.

    Zeros are black here, where He et al. pad after the mean is subtracted.

    Args:
        images: (N, C, H, W).
        generator: of the CPU, so that a GPU sees the same crops.
        padding: pixels on each side.
    """
    number, _, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, number, 1), generator=generator)
    flip = torch.rand(number, 1, generator=generator) < 0.5
    rows = top + torch.arange(height)
    columns = torch.arange(width)
    columns = left + torch.where(flip, columns.flip(0), columns)
    samples, rows, columns = (
        index.to(images.device)
        for index in (torch.arange(number)[:, None, None], rows[:, :, None], columns[:, None, :])
    )
    padded = F.pad(images, [padding] * 4)
    return padded.permute(0, 2, 3, 1)[samples, rows, columns].permute(0, 3, 1, 2).contiguous()


def _train_transform(cfg: CfgNode) -> v2.Transform:
    size = cfg.CLASSIFICATION.IMAGE_SIZE
    augmentations = {
        "none": [v2.Resize([size, size])],
        "crop_flip": [
            *(v2.Resize([size, size]), v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip())
        ],
        "resized_crop": [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()],
    }
    chosen = augmentations[cfg.CLASSIFICATION.AUGMENTATION]
    return v2.Compose([_to_channels(cfg), *chosen, v2.PILToTensor()])


def _test_transform(cfg: CfgNode) -> v2.Transform:
    size = cfg.CLASSIFICATION.IMAGE_SIZE
    resize = [v2.Resize([size, size])]
    if cfg.CLASSIFICATION.AUGMENTATION == "resized_crop":
        resize = [v2.Resize(round(size / _EVAL_CROP)), v2.CenterCrop(size)]
    return v2.Compose([_to_channels(cfg), *resize, v2.PILToTensor()])


def _to_channels(cfg: CfgNode) -> v2.Transform:
    return v2.RGB() if len(cfg.MODEL.PIXEL_MEAN) == 3 else v2.Grayscale()


def _collate(samples: list[tuple[Tensor, int, int]]) -> Batch:
    images, labels, indices = zip(*samples, strict=True)
    return Batch(torch.stack(images), torch.tensor(labels), torch.tensor(indices))


def _generator(*key: int) -> torch.Generator:
    """Return a generator whose numbers follow from a key."""
    seed = random.Random("/".join(map(str, key))).getrandbits(63)
    return torch.Generator().manual_seed(seed)
