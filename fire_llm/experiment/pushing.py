"""Push the checkpoints of a run to the Hub, a branch for each stage. Access is tried before training begins.

A push holds the model, its tokenizer and a card. Optimizer moments, logs and paths of this machine are not uploaded.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback

from fire_llm import __version__
from fire_llm.checkpoint import check_repository
from fire_llm.checkpoint.refusals import refuse_files
from fire_llm.core.atomic import AVERAGED, checkpoints, read_json, write_json
from fire_llm.core.errors import UserError, did_you_mean, first_line, redact
from fire_llm.core.files import leads_out
from fire_llm.core.manifest import damage, trainer_state, weights_hash
from fire_llm.core.signals import asked
from fire_llm.distributed import is_first
from fire_llm.experiment.collect import measured_nll
from fire_llm.experiment.conditions import decided_resets
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.evaluate_run import run_and_stages
from fire_llm.experiment.recipe import Recipe
from fire_llm.experiment.sources import COMPANIONS, MODEL, TOKENIZER
from fire_llm.experiment.stages import Stage, expand, final_checkpoint, labelled_checkpoint, step_behind
from fire_llm.reporting.schema import Results
from fire_llm.reporting.tables import load_results, markdown_table, page_fault, report_page

PUSHED = "pushed.json"
"""File in a stage's folder that says which weights were pushed last, and where to."""

PAGE = "report.html"
PRIVATE = {"hub.repo": "hub.private is true", "push": "--public was not given"}
"""Why a repository has to be private, by the option that names it."""

_SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
"""Files in which libraries store paths of this machine."""

_CARD = """\
# {title}

{what}, by [fire_llm](https://arxiv.org/abs/2602.08040) {version}.

{body}
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({place})
tokenizer = AutoTokenizer.from_pretrained({place})
```
"""


def branch_of(stage: Stage) -> str:
    """Return the branch of a stage: the run's name and the stage's folder, such as `demo/second/fire/seed-1`."""
    return f"{stage.run.recipe.name}/{stage.folder}"


def push_run(
    folder: Path,
    repo: str,
    *,
    arm: str | None = None,
    seed: int | None = None,
    start: str | None = None,
    checkpoint: str = "final",
    private: bool = True,
) -> str:
    """Upload one arm of a finished run to the main branch of a repository, in one commit.

    The card compares all arms. The recipe and the page with the plots lie beside the weights.

    Args:
        folder: Of the run.
        repo: owner/name; made where it is not there.
        arm: One of the last phase; where there is but one, it is taken.
        seed: Of the recipe's; the first by default.
        start: Of the last phase's warm starts; needed where there are several.
        checkpoint: `final`, or one that the phase keeps: `best`, `ema`, or a number of steps.
        private: Whether a repository that is made is private. One that is public is refused where this is asked for.

    Returns:
        The address of the commit.

    Raises:
        UserError: It is no run, the arm is not finished, or the repository cannot be written to. Nothing is uploaded.
    """
    from huggingface_hub import CommitOperationDelete, HfApi

    run, stages = run_and_stages(folder, progress=False)
    stage = _chosen(stages, arm, seed, start)
    weights = labelled_checkpoint(folder / stage.folder, checkpoint)
    if fault := damage(weights):
        raise UserError(f"push: '{weights}' is damaged: {fault}. Delete it: the same `run` trains it again")
    results = Results.model_validate(_by_name(load_results(folder).model_dump(mode="json")))
    operations = [*_files(weights), _text("recipe.yaml", _recipe_text(run.recipe))]
    page = None if page_fault() else report_page(results)
    if page is not None:
        operations.append(_text(PAGE, page))
    beside = "`recipe.yaml` is the recipe, with which the same command trains the same batches."
    beside += " `report.html` has the curves.\n\n" if page is not None else "\n\n"
    facts, table = _facts(stage, weights)
    body = f"{facts}\n{table}## All arms\n\n{markdown_table(results)}\n{beside}"
    title = f"{run.recipe.name}: {stage.title}"
    operations.append(_text("README.md", _model_card(stage, title, _weights_of(weights), body, repo)))
    existing = _open_repository(repo, "push", private)
    ours, patterns = {operation.path_in_repo for operation in operations}, (*MODEL, *TOKENIZER, *COMPANIONS, PAGE)
    stale = sorted(name for name in existing - ours if any(fnmatch(name, pattern) for pattern in patterns))
    operations += [CommitOperationDelete(path_in_repo=name) for name in stale]  # files of another model
    try:
        commit = HfApi().create_commit(repo, operations, commit_message=_message(stage.title))
    except Exception as error:  # the network, the Hub and missing rights raise many types
        raise UserError(
            f"push: nothing was uploaded to '{repo}' ({_said(error)}). Try again, or log in with a token that may "
            "write there (`hf auth login`)"
        ) from error
    return str(commit.commit_url)


