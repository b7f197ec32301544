"""Generated configs: each trains a step, or ends with one clear error that names what was set.

Forty in the suite; HYPOTHESIS_PROFILE=thorough draws five hundred.
"""

import contextlib
import io
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from tool_train_net import run as run_train_net

from gn_practical import add_pgn_config
from gn_practical.training.config.keys import COUNTS
from gn_practical.training.data import ensure_scenes
from gn_practical.training.engine import load_cfg

TINY = str(Path(__file__).parent.parent / "configs/quickstart/tiny.yaml")

COMMON = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "print_blob": False,
    "phases": [Phase.explicit, Phase.generate, Phase.shrink],
    "suppress_health_check": list(HealthCheck),
}
settings.register_profile("suite", max_examples=40, **COMMON)
settings.register_profile("thorough", max_examples=500, **COMMON)
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


# The run of an example ---------------------------------------------------------------------------


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Trains a step and evaluates with overrides; returns error text ("" for none) and warnings."""
    root = tmp_path_factory.mktemp("generated")
    ensure_scenes(root / "scenes", {"train": 2, "val": 1}, size=64)
    output = root / "output"
    config = root / "config.yaml"
    config.write_text(yaml.safe_dump({"_BASE_": TINY, "OUTPUT_DIR": str(output), **fast(root)}))
    warnings = Warnings()
    logging.getLogger("gn_practical").addHandler(warnings)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is too small to gain by more
    patch = pytest.MonkeyPatch()
    patch.setattr("gn_practical.training.engine.setup.collect_env_info", lambda: "")
    patch.setattr("gn_practical.training.engine.hooks.plot_metrics", lambda *_: None)
    patch.setattr("gn_practical.training.engine.trainer.Trainer.train", one_step_of(patch))

    def run(overrides):
        for path in output.glob("*.pth") if output.is_dir() else ():
            path.unlink()
        warnings.texts.clear()
        words = [word for pair in overrides for word in pair]
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                run_train_net("--config-file", config, *words)
        except SystemExit as error:
            return str(error), list(warnings.texts)
        return "", list(warnings.texts)

    yield run
    patch.undo()
    torch.set_num_threads(threads)
    logging.getLogger("gn_practical").removeHandler(warnings)
    shutil.rmtree(root)


def fast(root):
    data = [
        [f"generated_{split}", *(str(root / "scenes" / name.format(split)) for name in FILES)]
        for split in ("train", "val")
    ]
    return {
        "MODEL": {"DEVICE": "cpu"},
        "DATASETS": {
            "COCO_PANOPTIC": data,
            "TRAIN": ["generated_train_separated"],
            "TEST": ["generated_val_separated"],
        },
        "DATALOADER": {"NUM_WORKERS": 0},
        "SOLVER": {"MAX_ITER": 3, "CHECKPOINT_PERIOD": 1000},
        "TEST": {"NUM_PICTURES": 0},
        "SEED": 1,
    }


FILES = ("images/{}", "panoptic_{}", "panoptic_{}.json", "panoptic_stuff_{}", "instances_{}.json")


def one_step_of(patch):
    from gn_practical.training.engine.trainer import Trainer

    whole = Trainer.train

    def train(self):
        self.max_iter = min(self.max_iter, self.start_iter + 1)
        return whole(self)

    return train


# What is drawn ----------------------------------------------------------------------------------


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def defaults():
    cfg = get_cfg()
    add_pgn_config(cfg)
    return cfg


KEYS = {
    **dict(leaves(defaults())),
    **{key: value for key, value in leaves(load_cfg(TINY)) if not key.startswith("DATASETS.")},
}
# Values that would take hours or the machine's memory, in place of an error.
BOUNDED = {
    "SOLVER.IMS_PER_BATCH": st.sampled_from([-2, 0, 1, 2, 3]),
    "DATALOADER.NUM_WORKERS": st.sampled_from([-1, 0, 1]),
    "TEST.IMS_PER_BATCH": st.sampled_from([-2, 0, 1, 500]),
}
# Where files are written is the test's own affair, and hooks of a user's code are not drawn.
LEFT_OUT = {"OUTPUT_DIR", "VERSION"}

# Detectron2 takes larger ones too, and fills the memory with them.
INTEGERS = st.sampled_from([-1, 0, 1, 2, 3, 4, 7, 16, 64])
FLOATS = st.sampled_from([-1.0, 0.0, 1e-9, 0.3, 0.5, 1.0, 2.5, 1e12]) | st.just("1e999")
TEXTS = st.sampled_from(
    [*("", "nosuch", "PGN", "GN", "BN", "FrozenBN", "SyncBN", "LN", "PGM", "cpu", "cuda:7", "gpu"),
     *("RGB", "bitmask", "norm", "float16", "bfloat16", "fp8", "exact", "tanh", "bbox/AP"),
     *("WarmupCosineLR", "RepeatFactorTrainingSampler", "no/such/file.pth", "../elsewhere")]
)  # fmt: skip
ELEMENTS = INTEGERS | FLOATS | st.sampled_from(["res2", "p9", "backbone.*", None, ("*", 2), ()])
LISTS = st.lists(ELEMENTS, max_size=5).map(lambda value: repr(tuple(value)).replace("'1e999'", "2"))
BOOLEANS = st.booleans()


def of_its_type(default):
    if isinstance(default, bool):
        return BOOLEANS
    kinds = ((int, INTEGERS), (float, FLOATS), (str, TEXTS), (list | tuple, LISTS))
    return next((values for kind, values in kinds if isinstance(default, kind)), TEXTS)


@st.composite
def override(draw):
    """A key with a value of its type or of another one; or a misspelt key."""
    key = draw(st.sampled_from(sorted(KEYS.keys() - LEFT_OUT)))
    kind = draw(st.sampled_from(["right"] * 9 + ["wrong", "misspelt"]))
    if kind == "misspelt":
        place = draw(st.integers(0, len(key) - 1))
        return key[:place] + "X" + key[place + 1 :], "1"
    if key in BOUNDED:
        return key, draw(BOUNDED[key])
    if kind == "wrong":
        return key, draw(INTEGERS | FLOATS | TEXTS | LISTS | BOOLEANS)
    return key, draw(of_its_type(KEYS[key]))


# The properties ---------------------------------------------------------------------------------


@settings(PROFILE)
@given(st.lists(override(), min_size=1, max_size=3, unique_by=lambda pair: pair[0]))
@example([("SOLVER.STEPS", "(3,)")])
@example([("MODEL.PGN.NUM_GROUPS", 3)])
@example([("MODEL.FPN.OUT_CHANNELS", 10**12)])
@example([("MODEL.RPN.IOU_LABELS", "(0, 1)")])
@example([("MODEL.MASK_ON", False)])
@example([("TEST.EXPECTED_RESULTS", "(-1,)")])
@example([("TEST.AUG.ENABLED", True)])
@example([("INPUT.FORMAT", "nosuch")])
@example([("DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler")])
@example([("MODEL.ROI_HEADS.NUM_CLASSES", 4), ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3)])
def test_trains_a_step_or_ends_with_one_clear_error(train, overrides):
    error, _ = train(overrides)  # any other exception than SystemExit fails here, with its trace
    if not error:
        return
    assert error.startswith("error: "), error
    assert error.count("\n") == error.count("\n  ")  # a line for each of several errors in data
    assert len(error) < 2000
    named = [str(word) for key, value in overrides for word in (key, key.split(".")[-1], value)]
    named = [word.lower() for word in named if word]
    assert any(word in error.lower() for word in named) or is_about_the_run(error), error


def is_about_the_run(error):
    """Errors of what the values made of the run: losses, classes of the data, group sizes."""
    return any(text in error for text in ("must be finite", "A group must hold more than one"))


@pytest.mark.parametrize("key", sorted(KEYS)[::10])
def test_a_misspelt_key_names_the_right_one(key):
    place = len(key) // 2
    with pytest.raises(ValueError, match=rf"must exist, got .*Did you mean .*{key}"):
        load_cfg(TINY, [key[:place] + key[place + 1 :], "1"])


@pytest.mark.parametrize("key", COUNTS)
def test_our_own_counts_are_checked(train, key):
    error, _ = train([(key, -1)])
    assert f"error: {key} must be 0 or more, got {key}=-1" in error


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.AMP.DTYPE", "bfloat16"),  # SOLVER.AMP.ENABLED is off
        ("MODEL.WS.EXCLUDE", "('backbone.*',)"),  # as is MODEL.WS.ENABLED
        ("MODEL.RETINANET.NORM", "PGN"),  # of another model
        ("SOLVER.GAMMA", "0.2"),  # of another schedule
    ],
)
def test_a_key_that_nothing_reads_is_named(train, key, value):
    error, warnings = train([(key, value)])
    assert not error
    assert any(f"Nothing in this run reads {key}={value}" in text for text in warnings)


def test_keys_of_norms_that_are_not_there_are_named(train):
    norms = [(f"MODEL.{part}.NORM", "BN") for part in PARTS_WITH_NORM]
    error, warnings = train([*norms, ("MODEL.PGN.NUM_GROUPS", 2), ("MODEL.PGN.RULE", "exact")])
    assert not error
    assert any("MODEL.PGN.NUM_GROUPS, MODEL.PGN.RULE have no effect" in text for text in warnings)
    _, warnings = train([("MODEL.PGN.NUM_GROUPS", 2), ("MODEL.PGN.RULE", "exact")])
    assert any("MODEL.PGN.RULE has no effect" in text for text in warnings)


PARTS_WITH_NORM = ("FPN", "RESNETS", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD")
