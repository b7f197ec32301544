import json

import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from gn_practical import add_pgn_config
from gn_practical.training import add_training_config
from gn_practical.training.data import DatasetError, register_datasets, register_scenes
from gn_practical.training.data.coco_format import read_categories

pytestmark = pytest.mark.usefixtures("catalogs_as_before")

THINGS = [{"id": 7, "name": "dog", "isthing": 1}, {"id": 2, "name": "cat", "isthing": 1}]
STUFF = [{"id": 40, "name": "wall", "isthing": 0}, {"id": 5, "name": "floor", "isthing": 0}]


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_pgn_config(cfg)
    add_training_config(cfg)
    return cfg


def write_data(root, things=THINGS, extension="png"):
    """One image: a dog on the left half, floor on the right; the jsons list their own order."""
    for folder in ("images", "panoptic", "stuff"):
        (root / folder).mkdir(parents=True)
    Image.new("RGB", (8, 6)).save(root / f"images/a.{extension}")
    ids = np.zeros((6, 8, 3), np.uint8)
    ids[:, :4, 0], ids[:, 4:, 1] = 1, 1
    Image.fromarray(ids).save(root / "panoptic/a.png")
    Image.fromarray(np.where(ids[..., 0], 0, 1).astype(np.uint8)).save(root / "stuff/a.png")
    images = [{"id": 3, "file_name": f"a.{extension}", "width": 8, "height": 6}]
    dog = {"id": 1, "category_id": 7, "bbox": [0, 0, 4, 6], "area": 24, "iscrowd": 0}
    polygon = [[0, 0, 4, 0, 4, 6, 0, 6]]
    instances = {
        "images": images,
        "annotations": [{**dog, "image_id": 3, "segmentation": polygon}],
        "categories": things,
    }
    floor = {"id": 256, "category_id": 5, "bbox": [4, 0, 4, 6], "area": 24, "iscrowd": 0}
    panoptic = {
        "images": images,
        "annotations": [{"image_id": 3, "file_name": "a.png", "segments_info": [dog, floor]}],
        "categories": [*STUFF, *THINGS],
    }
    (root / "instances.json").write_text(json.dumps(instances))
    (root / "panoptic.json").write_text(json.dumps(panoptic))


def panoptic_entry(root, name="rooms"):
    parts = ("images", "panoptic", "panoptic.json", "stuff", "instances.json")
    return [name, *(str(root / part) for part in parts)]


def test_scenes_have_the_metadata_of_a_panoptic_fpn():
    register_scenes()
    register_scenes()
    for split in ("train", "val"):
        assert f"scenes_{split}" in DatasetCatalog
        assert f"scenes_{split}_panoptic_stuffonly" in DatasetCatalog
        ours = MetadataCatalog.get(f"scenes_{split}_panoptic_separated").as_dict()
        coco = MetadataCatalog.get("coco_2017_val_panoptic_separated").as_dict()
        assert ours.keys() == coco.keys()
        assert ours["stuff_classes"] == ["things", "sky", "grass", "water", "sand"]
        assert ours["stuff_dataset_id_to_contiguous_id"] == {0: 0, 6: 1, 7: 2, 8: 3, 9: 4}
        assert ours["thing_dataset_id_to_contiguous_id"] == {1: 0, 2: 1, 3: 2, 4: 3, 5: 4}
        assert ours["evaluator_type"] == coco["evaluator_type"]
        assert len(ours["stuff_colors"]) == 5


def test_instances_are_loaded_with_contiguous_ids(tmp_path, cfg):
    write_data(tmp_path)
    entry = ("pets", str(tmp_path / "images"), str(tmp_path / "instances.json"))
    cfg.DATASETS.COCO_INSTANCES = (entry,)
    register_datasets(cfg)
    cfg.DATASETS.COCO_INSTANCES = [list(entry)]
    register_datasets(cfg)
    metadata = MetadataCatalog.get("pets")
    assert metadata.thing_classes == ["cat", "dog"]
    (record,) = DatasetCatalog.get("pets")
    assert record["annotations"][0]["category_id"] == metadata.thing_classes.index("dog")


