"""What a rewritten checkpoint says of itself: fire.json for machines, README.md (a model card) for people."""

from __future__ import annotations

import math
import os
import platform
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from fire_llm import __version__
from fire_llm.architectures.classes import CAUSAL
from fire_llm.checkpoint.stored import Stored
from fire_llm.core.atomic import write_json
from fire_llm.core.compat import installed
from fire_llm.core.errors import UserError, first_line
from fire_llm.core.files import leads_out, read_file
from fire_llm.resets import RESETS, ResetReport, ResetSpec, TensorReport

PROVENANCE = "fire.json"
COMMAND_OPTIONS = ("iterations", "solver", "tolerance", "scale", "shrink", "strength")
"""Options of resets that `fire-llm apply` has; others are given in Python."""

_INHERITED = ("license", "license_name", "license_link", "language")

_MEASURED = """\
Medians over the matrices of a row. DfI is the deviation from isometry of a matrix W (out × in) by its smaller Gram
matrix: ‖WᵀW − I‖²_F where W is tall, ‖WWᵀ − I‖²_F where it is wide. """

_BODY = """\
# {title}

The weights of {source} after **{label}**, written by [fire_llm](https://arxiv.org/abs/2602.08040) {version}.

**This is a starting point for further training, not a model to use as it is.** A reset takes away what the
weights had learned in part or in whole, so that the model can learn again from new data: its answers are
worse than its source's until it has been trained on.

## What was changed

| role | part | matrices | DfI before | DfI after | largest σ before | after | smallest σ before | after |
|---|---|---|---|---|---|---|---|---|
{rows}

{measured}{touched} tensors were
changed; {untouched} were left alone ({roles}), and {left}.
{ignored}`fire.json` has the figures of every matrix, and the SHA-256 of every shard before and after.
Computed on `{device}`. Kinds of devices round differently: bytes are equal on the same kind only.

{losses}## How to go on

```python
from transformers import {loader}

model = {loader}.from_pretrained("{folder}")  # then train: {trainers}
```

## How it was made

{made}
"""


def write_provenance(
    path: Path,
    stored: Stored,
    report: ResetReport,
    hashes: Mapping[str, Mapping[str, str]],
    call: Mapping[str, Any],
) -> None:
    """Write fire.json: what was done to which checkpoint, with what, and what came out (docs/checkpoints.md)."""
    source = stored.source
    packages = ("torch", "transformers", "safetensors")
    data = {
        "fire_llm": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: installed(name) for name in packages}},
        "source": {
            "name": source.name,
            "revision": source.revision,
            "model_type": source.config.model_type,
            "class": type(stored.model).__name__,
        },
        "initial": {key: call[key] for key in ("init", "seed")},
        "device": call["device"],
        "dtype": call["dtype"],
        "shards": {name: dict(values) for name, values in hashes.items()},
        **report.to_dict(),
    }
    write_json(path, data)


