"""The command line as its users meet it: output, exit codes, one message a mistake, and how long --help takes."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import resource
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from support.models import tiny_gpt2
from support.ranks import run_ranks
from support.tiny_recipe import recipe

from fire_llm import UserError, fire_, perplexity
from fire_llm.cli import main
from fire_llm.cli.parser import VERBS, parser
from fire_llm.cli.run import _as_list
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.recipe import load_trials
from fire_llm.experiment.stages import expand, select
from fire_llm.models import load_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Save a tiny GPT-2 with a byte-level tokenizer."""
    from fire_llm.data import train_tokenizer
    from fire_llm.data.corpora import CorpusSpec, resolve

    folder = tmp_path_factory.mktemp("models")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 200)
    corpus = resolve("text", CorpusSpec(files="text.txt", holdout=0.0), folder)
    tokenizer = train_tokenizer([corpus], 300, progress=False)
    tiny_gpt2(vocab_size=320).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")
    return folder / "gpt2"


def run(*argv: object) -> int:
    return main([str(a) for a in argv])


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_takes_less_than_half_a_second_of_cpu(verb):
    command = [sys.executable, "-m", "fire_llm", *verb.split(), "--help"]

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert any(seconds() < 0.5 for _ in range(4))  # the first writes the bytecode


def test_the_flags_are_frozen():
    verbs = next(a for a in parser()._actions if a.dest == "verb").choices
    flags = {
        name: sorted(o for a in verb._actions for o in a.option_strings if o.startswith("--") and o != "--help")
        for name, verb in verbs.items()
    }
    assert flags == {
        "check": ["--schema", "--set"],
        "run": [
            "--accelerate-config", "--arm", "--dry-run", "--grid", "--machine-rank", "--main-address", "--num-machines",
            "--num-processes", "--output", "--report-to", "--set", "--workers",
        ],
        "apply": [
            "--context", "--device", "--dry-run", "--dtype", "--exclude", "--include", "--init", "--iterations",
            "--layers", "--max-tokens", "--measure-on", "--method", "--native", "--no-measures", "--num-processes",
            "--push-to-hub", "--revision", "--role", "--scale", "--seed", "--shrink", "--solver", "--strength",
            "--tolerance",
        ],
        "inspect": ["--against", "--all", "--device", "--html", "--json", "--native", "--role"],
        "eval": [
            "--again", "--batch-size", "--column", "--compile", "--context", "--data", "--device", "--diagnostics",
            "--document", "--dtype", "--json", "--limit", "--max-tokens", "--num-fewshot", "--num-processes",
            "--per-document", "--prefix", "--split", "--stride", "--tasks",
        ],
        "report": ["--markdown", "--output", "--schema"],
        "push": ["--arm", "--checkpoint", "--public", "--seed", "--start"],
        "demo": [
            "--accelerate-config", "--machine-rank", "--main-address", "--num-machines", "--num-processes", "--output",
            "--report-to", "--set", "--workers",
        ],
        "sweep": [
            "--accelerate-config", "--arm", "--dry-run", "--grid", "--machine-rank", "--main-address", "--num-machines",
            "--num-processes", "--output", "--report-to", "--set", "--workers",
        ],
    }  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_example_is_one_that_the_parser_takes_and_help_ends_with_them(verb, capsys):
    examples = import_module(f"fire_llm.cli.{verb}").EXAMPLES
    assert 2 <= len(examples) <= 4
    for line in examples:
        program, *words = shlex.split(line)
        arguments = parser(words).parse_args(words)
        assert program == "fire-llm" and arguments.verb == verb
        if getattr(arguments, "recipe", "recipe.yaml") not in (None, "recipe.yaml"):  # a built-in one
            grid = [_as_list(text) for text in getattr(arguments, "grid", [])]
            for trial in load_trials(arguments.recipe, arguments.set, grid):
                select(expand(RunContext(trial.recipe)), getattr(arguments, "arm", []))
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert capsys.readouterr().out.endswith("\n".join(["examples:", *(f"  {line}" for line in examples)]) + "\n")


def test_check_prints_the_plan(capsys):
    assert run("check", "demo") == 0
    out = capsys.readouterr().out
    assert "no fault found" in out and "FLOPs" in out and "GB of checkpoints" in out and "libraries/fire" in out
    assert run("check", "demo", "--set", "phases.0.stepss=3") == 2
    assert "phases[0].stepss: unknown key. Did you mean 'steps'?" in capsys.readouterr().err
    assert run("check", "--schema", "demo") == 0
    assert "properties" in json.loads(capsys.readouterr().out)


