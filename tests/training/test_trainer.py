"""The trainer against a loop written by hand, and against itself uninterrupted."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from support.models import tiny_gpt2, tiny_llama
from support.training import ACCUMULATION, MICRO, STEPS, Samples, arguments, by_hand, losses, train
from transformers import Trainer, TrainingArguments
from transformers.utils.import_utils import enable_tf32

from fire_llm import ContinualTrainer, ResetCallback, UserError, fire_, logical_matrices, perplexity
from fire_llm.core.atomic import checkpoints
from fire_llm.training import EvaluationSet, hash_batch
from fire_llm.training.throughput import MEASURES
from fire_llm.training.trainer import coarse_weights


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_reported_losses_equal_a_hand_written_loop(build, tmp_path):
    """12 steps of accumulation, clipping, decay, warm-up and cosine: every step's loss, so the weights too."""
    trainer = train(build(), tmp_path)
    assert losses(trainer) == pytest.approx(by_hand(build()), abs=1e-6)


def test_accumulation_does_not_change_the_trajectory(tmp_path):
    whole = train(tiny_gpt2(), tmp_path / "a", per_device_train_batch_size=6, gradient_accumulation_steps=1)
    split = train(tiny_gpt2(), tmp_path / "b", per_device_train_batch_size=1, gradient_accumulation_steps=6)
    assert losses(whole) == pytest.approx(losses(split), abs=1e-6)
    assert whole.hash_of_batches() == split.hash_of_batches()


def test_resumed_training_ends_bitwise_where_the_uninterrupted_one_does(tmp_path):
    sets = {"c": EvaluationSet(torch.arange(97), 300, 0)}
    options = {"eval_strategy": "steps", "eval_steps": 5, "eval_context": 16, "eval_on_start": True, "logging_steps": 3}
    whole = train(tiny_gpt2(), tmp_path / "whole", sets=sets, keep_steps=[4, 8], **options)
    for step in (4, 8):
        model = tiny_gpt2(seed=9)  # its weights must not matter
        resume = str(tmp_path / "whole" / f"checkpoint-{step}")
        resumed = train(model, tmp_path / f"from-{step}", resume=resume, sets=sets, **options)
        for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b), name
        assert resumed.hash_of_batches() == whole.hash_of_batches()
        timeless = [
            [{k: v for k, v in entry.items() if "runtime" not in k and k not in MEASURES} for entry in history]
            for history in (whole.state.log_history[:-1], resumed.state.log_history[:-1])
        ]
        assert timeless[0] == timeless[1]
        twice = train(tiny_gpt2(), tmp_path / "twice", resume=str(tmp_path / f"from-{step}" / "checkpoint-12"))
        assert torch.equal(next(twice.model.parameters()), next(whole.model.parameters()))


def test_dropout_goes_on_where_it_was(tmp_path):
    dropout = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    whole = train(tiny_gpt2(**dropout), tmp_path / "whole", keep_steps=[4])
    resume = str(tmp_path / "whole" / "checkpoint-4")
    resumed = train(tiny_gpt2(seed=9, **dropout), tmp_path / "resumed", resume=resume)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_the_hash_of_batches_tells_order_and_content_apart():
    a, b = torch.arange(16).view(2, 8), torch.arange(16, 32).view(2, 8)
    assert hash_batch(a, 0) + hash_batch(b, 1) != hash_batch(b, 0) + hash_batch(a, 1)
    assert hash_batch(a, 0) == hash_batch(a.flip(0), 0)  # rows of one step have no order
    assert hash_batch(a, 0) == hash_batch(a[:1], 0) + hash_batch(a[1:], 0)
    assert hash_batch(a, 0) != hash_batch(a.flip(1), 0)
    changed = a.clone()
    changed[1, 7] += 1
    assert hash_batch(a, 0) != hash_batch(changed, 0)


def test_evaluation_is_exact_and_finds_the_best(tmp_path):
    tokens = torch.randint(0, 97, (501,), generator=torch.Generator().manual_seed(5))
    sets = {"c": EvaluationSet(tokens, 2000, 0)}
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_context": 16, "best_corpora": {"c": 1.0}}
    trainer = train(tiny_gpt2(), tmp_path, sets=sets, keep_best=True, save_steps=100, **options)
    measured = {e["step"]: e["eval_c_nll"] for e in trainer.state.log_history if "eval_c_nll" in e}
    assert set(measured) == {2, 4, 6, 8, 10, 12}
    last = perplexity(trainer.model, tokens, context=16, prefix=0)
    assert measured[12] == pytest.approx(last.nll, rel=1e-9)
    best = min(measured, key=measured.get)
    assert trainer.state.best_global_step == best
    assert {step for _, step in checkpoints(tmp_path)} == {best, 12}