def write_card(path: Path, stored: Stored, report: ResetReport, call: Mapping[str, Any]) -> None:
    """Write the model card, with what the Hub reads (base_model, license, tags) at its head.

    Args:
        path: Where to.
        stored: What was read.
        report: What became of it.
        call: The arguments of `reset_checkpoint` on which the bytes depend, beside the resets: `src`, `init`, `seed`,
            `revision`, `native`, `device`, `dtype`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    source = stored.source
    base, own = _hub_id(stored), Path(os.path.abspath(source.name)).name
    alike = "are the source's to the byte, like every header and the index"
    methods = list(dict.fromkeys(spec.method for spec in report.resets))
    data = ModelCardData(
        base_model=base,
        base_model_relation="finetune" if base else None,
        library_name="transformers",
        pipeline_tag=_task(stored.kind),
        tags=["fire_llm", "continual-pretraining", *methods],
        **_inherited(source.folder),
    )
    ignored = f"{len(report.kept_unread)} stored tensors that the class does not load were kept as they are.\n"
    body = _BODY.format(
        title=f"{own}, {' + '.join(methods)}",
        source=f"[{source.name}](https://huggingface.co/{source.name})" if source.revision else f"`{own}`",
        label="; ".join(spec.label() for spec in report.resets),
        version=__version__,
        rows="\n".join(_rows(report.touched)),
        touched=len(report.touched),
        untouched=len(report.untouched),
        roles=", ".join(sorted({t.role for t in report.untouched})) or "none",
        measured=_MEASURED if any(t.dfi_after is not None for t in report.touched) else "",
        left=alike if call["dtype"] == "keep" else f"hold the source's numbers in {call['dtype']}, like the others",
        ignored=ignored if report.kept_unread else "",
        losses=_losses(report, source.config) if report.nll else "",
        loader=CAUSAL if stored.kind is None else stored.kind.__name__,
        trainers="Trainer, TRL's SFTTrainer, fire_llm" if stored.kind is None else "Trainer",
        folder="this repository or folder",
        made=how_made(report.resets, call),
        device=call["device"],
    )
    text = str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}"))
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files may be no text


def push(folder: Path, repository: str) -> str:
    """Upload a finished checkpoint to the Hub, making the repository where there is none; return its address.

    Raises:
        UserError: It cannot be reached or written to; the folder stays.
    """
    from huggingface_hub import HfApi

    try:
        address = HfApi().create_repo(repository, exist_ok=True)
        HfApi().upload_folder(folder_path=folder, repo_id=repository, commit_message=f"fire_llm {__version__}")
    except Exception as error:  # whatever the network, the Hub or the rights bring
        raise UserError(
            f"saved as '{folder}', but not pushed to '{repository}': {first_line(error)}. Once that is mended: "
            f"hf upload {repository} {folder}"
        ) from error
    return str(address)


def check_repository(repository: str, option: str = "--push-to-hub") -> None:
    """Refuse, before any work, a repository that a push could not reach.

    Args:
        repository: Its id.
        option: What it was given as, for messages.

    Raises:
        UserError: The id has the wrong form, or nobody is logged in.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, if not marked so

    try:
        validate_repo_id(repository)
        if "/" not in repository:
            raise HFValidationError("the owner is missing")
    except HFValidationError as error:
        raise UserError(f"{option}: '{repository}' is not of the form owner/name: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{option} {repository}: HF_HUB_OFFLINE is set: unset it, or leave that out")
    if get_token() is None:
        raise UserError(f"{option} {repository}: nobody is logged in to the Hub: `hf auth login`, or set HF_TOKEN")


def _hub_id(stored: Stored) -> str | None:
    """Return the Hub id that a checkpoint came from, as far as it is known."""
    if stored.source.revision is not None:
        return stored.source.name
    named = str(stored.source.settings.get("_name_or_path") or "")
    return named if re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", named) and not os.path.exists(named) else None


def _inherited(folder: Path) -> dict[str, Any]:
    """Return what the source's own card says of license and language, as far as it is what a card should hold."""
    from huggingface_hub import ModelCard

    card = folder / "README.md"
    if not card.is_file() or leads_out(card, folder):
        return {}
    try:
        parsed: Any = ModelCard(read_file(card).decode())
        data = parsed.data.to_dict()
    except Exception:  # its YAML, its types: nothing of it undoes the work
        return {}
    stated = {key: data.get(key) for key in _INHERITED}
    lists = {k: v for k, v in stated.items() if isinstance(v, list) and v and all(isinstance(x, str) for x in v)}
    return {**{k: v for k, v in stated.items() if isinstance(v, str) and v}, **lists}


def _rows(touched: Iterable[TensorReport]) -> Iterable[str]:
    """Yield a row a role and part: how many, and medians before and after."""
    groups: dict[tuple[str, str], list[TensorReport]] = {}
    for tensor in touched:
        name = tensor.part or tensor.parameter.removesuffix(".weight").rpartition(".")[2]
        groups.setdefault((tensor.role, name), []).append(tensor)
    for (role, name), members in groups.items():
        spectra = [[m.sigma_before for m in members], [m.sigma_after for m in members]]
        columns = [[m.dfi_before for m in members], [m.dfi_after for m in members]]
        columns += [[s[end] if s else None for s in of] for end in (0, -1) for of in spectra]
        yield f"| {role} | {name} | {len(members)} | {' | '.join(map(_median, columns))} |"