def test_apply_equals_fire_in_memory_and_loads_with_auto_classes(checkpoint, tmp_path, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = load_file(checkpoint / "model.safetensors")
    assert run("apply", checkpoint, tmp_path / "out", "--iterations", 7, "--role", "lm_head") == 0
    assert "13 tensors touched" in capsys.readouterr().out
    model = load_model(checkpoint)
    fire_(model, iterations=7, roles=("attention", "mlp", "lm_head"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("the fox")["input_ids"] == AutoTokenizer.from_pretrained(checkpoint)("the fox")["input_ids"]
    report = json.loads((tmp_path / "out" / "fire.json").read_text())
    assert report["resets"][0]["options"]["iterations"] == 7
    after = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_apply_other_resets_and_dry_run(checkpoint, tmp_path, capsys):
    assert run("apply", checkpoint, tmp_path / "out", "--method", "shrink_perturb", "--seed", 3, "--shrink", 0.3) == 0
    assert run("apply", checkpoint, tmp_path / "full", "--method", "full_reset", "--init", tmp_path / "out") == 0
    a, b = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "full"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    capsys.readouterr()
    assert run("apply", checkpoint, tmp_path / "dry", "--exclude", "c_fc", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "reset  attention" in out and "excluded by 'c_fc'" in out and "nothing written" in out
    assert not (tmp_path / "dry").exists()


def test_inspect(checkpoint, tmp_path, capsys):
    run("apply", checkpoint, tmp_path / "out")
    capsys.readouterr()
    assert (
        run(
            "inspect",
            tmp_path / "out",
            "--against",
            checkpoint,
            "--json",
            tmp_path / "i.json",
            "--html",
            tmp_path / "i.html",
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "σ max" in out and "transformer.h.0.attn.c_attn.weight[k]" in out  # brackets are no markup
    told = json.loads((tmp_path / "i.json").read_text())
    rows = told["rows"]
    assert told["schema_version"] == 1 and len(rows) == 13
    for key, folder in (("checkpoint", tmp_path / "out"), ("against", checkpoint)):
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert told[key] == {"name": str(folder), "revision": None, "sha256": digest}
        for text in (out, (tmp_path / "i.html").read_text()):
            assert str(folder) in text and digest[:16] in text
    before, after = load_model(checkpoint), load_model(tmp_path / "out")
    row = next(r for r in rows if r["name"] == "transformer.h.0.attn.c_attn.weight[k]")
    old, new = (m.transformer.h[0].attn.c_attn.weight.detach()[:, 32:64].T.double() for m in (before, after))
    assert row["sigma"] == pytest.approx(torch.linalg.svdvals(new).tolist(), rel=1e-5)
    assert row["sfe"] == pytest.approx(float((old - new).square().sum()), rel=1e-5)
    assert row["cosine"] == pytest.approx(float((old * new).sum() / old.norm() / new.norm()), rel=1e-5)
    assert "<html" in (tmp_path / "i.html").read_text()


def test_eval_on_a_file_and_on_a_corpus(checkpoint, tmp_path, capsys):
    from transformers import AutoTokenizer

    text = "the lazy dog jumps over the fox\n\na second document"
    (tmp_path / "t.txt").write_text(text)
    assert run("eval", checkpoint, "--data", tmp_path / "t.txt", "--context", 16, "--json", tmp_path / "e.json") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "in fp32, context" in said and "windows run across documents, after <|endoftext|>" in said
    row = json.loads((tmp_path / "e.json").read_text())["rows"][0]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids: list[int] = []
    for document in text.split("\n\n"):
        ids += [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
    wanted = perplexity(load_model(checkpoint), ids, context=16, prefix=tokenizer.eos_token_id)
    assert row["nll"] == pytest.approx(wanted.nll, rel=1e-9) and row["tokens"] == len(ids)
    assert row["bits_per_byte"] == pytest.approx(wanted.nll * len(ids) / math.log(2) / row["bytes"])
    assert row["bytes"] == len(text.encode()) - 2 and row["words"] == 10 and row["se"]["nll"] > 0


def test_eval_of_two_checkpoints_each_document_by_itself(checkpoint, tmp_path, capsys):
    texts = ["the lazy dog", "jumps", "over the quick brown fox and the dog"]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in texts))
    data = ["--data", tmp_path / "t.jsonl", "--column", "body", "--per-document", "--context", 4, "--stride", 2]
    out = tmp_path / "e.json"
    assert run("eval", checkpoint, checkpoint, *data, "--dtype", "float64", "--diagnostics", "--json", out) == 0
    assert "NLL less that of" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert [row["documents"] for row in found["rows"]] == [3, 3] and found["rows"][0]["precision"] == "fp64"
    assert found["differences"][0]["mean"] == found["differences"][0]["se"] == 0
    assert found["rows"][0]["bytes"] == sum(map(len, texts)) and found["rows"][0]["words"] == 12
    assert len(found["diagnostics"]) == 2


def test_the_first_tokens_of_a_text_alone(checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "t.txt").write_text("the lazy dog\n\njumps over\n\nthe fox and another dog")
    (tmp_path / "u.txt").write_text("the lazy dog\n\njumps over")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = []
    for name in ("t.txt", "u.txt", "t.txt"):
        limit = ["--max-tokens", found[1]["tokens"] + 1] if len(found) == 2 else []
        assert run("eval", checkpoint, f"--data=~/{name}", "--context", 8, "--json=~/e.json", *limit) == 0
        content = json.loads((tmp_path / "e.json").read_text())
        found.append({**content["rows"][0], "max_tokens": content["settings"]["max_tokens"]})
    whole, two, first = found
    assert (whole["documents"], two["documents"], first["documents"]) == (3, 2, 2)
    assert [first[key] for key in ("nll", "tokens", "bytes", "words")] == [
        two[k] for k in ("nll", "tokens", "bytes", "words")
    ]
    assert (whole["max_tokens"], first["max_tokens"]) == (None, two["tokens"] + 1)
    said = " ".join(capsys.readouterr().out.split())
    assert f"of each text the first documents, at most {two['tokens'] + 1} tokens" in said


def test_a_text_that_is_named_twice_is_measured_once(checkpoint, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("the lazy dog jumps over the fox")
    twice = ["--data", tmp_path / "t.txt", tmp_path / "t.txt", "--context", 4, "--json", tmp_path / "e.json"]
    assert run("eval", checkpoint, checkpoint, *twice) == 0
    found = json.loads((tmp_path / "e.json").read_text())
    assert (len(found["rows"]), len(found["differences"])) == (2, 1)


def on_ranks(rank: int, world: int, port: int, *argv: str) -> tuple[int, str]:
    """Run a command, which joins the others as those of a launcher."""
    dist.destroy_process_group()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with redirect_stdout(io.StringIO()) as said:
        return run(*argv), said.getvalue()


@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_eval_on_two_processes_gives_the_same_scores(launched, checkpoint, tmp_path, capfd):
    """On ranks that are started already, and on those that the command starts."""
    (tmp_path / "t.txt").write_text("the lazy dog jumps over the fox\n\na second document\n\nthe third")
    argv = ["eval", checkpoint, "--data", tmp_path / "t.txt", "--context", 4, "--batch-size", 1, "--json"]
    assert run(*argv, tmp_path / "1.json", "--num-processes", 1) == 0
    if launched:
        assert run(*argv, tmp_path / "2.json", "--num-processes", 2) == 0
        said = capfd.readouterr().out
    else:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        codes, texts = zip(*run_ranks(2, on_ranks, tmp_path, port, *argv, tmp_path / "2.json"), strict=True)
        assert codes == (0, 0)
        said = capfd.readouterr().out + "".join(texts)
    one, two = (json.loads((tmp_path / f"{n}.json").read_text())["rows"][0] for n in (1, 2))
    assert two["nll"] == pytest.approx(one["nll"], rel=1e-9) and two["tokens"] == one["tokens"]
    assert said.count("nats per token") == 2


MISTAKES = [
    (["eval", "{c}", "--data", "{t}/none.txt"], "none.txt"),
    (["eval", "{c}", "--data", "wikitext-13"], "Did you mean 'wikitext-103'?"),
    (["eval", "{c}", "--data", "{t}/e.txt"], "e.txt"),
    (["eval", "{c}", "--data", "{t}/x.txt", "--context", "999"], "999"),
    (["eval", "{c}", "--data", "{t}/x.txt", "--context", "8", "--stride", "9"], "stride 9"),
    (["eval", "{t}/nowhere", "--data", "{t}/x.txt"], "nowhere"),
    (["check"], "check: name a RECIPE, such as demo or a YAML file"),
    (["eval", "{c}"], "name what to measure on: --data with corpora or files, or --tasks"),
    (["eval", "{c}", "--data", "{t}/x.txt", "--column", "text"], "names a column, and .txt files have none"),
    (["eval", "{c}", "--data", "{t}/r.jsonl", "--column", "body"], "body"),
    (["eval", "{c}", "--data", "wikitext-103", "--document", "line"], "--column and --document are for local files"),
    (["eval", "{c}", "--data", "{t}/x.txt", "--device", "cuda:7"], "cuda:7"),
    (["eval", "{c}", "--data", "{t}/x.txt", "--num-processes", "0"], "--num-processes 0: at least 1"),
    (["eval", "{c}", "--tasks", "{t}/none.yaml"], "there is no file or folder"),
    (["eval", "{c}", "--data", "owner/name-1.0"], "cannot load 'owner/name-1.0' from the Hugging Face Hub"),
    (["eval", "{c}", "--data", "{t}/r.jsonl", "--column", "content"], "--column with eval"),
    (["eval", "{c}", "--data", "{t}/w.txt"], "Convert its text: iconv -f UTF-16 -t UTF-8"),
    (["eval", "{c}", "--data", "{t}/x.txt", "--max-tokens", "1"], "--max-tokens 1: at least 2"),
    (["eval", "{c}", "--data", "{t}/x.txt", "--max-tokens", "2"], "more than the limit of 2"),
    (["eval", "{c}", "--tasks", "x.yaml", "--max-tokens", "9"], "for --tasks, give --limit"),
    (["eval", "{c}", "--data", "{t}/x.txt", "--again"], "--again is for the folder of a run"),
    (["eval", "{t}/run", "--max-tokens", "9"], "--max-tokens is not for the folder of a run"),
    (["eval", "{c}", "--tasks", "x.yaml", "--num-processes", "2"], "not of --tasks"),
    (["eval", "{t}/run", "--per-document"], "--per-document is not for the folder of a run"),
    (["eval", "{t}/run", "{c}"], "give one run alone"),
    (["apply", "{c}", "{t}"], "exists already"),
    (["apply", "{c}", "{c}/inside"], "lies inside"),
    (["apply", "{t}/nowhere", "{t}/out"], "nowhere"),
    (["apply", "{t}/broken", "{t}/out"], "do not hold the header"),
    (["apply", "{c}", "{t}/out", "--method", "fier"], "Did you mean 'fire'?"),
    (["apply", "{c}", "{t}/out", "--method", "full_reset"], "give one of --init CHECKPOINT and --seed N"),
    (["apply", "{c}", "{t}/out", "--method", "full_reset", "--init", "{c}", "--seed", "1"], "give one of"),
    (["apply", "{c}", "{t}/out", "--solver", "plar"], "solver: 'plar'"),
    (["apply", "{c}", "{t}/out", "--iterations", "-2"], "iterations: -2"),
    (["apply", "{c}", "{t}/out", "--shrink", "0.5"], "shrink: unknown option of 'fire'"),
    (["apply", "{c}", "{t}/out", "--role", "hed"], "unknown role 'hed'"),
    (["apply", "{c}", "{t}/out", "--exclude", "("], "not a regular expression"),
    (["inspect", "{c}", "--role", "hed"], "hed"),
    (["inspect", "{t}/nowhere"], "nowhere"),
    (["report", "{t}/nowhere"], "nowhere"),
    (["report", "{t}"], "results.json"),
    (["run", "{t}/none.yaml"], "there is no recipe"),
    (["run", "demo", "--arm", "fier", "--output", "{t}/out"], "no arm 'fier'. Did you mean 'fire'?"),
    (["run", "demo", "--set", "phases.0.steps", "--output", "{t}/out"], "write KEY=VALUE"),
]


@pytest.mark.parametrize(("argv", "message"), MISTAKES, ids=lambda v: " ".join(v)[:40] if isinstance(v, list) else "")
def test_mistakes_get_one_message_exit_2_and_leave_nothing(argv, message, checkpoint, tmp_path, capsys):
    (tmp_path / "x.txt").write_text("the quick brown fox")
    (tmp_path / "e.txt").write_text("")
    (tmp_path / "w.txt").write_text("the quick brown fox", encoding="utf-16")
    (tmp_path / "r.jsonl").write_text('{"text": "the quick brown fox"}')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in checkpoint.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    (broken / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:999])
    before = sorted(p for p in tmp_path.rglob("*"))
    assert run(*(a.format(c=checkpoint, t=tmp_path) for a in argv)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert error.split("\r")[-1].startswith("fire-llm: ") and error.count("fire-llm:") == 1
    assert sorted(p for p in tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["chek", "demo"], "there is no verb 'chek'. Did you mean 'check'?"),
        (["run"], "RECIPE"),
        (["apply", "a", "b", "--iterations", "five"], "invalid int value: 'five'"),
        (["run", "demo", "--outptu", "x"], "--outptu"),
        ([], "VERB"),
    ],
)
def test_words_the_parser_does_not_know(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_failure_of_the_work_is_exit_1(monkeypatch, capsys):
    def fail(*_, **__):
        raise FloatingPointError("the training loss is nan at step 3")

    monkeypatch.setattr("fire_llm.experiment.run.run_recipe", fail)
    assert run("run", "demo") == 1
    assert "the work failed: the training loss is nan at step 3" in capsys.readouterr().err


def test_public_names_are_there_and_importing_costs_nothing():
    import fire_llm

    for name in fire_llm.__all__:
        assert getattr(fire_llm, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'fier_'"):
        fire_llm.fier_  # noqa: B018
    code = (
        "import sys, fire_llm, fire_llm.cli; fire_llm.cli.parser(); "
        "print([m for m in ('torch', 'transformers', 'numpy', 'pydantic', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert done.stdout.strip() == "[]"
    assert issubclass(UserError, ValueError)


# ---- run with a grid


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("seed=1,2", "seed=[1,2]"),
        ("seed=[1,2]", "seed=[1,2]"),
        ("seed=1", "seed=1"),  # no list, which is refused later
        ("model.config={n_layer: 1, n_head: 1}", "model.config={n_layer: 1, n_head: 1}"),
        ("seed", "seed"),
    ],
)
def test_values_of_a_grid_may_be_written_without_brackets(given, wanted):
    assert _as_list(given) == wanted


def test_run_with_a_grid_is_a_sweep(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fire_llm.experiment.sweep_report.show", lambda *_: None)
    path, folder = recipe(tmp_path), tmp_path / "grid"
    short = ["--set=phases.0.steps=1", "--set=phases.1.steps=1", "--set=phases.0.keep=[]", "--output", folder]
    values = "phases.1.arms.fire.iterations="
    printed = []
    for verb, grid in (("run", "1,5"), ("sweep", "[1,5]")):
        assert run(verb, path, *short, "--grid", values + grid, "--dry-run") == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "as in iterations=1" in printed[0] and not folder.exists()
    assert run("run", path, *short, "--grid", values + "1,5", "--workers=1") == 0
    assert {"iterations=1", "iterations=5", "sweep.json"} <= {p.name for p in folder.iterdir()}
    weights = {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}
    monkeypatch.setattr("fire_llm.experiment.worker.train", lambda *_: pytest.fail("trained again"))
    assert run("sweep", path, *short, "--grid", values + "[1,5]", "--workers=1") == 0
    assert weights == {p: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}


# ---- what is behind the work


def losing(how: str, *argv: object) -> int:
    """Run a verb whose standard output does not take what is printed; return its exit code."""
    if how == "ascii":
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    elif how == "full disk":
        stream = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", encoding="utf-8")
    else:
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w", encoding="utf-8")
    with stream, redirect_stdout(stream):
        return run(*argv)


LOSSES = pytest.mark.parametrize("how", ["reader left", "ascii", "full disk"])


@LOSSES
def test_results_are_written_whatever_becomes_of_what_is_printed(how, checkpoint, tmp_path, capsys):
    code = int(how == "full disk")
    (tmp_path / "t.txt").write_text("the lazy dog jumps over the fox\n\na second document")
    scored, inspected, page = (tmp_path / name for name in ("e.json", "i.json", "i.html"))
    assert losing(how, "eval", checkpoint, "--data", tmp_path / "t.txt", "--json", scored) == code
    assert losing(how, "inspect", checkpoint, "--json", inspected, "--html", page) == code
    assert losing(how, "apply", checkpoint, tmp_path / "out") == code
    assert json.loads(scored.read_text())["rows"] and json.loads(inspected.read_text()) and page.stat().st_size
    assert (tmp_path / "out" / "model.safetensors").exists()
    said = capsys.readouterr().err
    assert said.count("the work is done, and what it prints could not be written: the disk is full") == 3 * code
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train a recipe of two steps; return the arguments of the command that is done with it at once."""
    folder = tmp_path_factory.mktemp("trained")
    short = ["--set=phases.0.steps=1", "--set=phases.1.steps=1", "--set=phases.0.keep=[]", "--workers=1"]
    argv = ["run", recipe(folder), *short, "--output", folder / "run"]
    assert run(*argv) == 0
    return argv


@LOSSES
def test_a_run_and_its_report_are_written_before_they_are_printed(how, trained, capsys):
    code, folder = int(how == "full disk"), trained[-1]
    for name in ("results.json", "report.html"):
        (folder / name).unlink()
    assert losing(how, *trained) == code
    assert (folder / "results.json").exists() and (folder / "report.html").exists()
    (folder / "report.html").unlink()
    assert losing(how, "report", folder) == code and (folder / "report.html").exists()
    assert "Traceback" not in capsys.readouterr().err


def test_a_tokenizer_that_the_embedding_has_no_rows_for_is_told_before_anything_is_read(checkpoint, tmp_path, capsys):
    """Its length is 301 and would fit; its highest id is 320, one beyond."""
    wide = tmp_path / "wide"
    shutil.copytree(checkpoint, wide)
    tokenizer = json.loads((wide / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["☃☃"] = 320
    (wide / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "t.txt").write_text("the lazy dog")
    file = recipe(tmp_path)
    data = yaml.safe_load(file.read_text())
    del data["tokenizer"]
    file.write_text(yaml.safe_dump({**data, "model": {"checkpoint": str(wide), "context": 16}}))
    for argv in (
        ["eval", checkpoint, wide, "--data", tmp_path / "t.txt"],
        ["check", file],
        ["run", file, "--output", tmp_path / "out", "--workers=1"],
    ):
        assert run(*argv) == 2
        assert "the tokenizer has 321 tokens and the model's embedding 320 rows" in capsys.readouterr().err


# ---- without a library


def test_without_plotly_work_ends_well_and_says_in_a_line_what_a_page_needs(
    checkpoint, trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "plotly", None)  # as if it were not installed
    _, path, *short, _, done = trained
    shutil.copytree(done, tmp_path / "run", ignore=lambda *_: ["results.json", "report.html"])
    lacks = "pages need plotly, which is not installed: pip install plotly, then fire-llm report RUN_DIR"
    for verb, more in (("run", ()), ("sweep", ("--grid", "phases.1.arms.fire.iterations=[1,5]"))):
        folder = tmp_path / verb
        assert run(verb, path, *short, *more, "--output", folder) == 0
        told = capsys.readouterr()
        assert told.out.splitlines()[-1] == f"no report.html: {lacks}" and "Traceback" not in told.err
        assert list(folder.rglob("results.json")) and not list(folder.rglob("report.html"))
    assert run("eval", tmp_path / "run", "--data", "a") == 0
    assert f"no report.html: {lacks}" in capsys.readouterr().out
    for argv in (["report", tmp_path / "run"], ["inspect", checkpoint, "--html", tmp_path / "page.html"]):
        assert run(*argv) == 2
        told = capsys.readouterr()
        assert told.err == f"fire-llm: {lacks}\n"
        assert argv[0] == "report" or not told.out  # an inspection is not begun
    monkeypatch.undo()
    assert run("report", tmp_path / "run") == 0 and (tmp_path / "run" / "report.html").is_file()


def test_a_run_ends_well_where_libraries_have_no_metadata(tmp_path, monkeypatch):
    """As where `datasets` is not installed, which nothing but corpora of the Hub needs."""
    import importlib.metadata

    from fire_llm.core import compat

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compat, "version", version)
    monkeypatch.setitem(sys.modules, "datasets", None)
    short = ["--set=phases.0.steps=1", "--set=phases.1.steps=1", "--set=phases.0.keep=[]"]
    assert run("run", recipe(tmp_path), *short, "--output", tmp_path / "run", "--workers=1") == 0
    versions = json.loads((tmp_path / "run" / "results.json").read_text())["versions"]
    assert versions["datasets"] is None and versions["torch"] is None and versions["python"]
