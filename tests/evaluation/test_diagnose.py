"""Diagnostics against the same numbers found by other ways, and the training that they must leave as it is."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.models import tiny_gpt2, tiny_llama
from support.ranks import run_ranks
from support.small_models import build
from support.training import STEPS, Samples, arguments, losses, train
from transformers import AttentionInterface, LlamaModel, Trainer, TrainerCallback

from fire_llm import ContinualTrainer, ResetCallback, UserError, fire_, logical_matrices
from fire_llm.evaluation.diagnose import diagnose
from fire_llm.training import DiagnosticsCallback

TOKENS = torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(7))
QUICK = {"context": 16, "sequences": 6, "hessian_sequences": 2, "iterations": 3}


def sequences_of(n, context):
    """Cut the evenly spaced sequences that `diagnose` says it reads."""
    count = (len(TOKENS) - 1) // context
    return torch.stack([TOKENS[i * count // n * context :][: context + 1] for i in range(n)])


# ---- what is measured


def test_srank_of_what_the_head_reads_equals_an_svd():
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.logspace(0, -5, 32))
    read = sequences_of(6, 16)[:, :-1]
    hidden = model.model.double()(read).last_hidden_state.reshape(-1, 32).detach().numpy()
    shares = np.cumsum(sigma := np.linalg.svd(hidden, compute_uv=False)) / sigma.sum()
    model.float()
    for delta in (0.01, 0.1):
        found = diagnose(model, TOKENS, **QUICK, delta=delta)
        assert found.srank == np.searchsorted(shares, 1 - delta) + 1 < 32
        assert found.srank_share == found.srank / 32
    assert (found.tokens, found.hessian_tokens, found.context) == (96, 32, 16)
    assert diagnose(model, TOKENS.tolist(), **QUICK, batch_size=1).srank == diagnose(model, TOKENS, **QUICK).srank


def dead_llama():
    """Build a Llama 20 of whose 160 units never fire: 16 in the first MLP, 4 in the second."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:16] = 0
        model.model.layers[1].mlp.gate_proj.weight[76:] = 0
    return model, ["model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"], [16 / 80, 4 / 80]


def dead_gpt2():
    """Build a GPT-2 12 of whose 256 units never fire; Conv1D stores (in, out)."""
    model = tiny_gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[:, 5:17] = 0
    return model, ["transformer.h.0.mlp.c_proj.weight", "transformer.h.1.mlp.c_proj.weight"], [0, 12 / 128]


@pytest.mark.parametrize("dead", [dead_llama, dead_gpt2])
def test_units_that_never_fire_are_counted_in_each_mlp_and_overall(dead):
    model, names, shares = dead()
    found = diagnose(model, TOKENS, **QUICK)
    assert found.dormant == dict(zip(names, shares, strict=True))
    assert found.dormant_share == pytest.approx(np.mean(shares))
    assert "dormant" not in found.not_measured
    assert diagnose(model, TOKENS, **QUICK, tau=1e9).dormant_share == 1


def test_hessian_and_gradient_equal_the_dense_ones():
    """All 316 parameters of a GPT-2 in fp64, tied embedding included, with eager attention."""
    model = tiny_gpt2(n_embd=4, n_layer=1, n_head=1, vocab_size=7, n_positions=8, attn_implementation="eager").double()
    tokens = TOKENS[:41] % 7
    read = torch.stack([tokens[i : i + 9] for i in (0, 8, 16, 24, 32)])
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def loss(vector):
        parts = vector.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        logits = torch.func.functional_call(model, weights, (read[:, :-1],)).logits
        return F.cross_entropy(logits.flatten(0, 1), read[:, 1:].flatten())

    vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    dense = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, vector, vectorize=True))
    expected = dense[dense.abs().argmax()]
    loss(torch.nn.utils.parameters_to_vector(model.parameters())).backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    model.set_attn_implementation("sdpa")
    found = diagnose(model, tokens, context=8, hessian_sequences=5, iterations=3000, tolerance=1e-7)
    assert found.hessian_eigenvalue == pytest.approx(float(expected), rel=1e-9)
    assert found.hessian_residual <= 1e-7 * abs(found.hessian_eigenvalue)
    assert found.gradient_norm == pytest.approx(norm, rel=1e-9)
    assert found.hessian_tokens == 40


