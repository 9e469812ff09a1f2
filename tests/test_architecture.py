"""The structure holds: imports point one way only, and rooms stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fire_llm"
ORDER = [
    "errors", "compat", "stopping", "staging", "locks", "manifest", "orthogonal", "metrics", "layouts", "layout",
    "distributed", "resets", "models", "checkpoint", "corpora", "data", "evaluation", "diagnostics", "inspection",
    "flops", "trainer", "recipe", "units", "plan", "results", "run", "matrix", "comparison", "stream", "plots", "page",
    "report", "launch", "sweep", "cli", "__main__",
]  # fmt: skip
LONGEST = 350


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


def test_every_room_has_its_place_in_the_order():
    assert {room(p) for p in MODULES} == set(ORDER)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_upward_only(path):
    own = room(path)
    below = [other for other in imports(path) if ORDER.index(other) > ORDER.index(own)]
    assert not below, f"{own} imports {below}, which come after it"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_stay_small(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
