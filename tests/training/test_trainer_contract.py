"""ContinualTrainer against transformers' Trainer itself: the same data and seed, the same options, the same weights."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.models import tiny_gpt2, tiny_llama
from support.training import Samples, arguments, losses, train
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from fire_llm import ContinualArguments, ContinualTrainer, ResetCallback, UserError
from fire_llm.core.atomic import checkpoints
from fire_llm.evaluation import perplexity
from fire_llm.training import EvaluationSet
from fire_llm.training.batches import labels_are_shifted
from fire_llm.training.contract import METHODS, OPTIONS, OWN_OPTIONS, PARAMETERS

ROOT = Path(__file__).parents[2]
IGNORED = -100
SLOW = pytest.mark.slow


class Rows(torch.utils.data.Dataset):
    """So many rows of 6 to 12 tokens, labels as `Trainer` has them, the prompt of each left out."""

    def __init__(self, n=11, prompt=2, text=False):
        draw = torch.Generator().manual_seed(1)
        lengths = torch.randint(6, 13, (n,), generator=draw)
        self.rows = [torch.randint(1, 97, (int(length),), generator=draw) for length in lengths]
        self.prompt, self.text = prompt, text

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        labels = self.rows[i].clone()
        labels[: self.prompt] = IGNORED
        return {"input_ids": self.rows[i], "labels": labels, **({"text": "x"} if self.text else {})}


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, n=40):
        self.n = n

    def __iter__(self):
        yield from (Rows()[i % 11] for i in range(self.n))


def padded(rows):
    """Pad to the longest row, masked."""
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([row[k] for row in rows], batch_first=True, padding_value=v)
        for k, v in (("input_ids", 0), ("labels", IGNORED))
    )
    return {"input_ids": ids, "labels": labels, "attention_mask": (ids != 0).long()}


def plain(folder, **changes):
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "num_train_epochs": 2, "learning_rate": 1e-2, "warmup_steps": 2, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False,
        "optim": "adamw_torch", "max_grad_norm": 1.0,
    }  # fmt: skip
    return TrainingArguments(**{**settings, **changes})


def trained(trainer):
    trainer.train()
    return trainer


def assert_same(stock, ours):
    assert losses(ours) == pytest.approx(losses(stock), abs=2e-5)
    for (name, a), b in zip(stock.model.named_parameters(), ours.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-4), name
    assert (ours.state.global_step, ours.state.max_steps) == (stock.state.global_step, stock.state.max_steps)
    assert ours.state.epoch == pytest.approx(stock.state.epoch)


# ---- data and losses


def sharp(outputs, labels, num_items_in_batch=None):
    """A loss of one's own: the summed cross entropy of logits that are doubled."""
    logits = 2 * outputs.logits[:, :-1]
    summed = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return summed / num_items_in_batch


@pytest.mark.parametrize(
    ("build", "data", "options"),
    [
        (tiny_gpt2, Rows, {}),
        pytest.param(tiny_llama, Rows, {"dataloader_drop_last": True, "gradient_accumulation_steps": 3}, marks=SLOW),
        pytest.param(tiny_gpt2, Rows, {"max_steps": 7, "train_sampling_strategy": "group_by_length"}, marks=SLOW),
        (tiny_gpt2, Stream, {"max_steps": 5}),
        (tiny_gpt2, Rows, {"label_smoothing_factor": 0.3}),
        (tiny_gpt2, Rows, {"compute_loss_func": sharp}),
        pytest.param(tiny_gpt2, lambda: Rows(text=True), {"neftune_noise_alpha": 5.0}, marks=SLOW),
    ],
    ids=["epochs", "accumulation", "by-length", "stream", "smoothing", "own-loss", "neftune"],
)
def test_losses_and_weights_are_those_of_trainer(build, data, options, tmp_path):
    """Shuffling, epochs, rows of any length, masked prompts, padding, a last step that is smaller."""
    args = {name: value for name, value in options.items() if name in OPTIONS}
    given = {"data_collator": padded, **{name: value for name, value in options.items() if name not in OPTIONS}}
    made = (
        kind(build(), plain(tmp_path / kind.__name__, **args), train_dataset=data(), **given)
        for kind in (Trainer, ContinualTrainer)
    )
    assert_same(*map(trained, made))


