"""The fold: what is finished is skipped, what was cut off resumes bit for bit, another recipe is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import torch
import yaml
from support.ranks import run_ranks
from support.runs import recipe_data, run_rank, weights
from support.training import FSDP2, HSDP, optimizer_state
from transformers.utils.logging import is_progress_bar_enabled

from fire_llm import UserError, load_recipe, run_recipe
from fire_llm.core.atomic import checkpoints
from fire_llm.experiment.batch import phase_steps, split_batch
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.evaluate_run import evaluate_run
from fire_llm.experiment.jobs import only_run
from fire_llm.experiment.stages import expand, final_checkpoint, select


def test_results_hold_what_the_schema_promises(finished):
    folder, results = finished
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert list(results["arms"]) == ["base", "full-reset", "fire"]
    assert results["first_corpus"] == "a" and results["new_corpus"] == "b"
    for arm in results["arms"].values():
        for corpus in ("a", "b"):
            final = arm["final"][corpus]
            assert {"nll", "perplexity", "bits_per_byte", "tokens"} <= set(final)
            assert final["tokens"] == results["corpora"][corpus]["validation_tokens"]
        assert [e["step"] for e in arm["curve"] if e["eval"]] == [0, 4, 8]
        assert arm["runs"][0]["start"] == {"phase": "first", "arm": None, "checkpoint": "final", "step": 12}
    assert results["phases"][0]["steps"] == 12
    # The metadata of a wheel may leave out the build that torch tells, such as +cu130.
    assert results["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_every_arm_saw_the_same_batches(finished):
    _, results = finished
    hashes = {run["batches_hash"] for arm in results["arms"].values() for run in arm["runs"]}
    assert len(hashes) == 1
    assert hashes != {results["phases"][0]["batches_hash"]}


def test_final_perplexity_is_what_a_plain_loop_measures_on_the_saved_checkpoint(finished, texts):
    import math

    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fire_llm.data.corpora import CorpusSpec, resolve

    folder, results = finished
    checkpoint = final_checkpoint(folder / "second" / "fire" / "seed-1")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    corpus = resolve("b", CorpusSpec(files="b.jsonl", holdout=0.1), texts)
    documents = list(corpus.documents("validation"))
    stream = [tokenizer.eos_token_id]
    for text in documents:
        stream += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    total = 0.0
    for start in range(0, len(stream) - 1, 32):
        window = torch.tensor(stream[start : start + 33])
        with torch.no_grad():
            total += float(F.cross_entropy(model(input_ids=window[None, :-1]).logits[0], window[1:], reduction="sum"))
    final = results["arms"]["fire"]["final"]["b"]
    assert final["tokens"] == len(stream) - 1
    assert final["nll"] == pytest.approx(total / (len(stream) - 1), rel=1e-6)
    assert final["bits_per_byte"] == pytest.approx(
        total / math.log(2) / sum(len(t.encode()) for t in documents), rel=1e-6
    )


def test_full_reset_returns_to_the_runs_own_first_weights(finished, texts):
    """After the reset and before any step, the loss is the first phase's at step 0."""
    _, results = finished
    first = results["phases"][0]["curve"][0]["eval"]
    reset = results["arms"]["full-reset"]["curve"][0]["eval"]
    assert reset["a"]["nll"] == pytest.approx(first["a"]["nll"], rel=1e-12)
    kept = results["arms"]["base"]["curve"][0]["eval"]
    assert kept["a"]["nll"] == results["phases"][0]["final"]["a"]["nll"]


def test_reports_of_resets_are_in_the_results(finished):
    _, results = finished
    for name, touched in [("base", 0), ("fire", 12), ("full-reset", 32)]:
        report = results["arms"][name]["runs"][0]["reset"]
        assert len(report["touched"]) == touched
        matrices = [t for t in [*report["touched"], *report["untouched"]] if t["dfi_before"] is not None]
        assert len(matrices) == 13 and all(len(t["sigma_before"]) == 32 for t in matrices)


