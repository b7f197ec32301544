"""Group normalization with the practical number of groups, for Detectron2."""

__version__ = "0.1.0"
