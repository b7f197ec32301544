"""The embedded data set, registration of a user's own data, checks before training."""

from .checks import check_datasets
from .errors import DatasetError
from .mapper import CheckedDatasetMapper
from .prepare import prepare_coco, prepare_stuff, write_instances_json
from .registration import register_datasets, register_scenes
from .scenes import ensure_scenes

__all__ = [
    "CheckedDatasetMapper",
    "DatasetError",
    "check_datasets",
    "ensure_scenes",
    "prepare_coco",
    "prepare_stuff",
    "register_datasets",
    "register_scenes",
    "write_instances_json",
]
