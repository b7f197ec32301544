import json
import os
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.data import (
    MetadataCatalog,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from PIL import Image

from gn_practical import add_pgn_config
from gn_practical.training import add_training_config
from gn_practical.training.data import (
    CheckedDatasetMapper,
    DatasetError,
    ensure_scenes,
    register_datasets,
    registration,
)
from gn_practical.training.validation import check_datasets, start

pytestmark = pytest.mark.usefixtures("catalogs_as_before")

TEST_DATA = Path(os.environ.get("GN_PRACTICAL_TEST_DATA", "not given"))


@pytest.fixture
def root(tmp_path):
    """A user's own data; some scenes, small and few."""
    ensure_scenes(tmp_path / "own", {"train": 3, "val": 2}, size=64)
    return tmp_path / "own"


@pytest.fixture
def cfg(root):
    """A panoptic FPN for that data."""
    cfg = get_cfg()
    add_pgn_config(cfg)
    add_training_config(cfg)
    cfg.DATASETS.COCO_PANOPTIC = tuple(
        (
            f"own_{split}",
            str(root / f"images/{split}"),
            str(root / f"panoptic_{split}"),
            str(root / f"panoptic_{split}.json"),
            str(root / f"panoptic_stuff_{split}"),
            str(root / f"instances_{split}.json"),
        )
        for split in ("train", "val")
    )
    cfg.DATASETS.TRAIN = ("own_train_separated",)
    cfg.DATASETS.TEST = ("own_val_separated",)
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 5
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 5
    cfg.INPUT.MASK_FORMAT = "bitmask"
    return cfg


def check(cfg, **kwargs):
    register_datasets(cfg)
    check_datasets(cfg, **kwargs)


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_sound_data_passes_and_feeds_a_loader(cfg):
    check(cfg)
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.DATALOADER.NUM_WORKERS = 0
    loader = build_detection_train_loader(cfg, mapper=CheckedDatasetMapper(cfg, True))
    batch = next(iter(loader))
    assert {"image", "sem_seg", "instances"} <= batch[0].keys()
    assert batch[0]["instances"].gt_masks.tensor.any()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("DATASETS.TRAIN", (), r"DATASETS\.TRAIN must name at least one data set"),
        (
            "DATASETS.TRAIN",
            ("own_trian_separated",),
            r"registered, got 'own_trian_separated'\. Names close to it: own_train_separated",
        ),
        ("DATASETS.TEST", ("own_val",), r"got 'own_val'\. Names close to it: own_val_separated\."),
        (
            "MODEL.ROI_HEADS.NUM_CLASSES",
            80,
            r"thing classes of data set 'own_train_separated', 5, got 80\. "
            r"Add the override: MODEL\.ROI_HEADS\.NUM_CLASSES 5",
        ),
        (
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
            54,
            r"'own_train_separated', 5, got 54\. Add the override: MODEL\.SEM_SEG_HEAD",
        ),
        (
            "INPUT.MASK_FORMAT",
            "polygon",
            r"RLE but no bitmask .*override: INPUT\.MASK_FORMAT bitmask",
        ),
        (
            "DATASETS.TRAIN",
            ("coco_2017_train",),
            r"PanopticFPN must have stuff labels, got 'coco_2017_train'",
        ),
    ],
)
def test_configs_that_do_not_fit(cfg, monkeypatch, key, value, message):
    monkeypatch.setattr(start, "_missing_paths", lambda metadata: ())  # COCO is not there
    cfg.merge_from_list([key, value])
    with pytest.raises(DatasetError, match=message):
        check(cfg)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda r: (r / "instances_train.json").unlink(),
            r"instances json of data set 'own_train_separated' must exist, got \S+instances_train",
        ),
        (lambda r: (r / "panoptic_train.json").unlink(), r"panoptic json .* must exist"),
        (
            lambda r: (r / "panoptic_stuff_train").rename(r / "elsewhere"),
            r"stuff PNGs .*Run: python tools/prepare_panoptic_coco\.py --panoptic-json \S+ "
            r"--panoptic-root \S+panoptic_train --output \S+panoptic_stuff_train",
        ),
        (
            lambda r: (r / "panoptic_stuff_train/000002.png").unlink(),
            r"stuff PNG missing \(1\).*000002\.png .*Run: python tools/prepare\S+ --panoptic-json",
        ),
        (
            lambda r: (r / "panoptic_train/000001.png").unlink(),
            r"panoptic_train\.json: panoptic PNG missing \(1\).*000001\.png",
        ),
        (
            lambda r: [path.unlink() for path in (r / "images/train").iterdir()],
            r"image missing \(3\).*000001\.jpg.* Copy the images there",
        ),
        (
            lambda r: Image.new("L", (64, 64), 9).save(r / "panoptic_stuff_train/000001.png"),
            r"stuff PNG label unknown.*000001\.png.*: 9; there are 5 stuff.*Run: python tools",
        ),
        (
            lambda r: (r / "instances_train.json").write_text('{"images": []'),
            r"instances_train\.json must be valid json, got an error at line 1, column 14",
        ),
        (
            lambda r: edit(r / "instances_train.json", lambda c: c.pop("images")),
            r"json unusable .*no list images among its keys",
        ),
        (
            lambda r: edit(
                r / "instances_train.json", lambda c: c["annotations"][0].update(category_id=77)
            ),
            r"instances_train\.json: category unknown \(1\).*category_id=77",
        ),
        (
            lambda r: edit(
                r / "panoptic_train.json",
                lambda c: c["annotations"][0]["segments_info"][0].update(category_id=77),
            ),
            r"panoptic_train\.json: category unknown \(1\).*category_id=77",
        ),
        (
            lambda r: edit(r / "instances_train.json", lambda c: c["annotations"][1].update(id=1)),
            r"annotation id twice \(1\).*Number the annotations anew",
        ),
        (
            lambda r: edit(r / "instances_train.json", lambda c: c["annotations"][1].pop("bbox")),
            r"annotation malformed \(1\).*it lacks bbox",
        ),
        (
            lambda r: edit(
                r / "instances_train.json", lambda c: c["annotations"][1].pop("segmentation")
            ),
            r"mask missing \(1\).*override: MODEL\.MASK_ON False",
        ),
        (
            lambda r: edit(r / "instances_train.json", lambda c: c["annotations"].clear()),
            r"nothing to train on .*no image has an instance",
        ),
        (
            lambda r: edit(
                r / "instances_train.json", lambda c: c["categories"][0].update(name="moon")
            ),
            r"category of another name .*id=1 is 'moon', not 'disc'",
        ),
        (
            lambda r: edit(
                r / "panoptic_val.json", lambda c: c["categories"][5].update(name="fog")
            ),
            r"same stuff classes, .*differ in class 1: 'sky' and 'fog'",
        ),
    ],
)
def test_damaged_data(cfg, root, damage, message):
    damage(root)
    with pytest.raises(DatasetError, match=message) as error:
        check(cfg)
    assert "\n" not in str(error.value)


