"""Random data sets pass the start's check and load as they are, or end in one clear error."""

import contextlib
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from generated_coco import ODDITIES, coco_sets
from hypothesis import HealthCheck, Phase, given, settings

from gn_practical.training import add_training_config
from gn_practical.training.data import CheckedDatasetMapper, DatasetError, register_datasets
from gn_practical.training.validation import (
    InstancesTarget,
    PanopticTarget,
    check_datasets,
    validate,
)

pytestmark = pytest.mark.usefixtures("catalogs_as_before")
quick = settings(
    max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def config_of(files):
    name = f"generated_{tempfile.mktemp(prefix='', dir='')}"
    cfg = get_cfg()
    add_training_config(cfg)
    cfg.DATASETS.COCO_PANOPTIC = ((name, *map(str, files)),)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (f"{name}_separated",)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    return cfg


def start(cfg):
    """Do what a run does before it builds its model; return the records."""
    register_datasets(cfg)
    (name,) = cfg.DATASETS.TRAIN
    metadata = MetadataCatalog.get(name)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(metadata.thing_classes)
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = len(metadata.stuff_classes)
    check_datasets(cfg)
    return DatasetCatalog.get(name)


@quick
@given(coco_sets())
def test_what_can_be_trained_on_passes_and_loads_as_it_is(data):
    with tempfile.TemporaryDirectory() as folder:
        files = data.write(Path(folder))
        cfg = config_of(files)
        records = start(cfg)
        pair = (
            InstancesTarget(str(files.instances_json), str(files.image_root), area=True),
            PanopticTarget(
                *map(str, (files.panoptic_json, files.panoptic_root, files.image_root)),
                stuff_root=str(files.sem_seg_root),
                instances_json=str(files.instances_json),
            ),
        )
        report = validate(pair, workers=0, show_progress=False)
        reasons = {fault.reason for fault in report.faults}
        assert reasons - {"annotation id is 0", "crowds alone"} == set()
        mapper = CheckedDatasetMapper(cfg, is_train=True, augmentations=[])
        mapped = [mapper(record)["sem_seg"].numpy() for record in records]
    by_id = {annotation["image_id"]: annotation for annotation in data.panoptic["annotations"]}
    images = {image["id"]: image for image in data.images}
    things = sorted(c["id"] for c in data.instances["categories"])
    assert [record["image_id"] for record in records] == sorted(images)
    for record, labels in zip(records, mapped, strict=True):
        image = images[record["image_id"]]
        assert record["file_name"].endswith(image["file_name"])
        assert (labels == data.stuff_labels(by_id[image["id"]])).all()
        expected = [a for a in data.instances["annotations"] if a["image_id"] == image["id"]]
        assert [things[a["category_id"]] for a in record["annotations"]] == [
            a["category_id"] for a in expected
        ]


@pytest.mark.parametrize("oddity", ODDITIES)
def test_what_cannot_ends_in_one_clear_error(oddity):
    @settings(quick, max_examples=4)
    @given(coco_sets(odd=oddity))
    def run(data):
        with tempfile.TemporaryDirectory() as folder:
            cfg = config_of(data.write(Path(folder)))
            if not data.oddity:  # the set had no place for it
                start(cfg)
            else:
                with pytest.raises(DatasetError, match=r"(got|first).*\S"):
                    start(cfg)

    run()


LARGE = [0, -1, 255, 2**31, 2**53 + 1, 2**63, -(10**30), float("nan"), float("inf"), -0.5, 1e308]
VALUES = [None, True, "", "x", "1", "#ff0000", [], [[]], [1], {}, {"a": 1}, *LARGE]


def places(content, where=()):
    """Yield the way to every value of a json."""
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in entries:
        yield (*where, key)
        if isinstance(value, dict | list):
            yield from places(value, (*where, key))


@settings(quick, max_examples=1, phases=[Phase.generate])
@given(coco_sets().filter(lambda data: len(data.instances["annotations"]) > 1))
def test_no_value_anywhere_leads_to_another_error(data):
    """Put a wrong value in a random place: the set passes and loads, or the error is ours."""
    rng = np.random.default_rng(0)
    folder = Path(tempfile.mkdtemp())
    files = data.write(folder)
    for number in range(120):
        path = (files.panoptic_json, files.instances_json)[number % 2]
        original = path.read_text()
        content = json.loads(path.read_text())
        ways = list(places(content))
        *way, last = ways[rng.integers(len(ways))]
        parent = content
        for key in way:
            parent = parent[key]
        parent[last] = VALUES[rng.integers(len(VALUES))]
        path.write_text(json.dumps(content))
        with contextlib.suppress(DatasetError):
            start(config_of(files))
        path.write_text(original)
    shutil.rmtree(folder)
