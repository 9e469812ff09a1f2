"""Recipes with new models of any architecture, and the keys of how a model is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.tiny_recipe import quick_recipe
from support.training import Samples, arguments
from transformers import Trainer, TrainerCallback

from fire_llm import ContinualTrainer, UserError, load_recipe, run_recipe
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.estimate import plan
from fire_llm.experiment.stages import expand
from fire_llm.experiment.train import starting_model, train

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
LLAMA = {"architecture": "llama", "context": 16, **SIZES, "num_key_value_heads": 2}
FIRST, FIRE = Path("first") / "seed-1", Path("second") / "fire" / "seed-1"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("quick")
    return yaml.safe_load(quick_recipe(folder).read_text())


def weights(stage: Path) -> dict[str, torch.Tensor]:
    return load_file(max(stage.glob("checkpoint-*"), key=lambda p: int(p.name[11:])) / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logged(stage: Path, key: str) -> list[float]:
    last = max(stage.glob("checkpoint-*"), key=lambda p: int(p.name[11:]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def run(data: dict, folder: Path, **changes) -> Path:
    run_recipe(load_recipe({**data, **changes}), folder, progress=False)
    return folder


# ---- architectures


@pytest.mark.parametrize(
    "model",
    [
        LLAMA,
        {"architecture": "qwen3", "context": 16, "config": {**SIZES, "head_dim": 8, "num_key_value_heads": 2}},
        {**LLAMA, "architecture": "mixtral", "num_local_experts": 4},
        {"architecture": "opt", "context": 16, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48,
         "num_hidden_layers": 2, "num_attention_heads": 4},
    ],
    ids=lambda model: model["architecture"],
)  # fmt: skip
def test_a_recipe_trains_and_resets_any_architecture(model, data, tmp_path):
    recipe = load_recipe({**data, "model": model})
    said = plan(recipe, tmp_path / "run")["model"]
    run_recipe(recipe, tmp_path / "run", progress=False)
    count = sum(t.numel() for t in weights(tmp_path / "run" / FIRST).values()) / 1e6
    if model["architecture"] != "opt":  # whose head is the embedding
        assert said.endswith(f"vocabulary 320, {count:.2f} M parameters")
    config = json.loads(next((tmp_path / "run" / FIRE).glob("checkpoint-3/config.json")).read_text())
    assert (config["vocab_size"], config["max_position_embeddings"], config["pad_token_id"]) == (320, 16, None)
    reset = json.loads((tmp_path / "run" / FIRE / "reset.json").read_text())
    assert {row["role"] for row in reset["touched"]} == {"attention", "mlp"} and reset["touched"]


def test_the_end_of_text_is_learned_in_every_phase(data, tmp_path):
    """A tokenizer's padding token may be its end of text, and torch trains no embedding of padding."""
    folder = run(data, tmp_path / "run", model={**LLAMA, "tie_word_embeddings": False})
    eos = json.loads((folder / FIRST / "checkpoint-4" / "config.json").read_text())["eos_token_id"]
    one, other = weights(folder / FIRST), weights(folder / FIRE)
    row = "model.embed_tokens.weight"
    assert bool((one[row][eos] != 0).any()) and not torch.equal(one[row][eos], other[row][eos])


def test_a_config_of_a_file_is_known_by_what_it_holds(data, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"model_type": "llama", "vocab_size": 320, "num_key_value_heads": 2, **SIZES}))
    model = {"config": str(file), "context": 16}
    folder = run(data, tmp_path / "run", model=model, phases=[{**data["phases"][0], "steps": 2, "keep": []}])
    file.write_text(file.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    with pytest.raises(UserError, match="was begun with other files") as error:
        run(data, folder, model=model, phases=[{**data["phases"][0], "steps": 2, "keep": []}])
    assert "model: mine.json has changed" in str(error.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"architecture": "llama", "preset": "gpt-tiny"}, "preset and architecture are given"),
        ({"architecture": "llama", "config": "x/y"}, "architecture and config are given"),
        ({"config": {"hidden_size": 3}}, "model: give one of preset, checkpoint, architecture, and config as a path"),
        ({"config": "nowhere/config.json"}, "model.config: there is no file 'nowhere/config.json'"),
        ({"architecture": "llma"}, "Did you mean 'llama'?"),
        ({"preset": "gpt-tiny", "hidden_size": 3}, "model.hidden_size: unknown key"),
        ({"architecture": "llama", "hidden_size": 3, "config": {"hidden_size": 4}}, "model.hidden_size: unknown key"),
        ({"architecture": "llama", "contxt": 16}, "LlamaConfig has no attribute 'contxt'"),
        ({"architecture": "mamba", "context": 16, "dropout": 0.1}, "MambaConfig has no dropout"),
        ({**LLAMA, "vocab_size": 64}, "the tokenizer has 280 tokens and the model's embedding 64 rows"),
    ],
)
def test_models_that_cannot_be_are_told_by_check(model, message, data):
    with pytest.raises(UserError) as error:
        plan(load_recipe({**data, "model": model}))
    assert message in str(error.value)