@SLOW
def test_a_dataset_of_the_library_datasets_with_other_columns(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [Rows()[i] for i in range(11)]
    columns = {k: [row[k].tolist() for row in rows] for k in ("input_ids", "labels")}
    found = datasets.Dataset.from_dict({**columns, "source": ["web"] * 11})

    def collate(batch):
        return padded([{k: torch.tensor(v) for k, v in row.items()} for row in batch])

    made = (
        kind(tiny_gpt2(), plain(tmp_path / kind.__name__), train_dataset=found, data_collator=collate)
        for kind in (Trainer, ContinualTrainer)
    )
    assert_same(*map(trained, made))


@SLOW
def test_a_model_with_a_loss_of_its_own_is_trained_by_it(tmp_path):
    def build():
        torch.manual_seed(0)
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": 0, "num_labels": 3}
        return GPT2ForSequenceClassification(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=97, **off))

    class Classes(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return {"input_ids": torch.arange(1 + i, 7 + i), "labels": i % 3}

    made = (
        kind(build(), plain(tmp_path / kind.__name__), train_dataset=Classes(), eval_dataset=Classes())
        for kind in (Trainer, ContinualTrainer)
    )
    stock, ours = map(trained, made)
    assert_same(stock, ours)
    assert ours.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], abs=1e-5)


class Shifted(Samples):
    pass


class Unshifted(Samples):
    """The same 17 tokens, labels at the positions: 16 are scored."""

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        ids = torch.cat([sample["input_ids"], sample["labels"][-1:]])
        return {"input_ids": ids, "labels": ids}


class Half(Samples):
    def __getitem__(self, i):
        sample = super().__getitem__(i)
        labels = sample["labels"].clone()
        labels[: 3 * (i % 5)] = IGNORED  # rows differ in how many are scored
        return {**sample, "labels": labels}


def test_labels_at_positions_and_after_them_are_told_apart(tmp_path):
    runs = {}
    for kind in (Shifted, Unshifted):
        args = arguments(tmp_path / kind.__name__, save_strategy="no", max_steps=4)
        trainer = ContinualTrainer(tiny_gpt2(), args, kind())
        trainer.train()
        runs[kind] = losses(trainer)
    assert runs[Shifted] == pytest.approx(runs[Unshifted], abs=1e-6)
    sample = Samples()[0]
    assert labels_are_shifted({k: v[None] for k, v in sample.items()}) is True
    assert labels_are_shifted({k: v[None] for k, v in Unshifted()[0].items()}) is False
    same = torch.zeros(1, 5, dtype=torch.long)
    assert labels_are_shifted({"input_ids": same, "labels": same}) is None
    assert labels_are_shifted({"input_ids": same + 1, "labels": same}) is None


def test_masked_labels_are_left_out_of_the_divisor(tmp_path):
    trainer = ContinualTrainer(tiny_gpt2(), arguments(tmp_path, max_steps=1, save_strategy="no"), Half())
    trainer.train()
    batch = [Half()[i] for i in range(6)]
    ids, labels = (torch.stack([b[k] for b in batch]) for k in ("input_ids", "labels"))
    right = F.cross_entropy(tiny_gpt2()(ids).logits.flatten(0, 1), labels.flatten())
    assert losses(trainer) == [pytest.approx(right.item(), abs=1e-6)]


