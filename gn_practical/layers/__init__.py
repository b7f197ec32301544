"""Layers: group normalization with the practical number of groups, and weight standardization."""

from gn_practical.layers.group_norm import PracticalGroupNorm
from gn_practical.layers.weight_standardization import WSConv2d, standardize_weight

__all__ = ["PracticalGroupNorm", "WSConv2d", "standardize_weight"]
