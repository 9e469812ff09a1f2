"""Read a recipe: YAML, overrides, and every fault at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fire_llm.errors import UserError, did_you_mean
from fire_llm.recipe.faults import arm_faults, contradictions, explain, path_of
from fire_llm.recipe.sections import Recipe


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe from a YAML file, the name of a built-in one, or plain data.

    Args:
        source: Path, built-in name ("demo") or mapping.
        overrides: `KEY=VALUE` with a dotted key (`phases.1.steps=100`); the value is read as YAML.

    Raises:
        UserError: With every fault found, one a line: `path: what is wrong, what is allowed`.
    """
    data = deepcopy(dict(source)) if isinstance(source, Mapping) else _read(source)
    for override in overrides:
        _set(data, override)
    faults: list[str] = []
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        faults += [f"{path_of(e['loc'])}: {explain(e)}" for e in error.errors()]
    faults += arm_faults(data)
    if recipe is not None and not faults:
        faults += list(contradictions(recipe))
    if faults or recipe is None:
        where = "the recipe" if isinstance(source, Mapping) else f"'{source}'"
        count = "one fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UserError("\n  ".join([f"{count} in {where}:", *dict.fromkeys(faults)]))
    return recipe


def recipes_folder() -> Path:
    """Return the folder of the recipes that come with the package, installed or checked out."""
    inside = Path(__file__).parent.parent / "recipes"
    return inside if inside.is_dir() else Path(__file__).parent.parent.parent / "recipes"


class _Loader(yaml.SafeLoader):
    """Refuse a key that stands twice, which YAML loaders silently let win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' stands twice", key_node.start_mark)
            seen.add(key if isinstance(key, str | int | float) else None)
        return super().construct_mapping(node, deep)


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if not path.exists() and path.suffix == "":
        path = recipes_folder() / f"{source}.yaml"
    if not path.is_file():
        files = [p for p in recipes_folder().rglob("*.yaml") if p.parent.name != "accelerate"]
        known = sorted(str(p.relative_to(recipes_folder()).with_suffix("")) for p in files)
        raise UserError(
            f"there is no recipe '{source}'.{did_you_mean(str(source), known)} Built in: {', '.join(known)}"
        )
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"'{path}'{line} is not YAML: {getattr(error, 'problem', None) or error}") from error
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}") from error
    if not isinstance(data, dict):
        raise UserError(f"'{path}' holds no recipe: a mapping with 'model' and 'phases' is wanted (see recipes/)")
    return data


def _set(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: write KEY=VALUE, such as phases.1.steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not YAML") from error
    at: Any = data
    parts = [int(p) if p.isdigit() else p for p in re.split(r"\.|\[|\]\.?", key) if p]
    for i, part in enumerate(parts):
        last = i == len(parts) - 1
        if isinstance(at, list) and isinstance(part, int) and part < len(at):
            pass
        elif not isinstance(at, dict):
            raise UserError(f"--set {override}: the recipe has no '{'.'.join(map(str, parts[: i + 1]))}'")
        if last:
            at[part] = value
        else:
            at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
