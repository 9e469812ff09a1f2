"""A training that is begun again, out of memory: each reset is applied once, and it ends as the smaller one does."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny_gpt2
from support.training import Samples, arguments
from transformers import Trainer, TrainerCallback, TrainingArguments

from fire_llm import ContinualTrainer, ResetCallback, UserError
from fire_llm.training import RecyclingCallback
from fire_llm.training.beginning import largest_part

ROWS = [{"input_ids": ids, "labels": ids} for ids in [torch.arange(1, 17)] * 16]
"""All the same, so that the order in which they are drawn does not matter."""


class Short:
    """What has no memory for a micro-batch of 8 sequences once it has seen some."""

    most = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        if len(inputs["input_ids"]) == 8:
            self.most -= 1
            if self.most < 0:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().compute_loss(model, inputs, *args, **kwargs)


class OutOfMemory(Short, Trainer):
    pass


class Continual(Short, ContinualTrainer):
    pass


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


# ---- ContinualTrainer, which trains on the same samples a step


class Texts(torch.utils.data.Dataset):
    def __len__(self):
        return 37

    def __getitem__(self, i):
        ids = Samples()[i]["input_ids"]
        return {"input_ids": ids, "labels": ids}


def continual(folder, callbacks=(), micro=8, accumulation=1, most=0, data=None, **settings):
    model = tiny_gpt2(dropout=0.1)
    given = arguments(
        folder, max_steps=6, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation, **settings
    )
    trainer = Continual(model, given, data or Texts(), callbacks=callbacks)
    trainer.most = most
    return trainer


def log(trainer):
    timed = {"tokens_per_second", "data_wait_share", "peak_memory_bytes"}
    ends = ("runtime", "per_second")
    return [{k: v for k, v in e.items() if k not in timed and not k.endswith(ends)} for e in trainer.state.log_history]


def assert_same(one, other):
    wanted = end(one)
    assert all(torch.equal(p, wanted[name]) for name, p in end(other).items())
    assert log(one) == log(other) and one.hash_of_batches() == other.hash_of_batches()
    assert one.state.total_flos == other.state.total_flos


@pytest.mark.parametrize("most", [0, 3])
@pytest.mark.parametrize("kind", ["fire", "two", "later", "recycling"])
def test_a_step_trains_on_the_same_samples_in_smaller_micro_batches(kind, most, tmp_path, capsys):
    """Bit for bit the run that began with them: dropout, shuffling, moments, average, log, hash of the batches."""
    data = Texts() if most else Samples()
    straight = continual(tmp_path / "a", callbacks_of(kind), 4, 2, data=data, save_steps=2, ema_decay=0.9)
    straight.train()
    again = callbacks_of(kind)
    short = continual(
        tmp_path / "b", again, most=most, data=data, save_steps=2, ema_decay=0.9, auto_find_batch_size=True
    )
    short.train()
    assert short.most < 0 and short.state.train_batch_size == short._train_batch_size == 4
    assert_same(straight, short)
    assert [len(getattr(c, "reports", [1])) for c in again] == [1] * len(again)
    said = capsys.readouterr().err
    assert f"out of memory at step {most + 1} with micro-batches of 8: begins again with 4" in said
    assert {f.name for f in (tmp_path / "b").iterdir()} == {f.name for f in (tmp_path / "a").iterdir()}
    given = short.args
    assert (given.per_device_train_batch_size, given.gradient_accumulation_steps) == (8, 1)


def test_out_of_memory_after_a_resumption_begins_again_from_the_checkpoint(tmp_path):
    """Which stays until then, though newer ones replace it; and a resumption takes the size that was found."""
    for name in "ab":
        continual(tmp_path / name, micro=4, accumulation=2, save_steps=2, save_total_limit=1).train()
        for step in (4, 6):
            assert not (tmp_path / name / f"checkpoint-{step}").exists() or step == 6
    straight = continual(tmp_path / "a", micro=4, accumulation=2, save_steps=1, save_total_limit=1)
    straight.args.max_steps = 9
    straight.train(resume_from_checkpoint=True)
    short = continual(tmp_path / "b", most=0, save_steps=1, save_total_limit=1, auto_find_batch_size=True)
    short.args.max_steps = 9
    short.train(resume_from_checkpoint=True)  # of micro-batches of 4: it begins with them
    assert short.most == 0 and short._train_batch_size == 4
    assert_same(straight, short)


def test_a_checkpoint_that_is_gone_on_from_stays_until_the_end(tmp_path):
    for name in "ab":
        continual(tmp_path / name, most=99, save_steps=2, save_total_limit=1).train()
    straight = continual(tmp_path / "a", micro=4, accumulation=2, save_steps=1, save_total_limit=1)
    short = continual(tmp_path / "b", most=2, save_steps=1, save_total_limit=1, auto_find_batch_size=True)
    for trainer in (straight, short):
        trainer.args.max_steps = 9
        trainer.train(resume_from_checkpoint=True)
    assert short.most < 0 and short._train_batch_size == 4
    assert_same(straight, short)


def test_a_user_s_optimizer_and_schedule_begin_again_with_it(tmp_path):
    ends = []
    for micro, accumulation, auto in ((4, 2, False), (8, 1, True)):
        trainer = continual(tmp_path / str(micro), most=2, auto_find_batch_size=auto, save_strategy="no")
        trainer.args.per_device_train_batch_size, trainer._train_batch_size = micro, micro
        trainer.args.gradient_accumulation_steps = accumulation
        optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1, momentum=0.9)
        trainer.optimizer = optimizer
        trainer.lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        trainer.train()
        ends.append(trainer)
    assert ends[1].most < 0
    assert_same(*ends)


def test_what_no_smaller_batch_can_help_is_one_message(tmp_path, monkeypatch):
    class Never(ContinualTrainer):
        def compute_loss(self, *args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    class AtOnce(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    given = arguments(tmp_path, per_device_train_batch_size=6, auto_find_batch_size=True)
    with pytest.raises(UserError, match=r"with micro-batches of one sample \(CUDA out of memory"):
        Never(tiny_gpt2(), given, Samples()).train()
    with pytest.raises(UserError, match="out of memory before the first batch"):
        ContinualTrainer(tiny_gpt2(), given, Samples(), callbacks=[AtOnce()]).train()
    assert (given.per_device_train_batch_size, given.gradient_accumulation_steps) == (6, 3)
    monkeypatch.setattr(type(given), "world_size", 2)
    with pytest.raises(UserError, match="auto_find_batch_size=True: a rank that is out of memory leaves the others"):
        ContinualTrainer(tiny_gpt2(), given, Samples())


def test_parts_of_a_step():
    assert [largest_part(*given) for given in ((8, 4), (6, 3), (9, 4), (7, 3), (15, 7), (8, 99))] == [4, 3, 3, 1, 5, 8]