def test_a_checkpoint_takes_what_changes_no_shape_of_its_config(data, tmp_path):
    short = [{**data["phases"][0], "steps": 2, "keep": []}]
    given = run(data, tmp_path / "one", model=LLAMA, phases=short) / FIRST / "checkpoint-2"
    model = {"checkpoint": str(given), "context": 16}
    with pytest.raises(UserError, match=r"num_hidden_layers would change 9 of the checkpoint's tensors, 'model.layers"):
        plan(load_recipe({**data, "model": {**model, "config": {"num_hidden_layers": 3}}, "tokenizer": None}))
    model["config"] = {"rms_norm_eps": 0.5}
    found = {key: value for key, value in {**data, "model": model, "phases": short}.items() if key != "tokenizer"}
    run_recipe(load_recipe(found), tmp_path / "two", progress=False)
    assert json.loads((tmp_path / "two" / FIRST / "checkpoint-2" / "config.json").read_text())["rms_norm_eps"] == 0.5
    start = starting_model(
        expand(RunContext(load_recipe(found), tmp_path / "three"))[0], RunContext(load_recipe(found))
    )
    assert start.model.norm.variance_epsilon == 0.5
    assert logged(tmp_path / "two" / FIRST, "eval_a_nll")[0] != logged(tmp_path / "one" / FIRST, "eval_a_nll")[-1]


# ---- what a stage is


def test_a_recipe_without_new_keys_is_what_it_was(data, tmp_path):
    """The digests of stages that were begun with an earlier version are found again."""
    plain = expand(RunContext(load_recipe(data), tmp_path))[0].spec
    assert plain["model"] == {**data["model"], "preset": "gpt-tiny", "checkpoint": None}
    assert list(plain["optimizer"]) == [
        "name", "lr", "min_lr", "warmup", "max_warmup_steps", "weight_decay", "betas", "clip", "muon_lr",
        "muon_momentum", "schedule", "decay", "decay_shape", "cooldown", "constant_lr",
    ]  # fmt: skip
    assert set(plain) == {
        "tokenizer", "model", "batch", "evaluate", "log_every_steps", "precision", "optimizer", "phase", "corpora",
        "seed", "resets", "start",
    }  # fmt: skip
    same = {"gradient_checkpointing": True, "attention": "auto", "sync_each_batch": True, "reduce_precision": "fp32"}
    assert expand(RunContext(load_recipe({**data, **same}), tmp_path))[0].spec == plain
    model = {**data["model"], "dropout": 0.1}
    optimizer = {**data["optimizer"], "eps": 1e-6, "neftune": 5.0}
    given = {"model": model, "attention": "eager", "optimizer": optimizer, "reduce_precision": "bf16"}
    spec = expand(RunContext(load_recipe({**data, **given}), tmp_path))[0].spec
    assert spec["reduce_precision"] == "bf16"
    assert (spec["model"]["dropout"], spec["attention"]) == (0.1, "eager")
    assert (spec["optimizer"]["eps"], spec["optimizer"]["neftune"]) == (1e-6, 5.0)


# ---- how it is trained


class Seen(TrainerCallback):
    """Count the passes through a model's first MLP, and note its attention."""

    def __init__(self) -> None:
        self.passes, self.attention = 0, set()

    def on_train_begin(self, args, state, control, model=None, **_):
        def count(module, _):
            self.passes += module.training
            self.attention.add(model.config._attn_implementation)

        model.transformer.h[0].mlp.register_forward_pre_hook(count)


def trained(data, folder, **changes) -> Seen:
    found = RunContext(load_recipe({**data, **changes}), folder)
    seen = Seen()
    train(expand(found)[0], found, [seen])
    return seen


