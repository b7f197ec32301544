"""The embedded data set, registration of a user's own data, loading."""

from gn_practical.training.data.errors import DatasetError
from gn_practical.training.data.mapper import CheckedDatasetMapper
from gn_practical.training.data.prepare import prepare_coco, prepare_stuff, write_instances_json
from gn_practical.training.data.registration import register_datasets, register_scenes
from gn_practical.training.data.scenes import ensure_scenes
from gn_practical.training.data.skipped_samples import SkippedSamples, skipped_samples

__all__ = [
    "CheckedDatasetMapper",
    "DatasetError",
    "SkippedSamples",
    "ensure_scenes",
    "prepare_coco",
    "prepare_stuff",
    "register_datasets",
    "register_scenes",
    "skipped_samples",
    "write_instances_json",
]
