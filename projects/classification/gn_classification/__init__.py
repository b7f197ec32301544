"""The paper's and the group-norm report's classification experiments; train_net.py runs them.

Importing the package registers the models.
"""

from gn_classification.averaging import AverageWeights
from gn_classification.backbones import (
    MLP,
    build_cifar_resnet_backbone,
    build_detectron2_resnet_backbone,
    build_mlp_backbone,
    build_torchvision_resnet_backbone,
)
from gn_classification.classifier import Batch, ImageClassifier
from gn_classification.config import add_classification_config, check_config, complete_config
from gn_classification.datasets import open_dataset, open_datasets
from gn_classification.evaluation import ClassificationEvaluator
from gn_classification.export import export_backbone
from gn_classification.loaders import build_test_loader, build_train_loader

__all__ = [
    "MLP",
    "AverageWeights",
    "Batch",
    "ClassificationEvaluator",
    "ImageClassifier",
    "add_classification_config",
    "build_cifar_resnet_backbone",
    "build_detectron2_resnet_backbone",
    "build_mlp_backbone",
    "build_test_loader",
    "build_torchvision_resnet_backbone",
    "build_train_loader",
    "check_config",
    "complete_config",
    "export_backbone",
    "open_dataset",
    "open_datasets",
]
