"""The structure holds: packages import one way only, files import in no circle, and the page lists what is there."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fire_llm"
PAGE = PACKAGE.parent / "docs" / "architecture.md"
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
MODULES = [name for name in FILES if name != "fire_llm"]


def rows() -> list[tuple[list[str], str]]:
    """Return the rows of the page's table of packages: (names as they stand there, what the packages hold)."""
    table = PAGE.read_text(encoding="utf-8").partition("| package |")[2].partition("\n\n")[0]
    cells = [line.split("|")[1:3] for line in table.splitlines()[2:]]
    return [(re.findall(r"`([^`]+)`", names), holds) for names, holds in cells]


LISTED = [name for names, _ in rows() for name in names]
ORDER = [*(name.strip("/").removesuffix(".py") for name in LISTED), "__main__"]


def imports(name: str, path: Path) -> set[str]:
    """Return the files of the package, as modules, that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fire_llm"):
            assert node.level == 0, f"{name} imports relatively"
            module = node.module or ""
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found.add(inner if inner in FILES else module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("fire_llm")}
    return (found & set(FILES)) - {"fire_llm", name}


def package(name: str) -> str:
    return name.split(".")[1]


def test_the_page_lists_every_package_once_and_no_other():
    assert len(set(ORDER)) == len(ORDER)
    assert {package(name) for name in MODULES} == set(ORDER)
    assert {name for name in LISTED if name.endswith("/")} == {
        f"{p.parent.name}/" for p in PACKAGE.glob("*/__init__.py")
    }


def test_the_page_names_files_that_are_there():
    for names, holds in rows():
        for name in re.findall(r"`([a-z_]+)`", holds) if names[0].endswith("/") else ():
            inside = PACKAGE / names[0] / name
            assert inside.with_suffix(".py").exists() or inside.is_dir(), f"{names[0]} has no file or folder '{name}'"


@pytest.mark.parametrize("name", MODULES)
def test_packages_import_only_what_stands_before_them(name):
    own = ORDER.index(package(name))
    later = sorted(other for other in imports(name, FILES[name]) if ORDER.index(package(other)) > own)
    assert not later, f"{name} imports {later}, which stand after it in docs/architecture.md"


def test_files_import_in_no_circle():
    graph = {name: imports(name, path) for name, path in FILES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle
