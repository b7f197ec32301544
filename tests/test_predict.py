"""A checkpoint predicts what an evaluation of it measures, from any kind of picture."""

import contextlib
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import read_image
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import gn_practical
from gn_practical.inference import Predictor
from gn_practical.inference.classes import Classes, classes_of
from gn_practical.inference.configs import config_for
from gn_practical.inference.dataset_ids import DatasetIds
from gn_practical.inference.reading import read_pixels
from gn_practical.inference.results import ResultsFolder
from gn_practical.inference.run import predict_all
from gn_practical.inference.sources import find_sources
from gn_practical.modeling import build_model
from gn_practical.training.checkpoint import GroupsCheckpointer
from gn_practical.training.data.scenes import ensure_scenes
from gn_practical.training.engine import Trainer, load_cfg
from gn_practical.weights import Description

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "configs/quickstart/tiny.yaml")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict_data") / "scenes"
    ensure_scenes(folder, {"train": 2, "val": 6}, size=64)
    return folder


@pytest.fixture(scope="module")
def run(scenes, tmp_path_factory):
    """A random model whose checkpoint knows its classes, and its own evaluation."""
    entries = [
        (
            f"predict_{split}",
            *(str(scenes / part) for part in (f"images/{split}", f"panoptic_{split}")),
            *(str(scenes / part) for part in (f"panoptic_{split}.json", f"panoptic_stuff_{split}")),
            str(scenes / f"instances_{split}.json"),
        )
        for split in ("train", "val")
    ]
    folder = tmp_path_factory.mktemp("predict_run")
    keys = {
        "DATASETS.COCO_PANOPTIC": entries,
        "DATASETS.TRAIN": ("predict_train_separated",),
        "DATASETS.TEST": ("predict_val_separated",),
        "MODEL.DEVICE": "cpu",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,  # what is random finds something
        "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH": 0.2,
        "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT": 1,
        "TEST.NUM_PICTURES": 0,
        "DATALOADER.NUM_WORKERS": 0,
        "OUTPUT_DIR": str(folder),
    }
    cfg = load_cfg(TINY, [str(word) for pair in keys.items() for word in pair])
    torch.manual_seed(3)
    model = build_model(cfg).eval()
    GroupsCheckpointer(model, str(folder), cfg=cfg).save("model_final")
    return cfg, model, str(folder / "model_final.pth")


@pytest.fixture(scope="module")
def predictor(run):
    return Predictor(run[2])


@pytest.fixture
def picture(scenes):
    return str(scenes / "images/val/000001.jpg")


def folder_of(predictor, inputs, path, **options):
    sources = find_sources([str(each) for each in inputs])[0]
    with ResultsFolder(path, predictor.classes, **options) as folder:
        return predict_all(predictor, sources, folder)


def test_the_results_are_those_of_the_evaluation_and_have_its_ap(
    run, scenes, tmp_path, monkeypatch
):
    cfg, model, weights = run
    monkeypatch.chdir(tmp_path)
    wanted = Trainer.test(cfg, model)
    predictor = Predictor(weights)
    truth = scenes / "panoptic_val.json"
    folder_of(predictor, [scenes / "images/val"], tmp_path / "out", ids=DatasetIds(truth))
    results = (tmp_path / "out/coco_instances_results.json").read_text()
    assert json.loads(results)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(scenes / "instances_val.json"))
        for task in ("bbox", "segm"):
            evaluation = COCOeval(coco, coco.loadRes(json.loads(results)), task)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            assert 100 * evaluation.stats[0] == pytest.approx(wanted[task]["AP"], abs=1e-9)
    theirs, ours = Path(cfg.OUTPUT_DIR) / "inference", tmp_path / "out"
    detections = (theirs / "coco_instances_results.json").read_text()
    assert json.loads(detections) == json.loads(results)
    entries = [by_image(folder / "predictions.json") for folder in (theirs, ours)]
    assert sum(map(len, (each["segments_info"] for each in entries[0].values()))) > 6
    assert entries[0].keys() == entries[1].keys()
    for of_theirs, of_ours in zip(*(each.values() for each in entries), strict=True):
        pixels = [
            np.asarray(Image.open(folder / "panoptic" / entry["file_name"]))
            for folder, entry in ((theirs, of_theirs), (ours, of_ours))
        ]
        assert np.array_equal(*pixels)
        assert segments(of_theirs) == segments(of_ours)


def by_image(path):
    annotations = json.loads(path.read_text())["annotations"]
    return {each["image_id"]: each for each in sorted(annotations, key=lambda a: a["image_id"])}


def segments(annotation):
    return [(each["id"], each["category_id"]) for each in annotation["segments_info"]]


