"""PanopticEvaluator against a slow reference written from the definition of panoptic quality."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_panoptic_separated
from detectron2.utils import comm
from PIL import Image

from gn_practical.training.data.coco_format import id_to_rgb, rgb_to_id
from gn_practical.training.evaluation import PanopticEvaluator
from gn_practical.training.evaluation.panoptic import panoptic_quality

HEIGHT, WIDTH = 40, 56
CATEGORIES = [
    {"id": 3, "name": "cat", "isthing": 1},
    {"id": 7, "name": "dog", "isthing": 1},
    {"id": 20, "name": "sky", "isthing": 0},
    {"id": 21, "name": "sea", "isthing": 0},
    {"id": 22, "name": "never seen", "isthing": 0},
]
THINGS = {3: 0, 7: 1}
STUFF = {0: 0, 20: 1, 21: 2, 22: 3}


# ---- a data set ----


def random_truth(rng, classes=(3, 7, 20, 21), crowds=True):
    """Overlapping rectangles on void, with at most one crowd of a class, as COCO has them."""
    ids = np.zeros((HEIGHT, WIDTH), dtype=np.int64)
    categories = {}
    for _ in range(12):
        segment = int(rng.integers(1, 2**24))
        y, x = rng.integers(0, HEIGHT - 8), rng.integers(0, WIDTH - 8)
        ids[y : y + rng.integers(5, 22), x : x + rng.integers(5, 30)] = segment
        categories[segment] = int(rng.choice(classes))
    segments, crowd_classes = [], set()
    for segment in np.unique(ids[ids > 0]):
        category = categories[int(segment)]
        is_crowd = crowds and category in THINGS and category not in crowd_classes
        is_crowd = int(is_crowd and rng.random() < 0.6)
        crowd_classes |= {category} if is_crowd else set()
        area = int((ids == segment).sum())
        segments.append(
            {"id": int(segment), "category_id": category, "area": area, "iscrowd": is_crowd}
        )
    return ids, segments


def perturbed(rng, ids, segments):
    """A prediction: the truth moved, some segments dropped, renamed, or added over void."""
    ids = np.roll(ids, rng.integers(0, 5, 2), axis=(0, 1))
    predicted = np.zeros_like(ids)
    info = []
    for segment in segments:
        mask = ids == segment["id"]
        if rng.random() < 0.15 or not mask.any():
            continue
        category = int(rng.choice([3, 7, 20, 21])) if rng.random() < 0.2 else segment["category_id"]
        info.append({"id": len(info) + 1, "category_id": category})
        predicted[mask] = len(info)
    empty = predicted == 0
    if empty.any():
        info.append({"id": len(info) + 1, "category_id": int(rng.choice([3, 20]))})
        predicted[empty] = len(info)
    return predicted, info


def to_detectron2(segments):
    """Data set ids to Detectron2's contiguous ids."""
    result = []
    for segment in segments:
        is_thing = segment["category_id"] in THINGS
        category = (THINGS if is_thing else STUFF)[segment["category_id"]]
        result.append({"id": segment["id"], "category_id": category, "isthing": is_thing})
    return result


