"""Training, resuming and evaluating a tiny model on the embedded data, and what goes wrong."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tool_train_net import run
from torch import nn

from gn_practical.layers import PracticalGroupNorm
from gn_practical.training.checkpoint import GroupsCheckpointer
from gn_practical.training.engine import Trainer, check_run, load_cfg
from gn_practical.training.engine.checks import check_model

ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "configs/quickstart/pfpn.yaml")
# The quickstart's model with narrower heads: a step in a tenth of a second.
TINY = [
    *("MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.RPN.CONV_DIMS", "[16]", "MODEL.ROI_BOX_HEAD.CONV_DIM", "16"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"),
    *("MODEL.SEM_SEG_HEAD.CONVS_DIM", "16", "SOLVER.IMS_PER_BATCH", "2"),
    *("SOLVER.BASE_LR", "0.01", "DATALOADER.NUM_WORKERS", "0"),
]


def tiny(output_dir, *overrides, flags=()):
    return ["--config-file", QUICKSTART, *flags, *TINY, "OUTPUT_DIR", output_dir, *overrides]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Three iterations with an evaluation of the whole validation set."""
    output = tmp_path_factory.mktemp("trained")
    schedule = ["SOLVER.MAX_ITER", 3, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.NUM_PICTURES", 2]
    results = run(*tiny(output, *schedule))
    return output, results


def test_training_leaves_everything_a_user_looks_for(trained):
    output, _ = trained
    results = json.loads((output / "results.json").read_text())
    assert {"PQ", "SQ", "RQ", "PQ_th", "PQ_st"} <= set(results["panoptic_seg"])
    assert {"AP", "AP50", "AP75"} <= set(results["bbox"])
    assert {"AP", "AP50", "AP75"} <= set(results["segm"])
    assert "mIoU" in results["sem_seg"]
    assert (output / "curves.png").stat().st_size > 1000
    assert len(list((output / "pictures").glob("**/*.png"))) == 2
    assert (output / "model_final.pth").is_file()
    assert list(output.glob("events.out.tfevents*"))
    table = json.loads((output / "num_groups.json").read_text())
    assert table[0]["norm"].endswith("norm")
    assert {"in_channels", "out_channels", "num_groups", "ideal_num_groups"} <= set(table[0])
    log = (output / "log.txt").read_text()
    assert "PGN layers" in log
    assert "G_ideal" in log
    assert " PQ |" in log


def test_evaluation_alone_gives_the_same_numbers(trained, tmp_path):
    output, _ = trained
    weights = ["MODEL.WEIGHTS", output / "model_final.pth"]
    run(*tiny(tmp_path, *weights, "TEST.NUM_PICTURES", 0, flags=["--eval-only"]))
    first = json.loads((output / "results.json").read_text())
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["panoptic_seg"] == first["panoptic_seg"]


def test_resume_continues_at_the_next_iteration(trained):
    output, _ = trained
    run(*tiny(output, "SOLVER.MAX_ITER", 5, "DATASETS.TEST", "()", flags=["--resume"]))
    state = torch.load(output / "model_final.pth", weights_only=True)
    assert state["iteration"] == 4
    lines = (output / "metrics.json").read_text().splitlines()
    assert json.loads(lines[-1])["iteration"] == 4


def cfg_of(output_dir, *overrides):
    os.makedirs(output_dir, exist_ok=True)
    overrides = [str(word) for word in overrides]
    return load_cfg(QUICKSTART, [*TINY, "OUTPUT_DIR", str(output_dir), *overrides])


def test_other_groups_are_an_error_on_resume_and_a_warning_for_weights(trained, tmp_path, caplog):
    output, _ = trained
    with pytest.raises(SystemExit, match=r"got other groups in \d+ layers: .*in the checkpoint, 4"):
        run(*tiny(output, "MODEL.PGN.NUM_GROUPS", 4, "SOLVER.MAX_ITER", 9, flags=["--resume"]))
    weights = ["MODEL.WEIGHTS", output / "model_final.pth"]
    model = Trainer.build_model(cfg_of(tmp_path, "MODEL.PGN.NUM_GROUPS", 4, *weights))
    checkpointer = GroupsCheckpointer(model, str(tmp_path))
    with caplog.at_level(logging.WARNING):
        checkpointer.resume_or_load(str(output / "model_final.pth"), resume=False)
    assert "Fine-tuning adapts to them" in caplog.text


def test_frozen_norms_of_unknown_groups_are_named(tmp_path, caplog):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), PracticalGroupNorm(8))
    model[1].bind(3, 1)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    model.requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        GroupsCheckpointer(model).load(str(tmp_path / "plain.pth"))
    assert "1 PGN layers are frozen" in caplog.text
    assert "FREEZE_AT 0" in caplog.text


