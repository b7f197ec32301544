"""Weights from elsewhere: reading them, what they need, and what ours say about themselves."""

from gn_practical.weights.description import Description, Standardization
from gn_practical.weights.placing import names_for
from gn_practical.weights.read import Weights, read_weights
from gn_practical.weights.stored import config_from_checkpoint, load_description

__all__ = [
    "Description",
    "Standardization",
    "Weights",
    "config_from_checkpoint",
    "load_description",
    "names_for",
    "read_weights",
]
