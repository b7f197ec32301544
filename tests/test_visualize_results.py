"""Predictions beside the ground truth: the matching, the files that do not fit, and the tool."""

import csv
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_evaluation_panoptic import (
    HEIGHT,
    WIDTH,
    perturbed,
    random_truth,
    register,  # noqa: F401 (a fixture)
    to_detectron2,
    write_dataset,
)

from gn_practical.training.data import DatasetError
from gn_practical.training.data.coco_format import id_to_rgb
from gn_practical.training.evaluation import PanopticEvaluator, annotated, result_pictures
from gn_practical.training.evaluation.matching import match_instances
from gn_practical.training.evaluation.result_files import find_predictions, read_predictions

TOOL = str(Path(__file__).parents[1] / "tools/visualize_results.py")
NAME = 'c"at</script> $x$ ü'  # what a stranger may call a class


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
def evaluated(register, tmp_path):  # noqa: F811
    """Predict a random set; its images, the folder of the predictions, what the evaluator says."""
    rng = np.random.default_rng(3)
    truths = [random_truth(rng) for _ in range(12)]
    name, inputs = register(truths)
    evaluator = PanopticEvaluator(name, str(tmp_path / "inference"))
    for image, truth in zip(inputs, truths, strict=True):
        ids, segments = perturbed(rng, *truth)
        output = {"panoptic_seg": (torch.from_numpy(ids), to_detectron2(segments))}
        evaluator.process([image], [output])
    results = evaluator.evaluate()["panoptic_seg"]
    return annotated.from_catalog([name]), tmp_path / "inference", results


# ---- matching ----


def test_the_segments_of_all_images_together_give_the_evaluators_numbers(evaluated):
    images, folder, expected = evaluated
    predictions = read_predictions(find_predictions(str(folder), images), images)
    results = [result_pictures.measure(record, predictions, 0.5) for record in images.records]
    whole = result_pictures.whole_quality(results)
    assert 0 < whole["PQ"] < 100
    assert whole == pytest.approx({key: expected[key] for key in whole}, rel=1e-12)
    for result in results:  # what is counted is what is named
        tallies = sum(result.matches.tallies.values())
        named = (result.matches.pairs, result.matches.wrong, result.matches.missed)
        assert list(tallies[1:]) == [len(each) for each in named]


@pytest.mark.parametrize("seed", range(3))
def test_detections_match_as_in_pycocotools(seed):
    rng = np.random.default_rng(seed)

    def entries(count, **more):
        corner, size = rng.uniform(0, 60, (count, 2)), rng.uniform(10, 40, (count, 2))
        boxes = np.concatenate([corner, size], 1).round().tolist()
        return [
            {
                "bbox": box,
                "category_id": int(rng.integers(1, 3)),
                "id": i + 1,
                "image_id": 1,
                **more,
            }
            | {"area": box[2] * box[3]}
            for i, box in enumerate(boxes)
        ]

    truth = [{**t, "iscrowd": int(rng.random() < 0.2)} for t in entries(12)]
    moved = [{**t, "bbox": [t["bbox"][0] + 2, *t["bbox"][1:]]} for t in truth[:8]]
    found = [{**d, "score": float(rng.random())} for d in [*moved, *moved[:3], *entries(9)]]
    matches = match_instances(truth, found)
    coco = COCO()
    categories = [{"id": 1}, {"id": 2}]
    coco.dataset = {"images": [{"id": 1}], "categories": categories, "annotations": truth}
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes([dict(d) for d in found]), "bbox")
    evaluation.params.iouThrs, evaluation.params.areaRng = np.array([0.5]), [[0, 1e5]]
    evaluation.params.areaRngLbl = ["all"]
    evaluation.evaluate()
    counts = np.zeros(3, int)
    for image in filter(None, evaluation.evalImgs):
        counted = ~image["dtIgnore"][0]
        right = (image["dtMatches"][0] > 0) & counted
        missed = (image["gtMatches"][0] == 0) & (image["gtIgnore"] == 0)
        counts += (right.sum(), (counted & ~right).sum(), missed.sum())
    ours = [len(matches.pairs), len(matches.wrong), len(matches.missed)]
    assert ours == counts.tolist()
    assert min(ours) > 0


