"""What each kind of error costs, confused classes, curves, and PQ by size."""

import json
import os
from pathlib import Path

import hotcoco
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from generated_coco import coco_sets
from hypothesis import given, settings
from PIL import Image
from pycocotools import mask as masks
from test_evaluation_coco_sem_seg import catalog, coco, run  # noqa: F401
from test_evaluation_generated import (
    PROFILE,
    SEEDS,
    draw_predictions,
    like_the_truth,
    predicted_panoptic,
    registered,
)
from test_evaluation_panoptic import (
    CATEGORIES,
    perturbed,
    random_truth,
    reference_tallies,
    register,  # noqa: F401
    to_detectron2,
)

from gn_practical.training.config import add_training_config
from gn_practical.training.evaluation import CocoEvaluator, PanopticEvaluator, build_evaluator
from gn_practical.training.evaluation.build import BUILDERS
from gn_practical.training.evaluation.coco import _coco
from gn_practical.training.evaluation.error_analysis import analyse_errors, confusion_matrix
from gn_practical.training.evaluation.error_pictures import draw_confusion
from gn_practical.training.evaluation.missing_ap import ERRORS, judge, missing_ap
from gn_practical.training.evaluation.panoptic_sizes import tallies_by_size

SIDE = 200
BOX = [20.0, 20.0, 60.0, 60.0]
HERE = {"image_id": 1, "category_id": 1, "bbox": BOX}
ALL = (*ERRORS, "false_positives", "false_negatives")
HOTCOCO = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss", "FP", "FN")


def truth_of(*annotations, classes=2, images=1):
    """Annotations as ``CocoEvaluator`` numbers them."""
    counted = [
        {"id": n, "area": 1.0, "iscrowd": 0, "segmentation": [corners(a["bbox"])], **a}
        for n, a in enumerate(annotations, start=1)
    ]
    images = [{"id": i + 1, "height": SIDE, "width": SIDE} for i in range(images)]
    categories = [{"id": c + 1} for c in range(classes)]
    return _coco({"images": images, "annotations": counted, "categories": categories})


def corners(box):
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def detection(score=0.9, shift=0.0, **other):
    """A detection of the annotation ``HERE``, as box and as mask; IoU 0.2 at a shift of 40."""
    box = [BOX[0] + shift, *BOX[1:]]
    shape = masks.merge(masks.frPyObjects([corners(other.get("bbox", box))], SIDE, SIDE))
    return {**HERE, "bbox": box, "segmentation": shape, "score": score, **other}


def random_set(seed, crowds=0.0, classes=3):
    """Annotations and detections near them; every class is detected and annotated."""
    rng = np.random.default_rng(seed)
    boxes = lambda n: np.concatenate(  # noqa: E731
        [rng.integers(0, 120, (n, 2)), rng.integers(10, 80, (n, 2))], axis=1
    ).astype(float)
    annotations, detections = [], []
    for image in range(1, 7):
        for box in boxes(4).tolist():
            category = int(rng.integers(classes)) + 1
            entry = {"image_id": image, "category_id": category, "bbox": box}
            annotations.append({**entry, "iscrowd": int(rng.random() < crowds)})
            for _ in range(rng.integers(0, 4)):
                moved = np.array(box) + rng.normal(0, rng.choice([1, 8, 20]), 4)
                moved[2:] = np.maximum(moved[2:], 2)
                wrong = rng.random() < 0.3
                category = int(rng.integers(classes)) + 1 if wrong else entry["category_id"]
                found = {"bbox": moved.tolist(), "category_id": category, "image_id": image}
                detections.append(detection(float(rng.random()), **found))
    for category in range(1, classes + 1):
        annotations.append({"image_id": 1, "category_id": category, "bbox": BOX})
        detections.append(detection(0.01, category_id=category))
    return truth_of(*annotations, classes=classes, images=6), detections


# ---- what each kind of error costs ----


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize(
    ("wrong", "kind", "before"),
    [
        (detection(category_id=2), "classification", 0),
        (detection(shift=40.0), "localization", 0),
        (detection(shift=40.0, category_id=2), "both", 100),
        (detection(0.95, bbox=[150.0, 150.0, 20.0, 20.0]), "background", 50),
    ],
)
def test_an_error_of_each_kind_is_named_and_costs_what_it_costs(wrong, kind, before, task):
    found = [wrong] if before == 0 else [wrong, detection(0.5)]
    missing = missing_ap(judge(truth_of(HERE), found, task))
    assert missing.counts == {**dict.fromkeys(ERRORS, 0), kind: 1}
    assert missing.overall["AP50"] == pytest.approx(before)
    # What is wrong in both belongs to a class that nobody has annotated: it costs nothing.
    assert missing.overall[kind] == pytest.approx(0 if kind == "both" else 100 - before)
    assert sum(missing.overall[k] for k in ERRORS) == pytest.approx(missing.overall[kind])