def _masked_rank(rank, world, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # transformers looks whether they are set
    args = arguments(folder, save_strategy="no", max_steps=4, gradient_accumulation_steps=3 // world or 1)
    trainer = ContinualTrainer(tiny_gpt2(), args, Half())
    trainer.train()
    return losses(trainer)


@SLOW
def test_ranks_divide_by_the_scored_tokens_of_all(tmp_path):
    from support.ranks import run_ranks

    args = arguments(tmp_path / "one", save_strategy="no", max_steps=4, gradient_accumulation_steps=2)
    one = ContinualTrainer(tiny_gpt2(), args, Half())
    one.train()
    found = run_ranks(2, _masked_rank, tmp_path, str(tmp_path / "two"))
    assert found[0] == pytest.approx(losses(one), abs=1e-6) and found[0] == found[1]


# ---- evaluation

TOKENS = torch.randint(0, 97, (301,), generator=torch.Generator().manual_seed(5))


def test_evaluation_of_datasets_and_of_evaluation_sets(tmp_path):
    seen = []

    def measure(found):
        logits, labels = torch.tensor(found.predictions)[:, :-1], torch.tensor(found.label_ids)[:, 1:]
        seen.append((found, int((labels != IGNORED).sum())))
        return {"nll": F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED).item()}

    stock = Trainer(tiny_gpt2(), plain(tmp_path / "a"), eval_dataset=Rows(), data_collator=padded)
    ours = ContinualTrainer(
        tiny_gpt2(), plain(tmp_path / "b"), evaluation_sets={"c": EvaluationSet(TOKENS, 900)},
        eval_dataset=Rows(), data_collator=padded, compute_metrics=measure,
    )  # fmt: skip
    ours.args.eval_context = 16
    ours.log({"loss": 1.0})  # before training there is no speed and no share of a phase
    found = ours.evaluate()
    exact = perplexity(tiny_gpt2(), TOKENS, context=16)
    assert found["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], abs=1e-6)
    assert found["eval_c_nll"] != found["eval_nll"] and len(seen) == 2
    assert seen[0][1] == 300  # each token after the first, once
    assert found["eval_c_loss"] == pytest.approx(math.log(97), abs=0.3)
    assert exact.tokens == found["eval_c_tokens"]
    predicted = ours.predict(Rows())
    assert predicted.metrics["test_loss"] == pytest.approx(found["eval_loss"], abs=1e-6)
    assert np.allclose(predicted.predictions, stock.predict(Rows()).predictions, atol=1e-5)
    other = EvaluationSet(TOKENS[:50])
    assert ours.evaluate(other)["eval_tokens"] < found["eval_c_tokens"]
    mixed = ours.evaluate({"d": other, "rows": Rows(4)})
    assert {"eval_d_nll", "eval_rows_loss"} <= set(mixed) and "eval_c_nll" not in mixed
    assert "eval_c_nll" in ours.evaluate("c")


def test_evaluation_sets_may_stand_among_the_eval_datasets(tmp_path):
    both_kinds = {"c": EvaluationSet(TOKENS), "rows": Rows()}
    args = plain(tmp_path, eval_strategy="epoch", logging_strategy="epoch")
    trainer = ContinualTrainer(tiny_gpt2(), args, Rows(), eval_dataset=both_kinds, data_collator=padded, callbacks=None)
    trainer.train()
    history = trainer.state.log_history
    assert [e["step"] for e in history if "eval_c_nll" in e] == [3, 6]
    assert [e["step"] for e in history if "eval_rows_loss" in e] == [3, 6]
    assert [e["step"] for e in history if "loss" in e] == [3, 6]


def test_data_evaluated_may_have_other_labels_than_the_training_set(tmp_path):
    stock = Trainer(tiny_gpt2(), plain(tmp_path / "a"), eval_dataset=Rows(), data_collator=padded)
    still = {"save_strategy": "no", "max_steps": 4, "learning_rate": 1e-30, "lr_scheduler_kwargs": {"min_lr": 0.0}}
    args = arguments(tmp_path / "b", eval_strategy="steps", eval_steps=2, **still)
    ours = ContinualTrainer(
        tiny_gpt2(), args, Shifted(), eval_dataset=Rows(),
        data_collator=lambda rows: padded(rows) if len(rows[0]["labels"]) < 16 else default_data_collator(rows),
    )  # fmt: skip
    ours.train()
    measured = [e["eval_loss"] for e in ours.state.log_history if "eval_loss" in e]
    assert measured == [pytest.approx(stock.evaluate()["eval_loss"], abs=1e-4)] * 2
    plain_run = train(tiny_gpt2(), tmp_path / "c", **still)
    assert losses(ours) == pytest.approx(losses(plain_run), abs=1e-6)


# ---- checkpoints


class Spoil(TrainerCallback):
    """Make the model worse after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == self.step:
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn_like(p))


def test_the_best_model_is_there_at_the_end_and_its_checkpoint_by_its_name(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 8, "eval_context": 16}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "c_nll"}
    args = arguments(tmp_path, save_total_limit=2, **settings, **best)
    trainer = ContinualTrainer(tiny_gpt2(), args, Samples(), {"c": EvaluationSet(TOKENS)}, [Spoil(3)])
    trainer.train()
    measured = {e["step"]: e["eval_c_nll"] for e in trainer.state.log_history if "eval_c_nll" in e}
    first = min(measured, key=measured.get)
    assert trainer.evaluate()["eval_c_nll"] == pytest.approx(measured[first], rel=1e-9)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{first}")
    assert [step for _, step in checkpoints(tmp_path)] == sorted({first, 8})
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / f"checkpoint-{first}")


def test_the_best_that_was_saved_stays_where_a_better_step_was_not(tmp_path):
    """Step 3 is better than step 2, and not one that is saved; all later ones are worse."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 2, "max_steps": 6, "eval_context": 16}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "c_nll"}
    args = arguments(tmp_path, save_total_limit=1, **settings, **best)
    trainer = ContinualTrainer(tiny_gpt2(), args, Samples(), {"c": EvaluationSet(TOKENS)}, [Spoil(1), Spoil(4)])
    trainer.train()
    measured = {e["step"]: e["eval_c_nll"] for e in trainer.state.log_history if "eval_c_nll" in e}
    assert min(measured, key=measured.get) == 3 and measured[2] < min(measured[step] for step in (4, 5, 6))
    assert trainer.evaluate()["eval_c_nll"] == pytest.approx(measured[2], rel=1e-9)


@pytest.mark.parametrize("metric", ["c_nll", "c_perplexity", "c_bits_per_byte"])
def test_less_is_better_of_what_is_measured(metric, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "metric_for_best_model": metric}
    assert arguments(tmp_path, **settings).greater_is_better is False
    given = arguments(tmp_path, greater_is_better=True, **settings)
    with pytest.raises(UserError, match="greater_is_better"):
        ContinualTrainer(tiny_gpt2(), given, Samples(), {"c": EvaluationSet(TOKENS)})


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"save_total_limit": 2}, [4, 6]),
        pytest.param({"save_total_limit": 9}, [2, 4, 6], marks=SLOW),
        pytest.param({"save_total_limit": 0}, [2, 4, 6], marks=SLOW),
        ({"save_strategy": "no"}, []),
        ({"save_strategy": "no", "keep_steps": [5]}, [5]),
        ({"keep_last": 2}, [4, 6]),
    ],
)
def test_the_checkpoints_that_were_asked_for_are_there_and_no_others(settings, steps, tmp_path):
    train(tiny_gpt2(), tmp_path, max_steps=6, save_steps=2, gradient_accumulation_steps=1, **settings)
    assert [step for _, step in checkpoints(tmp_path)] == steps