def test_an_image_without_anything_has_no_quality_and_comes_last():
    values = [50.0, math.nan, 0.0]

    class Fake(tuple):
        record = property(lambda self: {"file_name": str(self[0])})
        values = property(lambda self: {"PQ": self[0], "missed": self[0]})

    results = [Fake([value]) for value in values]
    assert [each[0] for each in result_pictures.ranked(results, "PQ")][:2] == [0.0, 50.0]
    assert [each[0] for each in result_pictures.ranked(results, "missed")][:2] == [50.0, 0.0]
    assert math.isnan(match_instances([], []).quality()["PQ"])


def test_a_class_has_one_colour_on_both_sides(register):  # noqa: F811
    rng = np.random.default_rng(0)
    name, _ = register([random_truth(rng, crowds=False) for _ in range(3)])
    images = annotated.from_catalog([name])
    metadata = images.classes.metadata
    predictions = read_predictions(metadata.panoptic_json, images, metadata.panoptic_root)
    for record in images.records:
        result = result_pictures.measure(record, predictions, 0.5)
        assert result.values["PQ"] == 100
        picture = result_pictures.draw_result(result, predictions, images.classes)[32:]
        width = (picture.shape[1] - 8) // 2
        assert np.array_equal(picture[:, :width], picture[:, -width:])
        assert len(np.unique(picture)) > 10


def test_of_two_files_the_one_that_the_data_set_can_be_compared_with_is_taken(evaluated, tmp_path):
    images, folder, _ = evaluated
    (folder / "coco_instances_results.json").write_text("[]")
    alone = images._replace(records=[{"file_name": "a", "annotations": []}])

    def found(*options):
        return Path(find_predictions(str(tmp_path), *options)).name

    assert found(images) == found(alone, "panoptic") == "predictions.json"
    assert found(alone) == found(images, "instances") == "coco_instances_results.json"
    (folder / "predictions.json").unlink()
    assert found(images) == "coco_instances_results.json"
    with pytest.raises(DatasetError, match=r"a folder with predictions.json, got .* with data"):
        found(images, "panoptic")


# ---- files that do not fit ----


def rewritten(folder, change, name="predictions.json"):
    path = folder / name
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return str(path)


def unknown_image(content):
    content["annotations"][3]["image_id"] = "003"


def unknown_class(content):
    content["annotations"][0]["segments_info"][0]["category_id"] = 99


def predicted_twice(content):
    content["annotations"].append(content["annotations"][0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (unknown_image, r"12 images of eval_test_separated .*image_id='003' .* --dataset"),
        (unknown_class, r"among the 6 of eval_test_separated, got category_id=99 of image_id=1"),
        (predicted_twice, r"must be predicted once, got image_id=1 twice"),
        (lambda content: content.clear(), r"must be a list of instances or a panoptic json"),
    ],
)
def test_a_json_of_another_data_set_is_one_error(evaluated, change, message):
    images, folder, _ = evaluated
    with pytest.raises(DatasetError, match=message):
        read_predictions(rewritten(folder, change), images)


