"""Classifiers: models, norms, evaluation, schedules, and training from the command line."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, get_cfg
from detectron2.utils import comm
from gn_classification import loaders
from gn_classification.classifier import Batch
from gn_classification.config import add_classification_config, complete_config
from gn_classification.datasets import open_datasets
from gn_classification.evaluation import ClassificationEvaluator
from gn_classification.loaders import build_train_loader
from torch import nn
from torchvision.models import resnet50

from gn_practical import add_pgn_config, build_model
from gn_practical.layers import group_norm
from gn_practical.layers.group_norm import FusedGroupNorm
from gn_practical.training import add_training_config
from gn_practical.training.checkpoint import GroupsCheckpointer
from gn_practical.training.engine import load_cfg

CONFIGS = Path(__file__).parent.parent / "configs"
_SPEC = importlib.util.spec_from_file_location("classify", CONFIGS.parent / "train_net.py")
classify = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(classify)
DIGITS = ["DATASETS.TRAIN", '("digits_train",)', "DATASETS.TEST", '("digits_val",)']
TINY = [
    *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "4"),
    *("CLASSIFICATION.NUM_CLASSES", "10", "CLASSIFICATION.VAL_FRACTION", "0.02"),
    *("CLASSIFICATION.IMS_PER_BATCH_TEST", "50"),
]


@pytest.fixture(autouse=True)
def nothing_loaded():
    yield
    loaders._LOADED.clear()


def run(config, output_dir, *overrides, flags=()):
    words = ["--config-file", CONFIGS / config, *flags, *DIGITS, *TINY]
    words += ["OUTPUT_DIR", output_dir, *overrides]
    args = classify.argument_parser().parse_args([str(word) for word in words])
    return classify.engine.launch(classify.main, args)


def config_of(name, *overrides):
    return load_cfg(
        str(CONFIGS / name),
        ["MODEL.DEVICE", "cpu", *map(str, overrides)],
        add_config=add_classification_config,
    )


def images(number=4, channels=3, size=32):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (number, channels, size, size), generator=generator)
    return Batch(pixels.byte(), torch.arange(number) % 10, torch.arange(number))


def norms_of(model):
    kinds = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    return [module for module in model.modules() if isinstance(module, kinds)]


def test_the_keys_collide_with_no_other_project_s():
    cfg = get_cfg()
    cfg.INPUT.IMAGE_SIZE, cfg.MODEL.CLASSIFIER = 1024, CfgNode({"NAME": "another"})
    for add in (add_pgn_config, add_training_config):
        add(cfg)
    others = cfg.clone()
    add_classification_config(cfg)
    del cfg["CLASSIFICATION"]
    assert cfg == others


# Models ------------------------------------------------------------------------------------------


def test_mlp_is_the_paper_s():
    model = build_model(config_of("mlp_mnist.yaml"))
    shapes = [tuple(p.shape) for p in model.parameters() if p.dim() == 2]
    assert shapes == [(512, 784), (10, 512)]
    (norm,) = norms_of(model)
    assert (norm.in_channels, norm.num_groups) == (784, 64)


def test_torchvision_s_weights_reach_torchvision_s_backbone(tmp_path):
    source = resnet50(norm_layer=lambda channels: nn.GroupNorm(1, channels))
    torch.save(source.state_dict(), tmp_path / "resnet50.pth")
    model = build_model(config_of("resnet50_pet.yaml"))
    GroupsCheckpointer(model).load(str(tmp_path / "resnet50.pth"))
    loaded = model.backbone.resnet.state_dict()
    assert len(loaded) == len(source.state_dict()) - 2  # all but the classifier
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in loaded.items())


@pytest.mark.parametrize(("depth", "parameters"), [(20, 0.27e6), (56, 0.85e6), (110, 1.7e6)])
def test_resnets_for_cifar_are_he_s(depth, parameters):
    """Depth and size as in Table 6 of He et al. 2015; two shortcuts are projections."""
    model = build_model(config_of("resnet56_cifar10.yaml", "CLASSIFICATION.DEPTH", depth))
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    shortcuts = [path for path, _ in model.named_modules() if path.endswith(".shortcut")]
    assert len(convolutions) + 1 - len(shortcuts) == depth
    assert len(shortcuts) == 2
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.03)
    features = model.backbone((images(2).images - 120) / 60)["res4"]
    assert features.shape == (2, 64, 8, 8)
    blocks = [m for m in model.modules() if hasattr(m, "conv2")]
    assert len(blocks) == (depth - 2) // 2
    assert not any(block.conv2.norm.weight.any() for block in blocks)
    assert all(block.conv1.norm.weight.all() for block in blocks)
    he = (2 / (9 * 64)) ** 0.5
    assert blocks[-1].conv1.weight.std().item() == pytest.approx(he, rel=0.02)


def test_torchvision_resnet_begins_with_identities_and_keeps_its_groups():
    cfg = config_of("resnet50_pet.yaml", "MODEL.PGN.NUM_GROUPS", 32)
    model = build_model(cfg)
    assert {norm.num_groups for norm in norms_of(model)} == {32}
    assert len(norms_of(model)) == 53
    assert not any(m.bn3.weight.any() for m in model.modules() if hasattr(m, "bn3"))
    assert model.eval()(images(2, size=64)).shape == (2, 37)


def test_pixels_are_normalized_and_feature_maps_pooled():
    model = build_model(config_of("resnet56_cifar10.yaml", "CLASSIFICATION.DEPTH", 8)).eval()
    batch = images()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([125.3, 123, 113.9], [63, 62.1, 66.7]))
    features = model.backbone((batch.images - mean) / std)["res4"].mean((2, 3))
    torch.testing.assert_close(model(batch), model.classifier(features))
    loss = model.train()(batch)["loss_cls"]
    torch.testing.assert_close(loss, F.cross_entropy(model.eval()(batch), batch.labels))


@pytest.mark.parametrize(
    ("norm", "overrides", "groups"),
    [
        ("LN", (), {1}),
        ("IN", (), {16, 32, 64}),
        ("GN", ("MODEL.PGN.NUM_GROUPS", 8), {8}),
        ("PGN", ("MODEL.PGN.NUM_GROUPS", -1), {16, 32, 64}),
        ("PGN", (), {1, 2, 4, 8, 16}),
    ],
)
def test_group_norms_are_one_layer_with_their_groups(norm, overrides, groups):
    cfg = config_of("resnet56_cifar10.yaml", "CLASSIFICATION.NORM", norm, *overrides)
    norms = norms_of(build_model(cfg))
    assert all(isinstance(layer, FusedGroupNorm) for layer in norms)
    assert {layer.num_groups for layer in norms} <= groups
    if norm == "IN":
        assert all(layer.num_groups == layer.num_channels for layer in norms)


@pytest.mark.parametrize(
    ("config", "kind"), [("mlp_digits", nn.BatchNorm1d), ("resnet56_cifar10", nn.BatchNorm2d)]
)
def test_batch_norm(config, kind):
    model = build_model(config_of(f"{config}.yaml", "CLASSIFICATION.NORM", "BN"))
    assert all(isinstance(layer, kind) for layer in norms_of(model))
    size, channels = (8, 1) if kind is nn.BatchNorm1d else (32, 3)
    assert model(images(4, channels, size))["loss_cls"].isfinite()


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        (
            "resnet56_cifar10",
            ("CLASSIFICATION.NORM", "GN"),
            "NUM_GROUPS must be given for .*NORM=GN",
        ),
        ("resnet56_cifar10", ("CLASSIFICATION.DEPTH", 55), "6n \\+ 2 .*DEPTH=55"),
        ("resnet50_pet", ("CLASSIFICATION.DEPTH", 56), "one of torchvision's .*DEPTH=56"),
        ("resnet50_pet", ("MODEL.PIXEL_MEAN", [1.0]), "must have three values"),
        ("mlp_digits", ("CLASSIFICATION.NUM_CLASSES", 0), "NUM_CLASSES must be known"),
        ("mlp_digits", ("CLASSIFICATION.NORM", "XN"), "NORM must be one of"),
    ],
)
def test_models_that_cannot_be_built(config, overrides, message):
    with pytest.raises(ValueError, match=message):
        build_model(config_of(f"{config}.yaml", *overrides))


def test_degenerate_groups_run_only_where_they_are_asked_for(caplog):
    group_norm._warn_once.cache_clear()
    batch = images(4, 1, 8)
    cfg = config_of("mlp_digits.yaml", "MODEL.PGN.NUM_GROUPS", 512)
    with pytest.raises(ValueError, match=r"more than one value.*ALLOW_DEGENERATE True"):
        build_model(cfg)(batch)
    allow = ("MODEL.PGN.NUM_GROUPS", 512, "MODEL.PGN.ALLOW_DEGENERATE", True)
    model = build_model(config_of("mlp_digits.yaml", *allow))
    loss = model(batch)["loss_cls"]
    loss.backward()
    assert model.backbone.layers[0].weight.grad.abs().max() < 1e-5
    logits = model.eval()(batch)
    torch.testing.assert_close(logits, logits[:1].expand(4, -1), rtol=0, atol=1e-4)
    assert "Degenerate groups run" in caplog.text


# Evaluation --------------------------------------------------------------------------------------


def test_errors_are_those_of_all_ranks_images(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 10, generator=generator)
    labels = torch.randint(10, (40,), generator=generator)
    order = logits.argsort(1, descending=True)
    ranks = (order == labels[:, None]).int().argmax(1)
    sums = []
    for part in (slice(0, 25), slice(25, 40)):  # of two ranks, in batches of 10 at most
        evaluator = ClassificationEvaluator()
        evaluator.reset()
        for x, y in zip(logits[part].split(10), labels[part].split(10), strict=True):
            evaluator.process(Batch(x, y, y), x)
        sums.append(evaluator._sums)
    monkeypatch.setattr(comm, "gather", lambda _: sums)
    results = evaluator.evaluate()["classification"]
    assert results["error"] == pytest.approx(100 * (ranks > 0).double().mean().item())
    assert results["top5_error"] == pytest.approx(100 * (ranks > 4).double().mean().item())
    assert results["cross_entropy"] == pytest.approx(F.cross_entropy(logits, labels).item())


def test_top5_error_needs_more_than_five_classes():
    evaluator = ClassificationEvaluator()
    evaluator.reset()
    with pytest.raises(ValueError, match="must have images, got none"):
        evaluator.evaluate()
    evaluator.process(images(2), torch.eye(5)[:2])
    assert evaluator.evaluate()["classification"]["error"] == 0
    assert "top5_error" not in evaluator.evaluate()["classification"]


# The schedule ------------------------------------------------------------------------------------


def test_epochs_become_iterations_once():
    overrides = [*DIGITS, "SOLVER.IMS_PER_BATCH", 64, "CLASSIFICATION.EPOCHS", 10]
    cfg = config_of("resnet56_cifar10.yaml", *overrides)
    datasets = open_datasets(cfg)
    cfg = complete_config(cfg, datasets)
    assert cfg.SOLVER.MAX_ITER == 225  # of 1438 images
    assert cfg.SOLVER.STEPS == (112, 168)
    assert abs(cfg.SOLVER.BASE_LR - 0.1 * 64 / 32) < 1e-9
    assert (cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD) == (23, 225)
    assert complete_config(cfg, datasets) == cfg


def test_a_config_in_epochs_is_not_trained_as_it_is():
    text = r"turned into iterations.*CLASSIFICATION.EPOCHS=30.*complete_config"
    with pytest.raises(ValueError, match=text):
        build_train_loader(config_of("mlp_digits.yaml"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("SOLVER.MAX_ITER", 2), "CLASSIFICATION.EPOCHS must be 0 where SOLVER.MAX_ITER is given"),
        (("CLASSIFICATION.AUGMENTATION", "resized_crop"), "must be one of none, crop_flip with"),
        (("DATASETS.TRAIN", "()"), r"must name one data set, got DATASETS.TRAIN=\(\)"),
        (("CLASSIFICATION.NUM_CLASSES", 7), "must be that of digits_train, 10, got .*=7"),
        (("DATASETS.TRAIN", '("digit_train",)'), "got 'digit_train'. Did you mean digits_train"),
        (("DATASETS.TEST", '("mnist_val",)'), "'mnist_val' must lie .* Add --download"),
        (("CLASSIFICATION.IMS_PER_BATCH_TEST", 0), "CLASSIFICATION.IMS_PER_BATCH_TEST"),
    ],
)
def test_errors_before_training(tmp_path, overrides, message):
    with pytest.raises(SystemExit, match=message):
        run("mlp_digits.yaml", tmp_path, *overrides)


# Training ----------------------------------------------------------------------------------------

PRETRAINING = {path.name for path in CONFIGS.glob("*imagenet*.yaml")}  # test_pretraining.py
RECIPES = sorted({path.name for path in CONFIGS.glob("*.yaml")} - PRETRAINING)
# One of the four on photographs is enough: they differ in depth and data.
BUILT = {"resnet101_caltech101.yaml", "resnet101_pet.yaml", "resnet50_caltech101.yaml"}


@pytest.mark.parametrize("name", sorted(BUILT))
def test_recipes_on_photographs_build_their_model(name):
    depth, data = re.fullmatch(r"resnet(\d+)_(\w+).yaml", name).groups()
    model = build_model(config_of(name))
    assert len(norms_of(model)) == int(depth) + 3  # and a projection in each stage
    assert model.classifier.out_features == {"pet": 37, "caltech101": 101}[data]


@pytest.mark.parametrize("name", sorted({*RECIPES} - BUILT))
def test_every_recipe_trains_on_the_digits(name, tmp_path):
    size = {"mlp_digits.yaml": 8, "mlp_mnist.yaml": 28}.get(name, 40)
    schedule = ["CLASSIFICATION.EPOCHS", 0, "SOLVER.MAX_ITER", 2, "CLASSIFICATION.IMAGE_SIZE", size]
    run(name, tmp_path, *schedule)
    results = json.loads((tmp_path / "results.json").read_text())
    assert 0 <= results["classification"]["error"] <= 100
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert state["iteration"] == 1
    table = json.loads((tmp_path / "num_groups.json").read_text())
    assert table
    assert all(layer["num_groups"] for layer in table)


def test_an_mlp_learns_and_leaves_what_a_user_looks_for(tmp_path):
    batch = ["SOLVER.IMS_PER_BATCH", 64, "CLASSIFICATION.EPOCHS", 3]
    run("mlp_digits.yaml", tmp_path, *batch)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["classification"]["error"] < 15
    assert (tmp_path / "curves.png").stat().st_size > 1000
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert sum("classification/error" in line for line in lines) == 3
    assert [line["train_error"] for line in lines if "train_error" in line][-1] < 20
    log = (tmp_path / "log.txt").read_text()
    assert re.search(r"\| *error *\|", log)
    assert not re.search("Nothing in this run reads.*(SOLVER|CLASSIFICATION)", log)
    weights = ["MODEL.WEIGHTS", tmp_path / "model_final.pth"]
    run("mlp_digits.yaml", tmp_path / "again", *weights, flags=["--eval-only"])
    assert json.loads((tmp_path / "again/results.json").read_text()) == results


def test_a_resumed_run_ends_with_the_same_weights(tmp_path):
    small = ["CLASSIFICATION.DEPTH", 8, "CLASSIFICATION.EPOCHS", 0, "SOLVER.MAX_ITER", 4]
    small += [
        "SOLVER.CHECKPOINT_PERIOD",
        2,
        "CLASSIFICATION.IMAGE_SIZE",
        8,
        "CLASSIFICATION.NORM",
        "BN",
    ]
    run("resnet56_cifar10.yaml", tmp_path, *small)
    straight = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    for name in ("model_final.pth", "model_0000003.pth"):
        (tmp_path / name).unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    run("resnet56_cifar10.yaml", tmp_path, *small, flags=["--resume"])
    resumed = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)