def test_data_in_epochs_go_on_where_they_stopped(tmp_path):
    dropout = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}

    def run(folder, resume=None, **changes):
        args = plain(folder, **{"save_strategy": "steps", "save_steps": 9, **changes})
        trainer = ContinualTrainer(tiny_gpt2(**dropout), args, Rows(), data_collator=padded)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run(tmp_path / "whole", save_steps=1)
    assert [n for _, n in checkpoints(tmp_path / "whole")] == [1, 2, 3, 4, 5, 6]  # as `Trainer`, which keeps all
    for step in (2, 3, 4):  # in the first epoch, between two, in the second
        resume = str(tmp_path / "whole" / f"checkpoint-{step}")
        resumed = run(tmp_path / f"from-{step}", resume)
        assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
        assert whole.hash_of_batches() == resumed.hash_of_batches()


class Noting(Samples):
    def __init__(self):
        self.read = []

    def __getitem__(self, i):
        self.read.append(i)
        return super().__getitem__(i)


def test_true_goes_on_from_the_newest_whole_checkpoint_and_another_batch_size_from_the_same_sample(tmp_path, capsys):
    train(tiny_gpt2(), tmp_path, save_steps=2, max_steps=4, keep_last=2)
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_bytes(b"cut")
    data = Noting()
    args = arguments(tmp_path, max_steps=4, gradient_accumulation_steps=2, dataloader_num_workers=0)
    trainer = ContinualTrainer(tiny_gpt2(seed=3), args, data)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4 and data.read[-8:] == [*range(12, 20)]
    said = capsys.readouterr().err
    assert "checkpoint-4 is skipped: optimizer.pt" in said and "4 samples a step instead of 6" in said


