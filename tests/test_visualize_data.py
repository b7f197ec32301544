"""Pictures of data: what is annotated, what the loader makes of it, and the tool."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from PIL import Image
from test_evaluation_panoptic import random_truth, write_dataset

from gn_practical.training.config import load_cfg
from gn_practical.training.engine import Trainer
from gn_practical.training.evaluation import data_pictures
from gn_practical.training.evaluation.annotated import Classes, from_instances
from gn_practical.training.evaluation.data_pictures import draw_record, draw_sample
from gn_practical.training.evaluation.panels import Shape, draw_shapes

ROOT = Path(__file__).parents[1]
TOOL = str(ROOT / "tools/visualize_data.py")
CLASSES = Classes(
    Metadata(
        thing_classes=["cat", "dog"],
        thing_colors=[(255, 0, 0), (0, 255, 0)],
        stuff_classes=["things", "sky"],
        stuff_colors=[(0, 0, 0), (0, 0, 255)],
    )
)
BAR = 32  # px: of the titles


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run the tool in this process: importing Detectron2 anew takes seconds."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(TOOL, run_name="__main__")
        captured = capsys.readouterr()
        return end.value.code, captured.out, captured.err

    return run


@pytest.fixture
def files(tmp_path):
    """Write a panoptic set of six images; return its arguments for the tool and a config's keys."""
    (tmp_path / "set").mkdir()
    rng = np.random.default_rng(1)
    _, *paths = write_dataset(tmp_path / "set", [random_truth(rng) for _ in range(6)])
    images, pngs, panoptic, stuff, instances = paths
    entry = ("own", images, pngs, panoptic, stuff, instances)
    keys = ["DATASETS.COCO_PANOPTIC", repr([entry]), "DATASETS.TRAIN", "('own_separated',)"]
    return ["--panoptic", panoptic, pngs, "--images", images], keys, instances


# ---- drawing ----


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_a_sample_without_targets_is_the_tensor_that_the_model_gets(image_format):
    rgb = np.random.default_rng(0).integers(0, 256, (200, 600, 3), dtype=np.uint8)
    array = rgb if image_format == "RGB" else rgb[:, :, ::-1].copy()
    sample = {"image": torch.from_numpy(array.transpose(2, 0, 1).copy())}
    picture = draw_sample(sample, CLASSES, image_format)
    assert np.array_equal(picture[BAR:], rgb)
    sample["image"] = sample["image"].float()
    assert np.array_equal(draw_sample(sample, CLASSES, image_format), picture)


@pytest.mark.parametrize("kind", ["bitmask", "polygon"])
def test_targets_of_a_sample_are_drawn_in_their_places(kind):
    instances = Instances((300, 600))
    instances.gt_boxes = Boxes([[100.0, 50.0, 200.0, 150.0], [400.0, 100.0, 500.0, 250.0]])
    instances.gt_classes = torch.tensor([0, 1])
    corners = [[100, 50, 200, 50, 200, 150, 100, 150], [400, 100, 500, 100, 500, 250, 400, 250]]
    instances.gt_masks = PolygonMasks([[np.array(each, float)] for each in corners])
    if kind == "bitmask":
        instances.gt_masks = BitMasks.from_polygon_masks(instances.gt_masks, 300, 600)
    labels = torch.full((300, 600), 255)
    labels[:40] = 1
    sample = {"image": torch.full((3, 300, 600), 100), "instances": instances, "sem_seg": labels}
    picture = draw_sample(sample, CLASSES, "RGB").astype(int)
    assert picture.shape == (300 + BAR, 600 * 2 + 8, 3)
    panel, stuff = picture[BAR:, :600], picture[BAR:, 608:]
    assert np.abs(panel[120, 150] - (177, 50, 50)).max() <= 2  # half cat, half picture
    assert np.abs(panel[200, 450] - (50, 177, 50)).max() <= 2
    assert (panel[250, 300] == 100).all()
    assert np.abs(stuff[5, 5] - (50, 50, 177)).max() <= 2
    assert (stuff[100, 300] == 100).all()


