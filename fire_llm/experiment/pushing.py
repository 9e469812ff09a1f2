"""Push the checkpoints of a run to the Hub: a branch for each stage, tried before the work and again behind it.

What is pushed is the model and its tokenizer, with a card. Moments, logs and paths of this machine stay here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fire_llm import __version__
from fire_llm.checkpoint import check_repository
from fire_llm.checkpoint.refusals import refuse_files
from fire_llm.core.atomic import checkpoints, read_json, write_json
from fire_llm.core.errors import UserError, first_line, redact
from fire_llm.core.manifest import TRAINER_STATE, read_state, weights_hash
from fire_llm.core.signals import asked
from fire_llm.distributed import is_first
from fire_llm.experiment.collect import measured_nll
from fire_llm.experiment.conditions import decided_resets
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.recipe import Recipe
from fire_llm.experiment.sources import COMPANIONS, MODEL, TOKENIZER
from fire_llm.experiment.stages import Stage, expand, final_checkpoint, labelled_checkpoint, step_behind

PUSHED = "pushed.json"
"""File in a stage's folder: which weights were pushed last, and where to."""

_SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files in which libraries note where they read something."""

_CARD = """\
# {title}

{what}, by [fire_llm](https://arxiv.org/abs/2602.08040) {version}.

{body}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}", revision="{branch}")
tokenizer = AutoTokenizer.from_pretrained("{repo}", revision="{branch}")
```
"""


def branch_of(stage: Stage) -> str:
    """Return the branch of a stage: the run's name and the stage's folder, such as `demo/second/fire/seed-1`."""
    return f"{stage.run.recipe.name}/{stage.folder}"


def check_hub(stages: Iterable[Stage], finished: Iterable[Stage] = ()) -> None:
    """Try what pushing takes before the work: the login, the repository, a branch for each stage and its writing.

    Args:
        stages: To be trained.
        finished: That are trained, and may be to be pushed.

    Raises:
        UserError: What of it cannot be had, with the next step.
    """
    for stage in finished:
        try:
            _wanted(stage)
        except UserError as error:
            raise UserError(
                f"hub.push is best, and '{stage.folder}' was trained without keep: best, so that its best checkpoint "
                "is gone: push end, or delete that folder to train it again"
            ) from error
    stages = list(stages)
    if not stages or (section := stages[0].run.recipe.hub) is None:
        return
    from huggingface_hub import HfApi

    said = f"hub.repo '{section.repo}'"
    check_repository(section.repo, "hub.repo")
    api = HfApi()
    try:
        api.whoami()
    except Exception as error:  # whatever the network, the Hub or the token bring
        raise UserError(f"{said}: the login was not accepted ({_said(error)}): `hf auth login`, or HF_TOKEN") from error
    try:
        api.create_repo(section.repo, private=section.private, exist_ok=True)
        there = api.model_info(section.repo)
        if section.private and there.private is False:
            raise UserError(
                f"{said} is public, and hub.private is true: make it private on its page, or write private: false"
            )
        if "README.md" not in {file.rfilename for file in there.siblings or ()}:
            api.create_commit(
                section.repo, [_text("README.md", _contents(stages))], commit_message=_message("the card")
            )
        for stage in stages:
            api.create_branch(section.repo, branch=branch_of(stage), exist_ok=True)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{said} cannot be written to ({_said(error)}): log in with a token that may write there "
            "(`hf auth login`), name a repository of your own, or leave hub out"
        ) from error


def push_stage(stage: Stage) -> bool:
    """Push what is to be pushed of a finished stage, unless that was done; return whether it is there.

    A failure is a warning: the checkpoints stay, and the same command tries again.
    """
    checkpoint = _wanted(stage)
    if checkpoint is None or _is_pushed(stage, checkpoint):
        return True
    return _push(stage, checkpoint)


def unpushed(recipe: Recipe, folder: Path) -> str | None:
    """Return in words which finished stages of a run are not on the Hub as they should be; None where all are."""
    if recipe.hub is None:
        return None
    stages = expand(RunContext(recipe, folder))
    left = [s.folder for s in stages if (path := _wanted(s)) is not None and not _is_pushed(s, path)]
    if not left:
        return None
    return (
        f"the run is finished and its results are written, but not pushed to '{recipe.hub.repo}': {', '.join(left)}. "
        "The same command tries again, and trains nothing"
    )


class PushCallback(TrainerCallback):
    """Push each checkpoint of a stage when it is written."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Push the newest; a signal does not wait for that."""
        found = checkpoints(self.stage.run.folder / self.stage.folder)
        if is_first() and found and not asked():
            _push(self.stage, found[-1][0])


def _wanted(stage: Stage) -> Path | None:
    """Return the checkpoint that is to be on the Hub at the end; None for none, or before the stage is finished."""
    section, folder = stage.run.recipe.hub, stage.run.folder / stage.folder
    if section is None or final_checkpoint(folder) is None:
        return None
    return labelled_checkpoint(folder, "best" if section.push == "best" else "final")


def _is_pushed(stage: Stage, checkpoint: Path) -> bool:
    path = stage.run.folder / stage.folder / PUSHED
    if not path.exists():
        return False
    return read_json(path, "delete it: the stage is then pushed again") == _record(stage, checkpoint)


def _record(stage: Stage, checkpoint: Path) -> dict[str, Any]:
    section = stage.run.recipe.hub
    assert section is not None
    return {"repo": section.repo, "branch": branch_of(stage), "weights": weights_hash(checkpoint)}


def _push(stage: Stage, checkpoint: Path) -> bool:
    from huggingface_hub import CommitOperationAdd, HfApi

    record, step = _record(stage, checkpoint), step_behind(checkpoint)
    patterns = (*MODEL, *TOKENIZER, *COMPANIONS)
    try:
        refuse_files(str(checkpoint), (p.name for p in checkpoint.iterdir()))
        files = sorted(p for p in checkpoint.iterdir() if p.is_file() and any(fnmatch(p.name, one) for one in patterns))
        operations = [
            _text(p.name, _without_paths(p))
            if p.name in _SETTINGS
            else CommitOperationAdd(path_in_repo=p.name, path_or_fileobj=str(p))
            for p in files
        ]
        card = _text("README.md", _card(stage, checkpoint))
        api = HfApi()
        api.create_branch(record["repo"], branch=record["branch"], exist_ok=True)
        api.create_commit(
            record["repo"], [*operations, card], commit_message=_message(f"step {step}"), revision=record["branch"]
        )
    except Exception as error:  # whatever the network, the Hub or the rights bring: the hours of work go on
        sys.stderr.write(
            f"warning: {stage.title}: step {step} was not pushed to '{record['repo']}' ({_said(error)}); that "
            "will be tried again\n"
        )
        return False
    write_json(stage.run.folder / stage.folder / PUSHED, record)
    return True


def _text(name: str, text: str) -> Any:
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(path_in_repo=name, path_or_fileobj=text.encode())


def _said(error: Exception) -> str:
    return redact(first_line(error))


def _message(what: str) -> str:
    return f"{what}, by fire_llm {__version__}"


def _without_paths(path: Path) -> str:
    """Return a file of settings without those that name a place on this machine."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: cleaned(v) for k, v in value.items() if not _is_place(k, v)}
        return [cleaned(one) for one in value] if isinstance(value, list) else value

    return json.dumps(cleaned(json.loads(path.read_text(encoding="utf-8"))), indent=2, ensure_ascii=False) + "\n"


def _is_place(key: str, value: Any) -> bool:
    named = key.endswith(("name_or_path", "_file", "_dir"))
    return isinstance(value, str) and (os.path.isabs(value) or (named and os.path.exists(value)))


def _card(stage: Stage, checkpoint: Path) -> str:
    """Return the card of a checkpoint: how it was trained, and what it was measured at."""
    recipe, state = stage.run.recipe, read_state(checkpoint, TRAINER_STATE)
    step = state["global_step"]
    resets = "; ".join(reset.label() for reset in decided_resets(stage))
    facts = {
        "run": recipe.name,
        "phase": stage.phase.name,
        "arm": f"{stage.arm} ({resets})" if stage.arm else None,
        "seed": stage.seed,
        "trained on": ", ".join(f"{name} (weight {weight:g})" for name, weight in stage.phase.data.items()),
        "steps of this phase": f"{step:,} of {state['max_steps']:,}",
        "tokens of this phase": f"{step * recipe.batch.tokens_per_step:,}",
        "started from": f"phase {stage.parent.phase.name}, {stage.start}" if stage.parent else "the first weights",
    }
    nll = "".join(f"| {corpus} | {value:.4f} |\n" for corpus, value in measured_nll(checkpoint).items())
    table = f"| held-out text | NLL, nats per token |\n|---|---|\n{nll}\n" if nll else ""
    body = "".join(f"- {name}: {value}\n" for name, value in facts.items() if value is not None) + f"\n{table}"
    title = f"{recipe.name}: {stage.title}"
    return _with_head(stage, title, f"The weights after step {step:,}", body, branch_of(stage))


def _contents(stages: list[Stage]) -> str:
    """Return the card of the repository: its branches."""
    recipe, first = stages[0].run.recipe, branch_of(stages[0])
    body = "Each stage has a branch:\n\n" + "".join(f"- `{branch_of(stage)}`\n" for stage in stages) + "\n"
    return _with_head(stages[0], recipe.name, "The stages of a run", body, first)


def _with_head(stage: Stage, title: str, what: str, body: str, branch: str) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    recipe = stage.run.recipe
    assert recipe.hub is not None
    given = recipe.model.checkpoint
    methods = dict.fromkeys(reset.method for reset in stage.resets)
    data = ModelCardData(
        base_model=given if given and given.count("/") == 1 and not os.path.exists(given) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["fire_llm", "continual-pretraining", *methods],
    )
    text = _CARD.format(title=title, what=what, version=__version__, body=body, repo=recipe.hub.repo, branch=branch)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))
