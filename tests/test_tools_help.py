"""Every script answers ``--help`` and wrong options before it imports what takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.engine import default_argument_parser

from gn_practical.training.engine.arguments import argument_parser

ROOT = Path(__file__).parent.parent
SCRIPTS = [
    path
    for path in sorted([*ROOT.glob("tools/*.py"), *ROOT.glob("projects/*/*.py")])
    if "__main__" in path.read_text(encoding="utf-8")
]
SLOW = ("torch", "detectron2", "gn_practical", "matplotlib")

# As the command line does it, but for what has been imported in the end.
RUN = """
import runpy, sys
script, sys.argv = sys.argv[1], sys.argv[1:]
try:
    runpy.run_path(script, run_name="__main__")
finally:
    print("IMPORTED", *(name for name in sys.modules if "." not in name))
"""


def run(script, *words):
    command = [sys.executable, "-c", RUN, str(script), *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(script.parent)])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    printed, _, imported = done.stdout.rpartition("IMPORTED")
    return done.returncode, printed + done.stderr, imported.split()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_help_and_wrong_options_are_answered_at_once(script):
    for words, code in ((["--help"], 0), (["--no-such-option=1", "--steps=x"], 2)):
        returned, printed, imported = run(script, *words)
        assert returned == code, printed
        assert "usage: " in printed
        assert "argparse" in imported
        assert not set(SLOW) & set(imported)


def test_the_scripts_are_found():
    names = {str(path.relative_to(ROOT)) for path in SCRIPTS}
    assert {"tools/train_net.py", "projects/classification/train_net.py"} <= names


def look(action):
    return type(action), action.option_strings, action.nargs, action.const, action.default


def test_all_options_of_detectron2_are_accepted_and_mean_the_same():
    ours = {action.dest: action for action in argument_parser()._actions}
    theirs = {action.dest: action for action in default_argument_parser()._actions}
    assert len(theirs) > 8
    for dest, action in theirs.items():
        if dest != "opts":
            assert look(ours[dest]) == look(action)
        assert (ours[dest].nargs, ours[dest].type) == (action.nargs, action.type)
    words = ["--num-gpus", "2", "--resume", "SEED", "3", "--eval-only"]
    assert argument_parser().parse_args(words).opts == ["SEED", "3", "--eval-only"]
    assert default_argument_parser().parse_args(words).opts == ["SEED", "3", "--eval-only"]