def test_running_again_trains_nothing(finished, texts):
    folder, results = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    again = run_recipe(load_recipe(recipe_data(texts)), folder, progress=False)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")} == before
    assert again["arms"] == results["arms"]


def test_without_progress_no_library_draws_a_bar(texts, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", True)  # the tests' environment turns it off
    recipe = load_recipe(recipe_data(texts), ["phases.0.steps=6", "phases.1.steps=1", "phases.1.arms={base: none}"])
    run_recipe(recipe, tmp_path / "run", progress=False)
    evaluate_run(tmp_path / "run", ["a"], progress=False)
    said = capfd.readouterr().err
    assert "Writing model shards" not in said and "Loading weights" not in said
    assert is_progress_bar_enabled()


def test_an_added_arm_is_all_that_is_trained(finished, texts):
    folder, results = finished
    data = recipe_data(texts)
    data["phases"][1]["arms"] = {"rescale": "rescale", **data["phases"][1]["arms"]}
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    more = run_recipe(load_recipe(data), folder, arms=["rescale"], progress=False)
    assert {
        p: t for p, t in {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}.items() if p in before
    } == before
    assert set(more["arms"]) == {"rescale", "base", "full-reset", "fire"}
    assert more["arms"]["rescale"]["runs"][0]["batches_hash"] == results["arms"]["fire"]["runs"][0]["batches_hash"]


def test_a_changed_recipe_is_refused_with_what_changed(finished, texts):
    folder, _ = finished
    data = recipe_data(texts)
    data["optimizer"]["lr"] = 1.0e-3
    data["phases"][1]["arms"]["fire"]["iterations"] = 7
    with pytest.raises(UserError, match=r"begun with another recipe:\n  optimizer.lr: 0.003 then, 0.001 now"):
        run_recipe(load_recipe(data), folder, progress=False)
    data["optimizer"]["lr"] = 3.0e-3
    with pytest.raises(UserError, match=r"fire/seed-1' was begun with another recipe"):
        run_recipe(load_recipe(data), folder, progress=False)


def test_checkpoints_kept_and_the_start_they_give(finished, texts, tmp_path):
    folder, results = finished
    best = min(
        (e for e in results["phases"][0]["curve"] if e["eval"] and e["step"]), key=lambda e: e["eval"]["a"]["nll"]
    )
    assert {step for _, step in checkpoints(folder / "first" / "seed-1")} == {6, 12, best["step"]}
    data = recipe_data(texts)
    data["phases"][1].update(start_from={"first": [6, "final"]}, arms={"base": "keep"})
    data["seed"] = [1, 2]
    more = run_recipe(load_recipe(data), cut_off(folder, tmp_path / "starts", at=12), progress=False)
    assert set(more["arms"]) == {"base@6", "base@final"}
    for arm in more["arms"].values():
        assert [run["seed"] for run in arm["runs"]] == [1, 2]
        nll = [run["final"]["b"]["nll"] for run in arm["runs"]]
        assert nll[0] != nll[1]
        assert arm["final"]["b"]["nll"] == pytest.approx(sum(nll) / 2)
        assert arm["final"]["b"]["nll_std"] == pytest.approx(abs(nll[0] - nll[1]) / 2**0.5)
    assert more["arms"]["base@final"]["runs"][0]["final"] == results["arms"]["base"]["runs"][0]["final"]


# ---- several processes


def run_on(world, texts, folder, environment=None, arms=(), **batch):
    """Run the tiny recipe on gloo ranks; return the results, the same on all of them, and what the first said."""
    data = recipe_data(texts)
    data["batch"].update(batch)
    (folder.parent / "ranks").mkdir(exist_ok=True)
    each = run_ranks(world, run_rank, folder.parent / "ranks", data, folder, environment or {}, arms, seconds=250)
    assert all(results == each[0][0] for results, _ in each) and not any(said for _, said in each[1:])
    return each[0]


def assert_same(results, alone):
    """Compare batches exactly, and every loss on the way to rounding."""
    ours = [*results["phases"], *(arm["runs"][0] for arm in results["arms"].values())]
    theirs = [*alone["phases"], *(alone["arms"][name]["runs"][0] for name in results["arms"])]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["batches_hash"] == other["batches_hash"]
        for a, b in zip(mine["curve"], other["curve"], strict=True):
            assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
            for corpus, measured in a["eval"].items():
                assert measured["nll"] == pytest.approx(b["eval"][corpus]["nll"], abs=1e-5)


def cut_off(folder, copy, at=6):
    """Copy a run as it was when its first phase had just saved a step."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "second")
    for path, step in checkpoints(copy / "first" / "seed-1"):
        if step > at:
            shutil.rmtree(path)
    return copy


def test_replicas_and_shards_on_two_and_three_processes_end_at_the_same_losses(finished, texts, tmp_path):
    """1 process → 3 replicas from the middle on; 2 shards from the start; these → 1 process from the middle on."""
    whole, alone = finished
    three, said = run_on(3, texts, cut_off(whole, tmp_path / "three"), arms=["fire"], sequences_per_device=4)
    assert_same(three, alone)
    assert "first: goes on from step 6, on 3 process(es) instead of 1: the same batches\n" in said

    shards, _ = run_on(2, texts, tmp_path / "shards", FSDP2, ["full-reset", "fire"], sequences_per_device=3)
    assert set(shards["arms"]) == {"full-reset", "fire"}
    assert_same(shards, alone)
    for part in ("first", "second/fire", "second/full-reset"):
        # An ordinary folder: the same tensors under the same names; and the optimizer's state as one process has it.
        mine, theirs = (final_checkpoint(folder / part / "seed-1") for folder in (tmp_path / "shards", whole))
        a, b = weights(mine), weights(theirs)
        assert list(a) == list(b) and all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)
        a, b = map(optimizer_state, (mine, theirs))
        assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
        assert all(
            torch.allclose(a["state"][i][k], b["state"][i][k], atol=1e-5) for i in a["state"] for k in b["state"][i]
        )
        assert [p.name for p in mine.iterdir() if "fsdp" in p.name or p.is_dir()] == ["optimizer"]
        assert json.loads((mine / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]

    alone_again = run_recipe(
        load_recipe(recipe_data(texts)), cut_off(tmp_path / "shards", tmp_path / "one"), arms=["fire"], progress=False
    )
    assert_same(alone_again, alone)


@pytest.mark.slow
def test_shards_resume_bit_for_bit_and_on_more_processes(finished, texts, tmp_path):
    whole, _ = run_on(2, texts, tmp_path / "whole", FSDP2, ["fire"])
    again, _ = run_on(2, texts, cut_off(tmp_path / "whole", tmp_path / "again"), FSDP2, ["fire"])
    for part in ("first/seed-1", "second/fire/seed-1"):
        a, b = (weights(final_checkpoint(tmp_path / run / part)) for run in ("whole", "again"))
        assert all(torch.equal(a[name], b[name]) for name in a), part
    assert whole["arms"]["fire"]["final"] == again["arms"]["fire"]["final"]
    assert_same(run_on(3, texts, cut_off(tmp_path / "whole", tmp_path / "more"), FSDP2, ["fire"])[0], finished[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (4, HSDP),
        (2, {**FSDP2, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}),
        (2, {**FSDP2, "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}),
    ],
    ids=["hsdp", "one-loads", "no-wrap"],
)
def test_other_ways_to_shard_end_at_the_same_losses(world, changes, texts, tmp_path):
    data = recipe_data(texts)
    data["batch"]["sequences_per_device"] = 1
    alone = run_recipe(load_recipe(data), tmp_path / "alone", arms=["fire"], progress=False)
    assert_same(run_on(world, texts, tmp_path / "many", changes, ["fire"], sequences_per_device=1)[0], alone)
    resumed = cut_off(tmp_path / "many", tmp_path / "resumed")
    assert_same(run_on(world, texts, resumed, changes, ["fire"], sequences_per_device=1)[0], alone)


def ranks_of(launcher):
    return {child.environ()["RANK"]: child for child in psutil.Process(launcher.pid).children()}


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_launch_and_one_process_goes_on(finished, texts, tmp_path):
    _, alone = finished
    recipe, output = tmp_path / "tiny.yaml", tmp_path / "two"
    recipe.write_text(yaml.safe_dump(recipe_data(texts)))
    command = [sys.executable, "-m", "fire_llm", "run", str(recipe), "--output", str(output), "--arm", "fire"]
    command += ["--num-processes", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not checkpoints(output / "first" / "seed-1"):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()[-2000:]
        time.sleep(0.02)
    ranks = ranks_of(process)
    ranks["1"].kill()
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and not any(rank.is_running() for rank in ranks.values())
    assert f"fire-llm: rank 1 (process {ranks['1'].pid}) was killed by SIGKILL" in error
    assert "the same command goes on from the newest checkpoint" in error
    assert error.count("fire-llm:") == 1 and "Traceback" not in error and "elastic" not in error
    assert_same(run_recipe(load_recipe(recipe), output, arms=["fire"], progress=False), alone)


def test_two_runs_in_one_folder_at_once_are_refused(texts, tmp_path):
    with only_run(tmp_path), pytest.raises(UserError, match="another run is writing into"):
        run_recipe(load_recipe(recipe_data(texts)), tmp_path, progress=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(texts, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="permission denied"):
        run_recipe(load_recipe(recipe_data(texts)), tmp_path / "run", progress=False)


def test_too_little_room_is_told_before_training(texts, tmp_path, monkeypatch):
    import fire_llm.experiment.train

    monkeypatch.setattr(fire_llm.experiment.train, "free_bytes", lambda folder: 1000)
    with pytest.raises(UserError, match=r"has 1e-06 GB free and the stage's checkpoints take .* GB"):
        run_recipe(load_recipe(recipe_data(texts)), tmp_path / "run", progress=False)
    assert not list((tmp_path / "run").rglob("checkpoint-*"))


def test_an_output_that_is_a_file_is_refused(texts, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write below"):
        run_recipe(load_recipe(recipe_data(texts)), tmp_path / "file", progress=False)
    with pytest.raises(UserError, match="cannot write below"):
        run_recipe(load_recipe(recipe_data(texts)), tmp_path / "file" / "run", progress=False)


def test_an_empty_and_a_short_corpus_are_refused(texts, tmp_path):
    for text, message in [
        ("", "empty|no training documents"),
        (json.dumps({"text": "two words"}), "fewer than one block|documents"),
    ]:
        path = tmp_path / "c.jsonl"
        path.write_text(text)
        data = recipe_data(texts)
        data["corpora"]["a"] = {"files": str(path), "validation": str(texts / "a.jsonl")}
        data["tokenizer"] = {"train": 300, "corpora": ["b"]}
        with pytest.raises(UserError, match=message):
            run_recipe(load_recipe(data), tmp_path / "run", progress=False)


def test_a_tokenizer_larger_than_the_embedding_is_refused(finished, texts, tmp_path):
    data = recipe_data(texts)
    data["model"]["config"]["vocab_size"] = 128
    with pytest.raises(UserError, match="the tokenizer has 300 tokens and the model's embedding 128 rows"):
        run_recipe(load_recipe(data), tmp_path / "run", progress=False)


def test_the_arms_to_run_are_chosen_with_their_parents(texts):
    stages = expand(RunContext(load_recipe(recipe_data(texts))))
    assert [u.folder for u in select(stages, ["fire"])] == ["first/seed-1", "second/fire/seed-1"]
    with pytest.raises(UserError, match=r"no arm 'fier'. Did you mean 'fire'\? Arms: base, full-reset, fire"):
        select(stages, ["fier"])


def test_lengths_and_batches_are_arithmetic(texts):
    recipe = load_recipe(
        recipe_data(texts), ["batch={tokens_per_step: 491520}", "model.context=1024", "model.config.n_positions=1024"]
    )
    for world, sequences in ((1, 480), (8, 60), (3, 160)):
        micro, accumulation = split_batch(RunContext(recipe), world)
        assert micro * accumulation == sequences and micro > 1
    with pytest.raises(UserError, match="does not divide"):
        split_batch(RunContext(recipe), 7)
    phase = recipe.phases[0].model_copy(update={"steps": None, "epochs": 1.0})
    # OpenWebText and WikiText-103 once at 491,520 tokens a step: the paper's 18.6 k steps.
    assert phase_steps(phase, 491_520, 9_036_000_000 + 117_920_140) == 18_623
    assert phase_steps(phase.model_copy(update={"epochs": None, "tokens": 491_521}), 491_520, 0) == 2


def test_diagnostics_come_with_the_curves_and_survive_a_resumption(texts, tmp_path, monkeypatch):
    """Corpus a is the first phase's, b the heavier of the second's; SFE counts from before the reset."""
    from fire_llm.reporting.tables import load_results, write_report
    from fire_llm.training.trainer import ContinualTrainer

    data = recipe_data(texts)
    data["evaluate"] |= {"diagnostics_every_steps": 5, "every_steps": 6}
    data["seed"] = [1, 2]
    data["model"]["config"]["n_layer"] = 1
    data["batch"]["tokens_per_step"] = 64
    for phase in data["phases"]:
        phase["steps"] = 6
    data["phases"][1]["arms"] = {"base": "keep", "full-reset": "full_reset"}
    saved = ContinualTrainer._save_checkpoint

    def once(trainer, *arguments):
        saved(trainer, *arguments)
        if trainer.state.global_step == 4:
            monkeypatch.setattr(ContinualTrainer, "_save_checkpoint", saved)
            raise KeyboardInterrupt

    whole = run_recipe(load_recipe(data), tmp_path / "whole", progress=False)
    monkeypatch.setattr(ContinualTrainer, "_save_checkpoint", once)
    data["seed"] = 2
    with pytest.raises(KeyboardInterrupt):
        run_recipe(load_recipe(data), tmp_path / "cut", progress=False)
    cut = run_recipe(load_recipe(data), tmp_path / "cut", progress=False)
    assert [p["diagnosed_on"] for p in whole["phases"]] == ["a", "a"]
    for name, arm in whole["arms"].items():
        assert [run["diagnosed_on"] for run in arm["runs"]] == ["b", "b"]
        assert arm["runs"][1]["curve"] == cut["arms"][name]["runs"][0]["curve"]
        for curve in (arm["curve"], *(run["curve"] for run in arm["runs"])):
            measured = {e["step"]: e["diagnostics"] for e in curve if e["diagnostics"]}
            assert list(measured) == [0, 5, 6]
            assert (measured[0]["sfe"] == 0) == (name == "base") and measured[6]["sfe"] > 0
            assert 0 < measured[0]["srank_share"] <= 1 and {"hessian_eigenvalue", "gradient_norm"} <= set(measured[0])
        pairs = zip(*(run["curve"] for run in arm["runs"]), strict=True)
        for mean, (one, two) in zip(arm["curve"], pairs, strict=True):
            if mean["diagnostics"]:
                both = one["diagnostics"]["srank"], two["diagnostics"]["srank"]
                assert mean["diagnostics"]["srank"] == sum(both) / 2
    page = write_report(load_results(tmp_path / "whole"), tmp_path).read_text()
    assert "srank of the last hidden states" in page and "held-out text of b. Means over the seeds." in page
    data["evaluate"]["diagnostics_every_steps"] = 2
    with pytest.raises(UserError, match=r"evaluate\.diagnostics_every_steps: 5 then, 2 now"):
        run_recipe(load_recipe(data), tmp_path / "whole", progress=False)


def test_diagnostics_are_off_by_default(finished):
    _, results = finished
    assert results["phases"][0]["diagnosed_on"] is None
    assert not any(e["diagnostics"] for arm in results["arms"].values() for e in arm["curve"])
