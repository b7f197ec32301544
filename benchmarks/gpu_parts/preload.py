"""Imports what the sections need, once for all that are forked from here; starts nothing."""

import group_norm  # noqa: F401
import memory  # noqa: F401
import triton  # noqa: F401

import gn_practical.layers.group_norm_kernels
import gn_practical.layers.weight_standardization_kernels
import gn_practical.training  # noqa: F401
