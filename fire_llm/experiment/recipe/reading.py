"""Read a recipe from YAML, apply overrides, and report all faults at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fire_llm.core.errors import UserError, did_you_mean
from fire_llm.experiment.recipe.faults import arm_faults, contradictions, explain, path_of
from fire_llm.experiment.recipe.plain import MOST_BYTES, plain_faults, printable, read_yaml, unshared
from fire_llm.experiment.recipe.sections import Recipe


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = (), *, made: bool = False) -> Recipe:
    """Read a recipe from a YAML file, the name of a built-in one, or plain data.

    Args:
        source: Path, built-in name ("demo") or mapping.
        overrides: `KEY=VALUE` with a dotted key (`phases.1.steps=100`); the value is read as YAML.
        made: Whether a run was made with it; then an arm that changes nothing is no fault.

    Raises:
        UserError: With every fault, one a line: `path: what is wrong, what is allowed`.
    """
    recipe, faults = checked(read_data(source, overrides), made)
    refuse(source, faults)
    assert recipe is not None
    return recipe


def read_data(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Read the plain data of a recipe, and apply the overrides.

    Raises:
        UserError: It cannot be read, holds values that are not plain, or has no place for an override.
    """
    given = source if isinstance(source, Mapping) else _read(source)
    refuse(source, plain_faults(given))
    data: dict[str, Any] = unshared(given)
    for override in overrides:
        set_key(data, "--set", *assignment("--set", override))
    refuse(source, plain_faults(data))
    return data


def checked(data: dict[str, Any], made: bool = False) -> tuple[Recipe | None, list[str]]:
    """Return the recipe that plain data describe, None if they describe none, and all their faults."""
    faults: list[str] = []
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        faults += [f"{path_of(e['loc'])}: {explain(e)}" for e in error.errors()]
    faults += arm_faults(data, made)
    if recipe is not None:
        faults += list(contradictions(recipe))
    return recipe, faults


def refuse(source: str | Path | Mapping[str, Any], faults: list[str]) -> None:
    """Raise one `UserError` with all faults of a recipe, if there are any."""
    if faults:
        subject = "the recipe" if isinstance(source, Mapping) else f"'{source}'"
        faults = list(dict.fromkeys(faults))
        count = "one fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UserError("\n  ".join([f"{count} in {subject}:", *faults]))


def recipes_folder() -> Path:
    """Return the folder of the recipes that come with the package, installed or in a checkout."""
    package = Path(__file__).parents[2]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    try:
        if not path.exists() and path.suffix == "":
            path = recipes_folder() / f"{source}.yaml"
        exists = path.is_file()
        if exists and path.stat().st_size > MOST_BYTES:
            raise UserError(
                f"'{path}' is no recipe: it has {path.stat().st_size:,} bytes, and {MOST_BYTES:,} are allowed"
            )
        text = path.read_text(encoding="utf-8") if exists else ""
    except UnicodeDecodeError as error:
        raise UserError(
            f"'{path}' is not YAML: it is not text in UTF-8 ({error.reason} at byte {error.start})"
        ) from error
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}") from error
    if not exists:
        files = [p for p in recipes_folder().rglob("*.yaml") if p.parent.name != "accelerate"]
        known = sorted(str(p.relative_to(recipes_folder()).with_suffix("")) for p in files)
        raise UserError(
            f"there is no recipe '{source}'.{did_you_mean(str(source), known)} Built in: {', '.join(known)}"
        )
    try:
        data = read_yaml(text)
    except ValueError as error:
        raise UserError(f"'{path}' is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"'{path}' holds no recipe: a mapping with 'model' and 'phases' is wanted (see recipes/)")
    return data


def assignment(option: str, text: str) -> tuple[str, Any]:
    """Read `KEY=VALUE`, its value as YAML.

    Raises:
        UserError: It is no `KEY=VALUE`, or the value is no YAML.
    """
    key, equals, value = text.partition("=")
    subject = f"{option} {printable(key)}"  # the value may be a secret
    if not equals or not _parts(key):
        example = "phases.1.steps=100" if option == "--set" else "optimizer.lr=[1.0e-3,3.0e-4]"
        raise UserError(f"{subject}: write KEY=VALUE, such as {example}")
    try:
        return key, read_yaml(value)
    except ValueError as error:
        raise UserError(f"{subject}: the value is not YAML: {error}") from error


def set_key(data: dict[str, Any], option: str, key: str, value: Any) -> None:
    """Set the value at a dotted key.

    Raises:
        UserError: The recipe has no such place; the message begins with `option` and the key.
    """
    parts = _parts(key)
    section: Any = data
    for i, part in enumerate(parts):
        in_list = isinstance(section, list) and isinstance(part, int) and part < len(section)
        if not in_list and not isinstance(section, dict):
            missing = printable(".".join(map(str, parts[: i + 1])))
            raise UserError(f"{option} {printable(key)}: the recipe has no '{missing}'")
        place: Any = part if in_list else str(part)
        if i == len(parts) - 1:
            section[place] = value
        else:
            section = section[place] if in_list else section.setdefault(place, {})


def _parts(key: str) -> list[int | str]:
    """Split a dotted key; a part of at most six digits is an index of a list, longer than that a key."""
    return [int(p) if re.fullmatch(r"[0-9]{1,6}", p) else p for p in re.split(r"\.|\[|\]\.?", key) if p]