def write_dataset(root, truths):
    """Write COCO panoptic files and stuff labels; return the arguments of the registration."""
    for folder in ("images", "panoptic", "stuff"):
        (root / folder).mkdir()
    images, annotations, instances = [], [], []
    for image_id, (ids, segments) in enumerate(truths, start=1):
        name = f"{image_id:03d}"
        Image.fromarray(id_to_rgb(ids)).save(root / "panoptic" / f"{name}.png")
        Image.fromarray(id_to_rgb(ids)).save(root / "images" / f"{name}.jpg")
        labels = np.full(ids.shape, 255, dtype=np.uint8)
        for segment in segments:
            mask = ids == segment["id"]
            labels[mask] = STUFF.get(segment["category_id"], 0)
            if segment["category_id"] in THINGS:
                y, x = np.nonzero(mask)
                box = [x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min()]
                left, top, width, height = map(int, box)
                corners = [left, top, left + width, top, left + width, top + height]
                instances.append(
                    {
                        **{key: segment[key] for key in ("category_id", "iscrowd", "area")},
                        "id": len(instances) + 1,
                        "image_id": image_id,
                        "bbox": [left, top, width, height],
                        "segmentation": [[*corners, left, top + height]],
                    }
                )
        Image.fromarray(labels).save(root / "stuff" / f"{name}.png")
        height, width = ids.shape
        size = {"height": height, "width": width}
        images.append({"id": image_id, "file_name": f"{name}.jpg", **size})
        annotations.append(
            {"image_id": image_id, "file_name": f"{name}.png", "segments_info": segments}
        )
    common = {"images": images, "categories": CATEGORIES}
    (root / "panoptic.json").write_text(json.dumps({**common, "annotations": annotations}))
    common["categories"] = [c for c in CATEGORIES if c["isthing"]]
    (root / "instances.json").write_text(json.dumps({**common, "annotations": instances}))
    metadata = {
        "thing_classes": ["cat", "dog"],
        "stuff_classes": ["things", "sky", "sea", "never seen"],
        "thing_dataset_id_to_contiguous_id": THINGS,
        "stuff_dataset_id_to_contiguous_id": STUFF,
        "label_divisor": 1000,
    }
    files = ("images", "panoptic", "panoptic.json", "stuff", "instances.json")
    return metadata, *(str(root / file) for file in files)


@pytest.fixture
def register(tmp_path):
    """Register a data set from (ids, segments) pairs; its name and inputs. Undone afterwards."""

    def do(truths):
        root = tmp_path / "data"
        root.mkdir()
        register_coco_panoptic_separated("eval_test", *write_dataset(root, truths))
        return "eval_test_separated", [
            {"image_id": i + 1, "file_name": str(root / "images" / f"{i + 1:03d}.jpg")}
            for i in range(len(truths))
        ]

    yield do
    for suffix in ("separated", "stuffonly"):
        if f"eval_test_{suffix}" in DatasetCatalog.list():
            DatasetCatalog.remove(f"eval_test_{suffix}")
            MetadataCatalog.remove(f"eval_test_{suffix}")


def evaluate(name, inputs, predictions, output_dir=None):
    evaluator = PanopticEvaluator(name, output_dir)
    evaluator.reset()
    for image, (ids, segments) in zip(inputs, predictions, strict=True):
        output = {"panoptic_seg": (torch.from_numpy(ids), to_detectron2(segments))}
        evaluator.process([image], [output])
    return evaluator.evaluate()["panoptic_seg"]


# ---- the reference: Kirillov et al., arXiv:1801.00868, section 4, mask by mask ----


def reference_tallies(truths, predictions):
    tallies = {c["id"]: [0.0, 0, 0, 0] for c in CATEGORIES}
    ignored = 0
    for (true_ids, true_segments), (ids, segments) in zip(truths, predictions, strict=True):
        void = true_ids == 0
        found, used = set(), set()
        for truth in true_segments:
            for segment in segments:
                if truth["iscrowd"] or truth["category_id"] != segment["category_id"]:
                    continue
                a, b = true_ids == truth["id"], ids == segment["id"]
                iou = (a & b).sum() / (a | (b & ~void)).sum()
                if iou > 0.5:
                    tally = tallies[truth["category_id"]]
                    tally[0] += float(iou)
                    tally[1] += 1
                    found.add(truth["id"])
                    used.add(segment["id"])
        for truth in true_segments:
            if not truth["iscrowd"] and truth["id"] not in found:
                tallies[truth["category_id"]][3] += 1
        for segment in segments:
            if segment["id"] in used:
                continue
            ignorable = void.copy()
            for truth in true_segments:
                if truth["iscrowd"] and truth["category_id"] == segment["category_id"]:
                    ignorable |= true_ids == truth["id"]
            mask = ids == segment["id"]
            if (mask & ignorable).sum() / mask.sum() > 0.5:
                ignored += 1
            else:
                tallies[segment["category_id"]][2] += 1
    return tallies, ignored


