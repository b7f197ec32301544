"""What one sees of a run: a short first screen, one last line, and all the rest in log.txt."""

import ast
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tool_train_net import run

from gn_practical.training.architectures import ARCHITECTURES, architecture
from gn_practical.training.engine import check_run, load_cfg

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "configs/quickstart/tiny.yaml")
SMALL = [
    *("MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0", "DATASETS.TEST", "()"),
    *("DATASETS.TRAIN", "('scenes_val_panoptic_separated',)"),
]
SCRIPTS = [
    *sorted(ROOT.glob("tools/*.py")),
    *(ROOT / "projects/classification/train_net.py", *ROOT.glob("projects/*/reproduce_*.py")),
]


def command_line(*words):
    command = [sys.executable, ROOT / "tools/train_net.py", "--config-file", TINY, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_the_first_screen_is_short_and_the_log_has_all(tmp_path):
    done = command_line(*SMALL, "SOLVER.MAX_ITER", 2, "OUTPUT_DIR", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    printed = done.stderr + done.stdout
    assert "\x1b" not in printed
    first = printed.partition("Starting training")[0].splitlines()
    assert len(first) <= 40
    text = "\n".join(first)
    for what in ("scenes_val", "100 images", "PanopticFPN", "70 PGN layers", "iterations of 2"):
        assert what in text
    assert str(tmp_path) in text
    long = [line for line in printed.splitlines() if len(line) > 100 and str(tmp_path) not in line]
    assert not long
    assert " ".join(printed.split()).endswith(f"curves are in {tmp_path}.")
    log = (tmp_path / "log.txt").read_text()
    assert "\x1b" not in log
    for what in ("PyTorch", "IMS_PER_BATCH: 2", "G_ideal", "does no harm here"):
        assert what in log


def test_an_evaluation_says_where_its_results_are_and_nothing_of_checkpoints(tmp_path, capfd):
    test = ["DATASETS.TEST", "('scenes_val_panoptic_separated',)", "TEST.NUM_PICTURES", 0]
    run("--config-file", TINY, "--eval-only", *SMALL, *test, "OUTPUT_DIR", tmp_path)
    printed = capfd.readouterr().out
    assert f"Results ({tmp_path}/results.json)" in printed.replace("\n    ", " ")
    assert "checkpoints" not in printed


def test_the_error_of_a_rank_is_the_last_line(tmp_path):
    weights = tmp_path / "broken.pth"
    weights.write_text("no weights")
    ranks = ["--num-gpus", 2, "--dist-url", "auto", *SMALL]
    done = command_line(*ranks, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", tmp_path / "out")
    assert done.returncode == 1
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("error: a checkpoint must be a whole file")
    assert "Terminating process" not in done.stderr
    assert "Traceback" not in done.stderr
    assert "No GPU: 2 processes on the CPU" in done.stdout


def test_an_output_dir_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit, match=r"error: OUTPUT_DIR must be a folder .*file'.*Choose"):
        run("--config-file", TINY, *SMALL, "OUTPUT_DIR", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.MAX_ITER", "30"], "warmed up in SOLVER.WARMUP_ITERS=100 of SOLVER.MAX_ITER=30"),
        (
            ["SOLVER.STEPS", "(900,)", "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"],
            r"No step of SOLVER.STEPS=(900,) lies within SOLVER.MAX_ITER=800 iterations",
        ),
        ([], ""),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_warned_of(tmp_path, caplog, overrides, message):
    with caplog.at_level(logging.WARNING):
        check_run(load_cfg(TINY, [*SMALL, "OUTPUT_DIR", str(tmp_path), *overrides]))
    assert message in caplog.text if message else not caplog.text


def test_what_detectron2_accepts_is_not_refused(tmp_path):
    accepted = ["MODEL.MASK_ON", "False", "MODEL.PANOPTIC_FPN.COMBINE.ENABLED", "False"]
    accepted += ["DATALOADER.SAMPLER_TRAIN", "WeightedTrainingSampler", "SOLVER.MAX_ITER", "0"]
    check_run(load_cfg(TINY, [*SMALL, "OUTPUT_DIR", str(tmp_path), *accepted]))


def test_every_architecture_that_has_keys_has_these_keys():
    cfg = load_cfg(TINY)
    for name, known in ARCHITECTURES.items():
        for key in filter(None, (known.things, known.stuff)):
            node = cfg
            for part in key.split("."):
                node = node[part]
            assert isinstance(node, int), name
    assert architecture("unheard of").predicts == {"instances", "sem_seg", "panoptic"}


BEFORE_TORCH = """
import os, runpy, sys

class Seen:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise SystemExit(os.environ.get("GOMP_SPINCOUNT"))

sys.meta_path.insert(0, Seen())
try:
    runpy.run_path(sys.argv[1], run_name="imported")
finally:
    print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_entry_point_sets_the_threads_waiting_before_torch_is_loaded(script):
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(script.parent)])
    done = subprocess.run(
        [sys.executable, "-c", BEFORE_TORCH, str(script)],
        env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout.split() == ["50000"], done.stderr[-1000:]


def test_train_net_reads_from_top_to_bottom():
    """As Detectron2's own: set-up, main, launch; no function that is given to another."""
    tree = ast.parse((ROOT / "tools/train_net.py").read_text())
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert functions == ["setup", "main"]
    assert not re.search("partial|lambda", ast.unparse(tree))
