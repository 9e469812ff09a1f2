"""Edit JSON by chance, as a hand or a broken disk would: for tests that no file of others ends in a traceback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random
from typing import Any

VALUES: list[Any] = [
    None, True, 0, -1, 3.5, 1e308, 10**30, 2**63, "", "x", "1", "\x1b[2J", "\ud800", [], {}, [1], [None], {"a": 1},
    float("nan"), float("inf"),
]  # fmt: skip
NO_OBJECTS = [
    b"null",
    b"[]",
    b"3",
    b'"x"',
    b"",
    b"\xff\xfe",
    b"[" * 1000 + b"]" * 1000,
    b'{"a":' * 1000 + b"1" + b"}" * 1000,
]
"""Files that hold no JSON object, or one that nobody means."""


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(inner, (*at, key))


def _parent(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place[:-1]:
        value = value[key]
    return value


def edited(data: Any, random: Random) -> Any:
    """Return a copy of JSON data with one to four places deleted, doubled, renamed, swapped or set to another value."""
    data = json.loads(json.dumps(data))
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        places = [*_places(data)]
        if not places:
            break
        # Half of the edits are near the top, where there are few places.
        place = (
            random.choice(places) if random.random() < 0.5 else min(random.sample(places, min(4, len(places))), key=len)
        )
        at, how = _parent(data, place), random.randrange(6)
        if how == 0:
            del at[place[-1]]
        elif how == 1 and isinstance(at, list):
            at.insert(place[-1], at[place[-1]])
        elif how == 2 and isinstance(at, dict):
            at[random.choice(["zz", "", "a", "b", "\x1b[2J"])] = at.pop(place[-1])
        elif how == 3:
            at[place[-1]] = json.loads(json.dumps(_parent(data, other := random.choice(places))[other[-1]]))
        else:
            at[place[-1]] = random.choice(VALUES)
    return data


def damaged(content: bytes, random: Random) -> bytes:
    """Return a file's bytes cut, flipped in up to three places, or replaced by what is no JSON object."""
    how = random.randrange(3)
    if how == 0:
        return content[: random.randrange(len(content))]
    if how == 1:
        return random.choice(NO_OBJECTS)
    changed = bytearray(content)
    for _ in range(random.randint(1, 3)):
        changed[random.randrange(min(len(changed), 2000))] = random.randrange(256)
    return bytes(changed)
