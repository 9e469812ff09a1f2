"""Refuse values that no recipe may hold, before any other code reads them.

A recipe is data: text, numbers, yes and no, lists and mappings, of a size that people write. Values that pass can be
printed, stored as JSON and used as paths without surprises.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import yaml

from fire_llm.core.errors import SECRET

MOST_BYTES = 300_000
"""The largest file of a recipe."""
MOST_VALUES = 20_000
"""The most values of a recipe. Values behind YAML's aliases count every time: a few lines can expand to billions."""
DEEPEST = 16
"""The most lists and mappings around a value."""
LARGEST = 2**63 - 1
"""The largest whole number that torch and Arrow count with."""
LONGEST_TEXT = 10_000
LONGEST_NAME = 255
"""The most bytes of one part of a path; file systems take no more."""

# Control characters steer terminals. Halves of surrogate pairs cannot be written. Overrides of the direction of writing
# show another text than there is.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


class Loader(yaml.SafeLoader):
    """Read YAML's plain data: no tags, no merge keys, dates as the text that they are, and every key once."""

    depth = 0
    yaml_implicit_resolvers = {  # noqa: RUF012  # as yaml declares it
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Return a node; PyYAML's hook."""
        event = cast(Any, self).peek_event()
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the tag '{tag}' is not for recipes, which are plain data: leave it out", event.start_mark
            )
        self.depth += 1
        if self.depth > 4 * DEEPEST:  # PyYAML takes time that grows with the square of it, and then the stack
            problem = "it is nested too deeply"
            raise yaml.constructor.ConstructorError(None, None, problem, event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping; PyYAML's hook."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                problem = "'<<' is not for recipes: write the keys out"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' stands twice", key_node.start_mark)
            seen.add(key if isinstance(key, str | int | float) else None)
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """Read one document of YAML.

    Raises:
        ValueError: With the reason, and the line where there is one.
    """
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        reason = _UNPRINTABLE.sub("?", problem or str(error).strip().partition("\n")[0])
        raise ValueError(f"line {mark.line + 1}: {reason}" if mark else reason) from error
    except (OverflowError, ValueError) as error:
        raise ValueError(f"a number in it cannot be read: {error}") from error


def plain_faults(data: Any) -> list[str]:
    """Return all values that are not plain, each as `path: what is wrong, what is allowed`; or that there are too many.

    Args:
        data: The values from YAML or from a caller.
    """
    try:
        return list(_faults_in(data, "", 0, itertools.count(1)))
    except _TooMuch:
        return [
            f"recipe: it holds more than {MOST_VALUES:,} values, those behind aliases counted every time; shorten it"
        ]


def unshared(data: Any) -> Any:
    """Copy plain data so that no two places share a list or a mapping, as YAML's aliases make them do."""
    if isinstance(data, Mapping):
        return {key: unshared(value) for key, value in data.items()}
    return [unshared(value) for value in data] if isinstance(data, list) else data


def printable(text: str) -> str:
    """Return the start of a text on one line, with `?` for what cannot be printed, for a message that quotes it."""
    return _short(_UNPRINTABLE.sub("?", " ".join(text.split())), quoted=False)


class _TooMuch(Exception):
    """There are more than `MOST_VALUES` values."""


def _faults_in(value: Any, path: str, depth: int, count: Iterator[int]) -> Iterator[str]:
    """Yield the faults of a value and of all values in it; `count` numbers them."""
    if next(count) > MOST_VALUES:
        raise _TooMuch
    here = path or "recipe"
    if isinstance(value, Mapping | list):
        if depth > DEEPEST:
            yield f"{here}: it is nested more than {DEEPEST} deep (or holds itself); no key of a recipe goes so deep"
        elif isinstance(value, list):
            for i, item in enumerate(value):
                yield from _faults_in(item, f"{path}[{i}]", depth + 1, count)
        else:
            for key, item in value.items():
                if not isinstance(key, str):
                    yield f"{here}: the key {_short(key)} is not text; put it in quotes"
                elif fault := _text_fault(key, here):
                    yield f"{here}: a key {fault}"
                elif re.search(r"[\t\n\r]", key):
                    yield f"{here}: a key holds a line break or a tab; names are of one line"
                else:
                    yield from _faults_in(item, f"{path}.{key}" if path else key, depth + 1, count)
    elif isinstance(value, str):
        if fault := _text_fault(value, here):
            yield f"{here}: the text {fault}"
    elif isinstance(value, int):
        if abs(value) > LARGEST:
            yield f"{here}: a whole number beyond ±{LARGEST} is not allowed"
    elif isinstance(value, float):
        if not math.isfinite(value):
            yield f"{here}: {value} is not allowed; give a finite number"
    elif value is not None:
        yield f"{here}: a {type(value).__name__} is no value of a recipe; give text, a number, a list or a mapping"


def _text_fault(text: str, path: str) -> str | None:
    """Return what is wrong with a text; the message does not quote it, as it may hold a secret or steer a terminal."""
    if len(text) > LONGEST_TEXT:
        return f"has {len(text)} characters; {LONGEST_TEXT} are allowed"
    if match := _UNPRINTABLE.search(text):
        return f"holds the character U+{ord(match.group()):04X}, which cannot be printed; remove it"
    if SECRET.search(text):
        return (
            "holds a password or a token, and recipes are stored with their results: remove it, and set HF_TOKEN in "
            "the environment or log in with `hf auth login`"
        )
    if path != "description" and ".arms." not in path:
        longest = max(len(part.encode()) for part in text.split("/"))
        if longest > LONGEST_NAME or len(text) > 1024:
            return f"is too long for a path: {LONGEST_NAME} bytes between two '/' and 1024 characters are allowed"
    return None


def _short(value: Any, quoted: bool = True) -> str:
    text = repr(value) if quoted else value
    return text if len(text) <= 60 else text[:59] + "…"