def _chosen(stages: list[Stage], arm: str | None, seed: int | None, start: str | None) -> Stage:
    """Return the stage of the last phase that the options choose.

    Raises:
        UserError: They choose none, or several; the message lists the choices.
    """
    last = [stage for stage in stages if stage.phase is stages[-1].phase]
    if arm and "@" in arm and (named := [stage for stage in last if stage.arm == arm]):  # as tables name it
        last, arm = named, named[0].recipe_arm
    keys: dict[str, tuple[Any, Callable[[Stage], Any]]] = {
        "arm": (arm, lambda stage: stage.recipe_arm),
        "start": (start, lambda stage: stage.start_name),
        "seed": (last[0].seed if seed is None else seed, lambda stage: stage.seed),
    }
    for key, (wanted, value_of) in keys.items():
        values = [str(value) for value in dict.fromkeys(map(value_of, last))]
        if wanted is None and len(values) > 1:
            raise UserError(f"--{key}: say which: {', '.join(values)}")
        if wanted is not None and values == [""]:
            raise UserError(f"--{key}: the last phase, '{last[0].phase.name}', has no {key}s: leave it out")
        if wanted is not None and str(wanted) not in values:
            near = did_you_mean(str(wanted), values)
            raise UserError(f"--{key}: the run has no '{wanted}'.{near} It has: {', '.join(values)}")
        last = [stage for stage in last if wanted is None or value_of(stage) == wanted]
    return last[0]


def _recipe_text(recipe: Recipe) -> str:
    """Return a recipe as YAML, with the value of every key, and without paths of this machine."""
    data = recipe.model_dump(mode="json", exclude={"data_root", "hub"})
    return yaml.safe_dump(_by_name(data), sort_keys=False)


def _by_name(value: Any) -> Any:
    """Return plain data in which each absolute path is replaced by its last part."""
    if isinstance(value, dict):
        return {key: _by_name(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_by_name(item) for item in value]
    return Path(value).name if isinstance(value, str) and _is_absolute(value) else value


def _is_absolute(text: str) -> bool:
    return os.path.isabs(os.path.expanduser(text)) or text.startswith("file:")


def check_hub(stages: Iterable[Stage], finished: Iterable[Stage] = ()) -> None:
    """Try all that pushing needs before training begins: the login, the repository, and a branch for each stage.

    Args:
        stages: Stages that are to be trained.
        finished: Stages that are finished, and may have to be pushed.

    Raises:
        UserError: Naming what is refused, and the next step.
    """
    for stage in finished:
        try:
            _to_push(stage)
        except UserError as error:
            raise UserError(
                f"hub.push is best, and '{stage.folder}' was trained without keep: best, so that its best checkpoint "
                "is gone: push end, or delete that folder to train it again"
            ) from error
    stages = list(stages)
    if not stages or (section := stages[0].run.recipe.hub) is None:
        return
    _open_repository(section.repo, "hub.repo", section.private, stages)


def _open_repository(repo: str, option: str, private: bool, stages: Sequence[Stage] = ()) -> set[str]:
    """Try the login, make the repository if there is none, write a card to it, and make a branch for each stage.

    Args:
        repo: owner/name.
        option: The option or key that names it, for messages.
        private: As in `push_run`.
        stages: Stages that need a branch.

    Returns:
        The names of the files on the main branch.

    Raises:
        UserError: Naming what is refused, and the next step.
    """
    from huggingface_hub import HfApi

    named = f"{option} '{repo}'"
    check_repository(repo, option)
    api = HfApi()
    try:
        api.whoami()
    except Exception as error:  # the network, the Hub and the token raise many types
        raise UserError(
            f"{named}: the login was not accepted ({_said(error)}): `hf auth login`, or HF_TOKEN"
        ) from error
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        info = api.model_info(repo)
        if private and info.private is False:
            how = "write private: false" if option == "hub.repo" else "give --public"
            raise UserError(f"{named} is public, and {PRIVATE[option]}: make it private on its page, or {how}")
        files = {file.rfilename for file in info.siblings or ()}
        if stages and "README.md" not in files:
            card = _text("README.md", _repository_card(stages, repo))
            api.create_commit(repo, [card], commit_message=_message("the card"))
        for stage in stages:
            api.create_branch(repo, branch=branch_of(stage), exist_ok=True)
        return files
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{named} cannot be written to ({_said(error)}): log in with a token that may write there "
            f"(`hf auth login`), name a repository of your own{', or leave hub out' if stages else ''}"
        ) from error


def push_stage(stage: Stage) -> None:
    """Push the checkpoint of a finished stage that belongs on the Hub, unless it is there.

    A failure is a warning: the checkpoints stay, and the same command tries again.
    """
    checkpoint = _to_push(stage)
    if checkpoint is not None and not _is_pushed(stage, checkpoint):
        _push(stage, checkpoint)


def unpushed(recipe: Recipe, folder: Path) -> str | None:
    """Return in words which finished stages of a run still have to be pushed; None if all are on the Hub."""
    if recipe.hub is None:
        return None
    stages = expand(RunContext(recipe, folder))
    left = [s.folder for s in stages if (path := _to_push(s)) is not None and not _is_pushed(s, path)]
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
        """Push the newest checkpoint, unless a signal asked to end: a push takes long."""
        complete = checkpoints(self.stage.run.folder / self.stage.folder)
        if is_first() and complete and not asked():
            _push(self.stage, complete[-1][0])


