"""The structure holds: imports point one way only, and rooms stay small."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fire_llm"
PAGE = PACKAGE.parent / "docs" / "architecture.md"
LONGEST = 350


def rows() -> list[tuple[list[str], str]]:
    """Return the rows of the page's table of rooms: (names as they stand there, what the rooms hold)."""
    table = PAGE.read_text(encoding="utf-8").partition("| room |")[2].partition("\n\n")[0]
    cells = [line.split("|")[1:3] for line in table.splitlines()[2:]]
    return [(re.findall(r"`([^`]+)`", names), holds) for names, holds in cells]


LISTED = [name for names, _ in rows() for name in names]
ORDER = [*(name.rstrip("/") for name in LISTED), "__main__"]


def imports(path: Path) -> set[str]:
    """Return the rooms of the package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fire_llm"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("fire_llm.")}
    return found & set(ORDER)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if room(p) != "__init__")


def test_the_page_lists_every_room_once_and_no_other():
    assert len(set(ORDER)) == len(ORDER)
    assert {room(p) for p in MODULES} == set(ORDER)
    folders = {f"{p.parent.name}/" for p in PACKAGE.glob("*/__init__.py")}
    assert {name for name in LISTED if name.endswith("/")} == folders


def test_the_page_names_modules_that_are_there():
    for names, holds in rows():
        for name in re.findall(r"`([a-z_]+)`", holds) if names[0].endswith("/") else ():
            assert any((PACKAGE / n / f"{name}.py").exists() for n in names), f"{names[0]} has no module '{name}'"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_upward_only(path):
    own = room(path)
    below = [other for other in imports(path) if ORDER.index(other) > ORDER.index(own)]
    assert not below, f"{own} imports {below}, which come after it"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_stay_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
