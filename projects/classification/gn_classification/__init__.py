"""The paper's and the group-norm report's classification experiments.

Importing the package registers the models. Their training is in
:mod:`gn_classification.run`, which ``projects/classification/train_net.py`` calls.
"""

from gn_classification.backbones import (
    MLP,
    build_cifar_resnet_backbone,
    build_mlp_backbone,
    build_torchvision_resnet_backbone,
)
from gn_classification.classifier import ImageClassifier

__all__ = [
    "MLP",
    "ImageClassifier",
    "build_cifar_resnet_backbone",
    "build_mlp_backbone",
    "build_torchvision_resnet_backbone",
]