def test_dfi_and_sfe_are_taken_over_the_matrices_of_the_roles():
    model, other = tiny_gpt2(), tiny_gpt2(seed=3)
    pairs = [
        (a.read().double().numpy(), b.read().double().numpy())
        for a, b in zip(logical_matrices(model), logical_matrices(other), strict=True)
    ]
    deviations = [
        np.linalg.norm((a.T @ a if len(a) > len(a.T) else a @ a.T) - np.eye(min(a.shape))) ** 2 for a, _ in pairs
    ]
    moved = sum(np.linalg.norm(a - b) ** 2 for a, b in pairs)
    for reference in (other, other.state_dict()):
        found = diagnose(model, TOKENS, **QUICK, reference=reference, hessian=False)
        assert found.dfi_mean == pytest.approx(np.mean(deviations), rel=1e-9)
        assert found.dfi_median == pytest.approx(np.median(deviations), rel=1e-9)
        assert found.sfe == pytest.approx(moved, rel=1e-9)
    assert diagnose(model, TOKENS, **QUICK, reference=model, roles="mlp", hessian=False).sfe == 0
    assert found.not_measured == {"hessian_eigenvalue": "not asked for"} and found.gradient_norm > 0
    assert "hessian_eigenvalue" not in found.measures() and json.loads(json.dumps(found.to_dict()))["tokens"] == 96


def test_activation_checkpointing_changes_names_but_not_what_is_measured():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain, wrapped, options = tiny_gpt2(), tiny_gpt2(), {**QUICK, "reference": tiny_gpt2(seed=3)}
    for i, layer in enumerate(wrapped.transformer.h):
        wrapped.transformer.h[i] = checkpoint_wrapper(layer)
    assert "transformer.h.0._checkpoint_wrapped_module.ln_1.weight" in dict(wrapped.named_parameters())
    assert diagnose(wrapped, TOKENS, **options).measures() == diagnose(plain, TOKENS, **options).measures()
    assert diagnose(plain, TOKENS, **{**options, "reference": wrapped}, hessian=False).sfe == 0


@pytest.mark.parametrize("name", ["opt", "gpt_neox", "phi3", "falcon", "gemma2", "qwen3"])
def test_down_projections_of_other_families_are_found(name):
    model = build(name)
    found = diagnose(model, TOKENS % 90, **QUICK, hessian=False)
    assert len(found.dormant) == model.config.num_hidden_layers and "dormant" not in found.not_measured


def test_units_of_shared_blocks_count_in_each_of_their_uses():
    """Zamba runs one MLP in two blocks: a unit is dormant where it is quiet in both."""
    model = build("zamba")
    found = diagnose(model, TOKENS % 90, **QUICK, hessian=False)
    inputs: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith("down_proj"):
            keep = inputs.setdefault(name, [])
            module.register_forward_pre_hook(lambda _, given, keep=keep: keep.append(given[0].detach()))
    with torch.no_grad():
        model(input_ids=(TOKENS % 90).view(-1, TOKENS.shape[-1]), use_cache=False)
    heard = [torch.cat([h.flatten(0, -2) for h in one]) for one in inputs.values() if one]
    means = torch.cat(heard).abs().double().mean(0)
    assert len(heard) == 2 and len(found.dormant) == 1
    wanted = (means / means.mean() <= found.tau).double().mean().item()
    assert [*found.dormant.values()] == [pytest.approx(wanted)]


def test_stacked_experts_are_named_as_not_measured_and_what_stands_beside_them_is():
    found = diagnose(build("qwen2_moe"), TOKENS % 90, **QUICK, hessian=False)
    assert "mlp.experts.down_proj and 1 more: experts stacked in one parameter" in found.not_measured["dormant"]
    assert len(found.dormant) == 2 and all("shared_expert.down_proj" in name for name in found.dormant)