def test_pngs_of_another_run_are_one_error(evaluated):
    images, folder, _ = evaluated
    path, png = str(folder / "predictions.json"), folder / "panoptic" / "001.png"
    Image.fromarray(id_to_rgb(np.full((HEIGHT, WIDTH), 77))).save(png)
    predictions = read_predictions(path, images)
    with pytest.raises(DatasetError, match=r"001.png, got id=1 of image_id=1 in the json alone"):
        result_pictures.measure(images.records[0], predictions, 0.5)
    Image.new("RGB", (WIDTH, 7)).save(png)
    with pytest.raises(
        DatasetError, match=rf"image_id=1 must be {WIDTH}x{HEIGHT} .* got {WIDTH}x7"
    ):
        read_predictions(path, images)
    png.unlink()
    with pytest.raises(DatasetError, match=r"image_id=1 .* No such file"):
        read_predictions(path, images)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"category_id": 3, "score": 1, "bbox": [0, 0, 1, 1]}, "entry 1 .* without image_id"),
        ({"image_id": 1, "category_id": 3, "score": 1}, "entry 1 .* without bbox"),
        ({"image_id": 77, "category_id": 3, "score": 1, "bbox": [0, 0, 1, 1]}, "image_id=77"),
        (
            {"image_id": 1, "category_id": "3", "score": 1, "bbox": []},
            "category_id='3' of image_id=1",
        ),
        ({"image_id": 1, "category_id": 3, "score": "1", "bbox": []}, "score='1'"),
        ({"image_id": 1, "category_id": 3, "score": 1, "bbox": [1, 2]}, r"bbox=\[1, 2\] of"),
        (
            {"image_id": 1, "category_id": 3, "score": 1, "segmentation": {"size": [5, 5]}},
            r"size=\[5, 5\] of image_id=1",
        ),
        (7, "entry 1"),
    ],
)
def test_instances_that_do_not_fit_are_one_error(evaluated, tmp_path, entry, message):
    images, path = evaluated[0], tmp_path / "found.json"
    sound = {"image_id": 2, "category_id": 7, "score": 0.5, "bbox": [0, 0, 5, 5]}
    path.write_text(json.dumps([sound, entry]))
    with pytest.raises(DatasetError, match=message):
        read_predictions(str(path), images)


# ---- the tool ----


def test_the_tool_puts_the_worst_first(evaluated, tool, tmp_path):
    output = tmp_path / "worst"
    options = ["--input", tmp_path, "--output", output, "--dataset", "eval_test_separated"]
    code, printed, error = tool(*options, "--num", 3)
    assert (code, error) == (0, "")
    assert f"PQ {evaluated[2]['PQ']:.2f}" in printed
    rows = list(csv.DictReader((output / "index.csv").open()))
    values = [float(row["PQ"]) for row in rows]
    assert len(rows) == 12
    assert values == sorted(values)
    assert values[0] < values[-1]
    pictures = sorted(path.name for path in output.glob("*.jpg"))
    assert pictures == [row["picture"] for row in rows[:3]]
    assert pictures[0].startswith(f"0001_PQ{values[0]:.1f}_")
    page = (output / "index.html").read_text()
    assert page.count("<img") == 3
    assert all(name in page for name in pictures)


