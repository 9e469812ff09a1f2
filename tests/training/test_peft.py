"""Adapters of PEFT under ContinualTrainer: trained, saved, gone on with and measured as under Trainer."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from support.models import tiny_gpt2, tiny_llama
from support.training import Samples, arguments, losses
from transformers import Trainer, TrainingArguments

from fire_llm import ContinualTrainer, ResetCallback, UserError, fire_, perplexity
from fire_llm.training import EvaluationSet

peft = pytest.importorskip("peft")
# PEFT itself still uses the name that transformers is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
TOKENS = torch.randint(0, 97, (201,), generator=torch.Generator().manual_seed(5))


class Sized(Samples):
    """Eight rows of 17 tokens; labels at the positions, as `Trainer` has them, but for the prompt's."""

    def __len__(self):
        return 8

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        ids = torch.cat([sample["input_ids"], sample["labels"][-1:]])
        return {"input_ids": ids, "labels": torch.cat([torch.tensor([-100, -100]), ids[2:]])}


def adapted(build=tiny_llama, seed=0):
    torch.manual_seed(seed)
    base = build()
    torch.manual_seed(1)
    names = ["c_attn"] if build is tiny_gpt2 else ["q_proj", "up_proj"]
    settings = {"target_modules": names, "task_type": "CAUSAL_LM", "fan_in_fan_out": build is tiny_gpt2}
    return peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, **settings))


def plain(folder, **changes):
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "num_train_epochs": 2, "learning_rate": 1e-2,
        "logging_steps": 1, "save_steps": 4, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "dataloader_pin_memory": False, "weight_decay": 0.0,
    }  # fmt: skip
    return TrainingArguments(**{**settings, **changes})


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_adapters_are_trained_and_saved_as_by_trainer(build, tmp_path):
    pair = {}
    for kind in (Trainer, ContinualTrainer):
        trainer = kind(adapted(build), plain(tmp_path / kind.__name__), train_dataset=Sized(), eval_dataset=Sized())
        trainer.train()
        trainer.save_model(str(tmp_path / kind.__name__ / "end"))
        pair[kind] = trainer
    stock, ours = pair[Trainer], pair[ContinualTrainer]
    assert losses(ours) == pytest.approx(losses(stock), abs=2e-5) and losses(ours)[-1] < losses(ours)[0]
    assert ours.evaluate()["eval_loss"] == pytest.approx(stock.evaluate()["eval_loss"], abs=1e-5)
    for place in ("end", "checkpoint-8"):
        one, other = (tmp_path / kind.__name__ / place for kind in (Trainer, ContinualTrainer))
        a, b = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
        assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
        configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (one, other)]
        assert configs[0] == configs[1] and not (other / "model.safetensors").exists()
        theirs = {p.name for p in one.iterdir()}
        assert theirs <= {p.name for p in other.iterdir()}
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path / "ContinualTrainer" / "end")
    ids = TOKENS[None, :16]
    assert torch.allclose(loaded(ids).logits, ours.model.eval()(ids).logits, atol=1e-5)


def test_a_resumed_adapter_ends_bitwise_where_the_uninterrupted_one_does(tmp_path):
    sets = {"c": EvaluationSet(TOKENS)}
    measured = {"eval_strategy": "steps", "eval_steps": 4, "eval_context": 16}
    whole = ContinualTrainer(adapted(), arguments(tmp_path / "a", keep_steps=[4], **measured), Samples(), sets)
    whole.train()
    model = adapted(seed=0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)  # what is resumed does not matter
    again = ContinualTrainer(model, arguments(tmp_path / "b", **measured), Samples(), sets)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert again.hash_of_batches() == whole.hash_of_batches()
    found = again.evaluate()["eval_c_nll"]
    assert found == pytest.approx(perplexity(again.model.merge_and_unload(), TOKENS, context=16).nll, abs=1e-5)


def test_the_best_adapter_is_there_at_the_end(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "c_nll", "save_steps": 2, "max_steps": 6}
    measured = {"eval_strategy": "steps", "eval_steps": 2, "eval_context": 16, "learning_rate": 0.3}
    args = arguments(tmp_path, **best, **measured)
    trainer = ContinualTrainer(adapted(), args, Samples(), {"c": EvaluationSet(TOKENS)})
    trainer.train()
    found = [e["eval_c_nll"] for e in trainer.state.log_history if "eval_c_nll" in e]
    assert trainer.evaluate()["eval_c_nll"] == pytest.approx(min(found), rel=1e-6)


def test_logits_are_taken_in_slices_behind_an_adapter_too(tmp_path, monkeypatch, capsys):
    """And of a base that was reset before the adapter was put on it."""
    runs = {}
    for whole in (2**27, 0):
        monkeypatch.setattr("fire_llm.training.loss.WHOLE", whole)
        monkeypatch.setattr("fire_llm.training.loss.SLICE", 97 * 10)
        model = adapted(lambda: (base := tiny_llama(), fire_(base))[0])
        trainer = ContinualTrainer(model, arguments(tmp_path, max_steps=4, save_strategy="no"), Samples())
        trainer.train()
        runs[whole] = losses(trainer)
    assert runs[0] == pytest.approx(runs[2**27], abs=1e-5)
    assert "held whole" not in capsys.readouterr().err


def test_adapters_that_lengthen_the_text_are_refused(tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UserError, match=r"PeftModelForCausalLM: .*before the text is refused"):
        ContinualTrainer(peft.get_peft_model(tiny_llama(), config), arguments(tmp_path), Samples())


def test_a_reset_is_not_applied_to_adapters(tmp_path):
    trainer = ContinualTrainer(adapted(), arguments(tmp_path), Samples(), None, [ResetCallback("fire")])
    with pytest.raises(UserError, match=r"Reset the base .*: fire_\(model\), then get_peft"):
        trainer.train()
    assert not (tmp_path / "checkpoint-4").exists()
    with pytest.raises(UserError, match="belongs to an adapter"):
        ContinualTrainer(adapted(), arguments(tmp_path, muon=True), Samples()).train()
