"""Read results.json of this and of the first schema version; a file that cannot be read gives one clear message."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from fire_llm.core.errors import UserError, did_you_mean
from fire_llm.reporting.schema import SCHEMA_VERSION, Evaluation, Record, Results
from fire_llm.reporting.table import first_few

RENAMED = {"spike": "loss_jump", "speed": "throughput", "recycled": "recycled_units"}
"""Keys of a run in schema version 1, and their names in version 2."""

AGAIN = "Run the recipe again with 'fire-llm run': it trains nothing that is finished and writes the file again."

STALE = "evaluation.json is not shown"
UNTIED = "evaluation.json does not say which weights it measured: an earlier fire-llm wrote it"

WANTED = {
    "float_type": "a number", "int_type": "a whole number", "int_from_float": "a whole number", "string_type": "text",
    "bool_type": "true or false", "list_type": "a list", "dict_type": "a mapping", "model_type": "a mapping",
}  # fmt: skip
"""What a field must be, by pydantic's name of the fault."""

Part = TypeVar("Part", bound=Record)


def load_results(path: str | Path) -> Results:
    """Read a results.json, or the one in a run's folder, of schema version 1 or 2.

    An evaluation.json beside it, which `fire-llm eval RUN_DIR` writes, becomes the attribute `evaluation` if it
    measured the checkpoints of these results; `evaluation_note` says where it did not, or does not tell.

    Raises:
        UserError: For a missing or unreadable file, text that is not JSON, a schema version that is not known here, or
            a field that is not as the schema says.
    """
    place = Path(os.path.expanduser(path))
    file = place / "results.json" if place.is_dir() else place
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no results there. Give a results.json or the folder of a finished run.") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error}). Give the results.json that 'fire-llm run' wrote.") from None
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version not in (1, SCHEMA_VERSION):
        raise UserError(
            f"{file}: schema_version {version!r} is not what this fire_llm reads (1 to {SCHEMA_VERSION}). "
            "Install the fire_llm that wrote the file, or run the recipe again with this one."
        )
    results = _checked(Results, upgraded(data) if version == 1 else data, file, "run", AGAIN)
    evaluation = _evaluation(file.with_name("evaluation.json"))
    note = _note(results, evaluation, file.parent) if evaluation else ""
    shown = None if note.startswith(STALE) else evaluation
    return results.model_copy(update={"evaluation": shown, "evaluation_note": note})


def _note(results: Results, evaluation: Evaluation, folder: Path) -> str:
    """Return a warning if an evaluation measured other weights than those of the results, or does not tell which."""
    runs = [*results.phases, *(run for arm in results.arms.values() for run in arm.runs)]
    weights = {checkpoint: hashed for run in runs for checkpoint, hashed in run.weights.items()}
    stages = {checkpoint.rpartition("/")[0] for checkpoint in weights}
    rows = [row for row in evaluation.rows if row.checkpoint.rpartition("/")[0] in stages]
    stale = dict.fromkeys(r.checkpoint for r in rows if r.weights and weights.get(r.checkpoint) != r.weights)
    if stale:
        return (
            f"{STALE}: it measured other weights than {first_few([*stale])} has now. "
            f"Measure again: fire-llm eval {folder}"
        )
    if any(row.weights is None for row in rows):
        return f"{UNTIED}. Measure again: fire-llm eval {folder}"
    return ""


def _evaluation(file: Path) -> Evaluation | None:
    """Return the evaluation in a file, None where there is no file.

    Raises:
        UserError: For a file that is damaged or of another version.
    """
    if not file.exists():
        return None
    again = "Delete it, or evaluate the run again."
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: not what 'fire-llm eval' writes ({error}). {again}") from None
    return _checked(Evaluation, data, file, "eval", again)


def upgraded(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return results of schema version 1 in the terms of version 2; damaged parts are left as they are.

    Args:
        data: The content of a results.json, which is not changed.
    """
    new = {"measurement" if key == "measured" else key: value for key, value in data.items()}
    planned = _mapping(data.get("recipe")).get("phases")
    phases = [p for p in planned if isinstance(_mapping(p).get("name"), str)] if isinstance(planned, list) else []
    heaviest = {p["name"]: _heaviest(_mapping(p.get("data"))) for p in phases}
    new |= {"schema_version": SCHEMA_VERSION, "phase_corpus": {p: corpus for p, corpus in heaviest.items() if corpus}}
    if isinstance(data.get("phases"), list):
        new["phases"] = [_run(run) for run in data["phases"]]
    if isinstance(data.get("arms"), dict):
        new["arms"] = {name: _arm(name, arm, phases) for name, arm in data["arms"].items()}
    return new


def _arm(name: str, arm: Any, phases: list[dict[str, Any]]) -> Any:
    """Return an arm with its runs renamed, and with its methods as the recipe's last phase with this arm plans them."""
    if not isinstance(arm, dict):
        return arm
    plans = [_mapping(phase.get("arms")).get(name.split("@")[0]) for phase in phases]
    plan: Any = next((plan for plan in reversed(plans) if plan), [])
    methods = [_mapping(reset).get("method", reset) for reset in (plan if isinstance(plan, list) else [plan])]
    runs = {"runs": [_run(run) for run in arm["runs"]]} if isinstance(arm.get("runs"), list) else {}
    return {**arm, "methods": methods, **runs}


def _run(run: Any) -> Any:
    return {RENAMED.get(key, key): value for key, value in run.items()} if isinstance(run, dict) else run


def _heaviest(mixture: Mapping[str, Any]) -> str | None:
    weights = {corpus: weight for corpus, weight in mixture.items() if isinstance(weight, int | float)}
    return max(weights, key=weights.__getitem__, default=None)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _checked(kind: type[Part], data: Any, file: Path, verb: str, again: str) -> Part:
    """Return data as a record of this kind.

    Raises:
        UserError: Fields are not as the schema says. It names them and the next step.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        faults = first_few([*_faults(kind, error)], separator="; ")
        raise UserError(f"{file}: not what 'fire-llm {verb}' writes ({faults}). {again}") from None


def _faults(kind: type[Record], error: ValidationError) -> Iterator[str]:
    """Yield a message for every fault: `arms.fire.runs[0].seed: "one" is not allowed; it must be a whole number`."""
    for fault in error.errors():
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"]).lstrip(".")
        if fault["type"] == "missing":
            yield f"{where}: missing"
        elif fault["type"] == "extra_forbidden":
            fields = _fields(kind, fault["loc"][:-1])
            yield f"{where}: unknown key.{did_you_mean(str(fault['loc'][-1]), fields)} Known: {', '.join(fields)}"
        else:
            allowed = WANTED.get(fault["type"]) or fault["msg"].removeprefix("Input should be ")
            given = json.dumps(fault["input"], default=str)[:80]
            yield f"{where or 'the file'}: {given} is not allowed; it must be {allowed}"


def _fields(kind: type[Record], loc: tuple[int | str, ...]) -> list[str]:
    """Return the keys that a record allows at a path of keys and indices into it."""
    annotation: Any = kind
    for part in loc:
        is_record = hasattr(annotation, "model_fields")
        annotation = annotation.model_fields[part].annotation if is_record else get_args(annotation)[-1]
        if type(None) in get_args(annotation):
            annotation = get_args(annotation)[0]
    return list(annotation.model_fields)
