"""Training in shards over gloo against one process that holds whole logits: losses, gradients, collectives, memory."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from support.memory import Exchanged, cut, peak_bytes
from support.models import tiny_gpt2, tiny_llama
from support.ranks import Raised, run_ranks
from support.training import ACCUMULATION, FSDP2, Samples, arguments, losses, train
from transformers import TrainerCallback

from fire_llm import ContinualTrainer, UserError
from fire_llm.core.compat import checkpointing
from fire_llm.training import EvaluationSet
from fire_llm.training import loss as sliced
from fire_llm.training.loss import SummedLoss

BUILDS = {"gpt2": tiny_gpt2, "llama": tiny_llama}  # tied, and not
HSDP = {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}  # fmt: skip
SYNC = {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}
TOKENS = torch.randint(0, 97, (300,), generator=torch.Generator().manual_seed(1)).numpy()
SLICE = 97 * 7


class Masked(Samples):
    """Score every other token of some samples, none of another."""

    def __getitem__(self, i):
        found = super().__getitem__(i)
        labels = found["labels"].clone()
        labels[:: 2 if i % 3 else 1] = -100
        return {**found, "labels": labels}


class Watch(TrainerCallback):
    """Keep the whole gradients of the first step, and count what the passes of the second exchange."""

    def __init__(self):
        self.gradients, self.mode = {}, Exchanged()

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == 1:
            self.mode.__enter__()

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if state.global_step == 1:
            self.mode.__exit__(None, None, None)
        if state.global_step == 0:
            for name, p in model.named_parameters():
                self.gradients[name] = getattr(p.grad, "full_tensor", lambda p=p: p.grad)().clone()


def trained(kind, folder, micro, *, accumulation=ACCUMULATION, data=None, **settings):
    watch, shapes = Watch(), []
    told = {
        "per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation, "max_steps": 3,
        "save_strategy": "no", **settings,
    }  # fmt: skip
    sets = {"text": EvaluationSet(TOKENS, 600, 0)}
    trainer = ContinualTrainer(BUILDS[kind](), arguments(folder, **told), data or Samples(), sets, [watch])
    head = trainer.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    trainer.train()
    trained_on = [rows for _, rows, _ in shapes[-ACCUMULATION * 2 :]]
    shapes.clear()
    nll = trainer.evaluate()["eval_text_nll"]
    return {
        "losses": losses(trainer), "gradients": watch.gradients, "nll": nll, "rows": max(trained_on),
        "evaluated": shapes[0], "gathered": watch.mode.counts["_allgather_base_"],
        "reduced": watch.mode.counts["_reduce_scatter_base_"],
    }  # fmt: skip


def in_shards(rank, world, folder, environment, runs):
    sliced.SLICE = sliced.WHOLE = SLICE
    found = []
    for kind, own, settings in runs:
        os.environ.update(FSDP2, LOCAL_WORLD_SIZE=str(world), **{**environment, **own})
        found.append(trained(kind, folder / "shards", 1, **settings))
        for name in own:
            os.environ.pop(name)
    return found


def agrees(shards, one, near=1e-5):
    """Hold losses, gradients and a perplexity against those of one process, and see that slices were taken."""
    assert shards["losses"] == pytest.approx(one["losses"], abs=near)
    assert shards["nll"] == pytest.approx(one["nll"], abs=near)
    for name, gradient in one["gradients"].items():
        assert float((shards["gradients"][name] - gradient).norm()) <= 3 * near * float(gradient.norm()), name
    assert 1 < shards["rows"] <= 7 < one["rows"]  # of the 16 of a micro-batch, and of whole sequences
    assert shards["evaluated"][0] == 1 and shards["evaluated"][1] > 64


class Lengths(Samples):
    """Give samples of several lengths, which no padding makes equal."""

    def __getitem__(self, i):
        return {name: tensor[: (16, 12, 9, 16, 5)[i % 5]] for name, tensor in super().__getitem__(i).items()}


def of_lengths(rank, world, folder, environment):
    os.environ.update(environment, LOCAL_WORLD_SIZE=str(world))
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 // world, "max_steps": 3}
    return losses(train(tiny_gpt2(), folder, data=Lengths(), save_strategy="no", **settings))


def test_ranks_whose_samples_differ_in_length_gather_the_same(tmp_path):
    one = of_lengths(0, 1, tmp_path / "one", {})
    found = run_ranks(2, of_lengths, tmp_path, tmp_path / "two", FSDP2, seconds=60)
    assert found[0] == found[1] == pytest.approx(one, abs=1e-5), found


MASKED = {"data": Masked(), "labels_shifted": True}
RUNS = {
    "tied": ("gpt2", {}, {}),
    "plain": ("llama", {}, {}),
    "masked": ("llama", {}, MASKED),
    "checkpointed": ("llama", {}, checkpointing(True)),
    "whole in between": ("llama", {"FSDP_RESHARD_AFTER_FORWARD": "false"}, {}),
    "each batch": ("llama", {}, SYNC),
    "offloaded": ("llama", {"FSDP_OFFLOAD_PARAMS": "true"}, {}),
    "reduced in bf16": ("llama", {}, {"reduce_precision": "bf16"}),
    "bf16": ("gpt2", {}, {"bf16": True}),
}


@pytest.mark.parametrize(
    "names", [["tied", "plain", "checkpointed"], pytest.param([*RUNS], marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_two_shards_train_as_one_process_does(names, tmp_path):
    kinds = {
        "tied": ("gpt2", {}),
        "plain": ("llama", {}),
        "masked": ("llama", MASKED),
        "bf16": ("gpt2", {"bf16": True}),
    }
    ones = {name: trained(kind, tmp_path / "one", 2, **told) for name, (kind, told) in kinds.items() if name in names}
    found = run_ranks(2, in_shards, tmp_path, tmp_path, {}, [RUNS[name] for name in names])
    assert not any(isinstance(rank, Raised) for rank in found), found
    counts = {}
    for rank in found:
        for name, shards in zip(names, rank, strict=True):
            near = {"reduced in bf16": 5e-3, "bf16": 1e-2}.get(name, 1e-5)
            agrees(shards, ones.get(name, ones["plain"]), near)
            counts[name] = shards["gathered"], shards["reduced"]
    # The embedding, two layers, and the final norm with the head. Each of three passes gathers the four, and all but
    # the head again for its backward pass; the last pass of the step alone reduces their gradients.
    assert counts["plain"] == counts["checkpointed"] == (3 * (4 + 3), 4)
    assert counts.get("whole in between", (3 * 4, 4)) == (3 * 4, 4)
    assert counts.get("each batch", (3 * (4 + 3), 3 * 4)) == (3 * (4 + 3), 3 * 4)
    plain, again = (found[0][names.index(name)] for name in ("plain", "checkpointed"))
    assert plain["losses"] == again["losses"]
    assert all(torch.equal(plain["gradients"][name], again["gradients"][name]) for name in plain["gradients"])


@pytest.mark.slow
def test_two_replicas_of_two_shards_train_as_one_process_does(tmp_path):
    runs = {"gpt2": {"accumulation": 2}, "llama": {"accumulation": 2, **MASKED}}
    found = run_ranks(4, in_shards, tmp_path, tmp_path, HSDP, [(kind, {}, told) for kind, told in runs.items()])
    assert not any(isinstance(rank, Raised) for rank in found), found
    ones = [trained(kind, tmp_path / "one", 4, **told) for kind, told in runs.items()]
    for rank in found:
        for shards, one in zip(rank, ones, strict=True):
            agrees(shards, one)


VOCABULARY, LENGTH = 131_072, 256


def held(rank, world, kind):
    """Return the bytes that a rank holds at the peak of a micro-batch's passes, its weights among them."""
    sliced.SLICE = sliced.WHOLE = 2**22  # an eighth of the micro-batch's logits
    torch.set_num_threads(1)
    length = {"gpt2": "n_positions", "llama": "max_position_embeddings"}[kind]
    model = BUILDS[kind](vocab_size=VOCABULARY, **{length: LENGTH})
    loss = SummedLoss(model, contextlib.nullcontext)
    loss.look()
    if world > 1:
        cut(model)
    ids = torch.randint(0, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(rank))
    loss(model, ids, input_ids=ids).backward()
    model.zero_grad()
    weights = sum(getattr(p, "_local_tensor", p).nbytes for p in model.parameters())
    # gloo's own thread lets go of the gradients that it has exchanged, sooner or later: the least of some.
    return weights + min(
        peak_bytes(lambda: loss(model, ids, input_ids=ids).backward()) for _ in range(4 if world > 1 else 1)
    )


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_rank_holds_no_more_than_one_process_with_slices(kind, tmp_path):
    one, whole = held(0, 1, kind), 2 * 4 * LENGTH * VOCABULARY
    for shards in run_ranks(2, held, tmp_path, kind):
        assert shards < 1.2 * one and shards < whole, (shards / one, one)


def test_what_would_be_wrong_in_silence_is_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="reduce_precision 'fp16': it must be one of fp32, bf16"):
        arguments(tmp_path, reduce_precision="fp16")
    args = arguments(tmp_path)
    for name in ("ACCELERATE_USE_FSDP", "FSDP_ACTIVATION_CHECKPOINTING"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match=r"FSDP's activation_checkpointing is refused: .* gradient_checkpointing: true"):
        ContinualTrainer(tiny_gpt2(), args, Samples())


def _replicas(rank, world, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    ContinualTrainer(tiny_gpt2(), arguments(folder, reduce_precision="bf16"), Samples())


def test_replicas_that_are_to_reduce_in_bf16_are_refused(tmp_path):
    for told in run_ranks(2, _replicas, tmp_path, tmp_path):
        assert "reduce_precision bf16 is FSDP2's, and these processes are replicas" in told
