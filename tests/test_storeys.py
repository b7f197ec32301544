"""Imports point down, and importing the norm changes one thing in the world."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg

from gn_practical import add_pgn_config, build_model
from gn_practical.training.config import add_training_config

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gn_practical"
TRAINING = ("config", "data", "validation", "evaluation", "checkpoint", "engine", "lazy")
TRAINING += ("comparison", "sweep")

WORLD = """
    import os, signal, sys, warnings
    import detectron2.modeling
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.layers import batch_norm
    from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY

    def world():
        return dict(
            data=sorted(DatasetCatalog.list()), metadata=sorted(MetadataCatalog.list()),
            registries=[sorted(name for name, _ in registry) for registry in
                        (BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY)],
            filters=list(warnings.filters), environment=dict(os.environ),
            handlers=[signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)],
        )

    modules, before, get_norm = set(sys.modules), world(), [batch_norm.get_norm]
    import gn_practical

    after = world()
    assert after == before, {key: (before[key], after[key]) for key in before
                             if before[key] != after[key]}
    assert batch_norm.get_norm is not get_norm[0]
    new = {name for name in set(sys.modules) - modules}
    upstairs = ("training", "weights", "inference", "analysis")
    forbidden = [n for n in new if n.split(".")[0] in ("scipy", "sklearn", "hotcoco", "pycocotools")
                 or n.startswith(tuple(f"gn_practical.{room}" for room in upstairs))]
    assert not forbidden, forbidden
    print("as before")
"""


def test_the_import_changes_get_norm_alone():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WORLD)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "as before\n", done.stderr


def imported(path):
    """Names of the modules that a file imports, at its top and in its functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of(folder, outside=()):
    files = [f for f in folder.rglob("*.py") if not any(f.is_relative_to(o) for o in outside)]
    return [(file, name) for file in files for name in imported(file)]


def test_the_norm_never_imports_the_trainer():
    wrong = [
        (str(file.relative_to(ROOT)), name)
        for file, name in imports_of(PACKAGE, outside=[PACKAGE / "training"])
        if name.startswith("gn_practical.training")
    ]
    assert not wrong


def test_the_package_never_imports_projects():
    projects = {f.name for f in (ROOT / "projects").glob("*/*") if (f / "__init__.py").exists()}
    assert projects
    names = {"projects", "tools", "tests", *projects}
    assert not [(f, name) for f, name in imports_of(PACKAGE) if name.split(".")[0] in names]


def test_the_rooms_of_the_trainer_import_in_one_direction():
    edges = {
        (room, other)
        for room in TRAINING
        for _, name in imports_of(PACKAGE / "training" / room)
        for other in TRAINING
        if other != room and name.startswith(f"gn_practical.training.{other}")
    }
    order = []
    while len(order) < len(TRAINING):
        free = [
            room
            for room in TRAINING
            if room not in order and all(o in order for r, o in edges if r == room)
        ]
        assert free, f"a circle among {sorted(set(TRAINING) - set(order))}: {sorted(edges)}"
        order += free


def add_foreign_config(cfg):
    """Keys as Mask2Former's own adder has them."""
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    cfg.INPUT.COLOR_AUG_SSD = False
    cfg.INPUT.SIZE_DIVISIBILITY = -1
    cfg.INPUT.IMAGE_SIZE = 1024
    cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE = 0.1, 2.0
    cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.0
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    cfg.MODEL.MASK_FORMER = CfgNode({"DEC_LAYERS": 10, "NORM": "GN"})
    cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS = 0


def add_all(cfg):
    add_pgn_config(cfg)
    add_training_config(cfg)


def flat(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def added_by(*adders):
    cfg = get_cfg()
    for adder in adders:
        adder(cfg)
    base = dict(flat(get_cfg()))
    return {key: value for key, value in flat(cfg) if base.get(key, adders) != value}


@pytest.mark.parametrize("ours", [add_pgn_config, add_training_config, add_all])
def test_our_keys_and_those_of_another_project_both_stay(ours):
    wanted = added_by(ours) | added_by(add_foreign_config)
    assert len(wanted) == len(added_by(ours)) + len(added_by(add_foreign_config))
    assert added_by(ours, add_foreign_config) == wanted == added_by(add_foreign_config, ours)
    assert added_by(ours, ours) == added_by(ours)


def test_a_value_that_is_there_already_stays():
    def somebody(cfg):
        cfg.MODEL.PGN = CfgNode({"NUM_GROUPS": 8})

    keys = added_by(somebody, add_pgn_config)
    assert keys == added_by(add_pgn_config) | {"MODEL.PGN.NUM_GROUPS": 8}


def test_a_config_without_our_keys_is_one_line():
    cfg = get_cfg()
    message = r"without MODEL.PGN.NUM_GROUPS, .* Call gn_practical.add_pgn_config\(cfg\)"
    with pytest.raises(ValueError, match=message):
        build_model(cfg)
    add_pgn_config(cfg)
    del cfg.MODEL.PGN["FUSED"]
    with pytest.raises(ValueError, match=r"without MODEL.PGN.FUSED\. Call"):
        build_model(cfg)
