"""Pretraining: the recipes, the backbone that detectors take, averages, and batches in parts."""

import importlib.util
import json
import logging
from pathlib import Path

import pytest
import torch
from detectron2.engine.hooks import EvalHook
from gn_classification import loaders
from gn_classification.averaging import AverageWeights
from gn_classification.backbones import zero_last_norms
from gn_classification.classifier import Batch
from gn_classification.config import add_classification_config, check_config, complete_config
from gn_classification.export import export_backbone
from torch import nn

from gn_practical import build_model
from gn_practical.training.checkpoint import GroupsCheckpointer
from gn_practical.training.engine import load_cfg
from gn_practical.weights.description import Standardization

CONFIGS = Path(__file__).parent.parent / "configs"
QUICKSTART = CONFIGS.parent.parent.parent / "configs/quickstart"


def script(name):
    spec = importlib.util.spec_from_file_location(f"script_{name}", CONFIGS.parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pretrain, change_norms = script("train_net"), script("change_norms")
NARROW = [
    *("MODEL.DEVICE", "cpu", "MODEL.RESNETS.STEM_OUT_CHANNELS", "4"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "8", "MODEL.RESNETS.WIDTH_PER_GROUP", "4"),
]
DIGITS = [
    *("DATASETS.TRAIN", '("digits_train",)', "DATASETS.TEST", '("digits_val",)'),
    *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0", "CLASSIFICATION.EPOCHS", "0"),
    *("CLASSIFICATION.VAL_FRACTION", "0.02", "SOLVER.CHECKPOINT_PERIOD", "2"),
]


@pytest.fixture(autouse=True)
def nothing_loaded():
    yield
    loaders._LOADED.clear()


def run(config, output_dir, *overrides, flags=()):
    words = ["--config-file", CONFIGS / config, *flags, *DIGITS, "OUTPUT_DIR", output_dir]
    args = pretrain.argument_parser().parse_args([str(word) for word in (*words, *overrides)])
    return pretrain.engine.launch(pretrain.main, args)


def config_of(name, *overrides):
    return load_cfg(
        str(CONFIGS / name),
        ["MODEL.DEVICE", "cpu", *map(str, overrides)],
        add_config=add_classification_config,
    )


def weights_of(folder, name="model_final", key="model"):
    return torch.load(folder / f"{name}.pth", weights_only=True)[key]


class ImageNet:
    classes = tuple(map(str, range(1000)))

    def __len__(self):
        return 1_281_167


# Recipes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "groups"), [("gn", {32}), ("pgn", {1, 32, 64, 128, 256, 512})])
def test_the_recipe_is_that_of_the_gn_paper(name, groups):
    cfg = config_of(f"resnet50_imagenet_{name}.yaml")
    check_config(cfg)
    solver = complete_config(cfg, {"imagenet_train": ImageNet()}).SOLVER
    epoch = 1_281_167 / 256
    schedule = [*solver.STEPS, solver.MAX_ITER]
    assert (
        max(abs(i / epoch - at) for i, at in zip(schedule, (30, 60, 90, 100), strict=True)) < 0.01
    )
    assert (solver.BASE_LR, solver.IMS_PER_BATCH, solver.WEIGHT_DECAY) == (0.1, 256, 1e-4)
    assert solver.WEIGHT_DECAY_NORM == 1e-4
    model = build_model(cfg)
    norms = {path: m for path, m in model.named_modules() if isinstance(m, nn.GroupNorm)}
    assert len(norms) == 53
    assert {norm.num_groups for norm in norms.values()} == groups
    zero = {path for path, norm in norms.items() if not norm.weight.any()}
    assert zero == {path for path in norms if path.endswith(".conv3.norm")}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.backbone.res3[0].conv1.stride == (1, 1)
    assert model.backbone.res3[0].conv2.stride == (2, 2)


def test_identities_are_asked_for_by_a_key():
    name = "narrow50_tiny_imagenet.yaml"
    key = ("CLASSIFICATION.NUM_CLASSES", 10, "CLASSIFICATION.ZERO_INIT_RESIDUAL", False)
    model = build_model(config_of(name, *NARROW, *key))
    norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
    assert all(norm.weight.all() for norm in norms)
    zero_last_norms(model.backbone)
    assert sum(not norm.weight.any() for norm in norms) == 16


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_a_decay_that_averages_nothing_is_refused(value):
    cfg = config_of("resnet50_imagenet_gn.yaml", "CLASSIFICATION.EMA_DECAY", value)
    with pytest.raises(ValueError, match="EMA_DECAY must be from 0 to below 1, got"):
        check_config(cfg)


def test_images_are_given_in_the_order_of_input_format():
    overrides = [*NARROW, "CLASSIFICATION.NUM_CLASSES", 3]
    torch.manual_seed(0)
    rgb = build_model(config_of("narrow50_tiny_imagenet.yaml", *overrides)).eval()
    mean, std = ([103.53, 116.28, 123.675], [57.375, 57.12, 58.395])
    overrides += ["INPUT.FORMAT", "BGR", "MODEL.PIXEL_MEAN", mean, "MODEL.PIXEL_STD", std]
    bgr = build_model(config_of("narrow50_tiny_imagenet.yaml", *overrides)).eval()
    bgr.load_state_dict(rgb.state_dict())
    weight = bgr.backbone.stem.conv1.weight
    weight.data.copy_(weight.data.flip(1))
    images = torch.randint(256, (2, 3, 64, 64)).byte()
    batch = Batch(images, torch.zeros(2), torch.arange(2))
    torch.testing.assert_close(bgr(batch), rgb(batch), rtol=1e-4, atol=1e-4)


# The backbone, for detectors ---------------------------------------------------------------------


@pytest.mark.parametrize("detector", ["pfpn_narrow50.yaml", "faster_rcnn_narrow50.yaml"])
def test_the_backbone_goes_into_the_detectors(detector, tmp_path, caplog):
    cfg = config_of("narrow50_tiny_imagenet.yaml", *NARROW, "CLASSIFICATION.NUM_CLASSES", 10)
    torch.manual_seed(0)
    classifier = build_model(cfg)
    path = str(tmp_path / "backbone.pth")
    export_backbone(classifier, cfg, path)
    model = build_model(load_cfg(str(QUICKSTART / detector), NARROW))
    GroupsCheckpointer(model).resume_or_load(path, resume=False)
    own = model.backbone.bottom_up.state_dict()
    expected = classifier.backbone.state_dict()
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], value) for name, value in expected.items())
    content = torch.load(path, weights_only=True)
    described = content["description"]
    assert (described["input_format"], described["stride_in_1x1"]) == ("RGB", False)
    assert described["num_groups"]["res2.0.conv1.norm"] == 1
    assert described["pixel_std"] == (58.395, 57.12, 57.375)
    assert not described["weight_standardization"]