def test_checkpointed_activations_give_the_same_weights(data, tmp_path):
    plain = trained(data, tmp_path / "plain")
    again = trained(data, tmp_path / "again", gradient_checkpointing=True)
    assert again.passes == 2 * plain.passes > 0
    assert same(tmp_path / "plain" / FIRST, tmp_path / "again" / FIRST)
    with pytest.raises(UserError, match="gradient_checkpointing: layers would be computed again from parameters in"):
        load_recipe({**data, "gradient_checkpointing": True, "precision": "bf16-params"})


def test_attention_is_the_one_asked_for(data, tmp_path):
    plain, eager = trained(data, tmp_path / "plain"), trained(data, tmp_path / "eager", attention="eager")
    assert eager.attention == {"eager"} and "eager" not in plain.attention
    one, other = weights(tmp_path / "plain" / FIRST), weights(tmp_path / "eager" / FIRST)
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)
    with pytest.raises(UserError, match="attention: 'flash_attention_2' cannot be had"):
        run_recipe(load_recipe({**data, "attention": "flash_attention_2"}), tmp_path / "flash", progress=False)
    assert not (tmp_path / "flash").exists()


def test_dropout_is_in_training_alone_and_resumes_exactly(data, tmp_path):
    model, optimizer = {**data["model"], "dropout": 0.3}, {**data["optimizer"], "neftune": 8.0}
    phases = [{**data["phases"][0], "keep": [2]}]
    whole = run(data, tmp_path / "whole", model=model, optimizer=optimizer, phases=phases)
    plain = run(data, tmp_path / "plain", phases=phases)
    assert not same(whole / FIRST, plain / FIRST)
    assert logged(whole / FIRST, "eval_a_nll")[0] == logged(plain / FIRST, "eval_a_nll")[0]
    shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / FIRST / "checkpoint-4")
    cut = run(data, tmp_path / "cut", model=model, optimizer=optimizer, phases=phases)
    assert same(cut / FIRST, whole / FIRST)
    assert logged(cut / FIRST, "loss") == logged(whole / FIRST, "loss")


class Unshifted(torch.utils.data.Dataset):
    """The samples as `Trainer` wants them, in their order: labels that it shifts itself."""

    def __len__(self):
        return 72

    def __getitem__(self, i):
        sample = Samples()[i]
        tokens = torch.cat([sample["input_ids"], sample["labels"][-1:]])
        # `Trainer` counts the first label too, which it never predicts.
        return {"input_ids": tokens, "labels": torch.cat([torch.tensor([-100]), tokens[1:]])}


def test_neftune_and_epsilon_are_those_of_transformers(tmp_path):
    """Its own `Trainer` on the same batches, by AdamW with a large epsilon, ends with the same weights."""
    from support.models import tiny_gpt2
    from transformers import TrainingArguments

    options = {"neftune_noise_alpha": 6.0, "adam_epsilon": 1e-3, "max_steps": 4, "gradient_accumulation_steps": 1,
               "save_strategy": "no", "weight_decay": 0.0}  # fmt: skip
    ours = ContinualTrainer(tiny_gpt2(), arguments(tmp_path / "ours", **options), Unshifted())
    ours.train()
    plain = TrainingArguments(
        str(tmp_path / "theirs"), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-3}, warmup_steps=3, adam_beta2=0.95,
        optim="adamw_torch", report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
        neftune_noise_alpha=6.0, adam_epsilon=1e-3, save_strategy="no",
    )  # fmt: skip
    theirs = Trainer(tiny_gpt2(), plain, train_dataset=Unshifted())  # which seeds the noise
    theirs.train()
    for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
    without = ContinualTrainer(
        tiny_gpt2(), arguments(tmp_path / "no", **{**options, "neftune_noise_alpha": None}), Unshifted()
    )
    without.train()
    assert not torch.allclose(without.model.transformer.wte.weight, theirs.model.transformer.wte.weight, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "key", "value", "ok"),
    [("sgd", "eps", 1e-6, False), ("adagrad", "eps", 1e-6, False), ("adamw", "eps", 1e-6, True),
     ("muon", "eps", 1e-6, True), ("sgd", "neftune", 5.0, True)],
)  # fmt: skip
def test_keys_that_an_optimizer_lacks_are_told(name, key, value, ok, data):
    found = {**data, "optimizer": {"name": name, key: value}}
    if ok:
        section = load_recipe(found).optimizer
        told = section.arguments(10)
        assert told[{"eps": "adam_epsilon", "neftune": "neftune_noise_alpha"}[key]] == value
    else:
        with pytest.raises(UserError, match=f"optimizer.eps: '{name}' has none; remove the key"):
            load_recipe(found)
