"""Data in epochs, gone on with at another batch size: every row once an epoch, in the order of a run in one piece."""

from __future__ import annotations

import json
import os

import pytest
import torch
from support.models import tiny_gpt2
from support.ranks import run_ranks
from support.training import arguments

from fire_llm import ContinualTrainer, UserError


class Rows(torch.utils.data.Dataset):
    """Row i begins with token i."""

    def __init__(self, n=23):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        if i >= self.n:
            raise IndexError(i)
        ids = torch.tensor([i, 90, 91, 92])
        return {"input_ids": ids, "labels": ids}


class Noting(ContinualTrainer):
    """Notes the rows of each micro-batch."""

    def training_step(self, model, inputs, *args, **kwargs):
        if not hasattr(self, "rows"):
            self.rows = []
        self.rows.append((self.state.global_step, inputs["input_ids"][:, 0].tolist()))
        return super().training_step(model, inputs, *args, **kwargs)


def train(folder, micro, accumulation=1, resume=None, n=23, keep=(), **settings):
    given = {"num_train_epochs": 3, "max_steps": -1, "save_strategy": "no", "keep_steps": [*keep], **settings}
    args = arguments(
        folder, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation, warmup_steps=0, **given
    )
    trainer = Noting(tiny_gpt2(), args, Rows(n))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def flat(trainer, before=10**9):
    return [row for step, rows in trainer.rows for row in rows if step < before]


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Two rows a step: 12 steps an epoch, the last of one row."""
    folder = tmp_path_factory.mktemp("first")
    return folder, train(folder, 2, keep=[1, 5, 7, 11, 12, 16, 30, 31])


@pytest.mark.parametrize("step", [1, 11, 12, 31])
@pytest.mark.parametrize(("micro", "accumulation"), [(5, 1), (2, 3), (30, 1)])
def test_every_row_is_seen_once_an_epoch_in_the_order_of_one_run(micro, accumulation, step, first, tmp_path):
    folder, one = first
    other = train(tmp_path, micro, accumulation, folder / f"checkpoint-{step}")
    assert flat(one, step) + flat(other) == flat(one)
    a_step = micro * accumulation
    seen = step // 12 * 23 + min(step % 12 * 2, 23)
    epochs = [23 - seen % 23, *[23] * (2 - seen // 23)]
    assert other.state.global_step == other.state.max_steps == step + sum(-(-rows // a_step) for rows in epochs)
    assert other.state.epoch == 3


def test_it_goes_on_again_from_there_bit_for_bit(first, tmp_path):
    """Also with a batch size that is the first again, whose steps alone would say another place."""
    folder, one = first
    other = train(tmp_path, 4, 1, folder / "checkpoint-5", keep=[8, 12])
    for micro in (4, 2):
        third = train(tmp_path / str(micro), micro, 4 // micro, tmp_path / "checkpoint-12")
        assert flat(other, 12) + flat(third) == flat(other)
        assert third.state.max_steps == other.state.max_steps
        if micro == 4:
            wanted = dict(other.model.named_parameters())
            assert all(torch.equal(p, wanted[name]) for name, p in third.model.named_parameters())
    back = train(tmp_path / "back", 2, 1, tmp_path / "checkpoint-8")
    assert flat(one, 5) + flat(other, 8) + flat(back) == flat(one)


def test_max_steps_counts_all_steps(first, tmp_path):
    """And epochs follow until it is reached, though 30 steps were 2.5 epochs and would now be less than one."""
    folder, one = first
    other = train(tmp_path, 1, 1, folder / "checkpoint-30", max_steps=60)
    assert other.state.global_step == 60
    assert flat(other)[: len(flat(one)) - len(flat(one, 30))] == flat(one)[len(flat(one, 30)) :]
    assert len(flat(other)) == 30


@pytest.mark.parametrize(("n", "micro"), [(23, 5), (20, 5), (22, 8)])
def test_rows_that_fill_no_batch_are_dropped_where_that_is_asked_for(n, micro, tmp_path):
    order = flat(train(tmp_path / "c", n, n=n, num_train_epochs=1))
    train(tmp_path / "a", 4, n=n, keep=[4], dataloader_drop_last=True)
    other = train(tmp_path / "b", micro, 1, tmp_path / "a" / "checkpoint-4", n=n, dataloader_drop_last=True)
    rest = n - 16
    assert flat(other)[: rest // micro * micro] == order[16:][: rest // micro * micro]
    assert len(flat(other)) == rest // micro * micro + 2 * (n // micro * micro)


def test_samples_in_the_order_that_they_lie_in(tmp_path):
    train(tmp_path / "a", 2, keep=[5], train_sampling_strategy="sequential", seed=1)
    other = train(tmp_path / "b", 3, 1, tmp_path / "a" / "checkpoint-5", train_sampling_strategy="sequential", seed=2)
    assert flat(other) == [*range(10, 23), *range(23), *range(23)]


def test_a_place_that_cannot_be_found_again_is_refused(first, tmp_path):
    folder, _ = first
    there = folder / "checkpoint-5"
    with pytest.raises(UserError, match=r"steps had 2 samples and these have 4.*had 23 samples and has 24.*skip=True"):
        train(tmp_path, 4, 1, there, n=24)
    with pytest.raises(UserError, match=r"the order of the samples is another: shuffled with seed 42 then, .* seed 7 "):
        train(tmp_path, 4, 1, there, data_seed=7)
    with pytest.raises(UserError, match="depends on the batch size or on a generator's state"):
        train(tmp_path, 4, 1, there, train_sampling_strategy="group_by_length")
    assert not list(tmp_path.glob("checkpoint-*"))
    again = train(tmp_path, 4, 1, there, ignore_data_skip=True)
    assert sorted(flat(again)[:23]) == [*range(23)]  # of the epoch, from its beginning
    assert again.state.epoch == 3 or again.state.global_step == again.state.max_steps


def test_an_older_checkpoint_goes_on_with_the_same_batch_size_alone(tmp_path):
    from fire_llm.core.manifest import write_manifest

    one = train(tmp_path, 2, keep=[16])
    there = tmp_path / "checkpoint-16"
    state = json.loads((there / "continual_state.json").read_text())
    assert state.pop("epochs") == {"epoch": 1, "seen": 8, "length": 23, "order": ["random", 42], "moved": False}
    (there / "continual_state.json").write_text(json.dumps(state))
    write_manifest(there)
    with pytest.raises(UserError, match="an older version wrote it"):
        train(tmp_path / "b", 4, 1, there)
    assert flat(one, 16) + flat(train(tmp_path / "c", 1, 2, there)) == flat(one)


def _on_ranks(rank, world, folder, micro, resume):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # transformers looks whether they are set
    return train(folder, micro, 1, resume, n=24, keep=[] if resume else [3, 8]).rows


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 8])
def test_another_number_of_ranks(step, tmp_path):
    """Step 8 lies in the second epoch, whose order every rank has to know."""
    one = train(tmp_path / "one", 4, n=24)
    run_ranks(2, _on_ranks, tmp_path, tmp_path / "two", 2, None)
    ranks = run_ranks(2, _on_ranks, tmp_path, tmp_path / "again", 3, tmp_path / "two" / f"checkpoint-{step}")
    rows = [row for pair in zip(*ranks, strict=True) for _, rows in pair for row in rows]
    wanted = flat(one)[step * 4 :]
    first = wanted[: -step * 4 % 24]
    assert rows[: len(first)] == first or (
        len(first) % 6 and rows[: len(first) // 6 * 6] == first[: len(first) // 6 * 6]
    )
    assert rows[-24:] == wanted[-24:]
    same = run_ranks(2, _on_ranks, tmp_path, tmp_path / "same", 2, tmp_path / "two" / f"checkpoint-{step}")
    assert [row for pair in zip(*same, strict=True) for _, rows in pair for row in rows] == wanted