def test_texts_do_not_cover_each_other_and_small_pictures_are_enlarged():
    pixels = np.zeros((50, 50, 3), np.uint8)
    boxes = [[10.0, 10.0, 40.0, 40.0 - i] for i in range(3)]
    one, three = (
        draw_shapes(pixels, [Shape("$x$ ü", (255, 0, 0), None, b) for b in some], CLASSES.metadata)
        for some in (boxes[:1], boxes)
    )
    assert one.shape == three.shape == (512, 512, 3)

    def letters(picture):
        return int((picture[..., 1] > 50).sum())  # boxes have no green

    assert letters(three) > 2.5 * letters(one) > 100


def test_a_rotated_box_is_drawn_around_its_centre():
    pixels = np.zeros((300, 600, 3), np.uint8)
    shape = Shape("", (255, 0, 0), None, [300.0, 150.0, 200.0, 100.0, 90.0])
    drawn = draw_shapes(pixels, [shape], CLASSES.metadata)[..., 0] > 50
    rows, columns = np.nonzero(drawn)
    edges = (columns.min(), columns.max(), rows.min(), rows.max())
    assert edges == pytest.approx((250, 350, 50, 250), abs=4)


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (900, 1), (3, 2)])
def test_pictures_of_a_pixels_width(tmp_path, size):
    Image.new("L", size, 99).save(tmp_path / "thin.png")
    record = {"file_name": str(tmp_path / "thin.png"), "image_id": 1}
    box = {"bbox": [0, 0, 1, 1], "bbox_mode": 1, "category_id": 1}
    picture = draw_record({**record, "annotations": [box]}, CLASSES)
    assert 100 < max(picture.shape) < 1100


