"""Write docs/layouts.md: the models of the installed transformers, and how they store what a reset acts on.

    python scripts/list_layouts.py

Each causal LM is built small, from the configurations that the tests use, and its matrices are listed by block and
child; classes of other tasks are built on the meta device, from their default configurations.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from support.small_models import CANNOT, SMALL, build  # noqa: E402
from support.small_others import classes_of_tasks, on_meta  # noqa: E402

from fire_llm.architectures.families import TYPES  # noqa: E402
from fire_llm.architectures.lookup import Lookup  # noqa: E402
from fire_llm.architectures.matrices import logical_matrices  # noqa: E402
from fire_llm.core.errors import UserError  # noqa: E402

HEAD = """\
# Layouts

This page lists the matrices of each causal language model of transformers {version}, and how they lie in its
parameters: all {count} types of `MODEL_FOR_CAUSAL_LM_MAPPING`.
`python scripts/list_layouts.py` writes it from the tables in `fire_llm/architectures/families/`. The glossary explains
what a [layout](glossary.md#layout) is, and [adding](adding.md#a-layout) how to add one. An older transformers lacks the
newest of these types, and they are left out there. So is `aria_text` below 5.18, whose experts are stored otherwise.
`fire_llm.architectures.matrices.supported_types()` returns the types of the installed version.

For every type, `fire-llm apply` on a saved checkpoint equals `fire_` on the model in memory, bit for bit
(`tests/checkpoint/test_types.py`). Every rule for a fused parameter is proved by the model's own forward pass, without
using the rule (`tests/architectures/test_layout_proofs.py`).

- **plain**: every attention and MLP matrix is a parameter of its own, (out, in).
- `Block.child → a, b`: one parameter holds several matrices, in this order. `4 × (a, b)`: the pattern repeats, a head
  or a group at a time (numbers are those of the small test models).
- `stack 4`: that many matrices along the first axis, mostly experts. `(in, out)`: stored the other way round.
- *ssm*: projections of state spaces and linear attention, left alone unless you give `--role ssm`.

| type | class | support | what is not plain | *ssm* |
|---|---|---|---|---|
"""

BEYOND = """
## Beyond causal language models

All classes of four more tasks of transformers: image classification, sequence classification, masked language models
and encoder-decoders (`MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING`); and CLIP's towers, T5's encoder and Whisper. {known} of
{count} have layouts. Token classifiers, question answerers and bare trunks (`ViTModel`) of the same families have them
too. `apply` and `inspect` take the class that `config.json` names in `architectures`. Numbers are those of the default
configurations.

- *conv*: convolutions, one (out, in) matrix at each position of the kernel, left alone unless you give `--role conv`.
  A ResNet has no other matrix, and asks for it.
- Patch embeddings, class tokens and tables of positions have the role `embedding`. Heads of classifiers, with the
  square layer before them, have the role `lm_head`, like those of language models. Poolers and projections between
  widths (`PatchMerging.reduction`, `visual_projection`) have the role `other`.

| class | what is not plain | *conv* |
|---|---|---|
"""
REFUSED = """
These are refused, with the first weight without a layout. `fire_(model, layout="modules")` takes them in memory.

"""


def describe(cuts: list[Any]) -> str:
    """Say how one parameter is cut: its stack, its repeats, its parts, its orientation."""
    first = cuts[0]
    parts = list(dict.fromkeys(c.name for c in cuts))
    text = ", ".join(parts)
    if first.groups > 1:
        text = f"{first.groups} × ({text})" if text else f"{first.groups} groups"
    stack = f"stack {first.stack}" if first.stack is not None else ""
    turned = "(in, out)" if first.in_first else ""
    return " ".join(filter(None, (stack, text, turned)))


def cut_weights(model: Any, roles: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """Yield (block and child, role, how it is cut) of every parameter with these roles; the last is empty if plain."""
    lookup = Lookup(model)
    by_parameter: dict[str, list[Any]] = defaultdict(list)
    for matrix in logical_matrices(model, roles):
        by_parameter[matrix.parameter].append(matrix)
    for parameter, cuts in by_parameter.items():
        key = f"{cuts[0].block}.{lookup.location(parameter).child}"
        yield key, cuts[0].role, "" if cuts[0].role == "conv" else describe([cut.spec for cut in cuts])


def row(name: str) -> str:
    """Return the table's row of one type: all its variants together."""
    others: dict[str, str] = {}
    ssm: dict[str, str] = {}
    for variant in (n for n in SMALL if n.partition("+")[0] == name):
        for key, role, text in cut_weights(build(variant), ("attention", "mlp", "ssm")):
            if text:
                (ssm if role == "ssm" else others).setdefault(key, f"`{key}` → {text}")
            elif role == "ssm":
                ssm.setdefault(key, f"`{key}`")
    kind = type(build(name)).__name__
    return f"| {name} | {kind} | yes | {_join(others) or 'plain'} | {_join(ssm)} |"


def other_row(name: str) -> str:
    """Return the table's row of a class beyond causal LMs.

    Raises:
        UserError: A weight has no layout.
    """
    others: dict[str, str] = {}
    convolutions: dict[str, str] = {}
    for key, role, text in cut_weights(on_meta(name), ("attention", "mlp", "ssm", "conv")):
        if role == "conv":
            convolutions[key] = f"`{key}`"
        elif text:
            others.setdefault(key, f"`{key}` → {text}")
    return f"| {name} | {_join(others) or 'plain'} | {_join(convolutions)} |"


def others() -> str:
    """Return the section on all that are no causal LMs."""
    rows, refused = [], []
    names = classes_of_tasks()
    for name in names:
        try:
            rows.append(other_row(name))
        except UserError as error:
            refused.append(f"- {name}: {str(error).partition(': ')[2].partition(' (')[0].partition(': is it')[0]}")
        except Exception as error:  # a library that is not here, a default config that builds nothing
            refused.append(f"- {name}: not built here, {type(error).__name__}")
    head = BEYOND.format(known=len(rows), count=len(names))
    return head + "\n".join(sorted(rows)) + "\n" + REFUSED + "\n".join(sorted(refused)) + "\n"


def _join(cell: dict[str, str]) -> str:
    return "<br>".join(sorted(cell.values()))


def main() -> None:
    transformers.logging.set_verbosity_error()
    rows = [row(name) for name in TYPES if name in SMALL]  # an older transformers lacks some
    rows += [f"| {name} | | yes, not built by the tests: {reason} | | |" for name, reason in CANNOT.items()]
    head = HEAD.format(version=transformers.__version__, count=len(TYPES))
    (ROOT / "docs" / "layouts.md").write_text(head + "\n".join(sorted(rows)) + "\n" + others(), encoding="utf-8")


if __name__ == "__main__":
    main()