def _task(kind: Any) -> str | None:
    """Return what the Hub calls the task of a class, None where it has no name for it."""
    from transformers.modelcard import TASK_MAPPING

    if kind is None:
        return "text-generation"
    return next((task for task, of in TASK_MAPPING.items() if kind.__name__ in of.values()), None)


def _losses(report: ResetReport, config: Any) -> str:
    """Return the section on the loss before and after."""
    vocabulary = config.get_text_config().vocab_size
    rows = "\n".join(f"| {text} | {before:.4f} | {after:.4f} |" for text, (before, after) in report.nll.items())
    return (
        "## What is left\n\nMean negative log-likelihood, nats a token. A uniform guess has "
        f"{math.log(vocabulary):.3f}.\n\n| text | before | after |\n|---|---|---|\n{rows}\n\n"
    )


def _median(values: Iterable[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{median(known):.4g}" if known else "–"


def how_made(specs: Sequence[ResetSpec], call: Mapping[str, Any]) -> str:
    """Return what makes the same weights again, as a block of Markdown: a command, or Python where one is not enough.

    Args:
        specs: The resets.
        call: As in `write_card`.
    """
    settings = {k: v for k, v in call.items() if v is not None and v is not False and v != "keep"}
    source = str(settings.pop("src"))
    flags = _flags(specs[0]) if len(specs) == 1 else None
    if flags is None:
        unregistered = [repr(s.method) for s in specs if not _built_in(s)]
        comment = f"# {', '.join(unregistered)}: to be registered first, with register_reset\n" if unregistered else ""
        arguments = [repr(source), "'DST'", repr([_as_given(spec) for spec in specs])]
        arguments += [f"{key}={value!r}" for key, value in settings.items()]
        call_again = f"reset_checkpoint({', '.join(arguments)})"
        return f"```python\nfrom fire_llm import reset_checkpoint\n\n{comment}{call_again}\n```"
    words = [f"./{source}" if source.startswith("-") else source, "DST", *flags]
    for key, value in settings.items():
        words += [f"--{key}"] if value is True else _option(key, value)
    return f"```\nfire-llm apply {shlex.join(words)}\n```"


def _as_given(spec: ResetSpec) -> dict[str, Any]:
    """Return a reset as a mapping that is read back to it, options that had no effect left out."""
    roles = {} if spec.roles == tuple(RESETS[spec.method].roles) else {"roles": list(spec.roles)}
    chosen = {key: list(value) if isinstance(value, tuple) else value for key, value in spec.selection.items()}
    options = {key: value for key, value in spec.read.items() if value is not None}
    return {"method": spec.method, **options, **roles, **chosen}


def _flags(spec: ResetSpec) -> list[str] | None:
    """Return a reset as options of the command line; None where it has none for them."""
    method, as_given = RESETS[spec.method], _as_given(spec)
    implied = method.roles if method.matrices_only else ()
    roles, patterns = as_given.pop("roles", []), {key: as_given.pop(key, []) for key in ("include", "exclude")}
    unoffered = {key: as_given.pop(key) for key in {*as_given} - {"method", "layers", *COMMAND_OPTIONS}}
    defaults = method.options().model_dump()
    changed = any(value != defaults[key] for key, value in unoffered.items())
    if not _built_in(spec) or changed or (roles and not {*implied} <= {*roles}):
        return None
    pairs = [*as_given.items(), *(("role", role) for role in roles if role not in implied)]
    pairs += [(key, pattern) for key, texts in patterns.items() for pattern in texts]
    return [word for key, value in pairs for word in _option(key, value)]


def _built_in(spec: ResetSpec) -> bool:
    return RESETS[spec.method].function.__module__.startswith("fire_llm.")


def _option(key: str, value: Any) -> list[str]:
    """Return an option and its value as the command line reads them, a value that looks like an option too."""
    return [f"--{key}={value}"] if str(value).startswith("-") else [f"--{key}", str(value)]