def reference_results(tallies):
    results = {}
    for suffix, wanted in (("", {0, 1}), ("_th", {1}), ("_st", {0})):
        rows = []
        for category in CATEGORIES:
            iou, tp, fp, fn = tallies[category["id"]]
            if category["isthing"] in wanted and tp + fp + fn > 0:
                recognition = tp / (tp + 0.5 * fp + 0.5 * fn)
                segmentation = iou / tp if tp else 0.0
                rows.append((segmentation * recognition, segmentation, recognition))
        for index, name in enumerate(("PQ", "SQ", "RQ")):
            values = [row[index] for row in rows]
            results[name + suffix] = 100 * sum(values) / len(values) if values else math.nan
    return results


def assert_equal(results, expected):
    for name, value in expected.items():
        assert results[name] == pytest.approx(value, rel=1e-12, abs=1e-12, nan_ok=True), name


# ---- tests ----


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_definition_on_random_maps_with_void_and_crowd(register, seed):
    rng = np.random.default_rng(seed)
    truths = [random_truth(rng) for _ in range(12)]
    predictions = [perturbed(rng, *truth) for truth in truths]
    tallies, ignored = reference_tallies(truths, predictions)
    assert ignored > 0
    assert all(np.array(list(tallies.values()))[:, 1:].sum(axis=0) > 3)  # TP, FP, FN all occur
    results = evaluate(*register(truths), predictions)
    assert_equal(results, reference_results(tallies))
    assert math.isnan(results["PQ-never seen"])


def test_an_empty_group_is_nan_and_does_not_stop_the_rest(register):
    rng = np.random.default_rng(7)
    truths = [random_truth(rng, classes=(20, 21)) for _ in range(3)]
    results = evaluate(*register(truths), truths)
    assert results["PQ"] == results["PQ_st"] == 100
    assert all(math.isnan(results[key]) for key in ("PQ_th", "SQ_th", "RQ_th"))


def test_empty_predictions_give_zero(register):
    truths = [random_truth(np.random.default_rng(1), crowds=False)]
    results = evaluate(*register(truths), [(np.zeros((HEIGHT, WIDTH), np.int64), [])])
    assert {results[key] for key in ("PQ", "SQ", "RQ", "PQ_th", "PQ_st")} == {0.0}


def test_a_crowd_is_neither_missed_nor_a_false_positive(register):
    ids = np.full((HEIGHT, WIDTH), 9)
    ids[:, :20] = 5
    crowd = {"id": 5, "category_id": 3, "area": 20 * HEIGHT, "iscrowd": 1}
    sky = {"id": 9, "category_id": 20, "area": 36 * HEIGHT, "iscrowd": 0}
    results = evaluate(*register([(ids, [crowd, sky])]), [(ids, [crowd, sky])])
    assert results["PQ"] == results["PQ_st"] == 100
    assert math.isnan(results["PQ_th"])


@pytest.mark.parametrize("excused", [True, False])
def test_of_two_crowds_of_a_class_the_last_one_counts_as_in_the_official_code(register, excused):
    ids = np.full((HEIGHT, WIDTH), 9)
    ids[:20], ids[20:30] = 5, 6
    crowds = [
        {"id": segment, "category_id": 3, "area": int((ids == segment).sum()), "iscrowd": 1}
        for segment in ((6, 5) if excused else (5, 6))
    ]
    sky = {"id": 9, "category_id": 20, "area": 10 * WIDTH, "iscrowd": 0}
    predicted = np.where(ids == 9, 9, 1)  # two thirds on crowd 5, one third on crowd 6
    segments = [{"id": 9, "category_id": 20}, {"id": 1, "category_id": 3}]
    results = evaluate(*register([(ids, [*crowds, sky])]), [(predicted, segments)])
    assert math.isnan(results["PQ_th"]) if excused else results["PQ_th"] == 0


