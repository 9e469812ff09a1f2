"""The report on one GPU, run dry: tiny models on a CPU, every stage, and what becomes of one that fails."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from support.ranks import PROCESSES
from support.tiny_recipe import WORDS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_report.py"


def loaded(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("gpu_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Write a folder like the one the report wants, of a few kilobytes."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("data")
    for name in ("wikitext2-tok", "webtext", "gpt2-tokenizer"):
        (folder / name).mkdir()
    sentences = [" ".join(WORDS[(i * step + i // 7) % len(WORDS)] for i in range(40)) for step in range(1, 60)]
    for split in ("train", "valid"):
        articles = [f" = Title {n} = \n\n {sentence} \n\n" for n, sentence in enumerate(sentences)]
        (folder / "wikitext2-tok" / f"{split}.txt").write_text("".join(articles))
        lines = [json.dumps({"text": sentence[::-1]}) + "\n" for sentence in sentences]
        (folder / "webtext" / f"{split}.jsonl").write_text("".join(lines))
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(sentences, 300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save_model(str(folder / "gpt2-tokenizer"))
    return folder


def report(*options, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, options)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        timeout=280,
    )


def worker(options, stages, said):
    """Be the process that measures, asked for all stages at once; its answers go to a file."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 1)
    sys.stdin = io.StringIO("".join(json.dumps({"stage": stage, "seconds": 200}) + "\n" for stage in stages))
    sys.path.insert(0, str(SCRIPT.parent))
    importlib.import_module("gpu_report").main([*map(str, options), "--worker"])


def gpu_tests(record):
    """Run the tests for GPUs that the report runs dry, in this process."""
    os.chdir(ROOT)
    os.environ["FIRE_LLM_GPU_TESTS"] = "cpu"
    sys.modules.pop("test_gpu", None)  # imported without it, where this process was forked from one that collected all
    sys.path.insert(0, str(SCRIPT.parent))
    chosen = importlib.import_module("gpu_report").TESTS
    os._exit(pytest.main([*chosen, f"--record={record}", f"--basetemp={record}.tmp", "-k", "singular_values"]))


def forked(target, *args):
    process = PROCESSES.Process(target=target, args=args)
    process.start()
    process.join(250)
    return process.exitcode