@pytest.mark.parametrize("things", [THINGS, THINGS[::-1], THINGS[:1]])
@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_panoptic_data_is_loaded_however_the_jsons_list_categories(
    tmp_path, cfg, things, extension
):
    write_data(tmp_path, things, extension)
    cfg.DATASETS.COCO_PANOPTIC = (panoptic_entry(tmp_path),)
    register_datasets(cfg)
    register_datasets(cfg)
    metadata = MetadataCatalog.get("rooms_separated")
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.stuff_classes == ["things", "floor", "wall"]
    (record,) = DatasetCatalog.get("rooms_separated")
    assert record["file_name"] == str(tmp_path / f"images/a.{extension}")
    assert record["sem_seg_file_name"] == str(tmp_path / "stuff/a.png")
    assert record["pan_seg_file_name"] == str(tmp_path / "panoptic/a.png")
    assert (record["image_id"], record["height"], record["width"]) == (3, 6, 8)
    assert [a["category_id"] for a in record["annotations"]] == [1]
    kinds = [(s["id"], s["category_id"], s["isthing"]) for s in record["segments_info"]]
    assert kinds == [(1, 1, True), (256, 1, False)]
    (stuff,) = DatasetCatalog.get("rooms_stuffonly")
    assert stuff["sem_seg_file_name"] == record["sem_seg_file_name"]
    assert "annotations" not in stuff


def test_a_name_stays_with_its_first_definition(tmp_path, cfg):
    write_data(tmp_path / "one")
    write_data(tmp_path / "two")
    cfg.DATASETS.COCO_PANOPTIC = (panoptic_entry(tmp_path / "one"),)
    register_datasets(cfg)
    cfg.DATASETS.COCO_PANOPTIC = (panoptic_entry(tmp_path / "two"),)
    with pytest.raises(DatasetError, match=r"'rooms_separated'.*registered already as .*one"):
        register_datasets(cfg)
    cfg.DATASETS.COCO_PANOPTIC = ()
    cfg.DATASETS.COCO_INSTANCES = (("coco_2017_val", "images", "instances.json"),)
    with pytest.raises(DatasetError, match=r"must be free, got 'coco_2017_val'"):
        register_datasets(cfg)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (("pets", "images", "a.json"), r"must be 3 texts .*got 'pets'.*comma"),
        ((("pets", "images"),), r"must be 3 texts \(name, image_root, instances_json\)"),
        ((("pets", "images", 3),), r"got \('pets', 'images', 3\)"),
        ("pets", r"must be a list of entries, got 'pets'"),
    ],
)
def test_malformed_entries_show_the_form(cfg, entries, message):
    cfg.DATASETS.COCO_INSTANCES = entries
    with pytest.raises(DatasetError, match=message):
        register_datasets(cfg)


def test_a_missing_json_is_left_to_the_checks(tmp_path, cfg):
    cfg.DATASETS.COCO_PANOPTIC = (panoptic_entry(tmp_path),)
    register_datasets(cfg)
    assert "rooms_separated" in DatasetCatalog
    write_data(tmp_path)
    register_datasets(cfg)
    assert MetadataCatalog.get("rooms_separated").thing_classes == ["cat", "dog"]


def test_a_panoptic_json_is_asked_for(tmp_path, cfg):
    write_data(tmp_path)
    for category in (things := json.loads((tmp_path / "instances.json").read_text()))["categories"]:
        category.pop("isthing")
    (tmp_path / "panoptic.json").write_text(json.dumps(things))
    cfg.DATASETS.COCO_PANOPTIC = (panoptic_entry(tmp_path),)
    with pytest.raises(DatasetError, match=r"panoptic\.json must say .*isthing.*COCO_INSTANCES"):
        register_datasets(cfg)


def test_categories_are_found_behind_other_keys_of_that_name(tmp_path):
    path = tmp_path / "a.json"
    content = {"info": {"categories": ["many"]}, "images": [{"categories": 3}]}
    path.write_text(json.dumps({**content, "categories": THINGS}))
    assert [c["id"] for c in read_categories(path)] == [2, 7]
    path.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"a\.json must have a key 'categories'"):
        read_categories(path)