def test_an_mlp_as_narrow_as_the_model_is_not_guessed_at():
    found = diagnose(tiny_llama(intermediate_size=32), TOKENS, **QUICK, hessian=False)
    assert found.dormant == {} and found.dormant_share is None
    assert "and 1 more: no single matrix of LlamaMLP leads from the inner width" in found.not_measured["dormant"]


def test_mlps_that_are_never_called_and_heads_that_are_none_are_named():
    model = tiny_llama()
    model.config.num_hidden_layers = 1
    found = diagnose(model, TOKENS, **QUICK, hessian=False)
    assert [*found.dormant] == ["model.layers.0.mlp.down_proj.weight"]
    assert found.not_measured["dormant"] == "model.layers.1.mlp.down_proj.weight: no token reached it"
    model = tiny_gpt2()
    model.get_output_embeddings = lambda: torch.nn.ModuleList([model.lm_head])
    found = diagnose(model, TOKENS, **QUICK, hessian=False)
    assert found.srank is None and found.srank_share is None
    assert "no one module as its head" in found.not_measured["srank"]


def test_frozen_models_have_no_gradient():
    found = diagnose(tiny_gpt2().requires_grad_(False), TOKENS, **QUICK)
    assert found.gradient_norm is None and found.hessian_eigenvalue is None and found.hessian_tokens == 0
    assert found.not_measured["hessian_eigenvalue"] == "no parameter requires gradients"


# ---- nothing is disturbed


def test_everything_is_left_as_found():
    model = tiny_gpt2(resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    model.train()
    model.transformer.h[0].eval()
    model.transformer.wpe.weight.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.transformer.register_forward_hook(lambda *_: torch.rand(1) and None)
    modes = [m.training for m in model.modules()]
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    AttentionInterface.register("of_my_own", lambda *_, **__: pytest.fail("its second derivative is not known"))
    model.set_attn_implementation("of_my_own")
    found = diagnose(model, TOKENS, **QUICK)
    assert model.config._attn_implementation == "of_my_own"
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["transformer.wpe.weight"]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), weights.values(), strict=True))
    assert not any(m._forward_pre_hooks for m in model.modules())
    model.set_attn_implementation("eager")
    assert found.measures() == pytest.approx(diagnose(model, TOKENS, **QUICK).measures(), rel=1e-4)  # and no dropout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coarse_weights_are_measured_in_fp32(dtype):
    model = tiny_llama().to(dtype)
    found = diagnose(model, TOKENS, **QUICK)
    assert {p.dtype for p in model.parameters()} == {dtype}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert diagnose(model.float(), TOKENS, **QUICK) == found
    finally:
        torch.set_float32_matmul_precision(before)


# ---- what is refused


def fused(model):
    """Give an MLP an operation whose backward has no derivative, and says so."""
    act = model.transformer.h[0].mlp.act = torch.nn.Identity()

    def attend(_, __, x):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(x[None], x[None], x[None])[0]

    act.register_forward_hook(attend)
    return model


def unnatural(model):
    """Give an MLP an activation whose backward has no derivative either; torch leaves such terms out in silence."""

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return 2 * ctx.saved_tensors[0] * gradient

    act = model.transformer.h[0].mlp.act = torch.nn.Identity()
    act.register_forward_hook(lambda _, __, x: Once.apply(x))
    return model


def flattened():
    """Make what FSDP1 would be taken for."""
    kind = type("FullyShardedDataParallel", (torch.nn.Module,), {"__module__": "torch.distributed.fsdp.any"})
    model = tiny_gpt2()
    model.add_module("wrapped", kind())
    return model