def _to_push(stage: Stage) -> Path | None:
    """Return the checkpoint that belongs on the Hub; None if the recipe pushes none or the stage is not finished."""
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


def _push(stage: Stage, checkpoint: Path) -> None:
    """Push a checkpoint to the branch of its stage; a failure is a warning."""
    from huggingface_hub import HfApi

    record, step = _record(stage, checkpoint), step_behind(checkpoint)
    repo, branch = record["repo"], record["branch"]
    try:
        title = f"{stage.run.recipe.name}: {stage.title}"
        body = "\n".join(_facts(stage, checkpoint))
        card = _text("README.md", _model_card(stage, title, _weights_of(checkpoint), body, repo, branch))
        operations = [*_files(checkpoint), card]
        api = HfApi()
        api.create_branch(repo, branch=branch, exist_ok=True)
        api.create_commit(repo, operations, commit_message=_message(f"step {step}"), revision=branch)
    except Exception as error:  # training goes on, whatever the network, the Hub and missing rights raise
        sys.stderr.write(
            f"warning: {stage.title}: step {step} was not pushed to '{repo}' ({_said(error)}); that "
            "will be tried again\n"
        )
    else:
        write_json(stage.run.folder / stage.folder / PUSHED, record)


def _files(checkpoint: Path) -> list[Any]:
    """Return the operations that upload a checkpoint: its weights, its tokenizer, and their settings.

    Raises:
        UserError: It holds a link to a file elsewhere, or what is no regular file.
    """
    from huggingface_hub import CommitOperationAdd

    patterns = (*MODEL, *TOKENIZER, *COMPANIONS)
    refuse_files(str(checkpoint), (p.name for p in checkpoint.iterdir()))
    files = sorted(p for p in checkpoint.iterdir() if p.is_file() and any(fnmatch(p.name, glob) for glob in patterns))
    for path in files:
        if leads_out(path, checkpoint):
            raise UserError(f"'{path}' is a link to a file outside of the checkpoint, which is not uploaded: delete it")
    return [
        _text(p.name, _without_paths(p))
        if p.name in _SETTINGS
        else CommitOperationAdd(path_in_repo=p.name, path_or_fileobj=str(p))
        for p in files
    ]


def _text(name: str, text: str) -> Any:
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(path_in_repo=name, path_or_fileobj=text.encode())


def _said(error: Exception) -> str:
    return redact(first_line(error))


def _message(what: str) -> str:
    return f"{what}, by fire_llm {__version__}"


def _without_paths(path: Path) -> str:
    """Return the text of a JSON file of settings, without those that hold a path of this machine."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: cleaned(v) for k, v in value.items() if not _is_place(k, v)}
        if isinstance(value, list):
            return [cleaned(item) for item in value if not (isinstance(item, str) and _is_absolute(item))]
        return value

    return json.dumps(cleaned(json.loads(path.read_text(encoding="utf-8"))), indent=2, ensure_ascii=False) + "\n"


def _is_place(key: str, value: Any) -> bool:
    named = key.endswith(("name_or_path", "_file", "_dir"))
    return isinstance(value, str) and (_is_absolute(value) or (named and os.path.exists(value)))


def _weights_of(checkpoint: Path) -> str:
    """Return in words which weights a checkpoint holds."""
    what = "The moving average of the weights" if checkpoint.name == AVERAGED else "The weights"
    return f"{what} after step {step_behind(checkpoint):,}"


def _facts(stage: Stage, checkpoint: Path) -> tuple[str, str]:
    """Return how a checkpoint was trained, as a list, and its NLL, as a table; the table is empty if none is known."""
    recipe, state = stage.run.recipe, trainer_state(checkpoint)
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
    return "".join(f"- {name}: {value}\n" for name, value in facts.items() if value is not None), table


def _repository_card(stages: Sequence[Stage], repo: str) -> str:
    """Return the card of the main branch, which lists the branches."""
    body = "Each stage has a branch:\n\n" + "".join(f"- `{branch_of(stage)}`\n" for stage in stages) + "\n"
    name = stages[0].run.recipe.name
    return _model_card(stages[0], name, "The stages of a run", body, repo, branch_of(stages[0]))


def _model_card(stage: Stage, title: str, what: str, body: str, repo: str, branch: str | None = None) -> str:
    """Return a card with the Hub's metadata, and with the code that loads the model from a branch."""
    from huggingface_hub import ModelCard, ModelCardData

    checkpoint = stage.run.recipe.model.checkpoint
    methods = dict.fromkeys(reset.method for reset in stage.resets)
    data = ModelCardData(
        base_model=checkpoint if checkpoint and checkpoint.count("/") == 1 and not os.path.exists(checkpoint) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["fire_llm", "continual-pretraining", *methods],
    )
    place = f'"{repo}"' if branch is None else f'"{repo}", revision="{branch}"'
    text = _CARD.format(title=title, what=what, version=__version__, body=body, place=place)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))