def test_what_cannot_be_gone_on_from_is_refused(tmp_path):
    def resume(folder, **changes):
        return train(tiny_gpt2(), tmp_path / "again", resume=folder, **changes)

    with pytest.raises(UserError, match=r"resume_from_checkpoint='/nowhere' does not exist"):
        resume("/nowhere")
    with pytest.raises(UserError, match=r"holds no checkpoint; leave it out"):
        resume(True)
    trainer = Trainer(tiny_gpt2(), plain(tmp_path / "stock", max_steps=1, save_strategy="steps"), padded, Rows())
    trainer.train()
    with pytest.raises(UserError, match="is no checkpoint of a ContinualTrainer"):
        resume(str(tmp_path / "stock" / "checkpoint-1"))
    train(tiny_gpt2(), tmp_path / "weights", save_only_model=True, max_steps=2)
    with pytest.raises(UserError, match="save_only_model"):
        resume(str(tmp_path / "weights" / "checkpoint-2"))
    train(tiny_gpt2(), tmp_path / "whole", max_steps=2)
    folder = tmp_path / "whole" / "checkpoint-2"
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"is damaged: model\.safetensors is not what was written"):
        resume(str(folder))
    assert not (tmp_path / "again" / "checkpoint-12").exists()


def test_a_second_training_begins_again_and_a_model_is_made_anew(tmp_path):
    args = arguments(tmp_path, save_strategy="no", max_steps=3, eval_on_start=True, eval_strategy="steps", eval_steps=9)
    trainer = ContinualTrainer(None, args, Samples(), {"c": EvaluationSet(TOKENS)}, model_init=lambda: tiny_gpt2())
    trainer.train()
    first, batches = losses(trainer), trainer.hash_of_batches()
    trainer.train()
    assert losses(trainer) == first and trainer.hash_of_batches() == batches and args.eval_on_start


# ---- what is refused, and how

REFUSED = [
    ({"max_steps": -1, "num_train_epochs": 2}, {}, "max_steps=-1.*num_train_epochs"),
    ({"eval_strategy": "steps", "eval_steps": 2}, {}, "eval_strategy='steps'.*give evaluation_sets or an eval_dataset"),
    ({"save_strategy": "epoch"}, {}, "save_strategy='epoch'.*use 'steps'"),
    ({"logging_strategy": "epoch"}, {}, "logging_strategy='epoch'"),
    ({"train_sampling_strategy": "group_by_length"}, {}, "train_sampling_strategy='group_by_length'"),
    ({"train_sampling_strategy": "sequential"}, {"train_dataset": Stream()}, "an order of its own"),
    ({"ignore_data_skip": True}, {}, "ignore_data_skip=True"),
    ({"optim": "galore_adamw_layerwise", "optim_target_modules": ["mlp"]}, {}, "optim='galore_adamw_layerwise'.*back"),
    ({"optim": "lomo"}, {}, "optim='lomo'.*backward"),
    ({"bf16_full_eval": True}, {}, "bf16_full_eval=True.*eval_precision"),
    ({"use_liger_kernel": True}, {}, "use_liger_kernel=True"),
    ({"save_on_each_node": True}, {}, "save_on_each_node"),
    ({"label_names": ["targets"]}, {}, "label_names"),
    ({"accelerator_config": {"split_batches": True}}, {}, "accelerator_config.*split_batches"),
    ({"keep_best": True}, {}, "keep_best=True.*best_corpora"),
    ({"muon": True}, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1.0})}, "muon=True"),
    ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 4},
     {"evaluation_sets": {"c": EvaluationSet(TOKENS)}}, r"metric_for_best_model='loss'.*Measured are c_nll"),
    ({}, {"train_dataset": default_data_collator}, "data_collator and others are given by name"),
    ({}, {"evaluation_sets": {"c": Rows()}}, r"\['c'\] are no EvaluationSets"),
    ({}, {"tokenizer": None}, "no parameter 'tokenizer'; a tokenizer is processing_class"),
    ({}, {"model_init": tiny_gpt2}, "a model or a model_init"),
    ({"load_best_model_at_end": True, "save_strategy": "no"}, {}, "load_best_model_at_end=True: without evaluations"),
    ({"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3}, {}, "round multiple"),
    ({"save_total_limit": 2, "keep_last": 3}, {}, "say the same twice"),
    ({"nonfinite": "ignore"}, {}, "must be one of halt, skip"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "given", "message"), REFUSED, ids=[message for *_, message in REFUSED])
def test_an_option_that_would_not_be_done_is_refused_by_its_name(settings, given, message, tmp_path):
    with pytest.raises(UserError, match=message):
        ContinualTrainer(tiny_gpt2(), arguments(tmp_path / "out", **settings), **{"train_dataset": Samples(), **given})
    assert not (tmp_path / "out").exists()


class Ending(Samples):
    def __getitem__(self, i):
        if i >= 20:
            raise IndexError("list index out of range")
        return super().__getitem__(i)


class Unlabelled(Samples):
    def __getitem__(self, i):
        return {"input_ids": super().__getitem__(i)["input_ids"]}


class Unrelated(Samples):
    def __getitem__(self, i):
        sample = super().__getitem__(i)
        return {**sample, "labels": sample["labels"].flip(0)}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Ending(), r"ends before max_steps=12, which reads samples 0 to 71.*__len__"),
        (Unlabelled(), "has no labels, only input_ids.*DataCollatorForLanguageModeling"),
        (Unrelated(), "Set labels_shifted"),
        (None, "there is no train_dataset"),
    ],
)
def test_data_that_are_not_what_was_said(data, message, tmp_path):
    trainer = ContinualTrainer(tiny_gpt2(), arguments(tmp_path), data)
    with pytest.raises(UserError, match=message):
        trainer.train()


