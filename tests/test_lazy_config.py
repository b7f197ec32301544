"""Python configs: read, changed, checked; ours are those of the YAML files, all of them bind."""

from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall, LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BasicStem
from omegaconf import DictConfig, OmegaConf

from gn_practical import PracticalGroupNorm, WSConv2d, build_model
from gn_practical.training.config import load_cfg
from gn_practical.training.config.node import look_up
from gn_practical.training.engine.checks import check_run
from gn_practical.training.lazy import (
    LazyTrainer,
    errors_in_lazy_words,
    find_file,
    load_lazy_config,
)
from gn_practical.training.lazy.keys import KEYS
from gn_practical.training.lazy.text import as_yaml
from gn_practical.training.lazy.words import in_lazy_words
from gn_practical.weights.describe import describe, describe_config

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "tests/lazy_tiny.py")
EQUIVALENTS = {
    "configs/lazy/pfpn_pgn.py": "configs/pfpn_pgn.yaml",
    "configs/lazy/faster_rcnn_gn_ws_pgn.py": "configs/faster_rcnn_gn_ws_pgn.yaml",
    "configs/lazy/quickstart_pfpn.py": "configs/quickstart/pfpn.yaml",
    "tests/lazy_tiny.py": "configs/quickstart/tiny.yaml",
}
SAME_KEYS = (
    *("MODEL.META_ARCHITECTURE", "MODEL.MASK_ON", "MODEL.ROI_HEADS.NUM_CLASSES"),
    *("SOLVER.BASE_LR", "SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH", "SOLVER.WARMUP_ITERS"),
    *("SOLVER.CLIP_GRADIENTS", "DATASETS.TRAIN", "DATASETS.TEST", "INPUT.MASK_FORMAT"),
    *("DATALOADER.FILTER_EMPTY_ANNOTATIONS", "MODEL.WS.ENABLED", "MODEL.WEIGHTS"),
)


def build(cfg):
    with torch.device("meta"):
        return LazyTrainer.construct_model(cfg)


def signature(model):
    return {name: (each.shape, each.requires_grad) for name, each in model.named_parameters()}


@pytest.mark.parametrize("path", EQUIVALENTS)
def test_ours_are_those_of_the_yaml_files(path):
    cfg = load_lazy_config(str(ROOT / path), ["train.device=meta"])
    expected = load_cfg(str(ROOT / EQUIVALENTS[path]), ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model, same = build(cfg), build_model(expected)
    assert signature(model) == signature(same)
    ours, theirs = (
        describe(each, describe_config(c)).to_dict() for each, c in ((model, cfg), (same, expected))
    )
    assert ours.pop("lazy_config")
    assert theirs.pop("config")
    assert {**ours, "config": None} | {"lazy_config": None} == {**theirs, "config": None}
    for key in SAME_KEYS:
        assert look_up(cfg, key) == look_up(expected, key), key


def test_every_python_config_of_ours_has_an_equivalent():
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "configs/lazy").glob("*.py")}
    assert files == {path for path in EQUIVALENTS if path.startswith("configs")}


def with_pgn(node):
    """Set every norm of a model's config, wherever it stands."""
    if isinstance(node, DictConfig):
        for key in list(node):
            if key in ("norm", "conv_norm"):
                node[key] = "PGN"
            else:
                with_pgn(node._get_node(key))
    elif OmegaConf.is_list(node):
        for each in node._content:
            with_pgn(each)


ZOO = Path(model_zoo.__file__).parent / "configs"
NAMES = [
    *(str(path.relative_to(ZOO)) for path in sorted(ZOO.glob("COCO-*/*.py"))),
    "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py",
    "new_baselines/mask_rcnn_regnety_4gf_dds_FPN_100ep_LSJ.py",
]


@pytest.mark.parametrize("name", NAMES)
def test_pgn_binds_in_every_model_of_detectron2(name):
    cfg = load_lazy_config(name, ["train.device=meta", "ws.enabled=True"])
    with_pgn(cfg.lazy.model)
    model = build(cfg)
    norms = [each for each in model.modules() if isinstance(each, PracticalGroupNorm)]
    assert len(norms) > 40
    assert all(norm.num_groups for norm in norms)
    assert sum(isinstance(each, WSConv2d) for each in model.modules()) == len(norms)
    assert cfg.clone().lazy is cfg.lazy


def test_groups_are_set_as_the_keys_say():
    words = ["train.device=meta", "pgn.num_groups=2", "pgn.layer_num_groups=[['*stem*', 4]]"]
    model = build(load_lazy_config(TINY, words))
    groups = {n: m.num_groups for n, m in model.named_modules() if hasattr(m, "num_groups")}
    assert groups.pop("backbone.bottom_up.stem.conv1.norm") == 4
    assert set(groups.values()) == {2}