def test_keypoints_and_crowds_are_drawn(tmp_path):
    Image.new("RGB", (600, 300)).save(tmp_path / "a.png")
    points = [100, 100, 2, 200, 200, 2]
    annotation = {"id": 1, "image_id": 1, "category_id": 5, "bbox": [50, 50, 200, 200], "area": 9}
    rle = {"size": [300, 600], "counts": [300 * 400, 300 * 100, 300 * 100]}
    crowd = {**annotation, "id": 2, "iscrowd": 1, "segmentation": rle}
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 600, "height": 300}],
        "annotations": [{**annotation, "iscrowd": 0, "keypoints": points}, crowd],
        "categories": [{"id": 5, "name": "cat"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    images = from_instances(str(tmp_path / "a.json"), str(tmp_path))
    picture = draw_record(images.records[0], images.classes)[BAR:]
    assert picture[150, 450].any()
    assert picture[200, 200].any()
    assert not picture[290, 100].any()


# ---- the tool ----


def test_annotations_of_files_and_of_a_config(tool, files, tmp_path, catalogs_as_before):
    arguments, keys, instances = files
    code, printed, _ = tool(*arguments, "--output", tmp_path / "a", "--num", 2)
    assert (code, printed) == (0, f"2 pictures in {tmp_path / 'a'}\n")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["001.jpg", "002.jpg"]
    config = ["--config-file", ROOT / "configs/quickstart/tiny.yaml", "--output-dir"]
    code, _, _ = tool(*config, tmp_path / "b", "--image-ids", "005.jpg", "3", *keys)
    assert code == 0
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["003.jpg", "005.jpg"]
    widths = [Image.open(tmp_path / each).width for each in ("a/001.jpg", "b/003.jpg")]
    assert widths[1] == 3 * widths[0] + 16  # instances, panoptic, stuff
    options = ["--instances", instances, *arguments[3:], "--output"]
    samples = [["--seed", "1", "--num", "3"], ["--seed", "1", "--num", "3"], ["--num", "0"]]
    names = []
    for number, sample in enumerate(samples):
        assert tool(*options, tmp_path / str(number), *sample)[0] == 0
        names.append(sorted(p.name for p in (tmp_path / str(number)).iterdir()))
    assert names[0] == names[1] != names[2][:3]
    assert len(names[2]) == 6


def test_the_loader_shows_what_training_is_fed_with(tool, files, tmp_path, catalogs_as_before):
    _, keys, _ = files
    path = ROOT / "configs/quickstart/tiny.yaml"
    opts = [*keys, "SEED", "5", "DATALOADER.NUM_WORKERS", "0", "MODEL.DEVICE", "cpu"]
    options = ["--config-file", path, "--source", "loader", "--num", 5, "--seed", 5, "--output"]
    code, _, _ = tool(*options, tmp_path / "a", *keys)
    assert code == 0
    names = sorted(p.stem for p in (tmp_path / "a").iterdir())
    cfg = load_cfg(str(path), opts)
    batches = iter(Trainer.build_train_loader(cfg))
    samples = [sample for _ in range(3) for sample in next(batches)][:5]
    fed = [f"{i:04d}_{Path(each['file_name']).stem}" for i, each in enumerate(samples, start=1)]
    assert names == fed
    expected = draw_sample(samples[3], Classes(_metadata("own_separated")), cfg.INPUT.FORMAT)
    drawn = np.asarray(Image.open(tmp_path / "a" / f"{fed[3]}.jpg")).astype(int)
    assert np.abs(drawn - expected).mean() < 4  # of JPEG


def _metadata(name):
    from detectron2.data import MetadataCatalog

    return MetadataCatalog.get(name)


def test_a_bad_file_is_named_and_the_rest_is_drawn(tool, files, tmp_path):
    arguments, _, _ = files
    images = Path(arguments[-1])
    (images / "002.jpg").write_text("text")
    Image.new("RGB", (9, 9)).save(images / "003.jpg")
    Path(arguments[2], "004.png").unlink()
    code, printed, error = tool(*arguments, "--output", tmp_path / "a")
    assert code == 1
    assert printed == f"3 pictures in {tmp_path / 'a'}, 3 could not be drawn\n"
    lines = error.splitlines()
    assert len(lines) == 3
    assert "002.jpg: cannot identify" in lines[0]
    assert "003.jpg of 9x9 for 56x40" in lines[1]
    assert "004.png" in lines[2]


def test_ctrl_c_keeps_what_was_drawn(tool, files, tmp_path, monkeypatch):
    draw = data_pictures.draw_record

    def interrupted(record, classes):
        if record["image_id"] == 3:
            raise KeyboardInterrupt
        return draw(record, classes)

    monkeypatch.setattr(data_pictures, "draw_record", interrupted)
    code, printed, _ = tool(*files[0], "--output", tmp_path / "a")
    assert (code, printed) == (130, f"2 pictures in {tmp_path / 'a'}\n")


def test_wrong_places_are_one_line(tool, files, tmp_path, monkeypatch):
    arguments, _, _ = files
    code, _, _ = tool(*arguments, "--output", arguments[-1])
    assert "another folder than that of the images" in code
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert "must have a display" in tool(*arguments, "--show")[0]
    code, _, _ = tool(*arguments, "--output", tmp_path / "a", "--image-ids", "001.jpg", "x")
    assert "got x. It has 6 images, such as 001.jpg." in code
    broken = tmp_path / "broken.json"
    options = ["--instances", broken, "--images", tmp_path, "--output", tmp_path / "b"]
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}
    broken.write_text(json.dumps(content))
    assert "must have images, got none in" in tool(*options)[0]
    content["images"] = [{"id": 1, "file_name": "a.jpg", "width": 5, "height": 5}]
    content["annotations"] = [{"id": 1, "image_id": 1, "bbox": [0, 0, 1, 1]}]
    broken.write_text(json.dumps(content))
    code, _, _ = tool(*options)
    assert code.startswith("error: a data set must be sound, got KeyError: 'category_id' in ")
    assert "tools/validate_dataset.py" in code


def test_arguments_are_checked_before_anything_is_imported():
    for words, expected in (
        ([], "--config-file"),
        (["--instances", "a"], "--images"),
        (["--config-file", "a", "--source", "loader", "--num", "0"], "endless"),
        (["--instances", "a", "--images", "b", "SEED", "1"], "overrides need --config-file"),
    ):
        command = [sys.executable, "-X", "importtime", TOOL, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert expected in done.stderr
        assert " torch\n" not in done.stderr