def test_all_that_is_wrong_comes_in_one_error(cfg, root):
    (root / "panoptic_val.json").unlink()
    (root / "images/train/000001.jpg").unlink()
    edit(root / "instances_train.json", lambda c: c["annotations"][0].update(category_id=77))
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    with pytest.raises(DatasetError, match=r"^The data must be sound, got \d errors:\n  1\. ") as e:
        check(cfg)
    for part in ("panoptic_val.json", "NUM_CLASSES 5", "image missing", "category_id=77"):
        assert part in str(e.value)


@pytest.mark.parametrize("other", ["instances", "panoptic"])
def test_jsons_of_different_images_are_refused(cfg, root, other):
    extra = {"id": 99, "file_name": "000001.jpg", "width": 64, "height": 64}
    edit(root / f"{other}_train.json", lambda c: c["images"].append(extra))
    if other == "panoptic":
        png = {"image_id": 99, "file_name": "000001.png", "segments_info": []}
        edit(root / "panoptic_train.json", lambda c: c["annotations"].append(png))
    with pytest.raises(DatasetError, match=r"images differ \(1\).*image 99.*list the same images"):
        check(cfg)


def test_what_training_can_take_is_warned_of(cfg, root, caplog):
    edit(root / "instances_train.json", lambda c: c["annotations"][0].update(bbox=[0, 0, 9, 0]))
    check(cfg)
    assert "box empty (1)" in caplog.text


