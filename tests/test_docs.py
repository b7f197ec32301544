"""What README and docs show works as it stands: Python runs, commands name what exists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "projects").glob("*/README.md")),
]
CONFIGS = [p for p in (ROOT / "configs").glob("**/*.yaml") if p.parent.name != "base"]


def blocks(page, language):
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def script_of(page):
    """All Python of a page in turn, what has prompts with its answers."""
    return "\n".join(
        f"import doctest; doctest.run_docstring_examples({code!r}, globals())"
        if ">>>" in code
        else code
        for code in blocks(page, "python")
    )


@pytest.mark.parametrize(
    "page", [p for p in PAGES if script_of(p)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_python_of_a_page_runs(page, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script_of(page)],
        **{"cwd": tmp_path, "env": environment, "capture_output": True, "text": True},
    )
    assert done.returncode == 0, done.stderr
    assert "Failed example" not in done.stdout, done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_what_exists(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.])(?:configs|tools|docs|tests|projects)/[\w/]+\.\w+", text))
    named |= set(re.findall(r"(?<![\w/.])gn_practical/[\w/]+\.py", text))
    folders = (ROOT, page.parent)
    assert [n for n in sorted(named) if not any((f / n).exists() for f in folders)] == []
    links = [link.split("#")[0] for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)]
    assert [link for link in links if link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for code in blocks(page, "sh"):
        for command in code.replace("\\\n", " ").splitlines():
            words = command.split("#")[0].split()
            if words[:1] == ["make"]:
                assert words[1] in targets, command
            for script in [word for word in words if re.fullmatch(r"[\w/.]+\.(py|sh)", word)]:
                assert any((f / script).is_file() for f in (ROOT, page.parent)), command


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_listed(config):
    name = str(config.relative_to(ROOT / "configs"))
    assert f"`{name}`" in (ROOT / "docs/configs.md").read_text(encoding="utf-8")


def test_every_key_is_listed():
    from detectron2.config import get_cfg

    from gn_practical import add_pgn_config
    from gn_practical.training.config import add_training_config

    def keys(node, prefix=""):
        for key, value in node.items():
            yield from keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]

    cfg = get_cfg()
    add_pgn_config(cfg)
    add_training_config(cfg)
    own = set(keys(cfg)) - set(keys(get_cfg()))
    page = (ROOT / "docs/configs.md").read_text(encoding="utf-8")
    assert len(own) > 15
    assert [key for key in sorted(own) if f"`{key}`" not in page] == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130