def test_norms_are_changed_and_measured(tmp_path, capsys):
    """Eight random pictures a class; the scales and shifts are not the initial ones."""
    overrides = [*NARROW, *DIGITS, "CLASSIFICATION.NUM_CLASSES", 10, "SOLVER.IMS_PER_BATCH", 8]
    overrides += ["CLASSIFICATION.NORM", "GN", "MODEL.PGN.NUM_GROUPS", 4, "OUTPUT_DIR", tmp_path]
    torch.manual_seed(0)
    cfg = config_of("narrow50_tiny_imagenet.yaml", *overrides)
    former = build_model(cfg)
    for name, parameter in former.named_parameters():
        if ".norm." in name:
            parameter.data.uniform_(0.5, 1.5)
    torch.save({"model": former.state_dict()}, tmp_path / "former.pth")
    words = ["--config-file", CONFIGS / "narrow50_tiny_imagenet.yaml", "--former", "GN4"]
    words += ["--batches", 1, "--steps", "0,2", "--lr", 0.001, *overrides[:-6]]
    words += ["MODEL.WEIGHTS", tmp_path / "former.pth", "SOLVER.IMS_PER_BATCH", 8]
    words += ["OUTPUT_DIR", tmp_path]
    args = change_norms.argument_parser().parse_args([str(word) for word in words])
    results = change_norms.main(args)
    starts = ("GN4", "new norms", "recalibrated")
    assert list(results) == [f"{name}, {step} steps" for name in starts for step in (0, 2)]
    losses = {name: row["cross_entropy"] for name, row in results.items()}
    assert len(set(losses.values())) == 6
    before, new, recalibrated = (losses[f"{name}, 0 steps"] for name in starts)
    assert abs(recalibrated - before) < abs(new - before)
    assert "53 norms have the moments of GN4's" in capsys.readouterr().out
    content = torch.load(tmp_path / "backbone_recalibrated.pth", weights_only=True)
    name = "res2.0.conv1"
    weights, old = content["model"], former.backbone.state_dict()
    assert torch.equal(weights[f"{name}.weight"], old[f"{name}.weight"])
    assert not torch.equal(weights[f"{name}.norm.weight"], old[f"{name}.norm.weight"])
    torch.save({"model": {}}, tmp_path / "former.pth")
    with pytest.raises(ValueError, match=r"must be a classifier's of the same config .*backbone"):
        change_norms.main(args)


