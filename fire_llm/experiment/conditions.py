"""Judge the conditions of a stage's resets by the log of its parent, which every rank reads alike."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from fire_llm.core.atomic import AVERAGED
from fire_llm.core.errors import UserError
from fire_llm.core.manifest import trainer_state
from fire_llm.experiment.stages import Stage, labelled_checkpoint
from fire_llm.resets import ResetSpec
from fire_llm.resets.conditions import Overtraining


def decided_resets(stage: Stage) -> tuple[ResetSpec, ...]:
    """Return a stage's resets; those with a condition hold the judgement. The parent has to be finished.

    Raises:
        UserError: See `labelled_checkpoint`; or the checkpoint was not measured.
    """
    return tuple(
        reset if reset.when is None else replace(reset, found=overtraining(stage, reset.when["overtrained"]))
        for reset in stage.resets
    )


def overtraining(stage: Stage, threshold: float) -> Overtraining:
    """Judge whether the checkpoint that a stage starts from is overtrained, by the losses in its log.

    Args:
        stage: A stage whose parent is finished.
        threshold: Nats a token above the lowest loss from which on a checkpoint is overtrained.

    Raises:
        UserError: As in `decided_resets`.
    """
    parent = stage.parent
    assert parent is not None  # `recipe.faults` refuses the condition in a first phase
    checkpoint = labelled_checkpoint(stage.run.folder / parent.folder, stage.start)
    state = trainer_state(checkpoint)
    history = [entry for entry in state["log_history"] if entry["step"] <= state["global_step"]]
    weights, evaluated = parent.phase.data, stage.run.recipe.evaluated()
    corpora = [name for name in weights if weights[name] and name in evaluated]
    judged: Overtraining | None = None
    with suppress(ValueError):
        judged = Overtraining.of(history, "ema_nll" if checkpoint.name == AVERAGED else "eval_nll", corpora, threshold)
    if judged is None or judged.step != state["global_step"]:
        raise UserError(
            f"{stage.title}: the log holds no finite held-out loss of '{checkpoint}', so that nobody knows whether it "
            "is overtrained: leave when out, or start from a step at which its phase was evaluated"
        )
    return judged
