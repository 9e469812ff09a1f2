"""Write the tables of docs/trainer.md from fire_llm/training/contract.py (`make schema`).

A table stands between `<!-- table: options -->` and `<!-- end -->`; what stands around it is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from transformers import TrainingArguments

from fire_llm.training.arguments import OWN
from fire_llm.training.contract import METHODS, OPTIONS, OWN_OPTIONS, PARAMETERS, Rule

PAGE = Path(__file__).parent.parent / "docs" / "trainer.md"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(rules: Mapping[str, Rule], head: str) -> str:
    """Return the rows that differ or are refused, and a line with the names of all others."""
    same = ", ".join(f"`{name}`" for name, rule in rules.items() if rule.status == "same")
    rows = [f"| `{name}` | {rule.status} | {rule.text} |" for name, rule in rules.items() if rule.status != "same"]
    return "\n".join([f"| {head} | here | how, or why |", "|---|---|---|", *rows, f"| {same} | same | |"]) + "\n"


def own_options() -> str:
    """Return the options that `TrainingArguments` does not have, with what they do not go with."""
    lines = ["| option | meaning |", "|---|---|"]
    for own in OWN:
        rule = OWN_OPTIONS.get(own.name)
        lines.append(f"| `{own.name}` | {own.metadata['help']}{f' Refused: {rule.text}.' if rule else ''} |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """Return the page with every table as the code has it."""
    order = [field.name for field in fields(TrainingArguments)]
    options = {name: OPTIONS[name] for name in sorted(OPTIONS, key=lambda n: order.index(n) if n in order else -1)}
    tables = {
        "options": table(options, "option"),
        "parameters": table(PARAMETERS, "parameter"),
        "methods": table(dict(sorted(METHODS.items())), "method"),
        "own": own_options(),
    }
    return TABLE.sub(lambda found: found[1] + tables[found[2]] + found[3], text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
