"""Checkpoints in shards: gone on from by any number of ranks, whole where they are read, refused where damaged."""

from __future__ import annotations

import json
import os
import resource
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.models import tiny_gpt2, tiny_mixtral
from support.ranks import Raised, run_ranks
from support.training import FSDP2, losses, train
from transformers import AutoModelForCausalLM, TrainerCallback

from fire_llm import UserError
from fire_llm.checkpoint import consolidate, reset_checkpoint
from fire_llm.core.manifest import damage, in_shards, weights_hash
from fire_llm.experiment.sources import MODEL, hashes
from fire_llm.models import load_model
from fire_llm.training.sharding import whole_optimizer, whole_weights

HSDP = {
    **FSDP2, "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}  # fmt: skip
LAST = 8
SETTINGS = {"keep_last": 9, "keep_steps": [6], "save_steps": 2, "ema_decay": 0.7, "max_steps": LAST}
ALONE = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **SETTINGS}


class Seen(TrainerCallback):
    """Gather what ranks hold, by torch's `full_tensor`: at the end of a step, or as they begin with it."""

    def __init__(self, step: int) -> None:
        self.step, self.found = step, {}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.on_step_end(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
        if state.global_step == self.step:
            weights, moments = whole_weights(model), whole_optimizer(optimizer)["state"]
            self.found = {name: tensor.clone() for name, tensor in weights.items()}
            self.found |= {f"{n}.{k}": v.clone() for n, one in moments.items() for k, v in one.items()}


class TooLarge(TrainerCallback):
    """Let one rank write no file of more than some bytes, from a step on."""

    def on_step_end(self, args, state, control, **_):
        if args.process_index == 1 and state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (30000, resource.RLIM_INFINITY))


def ranks_train(rank, world, folder, environment, resume, changes=None, limited=False, build=tiny_gpt2):
    os.environ.update(environment, LOCAL_WORLD_SIZE=str(world))
    warnings.simplefilter("error")
    seen = Seen(4)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 // world}
    callbacks = [seen, TooLarge()] if limited else [seen]
    trainer = train(build(seed=rank), folder, resume, callbacks, **split, **{**SETTINGS, **(changes or {})})
    return losses(trainer), seen.found, whole_weights(trainer.model)