def test_a_duplicate_before_another_annotation():
    second = {**HERE, "bbox": [100.0, 100.0, 50.0, 50.0]}
    found = [detection(0.9), detection(0.8), detection(0.7, bbox=second["bbox"])]
    missing = missing_ap(judge(truth_of(HERE, second), found, "bbox"))
    assert missing.counts["duplicate"] == 1
    # Precision is 1 up to recall 0.5, then 2/3: 51 and 50 of COCO's 101 recalls.
    assert missing.overall["AP50"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)
    expected = pytest.approx(100 - missing.overall["AP50"])
    assert missing.overall["duplicate"] == missing.overall["false_positives"] == expected


def test_missed_annotations_cost_the_recall():
    second = {**HERE, "bbox": [100.0, 100.0, 50.0, 50.0]}
    missing = missing_ap(judge(truth_of(HERE, second), [detection()], "bbox"))
    assert missing.counts["missed"] == 1
    assert missing.overall["AP50"] == pytest.approx(100 * 51 / 101)
    expected = pytest.approx(100 * 50 / 101)
    assert missing.overall["missed"] == missing.overall["false_negatives"] == expected


def test_a_class_that_is_never_detected_is_missed():
    """hotcoco leaves it in the mean, with nothing to blame."""
    missing = missing_ap(judge(truth_of(HERE, {**HERE, "category_id": 2}), [detection()], "bbox"))
    assert missing.overall["AP50"] == pytest.approx(50)
    assert missing.overall["missed"] == pytest.approx(50)


def test_of_two_candidates_for_an_annotation_the_better_one_is_mended():
    found = [detection(0.9, shift=40.0), detection(0.6, category_id=2), detection(0.3, shift=39.0)]
    judged = judge(truth_of(HERE), found, "bbox")
    assert judged.mended.tolist() == [True, False, False]
    missing = missing_ap(judged)
    assert missing.overall["localization"] == pytest.approx(100)
    assert missing.overall["classification"] == 0  # its annotation is for the other one


@pytest.mark.parametrize("seed", range(25))
def test_equals_hotcoco_where_both_mean_the_same(seed):
    truth, found = random_set(seed)
    known = hotcoco.COCO(truth.dataset)
    evaluation = hotcoco.COCOeval(known, known.load_res(found), "bbox")
    evaluation.evaluate()
    expected = evaluation.tide_errors()
    missing = missing_ap(judge(truth, found, "bbox"))
    costs = {ours: 100 * expected["delta_ap"][t] for ours, t in zip(ALL, HOTCOCO, strict=True)}
    assert missing.overall.pop("AP50") == pytest.approx(100 * expected["ap_base"])
    assert missing.overall == pytest.approx(costs, abs=1e-9)
    assert list(missing.counts.values()) == [expected["counts"][key] for key in HOTCOCO[:6]]
    assert sum(cost > 0 for cost in costs.values()) > 5


def test_detections_on_a_crowd_are_no_errors():
    crowd = {**HERE, "bbox": [0.0, 0.0, 200.0, 200.0], "iscrowd": 1}
    other = {**HERE, "category_id": 2}
    missing = missing_ap(judge(truth_of(other, crowd), [detection()], "bbox"))
    assert missing.counts == {**dict.fromkeys(ERRORS, 0), "missed": 1}


def test_a_crowd_is_no_annotation_that_a_detection_could_be_moved_to():
    """hotcoco has this one as an error of localization."""
    crowd = {**HERE, "bbox": [60.0, 20.0, 140.0, 60.0], "iscrowd": 1}
    far = {**HERE, "bbox": [150.0, 150.0, 40.0, 40.0]}
    missing = missing_ap(judge(truth_of(crowd, far), [detection()], "bbox"))
    assert missing.counts == {**dict.fromkeys(ERRORS, 0), "background": 1, "missed": 1}


def test_without_detections_what_is_missed_cannot_be_weighed():
    missing = missing_ap(judge(truth_of(HERE, images=3), [], "bbox"))
    assert missing.counts["missed"] == 1
    assert missing.overall["AP50"] == missing.overall["false_positives"] == 0
    assert np.isnan(missing.overall["missed"])  # nothing is left to take the AP of


