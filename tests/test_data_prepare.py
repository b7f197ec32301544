import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from gn_practical.training.data import (
    DatasetError,
    prepare_coco,
    prepare_stuff,
    write_instances_json,
)
from gn_practical.training.data import pool as pool_module

TOOL = Path(__file__).parent.parent / "tools" / "prepare_panoptic_coco.py"
CATEGORIES = [  # not in the order of their ids, with gaps; as COCO's, stuff among things
    {"id": 95, "name": "bridge", "isthing": 0},
    {"id": 3, "name": "car", "isthing": 1},
    {"id": 92, "name": "banner", "isthing": 0},
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 200, "name": "rug", "isthing": 0},
]
REFERENCE_LABELS = {1: 0, 3: 0, 92: 1, 95: 2, 200: 3}


def write_panoptic(root, count=5, width=13, height=9):
    """Random segments on a grid, with void, a crowd, and ids that use all channels."""
    rng = np.random.default_rng(0)
    (root / "panoptic").mkdir(parents=True)
    images, annotations = [], []
    for image_id in range(1, count + 1):
        ids = rng.choice([0, 7, 300, 70_000, 2_000_000], (height, width))
        rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
        name = f"{image_id:03d}"
        Image.fromarray(rgb).save(root / "panoptic" / f"{name}.png")
        image = {"id": image_id, "file_name": f"{name}.jpg", "width": width, "height": height}
        images.append(image)
        segments = [
            {"id": int(i), "category_id": int(c), "iscrowd": int(i == 7)}
            for i, c in zip([7, 300, 70_000, 2_000_000], [3, 1, 200, 95], strict=True)
        ]
        annotation = {"image_id": image_id, "file_name": f"{name}.png", "segments_info": segments}
        annotations.append(annotation)
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (root / "panoptic.json").write_text(json.dumps(content))
    return content


def reference(root, annotation):
    """Pixel by pixel, as Detectron2's prepare_panoptic_fpn.py defines it."""
    rgb = np.asarray(Image.open(root / "panoptic" / annotation["file_name"])).tolist()
    classes = {s["id"]: s["category_id"] for s in annotation["segments_info"]}
    rows = []
    for row in rgb:
        ids = [r + 256 * g + 65536 * b for r, g, b in row]
        rows.append([REFERENCE_LABELS[classes[i]] if i in classes else 255 for i in ids])
    return np.array(rows)


def prepare(root, **kwargs):
    return prepare_stuff(root / "panoptic.json", root / "panoptic", root / "stuff", **kwargs)


def test_stuff_equals_the_slow_reference(tmp_path):
    content = write_panoptic(tmp_path)
    assert prepare(tmp_path) == 5
    for annotation in content["annotations"]:
        made = Image.open(tmp_path / "stuff" / annotation["file_name"])
        assert made.mode == "L"
        assert (np.asarray(made) == reference(tmp_path, annotation)).all()
    assert len(list((tmp_path / "stuff").iterdir())) == 5


def test_two_processes_make_what_none_makes(tmp_path, monkeypatch):
    write_panoptic(tmp_path, count=40)
    source = (tmp_path / "panoptic.json", tmp_path / "panoptic")
    prepare_stuff(*source, tmp_path / "one")
    monkeypatch.setattr(pool_module, "_FEW_CHUNKS", 0)
    prepare_stuff(*source, tmp_path / "two", workers=2)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_an_error_in_a_process_arrives_as_it_is(tmp_path, monkeypatch):
    write_panoptic(tmp_path, count=40)
    monkeypatch.setattr(pool_module, "_FEW_CHUNKS", 0)
    (tmp_path / "panoptic" / "020.png").unlink()
    with pytest.raises(DatasetError, match=r"^\S*020\.png must exist\. Unpack"):
        prepare(tmp_path, workers=2)


def test_a_second_run_makes_only_what_is_missing_or_damaged(tmp_path):
    content = write_panoptic(tmp_path)
    prepare(tmp_path)
    stuff = tmp_path / "stuff"
    (stuff / "001.png").unlink()
    (stuff / "002.png").write_bytes((stuff / "002.png").read_bytes()[:60])
    Image.new("L", (4, 4)).save(stuff / "003.png")  # another size
    Image.new("L", (13, 9), 77).save(stuff / "004.png")  # a label that no class has
    (stuff / "005.png.tmp").write_bytes(b"left by a run that was killed")
    os.utime(stuff / "005.png", (1, 1))
    prepare(tmp_path)
    for annotation in content["annotations"]:
        made = np.asarray(Image.open(stuff / annotation["file_name"]))
        assert (made == reference(tmp_path, annotation)).all()
    assert (stuff / "005.png").stat().st_mtime == 1
    prepare(tmp_path, overwrite=True)
    assert (stuff / "005.png").stat().st_mtime > 1


