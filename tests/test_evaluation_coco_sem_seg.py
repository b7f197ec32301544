"""AP and mIoU: the same numbers as the official code, on data sets with and without masks."""

import copy
import json
import logging
import math
import sys

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg, register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image

from gn_practical.training.evaluation import CocoEvaluator, SemSegEvaluator
from gn_practical.training.evaluation.sem_seg import read_label_image

SIZE = 64


@pytest.fixture
def catalog():
    names = []

    def add(name):
        names.append(name)
        return name

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def write_instances(path, rng, masks, bare=False):
    """8 images, 3 classes with ids 2, 5, 9; ``bare`` leaves out what COCO's files may lack."""
    annotations = []
    for image_id in range(8):
        for _ in range(6):
            x, y, w, h = (int(v) for v in rng.integers([0, 0, 6, 6], [40, 40, 24, 24]))
            annotation = {"image_id": image_id, "category_id": int(rng.choice([2, 5, 9]))}
            annotation |= {"id": len(annotations) + 1, "bbox": [x, y, w, h]}
            if masks:
                annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            if not bare:
                annotation |= {"area": w * h, "iscrowd": 0}
            annotations.append(annotation)
    images = [{"id": i, "file_name": f"{i}.jpg", "height": SIZE, "width": SIZE} for i in range(8)]
    categories = [{"id": i, "name": f"class{i}"} for i in (2, 5, 9)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path.write_text(json.dumps(content))
    return annotations


def predictions_near(annotations, rng, masks=True):
    """Of each image, its boxes moved a little, some with a wrong class, with random scores."""
    contiguous = {2: 0, 5: 1, 9: 2}
    for image_id in range(8):
        own = [a for a in annotations if a["image_id"] == image_id]
        corners = np.array([a["bbox"] for a in own], dtype=np.float32)
        corners[:, 2:] += corners[:, :2]
        corners += rng.normal(0, 1.5, corners.shape).astype(np.float32)
        classes = [contiguous[a["category_id"]] for a in own[:-1]] + [0]
        instances = Instances((SIZE, SIZE), pred_boxes=Boxes(torch.from_numpy(corners)))
        instances.scores = torch.from_numpy(rng.random(len(own)))
        instances.pred_classes = torch.tensor(classes)
        if masks:
            grid = np.arange(SIZE)
            x0, y0, x1, y1 = (corners[:, i, None, None] for i in range(4))
            rows, columns = grid[:, None], grid[None]
            inside = (columns >= x0) & (columns < x1) & (rows >= y0) & (rows < y1)
            instances.pred_masks = torch.from_numpy(inside)
        yield {"image_id": image_id}, {"instances": instances}


def run(evaluator, pairs):
    evaluator.reset()
    for image, output in pairs:
        evaluator.process([image], [output])
    return evaluator.evaluate()


@pytest.fixture
def coco(tmp_path, catalog):
    """Register a data set and make predictions for it."""

    def do(masks=True, bare=False, predicted_masks=True):
        rng = np.random.default_rng(0)
        annotations = write_instances(tmp_path / "instances.json", rng, masks, bare)
        name = catalog("eval_test_coco")
        register_coco_instances(name, {}, str(tmp_path / "instances.json"), str(tmp_path))
        DatasetCatalog.get(name)  # fills the metadata's classes
        return name, list(predictions_near(annotations, rng, predicted_masks))

    return do


@pytest.mark.parametrize("faster", [True, False], ids=["faster-coco-eval", "pycocotools"])
def test_ap_equals_detectron2_on_pycocotools(coco, monkeypatch, caplog, faster):
    name, pairs = coco()
    expected = run(COCOEvaluator(name, use_fast_impl=False), pairs)
    assert 5 < expected["bbox"]["AP"] < 95  # neither everything nor nothing matches
    if faster:
        pytest.importorskip("faster_coco_eval")
    else:
        monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with caplog.at_level(logging.INFO):
        results = run(CocoEvaluator(name), pairs)
    assert ("AP by faster-coco-eval" if faster else "AP by pycocotools") in caplog.text
    assert list(results) == ["bbox", "segm"]
    for task, metrics in expected.items():
        assert results[task] == pytest.approx(metrics, rel=1e-12, nan_ok=True)


def with_ids(path, of_image=lambda i: i, of_annotation=lambda i: i, of_category=lambda i: i):
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["id"] = of_image(image["id"])
    for category in content["categories"]:
        category["id"] = of_category(category["id"])
    for annotation in content["annotations"]:
        annotation["id"] = of_annotation(annotation["id"])
        annotation["image_id"] = of_image(annotation["image_id"])
        annotation["category_id"] = of_category(annotation["category_id"])
    path.write_text(json.dumps(content))


CHANGES = {
    "as they are": lambda i: i,
    "negative": lambda i: i - 100,
    "from 0": lambda i: i - 1,
    "beyond 2^53": lambda i: 2**53 + i,
    "beyond 64 bits": lambda i: 2**63 + i,
    "texts": lambda i: f"frankfurt_{i:06d}",
}


@pytest.mark.parametrize("what", ["of_image", "of_annotation", "of_category"])
@pytest.mark.parametrize("change", CHANGES)
def test_ap_does_not_depend_on_ids(coco, tmp_path, change, what):
    name, pairs = coco()
    expected = run(COCOEvaluator(name, use_fast_impl=False), pairs)
    change = CHANGES[change]
    path = tmp_path / "instances.json"
    with_ids(path, **{what: change})
    if what == "of_image":
        pairs = [({"image_id": change(image["image_id"])}, output) for image, output in pairs]
    MetadataCatalog.remove(name)
    categories = {2: 0, 5: 1, 9: 2}
    if what == "of_category":
        categories = {change(i): n for i, n in categories.items()}
    MetadataCatalog.get(name).set(json_file=str(path), thing_dataset_id_to_contiguous_id=categories)
    results = run(CocoEvaluator(name, str(tmp_path / "out")), pairs)
    for task, metrics in expected.items():
        found = {metric: value for metric, value in results[task].items() if metric in metrics}
        assert found == pytest.approx({k: metrics[k] for k in found}, rel=1e-12, nan_ok=True)
    written = json.loads((tmp_path / "out" / "coco_instances_results.json").read_text())
    assert {entry["image_id"] for entry in written} == {image["image_id"] for image, _ in pairs}
    assert {entry["category_id"] for entry in written} <= set(categories)


def test_a_width_like_480_point_0_is_taken(coco, tmp_path):
    name, pairs = coco()
    expected = run(CocoEvaluator(name), pairs)
    content = json.loads((tmp_path / "instances.json").read_text())
    for image in content["images"]:
        image |= {"width": 64.0, "height": 64.0}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    results = run(CocoEvaluator(name), pairs)
    assert results["segm"] == pytest.approx(expected["segm"], nan_ok=True)


@pytest.mark.parametrize("entries", ["images", "annotations", "categories"])
def test_an_id_given_twice_is_an_error(coco, tmp_path, entries):
    name, _ = coco()
    content = json.loads((tmp_path / "instances.json").read_text())
    content[entries].append(content[entries][0])
    (tmp_path / "instances.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"Ids of {entries} in .* must differ, got id="):
        CocoEvaluator(name)


@pytest.mark.parametrize("pairs_of", [lambda p: p[:-1], lambda p: [*p, p[0]]])
def test_ap_of_other_images_than_the_annotated_is_an_error(coco, pairs_of):
    name, pairs = coco()
    with pytest.raises(ValueError, match=r"must be predicted once, got [02] predictions"):
        run(CocoEvaluator(name), pairs_of(pairs))
    other = {**pairs[0][0], "image_id": 77}
    with pytest.raises(ValueError, match=r"no other, must be predicted once.*image_id=77"):
        run(CocoEvaluator(name), [*pairs, (other, pairs[0][1])])


def test_a_predicted_class_that_is_none_is_an_error(coco):
    name, pairs = coco()
    pairs[0][1]["instances"].pred_classes[0] = 3
    with pytest.raises(ValueError, match=r"one of the 3 classes of eval_test_coco, got category"):
        run(CocoEvaluator(name), pairs)


def test_fewer_detections_of_an_image(coco):
    name, pairs = coco()
    expected = run(COCOEvaluator(name, use_fast_impl=False, max_dets_per_image=300), pairs)
    results = run(CocoEvaluator(name, max_dets_per_image=300), pairs)
    assert results["bbox"] == pytest.approx(expected["bbox"], nan_ok=True)
    assert run(CocoEvaluator(name, max_dets_per_image=1), pairs)["bbox"]["AP"] < 20


def test_keypoints(coco, tmp_path):
    name, pairs = coco(masks=False, predicted_masks=False)
    content = json.loads((tmp_path / "instances.json").read_text())
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation |= {"num_keypoints": 3, "keypoints": [x, y, 2, x + w, y, 2, x, y + h, 2]}
    (tmp_path / "instances.json").write_text(json.dumps(content))
    for _, output in pairs:
        x0, y0, x1, y1 = output["instances"].pred_boxes.tensor.unbind(dim=1)
        points = torch.stack([torch.stack(p, dim=1) for p in ((x0, y0), (x1, y0), (x0, y1))], 1)
        visible = torch.ones(*points.shape[:2], 1)
        output["instances"].pred_keypoints = torch.cat([points, visible], dim=2)
    options = {"kpt_oks_sigmas": [0.05, 0.05, 0.05]}
    again = copy.deepcopy(pairs)  # Detectron2 moves the points by half a pixel in place
    expected = run(COCOEvaluator(name, use_fast_impl=False, **options), again)["keypoints"]
    assert 5 < expected["AP"] < 95
    results = run(CocoEvaluator(name, **options), pairs)
    assert results["keypoints"] == pytest.approx(expected, rel=1e-12, nan_ok=True)
    with pytest.raises(ValueError, match=r"Keypoints must be as many.*got \[3\] and 17 sigmas"):
        run(CocoEvaluator(name), pairs)


def test_annotations_of_detectron2s_own_format(coco, tmp_path, catalog):
    name, pairs = coco()
    records = DatasetCatalog.get(name)
    other = catalog("eval_test_records")
    DatasetCatalog.register(other, lambda: records)
    MetadataCatalog.get(other).set(thing_classes=["class2", "class5", "class9"])
    with pytest.raises(ValueError, match="output_dir must be a folder"):
        CocoEvaluator(other)
    results = run(CocoEvaluator(other, str(tmp_path / "out")), pairs)
    assert results["bbox"] == pytest.approx(run(CocoEvaluator(name), pairs)["bbox"], nan_ok=True)


def test_masks_are_not_evaluated_where_the_data_set_has_none(coco, caplog):
    name, pairs = coco(masks=False)
    results = run(CocoEvaluator(name), pairs)
    assert set(results) == {"bbox"}
    assert "lack it: ['segm']" in caplog.text


def test_annotations_without_area_and_iscrowd(coco, tmp_path):
    name, pairs = coco(bare=True, predicted_masks=False)
    bare = run(CocoEvaluator(name), pairs)["bbox"]
    write_instances(tmp_path / "instances.json", np.random.default_rng(0), masks=True)
    assert run(CocoEvaluator(name), pairs)["bbox"] == pytest.approx(bare, nan_ok=True)


def test_no_detection_at_all_gives_zero(coco, caplog):
    name, pairs = coco()
    empty = [(image, {"instances": output["instances"][:0]}) for image, output in pairs]
    results = run(CocoEvaluator(name), empty)
    assert results["bbox"]["AP"] == results["segm"]["AP50"] == 0
    assert math.isnan(results["bbox"]["APl"])  # no annotation is large
    assert "detected nothing: AP is 0" in caplog.text


def test_outputs_without_instances_have_no_ap(coco, caplog):
    name, pairs = coco()
    assert run(CocoEvaluator(name), [(image, {}) for image, _ in pairs]) == {}
    assert "No AP" in caplog.text


@pytest.fixture
def sem_seg(tmp_path, catalog):
    """A data set of two label images with three classes; its name and labels."""

    def do(labels):
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir()
        for index, array in enumerate(labels):
            Image.fromarray(array).save(tmp_path / "images" / f"{index}.jpg")
            Image.fromarray(array).save(tmp_path / "labels" / f"{index}.png")
        name = catalog("eval_test_sem_seg")
        roots = str(tmp_path / "labels"), str(tmp_path / "images")
        DatasetCatalog.register(name, lambda: load_sem_seg(*roots))
        MetadataCatalog.get(name).set(stuff_classes=["a", "b", "c"], ignore_label=255)
        return name, [{"file_name": str(tmp_path / "images" / f"{i}.jpg")} for i in range(2)]

    return do


def test_mean_iou_equals_the_formula(sem_seg):
    rng = np.random.default_rng(0)
    labels = rng.choice(np.array([0, 1, 2, 255], dtype=np.uint8), size=(2, 32, 48))
    scores = rng.random((2, 3, 32, 48))
    name, inputs = sem_seg(labels)
    evaluator = SemSegEvaluator(name)
    evaluator.reset()
    for image, score in zip(inputs, scores, strict=True):
        evaluator.process([image], [{"sem_seg": torch.from_numpy(score)}])
    results = evaluator.evaluate()["sem_seg"]
    predicted, known = scores.argmax(axis=1), labels != 255
    ious = [
        ((predicted == c) & (labels == c)).sum()
        / (((predicted == c) & known) | (labels == c)).sum()
        for c in range(3)
    ]
    assert results["mIoU"] == pytest.approx(100 * np.mean(ious), rel=1e-12)
    accuracy = (predicted == labels)[known].mean()
    assert results["pACC"] == pytest.approx(100 * accuracy, rel=1e-12)


def test_a_label_outside_the_classes_names_the_file(sem_seg):
    labels = np.zeros((2, 32, 48), dtype=np.uint8)
    labels[1, 3, 3] = 77
    name, inputs = sem_seg(labels)
    evaluator = SemSegEvaluator(name)
    evaluator.reset()
    outputs = [{"sem_seg": torch.zeros(3, 32, 48)}]
    evaluator.process(inputs[:1], outputs)
    with pytest.raises(ValueError, match=r"below 3.*got label=77 in .*1\.png"):
        evaluator.process(inputs[1:], outputs)


def test_a_model_with_more_classes_than_the_data_set_is_an_error(sem_seg):
    name, inputs = sem_seg(np.zeros((2, 32, 48), dtype=np.uint8))
    evaluator = SemSegEvaluator(name)
    evaluator.reset()
    with pytest.raises(ValueError, match=r"at most 3 stuff classes.*got 4"):
        evaluator.process(inputs[:1], [{"sem_seg": torch.zeros(4, 32, 48)}])


def test_a_stuff_class_without_id_is_an_error_at_once(sem_seg):
    name, _ = sem_seg(np.zeros((2, 32, 48), dtype=np.uint8))
    MetadataCatalog.get(name).stuff_dataset_id_to_contiguous_id = {0: 1, 7: 2}
    with pytest.raises(ValueError, match=r"id of their own, got none for 'a'"):
        SemSegEvaluator(name)


@pytest.mark.parametrize("damage", ["truncated", "no image", "missing", "colours"])
def test_an_unreadable_label_file_is_named(tmp_path, damage):
    path = tmp_path / "label.png"
    rng = np.random.default_rng(0)
    shape = (64, 64, 3) if damage == "colours" else (64, 64)
    Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:1500])
    elif damage == "no image":
        path.write_text("version https://git-lfs")
    elif damage == "missing":
        path.unlink()
    with pytest.raises(ValueError, match=r"label file must .*label\.png"):
        read_label_image(str(path))