def test_without_a_json_the_checkpoint_knows_the_ids_of_its_classes(predictor, scenes, tmp_path):
    folder_of(predictor, [scenes / "images/val"], tmp_path)
    truth = json.loads((scenes / "panoptic_val.json").read_text())["categories"]
    found = json.loads((tmp_path / "images.json").read_text())
    wanted = {(each["id"], each["name"], each["isthing"]) for each in truth}
    assert {(each["id"], each["name"], each["isthing"]) for each in found["categories"]} == wanted
    assert [each["id"] for each in found["images"]] == [1, 2, 3, 4, 5, 6]
    assert found["images"][0]["width"] == 64
    colors = {each["name"]: tuple(each["color"]) for each in truth}
    assert [colors[name] for name in predictor.classes.things] == list(predictor.classes.colors[0])


def files_of_all_kinds(folder):
    """Files, and the arrays that they were made of where there is such an array."""
    random = np.random.default_rng(0)
    color = random.integers(0, 256, (40, 30, 3), np.uint8)
    image, wide = Image.fromarray(color), (color.astype(np.uint16) << 8) + 77
    exif = Image.Exif()
    exif[274] = 6  # to be rotated
    image.save(folder / "exif.jpg", exif=exif)
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("P").save(folder / "palette.gif")
    arrays = {
        "color.png": color,
        "alpha.png": random.integers(0, 256, (40, 30, 4), np.uint8),
        "grey.png": color[..., 0],
        "grey16.png": random.integers(0, 400, (40, 30)).astype(np.uint16),
        "color16.png": wide,
    }
    for name, array in arrays.items():
        swapped = array if array.ndim == 2 else array[..., [2, 1, 0, 3][: array.shape[2]]]
        cv2.imwrite(str(folder / name), swapped)
    return {**dict.fromkeys(("exif.jpg", "cmyk.jpg", "palette.gif")), **arrays}


def test_pixels_are_those_that_training_reads(tmp_path, run, predictor):
    for name, array in files_of_all_kinds(tmp_path).items():
        path = str(tmp_path / name)
        for channels in ("BGR", "RGB"):
            wanted = read_image(path, channels)
            assert np.array_equal(read_pixels(path, channels), wanted), name
            with Image.open(path) as image:
                assert np.array_equal(read_pixels(image, channels), wanted), name
            if array is not None:
                assert np.array_equal(read_pixels(array, channels), wanted), name
    assert read_pixels(str(tmp_path / "exif.jpg"), "RGB").shape == (30, 40, 3)
    loaded = predictor.load(str(tmp_path / "exif.jpg"))
    wanted = DatasetMapper(run[0], is_train=False)({"file_name": str(tmp_path / "exif.jpg")})
    assert torch.equal(loaded.tensor, wanted["image"])
    assert loaded.tensor.shape[1:] == (64, 85)


def test_every_kind_of_input_gives_the_same_prediction(predictor, picture):
    of_path = predictor(picture)
    image = Image.open(picture)
    same = [*predictor([picture, Path(picture)]), predictor(image), predictor(np.asarray(image))]
    assert of_path.file_name == picture
    assert of_path.size == (64, 64)
    assert len(of_path.names) == len(of_path.instances) > 0
    assert of_path.panoptic.shape == (64, 64)
    assert {each.id for each in of_path.segments} == set(np.unique(of_path.panoptic)) - {0}
    assert [each.area for each in of_path.segments] == [
        (of_path.panoptic == each.id).sum() for each in of_path.segments
    ]
    for each in same:
        assert torch.equal(each.instances.pred_boxes.tensor, of_path.instances.pred_boxes.tensor)
        assert np.array_equal(each.panoptic, of_path.panoptic)
    assert of_path.draw().shape == (512, 512, 3)
    assert of_path.draw(1).shape == (64, 64, 3)
    assert gn_practical.Predictor is Predictor


def test_pictures_of_other_sizes_do_not_change_a_prediction(predictor, picture):
    image = Image.open(picture)
    images = [image, image.resize((64, 90)), image.resize((64, 90)), image]
    alone = [predictor(each) for each in images]
    together = predictor.predict(predictor.load(each) for each in images)
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(one.instances.scores, other.instances.scores, atol=1e-5)
        assert np.mean(one.panoptic == other.panoptic) > 0.99


