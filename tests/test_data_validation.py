import importlib.util
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from gn_practical.training.data import ensure_scenes, prepare_stuff, write_instances_json
from gn_practical.training.data import pool as pool_module
from gn_practical.training.data.pool import Pool
from gn_practical.training.validation import (
    REASONS,
    InstancesTarget,
    PanopticTarget,
    Report,
    validate,
    write_clean,
)
from gn_practical.training.validation.annotations import check_instances
from gn_practical.training.validation.files import decode_file
from gn_practical.training.validation.masks import rle_counts
from gn_practical.training.validation.panoptic import segment_extents

ROOT = Path(__file__).parent.parent
TEST_DATA = Path(os.environ.get("GN_PRACTICAL_TEST_DATA", "not given"))
needs_test_data = pytest.mark.skipif(
    not TEST_DATA.is_dir(), reason="GN_PRACTICAL_TEST_DATA names no folder of real data"
)


# Planted faults ---------------------------------------------------------------------------------


def plant_in_images(content, images):
    """Damage the files of the first images; return what has to be reported."""
    entries, paths = content["images"], [images / i["file_name"] for i in content["images"]]
    data = [path.read_bytes() for path in paths[:7]]
    paths[0].write_bytes(data[0][: len(data[0]) // 2])
    paths[1].write_bytes(data[1][:-1])
    paths[2].write_bytes(b"")
    paths[3].write_bytes(b"<html>404 Not Found</html>")
    paths[4].unlink()
    paths[5].write_bytes(data[5][: len(data[5]) // 2] + b"\xff\xd9")  # truncated, with an end
    entries[6]["width"] += 7
    states = ("truncated", "truncated", "of zero bytes", "of unknown format", "missing", "corrupt")
    expected = {(f"image {s}", e["id"], None) for s, e in zip(states, entries, strict=False)}
    expected.add(("image of another size", entries[6]["id"], None))
    entries[7]["height"] = 0
    expected.add(("image entry malformed", entries[7]["id"], None))
    entries.append({**entries[8]})
    expected.add(("image id twice", entries[8]["id"], None))
    return expected


def annotation_faults(width, height):
    """What is changed of an annotation, by what has to be reported."""
    polygon = [1, 1, 9, 1, 9, 9]
    of_polygon = {"bbox": [1, 1, 8, 8], "area": 32}
    size = [height, width]
    return [
        ("box outside the image", {"bbox": [width - 5, 2, 9, 9]}),
        ("box empty", {"bbox": [5, 5, 0, 9]}),
        ("box empty", {"bbox": [5, 15, 9, -3]}),
        ("box not finite", {"bbox": [5, 5, float("nan"), 9]}),
        ("box malformed", {"bbox": [5, 5, 9]}),
        ("area not positive", {"area": 0}),
        ("category unknown", {"category_id": 12345}),
        ("annotation malformed", {"iscrowd": 7}),
        ("RLE malformed", {"segmentation": {"size": size, "counts": "no rle é"}}),
        ("RLE of another size", {"segmentation": rle(height, width + 1)}),
        ("RLE counts do not sum up", {"segmentation": {"size": size, "counts": [5, 5]}}),
        ("RLE without a pixel", {"segmentation": {"size": size, "counts": [height * width]}}),
        ("polygon of fewer than 3 points", {"segmentation": [polygon, [1, 1, 9, 9]], **of_polygon}),
        ("polygon malformed", {"segmentation": [polygon, [1, 1, 9, 9, 5]]}),
        ("polygon not finite", {"segmentation": [[1, 1, 9, 1, 9, float("inf")]]}),
        ("polygon outside the image", {"segmentation": [[1, 1, 9, 1, 9, height + 30]]}),
        ("mask malformed", {"segmentation": "mask.png"}),
        ("keypoints malformed", {"keypoints": [1, 2, 2, 4]}),
    ]


def rle(height, width):
    mask = np.zeros((height, width), np.uint8, order="F")
    mask[2:5, 3:7] = 1
    return {"size": [height, width], "counts": mask_util.encode(mask)["counts"].decode()}


def plant_in_annotations(content):
    """Damage annotations of images that are sound; return what has to be reported."""
    images = {image["id"]: image for image in content["images"][9:]}
    sound = [a for a in content["annotations"] if a["image_id"] in images and not a["iscrowd"]]
    sizes = [(i["width"], i["height"]) for i in (images[a["image_id"]] for a in sound)]
    expected = set()
    for number in range(len(annotation_faults(1, 1))):
        annotation, (reason, change) = sound[number], annotation_faults(*sizes[number])[number]
        annotation.update(change)
        expected.add((reason, annotation["image_id"], annotation["id"]))
    twice, lost, boxless = sound[-3:]
    twice["id"] = sound[-4]["id"]
    expected.add(("annotation id twice", twice["image_id"], twice["id"]))
    lost["image_id"] = 987654321
    expected.add(("annotation of unknown image", 987654321, lost["id"]))
    del boxless["bbox"]
    expected.add(("annotation malformed", boxless["image_id"], boxless["id"]))
    content["categories"].append({"id": 1, "name": "a new one"})
    content["categories"].append({"id": 9999, "name": content["categories"][0]["name"]})
    return expected | {("category id twice", None, None), ("category name twice", None, None)}


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def plant_in_panoptic(content, pngs):
    """Damage the panoptic annotations from the last on; return what has to be reported."""
    annotations = [a for a in reversed(content["annotations"]) if len(a["segments_info"]) > 1]
    paths = [pngs / annotation["file_name"] for annotation in annotations]
    segments = [annotation["segments_info"] for annotation in annotations]
    paths[0].unlink()
    flip_bit(paths[1])
    paths[2].write_bytes(paths[2].read_bytes()[:200])
    image = Image.open(paths[3])
    image.resize((image.width // 2, image.height), Image.NEAREST).save(paths[3])
    segments[4].append({"id": 77, "category_id": 1, "area": 5, "bbox": [0, 0, 1, 1], "iscrowd": 0})
    gone = segments[5].pop(0)
    segments[6][0]["area"] += 50
    segments[6][1]["bbox"] = [0, 0, 1, 1]
    segments[6][1]["category_id"] = 12345
    segments[4].append(dict(segments[4][0]))
    annotations_of_one = (("missing", 0), ("corrupt", 1), ("truncated", 2), ("of another size", 3))
    expected = {
        *((f"panoptic PNG {s}", annotations[i]["image_id"], None) for s, i in annotations_of_one),
        ("segment in the json alone", annotations[4]["image_id"], 77),
        ("segment id twice", annotations[4]["image_id"], segments[4][0]["id"]),
        ("segment in the PNG alone", annotations[5]["image_id"], gone["id"]),
        ("segment area differs", annotations[6]["image_id"], segments[6][0]["id"]),
        ("segment box differs", annotations[6]["image_id"], segments[6][1]["id"]),
        ("category unknown", annotations[6]["image_id"], segments[6][1]["id"]),
    }
    content["annotations"].append(dict(annotations[7]))
    return expected | {("panoptic annotation twice", annotations[7]["image_id"], None)}


def edit(path, *changes):
    """Apply changes to a json; return the union of what they return."""
    content = json.loads(path.read_text())
    results = [change(content) for change in changes]
    path.write_text(json.dumps(content))
    return set().union(*results)


def found(report):
    keys = [(fault.reason, fault.image_id, fault.annotation_id) for fault in report.distinct()]
    assert len(set(keys)) == len(keys), "a fault was reported twice"
    return set(keys)


def plant_all(instances, images, panoptic, pngs):
    expected = edit(instances, lambda c: plant_in_images(c, images), plant_in_annotations)
    expected |= edit(panoptic, lambda c: plant_in_panoptic(c, pngs))
    return expected


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawn") / "scenes"
    ensure_scenes(root, {"train": 26}, size=96)
    return root


@pytest.fixture
def scenes(drawn, tmp_path):
    return shutil.copytree(drawn, tmp_path / "scenes")


def targets_in(root):
    images = str(root / "images/train")
    return [
        InstancesTarget(str(root / "instances_train.json"), images),
        PanopticTarget(
            str(root / "panoptic_train.json"),
            str(root / "panoptic_train"),
            images,
            stuff_root=str(root / "panoptic_stuff_train"),
            instances_json=str(root / "instances_train.json"),
        ),
    ]


def check(*targets):
    return validate(targets, workers=1, show_progress=False)


@pytest.fixture
def damaged(scenes):
    """The scenes with some forty faults, and what they are."""
    stuff = scenes / "panoptic_stuff_train"
    expected = plant_all(
        scenes / "instances_train.json",
        scenes / "images/train",
        scenes / "panoptic_train.json",
        scenes / "panoptic_train",
    )
    Image.new("L", (96, 96), 9).save(stuff / "000009.png")
    (stuff / "000010.png").unlink()
    expected |= {("stuff PNG label unknown", 9, None), ("stuff PNG missing", 10, None)}
    return scenes, expected


def test_sound_scenes_have_no_fault(scenes):
    assert found(check(*targets_in(scenes))) == set()


def test_all_planted_faults_are_reported_and_nothing_else(damaged):
    root, expected = damaged
    report = check(*targets_in(root))
    assert len(expected) > 40
    assert found(report) - expected == set()
    assert expected - found(report) == set()
    assert {fault.reason for fault in report.faults} <= REASONS.keys()


@needs_test_data
def test_faults_planted_in_coco(tmp_path):
    tiny, panoptic = tmp_path / "tiny", tmp_path / "panoptic"
    shutil.copytree(TEST_DATA / "coco_tiny", tiny)
    shutil.copytree(TEST_DATA / "coco_panoptic_tiny", panoptic)
    instances = tiny / "annotations/instances_train2017.json"
    sound = [
        InstancesTarget(str(instances), str(tiny / "train2017")),
        PanopticTarget(
            str(panoptic / "panoptic_train.json"),
            str(panoptic / "panoptic_train"),
            str(panoptic / "train"),
        ),
    ]
    assert found(check(*sound)) == set()
    expected = plant_all(
        instances,
        tiny / "train2017",
        panoptic / "panoptic_train.json",
        panoptic / "panoptic_train",
    )
    assert len(expected) > 40
    assert found(check(*sound)) == expected


def swap_masks(content):
    """Give two instances of different images each other's mask."""
    first, *_, last = [a for a in content["annotations"] if not a["iscrowd"]]
    first["segmentation"], last["segmentation"] = last["segmentation"], first["segmentation"]


def boxes_to_corners(content):
    for annotation in content["annotations"]:
        x, y, width, height = annotation["bbox"]
        annotation.update(bbox=[x, y, x + width, y + height], segmentation=[])


def boxes_to_fractions(content):
    for annotation in content["annotations"]:
        annotation.update(bbox=[side / 96 for side in annotation["bbox"]], segmentation=[])


def repeat_annotation(content):
    content["annotations"].append({**content["annotations"][0], "id": 10_000})


def list_image_again(content):
    content["images"].append({**content["images"][0], "id": 10_000})


def only_crowds(content):
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1


@pytest.mark.parametrize(
    ("json_name", "change", "reasons"),
    [
        ("instances", swap_masks, {"box and mask differ", "area and mask differ"}),
        (
            "instances",
            lambda c: c["annotations"][0].update(area=96 * 96 * 4),
            {"area and mask differ"},
        ),
        ("instances", boxes_to_corners, {"boxes of corners", "box outside the image"}),
        ("instances", boxes_to_fractions, {"boxes between 0 and 1"}),
        ("instances", repeat_annotation, {"annotation repeated"}),
        ("instances", list_image_again, {"image file twice", "images differ"}),
        ("instances", only_crowds, {"crowds alone"}),
        (
            "panoptic",
            lambda c: c["annotations"].pop(),
            {"image without annotation", "images differ"},
        ),
        ("panoptic", lambda c: c["categories"][0].pop("isthing"), {"category malformed"}),
        ("instances", lambda c: c["images"][0].update(id="one"), None),
        ("instances", lambda c: c["images"][0].update(width=96.0), None),
        ("instances", lambda c: c["images"][0].update(file_name="a\0.jpg"), None),
        ("instances", lambda c: c["categories"][0].update(id="1"), None),
    ],
)
def test_a_look_at_the_numbers_finds(scenes, json_name, change, reasons):
    edit(scenes / f"{json_name}_train.json", lambda content: [change(content)][:0])
    faults = {fault.reason for fault in check(*targets_in(scenes)).faults}
    if reasons is None:
        assert faults & {"image entry malformed", "image ids of mixed kinds", "category malformed"}
    else:
        assert faults - {"box and mask differ"} == reasons - {"box and mask differ"}
        assert reasons <= faults


def test_a_key_that_an_object_has_twice_is_told(scenes):
    path = scenes / "instances_train.json"
    path.write_text(path.read_text().replace('"iscrowd": 0', '"iscrowd": 1, "iscrowd": 0', 1))
    (fault,) = check(InstancesTarget(str(path))).faults
    assert (fault.reason, "'iscrowd'" in fault.detail) == ("json key twice", True)


def test_stuff_pngs_are_compared_with_the_panoptic_ones(scenes):
    first, second = (scenes / f"panoptic_stuff_train/00000{number}.png" for number in (1, 2))
    first.write_bytes(second.read_bytes())
    assert found(check(targets_in(scenes)[1])) == {("stuff PNG of another image", 1, None)}


@pytest.mark.parametrize(("turn", "told"), [(1, False), (3, True), (2, True)])
def test_a_turn_by_exif_that_keeps_the_size_is_told(tmp_path, turn, told):
    exif = Image.Exif()
    exif[274] = turn
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert (decode_file(str(tmp_path / "a.jpg")).state == "turned by EXIF") == told


@needs_test_data
def test_official_data_has_no_fault(tmp_path):
    coco, cells = TEST_DATA / "coco_panoptic_100", TEST_DATA / "bccd"
    targets = [InstancesTarget(str(cells / "instances_val.json"), str(cells / "images"), area=True)]
    json_path = coco / "annotations/panoptic_val2017.json"
    source = (json_path, coco / "panoptic_val2017")
    prepare_stuff(*source, tmp_path / "stuff")
    write_instances_json(*source, tmp_path / "instances.json")
    targets.append(InstancesTarget(str(tmp_path / "instances.json"), area=True))
    stuff = {"stuff_root": str(tmp_path / "stuff"), "instances_json": targets[-1].json}
    targets.append(PanopticTarget(*map(str, source), str(coco / "val2017"), **stuff))
    assert check(*targets).faults == []


# Files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        *((mode, "a.png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        *((mode, "a.jpg") for mode in ("L", "RGB", "CMYK")),
        *(("RGB", f"a.{kind}") for kind in ("bmp", "tif", "webp", "gif")),
    ],
)
def test_what_detectron2_reads_is_sound(tmp_path, mode, name):
    noise = np.random.default_rng(0).integers(0, 256, (9, 17), np.uint8)
    image = Image.fromarray(noise.astype(np.uint16)) if mode == "I;16" else Image.fromarray(noise)
    (image if mode == "I;16" else image.convert(mode)).save(tmp_path / name)
    facts = decode_file(str(tmp_path / name))
    assert (facts.state, facts.size) == ("", (17, 9))


def test_trailing_bytes_after_a_jpeg_are_sound(tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.jpg")
    with open(tmp_path / "a.jpg", "ab") as file:
        file.write(b"camera maker's notes")
    assert decode_file(str(tmp_path / "a.jpg")).state == ""


def test_a_flipped_bit_of_a_png_is_found(tmp_path):
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    flip_bit(path)
    assert decode_file(str(path)).state == "corrupt"


def test_stray_bytes_within_a_jpeg_are_a_warning(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (64, 64), "red").save(path)
    data = path.read_bytes()
    path.write_bytes(data[:-2] + b"stray bytes" + data[-2:])
    facts = decode_file(str(path))
    assert (facts.state, REASONS[f"image {facts.state}"]) == ("with stray bytes", "warning")


@pytest.mark.parametrize("cut", [1, 12, 20, 1000])
def test_a_png_that_lacks_its_end_is_found(tmp_path, cut):
    path = tmp_path / "a.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-cut])
    assert decode_file(str(path)).state == "truncated"


def test_a_folder_is_unreadable(tmp_path):
    assert decode_file(str(tmp_path)).state == "unreadable"


@pytest.mark.parametrize("size", [(20, 30), (30, 20)])
def test_size_is_that_after_exif_rotation(tmp_path, size):
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    image = {"id": 1, "file_name": "a.jpg", "width": size[0], "height": size[1]}
    content = {"images": [image], "annotations": [], "categories": []}
    (tmp_path / "a.json").write_text(json.dumps(content))
    faults = check(InstancesTarget(str(tmp_path / "a.json"), str(tmp_path))).faults
    if size == (20, 30):
        assert not faults
    else:
        assert "20x30, the json 30x20" in faults[0].detail
        assert "EXIF" in faults[0].detail


# Annotations ------------------------------------------------------------------------------------


def reasons(change, size=(40, 30)):
    annotation = {"category_id": 1, "bbox": [1, 1, 5, 5], "area": 4, **change}
    found = check_instances([annotation], np.array([[size, size]]), categories={1})
    return [reason for _, reason, _ in found]


@pytest.mark.parametrize(
    "box",
    [[0, 0, 40, 30], [-1, -1, 42, 32], [-0.4, 0, 40.9, 30.9], [39.5, 29.5, 0.5, 0.5]],
)
def test_boxes_within_a_pixel_of_the_edge_are_sound(box):
    assert reasons({"bbox": box}) == []


@pytest.mark.parametrize("box", [[-1.5, 0, 9, 9], [0, -2, 9, 9], [35, 0, 6.5, 9], [0, 25, 9, 6.5]])
def test_boxes_beyond_a_pixel_are_not(box):
    assert reasons({"bbox": box}) == ["box outside the image"]


def test_every_fault_of_one_annotation_is_reported():
    change = {"bbox": [-9, 0, 0, 9], "area": -1, "category_id": 2, "segmentation": [[1, 2, 3]]}
    expected = ["category unknown", "box empty", "box outside the image", "area not positive"]
    assert reasons(change) == [*expected, "polygon malformed"]


def test_a_crowd_needs_neither_mask_nor_pixel():
    empty = {"size": [30, 40], "counts": [1200]}
    assert reasons({"iscrowd": 1, "segmentation": empty}) == []
    assert reasons({"iscrowd": 0, "segmentation": empty}) == ["RLE without a pixel"]


@pytest.mark.parametrize("value", [None, "x", {}, [[1], [1, 2]], ["1", "2", "3", "4"], [True] * 4])
def test_boxes_of_any_type_are_told(value):
    assert reasons({"bbox": value}) == ["box malformed"]


def test_rle_is_decoded_as_pycocotools_does():
    rng = np.random.default_rng(0)
    for _ in range(200):
        mask = rng.random(rng.integers(1, 400, 2)) < rng.choice([0, 0.001, 0.5, 0.999, 1])
        text = mask_util.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
        runs = rle_counts(text)
        ours = np.repeat(np.arange(len(runs)) % 2, runs).reshape(mask.shape, order="F")
        assert (ours == mask).all()


def test_damaged_rle_never_raises():
    rng = np.random.default_rng(0)
    text = rle(50, 60)["counts"]
    for _ in range(500):
        letters = list(text)
        letters[rng.integers(len(letters))] = chr(rng.integers(32, 127))
        cut = "".join(letters)[: rng.integers(len(letters) + 1)]
        found = reasons({"segmentation": {"size": [50, 60], "counts": cut}}, size=(60, 50))
        assert cut == text or all(reason.startswith("RLE") for reason in found)


def test_segment_extents_are_those_of_the_masks():
    ids = np.random.default_rng(0).integers(0, 6, (13, 17)).astype(np.uint32) * 70_001
    for number, (area, (x, y, w, h)) in segment_extents(ids).items():
        rows, columns = np.nonzero(ids == number)
        assert area == len(rows)
        assert (x, y) == (columns.min(), rows.min())
        assert (x + w, y + h) == (columns.max() + 1, rows.max() + 1)


# Jsons, reports, the tool -----------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"images": [], "annotations": [], "x": 0}'])
def test_an_unusable_json_is_a_fault_and_others_go_on(scenes, text):
    good, bad = targets_in(scenes)[0], scenes / "bad.json"
    bad.write_text(text)
    report = check(InstancesTarget(str(bad)), PanopticTarget(str(bad), ""), good)
    assert [fault.reason for fault in report.faults] == ["json unusable"] * 2
    assert report.checked[-1] == good.json


def test_masks_and_areas_are_asked_for_where_needed(scenes):
    path = scenes / "instances_train.json"
    edit(path, lambda c: [c["annotations"][0].pop(key) for key in ("segmentation", "area")] and [])
    assert found(check(InstancesTarget(str(path), masks=False))) == set()
    wanted = found(check(InstancesTarget(str(path), area=True)))
    assert {reason for reason, _, _ in wanted} == {"mask missing", "area missing"}


def test_clean_jsons_have_no_error_and_keep_what_is_sound(damaged):
    root, _ = damaged
    targets = targets_in(root)
    for target in targets:  # what no removal mends
        path = Path(target.json)
        edit(path, lambda c: c.update(categories=c["categories"][:9]) or [])
    edit(Path(targets[0].json), lambda c: c.update(categories=c["categories"][:5]) or [])
    before = [json.loads(Path(target.json).read_text()) for target in targets]
    report = check(*targets)
    removed = [
        write_clean(target.json, report.faults, f"{target.json}.clean.json") for target in targets
    ]
    clean = [target._replace(json=f"{target.json}.clean.json") for target in targets]
    again = check(*clean)
    assert again.count("error") == 0
    assert removed[0].images == 9
    lost = [a for a in before[0]["annotations"] if a["image_id"] in set(range(1, 9))]
    assert removed[0].annotations == len(lost) + 18 + 3
    assert [r.kept for r in removed] == [0, 0]
    with pytest.raises(ValueError, match="another file than what is read"):
        write_clean(targets[0].json, report.faults, targets[0].json)


def test_table_groups_by_reason_and_files_hold_all(damaged, tmp_path):
    report = check(*targets_in(damaged[0]))
    text = report.table(first=1)
    assert "error: image truncated (2)" in text
    assert "... and 1 more" in text
    assert text.index("error: RLE") < text.index("warning: category name twice (1)")
    report.save(tmp_path / "r.json")
    report.save(tmp_path / "r.csv")
    content = json.loads((tmp_path / "r.json").read_text())
    assert len(content["faults"]) == len(report.distinct())
    assert len((tmp_path / "r.csv").read_text().splitlines()) == len(report.distinct()) + 1
    with pytest.raises(ValueError, match=r"must end in \.json or \.csv, got output=r\.txt"):
        report.save("r.txt")


def load_tool():
    path = ROOT / "tools" / "validate_dataset.py"
    spec = importlib.util.spec_from_file_location("validate_dataset", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["validate_dataset.py", *map(str, words)])
    return load_tool().main()


def test_the_tool_reports_cleans_and_exits(damaged, tmp_path, monkeypatch, capsys):
    root = damaged[0]
    words = ["--instances", root / "instances_train.json", "--images", root / "images/train"]
    words += ["--workers", 1, "--output", tmp_path / "out/report.csv"]
    assert run_tool(monkeypatch, *words, "--write-clean", tmp_path / "clean.json") == 1
    said = capsys.readouterr().out
    assert "error: image truncated (2)" in said
    assert "clean.json: without 9 images" in said
    assert "1 errors remain that no removal corrects" in said
    assert (tmp_path / "out/report.csv").exists()
    words[1] = tmp_path / "clean.json"
    edit(words[1], lambda c: c.update(categories=c["categories"][:5]) or [])
    assert run_tool(monkeypatch, *words) == 0


@pytest.mark.usefixtures("catalogs_as_before")
def test_the_tool_takes_the_data_sets_of_a_config(damaged, tmp_path, monkeypatch, capsys):
    root, expected = damaged
    config = tmp_path / "config.yaml"
    names = ("images/train", "panoptic_train", "panoptic_train.json", "panoptic_stuff_train")
    entry = [str(root / name) for name in (*names, "instances_train.json")]
    # Registration itself refuses categories that share an id.
    edit(root / "instances_train.json", lambda c: c.update(categories=c["categories"][:5]) or [])
    config.write_text(
        json.dumps(
            {
                "DATASETS": {
                    "COCO_PANOPTIC": [["own_train", *entry]],
                    "TRAIN": ["own_train_separated", "own_train_stuffonly"],
                    "TEST": [],
                },
                "OUTPUT_DIR": str(tmp_path / "out"),
            }
        )
    )
    words = ("--config-file", config, "--workers", 1, "MODEL.MASK_ON", "True")
    words += ("INPUT.MASK_FORMAT", "bitmask")
    assert run_tool(monkeypatch, *words) == 1
    content = json.loads((tmp_path / "out/validation.json").read_text())
    rows = {(f["reason"], f["image_id"], f["annotation_id"]) for f in content["faults"]}
    mended = {("category id twice", None, None), ("category name twice", None, None)}
    assert rows == expected - mended


def test_the_tool_writes_over_nothing_that_it_reads(scenes, monkeypatch):
    path = scenes / "instances_train.json"
    text = path.read_text()
    words = ["--instances", path, "--annotations-only", "--workers", 1]
    with pytest.raises(SystemExit, match="another file than what is read"):
        run_tool(monkeypatch, *words, "--output", path)
    words += ["--write-clean", path, "--output", scenes / "r.json"]
    with pytest.raises(SystemExit, match="another file than what is read"):
        run_tool(monkeypatch, *words)
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --config-file, --instances or --panoptic"),
        (["--instances", "a.json"], "--instances needs --images, or --annotations-only"),
        (["--instances", "a.json", "--images", "a", "SEED", "1"], "overrides need --config-file"),
    ],
)
def test_wrong_arguments(monkeypatch, capsys, words, message):
    with pytest.raises(SystemExit, match="2"):
        run_tool(monkeypatch, *words)
    assert message in capsys.readouterr().err


def kill_worker(_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_an_error(monkeypatch):
    monkeypatch.setattr(pool_module, "_FEW_CHUNKS", 0)
    with (
        pytest.raises(RuntimeError, match=r"worker process must live .* died at a or soon"),
        Pool(1, show_progress=False) as pool,
    ):
        list(pool.map(kill_worker, ["a", "b", "c"], "dying"))


KILLED = """
import time
from gn_practical.training.data import pool as pool_module

pool_module._FEW_CHUNKS = 0
with pool_module.Pool(2, show_progress=False) as pool:
    print(list(pool.map(abs, [-1], "work")), flush=True)
    time.sleep(600)
"""


def test_workers_end_with_a_process_that_is_killed():
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", KILLED]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"[1]\n"
    started = psutil.Process(process.pid).children(recursive=True)
    assert len(started) > 1  # the fork server, workers
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(started, timeout=20)
    assert alive == []


# A data set that is interrupted as a terminal does it: all processes of the group are.
INTERRUPTED = """
import os, pickle, signal, sys
from gn_practical.training.validation import RecordsTarget, validate

class Interrupted(RecordsTarget):
    def check(self, session):
        list(session.pool.map(abs, [1], "work"))
        os.kill(0, signal.SIGINT)
        signal.pause()
        yield

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
first = pickle.load(open(sys.argv[1], "rb"))
report = validate([first, Interrupted("slow"), first], workers=1)
report.save(sys.argv[2])
sys.exit(report.exit_code)
"""


def test_ctrl_c_leaves_a_partial_report(scenes, tmp_path):
    first = targets_in(scenes)[0]
    (tmp_path / "first.pkl").write_bytes(pickle.dumps(first))
    command = [sys.executable, "-c", INTERRUPTED, tmp_path / "first.pkl", tmp_path / "r.json"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, start_new_session=True, env=environment, timeout=300)
    assert done.returncode == 130
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["complete"] is False
    assert content["checked"] == [first.json]
    assert content["unchecked"] == ["slow", first.json]
    assert "INTERRUPTED" in Report(unchecked=["slow"]).table()


def test_every_reason_is_in_the_docs():
    text = (ROOT / "docs" / "own_data.md").read_text()
    assert [reason for reason in REASONS if f"`{reason}`" not in text] == []
