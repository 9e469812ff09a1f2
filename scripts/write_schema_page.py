"""Write the tables of docs/results-schema.md from the models in fire_llm/reporting/schema.py (`make schema`).

A table stands between `<!-- table: Run -->` and `<!-- end -->`; what stands around it is written by hand.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from fire_llm.reporting.schema import EVALUATION_PARTS, PARTS, Record

PAGE = Path(__file__).parent.parent / "docs" / "results-schema.md"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
MODELS = {model.__name__: model for model in (*PARTS, *EVALUATION_PARTS)}


def kind(schema: dict[str, Any]) -> str:
    """Return the type of a field in words: `list of Run`, `number or null`."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(kind(option) for option in schema["anyOf"]))
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {kind(schema['items'])}"
    if schema.get("type") == "object":
        inner = schema.get("additionalProperties")
        return f"mapping to {kind(inner)}" if isinstance(inner, dict) and inner else "mapping"
    names = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false", "null": "null"}
    return names.get(schema.get("type", ""), "any value")


def table(model: type[Record]) -> str:
    """Return the table of a model's fields as they are written: name, type, meaning."""
    lines = ["| field | type | meaning |", "|---|---|---|"]
    properties = model.model_json_schema(mode="serialization", ref_template="{model}")["properties"]
    for name, field in model.model_fields.items():
        if not field.exclude:
            typed = kind(properties[name]).replace("JsonValue", "any value")
            lines.append(f"| `{name}` | {typed} | {(field.description or '').replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """Return the page with every table as the models have it."""
    return TABLE.sub(lambda found: found[1] + table(MODELS[found[2]]) + found[3], text)


if __name__ == "__main__":
    old = PAGE.read_text(encoding="utf-8")
    missing = set(MODELS) - {name for _, name, _ in TABLE.findall(old)}
    if missing:
        sys.exit(f"{PAGE}: no '<!-- table: NAME -->' for {', '.join(sorted(missing))}; add a heading and the two marks")
    PAGE.write_text(page(old), encoding="utf-8")