def write_odd_instances(folder):
    """A set with texts as ids, an image of one pixel's width, and predictions of half of it."""
    (folder / "images").mkdir(parents=True)
    sizes = {"a": (1, 50), "b c": (90, 60), "ü": (3, 2), "d": (60, 60)}
    images, annotations = [], []
    for name, (width, height) in sizes.items():
        Image.new("RGB" if name != "d" else "CMYK", (width, height)).save(
            folder / "images" / f"{name}.jpg"
        )
        images.append({"id": name, "file_name": f"{name}.jpg", "width": width, "height": height})
    box = {"bbox": [5, 5, 40, 40], "area": 1600, "iscrowd": 0, "category_id": 4}
    annotations = [{**box, "id": 1, "image_id": "b c"}, {**box, "id": 2, "image_id": "d"}]
    categories = [{"id": 4, "name": NAME}, {"id": 9, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(content))
    found = [
        {"image_id": "b c", "category_id": 4, "bbox": [6, 5, 40, 40], "score": 0.9},
        {"image_id": "b c", "category_id": 9, "bbox": [6, 5, 40, 40], "score": 0.2},
    ]
    (folder / "found.json").write_text(json.dumps(found))
    truth = ["--instances", folder / "truth.json", "--images", folder / "images"]
    return ["--input", folder / "found.json", *truth]


def test_whatever_ids_names_and_sizes_there_are(tool, tmp_path):
    arguments = write_odd_instances(tmp_path / "odd")
    code, _, error = tool(*arguments, "--output", tmp_path / "out")
    assert (code, error) == (0, "")
    rows = list(csv.DictReader((tmp_path / "out/index.csv").open(encoding="utf-8")))
    assert [row["image_id"] for row in rows[:2]] == ["d", "b c"]
    assert rows[0]["PQ"] == "0.0"
    assert float(rows[1]["PQ"]) == pytest.approx(100 * 39 / 41, abs=0.01)
    assert [row["PQ"] for row in rows[2:]] == ["", ""]
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 4
    code, _, _ = tool(*arguments, "--output", tmp_path / "all", "--conf-threshold", 0.1)
    rows = list(csv.DictReader((tmp_path / "all/index.csv").open(encoding="utf-8")))
    assert (rows[1]["wrong"], float(rows[1]["PQ"])) == ("1", pytest.approx(50 * 39 / 41, abs=0.01))


def test_what_cannot_be_drawn_is_named_and_the_rest_is_drawn(tool, tmp_path):
    arguments = write_odd_instances(tmp_path / "odd")
    (tmp_path / "odd/images/d.jpg").write_bytes(b"no picture")
    code, printed, error = tool(*arguments, "--output", tmp_path / "out")
    assert code == 1
    assert error.count("\n") == 1
    assert error.startswith("not drawn: an image must be readable, got ")
    assert "3 pictures" in printed


def test_ctrl_c_keeps_what_was_drawn(tool, tmp_path, monkeypatch):
    arguments, draw = write_odd_instances(tmp_path / "odd"), result_pictures.draw_result
    drawn = []

    def interrupted(*parts):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(draw(*parts))
        return drawn[0]

    monkeypatch.setattr(result_pictures, "draw_result", interrupted)
    code, printed, _ = tool(*arguments, "--output", tmp_path / "out")
    assert code == 130
    assert "1 pictures" in printed
    assert (tmp_path / "out/index.html").read_text().count("<img") == 1


def test_wrong_places_are_one_line(tool, tmp_path, register):  # noqa: F811
    arguments = write_odd_instances(tmp_path / "odd")
    code, _, _ = tool(*arguments, "--output", tmp_path / "odd/images")
    assert "must be another folder than that of the images" in code
    code, _, _ = tool(*arguments, "--output", "/proc/none")
    assert code.startswith("error: the output must be a folder that can be written")
    code, _, _ = tool("--input", tmp_path / "odd", *arguments[2:], "--output", tmp_path / "out")
    assert "with found.json, images, truth.json. Name the file." in code
    code, _, _ = tool(*arguments[:2], "--dataset", "no_such_set", "--output", tmp_path / "out")
    assert "must be registered, got 'no_such_set'" in code
    assert not (tmp_path / "out").exists()


def test_predictions_of_the_other_kind_are_one_line(tool, tmp_path):
    (tmp_path / "set").mkdir()
    truth = random_truth(np.random.default_rng(0))
    _, images, pngs, panoptic, *_ = write_dataset(tmp_path / "set", [truth])
    (tmp_path / "found.json").write_text("[]")
    options = ["--input", tmp_path / "found.json", "--output", tmp_path / "out"]
    code, _, _ = tool(*options, "--panoptic", panoptic, pngs, "--images", images)
    assert "must have images with annotated instances" in code


def test_arguments_are_checked_before_anything_is_imported():
    for words, expected in (
        ([], "--input"),
        (["--input", "a", "--output", "b", "--conf-threshold", "2"], "[0, 1]"),
        (["--input", "a", "--output", "b", "--instances", "c"], "--images"),
    ):
        command = [sys.executable, "-X", "importtime", TOOL, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert expected in done.stderr
        assert " torch\n" not in done.stderr