def test_instances_come_from_the_things_with_their_crowds(tmp_path):
    content = write_panoptic(tmp_path)
    path = tmp_path / "new" / "instances.json"
    count = write_instances_json(tmp_path / "panoptic.json", tmp_path / "panoptic", path)
    made = json.loads(path.read_text())
    assert count == len(made["annotations"]) == 10
    assert [c["id"] for c in made["categories"]] == [1, 3]
    assert made["images"] == content["images"]
    assert len({a["id"] for a in made["annotations"]}) == 10
    for annotation in made["annotations"]:
        png = tmp_path / "panoptic" / f"{annotation['image_id']:03d}.png"
        rgb = np.asarray(Image.open(png)).astype(int)
        segment_id = {3: 7, 1: 300}[annotation["category_id"]]
        mask = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2] == segment_id
        assert (mask_util.decode(annotation["segmentation"]) == mask).all()
        assert annotation["iscrowd"] == (segment_id == 7)
        assert annotation["area"] == mask.sum()


def edit(root, change):
    content = json.loads((root / "panoptic.json").read_text())
    change(content)
    (root / "panoptic.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / "panoptic.json").unlink(), r"panoptic\.json must exist"),
        (
            lambda r: (r / "panoptic.json").write_text('{"images": [\n1, 2'),
            r"panoptic\.json must be valid json, got an error at line 2, column 5",
        ),
        (lambda r: (r / "panoptic/003.png").unlink(), r"003\.png must exist"),
        (
            lambda r: (r / "panoptic/003.png").write_bytes(b"\x89PNG"),
            r"003\.png must be a whole PNG",
        ),
        (
            lambda r: Image.new("RGB", (3, 4)).save(r / "panoptic/003.png"),
            r"003\.png must be 13x9 pixels as the json says, got 3x4",
        ),
        (
            lambda r: edit(r, lambda c: c["categories"].pop(1)),
            r"must use only ids of its categories, got category_id=3",
        ),
        (
            lambda r: edit(r, lambda c: c["categories"][0].pop("isthing")),
            r"whether it is a thing .*'bridge'.*COCO_INSTANCES",
        ),
        (
            lambda r: edit(r, lambda c: c["annotations"][0].pop("segments_info")),
            r"COCO's panoptic format, got KeyError: 'segments_info'",
        ),
        (
            lambda r: edit(r, lambda c: c["categories"].append(dict(c["categories"][0]))),
            r"every category its own id, got id=95 twice",
        ),
    ],
)
def test_errors_name_the_file_and_what_is_wrong(tmp_path, damage, message):
    write_panoptic(tmp_path)
    damage(tmp_path)
    with pytest.raises(DatasetError, match=message):
        prepare(tmp_path)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "output",
    [
        lambda root: root / "panoptic",
        lambda root: f"{root}/panoptic/",
        lambda root: root / "new" / ".." / "panoptic",
        lambda root: make(root / "link", lambda p: p.symlink_to(root / "panoptic")),
        lambda root: hard_linked(root),
    ],
)
def test_nothing_that_is_read_is_written_over(tmp_path, output):
    write_panoptic(tmp_path)
    (tmp_path / "new").mkdir()
    output, before = output(tmp_path), contents(tmp_path / "panoptic")
    with pytest.raises(DatasetError, match=r"another file than what is read, got \S+001\.png for"):
        prepare_stuff(tmp_path / "panoptic.json", tmp_path / "panoptic", output)
    assert contents(tmp_path / "panoptic") == before


def make(path, function):
    function(path)
    return path


def hard_linked(root):
    (root / "linked").mkdir()
    os.link(root / "panoptic/001.png", root / "linked/001.png")
    return root / "linked"


@pytest.mark.parametrize("name", ["panoptic.json", "panoptic/001.png"])
def test_the_instances_json_is_no_source(tmp_path, name):
    write_panoptic(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(DatasetError, match="another file than what is read"):
        write_instances_json(tmp_path / "panoptic.json", tmp_path / "panoptic", tmp_path / name)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["../panoptic/x.png", "/tmp/x.png", "a/../../x.png", "a\0.png"])
def test_nothing_is_written_outside_the_output(tmp_path, name):
    write_panoptic(tmp_path)
    edit(tmp_path, lambda c: c["annotations"][1].update(file_name=name))
    with pytest.raises(DatasetError, match="stays in the folder of panoptic PNGs, got file_name="):
        prepare(tmp_path)
    assert not (tmp_path / "stuff").exists()


def test_a_link_inside_the_output_leads_nowhere_else(tmp_path):
    write_panoptic(tmp_path)
    for folder in ("panoptic/sub", "elsewhere", "stuff"):
        (tmp_path / folder).mkdir()
    (tmp_path / "panoptic/001.png").rename(tmp_path / "panoptic/sub/001.png")
    (tmp_path / "stuff/sub").symlink_to(tmp_path / "elsewhere")
    edit(tmp_path, lambda c: c["annotations"][0].update(file_name="sub/001.png"))
    with pytest.raises(DatasetError, match="a link to another place"):
        prepare(tmp_path)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_two_annotations_never_share_a_png(tmp_path):
    write_panoptic(tmp_path)
    edit(tmp_path, lambda c: c["annotations"][1].update(file_name="001.png"))
    with pytest.raises(DatasetError, match=r"got file_name='001\.png' 2 times"):
        prepare(tmp_path)