def test_labels_without_segments_info(register):
    ids = np.ones((HEIGHT, WIDTH), np.int64)
    ids[:10], ids[10:14] = 2, 0
    segments = [
        {"id": 1, "category_id": 7, "area": int((ids == 1).sum()), "iscrowd": 0},
        {"id": 2, "category_id": 21, "area": int((ids == 2).sum()), "iscrowd": 0},
    ]
    name, inputs = register([(ids, segments)])
    # contiguous: dog is thing 1, sea is stuff 2; class * 1000 + instance, -1 for void. Class 0
    # with instance 0 is the label 0: not void.
    labels = np.choose(ids, [-1, 1001, 2000])
    labels[20:23] = 0
    evaluator = PanopticEvaluator(name)
    evaluator.reset()
    evaluator.process(inputs, [{"panoptic_seg": (torch.from_numpy(labels), None)}])
    results = evaluator.evaluate()["panoptic_seg"]
    assert results["PQ-sea"] == 100
    assert results["PQ-dog"] == pytest.approx(100 * 23 / 26, rel=1e-12)
    assert results["PQ-cat"] == 0  # the stray label: a false positive


def test_ranks_evaluate_their_own_images_and_the_main_one_sums(register, monkeypatch):
    rng = np.random.default_rng(5)
    truths = [random_truth(rng) for _ in range(6)]
    predictions = [perturbed(rng, *truth) for truth in truths]
    name, inputs = register(truths)
    expected = evaluate(name, inputs, predictions)
    sent = []
    ranks = [PanopticEvaluator(name) for _ in range(3)]  # the third one gets no image
    for rank, part in zip(ranks, (slice(4, 6), slice(6, 6), slice(0, 4)), strict=True):
        is_main = rank is ranks[-1]
        rank.reset()
        monkeypatch.setattr(comm, "is_main_process", lambda main=is_main: main)
        monkeypatch.setattr(comm, "gather", lambda data: sent.append(data) or sent)
        for image, (ids, segments) in zip(inputs[part], predictions[part], strict=True):
            output = {"panoptic_seg": (torch.from_numpy(ids), to_detectron2(segments))}
            rank.process([image], [output])
        results = rank.evaluate()
        assert is_main == (results is not None)
    assert_equal(results["panoptic_seg"], expected)


def test_predictions_are_kept_in_coco_format(register, tmp_path):
    truths = [random_truth(np.random.default_rng(2)) for _ in range(2)]
    name, inputs = register(truths)
    evaluate(name, inputs, truths, str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [a["image_id"] for a in written["annotations"]] == [1, 2]
    for (ids, segments), annotation in zip(truths, written["annotations"], strict=True):
        png = Image.open(tmp_path / "out" / "panoptic" / annotation["file_name"])
        np.testing.assert_array_equal(rgb_to_id(np.array(png)), ids)
        categories = {s["id"]: s["category_id"] for s in segments}
        assert {s["id"]: s["category_id"] for s in annotation["segments_info"]} == categories


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["a/1.png", "b/1.png"], ["a/1.png", "b/1.png"]),
        (["1.png", "../1.png"], ["1.png", "1_2.png"]),
        (["/elsewhere/x.png", "x.png"], ["elsewhere/x.png", "x.png"]),
    ],
)
def test_predictions_of_images_of_one_name_do_not_collide(tmp_path, register, names, files):
    truths = [random_truth(np.random.default_rng(i)) for i in range(2)]
    name, inputs = register(truths)
    panoptic = tmp_path / "data" / "panoptic"
    content = json.loads((tmp_path / "data" / "panoptic.json").read_text())
    for annotation, file_name in zip(content["annotations"], names, strict=True):
        target = Path(os.path.join(panoptic, file_name.replace("/elsewhere", f"{tmp_path}/else")))
        target.parent.mkdir(parents=True, exist_ok=True)
        (panoptic / annotation["file_name"]).rename(target)
        annotation["file_name"] = file_name.replace("/elsewhere", f"{tmp_path}/else")
    (tmp_path / "data" / "panoptic.json").write_text(json.dumps(content))
    for image in inputs:
        image["file_name"] = "/other/a.jpg"  # the images' names do not matter
    out = tmp_path / "out"
    assert evaluate(name, inputs, truths, str(out))["PQ"] == 100
    written = [
        a["file_name"] for a in json.loads((out / "predictions.json").read_text())["annotations"]
    ]
    assert [f.replace(f"{tmp_path}/else".lstrip("/"), "elsewhere") for f in written] == files
    assert all((out / "panoptic" / file).is_file() for file in written)