@pytest.mark.parametrize("by_the_script", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_stage_runs_dry_and_the_page_tells_of_all(by_the_script, data, tmp_path, monkeypatch):
    out, page = tmp_path / "out", tmp_path / "page.md"
    options = ["--size", "tiny", "--device", "cpu", "--data", data, "--output", out, "--cache", tmp_path / "cache"]
    stages = ["environment", "newton-schulz", "training", "perplexity", "evidence"]
    if by_the_script:
        done = report(*options, "--seconds", 250)
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        out.mkdir()
        module, machine = loaded(monkeypatch), {"commands": ["python scripts/gpu_report.py --size tiny"]}
        module.write(out / "environment.json", {"machine": {**machine, **module.describe_machine()}})
        assert forked(worker, options, stages, tmp_path / "said") == 0
        ready, *told = map(json.loads, (tmp_path / "said").read_text().splitlines())
        assert ready == {"ready": True} and [line["sound"] for line in told] == [True] * len(stages)
        assert forked(gpu_tests, tmp_path / "record.jsonl") == 0
        tests = module.read_record((tmp_path / "record.jsonl").read_text().splitlines())
        module.write(out / "tests.json", {"status": "done", "failures": {}, "exit_code": 0, **tests})
    found = {file.stem: json.loads(file.read_text()) for file in out.glob("*.json")}
    stages.append("tests")
    assert set(found) == {*stages, "results"} and len(list(out.iterdir())) <= 8
    assert all(found[stage]["status"] == "done" for stage in stages)
    assert found["tests"]["counts"]["passed"] > 0 and not found["tests"]["failed"]
    distances = {name: row["distance"] for name, row in found["newton-schulz"]["gpt2"].items()}
    assert distances["paper's loop, fp32"] < 1e-5 and distances["newton_schulz, fp32"] < 1e-5
    assert distances["newton_schulz, bf16"] < 5e-4 and distances["polar, 1e-5"] < 1e-5
    assert distances["torch.optim.Muon"] > 0.01  # its singular values scatter around 1
    assert found["newton-schulz"]["llama_3_8b"]["polar, 1e-3"]["all_224_seconds"] > 0
    assert set(found["training"]["contestants"]) == {"ours", "bare", "stock"}
    assert set(found["training"]["ratios"]) == {"ours / bare", "ours / stock"}
    profile = found["training"]["profiles"]["ours"]
    assert profile["top"] and profile["kernels_a_step"] > 100 and profile["step_milliseconds"] > 0
    scores = found["perplexity"]["contestants"]
    assert scores["ours, fp32"]["nll"] == pytest.approx(scores["rolling loop, batch 16, fp32"]["nll"], rel=1e-6)
    one, many = (scores[f"rolling loop, batch {batch}, bf16"]["nll"] for batch in (1, 16))
    assert one == pytest.approx(many, rel=1e-2) and "rolling loop, batch 1, fp32" not in scores
    assert found["evidence"]["finished"] == found["evidence"]["arms"] == [*found["results"]["arms"]]
    assert not any(found[stage]["failures"] for stage in stages), found
    assert found["training"]["path"] == "whole" and found["training"]["without_mask"]
    assert all(row["tokens_per_second"] > 0 for row in found["training"]["ablations"].values())

    (out / "evidence.json").unlink()
    found["training"]["contestants"]["ours"]["median"] = 1.0
    (out / "training.json").write_text(json.dumps(found["training"]))
    assert report("--output", out, "--write-docs", page).returncode == 0
    text = page.read_text()
    assert "- evidence: not run" in text and "## Arms of a quarter of an hour\n\nUnmeasured." in text
    assert "scripts/gpu_report.py --size tiny" in text and "newton_schulz, bf16" in text


def test_a_page_on_nothing_says_that_all_is_unmeasured(tmp_path):
    page = tmp_path / "page.md"
    assert report("--output", tmp_path, "--write-docs", page).returncode == 0
    text = page.read_text()
    assert text.count(": not run") == 6 and text.count("Unmeasured.") == 5


def test_of_several_folders_a_page_takes_each_stage_from_the_last_that_finished_it(tmp_path):
    first, second, page = tmp_path / "first", tmp_path / "second", tmp_path / "page.md"
    stages = {
        first: {"training": ("done", 470_000.0, 0.99), "perplexity": ("done", 3.0, None)},
        second: {"training": ("out of time", 1.0, 0.5), "perplexity": ("done", 1.5, None)},
    }
    for folder, (device, date) in {first: ("NVIDIA H100", "2026-11-26"), second: ("NVIDIA H200", "2026-11-27")}.items():
        folder.mkdir()
        machine = {"commands": [f"python scripts/gpu_report.py --output {folder} --seconds 9"]}
        (folder / "environment.json").write_text(json.dumps({"status": "done", "device": device, "machine": machine}))
        (folder / "tests.json").write_text(json.dumps({"status": "left out: no time was left"}))
        for stage, (status, value, ratio) in stages[folder].items():
            failures = {"it": [f'  File "{tmp_path}/fire_llm/experiment/train.py", line 1']} if folder == second else {}
            data = {"status": status, "date": f"{date}T10:00:00", "seconds": 5.0, "context": 1024, "failures": failures}
            if stage == "training":
                data |= {"model": "gpt-0.1b", "tokens_per_step": 65536, "micro_batches": 1, "sequences": 64}
                data |= {"precision": "bf16", "compiled": True, "steps_a_round": 12}
                data |= {"contestants": {"ours": {"median": value}}, "ratios": {"ours / bare": ratio}}
            else:
                data |= {"tokens": 10, "batch_size": 16, "contestants": {"ours": {"tokens_per_second": 1, "nll": 1}}}
                data |= {"ratios": {"ours / rolling loop, batch 1, bf16": value}}
            (folder / f"{stage}.json").write_text(json.dumps(data))
    assert report("--output", first, second, "--write-docs", page).returncode == 0
    text = page.read_text()
    assert "| training, tokens a second | 470,000 | ≥ 460,000 | met |" in text
    assert "| training, ours / bare | 0.99 | ≥ 0.98 | met |" in text
    assert "| training, ours / stock |  | ≥ 1.3 | unmeasured |" in text
    assert "- perplexity, ours / rolling loop, batch 1, bf16: 1.5, wanted ≥ 2" in text
    assert "## Training\n\n*NVIDIA H100, 2026-11-26, 5 s.*" in text
    assert "## Perplexity\n\n*NVIDIA H200, 2026-11-27, 5 s.*" in text
    assert "1.00 times that of llm.c (468,000)" in text and "another device" not in text
    assert str(tmp_path) not in text and "--output DIR --seconds 9" in text
    refused = report("--output", first, second)
    assert refused.returncode == 2 and "several folders make a page" in refused.stderr


def test_help_loads_no_heavy_library():
    code = f"import sys, runpy; sys.argv = ['x', '--help']; sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
    code += f"try: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\nexcept SystemExit: pass\n"
    code += "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]") and "--write-docs" in done.stdout


