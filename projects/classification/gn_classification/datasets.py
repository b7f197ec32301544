"""The images of classification: torchvision's data sets, folders of classes, and the digits."""

import difflib
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from PIL import Image
from torch.utils.data import Dataset
from torchvision import datasets as tv

from gn_practical.training.data.errors import DatasetError
from gn_practical.training.data.registration import DATASETS_ROOT

_KNOWN = ("digits", "mnist", "cifar10", "pet", "caltech101")
_SPLITS = ("train", "val")
_SPLIT_SEED = 0  # not the run's: all runs share one split
_VAL_FOLDERS = ("val", "test", "valid", "validation")


class LabelledImages(Dataset):
    """Images with the numbers of their classes; item i is (PIL image, label).

    Args:
        dataset: gives (PIL image, label); torchvision's do.
        classes: names of the classes.
        indices: of the images that belong to this split; all if None.
    """

    def __init__(
        self, dataset: Any, classes: Sequence[str], indices: Sequence[int] | None = None
    ) -> None:
        self.dataset = dataset
        self.classes = list(classes)
        self.indices = range(len(dataset)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            image, label = self.dataset[self.indices[index]]
            image.load()
        except (OSError, SyntaxError) as error:  # PIL raises both for a broken file
            raise DatasetError(
                f"Images must be readable, got number {self.indices[index]} of "
                f"{type(self.dataset).__name__} in {getattr(self.dataset, 'root', '')}: {error}. "
                "Replace or remove the file."
            ) from error
        return image, label

    def arrays(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return (images, labels) where the data set holds them as one array, (N, H, W[, C])."""
        data = getattr(self.dataset, "data", None)
        if data is None:
            return None
        indices = torch.as_tensor(self.indices)
        labels = torch.as_tensor(self.dataset.targets)
        return torch.as_tensor(data)[indices], labels[indices]


class Digits(Dataset):
    """scikit-learn's digits: 1,797 images of 8×8 pixels, 0 to 255, in ten classes."""

    classes = tuple("0123456789")

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # not at import: it takes a second

        digits = load_digits()
        self.data = torch.from_numpy(digits.images * 255 / 16).round().byte()
        self.targets = torch.from_numpy(digits.target)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.data[index].numpy()), int(self.targets[index])


def open_dataset(cfg: CfgNode, name: str, download: bool = False) -> LabelledImages:
    """Open one split of a data set: "<data set>_train" or "<data set>_val".

    Known are "digits" (scikit-learn's, no files), "mnist", "cifar10", "pet" (Oxford-IIIT Pet, its
    trainval and test sets) and "caltech101", in torchvision's folders under the environment
    variable ``DETECTRON2_DATASETS``, and those of ``CLASSIFICATION.IMAGE_FOLDERS``. Digits,
    Caltech-101 and a folder without ``val`` are split class by class, ``VAL_FRACTION`` of each to
    val, at random but the same in every run.

    Args:
        cfg: config with the keys of ``add_classification_config``.
        name: of the split.
        download: fetch what is missing, through torchvision.

    Raises:
        DatasetError: for an unknown name or missing files, with what to do.

    Example:
        >>> from detectron2.config import get_cfg
        >>> from gn_classification.config import add_classification_config
        >>> from gn_practical import add_pgn_config
        >>> cfg = get_cfg()
        >>> add_pgn_config(cfg)
        >>> add_classification_config(cfg)
        >>> len(open_dataset(cfg, "digits_train")), len(open_dataset(cfg, "digits_val"))
        (1438, 359)
    """
    dataset, _, split = name.rpartition("_")
    folders = dict(cfg.CLASSIFICATION.IMAGE_FOLDERS)
    if split not in _SPLITS or dataset not in (*folders, *_KNOWN):
        raise _unknown(name, [*folders, *_KNOWN])
    fraction = cfg.CLASSIFICATION.VAL_FRACTION
    if dataset in folders:
        return _open_folder(dataset, folders[dataset], split, fraction)
    if dataset == "digits":
        digits = Digits()
        return _split(digits, digits.classes, digits.targets, split, fraction)
    try:
        return _open_torchvision(DATASETS_ROOT, dataset, split, fraction, download)
    except OSError as error:  # a download; urllib's errors are OSErrors
        raise DatasetError(f"{_missing(name)} The download failed: {error}.") from error
    except RuntimeError as error:  # torchvision's word for missing or broken files
        raise DatasetError(f"{_missing(name)} ({error})") from error


def open_datasets(
    cfg: CfgNode, eval_only: bool = False, download: bool = False
) -> dict[str, LabelledImages]:
    """Open the data sets of a run by name, the training set first; every rank must call it.

    Args:
        cfg: as for :func:`open_dataset`.
        eval_only: those to evaluate on alone.
        download: fetch what is missing, on one rank of each machine.

    Raises:
        DatasetError: as :func:`open_dataset`.
    """
    names = cfg.DATASETS.TEST if eval_only else (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    if download:
        if comm.get_local_rank() == 0:
            for name in names:
                open_dataset(cfg, name, download=True)
        comm.synchronize()
    return {name: open_dataset(cfg, name) for name in names}


def _unknown(name: str, known: Sequence[str]) -> DatasetError:
    names = [f"{dataset}_{split}" for dataset in known for split in _SPLITS]
    near = difflib.get_close_matches(name, names, n=2)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return DatasetError(
        f"A data set must be one of {', '.join(names)}, got {name!r}.{hint} A folder of your own "
        "is named by CLASSIFICATION.IMAGE_FOLDERS."
    )


def _missing(name: str) -> str:
    set_to = "as it is set" if "DETECTRON2_DATASETS" in os.environ else "it is not set"
    return (
        f"Data set {name!r} must lie in torchvision's folders in {os.path.abspath(DATASETS_ROOT)}, "
        "and is not there or not whole. Add --download, or set the environment variable "
        f"DETECTRON2_DATASETS to the folder of your data sets ({set_to})."
    )


@cache
def _open_torchvision(
    root: str, dataset: str, split: str, fraction: float, download: bool
) -> LabelledImages:
    is_train = split == "train"
    if dataset == "pet":
        opened = tv.OxfordIIITPet(root, "trainval" if is_train else "test", download=download)
    elif dataset == "caltech101":
        opened = tv.Caltech101(root, download=download)
        return _split(opened, opened.categories, opened.y, split, fraction)
    else:
        constructor = tv.MNIST if dataset == "mnist" else tv.CIFAR10
        opened = constructor(root, train=is_train, download=download)
    return LabelledImages(opened, opened.classes)


def _open_folder(name: str, root: str, split: str, fraction: float) -> LabelledImages:
    """A tree with train/ and val/ (or test/), each a folder of classes; or a folder of classes."""
    root = os.path.expanduser(root)
    if not os.path.isdir(root):
        raise DatasetError(
            f"Folder {name!r} of CLASSIFICATION.IMAGE_FOLDERS must exist, got "
            f"{os.path.abspath(root)}. Correct the path."
        )
    present = [folder for folder in _VAL_FOLDERS if os.path.isdir(os.path.join(root, folder))]
    try:
        if not (present and os.path.isdir(os.path.join(root, "train"))):
            whole = tv.ImageFolder(root)
            return _split(whole, whole.classes, whole.targets, split, fraction)
        folder = "train" if split == "train" else present[0]
        opened = tv.ImageFolder(os.path.join(root, folder))
    except FileNotFoundError as error:  # no classes, or one without images
        raise DatasetError(
            f"Folder {name!r} must hold train/ and val/, each with one folder of images a class, "
            f"or these folders alone, got {os.path.abspath(root)}: {error}"
        ) from error
    return LabelledImages(opened, opened.classes)


def _split(
    dataset: Any, classes: Sequence[str], labels: Sequence[int], split: str, fraction: float
) -> LabelledImages:
    """Take ``fraction`` of each class, at least one image, for val and the rest for train."""
    if not 0 < fraction < 1:
        raise DatasetError(
            "CLASSIFICATION.VAL_FRACTION must be between 0 and 1, got CLASSIFICATION.VAL_FRACTION="
            f"{fraction}. Set it to the share of images to evaluate on."
        )
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    labels = torch.as_tensor(labels)
    chosen = []
    for label in range(len(classes)):
        own = (labels == label).nonzero().flatten()
        own = own[torch.randperm(len(own), generator=generator)]
        num_val = max(1, round(fraction * len(own)))
        chosen += own[:num_val] if split == "val" else own[num_val:]
    return LabelledImages(dataset, classes, sorted(int(i) for i in chosen))