def test_the_text_of_a_config_builds_the_same():
    norm = LazyCall(BasicStem)(in_channels=3, out_channels=8, norm=PracticalGroupNorm)
    lazy = DictConfig(
        {
            "a": norm,
            "b": {"lr": 0.1, "other": "${.lr}", "shapes": [ShapeSpec(channels=4)]},
            "c": {"f": lambda channels: None},
        },
        flags={"allow_objects": True},
    )
    text = as_yaml(lazy)
    assert "python" not in text
    assert "in test_lazy_config.py, line" in " ".join(text.split())
    again = OmegaConf.create(text)
    stem = instantiate(again.a)
    assert isinstance(stem.conv1.norm, PracticalGroupNorm)
    assert again.b.other == 0.1
    assert instantiate(again.b.shapes)[0] == ShapeSpec(channels=4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL.DEVICE", "cpu"], r"overrides .* must be path.key=value, got 'MODEL.DEVICE'"),
        (["~train.seed=1"], r"must be path.key=value"),
        (["train.max_itr=3"], r"must exist, got train.max_itr. Did you mean train.max_iter"),
        (["train.chekpointer.period=3"], r"must exist, got train.chekpointer.period"),
        (["pgn.num_group=3"], r"must exist, got pgn.num_group. Did you mean pgn.num_groups"),
        (["+pgn.num_group=3"], r"must exist, got pgn.num_group. Did you mean pgn.num_groups"),
        (["modle.num_classes=3"], r"must exist, got modle.num_classes"),
        (["train.output_dir=a b[="], r"hydra's syntax, got 'train.output_dir=a b\[='.*Quote"),
        (["train.max_iter=many"], r"train.max_iter must be of type int, got train.max_iter='many'"),
        (["train.amp.enabled=1"], r"train.amp.enabled must be of type bool"),
        (["train.output_dir=3"], r"train.output_dir must be of type str"),
        (["dataloader.test.dataset.names=null"], r"must name the data sets of dataloader.evalua"),
    ],
)
def test_overrides_that_cannot_be_are_one_line(words, message):
    with pytest.raises(ValueError, match=message):
        load_lazy_config(TINY, words)


def test_an_evaluation_needs_an_evaluator():
    words = ["dataloader.evaluator=null", "train.init_checkpoint="]
    assert load_lazy_config(TINY, words).MODEL.WEIGHTS == ""
    with pytest.raises(ValueError, match=r"dataloader.evaluator must be there for an evaluation"):
        load_lazy_config(TINY, words, eval_only=True)


def test_keys_that_are_there_may_be_changed_and_others_added(caplog):
    words = ["train.seed=3", "+train.mine.too=1", "optimizer.nesterov=True", "optimizer.lr=1"]
    cfg = load_lazy_config(TINY, [*words, "dataloader.evaluator.0.tasks=[bbox]"])
    assert (cfg.SEED, cfg.SOLVER.BASE_LR, cfg.lazy.optimizer.nesterov) == (3, 1.0, True)
    assert "Nothing in this run reads train.mine" in caplog.text
    assert cfg.recipe.SOLVER.BASE_LR == 0.02


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1\nb = c\n", r"must run, got NameError: name 'c' is not defined in .*, line 2\. "),
        ("a = (1\n", r"must run, got SyntaxError"),
        ("from .other import x\n", r"must run, got ImportError: .*other.py does not exist"),
        ("model = dict()\n", r"must have .* without dataloader, optimizer, lr_multiplier, train"),
    ],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path, text, message):
    path = tmp_path / "config.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_lazy_config(str(path))


def test_yaml_configs_and_python_configs_name_each_others_tool(tmp_path):
    with pytest.raises(ValueError, match=r"It is a config of tools/train_net\.py"):
        load_lazy_config(str(ROOT / "configs/pfpn_pgn_all.yaml"))
    with pytest.raises(ValueError, match=r"tools/lazyconfig_train_net\.py trains them"):
        load_cfg(TINY)
    with pytest.raises(ValueError, match=r"got 'no.py', which does not exist. Detectron2's own"):
        find_file("no.py")


def test_errors_and_advice_name_the_keys_of_the_python_config():
    cfg = load_lazy_config(TINY, ["train.amp.enabled=True"])
    with errors_in_lazy_words(), pytest.raises(ValueError, match=r"SOLVER\.AMP\.DTYPE") as error:
        check_run(cfg)
    assert in_lazy_words(str(error.value)) == (
        "train.amp.dtype must be bfloat16 on cpu with train.amp.enabled, got "
        "train.amp.dtype=float16. Add train.amp.dtype=bfloat16."
    )
    with pytest.raises(ValueError, match=r"Add train\.amp\.dtype=bfloat16"), errors_in_lazy_words():
        check_run(cfg)
    text = 'Correct it, or add MODEL.WEIGHTS "" to start.'
    assert in_lazy_words(text) == 'Correct it, or add train.init_checkpoint="" to start.'
    assert in_lazy_words("MODEL.WEIGHTS_MIN_SHARE.") == "train.weights_min_share."
    assert in_lazy_words("MY_OUTPUT_DIR, MODEL.DEVICES") == "MY_OUTPUT_DIR, MODEL.DEVICES"


def test_a_saved_config_is_found_by_detectron2s_reader_too(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(load_lazy_config(TINY).dump())
    again = LazyConfig.load(str(path))
    assert again.dataloader.test.mapper.image_format == "BGR"
    assert load_lazy_config(str(path)).dump() == path.read_text()


def test_every_key_is_listed():
    page = (ROOT / "docs/lazyconfig.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    for path in KEYS:
        node, _, key = path.partition(".")
        if node == "train":
            assert f"`{path}`" in page
        elif node in ("pgn", "ws", "datasets"):
            assert any(row.startswith(f"| `{node}` |") and f"`{key}`" in row for row in rows), path
