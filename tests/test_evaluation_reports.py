"""Table, results.json, curves, pictures, and the choice of evaluators."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from detectron2 import evaluation
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.evaluation import DatasetEvaluators
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from test_evaluation_panoptic import random_truth, register, to_detectron2

from gn_practical import add_pgn_config
from gn_practical.training import add_training_config
from gn_practical.training.evaluation import (
    CocoEvaluator,
    PanopticEvaluator,
    PictureEvaluator,
    SemSegEvaluator,
    build_evaluator,
    plot_metrics,
    results_table,
    write_results,
)
from gn_practical.training.evaluation.curves import read_metrics
from gn_practical.training.evaluation.segments import class_color, draw_segments, panoptic_segments

__all__ = ["register"]  # a fixture

PANOPTIC = {"PQ": 42.147, "PQ_th": 49.816, "PQ_st": math.nan, "SQ": 1.0, "RQ": 2.0, "PQ-cat": 5.0}
BOX = {"AP": np.float64(40.7), "AP50": 61.2, "AP75": 44.6, "APs": 1.0}


# ---- table and file ----


def test_table_has_the_columns_of_what_was_evaluated():
    header, _, row = results_table({"panoptic_seg": PANOPTIC, "bbox": BOX}).splitlines()
    titles = ["PQ", "PQ_th", "PQ_st", "SQ", "RQ", "box AP", "box AP50", "box AP75"]
    assert [cell.strip() for cell in header.strip("|").split("|")] == titles
    values = ["42.147", "49.816", "-", "1.000", "2.000", "40.700", "61.200", "44.600"]
    assert [cell.strip() for cell in row.strip("|").split("|")] == values


def test_table_has_a_row_for_each_data_set():
    results = {"one": {"bbox": BOX}, "two": {"sem_seg": {"mIoU": 50.0}}}
    lines = results_table(results).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["data set", "box AP", "box AP50", "box AP75", "mIoU"]
    assert cells[2] == ["one", "40.700", "61.200", "44.600", "-"]
    assert cells[3] == ["two", "-", "-", "-", "50.000"]


@pytest.mark.parametrize("results", [{}, {"box_proposals": {"AR@100": 5.0}}])
def test_table_of_nothing_known_is_empty(results):
    assert results_table(results) == ""


def test_results_file_is_strict_json(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_results({"panoptic_seg": PANOPTIC, "bbox": BOX}, str(path))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read["panoptic_seg"]["PQ"] == 42.147
    assert read["panoptic_seg"]["PQ_st"] is None
    assert read["bbox"]["AP"] == 40.7
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


# ---- curves ----


def write_lines(path, records, tail=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
    return str(path)


def test_metrics_of_a_restarted_and_cut_off_run(tmp_path):
    first = [{"iteration": i, "total_loss": 10.0 + i, "lr": 0.1} for i in (19, 39, 59, 79)]
    # A record of an evaluation comes later in the file than the iterations after it.
    first.insert(3, {"iteration": 49, "panoptic_seg/PQ": 1.0})
    again = [{"iteration": i, "total_loss": float(i), "lr": 0.1} for i in (39, 59)]
    again.append({"iteration": 49, "panoptic_seg/PQ": 2.0, "panoptic_seg/PQ_th": math.nan})
    path = write_lines(tmp_path / "metrics.json", first + again, tail='{"iteration": 99, "tot')
    series = read_metrics(path)
    assert series["total_loss"] == ([19, 39, 59], [29.0, 39.0, 59.0])
    assert series["panoptic_seg/PQ"] == ([49], [2.0])
    assert "panoptic_seg/PQ_th" not in series


@pytest.mark.parametrize("content", [None, "", "{"])
def test_metrics_without_a_record_are_an_error(tmp_path, content):
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"metrics must .*metrics\.json. Train first"):
        plot_metrics(str(path), str(tmp_path / "curves.png"))


def test_curves_have_a_panel_for_each_kind_that_exists(tmp_path):
    losses = [{"iteration": i, "total_loss": 5 / i, "loss_cls": 2 / i} for i in range(20, 400, 20)]
    widths = []
    for extra in ({}, {"lr": 0.02}, {"lr": 0.02, "coco/bbox/AP": 30.0}):
        records = [*losses[:-1], {**losses[-1], **extra}]
        path = write_lines(tmp_path / "metrics.json", records)
        plot_metrics(path, str(tmp_path / "run" / "curves.png"))
        widths.append(Image.open(tmp_path / "run" / "curves.png").width)
    assert widths == [widths[0], 2 * widths[0], 3 * widths[0]]


# ---- pictures ----


def colorful(image):
    """Number of pixels of the picture's two panels that are not grey."""
    pixels = np.array(image)[32:].astype(int)
    half = (pixels.shape[1] - 8) // 2
    spread = pixels.max(axis=2) - pixels.min(axis=2)
    return (spread[:, :half] > 20).sum(), (spread[:, -half:] > 20).sum()