@pytest.mark.parametrize("kind", ["grey", "16 bit", "BGR", "palette of grey"])
def test_pngs_that_lost_their_ids_are_refused(tmp_path, kind):
    write_panoptic(tmp_path)
    path = tmp_path / "panoptic/002.png"
    image = Image.open(path)
    rgb = np.asarray(image)
    changed = {
        "grey": lambda: image.convert("L"),
        "16 bit": lambda: Image.fromarray(rgb[..., 0].astype(np.uint16) * 257),
        "BGR": lambda: Image.fromarray(rgb[..., ::-1].copy()),
        "palette of grey": lambda: image.convert("L").convert("P"),
    }[kind]()
    changed.save(path)
    with pytest.raises(DatasetError, match=r"002\.png must hold the ids of its segments"):
        prepare(tmp_path)


def test_a_palette_that_keeps_the_ids_is_taken(tmp_path):
    content = write_panoptic(tmp_path)
    expected = reference(tmp_path, content["annotations"][1])
    path = tmp_path / "panoptic/002.png"
    image = Image.open(path).convert("RGB")
    image.quantize(16, dither=Image.Dither.NONE).save(path)
    assert (np.asarray(Image.open(path).convert("RGB")) == np.asarray(image)).all()
    prepare(tmp_path)
    assert (np.asarray(Image.open(tmp_path / "stuff/002.png")) == expected).all()


def test_pngs_follow_a_json_that_has_changed(tmp_path, caplog):
    write_panoptic(tmp_path)
    prepare(tmp_path)
    edit(tmp_path, lambda c: c["annotations"][0]["segments_info"][2].update(category_id=92))
    edit(tmp_path, lambda c: c["annotations"].pop())
    prepare(tmp_path)
    content = json.loads((tmp_path / "panoptic.json").read_text())
    for annotation in content["annotations"]:
        labels = np.asarray(Image.open(tmp_path / "stuff" / annotation["file_name"]))
        ids = np.asarray(Image.open(tmp_path / "panoptic" / annotation["file_name"])).astype(int)
        rug = ids @ [1, 256, 65536] == 70_000
        assert (labels[rug] == REFERENCE_LABELS[92 if annotation["image_id"] == 1 else 200]).all()
    assert "1 other PNGs, the first is 005.png" in caplog.text


def test_coco_is_found_under_the_root(tmp_path):
    with pytest.raises(DatasetError, match=r"neither panoptic_train2017\.json nor"):
        prepare_coco(tmp_path)
    write_panoptic(tmp_path)
    (tmp_path / "coco/annotations").mkdir(parents=True)
    (tmp_path / "panoptic.json").rename(tmp_path / "coco/annotations/panoptic_val2017.json")
    (tmp_path / "coco/annotations/panoptic_val2017.zip").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"Run: unzip -q \S+/panoptic_val2017\.zip -d \S+/coco"):
        prepare_coco(tmp_path)
    (tmp_path / "panoptic").rename(tmp_path / "coco/panoptic_val2017")
    prepare_coco(tmp_path)
    assert len(list((tmp_path / "coco/panoptic_stuff_val2017").iterdir())) == 5


def run_tool(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["prepare_panoptic_coco.py", *args])
    return runpy.run_path(str(TOOL))["main"]()


def test_the_tool_prepares_own_data_and_reports_errors_in_one_line(tmp_path, monkeypatch):
    write_panoptic(tmp_path)
    source = ["--panoptic-json", f"{tmp_path}/panoptic.json"]
    with pytest.raises(SystemExit, match="2"):  # argparse has printed what is missing
        run_tool(monkeypatch, *source)
    source += ["--panoptic-root", f"{tmp_path}/panoptic", "--output", f"{tmp_path}/stuff"]
    assert run_tool(monkeypatch, *source, "--instances-json", f"{tmp_path}/instances.json") == 0
    assert len(list((tmp_path / "stuff").iterdir())) == 5
    assert (tmp_path / "instances.json").is_file()
    (tmp_path / "panoptic/001.png").unlink()
    with pytest.raises(SystemExit, match=r"^error: \S+001\.png must exist"):
        run_tool(monkeypatch, *source, "--overwrite")


def test_the_tool_imports_no_torch_for_its_help(tmp_path):
    (tmp_path / "gn_practical.py").write_text("raise SystemExit('imported')")
    shown = subprocess.run(
        [sys.executable, str(TOOL), "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert shown.returncode == 0
    assert "DETECTRON2_DATASETS" in shown.stdout
