import json
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
    check_datasets,
    checks,
    ensure_scenes,
    file_checks,
    register_datasets,
    registration,
)

pytestmark = pytest.mark.usefixtures("catalogs_as_before")

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


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
        ("INPUT.MASK_FORMAT", "polygon", r"INPUT\.MASK_FORMAT must be 'bitmask' .*got 'polygon'"),
        (
            "DATASETS.TRAIN",
            ("coco_2017_train",),
            r"PanopticFPN must have stuff labels, got 'coco_2017_train'",
        ),
    ],
)
def test_configs_that_do_not_fit(cfg, monkeypatch, key, value, message):
    monkeypatch.setattr(checks, "check_files_exist", lambda name: None)  # COCO is not there
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
            r"got 1 missing: 000002\.png\. Run: python tools/prepare",
        ),
        (
            lambda r: (r / "panoptic_train/000001.png").unlink(),
            r"All 3 files .*panoptic_train\.json lists.* got 1 missing: 000001\.png",
        ),
        (
            lambda r: [path.unlink() for path in (r / "images/train").iterdir()],
            r"got 3 missing: 000001\.jpg, 000002\.jpg, 000003\.jpg\. Copy them there",
        ),
        (
            lambda r: Image.new("L", (64, 64), 9).save(r / "panoptic_stuff_train/000001.png"),
            r"000001\.png must have labels below 5.*got 9\. .* --overwrite",
        ),
        (
            lambda r: (r / "instances_train.json").write_text('{"images": []'),
            r"instances_train\.json must be valid json, got an error at line 1, column 14",
        ),
        (
            lambda r: edit(r / "instances_train.json", lambda c: c.pop("images")),
            r"must have a list 'images' at its top level",
        ),
        (
            lambda r: edit(
                r / "instances_train.json", lambda c: c["annotations"][0].update(category_id=77)
            ),
            r"instances_train\.json must use only ids of its categories, got category_id=77; the 5",
        ),
        (
            lambda r: edit(
                r / "panoptic_train.json",
                lambda c: c["annotations"][0]["segments_info"][0].update(category_id=77),
            ),
            r"panoptic_train\.json must use only ids of its categories, got category_id=77",
        ),
        (
            lambda r: edit(r / "instances_train.json", lambda c: c["annotations"][1].update(id=1)),
            r"must have ids of their own",
        ),
        (
            lambda r: edit(r / "instances_train.json", lambda c: c["annotations"][1].pop("bbox")),
            r"Every annotation in .*got number 1 without bbox",
        ),
        (
            lambda r: edit(
                r / "instances_train.json", lambda c: c["annotations"][1].pop("segmentation")
            ),
            r"segmentation while MODEL\.MASK_ON is True, got 1 of \d+ without",
        ),
        (
            lambda r: edit(r / "instances_train.json", lambda c: c["annotations"].clear()),
            r"must have an image with an instance .*got none in 3 images",
        ),
        (
            lambda r: edit(
                r / "instances_train.json", lambda c: c["categories"][0].update(name="moon")
            ),
            r"must name category id=1 .*'disc', got 'moon'",
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
    monkeypatch.setattr(file_checks, "DATASETS_ROOT", root)
    if Path(root, "coco").exists():
        pytest.skip("COCO is there")
    cfg.DATASETS.TRAIN = ("coco_2017_train_panoptic_separated",)
    with pytest.raises(DatasetError, match=r"Download COCO .*DETECTRON2_DATASETS.*it is not set"):
        check(cfg)


def test_coco_stuff_pngs_are_made_by_the_tool_without_arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(file_checks, "DATASETS_ROOT", str(tmp_path))
    path = str(tmp_path / "coco/panoptic_stuff_val2017")
    metadata = MetadataCatalog.get("coco_2017_val_panoptic_separated")
    way_out = file_checks.way_out("sem_seg_root", path, metadata)
    assert way_out == "Run: python tools/prepare_panoptic_coco.py"


def test_the_scenes_are_drawn_when_a_run_uses_them(cfg, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(checks, "ensure_scenes", drawn.append)
    check(cfg)
    assert not drawn
    registration.register_scenes()
    cfg.DATASETS.TRAIN = ("scenes_train_panoptic_separated",)
    cfg.DATASETS.TEST = ("scenes_val_panoptic_separated",)
    monkeypatch.setattr(checks, "_check_all", lambda *args: None)
    check(cfg)
    assert drawn == [registration.SCENES_ROOT]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_real_data_passes():
    cfg = get_cfg()
    add_pgn_config(cfg)
    add_training_config(cfg)
    tiny, cells = SHARED / "coco_panoptic_tiny", SHARED / "bccd"
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
    with pytest.raises(DatasetError, match=r"got 2804 of 2804 without.*MODEL\.MASK_ON False"):
        check_datasets(cfg)