def test_checkpoints_are_plain_folders_without_pickled_arguments(tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = train(tiny_gpt2(), tmp_path)
    folder = tmp_path / "checkpoint-12"
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), trainer.model.parameters(), strict=True))
    assert not list(tmp_path.glob("*.partial")) and not (folder / "training_args.bin").exists()
    assert [step for _, step in checkpoints(tmp_path)] == [12]


def test_half_a_checkpoint_is_not_taken_for_one(tmp_path):
    train(tiny_gpt2(), tmp_path, keep_steps=[4])
    (tmp_path / "checkpoint-99.partial" / "checkpoint-99").mkdir(parents=True)
    (tmp_path / "checkpoint-50").mkdir()
    assert [step for _, step in checkpoints(tmp_path)] == [4, 12]


def test_links_among_the_checkpoints_are_removed_and_not_followed(tmp_path):
    """One under the name of what a killed save leaves, and one in the place of a checkpoint that is pruned."""
    outside, run = tmp_path / "outside", tmp_path / "run"
    train(tiny_gpt2(), outside, keep_last=1)
    (outside / "leftover").mkdir()
    (outside / "leftover" / "continual_state.json").write_text("mine")
    before = {p: p.read_bytes() for p in outside.rglob("*") if p.is_file()}
    run.mkdir()
    (run / "checkpoint-4.partial").symlink_to(outside / "leftover")
    (run / "checkpoint-1").symlink_to(outside / "checkpoint-12")
    train(tiny_gpt2(), run, keep_last=1)
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-12"]
    assert {p: p.read_bytes() for p in outside.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", ["config", "generation_config"])
def test_what_could_not_be_saved_is_found_before_the_first_step(name, tmp_path):
    model = tiny_gpt2()
    if name == "config":
        model.config.odd = object()
    else:
        model.generation_config.temperature = 0.6  # and nothing is sampled
        model.generation_config.do_sample = False
    with pytest.raises(UserError, match=rf"{name}.json of the model cannot be written, .*Correct it in the checkpoint"):
        train(model, tmp_path)
    assert not list(tmp_path.glob("checkpoint-*")) and all(p.grad is None for p in model.parameters())


def test_a_loss_that_is_not_finite_stops_training(tmp_path):
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="at step 1"):
        train(model, tmp_path)


# ---- ResetCallback


def matrices(model):
    return {m.name: m.read().clone() for m in logical_matrices(model)}