def grey_images(inputs):
    for image in inputs:
        Image.new("RGB", (56, 40), (128, 128, 128)).save(image["file_name"])


def panoptic_output(ids, segments):
    return {"panoptic_seg": (torch.from_numpy(ids), to_detectron2(segments))}


def test_pictures_of_panoptic_predictions_reach_files_and_storage(register, tmp_path):
    truths = [random_truth(np.random.default_rng(i)) for i in range(3)]
    name, inputs = register(truths)
    grey_images(inputs)
    evaluator = PictureEvaluator(name, str(tmp_path / "pictures"), num_pictures=2)
    nothing = panoptic_output(np.zeros((40, 56), np.int64), [])
    with EventStorage(7) as storage:
        for _ in range(2):  # a second evaluation starts over
            evaluator.reset()
            evaluator.process(inputs, [panoptic_output(*truths[0]), nothing, nothing])
            assert evaluator.evaluate() is None
    files = sorted(file.name for file in (tmp_path / "pictures").iterdir())
    assert files == ["001.png", "002.png"]
    assert [entry[0] for entry in storage._vis_data] == ["pictures/001", "pictures/002"] * 2
    first = Image.open(tmp_path / "pictures" / files[0])
    assert storage._vis_data[0][1].shape == (3, first.height, first.width)
    assert first.width == 2 * 512 + 8  # a small image is enlarged
    predicted, true = colorful(first)
    assert predicted == pytest.approx(true, rel=0.1)
    assert true > 10_000
    predicted, true = colorful(Image.open(tmp_path / "pictures" / files[1]))
    assert predicted == 0
    assert true > 10_000


@pytest.mark.parametrize("masks", [True, False])
def test_pictures_of_instances_leave_out_low_scores(register, tmp_path, masks):
    truths = [random_truth(np.random.default_rng(0), classes=(3, 7), crowds=False)]
    name, inputs = register(truths)
    grey_images(inputs)
    box = torch.tensor([[5.0, 5.0, 30.0, 30.0]])
    counts = []
    for score in (0.9, 0.1):
        instances = Instances((40, 56), pred_boxes=Boxes(box), pred_classes=torch.tensor([1]))
        instances.scores = torch.tensor([score])
        if masks:
            instances.pred_masks = torch.zeros(1, 40, 56, dtype=torch.bool)
            instances.pred_masks[0, 5:30, 5:30] = True
        evaluator = PictureEvaluator(name, str(tmp_path / "pictures"))
        evaluator.process(inputs, [{"instances": instances}])
        counts.append(colorful(Image.open(tmp_path / "pictures" / "001.png")))
    assert counts[0][0] > 500
    assert counts[1][0] == 0
    assert counts[0][1] == counts[1][1] > 1000


def test_picture_of_semantic_classes(register, tmp_path):
    truths = [random_truth(np.random.default_rng(0))]
    _, inputs = register(truths)
    grey_images(inputs)
    evaluator = PictureEvaluator("eval_test_stuffonly", str(tmp_path / "pictures"))
    evaluator.process(inputs, [{"sem_seg": torch.rand(4, 40, 56)}])
    assert min(colorful(Image.open(tmp_path / "pictures" / "001.png"))) > 1000


def test_a_picture_that_fails_is_a_warning(register, tmp_path, caplog):
    name, inputs = register([random_truth(np.random.default_rng(0))])
    evaluator = PictureEvaluator(name, str(tmp_path / "pictures"))
    evaluator.process(inputs, [{"panoptic_seg": (torch.zeros(40, 56), [{"id": 1}])}])
    evaluator.evaluate()
    assert "No picture of" in caplog.text
    assert not (tmp_path / "pictures").exists()