def test_without_annotations_there_is_no_ap():
    missing = missing_ap(judge(truth_of(), [detection(), detection()], "segm"))
    assert missing.counts["background"] == 2
    assert np.isnan(list(missing.overall.values())).all()


def test_only_the_best_detections_of_a_class_count():
    found = [detection(0.5), *(detection(0.9, shift=40.0) for _ in range(3))]
    assert missing_ap(judge(truth_of(HERE), found, "bbox", max_dets=3)).overall["AP50"] == 0
    assert missing_ap(judge(truth_of(HERE), found, "bbox", max_dets=4)).overall["AP50"] > 0


@pytest.mark.skipif("GN_PRACTICAL_TEST_DATA" not in os.environ, reason="needs real data")
def test_equals_tidecv_on_bccd():
    path = Path(os.environ["GN_PRACTICAL_TEST_DATA"]) / "bccd/instances_val.json"
    missing = missing_ap(judge(*moved(json.loads(path.read_text())), "bbox"))
    expected = {  # what tidecv 1.0.1 says of these detections
        "AP50": 18.800373824991695,
        "classification": 6.279054415362086,
        "localization": 19.02881380674723,
        "both": 2.116010327086503,
        "duplicate": 0.8365196968971453,
        "background": 0.0,
        "missed": 12.358191013652753,
        "false_positives": 23.773883600750885,
        "false_negatives": 25.006008377735704,
    }
    assert missing.overall == pytest.approx(expected, abs=1e-9)
    assert list(missing.counts.values()) == [96, 365, 50, 115, 0, 419]


def moved(content):
    """Detections made of annotations: moved, renamed, repeated, left out, added."""
    rng = np.random.default_rng(0)
    found = []
    for annotation in content["annotations"]:
        annotation.setdefault("iscrowd", 0)
        for _ in range(rng.integers(0, 3)):
            box = np.array(annotation["bbox"], float)
            box[:2] += rng.normal(0, 0.2, 2) * box[2:]
            category = annotation["category_id"]
            if rng.random() < 0.2:
                category = content["categories"][rng.integers(len(content["categories"]))]["id"]
            entry = {"image_id": annotation["image_id"], "category_id": category}
            found.append({**entry, "bbox": box.tolist(), "score": float(rng.random())})
    return _coco(content), found


# ---- confused classes, files and pictures ----


def reference_confusion(truth, found, task, classes):
    """Detection by detection, from the definition."""
    matrix = np.zeros((classes + 1, classes + 1), int)
    for image in truth.imgs:
        free = [a for a in truth.imgToAnns.get(image, []) if not a["iscrowd"]]
        own = [d for d in found if d["image_id"] == image and d["score"] >= 0.5]
        for one in sorted(own, key=lambda d: -d["score"]):
            shape, of = ([one["bbox"]], lambda a: a["bbox"])
            if task == "segm":
                shape, of = ([one["segmentation"]], truth.annToRLE)
            ious = [masks.iou(shape, [of(a)], [0])[0, 0] for a in free]
            row = classes
            if ious and max(ious) >= 0.5:
                row = free.pop(int(np.argmax(ious)))["category_id"] - 1
            matrix[row, one["category_id"] - 1] += 1
        for annotation in free:
            matrix[annotation["category_id"] - 1, classes] += 1
    return matrix


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_confused_classes_equal_the_definition(seed, task):
    truth, found = random_set(seed, crowds=0.2)
    matrix = confusion_matrix(truth, found, task)
    assert (matrix == reference_confusion(truth, found, task, 3)).all()
    right, wrong = matrix.diagonal().sum(), matrix[:3, :3].sum() - matrix.diagonal().sum()
    assert min(right, wrong, matrix[3].sum(), matrix[:, 3].sum()) > 0


def test_confused_classes_of_nothing():
    assert (confusion_matrix(truth_of(), [], "bbox") == 0).all()
    assert confusion_matrix(truth_of(HERE), [], "segm")[0].tolist() == [0, 0, 1]


ODD_NAMES = ["$x^2$", "_hidden", 'a "quoted" </script>', "é" * 60, "猫", "a\nb"]


