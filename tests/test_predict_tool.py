"""tools/predict.py: what goes wrong is one line, and what was done before is kept."""

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from gn_practical.inference import Predictor, frames, results
from gn_practical.inference import predictor as predictor_module
from gn_practical.inference.classes import Classes
from gn_practical.inference.dataset_ids import DatasetIds
from gn_practical.inference.frames import Behind, ahead
from gn_practical.inference.json_list import JsonList
from gn_practical.inference.models import TrainedModel
from gn_practical.inference.prediction import make_prediction
from gn_practical.inference.results import ResultsFolder
from gn_practical.inference.sources import Source, find_sources

TOOL = str(Path(__file__).parent.parent / "tools/predict.py")
NAMES = ("cat", 'a "b" <script>', "ßtraße, 漢", "d" * 99)


def one_box(inputs):
    """A model that sees one box and two segments in every picture, of the picture's colour."""
    outputs = []
    for each in inputs:
        height, width = each["height"], each["width"]
        found = Instances((height, width))
        found.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, width / 2, height / 2]]))
        found.scores, found.pred_classes = torch.tensor([0.75]), torch.tensor([1])
        found.pred_masks = torch.ones(1, height, width, dtype=torch.bool)
        ids = torch.ones(height, width, dtype=torch.int32)
        ids[height // 2 :] = 2
        segments = [
            {"id": 1, "isthing": True, "category_id": 1, "score": 0.75, "area": 1},
            {"id": 2, "isthing": False, "category_id": 1, "area": 1},
        ]
        outputs.append({"instances": found, "panoptic_seg": (ids, segments)})
    return outputs


MODEL = TrainedModel(one_box, "BGR", (32, 64), Classes(NAMES, ("things", "sky")))


@pytest.fixture
def predict(monkeypatch, tmp_path, capsys):
    """Runs the tool with a model that does not learn; returns exit code and what it says."""
    monkeypatch.setattr(predictor_module, "load_model", lambda *_, **__: MODEL)
    monkeypatch.chdir(tmp_path)

    def run(*arguments, weights="w.pth"):
        command = [TOOL, "--weights", weights, *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
        with pytest.raises(SystemExit) as done:
            runpy.run_path(TOOL, run_name="__main__")
        assert before == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
        said = capsys.readouterr()
        return SimpleNamespace(code=done.value.code, out=said.out, errors=said.err.splitlines())

    return run


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jpg", "a.png", "A.jpeg", "ünï 'q\" <b>.png", f"{'n' * 240}.png"):
        Image.new("RGB", (40, 30), (200, 30, 30)).save(folder / name)
    return folder


def read(path):
    return json.loads(Path(path).read_text())


def test_files_of_one_name_have_results_of_their_own(predict, pictures):
    done = predict("in", "in/*.jpg", "--output", "out", "--batch-size", "2", "in/a.png")
    assert (done.code, done.errors) == (0, [])
    assert "5 pictures in" in done.out
    assert "Results: out" in done.out
    assert "Class ids are the model's own" in done.out
    images = read("out/images.json")["images"]
    assert [each["file_name"] for each in images] == [str(p) for p in sorted(Path("in").iterdir())]
    assert len({each["picture"].lower() for each in images}) == 5
    for each in images:
        with Image.open(Path("out", each["picture"])) as picture:
            assert picture.size == (512, 384)
        assert (each["width"], each["height"]) == (40, 30)
    detections = read("out/coco_instances_results.json")
    assert [(d["image_id"], d["category_id"]) for d in detections] == [(i, 1) for i in range(1, 6)]
    annotations = read("out/predictions.json")["annotations"]
    assert [s["category_id"] for s in annotations[0]["segments_info"]] == [1, 5]
    with Image.open(Path("out/panoptic", annotations[0]["file_name"])) as ids:
        assert np.unique(np.asarray(ids)[..., 0]).tolist() == [1, 2]


def test_nothing_that_is_there_is_written_over(predict, pictures):
    own = pictures / "pictures"
    own.mkdir()
    Image.new("RGB", (8, 8)).save(own / "a.jpg")
    before = {path: path.read_bytes() for path in pictures.rglob("*.*")}
    done = predict("in", "in/pictures", "--output", "in")
    assert (done.code, done.errors) == (0, [])
    assert {path: path.read_bytes() for path in before} == before
    assert len(read("in/images.json")["images"]) == 6
    again = predict("in", "--output", "in")
    assert again.code == 1
    assert "without earlier results, got in with images.json" in again.errors[0]
    replaced = predict("in", "in/pictures/a.jpg", "--output", "in", "--replace")
    assert (replaced.code, replaced.errors) == (0, [])
    assert {path: path.read_bytes() for path in before} == before
    assert len(read("in/images.json")["images"]) == 6


def test_the_default_output_is_a_new_folder(predict, pictures):
    for wanted in ("output/predictions", "output/predictions_2"):
        assert f"Results: {wanted}\n" in predict("in/a.jpg").out
        assert Path(wanted, "pictures/a.jpg").is_file()


def test_what_cannot_be_read_is_named_and_left_out(predict, pictures):
    (pictures / "text.jpg").write_text("hello")
    (pictures / "cut.jpg").write_bytes((pictures / "a.jpg").read_bytes()[:300])
    (pictures / "empty").mkdir()
    done = predict("in", "in/empty", "missing.jpg", "*.bmp", "99", "--output", "out")
    assert done.code == 1
    assert "5 pictures in" in done.out
    assert ", 6 inputs failed." in done.out
    for line, said in zip(
        sorted(done.errors),
        (
            r"error: *.bmp: the pattern matches no file",
            "error: a camera must be there, got 99",
            "error: a picture must be whole and readable, got in/cut.jpg: ",
            "error: a picture must be whole and readable, got in/text.jpg: cannot identify",
            "error: in/empty: the folder holds no picture and no video; --recursive",
            "error: missing.jpg: there is no such file or folder",
        ),
        strict=True,
    ):
        assert line.startswith(said), (line, said)
    assert len(read("out/coco_instances_results.json")) == 5


def test_inputs_of_nothing_leave_no_folder(predict, tmp_path):
    assert predict("missing.jpg", "--output", "out").code == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(predict, pictures):  # pragma: no cover
    Path("locked").mkdir(mode=0o500)
    done = predict("in", "--output", "locked")
    assert done.code == 1
    assert "that can be written, got locked" in done.errors[0]


def test_an_output_that_cannot_be_written_is_one_line(predict, pictures, monkeypatch):
    Path("file").write_text("kept")
    done = predict("in", "--output", "file")
    assert (done.code, len(done.errors)) == (1, 1)
    assert "must be a folder that can be written, got file" in done.errors[0]
    assert Path("file").read_text() == "kept"
    written, encode = [], cv2.imencode

    def full(suffix, *arguments):
        written.append(suffix)
        if len(written) > 4:  # two files of each picture
            raise OSError(28, "No space left on device")
        return encode(suffix, *arguments)

    monkeypatch.setattr(results.cv2, "imencode", full)
    done = predict("in", "--output", "out")
    assert done.code == 1
    assert "No space left on device. What was written before is kept" in done.errors[0]
    assert len(done.errors) == 1
    assert len(read("out/images.json")["images"]) == 2
    assert len(read("out/predictions.json")["annotations"]) == 2


def write_video(path, code, frames=12):
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), 10, (64, 48))
    random = np.random.default_rng(0)
    for _ in range(frames):
        video.write(random.integers(0, 256, (48, 64, 3), np.uint8))
    video.release()