@pytest.mark.parametrize("change", [lambda i: -i, lambda i: 2**70 + i, lambda i: f"city_{i}"])
def test_pq_does_not_depend_on_ids(register, tmp_path, change):
    truths = [random_truth(np.random.default_rng(i)) for i in range(3)]
    predictions = [perturbed(np.random.default_rng(9), *truth) for truth in truths]
    name, inputs = register(truths)
    expected = evaluate(name, inputs, predictions)
    path = tmp_path / "data" / "panoptic.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image |= {"id": change(image["id"]), "width": 56.0}
    for annotation in content["annotations"]:
        annotation["image_id"] = change(annotation["image_id"])
        for segment in annotation["segments_info"]:
            segment["area"] += 0.5
            segment["category_id"] = change(segment["category_id"])
    for category in content["categories"]:
        category["id"] = change(category["id"])
    path.write_text(json.dumps(content))
    metadata = MetadataCatalog.get(name).as_dict()
    MetadataCatalog.remove(name)
    for key in ("thing_dataset_id_to_contiguous_id", "stuff_dataset_id_to_contiguous_id"):
        metadata[key] = {change(i): n for i, n in metadata[key].items()}
    MetadataCatalog.get(name).set(**{k: v for k, v in metadata.items() if k != "name"})
    inputs = [{**image, "image_id": change(image["image_id"])} for image in inputs]
    assert_equal(evaluate(name, inputs, predictions), expected)


@pytest.mark.parametrize("damage", ["grey", "palette", "size", "missing"])
def test_a_png_of_another_kind_is_named(register, tmp_path, damage):
    truths = [random_truth(np.random.default_rng(0))]
    name, inputs = register(truths)
    path = tmp_path / "data" / "panoptic" / "001.png"
    image = Image.open(path)
    changed = {"grey": image.convert("L"), "palette": image.convert("P")}
    changed["size"] = image.resize((20, 20))
    if damage == "missing":
        path.unlink()
    else:
        changed[damage].save(path)
    with pytest.raises(ValueError, match=r"panoptic PNG must be RGB.*001\.png"):
        evaluate(name, inputs, truths)


@pytest.mark.parametrize("key", ["id", "category_id"])
def test_a_segment_that_cannot_be_counted_is_an_error_at_once(register, tmp_path, key):
    name, _ = register([random_truth(np.random.default_rng(0))])
    path = tmp_path / "data" / "panoptic.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segments_info"][0][key] = 2**24
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"Segments in .* must have.* {key}=16777216"):
        PanopticEvaluator(name)


def test_an_image_that_is_unknown_or_predicted_twice_is_an_error(register):
    truths = [random_truth(np.random.default_rng(0))]
    name, inputs = register(truths)
    with pytest.raises(ValueError, match=r"predicted once, got 2 predictions for image_id=1"):
        evaluate(name, inputs * 2, truths * 2)
    with pytest.raises(ValueError, match=r"no other, must be .* image_id=9"):
        evaluate(name, [{**inputs[0], "image_id": 9}], truths)


def test_an_image_without_prediction_is_an_error(register):
    truths = [random_truth(np.random.default_rng(i)) for i in range(2)]
    name, inputs = register(truths)
    with pytest.raises(ValueError, match=r"predicted once, got 0 predictions for image_id=2"):
        evaluate(name, inputs[:1], truths[:1])


def test_an_unknown_class_is_an_error_with_the_way_out(register):
    name, inputs = register([random_truth(np.random.default_rng(0))])
    segments = [{"id": 1, "category_id": 2, "isthing": True}]
    output = {"panoptic_seg": (torch.ones(HEIGHT, WIDTH, dtype=torch.int32), segments)}
    evaluator = PanopticEvaluator(name)
    evaluator.reset()
    with pytest.raises(ValueError, match=r"one of the 2 thing classes.*category_id=2.*NUM_CLASSES"):
        evaluator.process(inputs, [output])


def test_segment_ids_survive_the_png_code():
    ids = np.array([[0, 1, 255], [256, 65536, 2**24 - 1]])
    np.testing.assert_array_equal(rgb_to_id(id_to_rgb(ids)), ids)


def test_no_class_at_all_is_nan():
    assert all(math.isnan(value) for value in panoptic_quality(np.zeros((1, 4))).values())