def on_ranks(world, folder, *given):
    (folder.parent / "ranks").mkdir(exist_ok=True)
    told = run_ranks(world, ranks_train, folder.parent / "ranks", folder, *given)
    assert not any(isinstance(one, Raised) or one is None for one in told), told
    return told[0]


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Train four shards without an interruption; return folder, losses, what they held at step 4 and at the end."""
    folder = tmp_path_factory.mktemp("shards") / "four"
    return folder, *on_ranks(4, folder, FSDP2, None)


def files(checkpoint: Path) -> set[str]:
    return {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}


def test_each_rank_writes_its_part_and_what_is_read_is_an_ordinary_folder(four):
    folder, _, seen, _ = four
    parts = {f"shard-0000{rank}-of-00004.safetensors" for rank in (1, 2, 3, 4)}
    for step in (2, 4, 6, LAST):
        checkpoint = folder / f"checkpoint-{step}"
        found = files(checkpoint)
        assert damage(checkpoint) is None and {f"optimizer/{part}" for part in parts} <= found
        kept = step in (6, LAST)
        for place in ("", "ema/"):
            assert {f"{place}weights/{part}" for part in parts} <= found or kept
            assert (f"{place}model.safetensors" in found) == kept and f"{place}config.json" in found
        assert kept != in_shards(checkpoint)
        # A part of the moments a rank, and no rank has more than half of the weights.
        sizes = [(checkpoint / "optimizer" / part).stat().st_size for part in parts]
        assert max(sizes) < 0.5 * sum(sizes) and (checkpoint / "optimizer.pt").stat().st_size < 0.2 * sum(sizes)
    read = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-6")
    assert read.lm_head.weight is read.transformer.wte.weight
    assert read.config.dtype == torch.float32 and read.config.architectures == ["GPT2LMHeadModel"]
    # Read without torch's code: parts of rows, in the order of ranks.
    for name, whole in seen.items():
        place = "optimizer" if name[0].isdigit() else "weights"
        read_parts = [load_file(folder / "checkpoint-4" / place / part) for part in sorted(parts)]
        rows = [part[name] for part in read_parts if name in part and part[name].numel()]
        assert (not rows and (place == "optimizer" or name == "lm_head.weight")) or torch.equal(torch.cat(rows), whole)


def test_four_shards_go_on_exactly_from_their_own(four, tmp_path):
    folder, whole, *_ = four
    again, *_ = on_ranks(4, tmp_path / "again", FSDP2, str(folder / "checkpoint-4"))
    assert again == whole
    for step in (6, LAST):
        one, other = folder / f"checkpoint-{step}", tmp_path / "again" / f"checkpoint-{step}"
        assert files(one) == files(other)
        for name in files(one):
            if name.endswith(".safetensors"):
                assert (one / name).read_bytes() == (other / name).read_bytes(), name


def assert_as_saved(folder: Path, build, wanted: dict[str, torch.Tensor], place: Path) -> None:
    """Compare a checkpoint with what transformers saves of a whole model with these weights."""
    model = build()
    model.load_state_dict(wanted)
    model.save_pretrained(place)
    assert (folder / "model.safetensors").read_bytes() == (place / "model.safetensors").read_bytes()
    ours, theirs = (json.loads((one / "config.json").read_text()) for one in (folder, place))
    assert {**ours, "use_cache": None} == {**theirs, "use_cache": None}  # which training turns off


def test_an_ordinary_folder_is_what_save_pretrained_writes(four, tmp_path):
    assert_as_saved(four[0] / "checkpoint-8", tiny_gpt2, four[3], tmp_path)


@pytest.mark.slow
def test_a_mixture_of_experts_has_the_names_it_is_stored_under(tmp_path):
    given = (FSDP2, None, {"max_steps": 4, "ema_decay": None, "save_steps": 2}, False, tiny_mixtral)
    *_, wanted = on_ranks(2, tmp_path / "two", *given)
    assert_as_saved(tmp_path / "two" / "checkpoint-4", tiny_mixtral, wanted, tmp_path / "whole")
    step = tmp_path / "two" / "checkpoint-2"
    assert in_shards(step)
    names = load_file(consolidate(step, tmp_path / "step") / "model.safetensors").keys()
    assert names == load_file(tmp_path / "whole" / "model.safetensors").keys()
    read, whole = load_model(step).state_dict(), load_model(tmp_path / "step").state_dict()
    assert read.keys() == whole.keys() and all(torch.equal(read[name], whole[name]) for name in read)


def test_any_number_of_ranks_holds_the_same_weights_and_moments(four, tmp_path):
    """4 shards → 2 → 2 × 2 → 1 process, which goes on to the same losses."""
    folder, whole, wanted, _ = four
    for world, environment in ((2, FSDP2), (4, HSDP)):
        name = f"{world}-{len(environment)}"
        went_on, seen, _ = on_ranks(world, tmp_path / name, environment, str(folder / "checkpoint-4"), {"max_steps": 6})
        assert seen.keys() == wanted.keys() and all(torch.equal(seen[key], wanted[key]) for key in wanted)
        assert went_on == pytest.approx(whole[:6], abs=1e-5)
        assert (tmp_path / name / "checkpoint-6" / "model.safetensors").is_file()
    seen = Seen(4)
    one = train(tiny_gpt2(seed=5), tmp_path / "one", str(four[0] / "checkpoint-4"), [seen], **ALONE)
    assert seen.found.keys() == wanted.keys() and all(torch.equal(seen.found[key], wanted[key]) for key in wanted)
    assert losses(one) == pytest.approx(whole, abs=1e-5)
    ema = [load_file(f / "checkpoint-8" / "ema" / "model.safetensors") for f in (four[0], tmp_path / "one")]
    assert all(torch.allclose(ema[0][key], ema[1][key], atol=1e-4) for key in ema[0])


def test_shards_are_read_as_a_model_and_made_an_ordinary_folder(four, tmp_path):
    folder, _, wanted, _ = four
    step = folder / "checkpoint-4"
    for model in (load_model(step), load_model(consolidate(step, tmp_path / "whole"), torch.float32)):
        state = model.state_dict()
        assert all(torch.equal(state[name], wanted[name]) for name in state)
    assert {"config.json", "model.safetensors"} <= files(tmp_path / "whole") and not in_shards(tmp_path / "whole")
    assert not torch.equal(load_model(step / "ema").state_dict()["lm_head.weight"], wanted["lm_head.weight"])
    assert weights_hash(step) is not None
    assert sum(name.startswith("weights/") for name in hashes("model", str(step), MODEL)) == 4
    with pytest.raises(UserError, match=r"checkpoint-4' .* in shards, a file a rank: .* import consolidate; cons"):
        reset_checkpoint(step, tmp_path / "reset")
    with pytest.raises(UserError, match="holds no weights in shards"):
        consolidate(folder / "checkpoint-6", tmp_path / "other")


@pytest.mark.parametrize(
    ("part", "how"),
    [
        ("weights/shard-00003", "missing"),
        ("weights/shard-00002", "changed"),
        ("optimizer/shard-00001", "changed"),
        ("optimizer/shard-00004", "missing"),
        ("ema/weights/shard-00004", "cut"),
    ],
)
def test_a_part_that_is_missing_or_damaged_is_named_and_refused(four, tmp_path, part, how):
    step = tmp_path / "checkpoint-4"
    shutil.copytree(four[0] / "checkpoint-4", step)
    path = step / f"{part}-of-00004.safetensors"
    written = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(written[:-4] if how == "cut" else written[:-4] + b"oops")
    name = f"{part}-of-00004.safetensors"
    with pytest.raises(UserError, match=f"checkpoint-4' is damaged: {name} (is missing|has .* bytes|is not what)"):
        train(tiny_gpt2(), tmp_path, str(step), **ALONE)
    inner = name.removeprefix("ema/")
    with pytest.raises(UserError, match=f"is damaged: {inner} "):
        consolidate(step / "ema" if part.startswith("ema") else step, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    if how == "missing" and part.startswith("weights"):
        with pytest.raises(UserError, match=f"{name}' is missing, the part of one of 4 ranks"):
            load_model(step)


@pytest.mark.parametrize("beside", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_what_one_rank_cannot_write_every_rank_raises_and_what_was_saved_stays(beside, tmp_path):
    (tmp_path / "ranks").mkdir()
    changes = {"async_save": beside}
    told = run_ranks(2, ranks_train, tmp_path / "ranks", tmp_path / "two", FSDP2, None, changes, True)
    for one in told:
        assert isinstance(one, Raised) and one.startswith("UserError: cannot write below"), one
        assert "Step 4 was not saved. What was saved before stays" in one
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["checkpoint-2"]
    assert damage(tmp_path / "two" / "checkpoint-2") is None


def test_a_checkpoint_that_one_rank_held_is_gone_on_from(tmp_path):
    """As FSDP2's were written before, and as a process of its own writes them."""
    seen = Seen(4)
    one = train(tiny_gpt2(seed=0), tmp_path / "one", None, [seen], **ALONE)
    whole = tmp_path / "one" / "checkpoint-4"
    assert torch.load(whole / "optimizer.pt", weights_only=True)["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}
    went_on, held, _ = on_ranks(2, tmp_path / "two", FSDP2, str(whole), {"max_steps": 6})
    assert held.keys() == seen.found.keys() and all(torch.equal(held[key], seen.found[key]) for key in held)
    assert went_on == pytest.approx(losses(one)[:6], abs=1e-5)