def broken(name, value=math.nan):
    model = tiny_gpt2()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (tiny_gpt2, {"sequences": 0}, "sequences: 0 is not a number of sequences"),
        (tiny_gpt2, {"batch_size": -1}, "batch_size: -1 "),
        (tiny_gpt2, {"hessian_sequences": 0}, "hessian_sequences: 0 is not a number of sequences"),
        (tiny_gpt2, {"iterations": 0}, "iterations: 0 is not a number of iterations"),
        (tiny_gpt2, {"delta": 1.0}, r"delta 1.0 must lie in \[0, 1\)"),
        (tiny_gpt2, {"tau": -0.1}, "tau -0.1 must not be negative"),
        (tiny_gpt2, {"context": 65}, "context 65 must lie between 1 and 64, the most tokens"),
        (tiny_gpt2, {"tokens": TOKENS[:16]}, "the text has 16: give more text or a shorter context"),
        (tiny_gpt2, {"tokens": TOKENS[:1], "context": None}, "predict the one after; the text has 1"),
        (tiny_gpt2, {"tokens": TOKENS + 50}, "do not fit the model's vocabulary of 97"),
        (tiny_gpt2, {"roles": ("ssm",)}, "no matrix of the roles ssm"),
        (tiny_gpt2, {"roles": ("mpl",)}, "Did you mean 'mlp'"),
        (tiny_gpt2, {"reference": tiny_llama()}, "'transformer.h.0.attn.c_attn.weight' has no tensor there"),
        (tiny_gpt2, {"reference": tiny_gpt2(n_embd=16)}, r"has the shape \(16, 48\) there and \(32, 96\) here"),
        (lambda: LlamaModel(tiny_llama().config), {}, "LlamaModel gives no logits a token"),
        (flattened, {}, "FSDP1 flattens parameters"),
        (lambda: unnatural(tiny_gpt2()), {}, "Hessian is not symmetric, .* Use plain operations, or do without"),
        (lambda: fused(tiny_gpt2()), {}, "no second derivative: .* is not implemented. Use plain operations"),
        (lambda: broken("transformer.h.0.attn.c_attn.weight"), {}, "the activations hold NaN or infinity"),
        (lambda: broken("transformer.ln_f.weight"), {}, "the features hold NaN or infinity"),
        (lambda: broken("transformer.wpe.weight", 3e38), {}, "NaN or infinity|not finite"),
    ],
)
def test_bad_input_is_told_in_one_message(model, options, message):
    settings = {"tokens": TOKENS, **QUICK, **options}
    with pytest.raises(UserError, match=message):
        diagnose(model(), settings.pop("tokens"), **settings)


# ---- the callback


class Listener(TrainerCallback):
    """Keep what a logger would be told."""

    def __init__(self):
        self.told = []

    def on_log(self, args, state, control, logs=None, **_):
        self.told.append((state.global_step, dict(logs)))


def measured(history):
    return {e["step"]: {k: v for k, v in e.items() if k.startswith("diag_")} for e in history if "diag_srank" in e}


def test_the_callback_changes_no_bit_of_training(tmp_path):
    """Dropout on, so that a random number drawn too many would show; every loss is logged as it would have been."""
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    plain = train(tiny_gpt2(**dropout), tmp_path / "plain", logging_steps=5)
    for attached in (True, False):
        callback, listener = DiagnosticsCallback(TOKENS, 5, **QUICK), Listener()
        model, folder = tiny_gpt2(**dropout), tmp_path / str(attached)
        callbacks = [ResetCallback("keep"), listener] + ([] if attached else [callback])
        trainer = ContinualTrainer(model, arguments(folder, logging_steps=5), Samples(), None, callbacks)
        if attached:
            callback.attach(trainer)
        trainer.train()
        for (name, a), b in zip(plain.model.named_parameters(), trainer.model.named_parameters(), strict=True):
            assert torch.equal(a, b[1]), name
        assert losses(trainer) == losses(plain) and len(losses(plain)) == 5
        found = measured(trainer.state.log_history)
        assert list(found) == [0, 5, 10, STEPS]
        assert found[0] != found[5] and found[0].keys() == found[STEPS].keys()
        assert {step for step, logs in listener.told if "diag_srank" in logs} == ({0, 5, 10, 12} if attached else set())
        saved = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
        assert measured(saved["log_history"]) == found
        last = diagnose(trainer.model, TOKENS, **QUICK).measures()
        assert found[STEPS] == {f"diag_{name}": value for name, value in last.items()}


