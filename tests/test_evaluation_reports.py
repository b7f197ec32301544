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
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, DatasetEvaluators
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from matplotlib.figure import Figure
from PIL import Image
from test_evaluation_panoptic import random_truth, register, to_detectron2

from gn_practical import add_pgn_config
from gn_practical.inference.drawing import with_colors
from gn_practical.training import add_training_config
from gn_practical.training.evaluation import (
    CocoEvaluator,
    PanopticEvaluator,
    PictureEvaluator,
    SemSegEvaluator,
    build,
    build_evaluator,
    plot_metrics,
    results_table,
    write_results,
)
from gn_practical.training.evaluation.curves import read_metrics

__all__ = ["register"]  # a fixture

PANOPTIC = {"PQ": 42.147, "PQ_th": 49.816, "PQ_st": math.nan, "SQ": 1.0, "RQ": 2.0, "PQ-cat": 5.0}
BOX = {"AP": np.float64(40.7), "AP50": 61.2, "AP75": 44.6, "APs": 1.0}


# ---- table and file ----


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_has_what_was_evaluated_but_for_single_classes():
    lines = results_table({"panoptic_seg": PANOPTIC, "bbox": BOX}).splitlines()
    assert cells(lines[0]) == ["", "PQ", "PQ_th", "PQ_st", "SQ", "RQ"]
    assert cells(lines[2]) == ["panoptic_seg", "42.147", "49.816", "-", "1.000", "2.000"]
    assert cells(lines[4]) == ["", "AP", "AP50", "AP75", "APs"]
    assert cells(lines[6]) == ["bbox", "40.700", "61.200", "44.600", "1.000"]


def test_table_has_a_row_for_each_data_set():
    results = {"one": {"bbox": BOX}, "two": {"bbox": {"AP": 1.0}, "sem_seg": {"mIoU": 50.0}}}
    lines = results_table(results).splitlines()
    assert cells(lines[0]) == ["bbox", "AP", "AP50", "AP75", "APs"]
    assert cells(lines[2]) == ["one", "40.700", "61.200", "44.600", "1.000"]
    assert cells(lines[3]) == ["two", "1.000", "-", "-", "-"]
    assert cells(lines[5]) == ["sem_seg", "mIoU"]
    assert cells(lines[7]) == ["two", "50.000"]


@pytest.mark.parametrize("dataset", ["", "a_data_set_with_a_name_of_forty_letters_"])
def test_table_fits_into_100_columns_and_loses_nothing(dataset):
    metrics = {f"metric_{index:02d}": 100.0 * index for index in range(40)}
    results = {dataset: {"task": metrics}} if dataset else {"task": metrics}
    lines = results_table(results).splitlines()
    assert max(map(len, lines)) <= 100
    found = [cell for line in lines for cell in cells(line)]
    assert all(name in found and f"{value:.3f}" in found for name, value in metrics.items())


@pytest.mark.parametrize("results", [{}, {"bbox": {}}, {"bbox": {"AP-cat": 5.0}}])
def test_table_of_nothing_is_empty(results):
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


def figure_of(monkeypatch, tmp_path, records, results=None):
    """The figure that is saved, and its panels by title."""
    figures = []
    save = Figure.savefig

    def keep(figure, *args, **kwargs):
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    if results is not None:
        write_results(results, str(tmp_path / "results.json"))
    path = write_lines(tmp_path / "metrics.json", records)
    plot_metrics(path, str(tmp_path / "run" / "curves.png"))
    assert Image.open(tmp_path / "run" / "curves.png").size
    return figures[0], {axes.get_title(): axes for axes in figures[0].axes}


LOSSES = [
    {"iteration": i, "total_loss": 5 / i, "loss_cls": 2 / i, "loss_box": 1 / i, "rpn/anchors": 7}
    for i in range(20, 400, 20)
]


def test_curves_have_a_panel_for_each_kind_that_exists(tmp_path, monkeypatch):
    titles = []
    for extra in ({}, {"lr": 0.02}, {"lr": 0.02, "coco/bbox/AP": 30.0, "coco/bbox/AP-cat": 1.0}):
        records = [*LOSSES[:-1], {**LOSSES[-1], **extra}]
        results = {"coco": {"bbox": {"AP": 30.0, "AP-cat": 1.0, "AP50": math.nan}}}
        _, panels = figure_of(monkeypatch, tmp_path, records, results)
        titles.append([title.partition(" (")[0] for title in panels])
    one, two = ["training loss"], ["training loss", "learning rate"]
    assert titles == [one, two, [*two, "coco/bbox"]]