@pytest.mark.filterwarnings("error:Glyph")  # the font has no cats
@pytest.mark.parametrize("names", [["one"], ODD_NAMES, [f"class {n}" for n in range(90)]])
def test_files_and_pictures(tmp_path, names):
    truth = truth_of(HERE, {**HERE, "bbox": [0.0, 0.0, 9.0, 9.0]}, classes=len(names))
    precision = np.full((2, 101, len(names)), np.nan)
    precision[..., 0] = np.linspace(1, 0, 101)
    analyse_errors(truth, [detection()], "segm", names, precision, str(tmp_path / "new/errors"))
    content = json.loads((tmp_path / "new/errors/segm.json").read_text())
    assert content["counts"] == {**dict.fromkeys(ERRORS, 0), "missed": 1}
    assert content["errors"]["missed"] == content["classes"][0]["missed"] == pytest.approx(49.505)
    assert [entry["name"] for entry in content["classes"]] == names
    confusion = content["confusion"]
    assert confusion["classes"] == [*names, "background"]
    assert confusion["rows_annotated_columns_detected"][0] == [1, *[0] * (len(names) - 1), 1]
    curves = content["precision_at_recall"]
    assert curves["recall"][50] == curves["classes"][0][0][50] == curves["mean"][1][50] == 0.5
    assert curves["classes"][1:] == [[[None] * 101] * 2] * (len(names) - 1)
    for picture in ("segm.png", "segm_confusion.png"):
        pixels = np.asarray(Image.open(tmp_path / "new/errors" / picture).convert("L"))
        assert max(pixels.shape) < 3000
        assert (pixels < 128).mean() > 0.002  # something is drawn


def test_of_many_classes_those_with_errors_are_drawn(tmp_path, monkeypatch):
    matrix = np.zeros((91, 91), int)
    matrix[88, 90] = matrix[90, 7] = 1
    labels = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.set_yticks", lambda _, ticks, names, **o: labels.extend(names)
    )
    draw_confusion(matrix, [str(n) for n in range(90)], "", str(tmp_path / "many.png"))
    assert len(labels) == 41
    assert {"7", "88", "background"} <= set(labels)


# ---- in an evaluation ----


def test_errors_are_in_results_and_files_only_if_asked_for(coco, tmp_path):  # noqa: F811
    name, pairs = coco()
    without = run(CocoEvaluator(name, str(tmp_path / "a")), pairs)
    results = run(CocoEvaluator(name, str(tmp_path / "b"), error_analysis=True), pairs)
    assert not (tmp_path / "a/errors").exists()
    assert list(results) == ["bbox", "bbox_errors", "segm", "segm_errors"]
    for task in ("bbox", "segm"):
        assert results[task] == pytest.approx(without[task], nan_ok=True)
        assert results[f"{task}_errors"]["AP50"] == pytest.approx(results[task]["AP50"])
        curves = json.loads((tmp_path / f"b/errors/{task}.json").read_text())["precision_at_recall"]
        areas = 100 * np.mean(curves["mean"], axis=1)
        assert areas == pytest.approx([results[task]["AP50"], results[task]["AP75"]])
    silent = run(CocoEvaluator(name, None, error_analysis=True), pairs)
    assert silent["segm_errors"] == results["segm_errors"]


@settings(PROFILE, max_examples=15)
@given(coco_sets(), SEEDS)
def test_ids_of_any_kind_crowds_and_empty_images(data, seed):
    with registered(data) as (name, maps, _):
        evaluator = CocoEvaluator(name, None, error_analysis=True)
        for image, instances in draw_predictions(data, maps, np.random.default_rng(seed)):
            evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
        results = evaluator.evaluate()
        for task in [task for task in ("bbox", "segm") if task in results]:
            errors = results[f"{task}_errors"]
            assert errors["AP50"] == pytest.approx(results[task]["AP50"], nan_ok=True)
            assert all(0 <= v <= 100 or np.isnan(v) for v in errors.values())


def test_the_main_rank_alone_looks_for_errors(coco, monkeypatch):  # noqa: F811
    name, pairs = coco()
    expected = run(CocoEvaluator(name, error_analysis=True), pairs)
    ranks = [CocoEvaluator(name, error_analysis=True) for _ in range(2)]
    sent = []
    monkeypatch.setattr(comm, "gather", lambda data: sent.append(data) or sent)
    monkeypatch.setattr(comm, "is_main_process", lambda: len(sent) == 2)
    assert run(ranks[1], pairs[5:]) is None
    results = run(ranks[0], pairs[:5])
    assert results["bbox_errors"] == expected["bbox_errors"]
    assert results["segm_errors"] == expected["segm_errors"]


@pytest.mark.parametrize("wanted", [False, True])
def test_the_key_turns_it_on(coco, tmp_path, wanted):  # noqa: F811
    cfg = get_cfg()
    add_training_config(cfg)
    assert cfg.TEST.ERROR_ANALYSIS is False
    cfg.TEST.ERROR_ANALYSIS, cfg.TEST.NUM_PICTURES = wanted, 0
    cfg.OUTPUT_DIR, cfg.MODEL.META_ARCHITECTURE = str(tmp_path), "GeneralizedRCNN"
    name, pairs = coco()
    MetadataCatalog.get(name).set(evaluator_type="coco")
    assert ("bbox_errors" in run(build_evaluator(cfg, name), pairs)) == wanted


