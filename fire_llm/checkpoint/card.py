"""What a rewritten checkpoint says of itself: fire.json for machines, README.md (a model card) for people."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from fire_llm import __version__
from fire_llm.checkpoint.stored import Stored
from fire_llm.core.atomic import write_json
from fire_llm.core.compat import installed
from fire_llm.core.errors import UserError, first_line
from fire_llm.core.files import leads_out, read_file
from fire_llm.resets import ResetReport, TensorReport

PROVENANCE = "fire.json"
_INHERITED = ("license", "license_name", "license_link", "language")

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

Medians over the matrices of a row. DfI is ‖WᵀW − I‖²_F, the distance from isometry. {touched} tensors were
changed; {untouched} were left alone ({roles}), and are the source's to the byte, like every header and the index.
{ignored}`fire.json` has the figures of every matrix, and the SHA-256 of every shard before and after.

## How to go on

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{folder}")  # then train: Trainer, TRL's SFTTrainer, fire_llm
```

## How it was made

```
{command}
```

Computed on `{device}`. Kinds of devices round differently: bytes are equal on the same kind only.
"""


def write_provenance(
    path: Path,
    stored: Stored,
    report: ResetReport,
    hashes: Mapping[str, Mapping[str, str]],
    origin: Mapping[str, Any],
    device: str,
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
        "initial": dict(origin),
        "device": device,
        "shards": {name: dict(values) for name, values in hashes.items()},
        **report.to_dict(),
    }
    write_json(path, data)


def write_card(path: Path, stored: Stored, report: ResetReport, origin: Mapping[str, Any], device: str) -> None:
    """Write the model card, with what the Hub reads (base_model, license, tags) at its head."""
    from huggingface_hub import ModelCard, ModelCardData

    source = stored.source
    base = _hub_id(stored)
    methods = list(dict.fromkeys(spec.method for spec in report.resets))
    data = ModelCardData(
        base_model=base,
        base_model_relation="finetune" if base else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["fire_llm", "continual-pretraining", *methods],
        **_inherited(source.folder),
    )
    ignored = f"{len(report.kept_unread)} stored tensors that the class does not load were kept as they are.\n"
    body = _BODY.format(
        title=f"{Path(base or source.name).name}, {' + '.join(methods)}",
        source=f"[{base}](https://huggingface.co/{base})" if base else f"`{Path(source.name).name}`",
        label="; ".join(spec.label() for spec in report.resets),
        version=__version__,
        rows="\n".join(_rows(report.touched)),
        touched=len(report.touched),
        untouched=len(report.untouched),
        roles=", ".join(sorted({t.role for t in report.untouched})) or "none",
        ignored=ignored if report.kept_unread else "",
        folder="this repository or folder",
        command=_command(report, base or Path(source.name).name, origin, device),
        device=device,
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


def check_repository(repository: str) -> None:
    """Refuse, before any work, a repository that a push could not reach.

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
        raise UserError(f"--push-to-hub: '{repository}' is not of the form owner/name: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push-to-hub {repository}: HF_HUB_OFFLINE is set: unset it, or leave the option out")
    if get_token() is None:
        raise UserError(f"--push-to-hub {repository}: nobody is logged in to the Hub: `hf auth login`, or set HF_TOKEN")


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
    said = {key: data.get(key) for key in _INHERITED}
    listed = {k: v for k, v in said.items() if isinstance(v, list) and v and all(isinstance(x, str) for x in v)}
    return {**{k: v for k, v in said.items() if isinstance(v, str) and v}, **listed}


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


def _median(values: Iterable[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{median(known):.4g}" if known else "–"


def _command(report: ResetReport, name: str, origin: Mapping[str, Any], device: str) -> str:
    """Return the command line that repeats the reset, or the call where there were several."""
    if len(report.resets) != 1:
        return f"fire_llm.reset_checkpoint({name!r}, 'DST', {[asdict(s) for s in report.resets]}, device={device!r})"
    spec = report.resets[0]
    flags = [f"--method {spec.method}"]
    flags += [f"--{key.replace('_', '-')} {value}" for key, value in spec.read.items() if value is not None]
    flags += [f"--{key} '{pattern}'" for key in ("include", "exclude") for pattern in getattr(spec, key)]
    flags += [f"--layers {spec.layers}"] if spec.layers else []
    flags += [f"--{key} {value}" for key, value in {**origin, "device": device}.items() if value is not None]
    return f"fire-llm apply {name} DST {' '.join(flags)}"