def test_evaluation_needs_the_test_sets_alone(cfg, root):
    for path in (root / "images/train").iterdir():
        path.unlink()
    (root / "panoptic_train.json").unlink()
    check(cfg, eval_only=True)
    cfg.DATASETS.TEST = ()
    with pytest.raises(DatasetError, match=r"DATASETS\.TEST must name at least one"):
        check(cfg, eval_only=True)


def test_coco_says_where_it_is_looked_for(cfg, monkeypatch):
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    for name in ("coco_2017_train", "coco_2017_val"):
        root = MetadataCatalog.get(name).image_root.removesuffix(f"/coco/{name[10:]}2017")
    monkeypatch.setattr(start, "DATASETS_ROOT", root)
    if Path(root, "coco").exists():
        pytest.skip("COCO is there")
    cfg.DATASETS.TRAIN = ("coco_2017_train_panoptic_separated",)
    with pytest.raises(DatasetError, match=r"Download COCO .*DETECTRON2_DATASETS.*it is not set"):
        check(cfg)


def test_coco_stuff_pngs_are_made_by_the_tool_without_arguments(cfg, tmp_path, monkeypatch):
    metadata = MetadataCatalog.get("coco_2017_val_panoptic_separated")
    coco = os.path.dirname(metadata.panoptic_root)
    monkeypatch.setattr(start, "DATASETS_ROOT", os.path.dirname(coco))
    cfg.DATASETS.TRAIN = ("coco_2017_val_panoptic_separated",)
    with pytest.raises(DatasetError, match=r"Run: python tools/prepare_panoptic_coco\.py(\n|$)"):
        check(cfg)


def test_the_scenes_are_drawn_when_a_run_uses_them(cfg, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(registration, "ensure_scenes", drawn.append)
    check(cfg)
    assert not drawn
    registration.register_scenes()
    cfg.DATASETS.TRAIN = ("scenes_train_panoptic_separated",)
    cfg.DATASETS.TEST = ("scenes_val_panoptic_separated",)
    monkeypatch.setattr(start, "_problems", lambda *args: ())
    check(cfg)
    assert drawn == [registration.SCENES_ROOT]


@pytest.mark.skipif(
    not TEST_DATA.is_dir(), reason="GN_PRACTICAL_TEST_DATA names no folder of real data"
)
def test_real_data_passes():
    cfg = get_cfg()
    add_pgn_config(cfg)
    add_training_config(cfg)
    tiny, cells = TEST_DATA / "coco_panoptic_tiny", TEST_DATA / "bccd"
    cfg.DATASETS.COCO_PANOPTIC = tuple(
        (
            f"tiny_{split}",
            str(tiny / split),
            str(tiny / f"panoptic_{split}"),
            str(tiny / f"panoptic_{split}.json"),
            str(tiny / f"panoptic_{split}"),  # in place of stuff PNGs
            str(tiny / f"instances_{split}.json"),
        )
        for split in ("train", "val")
    )
    cfg.DATASETS.COCO_INSTANCES = tuple(
        (f"bccd_{split}", str(cells / "images"), str(cells / f"instances_{split}.json"))
        for split in ("train", "val")
    )
    register_datasets(cfg)
    metadata = MetadataCatalog.get("tiny_train_separated")
    assert (len(metadata.thing_classes), len(metadata.stuff_classes)) == (91, 92)
    dicts = get_detection_dataset_dicts(["tiny_train_separated"])
    assert len(dicts) == 13
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("bccd_train",), ("bccd_val",)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    check_datasets(cfg)
    cfg.MODEL.MASK_ON = True
    with pytest.raises(DatasetError, match=r"mask missing \(2804\).*MODEL\.MASK_ON False"):
        check_datasets(cfg)