# ---- limits and failures


def stage_of(module, folder, seconds):
    args = SimpleNamespace(output=folder, size="tiny", device="cpu")
    return module.Stage("training", args, seconds)


def test_a_stage_that_fails_keeps_what_it_measured(monkeypatch, tmp_path):
    module = loaded(monkeypatch)

    def measure(stage):
        stage.note(first=1)
        stage.attempt("second", lambda: 1 / 0)
        stage.note(third=3)
        raise ValueError("what went wrong")

    stage_of(module, tmp_path, 30).run(measure)
    found = json.loads((tmp_path / "training.json").read_text())
    assert (found["status"], found["first"], found["third"]) == ("failed", 1, 3)
    assert "ZeroDivisionError" in found["failures"]["second"][-1]
    assert "what went wrong" in found["failures"]["training"][-1]


def test_a_stage_ends_at_its_limit(monkeypatch, tmp_path):
    module = loaded(monkeypatch)

    def measure(stage):
        stage.note(first=1)
        stage.attempt("an endless one", lambda: time.sleep(60))
        stage.note(second=2)

    stage_of(module, tmp_path, 0.3).run(measure)
    found = json.loads((tmp_path / "training.json").read_text())
    assert found["status"] == "out of time" and found["first"] == 1 and "second" not in found


