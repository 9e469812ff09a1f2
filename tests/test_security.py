"""What a recipe, a checkpoint or a folder from somebody else cannot do."""

from __future__ import annotations

import ast
import functools
import json
import pickle
from pathlib import Path

import pytest
from support.models import tiny_gpt2

from fire_llm import UserError, load_recipe, run_recipe
from fire_llm.cli import main
from fire_llm.core.errors import redact
from fire_llm.core.launch import report_failure
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.stages import expand, refuse_links
from fire_llm.models import config_for, load_model, load_tokenizer

PACKAGE = Path(__file__).parent.parent / "fire_llm"
MODULES = sorted(PACKAGE.rglob("*.py"))
TOKEN = "hf_" + "Zx9" * 11


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def calls(path: Path) -> list[tuple[str, dict[str, ast.expr], int]]:
    """Return every call in a module: what is called, its keywords, the line."""
    found = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
    return [(ast.unparse(c.func), {k.arg: k.value for k in c.keywords if k.arg}, c.lineno) for c in found]


def constant(node: ast.expr | None) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def test_nothing_in_the_package_can_be_made_to_run_code():
    assert len(MODULES) > 50
    pickles = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "imp", "runpy"}
    for path in MODULES:
        for node in ast.walk(parsed(path)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not pickles & {name.split(".")[0] for name in names}, path
        for name, given, line in calls(path):
            where = f"{path}:{line}"
            assert name not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"), where
            assert constant(given.get("shell")) is not True, where
            if name == "torch.load":
                assert constant(given.get("weights_only")) is True, where
            if name in ("np.load", "numpy.load"):
                assert constant(given.get("allow_pickle", ast.Constant(False))) is False, where
            if name.startswith("yaml.") and "load" in name:
                assert name == "yaml.safe_load" or ast.unparse(given["Loader"]) == "Loader", where


def test_code_of_a_checkpoint_is_never_asked_for_and_pickles_never_read():
    from_hub = 0
    for path in MODULES:
        for name, given, line in calls(path):
            where = f"{path}:{line}"
            assert constant(given.get("trust_remote_code", ast.Constant(False))) is False, where
            if "Auto" in name and name.endswith(".from_pretrained"):
                from_hub += 1
                # Left out, transformers asks at the terminal, and a "y" runs the code.
                assert "trust_remote_code" in given, where
                if "ForCausalLM" in name:
                    assert constant(given.get("use_safetensors")) is True, where
    assert from_hub >= 2


class Harm:
    """Leave a file behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated_model.pth"])
def test_a_pickled_model_is_refused_unread(tmp_path, name):
    tiny_gpt2().config.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    pickle.loads((tmp_path / name).read_bytes())
    (tmp_path / "harm").unlink()  # it would have worked
    with pytest.raises(UserError, match=rf"pickles \({name}\).*convert them to safetensors"):
        load_model(tmp_path)
    assert not (tmp_path / "harm").exists()


def test_a_checkpoint_that_brings_code_is_refused_and_the_code_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever is asked says yes
    code = f"from pathlib import Path\nPath({str(tmp_path / 'harm')!r}).touch()\n"
    (tmp_path / "code.py").write_text(code)
    auto = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": ["code.T", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "its-own", "auto_map": auto}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": auto}))
    for load in (config_for, load_model, load_tokenizer):
        with pytest.raises(UserError):
            load(str(tmp_path))
    assert not (tmp_path / "harm").exists()
    with pytest.raises(UserError, match="has no attribute 'auto_map'"):
        config_for("gpt-tiny", overrides={"auto_map": auto})


# ---- paths


def recipe_data(folder: Path, **changes) -> dict:
    folder.mkdir(exist_ok=True)
    lines = [" ".join(f"w{(n + 1) * (k + 3) % 31}" for k in range(40)) + f" {n}" for n in range(200)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return {
        "name": "tiny",
        "data_root": str(folder),
        "model": {"preset": "gpt-tiny", "context": 16, "config": {"n_embd": 16, "n_layer": 1, "n_head": 2}},
        "tokenizer": {"train": 270},
        "corpora": {"a": {"files": "a.jsonl", "holdout": 0.1}},
        "batch": {"tokens_per_step": 64},
        "phases": [
            {"name": "first", "data": {"a": 1.0}, "steps": 2},
            {"name": "second", "data": {"a": 1.0}, "steps": 2, "arms": {"fire": "fire"}},
        ],
        **changes,
    }


OUTWARD = [
    "..", ".", "../x", "a/../../x", "/tmp/x", "a/b", "~", "~root", "a\\b", "C:x", "", " ", "a ", "x\n",
    "x\x00", ".hidden",
    "-x", "x" * 65, "tokenizer", "Tokenizer", "recipe.json", "results.JSON", "report.html", "first.partial", "x.lock",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTWARD)
def test_names_stay_names_of_folders_in_the_run(tmp_path, name):
    taken = name.lower() in ("tokenizer", "recipe.json", "results.json", "report.html", "first.partial", "x.lock")
    for change, key in (
        ({"name": name}, "name"),
        ({"phases": [{"name": name, "data": {"a": 1.0}, "steps": 1}]}, "phases[0].name"),
        ({"phases": [{"name": "p", "data": {"a": 1.0}, "steps": 1, "arms": {name: "fire"}}]}, "phases[0].arms"),
    ):
        if taken and key != "phases[0].name":
            continue  # such a folder would be runs/tokenizer, or p/tokenizer
        with pytest.raises(UserError) as error:
            load_recipe(recipe_data(tmp_path, **change))
        assert f"  {key}" in str(error.value) or "  phases[0].arms" in str(error.value), error.value


def test_a_folder_that_leads_out_of_the_run_is_refused(tmp_path):
    recipe = load_recipe(recipe_data(tmp_path / "texts"))
    outside, run = tmp_path / "outside", tmp_path / "run"
    (outside / "seed-1" / "checkpoint-1").mkdir(parents=True)
    run.mkdir()
    (run / "second").symlink_to(outside)
    with pytest.raises(
        UserError, match=r"second/fire/seed-1' leads out of the run's folder, to '.*outside/fire/seed-1'"
    ):
        run_recipe(recipe, run, progress=False)
    assert sorted(p.name for p in outside.rglob("*")) == ["checkpoint-1", "seed-1"]
    elsewhere = tmp_path / "other-disk"
    elsewhere.mkdir()
    (tmp_path / "linked").symlink_to(elsewhere)
    refuse_links(tmp_path / "linked", expand(RunContext(recipe)))  # a whole run may lie elsewhere


# ---- secrets


def test_tokens_are_neither_stored_nor_shown(tmp_path, monkeypatch, capfd):
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, TOKEN)
    data = recipe_data(tmp_path / "texts")
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(data))
    run = tmp_path / "run"
    assert main(["run", str(path), "--output", str(run)]) == 0
    assert main(["apply", str(run / "first/seed-1/checkpoint-2"), str(tmp_path / "applied")]) == 0
    written = [p for folder in (run, tmp_path / "applied") for p in folder.rglob("*") if p.is_file()]
    names = {p.name for p in written}
    assert {"recipe.json", "unit.json", "results.json", "report.html", "trainer_state.json", "fire.json"} <= names
    for file in written:
        assert TOKEN.encode() not in file.read_bytes(), file
    assert main(["check", str(path), f"--set=tokenizer={TOKEN}"]) == 2
    assert main(["check", str(path), f"--set=phases.9={TOKEN}"]) == 2
    assert main(["check", str(path), f"--set=name=[{TOKEN}"]) == 2
    assert main(["check", str(path), "--set=data_root=https://me:sesame@host/x"]) == 2
    out, err = capfd.readouterr()
    assert TOKEN not in out + err and "sesame" not in out + err
    assert "tokenizer.path: the text holds a password or a token" in err or "tokenizer: the text holds" in err


def test_secrets_are_taken_out_of_what_libraries_say(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    said = f"401 for https://me:sesame@host/x?y with a-token-of-another-form, {TOKEN}; see https://host/a@b"
    want = "401 for https://***@host/x?y with ***, hf_***; see https://host/a@b"
    assert redact(said) == want
    report_failure(1, said)
    assert capsys.readouterr().err == f"fire-llm: {want}\n"
    monkeypatch.setenv("HF_TOKEN", "")
    assert redact("plain: 3 faults in 'r.yaml'") == "plain: 3 faults in 'r.yaml'"


def test_the_interpreter_is_the_only_program_that_recipes_lead_to():
    started = [(path.name, line) for path in MODULES for name, _, line in calls(path) if name.startswith("subprocess.")]
    assert {name for name, _ in started} <= {"builtin.py", "collect.py", "processes.py"}, started
    # builtin.py starts Python on a file of the package; results.py asks git for the checkout's commit;
    # processes.py starts Python on a fixed line, with the recipes in a file.
