"""A stage is what it read, not what that was called: models, tokenizers, texts, tokens and parents by content."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from support.tiny_recipe import recipe

from fire_llm import UserError, load_recipe, run_recipe
from fire_llm.data.tokens import seal
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.evaluate_run import evaluate_run
from fire_llm.experiment.recipe import load_trials
from fire_llm.experiment.run import run_sweep
from fire_llm.experiment.sources import Source
from fire_llm.experiment.stages import RECORDED, expand, refuse_links
from fire_llm.reporting.tables import load_results, markdown_table

SHORT = ["phases.0.steps=2", "phases.0.keep=[]", "phases.1.steps=2", "evaluate.max_tokens=200"]
FIRST, FIRE = Path("first") / "seed-1", Path("second") / "fire" / "seed-1"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Run the tiny recipe once; return its folder, with the texts, the recipe, the cache and the run."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIRE_LLM_CACHE", str(folder / "cache"))
        run_recipe(load_recipe(recipe(folder), SHORT), folder / "run", progress=False)
    return folder


@pytest.fixture
def begun(whole, tmp_path, monkeypatch) -> Path:
    """Copy it as it was when its first phase was finished and its second not begun."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run" / "second")
    monkeypatch.setenv("FIRE_LLM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def again(folder: Path, *more: str) -> dict:
    data = yaml.safe_load((folder / "tiny.yaml").read_text()) | {"data_root": str(folder)}
    return run_recipe(load_recipe(data, [*SHORT, *more]), folder / "run", progress=False)


# ---- models and tokenizers that a run is given


def negated(model: Path) -> str:
    weights = load_file(model / "model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    return "model: model.safetensors has changed"


def other_config(model: Path) -> str:
    path = model / "config.json"
    path.write_text(path.read_text().replace('"layer_norm_epsilon": 1e-05', '"layer_norm_epsilon": 1e-04'))
    return "model: config.json has changed"


def other_words(model: Path) -> str:
    path = model / "tokenizer.json"
    data = json.loads(path.read_text())
    words = data["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(data))
    return "tokenizer: tokenizer.json has changed"


def shards(model: Path) -> str:
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    return "model: model-00001-of-00001.safetensors is new"


@pytest.mark.parametrize("change", [negated, other_config, other_words, shards], ids=lambda change: change.__name__)
def test_what_a_run_began_with_is_not_replaced_between_two_arms(change, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("FIRE_LLM_CACHE", str(tmp_path / "cache"))
    given = shutil.copytree(whole / "run" / FIRST / "checkpoint-2", tmp_path / "given")
    data = yaml.safe_load((whole / "tiny.yaml").read_text())
    data |= {"model": {"checkpoint": str(given), "context": 16}, "tokenizer": None}
    data["phases"] = [{**data["phases"][1], "arms": {"base": "none", "fire": "fire"}, "steps": 1}]
    found = load_recipe({key: value for key, value in data.items() if value is not None}, ["evaluate.max_tokens=200"])
    run_recipe(found, tmp_path / "run", arms=["base"], progress=False)
    before = sorted(p.name for p in (tmp_path / "run").rglob("*"))
    times = (given / "model.safetensors").stat()
    said = change(given)
    for path in given.glob("model*.safetensors"):  # the file system's times are no evidence
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    for arms in ([], ["fire"]):  # the other arm's results would stand beside those of base
        with pytest.raises(UserError, match=r"base/seed-1' was begun with other files") as error:
            run_recipe(found, tmp_path / "run", arms=arms, progress=False)
        assert said in str(error.value) and "Choose another --output" in str(error.value)
    assert sorted(p.name for p in (tmp_path / "run").rglob("*")) == before
    if change in (negated, other_words):
        with pytest.raises(UserError, match=f"{said} since"):
            evaluate_run(tmp_path / "run", progress=False)


def test_a_model_that_is_replaced_while_a_command_runs_is_not_read(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("FIRE_LLM_CACHE", str(tmp_path / "cache"))
    given = shutil.copytree(whole / "run" / FIRST / "checkpoint-2", tmp_path / "given")
    found = load_recipe({**yaml.safe_load((whole / "tiny.yaml").read_text()), "model": {"checkpoint": str(given)}})
    command = RunContext(found, tmp_path / "run")
    known = json.loads(json.dumps(command.known()))  # as it comes to a worker
    negated(given)
    for run in (command, RunContext(found, tmp_path / "run", known=known)):
        said = r"not what it was when this command began: model: model\.safetensors"
        with pytest.raises(UserError, match=said), run.reading("model"):
            pytest.fail("read")


def test_the_runs_own_tokenizer_is_not_read_damaged(begun):
    path = begun / "run" / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"a": 65', '"a": 66', 1).replace('"Ġthe"', '"Ġteh"', 1))
    with pytest.raises(UserError, match=r"tokenizer' is damaged: tokenizer\.json"):
        again(begun)
    shutil.rmtree(path.parent)
    assert set(again(begun)["arms"]) == {"fire"}  # trained again, to the same tokens


# ---- texts and tokens


def test_a_text_that_changes_while_a_command_runs_changes_nothing(begun):
    data = yaml.safe_load((begun / "tiny.yaml").read_text()) | {"data_root": str(begun)}
    command = RunContext(load_recipe(data, SHORT), begun / "run")
    known = json.loads(json.dumps(command.known()))
    tokens = command.tokens("b", "train").tokens.tolist()
    (begun / "b.jsonl").write_text('{"text": "water"}\n' * 200)
    worker = RunContext(load_recipe(data, SHORT), begun / "run", known=known)
    assert worker.tokens("b", "train").tokens.tolist() == tokens  # of the text as it was
    assert [stage.spec for stage in expand(worker)] == [stage.spec for stage in expand(command)]
    shutil.rmtree(begun / "cache")
    worker.release()
    with pytest.raises(UserError, match="corpus 'b': its text has changed since this command began"):
        worker.tokens("b", "train")
    with pytest.raises(UserError, match=r"begun with another recipe:\n  corpora\.b"):
        again(begun)


def test_tokens_that_only_look_whole_are_not_those_of_the_run(begun):
    (found,) = (begun / "cache").glob("a-train-*")
    raw = bytearray((found / "tokens.bin").read_bytes())
    raw[::2] = bytes(b ^ 1 for b in raw[::2])
    (found / "tokens.bin").write_bytes(raw)
    meta = json.loads((found / "meta.json").read_text())
    seal(found, {key: value for key, value in meta.items() if key not in ("files", "digest")})
    with pytest.raises(UserError, match=r"corpus 'a' \(train\): .* holds other tokens than a stage"):
        again(begun)
    shutil.rmtree(found)
    again(begun)


# ---- what stages wrote


def test_arms_start_from_the_weights_that_the_others_started_from(whole, begun):
    shutil.copytree(whole / "run" / "second", begun / "run" / "second")
    other = begun / "other"
    data = yaml.safe_load((begun / "tiny.yaml").read_text()) | {"data_root": str(begun)}
    run_recipe(load_recipe(data, [*SHORT, "optimizer.lr=1.0e-2"]), other, progress=False)
    shutil.rmtree(begun / "run" / FIRST / "checkpoint-2")
    shutil.copytree(other / FIRST / "checkpoint-2", begun / "run" / FIRST / "checkpoint-2")
    with pytest.raises(UserError, match=r"checkpoint-2', which it starts from, has other weights"):
        again(begun)


def test_a_reset_report_is_not_edited_in_place(whole, begun):
    shutil.copytree(whole / "run" / "second", begun / "run" / "second")
    path = begun / "run" / FIRE / "reset.json"
    path.write_text(path.read_text().replace('"fire"', '"none"', 1))
    with pytest.raises(UserError, match=r"reset\.json' is not what was written"):
        again(begun)


def test_an_evaluation_is_of_the_weights_that_it_measured(begun, capsys):
    again(begun)
    run = begun / "run"
    evaluation = evaluate_run(run, progress=False)
    assert load_results(run).evaluation is not None and load_results(run).evaluation_note == ""
    shutil.rmtree(run / "second")
    again(begun, "phases.1.optimizer.lr=3.0e-2")
    found = load_results(run)
    assert found.evaluation is None
    assert "evaluation.json is not shown: it measured other weights than second/fire/seed-1/checkpoint-2 has now" in (
        found.evaluation_note
    )
    assert "is not shown: it measured other weights" in markdown_table(found)
    for row in evaluation["rows"]:  # as earlier versions wrote it
        del row["weights"]
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    assert (
        load_results(run).evaluation is not None and "does not say which weights" in load_results(run).evaluation_note
    )
    weights = run / FIRE / "checkpoint-2" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    os.utime(weights, ns=(1, 1))
    with pytest.raises(UserError, match=r"checkpoint-2' is damaged: its weights are not what was written"):
        evaluate_run(run, progress=False)


# ---- what may differ


def test_a_run_goes_on_with_smaller_forward_passes(whole, begun):
    """Two stages were begun with 2 sequences a pass: the parent, and one whose digest of the parent holds that too."""
    for section, sequences in (("batch", 1), ("evaluate", 2)):
        found = again(begun, f"{section}.sequences_per_device={sequences}")
    for corpus, scores in load_results(whole / "run").arms["fire"].final.items():
        assert found["arms"]["fire"]["final"][corpus]["nll"] == pytest.approx(scores.nll, rel=1e-5)
    with pytest.raises(UserError, match=r"batch\.tokens_per_step: 128 then, 64 now"):
        again(begun, "batch.tokens_per_step=64")
    data = yaml.safe_load((begun / "tiny.yaml").read_text()) | {"data_root": str(begun)}
    locks = {stage.lock for n in (1, 2) for stage in _stages(data, begun, f"batch.sequences_per_device={n}")}
    assert len(locks) == 2  # one a stage: two sizes do not train one stage at the same time


def _stages(data: dict, folder: Path, *more: str) -> list:
    return expand(RunContext(load_recipe(data, [*SHORT, *more]), folder / "run"))


def test_a_run_of_an_earlier_version_goes_on(begun):
    """Its stages list no files, tokens, weights or reports, and its tokenizer has no manifest."""
    path = begun / "run" / FIRST / "unit.json"
    unit = json.loads(path.read_text())
    assert {"tokens"} == RECORDED & set(unit)
    path.write_text(json.dumps({key: value for key, value in unit.items() if key not in RECORDED}))
    (begun / "run" / "tokenizer" / "manifest.json").unlink()
    again(begun)
    assert {"tokens", "weights", "reset"} == RECORDED & set(
        json.loads((begun / "run" / FIRE / "unit.json").read_text())
    )


# ---- links


@pytest.mark.parametrize(
    "place", [".workers/host-1.log", ".workers", ".locks/recipes.lock", ".lock", "results.json.partial", "sweep.json"]
)
def test_a_link_out_of_a_sweeps_folder_is_not_followed(place, begun):
    outside = begun / "outside"
    if place == ".workers":
        outside.mkdir()
    else:
        outside.write_text("precious")
    sweep = begun / "sweep"
    (sweep / place).parent.mkdir(parents=True)
    (sweep / place).symlink_to(outside)
    trials = load_trials(begun / "tiny.yaml", SHORT, ["optimizer.lr=[3.0e-3,2.0e-3]"])
    with pytest.raises(UserError, match=r"leads out of the run's folder, to '.*outside'"):
        run_sweep(trials, sweep, workers=2, progress=False)
    assert outside.is_dir() and not [*outside.iterdir()] if place == ".workers" else outside.read_text() == "precious"
    (sweep / place).unlink()
    (sweep / "inside").mkdir()
    (sweep / ".workers").mkdir(exist_ok=True)
    (sweep / ".workers" / "moved").symlink_to(sweep / "inside")
    refuse_links(sweep, [])  # what stays inside does no harm


def test_a_model_of_the_hub_is_fetched_without_what_another_file_holds(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: asked.append((name, how)) or "there")
    assert Source("model", str(tmp_path), ("*.json",)).folder() == str(tmp_path) and not asked
    assert Source("model", "owner/name", ("*.json",)).folder() == "there"
    ((name, how),) = asked
    assert name == "owner/name" and "*.json" in how["allow_patterns"] and how["ignore_patterns"] == ["*/*"]


def test_a_model_that_is_neither_a_folder_nor_on_the_hub_is_told():
    with pytest.raises(UserError, match=r"model: .*'gpt3'.*, and a Hub id has the form owner/name"):
        Source("model", "gpt3", ("*.json",)).folder()
    with pytest.raises(UserError, match="'owner/none'"):  # no network
        Source("model", "owner/none", ("*.json",)).folder()