def test_a_process_that_dies_is_recorded_and_another_goes_on(monkeypatch, tmp_path, capsys):
    module = loaded(monkeypatch)
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys\n"
        "print(json.dumps({'ready': True}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    stage = json.loads(line)['stage']\n"
        "    if stage == 'training':\n"
        "        print('illegal memory access', file=sys.stderr, flush=True)\n"
        "        os._exit(9)\n"
        "    print(json.dumps({'lines': ['a line'], 'status': 'done', 'sound': True}), flush=True)\n"
    )
    monkeypatch.setattr(module, "__file__", str(script))
    (tmp_path / "training.json").write_text(json.dumps({"stage": "training", "failures": {}, "kept": 1}))
    options = ["--size", "tiny", "--device", "cpu", "--output", str(tmp_path), "--seconds", "60", "--stages"]
    with mock.patch.dict(os.environ):
        assert module.main([*options, "training", "perplexity", "evidence"]) == 1
    said = [line.partition(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == [
        "== environment: done", "   a line", "== training: its process ended",
        "== perplexity: done", "   a line", "== evidence: done", "   a line",
    ]  # fmt: skip
    machine = json.loads((tmp_path / "environment.json").read_text())["machine"]
    command = ["python scripts/gpu_report.py", *options, "training", "perplexity", "evidence"]
    assert machine["commands"] == [" ".join(command)]
    found = json.loads((tmp_path / "training.json").read_text())
    assert found["kept"] == 1 and found["failures"]["its process ended"] == ["illegal memory access"]


@pytest.mark.slow
def test_tests_are_recorded_as_they_end_and_what_is_cut_off_is_named(monkeypatch, tmp_path):
    module = loaded(monkeypatch)
    file, record = tmp_path / "test_it.py", tmp_path / "record.jsonl"
    file.write_text(
        "import os, pytest, time\n"
        "@pytest.mark.xdist_group('b c')\ndef test_good(): time.sleep(0.2)\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip\ndef test_other(): pass\n"
        "@pytest.fixture\ndef broken(): raise KeyError('gone')\n"
        "def test_broken(broken): pass\n"
        "def test_endless(): os._exit(3)\n"
        "def test_never(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "gpu.recording", f"--record={record}", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    done = subprocess.run([*command, "--rootdir", tmp_path, file], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 3, done
    found = module.read_record([*record.read_text().splitlines(), '{"test": "half a l'])
    for groups, names in (("b c", ["test_good"]), ("a,b c", ["test_good"]), ("!b c", ["test_bad", "test_other"])):
        record.unlink(missing_ok=True)
        chosen = [*command, "--rootdir", tmp_path, file, "--groups", groups, "-k", "good or bad or other"]
        subprocess.run(chosen, cwd=tmp_path, env=environment, capture_output=True)
        told = [json.loads(line) for line in record.read_text().splitlines()]
        assert [line["test"] for line in told if "ended" in line] == names
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1, "errors": 1}
    assert found["failed"].keys() == {"test_bad", "test_broken"} and found["running"] == ["test_endless"]
    assert any("assert 1 == 2" in line for line in found["failed"]["test_bad"])
    assert any("KeyError: 'gone'" in line for line in found["failed"]["test_broken"])
    assert next(iter(found["slowest_seconds"])) == "test_good" and found["seconds_of_all"] >= 0.2


def test_a_part_of_the_tests_that_crashes_is_no_success(monkeypatch, tmp_path):
    module = loaded(monkeypatch)
    file = tmp_path / "test_it.py"
    file.write_text(
        "import os, pytest, signal\n"
        "def test_good(): pass\n"
        "@pytest.mark.xdist_group('apart')\ndef test_crash(): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(module, "GROUPS", ("apart",))
    monkeypatch.setattr(module, "TESTS", [str(file), *module.TESTS[3:]])
    stage = module.Stage("tests", SimpleNamespace(output=tmp_path, size="full", device="cpu"), 60)
    stage.run(module.run_tests)
    found = json.loads((tmp_path / "tests.json").read_text())
    assert found["counts"] == {"passed": 1} and found["running"] == ["test_crash"]
    assert found["status"] == "failed" and "exit code -9" in " ".join(found["failures"]["tests"])


def test_steps_and_arms_are_cut_to_the_seconds(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from gpu.evidence import fitted

    arms = {name: "keep" for name in "abcdef"}
    phases = [{"name": "x", "steps": 1200}, {"name": "y", "steps": 220, "arms": arms}]
    data = {"batch": {"tokens_per_step": 32768}, "phases": phases}
    # A step is a tenth of a second: 120 s and 6 × 22 s of steps, 7 × 12 s beside them, 8 s of tokenising.
    rate = 327_680
    plenty = fitted(data, rate, 10_000)
    assert [p["steps"] for p in plenty["phases"]] == [1200, 220] and [*plenty["phases"][1]["arms"]] == [*arms]
    exact = fitted(data, rate, 92 + 252 * 0.75)
    assert [p["steps"] for p in exact["phases"]] == [900, 165] and len(exact["phases"][1]["arms"]) == 6
    short = fitted(data, rate, 150)  # half of the steps of all arms would take 218 s, those of three arms 148 s
    assert len(short["phases"][1]["arms"]) == 3 and [*short["phases"][1]["arms"]] == ["a", "b", "c"]
    assert 600 <= short["phases"][0]["steps"] < 640
    assert data["phases"][0]["steps"] == 1200