def test_frozen_batch_norm_without_weights_is_warned_of(tmp_path, caplog):
    cfg = cfg_of(tmp_path, "MODEL.RESNETS.NORM", "FrozenBN")
    with caplog.at_level(logging.WARNING):
        check_model(cfg, Trainer.build_model(cfg))
    assert "FrozenBN layers have the statistics of no data" in caplog.text


def test_weights_in_torchvision_names_reach_the_backbone(tmp_path):
    from torchvision.models import resnet18

    source = resnet18(norm_layer=lambda channels: nn.GroupNorm(1, channels))
    torch.save({"state_dict": source.state_dict()}, tmp_path / "resnet18.pth")
    cfg = load_cfg(QUICKSTART, ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path)])
    model = Trainer.build_model(cfg)
    GroupsCheckpointer(model).load(str(tmp_path / "resnet18.pth"))
    loaded = model.backbone.bottom_up
    assert torch.equal(loaded.stem.conv1.weight, source.conv1.weight)
    assert torch.equal(loaded.res3[0].shortcut.weight, source.layer2[0].downsample[0].weight)
    source.bn1.weight.data.fill_(3)
    assert len(loaded.state_dict()) == len(source.state_dict()) - 2  # all but the classifier
    for ours, theirs in [(loaded.res5[1].conv2, (source.layer4[1].conv2, source.layer4[1].bn2))]:
        assert torch.equal(ours.weight, theirs[0].weight)
        assert torch.equal(ours.norm.bias, theirs[1].bias)


@pytest.mark.parametrize("text", ["not a checkpoint", ""])
def test_broken_weights_are_named(tmp_path, text):
    (tmp_path / "broken.pth").write_text(text)
    with pytest.raises(ValueError, match=r"a checkpoint must be a whole file .*broken\.pth"):
        GroupsCheckpointer(nn.Linear(2, 2)).load(str(tmp_path / "broken.pth"))


def test_bfloat16_on_the_cpu(tmp_path):
    precision = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"]
    run(*tiny(tmp_path, *precision, "SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()"))
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert {tensor.dtype for tensor in state["model"].values()} == {torch.float32}
    assert "grad_scaler" in state["trainer"]["_trainer"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.BASE_LRR", "0.1"], r"got SOLVER.BASE_LRR. Did you mean SOLVER.BASE_LR"),
        (["SOLVER.MAX_ITER", "many"], r"values of their types: "),
        (["SOLVER.MAX_ITER"], r"pairs of KEY VALUE, got \d+ words ending in 'SOLVER.MAX_ITER'"),
        (["MODEL.FPN.NORM", "PGM"], r"NORM must be one of BN, .* got NORM='PGM'"),
        (["MODEL.PGN.NUM_GROUPS", "7"], r"norm: num_groups must divide .* num_groups=7"),
        (["MODEL.WEIGHTS", "no/such.pth"], r"got MODEL.WEIGHTS=no/such.pth, which does not exist"),
        (["DATASETS.TRAIN", '("scenes_trian",)'], r"scenes_trian"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "4"], r"MODEL.ROI_HEADS.NUM_CLASSES"),
        (
            ["SOLVER.REFERENCE_WORLD_SIZE", "8"],
            r"Invalid REFERENCE_WORLD_SIZE.*SIZE=8",
        ),
        (["SOLVER.AMP.ENABLED", "True"], r"must be bfloat16 on cpu"),
        (["SOLVER.AMP.DTYPE", "fp8"], r"one of float16, bfloat16, got SOLVER.AMP.DTYPE=fp8"),
        (["MODEL.BACKBONE.NAME", "resnet"], r"No object named 'resnet' found in 'BACKBONE' reg"),
        (["MODEL.RESNETS.RES2_OUT_CHANNELS", "32"], r"Must set MODEL.RESNETS.RES2_OUT_CHANNELS"),
        (
            ["MODEL.PGN.RULE", "best"],
            r"rule must be one of paper, exact, .*, got rule='best'",
        ),
    ],
)
def test_bad_input_ends_with_one_clear_error(tmp_path, overrides, message):
    arguments = ["--config-file", QUICKSTART, *TINY[:2], "OUTPUT_DIR", tmp_path]
    batch = [] if "SOLVER.REFERENCE_WORLD_SIZE" not in overrides else ["SOLVER.IMS_PER_BATCH", 4]
    with pytest.raises(SystemExit, match=message) as raised:
        run(*arguments, *batch, *overrides)
    assert str(raised.value).startswith("error: ")
    assert "\n" not in str(raised.value)


