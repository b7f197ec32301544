"""MNIST as flat images."""

import torch
from torchvision.datasets import MNIST


def load_mnist(
    root: str, download: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return training images and labels, test images and labels; pixels in [0, 1].

    Args:
        root: folder with MNIST/raw.
        download: fetch it if it is not there.

    Shape:
        output: (60000, 784), (60000,), (10000, 784), (10000,).

    Raises:
        ValueError: if it is not there.
    """
    parts = []
    for train in (True, False):
        try:
            dataset = MNIST(root, train=train, download=download)
        except RuntimeError as error:
            raise ValueError(
                f"MNIST must be in MNIST/raw of the data sets' folder, got folder={root}, where it "
                "is not. Set DETECTRON2_DATASETS, or give --download."
            ) from error
        parts += [dataset.data.flatten(1).float() / 255, dataset.targets]
    return tuple(parts)