def test_legends_are_below_the_curves(tmp_path, monkeypatch):
    figure, panels = figure_of(monkeypatch, tmp_path, LOSSES)
    figure.canvas.draw()
    axes = panels["training loss (pale: as written, strong: smoothed)"]
    assert len(axes.get_legend().get_texts()) == 3
    assert not axes.get_legend().get_window_extent().overlaps(axes.bbox)
    assert axes.get_legend().get_window_extent().y0 >= 0  # inside the picture


def test_a_single_evaluation_has_bars(tmp_path, monkeypatch):
    records = [*LOSSES, {"iteration": 399, "bbox/AP": 30.0, "bbox/AP50": 50.0}]
    results = {"bbox": {"AP": 30.0, "AP50": 50.0}}
    _, panels = figure_of(monkeypatch, tmp_path, records, results)
    assert [bar.get_width() for bar in panels["bbox"].patches] == [30.0, 50.0]
    assert panels["bbox"].get_xlabel() == "after iteration 399"
    records.append({"iteration": 499, "bbox/AP": 31.0, "bbox/AP50": 51.0})
    _, panels = figure_of(monkeypatch, tmp_path, records, results)
    assert [line.get_label() for line in panels["bbox"].lines] == ["AP: 31", "AP50: 51"]


class DepthEvaluator(DatasetEvaluator):
    """What somebody adds: a task of its own with two metrics and one of a class."""

    def process(self, inputs, outputs):
        pass

    def evaluate(self):
        return {"depth": {"RMSE": 0.5, "delta": 97.0, "RMSE-cat": 0.1}}


def test_a_new_evaluator_needs_no_other_list(cfg, tmp_path, monkeypatch):
    monkeypatch.setitem(build.BUILDERS, "depth", lambda cfg, name, folder: [DepthEvaluator()])
    DatasetCatalog.register("eval_test_depth", list)
    MetadataCatalog.get("eval_test_depth").evaluator_type = "depth"
    try:
        results = build_evaluator(cfg, "eval_test_depth").evaluate()
    finally:
        DatasetCatalog.remove("eval_test_depth")
        MetadataCatalog.remove("eval_test_depth")
    lines = results_table(results).splitlines()
    assert [cells(lines[0]), cells(lines[2])] == [
        ["", "RMSE", "delta"],
        ["depth", "0.500", "97.000"],
    ]
    records = [{**LOSSES[-1], "depth/RMSE": 0.5, "depth/delta": 97.0, "depth/RMSE-cat": 0.1}]
    _, panels = figure_of(monkeypatch, tmp_path, records, results)
    assert [text.get_text() for text in panels["depth"].get_yticklabels()] == ["RMSE", "delta"]


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
    evaluator.process(inputs, [{"panoptic_seg": (torch.ones(40, 56), [{"id": 1}])}])
    evaluator.evaluate()
    assert "No picture of" in caplog.text
    assert not (tmp_path / "pictures").exists()


def test_pictures_of_images_of_one_name_do_not_collide(register, tmp_path):
    truths = [random_truth(np.random.default_rng(i)) for i in range(2)]
    name, inputs = register(truths)
    for folder, image in zip("ab", inputs, strict=True):
        path = tmp_path / folder / "1.jpg"
        path.parent.mkdir()
        Image.new("RGB", (56, 40)).save(path)
        image["file_name"] = str(path)
    evaluator = PictureEvaluator(name, str(tmp_path / "pictures"))
    for _ in range(2):  # again under the same names
        evaluator.reset()
        evaluator.process(inputs, [panoptic_output(*truth) for truth in truths])
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["1.png", "1_2.png"]


def test_drawing_leaves_the_random_state_alone(register, tmp_path):
    truth = random_truth(np.random.default_rng(0))
    name, inputs = register([truth])
    grey_images(inputs)
    pictures = []
    for seed in (1, 2):
        np.random.seed(seed)
        before = np.random.get_state()[1].copy()
        evaluator = PictureEvaluator(name, str(tmp_path / "pictures"))
        evaluator.process(inputs, [panoptic_output(*truth)])
        np.testing.assert_array_equal(before, np.random.get_state()[1])
        pictures.append(np.array(Image.open(tmp_path / "pictures" / "001.png")))
    np.testing.assert_array_equal(*pictures)


def test_classes_without_colours_get_distinct_ones():
    classes = [str(i) for i in range(10)]
    metadata = with_colors(Metadata(thing_classes=classes, stuff_classes=classes))
    assert len({tuple(c) for c in [*metadata.thing_colors, *metadata.stuff_colors]}) == 20
    own = with_colors(Metadata(thing_classes=classes, thing_colors=[(1, 2, 3)])).thing_colors
    assert own[0] == (1, 2, 3)
    assert len(own) == 10


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
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    assert kinds(build_evaluator(cfg, name)) == [COCOEvaluator]
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
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