def test_data_without_analysis_are_named(coco, monkeypatch, caplog):  # noqa: F811
    cfg = get_cfg()
    add_training_config(cfg)
    cfg.TEST.ERROR_ANALYSIS, cfg.TEST.NUM_PICTURES = True, 0
    name, _ = coco()
    monkeypatch.setitem(BUILDERS, "lvis", lambda *_: [CocoEvaluator(name)])
    MetadataCatalog.get("of_lvis").set(evaluator_type="lvis")
    build_evaluator(cfg, "of_lvis")
    MetadataCatalog.pop("of_lvis")
    assert "nothing to say of of_lvis" in caplog.text


# ---- panoptic quality by size ----


def sizes_of(name, inputs, predictions):
    evaluator = PanopticEvaluator(name, error_analysis=True)
    for image, (ids, segments) in zip(inputs, predictions, strict=True):
        output = {"panoptic_seg": (torch.from_numpy(ids), to_detectron2(segments))}
        evaluator.process([image], [output])
    return evaluator, evaluator.evaluate()


@pytest.mark.parametrize("seed", range(4))
def test_sizes_add_up_to_the_definition(register, seed):  # noqa: F811
    rng = np.random.default_rng(seed)
    truths = [random_truth(rng) for _ in range(8)]
    predictions = [perturbed(rng, *truth) for truth in truths]
    evaluator, results = sizes_of(*register(truths), predictions)
    tallies, _ = reference_tallies(truths, predictions)
    expected = np.array([tallies[category["id"]] for category in CATEGORIES])
    assert evaluator._by_size.sum(axis=0) == pytest.approx(expected)
    cat = expected[0]
    assert results["panoptic_seg_errors"]["SQ-cat"] == pytest.approx(100 * cat[0] / cat[1])
    recognized = cat[1] / (cat[1] + cat[2] / 2 + cat[3] / 2)
    assert results["panoptic_seg_errors"]["RQ-cat"] == pytest.approx(100 * recognized)


@settings(PROFILE, max_examples=15)
@given(coco_sets(), SEEDS)
def test_sizes_add_up_whatever_the_ids(data, seed):
    rng = np.random.default_rng(seed)
    with registered(data) as (name, maps, folder):
        evaluator = PanopticEvaluator(name, folder, error_analysis=True)
        for annotation in data.panoptic["annotations"]:
            ids, segments = predicted_panoptic(rng, data.id_maps[annotation["file_name"]], maps)
            segments = like_the_truth(rng, segments, annotation["segments_info"], maps)
            output = {"panoptic_seg": (torch.from_numpy(ids), segments)}
            evaluator.process([{"image_id": annotation["image_id"]}], [output])
        assert evaluator._by_size.sum(axis=0) == pytest.approx(evaluator._tallies())


def test_a_segment_counts_at_its_own_size():
    """A medium one found, a small one missed, a large one predicted on a segment of another."""
    true_ids, ids = np.zeros((2, 200, 200), int)
    true_ids[:40, :40], true_ids[:30, 100:130], true_ids[60:] = 1, 2, 3
    ids[:40, :32], ids[60:] = 7, 8
    truth = [{"id": n, "category_id": c} for n, c in ((1, "a"), (2, "a"), (3, "b"))]
    predicted = [{"id": 7, "category_id": "a"}, {"id": 8, "category_id": "a"}]
    tallies = tallies_by_size(true_ids, truth, ids, predicted, {"a": 1, "b": 2})
    expected = np.zeros((3, 2, 4))
    expected[0, 0, 3] = 1  # 900 px
    expected[1, 0, :2] = 0.8, 1  # 1,600 px, of which 1,280 found
    expected[2, 0, 2] = expected[2, 1, 3] = 1
    assert tallies == pytest.approx(expected)


def test_panoptic_errors_stay_out_unless_asked_for(register):  # noqa: F811
    truths = [random_truth(np.random.default_rng(0))]
    name, inputs = register(truths)
    _, results = sizes_of(name, inputs, truths)
    assert results["panoptic_seg_errors"]["PQs"] == 100
    evaluator = PanopticEvaluator(name)
    ids, segments = truths[0]
    evaluator.process(inputs, [{"panoptic_seg": (torch.from_numpy(ids), to_detectron2(segments))}])
    assert list(evaluator.evaluate()) == ["panoptic_seg"]