def test_a_backbone_pretrained_with_standardization_goes_into_detectors_with_it(
    tmp_path, caplog, monkeypatch
):
    keys = [*NARROW, "MODEL.WS.ENABLED", True, "SOLVER.MAX_ITER", 3, "DATASETS.TEST", "()"]
    keys += ["SOLVER.IMS_PER_BATCH", 4, "TEST.EVAL_PERIOD", 0, "SOLVER.WARMUP_ITERS", 0]
    run("narrow50_tiny_imagenet.yaml", tmp_path, *keys, "CLASSIFICATION.NUM_CLASSES", 10)
    described = weights_of(tmp_path, "backbone", "description")
    assert described["weight_standardization"]
    assert Standardization(**described["standardization"]) == Standardization()
    path = str(tmp_path / "backbone.pth")
    monkeypatch.setattr(logging.getLogger("gn_practical"), "propagate", True)  # a run ends it
    for enabled in (True, False):
        overrides = [*NARROW, "MODEL.WS.ENABLED", str(enabled), "MODEL.ROI_BOX_HEAD.FC_DIM", "16"]
        model = build_model(load_cfg(str(QUICKSTART / "faster_rcnn_narrow50.yaml"), overrides))
        caplog.clear()
        with caplog.at_level("INFO"):
            GroupsCheckpointer(model).resume_or_load(path, resume=False)
        assert "(backbone.bottom_up 100 %) filled" in caplog.text
        # Once each: handlers of earlier runs in this process may show a message again.
        warned = "".join({r.getMessage() for r in caplog.records if r.levelname == "WARNING"})
        assert warned.count("The model is not as the weights") == (0 if enabled else 1), warned
    assert "other weight standardization in 53 layers: backbone.bottom_up.stem.conv1" in warned


# Averages ----------------------------------------------------------------------------------------


def test_the_average_is_the_sum_that_it_stands_for():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    hook, expected = AverageWeights(model, decay=0.9), None
    for step in range(5):
        for values in (*model.parameters(), model[1].running_mean):
            values.data.fill_(step + 1)
        hook.after_step()
        expected = step + 1 if expected is None else 0.9 * expected + 0.1 * (step + 1)
    averaged = hook.average.module
    for values in (*averaged.parameters(), averaged[1].running_mean):
        torch.testing.assert_close(values, torch.full_like(values, expected))
    assert not any(parameter.requires_grad for parameter in averaged.parameters())


def test_a_run_leaves_the_backbones_of_weights_and_average(tmp_path):
    keys = [*NARROW, "CLASSIFICATION.EMA_DECAY", 0.5, "SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()"]
    keys += ["SOLVER.IMS_PER_BATCH", 4, "TEST.EVAL_PERIOD", 0, "SOLVER.WARMUP_ITERS", 0]
    keys += ["CLASSIFICATION.NUM_CLASSES", 10, "CLASSIFICATION.ZERO_INIT_RESIDUAL", False]
    run("narrow50_tiny_imagenet.yaml", tmp_path, *keys)
    saved = torch.load(tmp_path / "model_final.pth", weights_only=True)
    own, average = weights_of(tmp_path, "backbone"), weights_of(tmp_path, "backbone_ema")
    for name, value in own.items():
        assert torch.equal(value, saved["model"][f"backbone.{name}"])
        assert torch.equal(average[name], saved["ema"][f"module.backbone.{name}"])
    name = "res2.0.conv1.weight"
    assert not torch.equal(own[name], average[name])


# Batches in parts --------------------------------------------------------------------------------


def test_parts_of_a_batch_train_like_it_and_resume_exactly_with_the_average(tmp_path):
    keys = ["SOLVER.MAX_ITER", 6, "SOLVER.IMS_PER_BATCH", 32, "CLASSIFICATION.EMA_DECAY", 0.5]
    parts = [*keys, "SOLVER.ACCUMULATE_STEPS", 4]
    run("mlp_digits.yaml", tmp_path / "whole", *keys)
    run("mlp_digits.yaml", tmp_path / "parts", *parts)
    whole, straight = (weights_of(tmp_path / name) for name in ("whole", "parts"))
    for name, value in whole.items():
        torch.testing.assert_close(straight[name], value, rtol=1e-4, atol=1e-6)
    results = json.loads((tmp_path / "parts/results.json").read_text())
    assert results.keys() == {"classification", "classification_ema"}
    assert "classification_ema/error" in (tmp_path / "parts/metrics.json").read_text()
    average = weights_of(tmp_path / "parts", key="ema")
    for file in ("model_final.pth", "model_0000005.pth", "model_0000003.pth"):
        (tmp_path / "parts" / file).unlink()
    (tmp_path / "parts/last_checkpoint").write_text("model_0000001.pth")
    run("mlp_digits.yaml", tmp_path / "parts", *parts, flags=["--resume"])
    for key, expected in (("model", straight), ("ema", average)):
        resumed = weights_of(tmp_path / "parts", key=key)
        assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def test_the_average_is_evaluated_behind_the_weights(tmp_path):
    keys = ["SOLVER.MAX_ITER", 2, "CLASSIFICATION.EMA_DECAY", 0.5]
    words = ["--config-file", CONFIGS / "mlp_digits.yaml", *DIGITS, "OUTPUT_DIR", tmp_path, *keys]
    args = pretrain.argument_parser().parse_args([str(word) for word in words])
    hooks = pretrain.Trainer(pretrain.setup(args))._hooks
    assert isinstance(hooks[0], AverageWeights)
    evaluations = [i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook)]
    assert len(evaluations) == 2
    assert type(hooks[evaluations[1] + 1]).__name__ == "PeriodicWriter"
