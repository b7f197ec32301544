"""The README names files that exist, and lists every config."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_named_files_exist():
    named = re.findall(
        r"(?<![\w/])(?:configs|tools|docs|gn_practical|projects)/[\w/]+\.\w+", README
    )
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_every_config_is_listed():
    configs = [p for p in (ROOT / "configs").glob("**/*.yaml") if p.parent.name != "base"]
    names = [str(path.relative_to(ROOT / "configs")) for path in configs]
    assert [name for name in names if f"`{name}`" not in README] == []