def test_videos(predict, tmp_path):
    write_video("whole.avi", "MJPG")
    write_video("whole.mp4", "mp4v")
    data = Path("whole.avi").read_bytes()
    Path("cut.avi").write_bytes(data[: len(data) * 2 // 3])
    Path("text.mp4").write_text("hello")
    done = predict("whole.avi", "cut.avi", "whole.mp4", "text.mp4", "--output", "out")
    assert done.code == 1
    cut, text = done.errors
    assert "a video must be whole, got cut.avi, which ends after" in cut
    assert "of 12 frames" in cut
    assert "a video must be whole and readable, got text.mp4" in text
    images = read("out/images.json")["images"]
    of = {name: [each for each in images if each["file_name"] == name] for name in
          ("whole.avi", "cut.avi", "whole.mp4")}  # fmt: skip
    for name, entries in of.items():
        assert [each["frame"] for each in entries] == list(range(len(entries)))
        video = cv2.VideoCapture(str(Path("out", entries[0]["picture"])))
        assert video.get(cv2.CAP_PROP_FRAME_COUNT) == len(entries), name
        assert video.get(cv2.CAP_PROP_FPS) == 10
    assert len(of["whole.avi"]) == len(of["whole.mp4"]) == 12 > len(of["cut.avi"]) > 0
    assert not list(Path("out").rglob("*.tmp*"))
    assert len({each["picture"] for each in images}) == 3


def test_a_camera_runs_until_ctrl_c(predict, tmp_path, monkeypatch):
    class Camera:
        frames = 0

        def __init__(self, number):
            assert number == 0

        def isOpened(self):
            return True

        def get(self, key):
            return -1.0  # it knows neither its rate nor an end

        def read(self):
            self.frames += 1
            if self.frames == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return True, np.full((48, 64, 3), 50, np.uint8)

        def release(self):
            pass

    monkeypatch.setattr(frames.cv2, "VideoCapture", Camera)
    done = predict("0", "--output", "out")
    monkeypatch.undo()
    assert done.code == 128 + signal.SIGTERM
    seen = read(tmp_path / "out/images.json")["images"]
    assert len(seen) > 0
    assert {each["picture"] for each in seen} == {"videos/camera_0.mp4"}
    video = cv2.VideoCapture(str(tmp_path / "out/videos/camera_0.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == len(seen)


def test_options(predict, pictures):
    done = predict("in/a.jpg", "--no-pictures", "--output", "json")
    assert sorted(path.name for path in Path("json").iterdir()) == [
        *("coco_instances_results.json", "images.json", "panoptic", "predictions.json"),
    ]
    done = predict("in/a.jpg", "--format", "none", "--output", "drawn")
    assert done.code == 0
    assert sorted(path.name for path in Path("drawn").iterdir()) == ["images.json", "pictures"]
    done = predict("in/a.jpg", "--classes", NAMES[2], "--classes", "cat,sky", "--output", "none")
    assert read("none/coco_instances_results.json") == []
    (entry,) = read("none/predictions.json")["annotations"]
    assert [each["category_id"] for each in entry["segments_info"]] == [5]
    done = predict("in/a.jpg", "--classes", "cats", "--output", "wrong")
    assert (done.code, len(done.errors)) == (1, 1)
    assert "got 'cats'. Near to it: cat." in done.errors[0]
    done = predict("in/a.jpg", "--threshold", "0.8", "--output", "high")
    assert read("high/coco_instances_results.json") == []
    Path("deep/er").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save("deep/er/x.png")
    assert predict("deep", "--output", "deep").code == 1
    assert predict("deep", "--recursive", "--output", "deep/out").code == 0


def test_ids_of_a_data_set(predict, pictures):
    content = {
        "images": [{"id": "x", "file_name": "in/a.jpg"}, {"id": 2**40, "file_name": "a.png"}],
        "categories": [{"id": 10 + i, "name": n} for i, n in enumerate((*NAMES, "sky"))],
    }
    Path("ids.json").write_text(json.dumps(content))
    done = predict("in", "--ids-from", "ids.json", "--output", "out")
    assert done.code == 1
    assert len(done.errors) == 3
    assert "a picture must be one of ids.json, got in/A.jpeg for 0" in done.errors[0]
    found = read("out/coco_instances_results.json")
    assert [(each["image_id"], each["category_id"]) for each in found] == [("x", 11), (2**40, 11)]
    (of_x, _) = read("out/predictions.json")["annotations"]
    assert [each["category_id"] for each in of_x["segments_info"]] == [11, 14]
    del content["categories"][0]
    Path("ids.json").write_text(json.dumps(content))
    done = predict("in", "--ids-from", "ids.json", "--output", "wrong")
    assert "ids.json without 'cat'" in done.errors[-1]
    Path("ids.json").write_text("[]")
    with pytest.raises(
        ValueError, match=r"a json with COCO's images and categories, got ids\.json"
    ):
        DatasetIds("ids.json")
    Path("out/images.json").write_text(json.dumps(content))
    done = predict("in", "--ids-from", "out/images.json", "--output", "out", "--replace")
    assert "must be another file than what is read" in done.errors[-1]


def test_ctrl_c_keeps_what_was_done(predict, pictures, monkeypatch):
    calls = []

    def slow(inputs):
        calls.append(len(inputs))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return one_box(inputs)

    monkeypatch.setattr(
        predictor_module,
        "load_model",
        lambda *_, **__: TrainedModel(slow, "BGR", (32, 64), Classes(NAMES)),
    )
    done = predict("in", "--output", "out")
    assert done.code == 130
    assert len(calls) == 2
    assert "2 pictures in" in done.out
    assert len(read("out/images.json")["images"]) == 2
    assert len(read("out/predictions.json")["annotations"]) == 2
    assert not list(Path("out").rglob("*.tmp"))
    assert threading.active_count() < 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--help"], "docs/predict.md"),
        ([], "required"),
        (["--weights", "w", "x.jpg", "--threshold", "2"], "--threshold must be from 0 to 1, got 2"),
        (["--weights", "w", "x.jpg", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--weights", "w", "x.jpg", "--format", "yolo"], "invalid choice"),
    ],
)
def test_arguments_are_answered_before_anything_is_imported(arguments, said):
    code = (
        "import sys, runpy\nsys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert not {'torch', 'detectron2', 'cv2', 'numpy'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, TOOL, *arguments], capture_output=True, text=True
    )
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == (0 if arguments == ["--help"] else 2)


def test_a_json_list_is_whole_after_every_addition(tmp_path):
    path = tmp_path / "a.json"
    with JsonList(path, "annotations", {"categories": ["ß"]}) as entries:
        for number in range(3):
            assert len(read(path)["annotations"]) == number
            entries.add([{"id": number, "text": "ß\n"}])
            entries.add([])
        with pytest.raises(ValueError, match="JSON compliant"):
            entries.add([float("nan")])
    assert [each["id"] for each in read(path)["annotations"]] == [0, 1, 2]


def test_errors_of_threads_arrive():
    def items():
        yield 1
        raise KeyError("of the reader")

    got = []
    with pytest.raises(KeyError, match="of the reader"):
        got += ahead(items(), 3)
    assert list(ahead(iter(range(5)), 2)) == list(range(5))
    with pytest.raises(ZeroDivisionError), Behind(2) as behind:
        behind.do(lambda: 1 // 0)


def test_every_kind_of_output_is_drawn_and_written(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    nothing = Instances((20, 30), pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0),
                        pred_classes=torch.zeros(0, dtype=torch.long))  # fmt: skip
    proposals = Instances((20, 30), proposal_boxes=Boxes(torch.tensor([[1.0, 2.0, 9.0, 9.0]])),
                          objectness_logits=torch.tensor([0.5]))  # fmt: skip
    outputs = {
        "nothing": {"instances": nothing},
        "proposals": {"proposals": proposals},
        "semantic": {"sem_seg": torch.randn(3, 20, 30)},
        "no segments": {"panoptic_seg": (torch.zeros(20, 30, dtype=torch.int32), [])},
        "panoptic": one_box([{"height": 20, "width": 30}])[0],
        "no names": one_box([{"height": 20, "width": 30}])[0],
        "keypoints": {"instances": one_box([{"height": 20, "width": 30}])[0]["instances"]},
    }
    outputs["keypoints"]["instances"].pred_keypoints = torch.rand(1, 17, 3)
    for name, output in outputs.items():
        classes = Classes() if name == "no names" else MODEL.classes
        prediction = make_prediction(output, pixels, classes)
        assert prediction.draw().shape == (341, 512, 3), name
        drawn = (prediction.draw(1) != pixels).any()
        assert drawn == (name not in ("nothing", "no segments")), name
        frame = SimpleNamespace(source=Source("a.png"), number=None, rate=25)
        with ResultsFolder(tmp_path / name, classes) as folder:
            folder.add(frame, prediction)
    assert read(tmp_path / "nothing/coco_instances_results.json") == []
    assert len(read(tmp_path / "keypoints/coco_instances_results.json")[0]["keypoints"]) == 51
    box = {"image_id": 1, "category_id": 0, "bbox": [1, 2, 8, 7], "score": 0.5}
    assert read(tmp_path / "proposals/coco_instances_results.json") == [box]
    assert read(tmp_path / "semantic/sem_seg_predictions.json")[0]["image_id"] == 1


def test_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.PNG", "a.jpg", "c.txt", "v.mp4", "0"):
        Path(name).touch()
    Path("link.jpg").symlink_to("a.jpg")
    found, problems = find_sources([".", "a.jpg", "0", "1", "c.txt"])
    assert problems == []
    kinds = [(each.path, each.kind) for each in found]
    assert kinds == [
        ("./a.jpg", "picture"),
        ("./b.PNG", "picture"),
        ("./v.mp4", "video"),
        ("0", "picture"),
        ("1", "camera"),
        ("c.txt", "picture"),
    ]


def test_an_exported_model_predicts(monkeypatch, pictures):
    exported = pytest.importorskip("gn_practical.inference.exported")
    described = SimpleNamespace(
        input_format="RGB",
        resize={"MIN_SIZE_TEST": 32, "MAX_SIZE_TEST": 64},
        class_names={"thing": ["cat", "dog"]},
        class_ids={"thing": [3, 9]},
        class_colors=None,
    )

    class Stand(SimpleNamespace):
        def __call__(self, inputs):
            assert len(inputs) == 1
            return [{"instances": one_box(inputs)[0]["instances"]}]

    thresholds = {"score": 0.3, "instance_score": 0.5}
    stand = Stand(description=described, thresholds=thresholds)
    monkeypatch.setattr(exported, "ExportedModel", lambda path: stand)
    predict = Predictor("m.onnx", threshold=0.6)
    assert predict([str(pictures / "a.jpg")] * 2)[1].names == ["dog"]
    assert predict(str(pictures / "a.jpg")).coco_instances(4)[0]["category_id"] == 9
    assert thresholds["instance_score"] == 0.6
    with pytest.raises(ValueError, match=r"of the exported model, 0.3, got threshold=0.1"):
        Predictor("m.onnx", threshold=0.1)
    with pytest.raises(ValueError, match="without config and overrides"):
        Predictor("m.onnx", "a.yaml")
    with pytest.raises(ValueError, match="on the cpu here, got device=cuda"):
        Predictor("m.onnx", device="cuda")
