"""Run the tutorials of docs/tutorials/ and store what they print (`make notebooks`).

    python scripts/write_notebooks.py [--check] [FILE ...]

The cells of a notebook run one after another in a namespace of its own, without Jupyter: they are plain Python, and the
last line's value is not shown. With --check nothing is written, and the exit code is 1 where a cell prints something
other than what is stored; numbers may differ, for processors round differently.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "tutorials"
NUMBER = re.compile(r"[+-]?\d[\d.,]*")


def run(notebook: dict[str, Any], name: str) -> list[str]:
    """Run a notebook's cells in turn, and return what each of code printed."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile("".join(cell["source"]), f"{name}, cell {cell['id']}", "exec"), scope)
            printed.append(out.getvalue())
    return printed


def stored(notebook: dict[str, Any]) -> list[str]:
    """Return what is stored as printed by each cell of code."""
    code = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    return ["".join("".join(output["text"]) for output in cell["outputs"]) for cell in code]


def alike(found: str, expected: str) -> bool:
    """Return whether two outputs are the same but for their numbers."""
    return NUMBER.sub("0", found) == NUMBER.sub("0", expected)


def store(notebook: dict[str, Any], printed: list[str]) -> None:
    """Put what was printed into the notebook."""
    code = (cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    for cell, text in zip(code, printed, strict=True):
        lines = text.splitlines(keepends=True)
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if text else []


def main() -> int:
    """Run the notebooks, and write or compare what they print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="notebooks; default: all tutorials")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    args = parser.parse_args()
    differ = 0
    for path in args.files or sorted(FOLDER.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        printed = run(notebook, path.name)
        if args.check:
            wrong = [i for i, (a, b) in enumerate(zip(printed, stored(notebook), strict=True)) if not alike(a, b)]
            differ += len(wrong)
            print(f"{path.name}: {'as stored' if not wrong else f'cells of code {wrong} print something else'}")
        else:
            store(notebook, printed)
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            print(f"{path.name}: written")
    return int(differ > 0)


if __name__ == "__main__":
    sys.exit(main())
