"""Training by Detectron2's Python configs, with the trainer of all other runs."""

from gn_practical.training.lazy.config import LazyRunConfig, load_lazy_config
from gn_practical.training.lazy.read import find_file
from gn_practical.training.lazy.trainer import LazyTrainer
from gn_practical.training.lazy.words import errors_in_lazy_words, log_in_lazy_words

__all__ = [
    "LazyRunConfig",
    "LazyTrainer",
    "errors_in_lazy_words",
    "find_file",
    "load_lazy_config",
    "log_in_lazy_words",
]