def test_what_is_asked_of_a_trainer_in_vain_is_refused(tmp_path):
    trainer = ContinualTrainer(tiny_gpt2(), arguments(tmp_path), Samples(), compute_loss_func=lambda *_, **__: None)
    with pytest.raises(UserError, match="compute_loss_func returned None"):
        trainer.train()
    with pytest.raises(UserError, match="there is nothing to measure"):
        trainer.evaluate()
    with pytest.raises(UserError, match="fire-llm sweep"):
        trainer.hyperparameter_search()
    with pytest.raises(UserError, match="is no TrainingArguments"):
        ContinualTrainer(tiny_gpt2(), {"output_dir": "x"}, Samples())
    dash = ContinualTrainer(tiny_gpt2(), plain(tmp_path), Rows(), None, [ResetCallback("dash")], data_collator=padded)
    with pytest.raises(UserError, match="batches to come by their number"):
        dash.train()


def test_a_bar_is_shown_unless_it_is_switched_off_and_nothing_of_trainers_own(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fire_llm.training.progress.BAR_DELAY", 0.0)
    monkeypatch.setattr("fire_llm.training.progress.interactive", lambda: True)
    for off in (False, True):
        train(tiny_gpt2(), tmp_path / str(off), save_strategy="no", max_steps=3, disable_tqdm=off)
        captured = capsys.readouterr()
        assert ("3/3" in captured.err) is not off and captured.out == ""


# ---- the tables


def test_every_option_parameter_and_method_of_the_installed_trainer_is_in_the_tables():
    """A new version of transformers may bring some: say in training/contract.py what becomes of them."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert known - set(OPTIONS) == set()
    assert set(OWN_OPTIONS) <= {field.name for field in dataclasses.fields(ContinualArguments)} - known
    assert set(inspect.signature(Trainer.__init__).parameters) - {"self"} - set(PARAMETERS) == set()
    assert {name for name in dir(Trainer) if not name.startswith("_")} - set(METHODS) == set()


@pytest.mark.skipif(not hasattr(TrainingArguments, "activation_checkpointing"), reason="the page is of a later version")
def test_the_page_is_what_the_tables_say():
    spec = importlib.util.spec_from_file_location("write_trainer_page", ROOT / "scripts" / "write_trainer_page.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
    assert page == script.page(page), "run `make schema`"