def test_truncated_image_ends_with_one_clear_error(trained, tmp_path, capsys):
    """In a worker process, in the middle of training; with no traceback on the screen."""
    source = Path(os.environ["DETECTRON2_DATASETS"]) / "scenes"
    (tmp_path / "images").mkdir()
    for image in sorted((source / "images/train").iterdir())[:6]:
        content = image.read_bytes()
        (tmp_path / "images" / image.name).write_bytes(content[: len(content) // 2])
    content = json.loads((source / "instances_train.json").read_text())
    names = {path.name for path in (tmp_path / "images").iterdir()}
    content["images"] = [i for i in content["images"] if i["file_name"] in names]
    ids = {i["id"] for i in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]
    (tmp_path / "cut.json").write_text(json.dumps(content))
    entry = ("cut", str(tmp_path / "images"), str(tmp_path / "cut.json"))
    config = str(ROOT / "configs/quickstart/faster_rcnn.yaml")
    overrides = ["DATASETS.COCO_INSTANCES", [entry], "DATASETS.TRAIN", ("cut",), "MODEL.DEVICE",
                 "cpu", "DATASETS.TEST", (), "OUTPUT_DIR", tmp_path / "out"]  # fmt: skip
    with pytest.raises(SystemExit, match=r"error: .* must be a whole image, got: .*truncated"):
        run("--config-file", config, *overrides)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert "Traceback" in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_gpu_is_an_error():
    with pytest.raises(ValueError, match=r"PyTorch finds no CUDA GPU\. Add MODEL.DEVICE cpu"):
        check_run(load_cfg(QUICKSTART, ["MODEL.DEVICE", "cuda"]))


def test_config_that_is_not_there_or_not_yaml(tmp_path):
    with pytest.raises(ValueError, match=r"Config file .*missing\.yaml. does not exist"):
        load_cfg(str(tmp_path / "missing.yaml"))
    (tmp_path / "bad.yaml").write_text("MODEL: [unclosed")
    with pytest.raises(ValueError, match=r"a config must be a readable YAML file"):
        load_cfg(str(tmp_path / "bad.yaml"))


def test_changed_batch_without_learning_rate_is_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        check_run(load_cfg(QUICKSTART, ["SOLVER.IMS_PER_BATCH", "16"]))
    assert "in place of the recipe's 4" in caplog.text
    assert "asks for SOLVER.BASE_LR 0.16" in caplog.text


RANKS = """
import sys, torch
from gn_practical.training.engine import Trainer, argument_parser, default_setup, launch, load_cfg
from gn_practical.training.validation import check_datasets
from detectron2.utils import comm

def train(args):
    cfg = load_cfg(args.config_file, args.opts)
    default_setup(cfg, args)
    check_datasets(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    Trainer.test = classmethod(lambda *_: {})
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    same = comm.all_gather(weights)
    assert comm.get_world_size() == 2 == len(same)
    assert torch.equal(same[0], same[1]) and trainer.iter == 20
    if comm.is_main_process():
        print("equal parameters on", len(same), "ranks")

if __name__ == "__main__":
    launch(train, argument_parser().parse_args())
"""


@pytest.mark.parametrize("launcher", ["num-gpus", "torchrun"])
def test_two_cpu_ranks_train_with_equal_parameters(tmp_path, launcher):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    start = {
        "num-gpus": [sys.executable, script, "--num-gpus", "2", "--dist-url", "auto"],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                     "--standalone", script],
    }[launcher]  # fmt: skip
    arguments = [*start, *tiny(tmp_path / "out", "SOLVER.MAX_ITER", 20)]
    done = subprocess.run(
        [str(a) for a in arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "equal parameters on 2 ranks" in done.stdout


def test_command_line_prints_the_error_alone(tmp_path):
    arguments = ["--config-file", QUICKSTART, "OUTPUT_DIR", tmp_path, "MODEL.PNG.RULE", "paper"]
    done = subprocess.run(
        [sys.executable, ROOT / "tools/train_net.py", *map(str, arguments)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    assert "error: config keys must exist, got MODEL.PNG" in done.stderr
