"""docs/stability.md lists what is public, no more and no less."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")


def listed() -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for module, row in re.findall(r"^\| `(fastnas[\w.]*)` \| \w+ \| (.*) \|$", TEXT, re.MULTILINE):
        names.setdefault(module, []).extend(re.findall(r"`(\w+)`", row))
    return names


@pytest.mark.parametrize("module", listed())
def test_listed_names_are_the_public_ones(module: str) -> None:
    names, home = listed()[module], importlib.import_module(module)
    assert len(names) == len(set(names)) and all(getattr(home, name) is not None for name in names)
    if hasattr(home, "__all__"):
        assert set(names) == set(home.__all__) - {"__version__"}


def test_packages_that_name_public_things_are_listed() -> None:
    paths = (ROOT / "fastnas").rglob("*.py")
    with_all = {p.relative_to(ROOT).with_suffix("") for p in paths if "\n__all__ = " in p.read_text(encoding="utf-8")}
    modules = {".".join(path.parts).removesuffix(".__init__") for path in with_all}
    assert modules - {"fastnas.ops"} <= set(listed())


def test_listed_commands_are_those_that_run() -> None:
    commands = re.search(r"command lines: ((?:`\w+`,? ?)+)", TEXT)
    assert commands
    found = {
        p.stem for p in (ROOT / "fastnas").glob("*.py") if '__name__ == "__main__"' in p.read_text(encoding="utf-8")
    }
    found |= {p.parent.name for p in (ROOT / "fastnas").glob("*/__main__.py")}
    assert set(re.findall(r"`(\w+)`", commands[1])) == found