def test_a_resumed_run_has_measured_the_same(tmp_path):
    def run(folder, resume=None):
        trainer = ContinualTrainer(tiny_gpt2(), arguments(folder, keep_steps=[4]), Samples())
        DiagnosticsCallback(TOKENS, 3, reference=tiny_gpt2(), **QUICK).attach(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return measured(trainer.state.log_history)

    whole = run(tmp_path / "whole")
    assert list(whole) == [0, 3, 6, 9, 12] and whole[0]["diag_sfe"] == 0 < whole[3]["diag_sfe"]
    assert run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-4")) == whole


def test_it_sees_the_reset_and_the_weights_in_fp32_whatever_training_uses(tmp_path):
    """In bf16, which accelerate lays over the model's forward: training goes on in it."""
    options = {"bf16": True, "max_steps": 2}
    plain = train(tiny_gpt2(), tmp_path / "plain", callbacks=[ResetCallback()], **options)
    arguments_ = arguments(tmp_path / "measured", **options)
    trainer = ContinualTrainer(tiny_gpt2(), arguments_, Samples(), None, [ResetCallback()])
    DiagnosticsCallback(TOKENS, **QUICK).attach(trainer)
    trainer.train()
    fire_(expected := tiny_gpt2())
    found = measured(trainer.state.log_history)
    assert found[0] == {f"diag_{k}": v for k, v in diagnose(expected, TOKENS, **QUICK).measures().items()}
    assert losses(trainer) == losses(plain)
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), trainer.model.parameters(), strict=True))


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 7


def test_training_that_stops_early_is_measured_where_it_stopped_in_any_trainer(tmp_path):
    callback = DiagnosticsCallback(TOKENS, 5, **QUICK)
    trainer = Trainer(tiny_llama(), arguments(tmp_path), train_dataset=Samples(), callbacks=[Stop()])
    trainer.get_train_dataloader = lambda: torch.utils.data.DataLoader([Samples()[i] for i in range(99)], batch_size=2)
    callback.attach(trainer)
    trainer.train()
    assert list(measured(trainer.state.log_history)) == [0, 5, 7]


def test_bad_callbacks_are_refused(tmp_path):
    with pytest.raises(UserError, match="every_steps: 0 is not a number of steps"):
        DiagnosticsCallback(TOKENS, 0)
    with pytest.raises(UserError, match="the text has 10"):
        train(tiny_gpt2(), tmp_path, callbacks=[DiagnosticsCallback(TOKENS[:10], context=16)])


# ---- several ranks


def replicas(rank, world):
    model = tiny_gpt2()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    found = diagnose(wrapped, TOKENS, **QUICK)
    wrapped(input_ids=TOKENS[None, :16]).logits.sum().backward()  # the gradients' hooks still work, once each
    return found.measures(), float(model.lm_head.weight.grad.sum())


def test_replicas_measure_what_one_process_does(tmp_path):
    alone = diagnose(tiny_gpt2(), TOKENS, **QUICK).measures()
    first, second = run_ranks(2, replicas, tmp_path)
    assert first == second and first[0] == alone


def shards(rank, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, _, _ = dead_llama()
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    founds = []
    for _ in range(2):
        founds.append(diagnose(model, TOKENS, **QUICK, reference=tiny_llama()))
        F.cross_entropy(model(input_ids=TOKENS[None, :16]).logits[0], TOKENS[1:17]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return founds


def test_shards_are_measured_but_for_what_needs_whole_weights(tmp_path):
    model, _, _ = dead_llama()
    alone = diagnose(model, TOKENS, **QUICK, reference=tiny_llama())
    first, second = run_ranks(2, shards, tmp_path)
    assert first == second
    assert (first[0].srank, first[0].dormant) == (alone.srank, alone.dormant)
    assert first[0].dfi_mean == pytest.approx(alone.dfi_mean, rel=1e-12)
    assert first[0].sfe == pytest.approx(alone.sfe, rel=1e-12)
    assert first[0].hessian_eigenvalue is None and first[0].gradient_norm is None
    assert first[0].not_measured == {
        "hessian_eigenvalue": "the weights lie in shards",
        "gradient_norm": "the weights lie in shards",
    }
    assert first[1].sfe != first[0].sfe