def test_the_callback_resets_at_the_start_in_any_trainer(tmp_path):
    class Stock(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return {"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)}

    model, fired = tiny_gpt2(), tiny_gpt2()
    fire_(fired)
    callback = ResetCallback("fire", report_file=tmp_path / "reset.json")
    stock = TrainingArguments(
        str(tmp_path / "out"), max_steps=1, learning_rate=0.0, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model, stock, train_dataset=Stock(), callbacks=[callback]).train()
    after, wanted = matrices(model), matrices(fired)
    assert all(torch.equal(after[name], wanted[name]) for name in wanted)
    assert json.loads((tmp_path / "reset.json").read_text())["resets"][0]["method"] == "fire"
    assert len(callback.reports) == 1


def test_the_callback_resets_after_given_steps_and_clears_the_optimizer(tmp_path):
    seen = {}

    class Watch(ResetCallback):
        def _apply(self, args, model=None, optimizer=None, **rest):
            before = copy.deepcopy(model)
            super()._apply(args, model=model, optimizer=optimizer, **rest)
            fire_(before)
            seen["equal"] = all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
            parameters = dict(model.named_parameters())
            seen["stateless"] = {n for n, p in parameters.items() if p not in optimizer.state}

    callback = Watch("fire", at_steps=[5])
    train(tiny_gpt2(), tmp_path, callbacks=[callback])
    assert seen["equal"] and len(callback.reports) == 1
    assert seen["stateless"] == {t.parameter for t in callback.reports[0].touched}


@pytest.mark.parametrize("at_steps", [(), (3,), (4,), (10,)])
def test_a_resumed_phase_never_resets_twice_nor_forgets_to(at_steps, tmp_path):
    whole = train(tiny_gpt2(), tmp_path / "a", callbacks=[ResetCallback("fire", at_steps=at_steps)], keep_steps=[4])
    again = ResetCallback("fire", at_steps=at_steps)
    resume = str(tmp_path / "a" / "checkpoint-4")
    resumed = train(tiny_gpt2(seed=3), tmp_path / "b", resume=resume, callbacks=[again])
    assert len(again.reports) == (at_steps == (10,))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_full_reset_in_the_callback_is_the_models_own_beginning(tmp_path):
    from fire_llm.models import fresh_model

    model = tiny_gpt2(seed=5)
    wanted = dict(fresh_model(model.config, 11).named_parameters())
    callback = ResetCallback("full_reset", seed=11)
    train(model, tmp_path, callbacks=[callback], learning_rate=1e-30, lr_scheduler_kwargs={"min_lr": 0.0})
    assert all(torch.allclose(p, wanted[name], rtol=0, atol=1e-20) for name, p in model.named_parameters())


def test_bad_callbacks_are_refused_at_once():
    with pytest.raises(UserError, match="Did you mean 'fire'"):
        ResetCallback("fier")
    with pytest.raises(UserError, match="steps count from 1"):
        ResetCallback("fire", at_steps=[0])


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, r"FSDP1 flattens parameters.* set fsdp_version: 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP1"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"DeepSpeed keeps master copies.* use FSDP.* or reset the checkpoint"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_engines_that_no_reset_can_reach_are_refused(environment, message, tmp_path, monkeypatch):
    args = arguments(tmp_path)  # with DeepSpeed asked for, transformers wants it installed
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        ContinualTrainer(tiny_gpt2(), args, Samples())
    with pytest.raises(UserError, match=message):
        ResetCallback("fire").on_train_begin(args, None, None, model=tiny_gpt2())


def test_the_callback_refuses_what_the_trainers_arguments_ask_for():
    for settings, message in [({"deepspeed": "zero3.json"}, "DeepSpeed"), ({"fsdp_plugin_args": {}}, "FSDP1")]:
        with pytest.raises(UserError, match=message):
            ResetCallback("fire").on_train_begin(SimpleNamespace(**settings), None, None)


# ---- what transformers does by itself on a machine with GPUs


def test_a_process_trains_on_one_of_the_gpus_that_it_sees(tmp_path, monkeypatch):
    """`Trainer` would take all eight, by DataParallel, and eight times the tokens a step."""

    own = TrainingArguments._setup_devices

    def devices(self):
        if not hasattr(self, "_n_gpu"):  # once, as the property that this stands for
            own.__get__(self)
            self._n_gpu = 8
        return torch.device("cpu")

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(devices))
    stock = TrainingArguments(str(tmp_path), per_device_train_batch_size=MICRO, report_to="none")
    assert (stock.n_gpu, stock.train_batch_size) == (8, 8 * MICRO)
    ours = arguments(tmp_path, use_cpu=False)
    assert (ours.n_gpu, ours.train_batch_size, ours.eval_batch_size) == (1, MICRO, 8)
    trainer = ContinualTrainer(tiny_gpt2(), ours, Samples())
    assert len(trainer._get_train_sampler()) == STEPS * MICRO * ACCUMULATION


def products():
    """Return how torch multiplies in fp32, in both of its ways to say it; the older raises where they differ."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.mkldnn.matmul
    return torch.get_float32_matmul_precision(), torch.backends.fp32_precision, [b.fp32_precision for b in backends]


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_compiling_leaves_the_products_of_the_process_alone(precision, tmp_path, monkeypatch):
    """transformers turns TF32 on where it compiles, and accelerate where it compiles in fp32."""
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        found = products()
        for half in (False, True):
            enable_tf32.cache_clear()  # it does nothing the second time
            options = {"bf16": half, "torch_compile": True, "torch_compile_backend": "eager"}
            TrainingArguments(str(tmp_path), use_cpu=True, **options)
            assert torch.backends.fp32_precision == "tf32"
            torch.backends.fp32_precision = "none"
            torch.set_float32_matmul_precision(precision)
            ours = arguments(tmp_path, **options)
            assert products() == found
            ContinualTrainer(tiny_gpt2(), ours, Samples())
            assert products() == found
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision(before)


def test_weights_in_16_bits_are_warned_of_where_they_are_trained(tmp_path, capsys):
    model = tiny_gpt2().to(torch.bfloat16)
    train(model, tmp_path / "coarse", max_steps=1)
    said = capsys.readouterr().err
    assert "100% of the trained weights are in bfloat16 ('transformer.wte.weight'" in said and "a 256th" in said
    for name, parameter in model.named_parameters():  # as under an adapter
        parameter.requires_grad_("ln_" in name)
        if "ln_" in name:
            parameter.data = parameter.data.float()
    assert coarse_weights(model) is None
    train(tiny_gpt2(), tmp_path / "fine", max_steps=1)
    assert "trained weights" not in capsys.readouterr().err


def test_a_reset_callback_says_in_a_trainer_what_it_did(tmp_path, capsys):
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1, "use_cpu": True, "report_to": []}
    rows = [{"input_ids": Samples()[i]["input_ids"], "labels": Samples()[i]["input_ids"]} for i in range(8)]

    def run(resume=None):
        args = TrainingArguments(str(tmp_path), **settings)
        trainer = Trainer(tiny_gpt2(), args, train_dataset=rows, callbacks=[ResetCallback("fire")])
        trainer.train(resume_from_checkpoint=resume)
        return capsys.readouterr().err

    assert "ResetCallback: fire, iterations 5, roles attention mlp: 12 tensors touched" in run()
    assert "ResetCallback: not applied, as training goes on from step 1" in run(str(tmp_path / "checkpoint-1"))
