"""The wheel holds the package alone, the sdist the whole repository."""

import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PACKAGE = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "gn_practical").rglob("*")
    if path.is_file() and path.suffix != ".pyc"
}


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_wheel_holds_the_package_alone(dist):
    (wheel,) = dist.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert "gn_practical/py.typed" in names
    assert names == PACKAGE


def test_the_sdist_holds_the_repository(dist):
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()}
    folders = (
        ".ci",
        ".github",
        "configs",
        "tools",
        "projects",
        "tests",
        "docs",
        "benchmarks",
        "requirements",
    )
    files = {
        path.relative_to(ROOT).as_posix()
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    # What a user or a test leaves in the working copy is not in question here.
    assert {f for f in files if f.endswith((".py", ".yaml", ".yml", ".md", ".sh", ".txt"))} <= names
    assert PACKAGE | {"Makefile", "README.md", "LICENSE", "pyproject.toml", "setup.py"} <= names
    assert not {name for name in names if name.endswith(".pyc")}


@pytest.fixture(scope="module")
def needed(dist):
    """Names of the packages that each extra needs; "" is the plain install."""
    (wheel,) = dist.glob("*.whl")
    names = {}
    for requirement in map(Requirement, next(distributions(path=[str(wheel)])).requires):
        extra = re.search(r'extra == "(\w+)"', str(requirement.marker))
        names.setdefault(extra[1] if extra else "", set()).add(requirement.name)
    return names


def test_all_is_every_extra_and_the_norm_needs_little(needed):
    parts = [names for extra, names in needed.items() if extra not in ("", "all")]
    assert needed["all"] == set().union(*parts)
    assert needed[""] == {"torch", "torchvision", "numpy", "matplotlib", "tabulate", "tqdm"}


def test_constraints_pin_what_the_project_asks_for(needed):
    lines = (ROOT / "requirements/constraints.txt").read_text().splitlines()
    pinned = {Requirement(line).name.lower() for line in lines if not line.startswith("#")}
    assert {name.lower() for names in needed.values() for name in names} <= pinned


def test_the_workflow_runs_the_oldest_torch_that_is_promised():
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    (oldest,) = workflow["jobs"]["test"]["strategy"]["matrix"]["include"]
    setup = (ROOT / "setup.py").read_text()
    constraints = (ROOT / "requirements/constraints.txt").read_text()
    for name in ("torch", "torchvision"):
        assert f'"{name}>={oldest[name].removesuffix(".0")}"' in setup
        assert re.search(rf"^{name}==", constraints, re.MULTILINE)  # the line that the job replaces