def test_thresholds_sizes_and_classes(run, predictor, picture):
    every = predictor(picture)
    middle = float(every.instances.scores.median())
    some = Predictor(run[2], threshold=middle)
    kept = some(picture)
    assert 0 < len(kept.instances) < len(every.instances)
    assert kept.instances.scores.min() >= middle
    name = every.names[0]
    changed = Predictor(run[2], classes=[f" {name} ,sky"], min_size=256)
    assert predictor.load(picture).tensor.shape == (3, 64, 64)
    assert changed.load(picture).tensor.shape == (3, 256, 256)
    prediction = changed.predict([predictor.load(picture)])[0]
    assert set(prediction.names) == {name}
    assert {each.name for each in prediction.segments} <= {name, "sky"}
    assert set(np.unique(prediction.panoptic)) <= {0, *(each.id for each in prediction.segments)}
    with pytest.raises(ValueError, match=r"the model's 9, got 'disk'. Near to it: disc"):
        changed.keep_classes(["disk"])
    with pytest.raises(ValueError, match="from 0 to 1, got threshold=50"):
        Predictor(run[2], threshold=50)


def test_configs_of_the_zoo_are_read_whatever_tags_they_have(caplog):
    cfg = config_for("x.pkl", Description(), "COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    assert cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    assert len(cfg.MODEL.ANCHOR_GENERATOR.SIZES) == 5
    assert not caplog.records


def test_a_model_that_code_has_built_takes_the_weights(run, predictor, picture, tmp_path):
    cfg, trained, weights = run
    model = build_model(cfg)
    built = Predictor(weights, model=model)
    assert not model.training
    assert torch.equal(built(picture).instances.scores, predictor(picture).instances.scores)
    assert built.classes == predictor.classes
    torch.save({"model": trained.state_dict()}, tmp_path / "plain.pth")
    with pytest.raises(ValueError, match=r"plain.pth, which does not. Give --config-file"):
        Predictor(tmp_path / "plain.pth", model=model)


def test_what_is_no_picture_is_one_line(predictor, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("RGB", (1, 5000)).save(tmp_path / "thread.png")
    Image.new("RGB", (60, 60)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:60])
    for given, said in (
        (
            tmp_path / "text.jpg",
            r"whole and readable, got .*text.jpg: cannot identify image file\.",
        ),
        (tmp_path / "cut.png", r"whole and readable, got .*cut.png: "),
        (tmp_path / "missing.jpg", r"missing.jpg: No such file"),
        (tmp_path / "thread.png", r"longest of 1333, got .*thread.png of 1x5000"),
        (np.zeros((4, 4, 3)), "uint8 or uint16, got dtype=float64"),
        (np.zeros((3, 4, 5), np.uint8), r"got shape=\(3, 4, 5\)"),
        (7, "a path, an array or a PIL image, got int"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            predictor(given)
        assert "\n" not in str(error.value)


def test_weights_without_a_config_say_which_to_give(run, predictor, tmp_path, picture):
    cfg, model, weights = run
    state = {"model": model.state_dict()}
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"Give --config-file: the config\.yaml"):
        Predictor(tmp_path / "model.pth")
    zoo = "COCO-PanopticSegmentation/panoptic_fpn_R_50_3x.yaml"
    torch.save(state, tmp_path / "model_final_c10459.pkl")
    with pytest.raises(ValueError, match=f"model zoo: give --config-file {zoo}"):
        Predictor(tmp_path / "model_final_c10459.pkl")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    with pytest.raises(ValueError, match=f"Give --config-file {tmp_path}/config.yaml"):
        Predictor(tmp_path / "model_final_c10459.pkl")
    with_config = Predictor(tmp_path / "model_final_c10459.pkl", str(tmp_path / "config.yaml"))
    ours, theirs = predictor(picture), with_config(picture)
    assert torch.equal(ours.instances.scores, theirs.instances.scores)
    with pytest.raises(ValueError, match="must fill the whole model for evaluation"):
        Predictor(weights, opts=["MODEL.FPN.OUT_CHANNELS", "16"])
    with pytest.raises(
        ValueError, match=r"name in Detectron2's model zoo, got config_file=no.yaml"
    ):
        Predictor(weights, "no.yaml")
    (tmp_path / "lazy.yaml").write_text("model: {_target_: somewhere}")
    with pytest.raises(ValueError, match=r"got .*lazy.yaml, a Python config, which is code"):
        Predictor(weights, str(tmp_path / "lazy.yaml"))
    with pytest.raises(ValueError, match=r"got device=cuda:99"):
        Predictor(weights, device="cuda:99")


def test_classes_without_names_have_numbers():
    classes = Classes()
    assert classes.dataset_id(7) == 7
    assert (True, 3) in classes.chosen(["3"])
    with pytest.raises(ValueError, match="numbers for a model that knows no names, got 'cat'"):
        classes.chosen(["cat"])
    named = classes_of(Description(class_names={"thing": ["a, b", "c"], "stuff": ["things", "d"]}))
    assert not named.has_ids
    ids = [(each["name"], each["id"]) for each in named.categories()]
    assert ids == [("a, b", 0), ("c", 1), ("d", 3)]
    assert named.chosen(["a, b"]).classes == {(True, 0)}
