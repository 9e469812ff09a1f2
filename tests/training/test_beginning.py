"""A training that `Trainer` begins again by itself, out of memory: each reset is applied once."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny_gpt2
from support.training import arguments
from transformers import Trainer, TrainerCallback, TrainingArguments

from fire_llm import ResetCallback, UserError
from fire_llm.training import RecyclingCallback

ROWS = [{"input_ids": ids, "labels": ids} for ids in [torch.arange(1, 17)] * 16]
"""All the same, so that the order in which they are drawn does not matter."""


class OutOfMemory(Trainer):
    """A `Trainer` that has no memory for a micro-batch of 8 sequences once it has seen some."""

    most = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) == 8:
            self.most -= 1
            if self.most < 0:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().compute_loss(model, inputs, *args, **kwargs)


def trainer_of(folder, callbacks, size=8, auto=True, most=0, **settings):
    given = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=size, auto_find_batch_size=auto, use_cpu=True,
        learning_rate=1e-2, report_to=[], disable_tqdm=True, **{"save_strategy": "no", **settings},
    )  # fmt: skip
    trainer = OutOfMemory(tiny_gpt2(), given, train_dataset=ROWS, callbacks=callbacks)
    trainer.most = most
    return trainer


def end(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def callbacks_of(kind: str) -> list[TrainerCallback]:
    return {
        "fire": lambda: [ResetCallback("fire")],
        "shrink": lambda: [ResetCallback({"method": "shrink_perturb", "shrink": 0.5}, initial=tiny_gpt2(9))],
        "two": lambda: [ResetCallback("fire"), ResetCallback({"method": "shrink_perturb", "shrink": 0.5}, seed=3)],
        "later": lambda: [ResetCallback("fire", at_steps=[1])],
        "recycling": lambda: [RecyclingCallback({"method": "redo", "every": 1, "threshold": 0.9}, seed=3)],
    }[kind]()


@pytest.mark.parametrize("most", [0, 2])
@pytest.mark.parametrize("kind", ["fire", "shrink", "two", "later", "recycling"])
def test_it_ends_as_if_the_smaller_batch_had_been_asked_for(kind, most, tmp_path):
    """Whether memory runs out at once, or after steps that have moved the weights and filled the moments."""
    plain, again = callbacks_of(kind), callbacks_of(kind)
    straight = trainer_of(tmp_path / "a", plain, size=7, auto=False)
    straight.train()
    short = trainer_of(tmp_path / "b", again, most=most)
    short.train()
    assert short.state.train_batch_size == 7 and short.most < 0
    wanted = end(straight)
    assert all(torch.equal(p, wanted[name]) for name, p in end(short).items())
    for one, other in zip(plain, again, strict=True):
        assert len(getattr(one, "reports", ())) == len(getattr(other, "reports", ()))
        assert other._beginning._weights == {}  # let go of


def test_another_call_of_train_resets_again_as_it_does_without_the_option(tmp_path):
    ends = []
    for auto in (True, False):
        callback = ResetCallback("fire")
        trainer = trainer_of(tmp_path / str(auto), [callback], size=4, auto=auto)
        trainer.train()
        trainer.train()
        assert len(callback.reports) == 2
        ends.append(end(trainer))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_out_of_memory_after_a_resumption_is_refused(tmp_path):
    """`Trainer` reads the checkpoint's weights once, before the first attempt."""
    whole = trainer_of(tmp_path, [], most=99, save_steps=2, save_strategy="steps")
    whole.train()
    short = trainer_of(tmp_path, [ResetCallback("fire", at_steps=[3])], most=1)
    with pytest.raises(UserError, match=r"out of memory after going on from step 2.*smaller per_device_train_batch"):
        short.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_phase_does_not_find_its_batch_size(tmp_path):
    with pytest.raises(UserError, match=r"auto_find_batch_size would change how many tokens a step trains on"):
        arguments(tmp_path, auto_find_batch_size=True)
