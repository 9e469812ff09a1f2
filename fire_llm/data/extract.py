"""Extract prose or source from Python files; also runs as a worker: `python extract.py KIND < paths > json`.

Only the standard library is imported here: the workers run this file by its path, isolated from the caller's
environment, so that they start in milliseconds and need no `if __name__ == "__main__"` in a user's script.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import tokenize
import warnings
from collections.abc import Iterator

EXTRACTION_VERSION = 1
"""Raised whenever the extracted text would change, so that cached tokens are made again."""

_LEGAL = re.compile(r"copyright|licen[sc]e|all rights reserved|permission is hereby|permission to use", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z]{2,}")
_MIN_COMMENT_WORDS = 8


def extract_blocks(path: str, kind: str) -> list[str]:
    """Return the blocks of text of one Python file, in the order in which they stand in it.

    Args:
        path: a Python source file in any declared encoding.
        kind: "docstrings", "docstrings+comments" or "source" (one block: the file less its licence header).

    Returns:
        The blocks; none for a file that cannot be decoded or parsed, since every installation carries a few
        (templates, files for another Python) and one of them must not cost the corpus.
    """
    try:
        with tokenize.open(path) as file:
            source = file.read()
        source.encode()
        if kind == "source":
            return [_without_legal_header(source)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
        docstrings = list(_docstrings(tree))
        blocks = [(first, text) for first, _, text in docstrings if text]
        if kind == "docstrings+comments":
            blocks += _comments(source.split("\n"), tree, docstrings)
        return [text for _, text in sorted(blocks)]
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, int, str]]:
    """Yield (first line, last line, cleaned docstring without legal paragraphs) of module, classes and functions.

    Only statements are visited: expressions are most of a tree and have no docstrings.
    """
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        for field in ("body", "orelse", "handlers", "finalbody", "cases"):
            inner = getattr(node, field, None)
            if isinstance(inner, list):
                nodes.extend(inner)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                kept = [part for part in re.split(r"\n\s*\n", text) if not _LEGAL.search(part)]
                text = "\n\n".join(kept).strip()
                text.encode()  # an escape such as "\ud800" makes text that no tokenizer takes
                yield node.body[0].lineno, node.body[0].end_lineno or node.body[0].lineno, text


def _comments(lines: list[str], tree: ast.Module, docstrings: list[tuple[int, int, str]]) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of the blocks of whole-line comments that read as prose.

    A block is a run of adjacent lines with nothing but a comment. Lines inside multi-line strings do not count.
    """
    inside: set[int] = set()
    for first, last, _ in docstrings:
        inside.update(range(first, last + 1))
    # Expressions are walked only if there is a triple quote outside docstrings: a walk costs as much as parsing.
    if any(('"""' in line or "'''" in line) and number not in inside for number, line in enumerate(lines, start=1)):
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant | ast.JoinedStr) and node.end_lineno and node.end_lineno > node.lineno:
                inside.update(range(node.lineno, node.end_lineno + 1))
    block: list[str] = []
    # The "" at the end closes a block that reaches the end of the file.
    for number, line in enumerate([*lines, ""], start=1):
        stripped = line.strip()
        if stripped.startswith("#") and number not in inside:
            block.append(stripped.lstrip("#").removeprefix(" ").rstrip())
        elif block:
            text = "\n".join(block).strip()
            if len(_WORD.findall(text)) >= _MIN_COMMENT_WORDS and not _LEGAL.search(text):
                yield number - len(block), text
            block = []


def _without_legal_header(source: str) -> str:
    """Return the source without the comments at its top if these mention copyright or a licence."""
    lines = source.split("\n")
    end = 0
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith("#")):
        end += 1
    header = "\n".join(lines[:end])
    return "\n".join(lines[end:]) if _LEGAL.search(header) else source


def main() -> None:
    """Read paths (one a line) from standard input and write their blocks, a JSON list of lists, to standard output."""
    paths = sys.stdin.buffer.read().decode("utf-8", "surrogateescape").split("\n")
    json.dump([extract_blocks(path, sys.argv[1]) for path in paths], sys.stdout)


if __name__ == "__main__":
    main()
