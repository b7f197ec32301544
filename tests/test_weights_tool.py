"""The tool that converts weights, and the keys that it prints."""

import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from resnet_references import (
    assert_equal,
    features_here,
    normalized,
    picture,
    randomized,
    stages_of,
)
from test_weights_layouts import detectron_in_mmcv, jhu
from test_weights_mmdetection import CONFIG, backbone, mmdetection_state
from torchvision.models import resnet18

from gn_practical import add_pgn_config
from gn_practical.weights import Description, Standardization, Weights, read_weights
from gn_practical.weights.config_keys import as_yaml, config_keys

TOOL = str(Path(__file__).parents[1] / "tools/convert_weights.py")


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run the tool in this process: importing Detectron2 anew takes seconds."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [TOOL, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(TOOL, run_name="__main__")
        captured = capsys.readouterr()
        return end.value.code, captured.out if end.value.code in (None, 0) else captured.err

    return run


def test_detectron2_alone_takes_what_was_converted(tmp_path, tool):
    model = randomized(resnet18())
    torch.save(model.state_dict(), tmp_path / "a.pth")
    out = tmp_path / "out.pth"
    options = ["--input-format", "BGR", "--fold-std", "--fold-bn", "--config-overrides"]
    code, text = tool(tmp_path / "a.pth", out, *options)
    assert code is None
    cfg = get_cfg()
    add_pgn_config(cfg)
    cfg.merge_from_list([*shlex.split(text), "MODEL.RESNETS.OUT_FEATURES", "('res2', 'res5')"])
    assert (cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_STD) == ("BGR", [1.0, 1.0, 1.0])
    built = torch.nn.ModuleDict({"backbone": build_backbone(cfg, ShapeSpec(channels=3))}).eval()
    DetectionCheckpointer(built).load(str(out))
    image = (picture().flip(0) - torch.tensor(cfg.MODEL.PIXEL_MEAN)[:, None, None])[None]
    with torch.no_grad():
        found, wanted = built["backbone"](image), stages_of(model, normalized(picture()))
    for stage in ("res2", "res5"):
        assert (found[stage] - wanted[stage]).abs().max() < 1e-5 * wanted[stage].abs().max()


def test_the_description_goes_with_the_file(tmp_path, tool):
    file_name, model, image = jhu(tmp_path)
    path, out = tmp_path / file_name, tmp_path / "out.pth"
    _, text = tool(path)
    assert "weight standardization's authors (jhu)" in text
    assert not out.exists()
    assert tool(path, out)[0] is None
    weights = read_weights(str(out))
    assert weights.description == read_weights(str(path)).description
    assert_equal(features_here(weights, picture()), model(image))


def test_nothing_is_overwritten(tmp_path, tool):
    file_name, *_ = detectron_in_mmcv(tmp_path)
    path, out = tmp_path / file_name, tmp_path / "out.pth"
    before = path.read_bytes()
    assert tool(path, out)[0] is None
    code, error = tool(path, out)
    assert code == 2
    assert "--force" in error
    assert tool(path, out, "--force")[0] is None
    (tmp_path / "link.pth").symlink_to(path)
    for same in (path, tmp_path / "link.pth"):
        assert "OUT must be another file than IN" in tool(path, same, "--force")[0]
    assert path.read_bytes() == before
    assert tool(path, tmp_path / "out.pkl")[0] == 2
    assert "OUT must be a file that can be written" in tool(path, tmp_path / "no/out.pth")[0]


def test_the_user_says_what_the_file_does_not(tmp_path, tool):
    file_name, *_ = detectron_in_mmcv(tmp_path)
    path, out = tmp_path / file_name, tmp_path / "out.pth"
    assert "Note: its keys are those of jhu and of mmcv_detectron_gn" in tool(path)[1]
    tool(path, out, "--source", "mmcv_detectron_gn", "--describe", "norm_eps=1e-6")
    description = read_weights(str(out)).description
    assert (description.input_format, description.norm_eps) == ("BGR", 1e-6)
    known = ["weight_standardization=True", "standardization.biased=True", "input_format=RGB"]
    tool(path, out, "--force", "--fold-ws", "plain", "--describe", *known)
    description = read_weights(str(out)).description
    assert (description.input_format, description.weight_standardization) == ("RGB", False)
    assert "must be KEY=VALUE, got norm_eps" in tool(path, "--describe", "norm_eps")[0]
    assert "must be one of source, " in tool(path, "--describe", "nrm=1")[0]
    assert "weights must be a file that can be read" in tool(tmp_path / "none.pth")[0]


def test_the_keys_of_a_detector_are_printed(tmp_path, tool):
    file = {"meta": {"config": CONFIG}, "state_dict": mmdetection_state(backbone())}
    torch.save(file, tmp_path / "a.pth")
    text = tool(tmp_path / "a.pth")[1]
    keys = yaml.safe_load(text[text.index("\nINPUT:") :])
    assert keys["INPUT"] == {"FORMAT": "RGB"}
    model = keys["MODEL"]
    assert model["WS"] == {"ENABLED": True}
    assert model["FPN"] == {"OUT_CHANNELS": 32, "NORM": "GN"}
    assert model["ROI_HEADS"] == {"NUM_CLASSES": 3}
    assert model["ROI_BOX_HEAD"] == {
        **{"NAME": "FastRCNNConvFCHead", "NUM_CONV": 4, "CONV_DIM": 32, "NORM": "GN"},
        **{"NUM_FC": 1, "FC_DIM": 24},
    }
    assert model["RESNETS"]["WIDTH_PER_GROUP"] == 32


def test_the_keys_name_what_detectron2_s_gn_cannot():
    described = Description(norm="GN", num_groups=16, weight_standardization=True)
    keys = config_keys(Weights({}, described))
    assert keys["MODEL.RESNETS.NORM"] == "PGN"
    assert keys["MODEL.PGN.NUM_GROUPS"] == 16
    assert keys["MODEL.WS.ENABLED"]
    described = Description(weight_standardization=True, standardization=Standardization(1e-6))
    # Another definition is no key of a config: it is folded.
    assert config_keys(Weights({}, described)) == {}
    assert as_yaml({}) == ""


def test_help_comes_before_any_heavy_import():
    code = f"""
import runpy, sys
sys.argv = ["tool", "--help"]
try:
    runpy.run_path({TOOL!r}, run_name="__main__")
finally:
    assert not {{"torch", "numpy", "gn_practical"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--fold-ws" in done.stdout
