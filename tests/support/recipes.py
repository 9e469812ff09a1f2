"""A recipe without a fault, how to put one in, and what editors would say of it."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jsonschema

from fire_llm.experiment.recipe import recipe_schema

GOOD: dict = {
    "model": {"preset": "gpt-tiny", "context": 64},
    "tokenizer": {"train": 512},
    "batch": {"tokens_per_step": 1024},
    "phases": [
        {"name": "one", "data": {"python-docs": 1.0}, "steps": 10, "keep": ["best", 5]},
        {
            "name": "two",
            "data": {"library-docs": 0.8, "python-docs": 0.2},
            "steps": 10,
            "arms": {"base": {"method": "keep"}, "fire": {"method": "fire", "iterations": 5}},
        },
    ],
}


@cache
def validator() -> Any:
    """Return what validates recipes by their schema, which takes half a second to check."""
    schema = recipe_schema()
    kind = jsonschema.validators.validator_for(schema)
    kind.check_schema(schema)
    return kind(schema)


def changed(path: str, value) -> dict:
    """Return GOOD with one key changed; a value of ... deletes it."""
    data = json.loads(json.dumps(GOOD))
    at = data
    *parents, last = [int(p) if p.isdigit() else p for p in path.split("/")]
    for part in parents:
        at = at[part] if isinstance(at, list) else at.setdefault(part, {})
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return data
