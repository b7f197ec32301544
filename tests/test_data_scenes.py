import hashlib
import json
import shutil

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from gn_practical.training.data import DatasetError, ensure_scenes
from gn_practical.training.data.coco_format import id_to_rgb, rgb_to_id
from gn_practical.training.data.drawing import STUFF_CLASSES, THING_CLASSES
from gn_practical.training.data.scenes import CATEGORIES

FEW = {"train": 12, "val": 4}


def digest(root):
    total = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file():
            total.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "scenes"
    ensure_scenes(root, FEW)
    return root


def test_two_generations_are_equal(scenes, tmp_path):
    ensure_scenes(tmp_path / "scenes", FEW)
    assert digest(tmp_path / "scenes") == digest(scenes)


def test_an_image_does_not_depend_on_how_many_there_are(scenes, tmp_path):
    ensure_scenes(tmp_path / "scenes", {"train": 2, "val": 1})
    for name in ("images/train/000002.jpg", "panoptic_val/000001.png"):
        assert (tmp_path / "scenes" / name).read_bytes() == (scenes / name).read_bytes()


def test_validation_images_are_not_training_images(scenes):
    train = {p.read_bytes() for p in (scenes / "images/train").iterdir()}
    val = {p.read_bytes() for p in (scenes / "images/val").iterdir()}
    assert len(train) == 12
    assert len(val) == 4
    assert not train & val


@pytest.mark.parametrize("split", ["train", "val"])
def test_all_annotations_agree_pixel_for_pixel(scenes, split):
    panoptic = json.loads((scenes / f"panoptic_{split}.json").read_text())
    instances = json.loads((scenes / f"instances_{split}.json").read_text())
    is_thing = {c["id"]: c["isthing"] for c in CATEGORIES}
    by_image = {a["image_id"]: [] for a in panoptic["annotations"]}
    for instance in instances["annotations"]:
        by_image[instance["image_id"]].append(instance)
    for annotation in panoptic["annotations"]:
        png = annotation["file_name"]
        ids = rgb_to_id(np.asarray(Image.open(scenes / f"panoptic_{split}" / png)))
        stuff = np.asarray(Image.open(scenes / f"panoptic_stuff_{split}" / annotation["file_name"]))
        segments = annotation["segments_info"]
        assert set(np.unique(ids)) - {0} == {s["id"] for s in segments}
        assert (stuff[ids == 0] == 255).all()
        things = [s for s in segments if is_thing[s["category_id"]]]
        for segment in segments:
            mask = ids == segment["id"]
            label = 0 if is_thing[segment["category_id"]] else segment["category_id"] - 5
            assert (stuff[mask] == label).all()
            assert segment["area"] == mask.sum() >= 60
            y, x = np.nonzero(mask)
            box = [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]
            assert segment["bbox"] == box
        assert len(things) == len(by_image[annotation["image_id"]])
        for thing, instance in zip(things, by_image[annotation["image_id"]], strict=True):
            rle = instance["segmentation"]
            decoded = mask_util.decode(rle).astype(bool)
            assert (decoded == (ids == thing["id"])).all()
            for key in ("category_id", "bbox", "area", "iscrowd"):
                assert instance[key] == thing[key]


def test_all_classes_occur_and_things_hide_each_other(scenes):
    panoptic = json.loads((scenes / "panoptic_train.json").read_text())
    used = {s["category_id"] for a in panoptic["annotations"] for s in a["segments_info"]}
    assert used == {c["id"] for c in CATEGORIES}
    assert len(CATEGORIES) == len(THING_CLASSES) + len(STUFF_CLASSES)


@pytest.mark.parametrize(
    "damage",
    [
        lambda root: (root / "images/train/000003.jpg").unlink(),
        lambda root: (root / "panoptic_val/000002.png").write_bytes(b"half"),
        lambda root: (root / "version.json").unlink(),
        lambda root: (root / "version.json").write_text('{"version": 0, "files": {}}'),
        lambda root: (root / "version.json").write_text("[]"),
    ],
)
def test_a_damaged_or_older_set_is_made_anew(scenes, tmp_path, damage):
    root = tmp_path / "scenes"
    shutil.copytree(scenes, root)
    (tmp_path / "scenes.unfinished").mkdir()  # left by a run that was killed
    damage(root)
    ensure_scenes(root, FEW)
    assert digest(root) == digest(scenes)
    assert {p.name for p in tmp_path.iterdir()} == {"scenes", "scenes.lock"}


def test_a_whole_set_is_left_alone(scenes, monkeypatch):
    monkeypatch.setattr(
        "gn_practical.training.data.scenes._write_scenes", None
    )  # would raise if called
    ensure_scenes(scenes, FEW)


def test_a_folder_of_something_else_is_not_removed(tmp_path):
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "thesis.tex").write_text("years of work")
    with pytest.raises(DatasetError, match=r"something else.*thesis\.tex.*DETECTRON2_DATASETS"):
        ensure_scenes(tmp_path / "scenes", FEW)
    assert (tmp_path / "scenes" / "thesis.tex").read_text() == "years of work"


def test_a_root_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match=r"written to .*file/scenes.*DETECTRON2_DATASETS"):
        ensure_scenes(tmp_path / "file" / "scenes", FEW)


def test_ids_survive_their_colours():
    ids = np.array([[0, 1, 255], [256, 70_001, 2**24 - 1]])
    assert (rgb_to_id(id_to_rgb(ids)) == ids).all()


def test_a_scene_too_small_for_a_thing_is_stuff_alone(tmp_path):
    ensure_scenes(tmp_path / "scenes", {"train": 26}, size=64)
    found = json.loads((tmp_path / "scenes/instances_train.json").read_text())
    assert len({annotation["image_id"] for annotation in found["annotations"]}) < 26