def test_drawing_leaves_the_random_state_alone():
    metadata = Metadata(thing_classes=["cat"], stuff_classes=["things", "sky"])
    ids = np.repeat([[1, 2]], 8, axis=0).repeat(8, axis=1)
    info = [{"id": 1, "category_id": 0, "isthing": True, "score": 0.9}]
    info.append({"id": 2, "category_id": 1, "isthing": False})
    before = np.random.get_state()[1].copy()
    segments = panoptic_segments(ids, info, metadata)
    draw_segments(np.zeros((8, 16, 3), np.uint8), segments, width=128)
    np.testing.assert_array_equal(before, np.random.get_state()[1])
    assert [segment.text for segment in segments] == ["cat 90%", "sky"]


def test_classes_without_colours_get_distinct_ones():
    colors = {class_color(Metadata(), i, is_thing) for i in range(30) for is_thing in (0, 1)}
    assert len(colors) == 60


# ---- the choice of evaluators ----


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    add_pgn_config(cfg)
    add_training_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    cfg.TEST.NUM_PICTURES = 0
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    return cfg


def kinds(evaluator):
    if isinstance(evaluator, DatasetEvaluators):
        return [type(part) for part in evaluator._evaluators]
    return [type(evaluator)]


def test_evaluators_of_a_panoptic_data_set(register, cfg):
    name, _ = register([random_truth(np.random.default_rng(0))])
    three = [SemSegEvaluator, CocoEvaluator, PanopticEvaluator]
    assert kinds(build_evaluator(cfg, name)) == three
    cfg.MODEL.PANOPTIC_FPN.COMBINE.ENABLED = False
    assert kinds(build_evaluator(cfg, name)) == three[:2]
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"  # a detector
    assert kinds(build_evaluator(cfg, name)) == [CocoEvaluator]
    assert kinds(build_evaluator(cfg, "eval_test_stuffonly")) == [SemSegEvaluator]
    cfg.TEST.NUM_PICTURES = 3
    assert kinds(build_evaluator(cfg, name)) == [CocoEvaluator, PictureEvaluator]


def test_evaluators_of_detectron2_itself(cfg, monkeypatch):
    monkeypatch.setattr(evaluation, "LVISEvaluator", lambda name, output_dir: (name, output_dir))
    monkeypatch.setattr(evaluation, "CityscapesInstanceEvaluator", lambda name: name)
    names = ("lvis_v1_val", "cityscapes_fine_instance_seg_val")
    assert build_evaluator(cfg, names[0], "out") == (names[0], "out")
    assert build_evaluator(cfg, names[1]) == names[1]


def test_an_unknown_evaluator_type_lists_the_known_ones(cfg):
    DatasetCatalog.register("eval_test_unknown", list)
    MetadataCatalog.get("eval_test_unknown").evaluator_type = "quality"
    try:
        with pytest.raises(ValueError, match=r"one of coco, .*pascal_voc.* evaluator_type=quality"):
            build_evaluator(cfg, "eval_test_unknown")
    finally:
        DatasetCatalog.remove("eval_test_unknown")
        MetadataCatalog.remove("eval_test_unknown")


def test_all_evaluators_in_one_pass_give_detectron2s_keys(register, cfg, tmp_path, caplog):
    truths = [random_truth(np.random.default_rng(i), crowds=False) for i in range(2)]
    name, inputs = register(truths)
    cfg.TEST.NUM_PICTURES = 1
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    labels = [np.array(Image.open(tmp_path / "data" / "stuff" / f"00{i}.png")) for i in (1, 2)]
    for image, truth, label in zip(inputs, truths, labels, strict=True):
        instances = Instances((40, 56), pred_boxes=Boxes(torch.tensor([[0.0, 0.0, 9.0, 9.0]])))
        instances.set("scores", torch.tensor([0.8]))
        instances.set("pred_classes", torch.tensor([0]))
        instances.set("pred_masks", torch.ones(1, 40, 56, dtype=torch.bool))
        scores = torch.from_numpy(np.stack([label == c for c in range(4)]).astype(np.float32))
        output = {**panoptic_output(*truth), "instances": instances, "sem_seg": scores}
        evaluator.process([image], [output])
    with caplog.at_level(logging.INFO):
        results = evaluator.evaluate()
    assert set(results) == {"sem_seg", "bbox", "segm", "panoptic_seg"}
    assert results["panoptic_seg"]["PQ"] == results["sem_seg"]["mIoU"] == 100
    assert (tmp_path / "run" / "pictures" / "001.png").is_file()
    assert (tmp_path / "run" / "inference" / "predictions.json").is_file()
