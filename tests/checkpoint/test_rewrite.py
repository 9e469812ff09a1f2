"""Checkpoints rewritten on the disk, against the reset of the loaded model and against the bytes of the source."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import tiny_gpt2, tiny_llama
from support.ranks import PROCESSES, Raised, run_ranks
from transformers import AutoConfig, AutoModelForCausalLM

from fire_llm import UserError, apply_reset, dfi, fire_, reset_checkpoint, sfe
from fire_llm.checkpoint.headers import read_header
from fire_llm.cli import main
from fire_llm.models import fresh_model, load_model


def contents(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a folder, by name."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}


def mixtral(**settings):
    """Build a Mixtral of 2 layers and 4 experts, which are stored one by one."""
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 61}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes, **heads, **settings))


def assert_equal(model: torch.nn.Module, other: torch.nn.Module) -> None:
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Save a tiny Llama in bf16, in many shards, with companions and with files that are not to be copied."""
    folder = tmp_path / "src"
    tiny_llama().bfloat16().save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Mine\n")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# What comes out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama, mixtral])
def test_equals_the_reset_of_the_loaded_model(build, dtype, tmp_path):
    build().to(dtype).save_pretrained(tmp_path / "src", max_shard_size="15KB")
    before = contents(tmp_path / "src")
    reset_checkpoint(tmp_path / "src", tmp_path / "dst", "fire", iterations=3)
    wanted = load_model(tmp_path / "src")
    fire_(wanted, iterations=3)
    result = load_model(tmp_path / "dst")
    assert result.dtype == dtype and contents(tmp_path / "src") == before
    assert_equal(wanted, result)


def test_everything_but_the_reset_tensors_is_the_sources_to_the_byte(source, tmp_path):
    report = reset_checkpoint(source, tmp_path / "dst")
    touched = {t.parameter for t in report.touched}
    assert len(touched) == 2 * 7
    shards = sorted(p.name for p in source.glob("*.safetensors"))
    assert len(shards) >= 4
    for shard in shards:
        before, after = (read_header(folder / shard) for folder in (source, tmp_path / "dst"))
        old, new = ((folder / shard).read_bytes() for folder in (source, tmp_path / "dst"))
        begin = min(t.offset for t in before.values())
        assert old[:begin] == new[:begin]
        for name, tensor in before.items():
            at = slice(tensor.offset, tensor.offset + tensor.n_bytes)
            assert after[name].offset == tensor.offset and (old[at] == new[at]) == (name not in touched)
    names = ["config.json", "tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool.jinja"]
    names += ["generation_config.json", "model.safetensors.index.json"]
    old, new = contents(source), contents(tmp_path / "dst")
    assert {n: new[n] for n in names} == {n: old[n] for n in names}
    assert set(new) == {*names, *shards, "fire.json", "README.md"}
    assert report.not_copied == ["README.md", "optimizer.pt"]


def test_keys_that_the_class_does_not_load_are_kept_and_listed(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "src")
    stored = load_file(tmp_path / "src" / "model.safetensors")
    stored["model.mtp.0.proj.weight"] = torch.randn(3, 5)
    save_file(stored, tmp_path / "src" / "model.safetensors", {"format": "pt"})
    assert main(["apply", str(tmp_path / "src"), str(tmp_path / "dst")]) == 0
    assert "kept as stored, not loaded by the class: model.mtp.0.proj.weight" in capsys.readouterr().out
    kept = tensors(tmp_path / "dst")["model.mtp.0.proj.weight"]
    assert torch.equal(kept, stored["model.mtp.0.proj.weight"])
    assert json.loads((tmp_path / "dst" / "fire.json").read_text())["kept_unread"] == ["model.mtp.0.proj.weight"]


def test_tensors_of_other_types_than_the_config_says_keep_them(tmp_path):
    """Loading flattens types; the disk keeps them, and each matrix is rounded to its own."""
    tiny_llama().save_pretrained(tmp_path / "src")
    stored = {k: t.double() if "up_proj" in k else t for k, t in load_file(tmp_path / "src/model.safetensors").items()}
    stored["model.norm.weight"] = stored["model.norm.weight"].half()
    save_file(stored, tmp_path / "src" / "model.safetensors", {"format": "pt"})
    reset_checkpoint(tmp_path / "src", tmp_path / "dst")
    result = tensors(tmp_path / "dst")
    assert {k: t.dtype for k, t in result.items()} == {k: t.dtype for k, t in stored.items()}
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.double()
    fire_(model)
    assert torch.equal(result["model.layers.0.mlp.up_proj.weight"], model.model.layers[0].mlp.up_proj.weight)


def test_experts_stored_one_by_one_are_reset_one_by_one(tmp_path):
    model = mixtral()
    model.save_pretrained(tmp_path / "src", max_shard_size="10KB")
    reset_checkpoint(tmp_path / "src", tmp_path / "dst", exclude=["gate_up_proj.2.up", r"experts\.down_proj\[1"])
    old, new = tensors(tmp_path / "src"), tensors(tmp_path / "dst")
    experts = [k for k in old if ".experts." in k]
    assert len(experts) == 2 * 4 * 3
    same = {k for k in experts if torch.equal(old[k], new[k])}
    stem = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
    assert same == {stem.format(i, e, w) for i in (0, 1) for e, w in ((2, "w3"), (1, "w2"))}
    for name in set(experts) - same:
        sigma = torch.linalg.svdvals(new[name])
        before = torch.linalg.svdvals(old[name])
        assert sigma[0] / sigma[-1] < before[0] / before[-1]


def test_a_base_models_names_are_those_of_the_disk(tmp_path):
    """GPT-2 on the Hub has no `transformer.` before its keys, and buffers that nobody loads any more."""
    tiny_gpt2().save_pretrained(tmp_path / "src")
    stored = {k.removeprefix("transformer."): t for k, t in load_file(tmp_path / "src/model.safetensors").items()}
    stored["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(stored, tmp_path / "src" / "model.safetensors", {"format": "pt"})
    reset_checkpoint(tmp_path / "src", tmp_path / "dst")
    wanted = load_model(tmp_path / "src")
    fire_(wanted)
    assert_equal(wanted, load_model(tmp_path / "dst"))
    assert set(tensors(tmp_path / "dst")) == set(stored)


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_are_stored_twice(tmp_path, equal):
    tiny_gpt2().save_pretrained(tmp_path / "src")
    stored = load_file(tmp_path / "src" / "model.safetensors")
    stored["lm_head.weight"] = stored["transformer.wte.weight"] + (0 if equal else 1)
    save_file(stored, tmp_path / "src" / "model.safetensors", {"format": "pt"})
    report = reset_checkpoint(tmp_path / "src", tmp_path / "dst", roles=["lm_head"])
    new = tensors(tmp_path / "dst")
    assert len(report.touched) == 1
    assert not torch.equal(new["lm_head.weight"], stored["lm_head.weight"])
    assert torch.equal(new["lm_head.weight"], new["transformer.wte.weight"]) == equal
    assert torch.equal(new["transformer.wte.weight"], stored["transformer.wte.weight"]) != equal


def test_links_of_the_hubs_cache_are_read_and_never_written_to(source, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    shutil.copytree(source, blobs)
    snapshot.mkdir()
    for path in blobs.iterdir():
        if path.is_file():
            (snapshot / path.name).symlink_to(path)
    before = contents(blobs)
    reset_checkpoint(snapshot, tmp_path / "dst")
    assert contents(blobs) == before and not any(p.is_symlink() for p in (tmp_path / "dst").rglob("*"))
    reset_checkpoint(source, tmp_path / "other")
    ours, theirs = contents(tmp_path / "dst"), contents(tmp_path / "other")
    assert all(ours[n] == theirs[n] for n in ours if n.endswith(".safetensors"))


# ---------------------------------------------------------------------------------------------------------------------
# Other resets


def test_the_other_resets_equal_those_of_the_loaded_model(tmp_path):
    for name, seed in (("src", 1), ("init", 2)):
        tiny_gpt2(seed).save_pretrained(tmp_path / name)
    for number, spec in enumerate(
        [
            {"method": "shrink_perturb", "shrink": 0.3},
            {"method": "full_reset"},
            {"method": "full_reset", "roles": ["mlp", "norm"]},
        ]
    ):
        reset_checkpoint(tmp_path / "src", tmp_path / f"{number}", [spec], init=tmp_path / "init")
        wanted = load_model(tmp_path / "src")
        apply_reset(wanted, spec, initial=load_model(tmp_path / "init"))
        assert_equal(wanted, load_model(tmp_path / f"{number}"))
    reset_checkpoint(tmp_path / "src", tmp_path / "rescaled", "rescale", iterations=2)
    wanted = load_model(tmp_path / "src")
    apply_reset(wanted, {"method": "rescale", "iterations": 2})
    assert_equal(wanted, load_model(tmp_path / "rescaled"))


def test_a_seed_draws_the_initial_weights(tmp_path):
    tiny_llama(1).save_pretrained(tmp_path / "src")
    reset_checkpoint(tmp_path / "src", tmp_path / "dst", "full_reset", seed=7)
    assert_equal(fresh_model(load_model(tmp_path / "src").config, 7), load_model(tmp_path / "dst"))


def test_the_initial_weights_may_lie_in_another_form(tmp_path):
    """Experts one by one in one checkpoint, stacked in the other."""
    mixtral().save_pretrained(tmp_path / "src")
    torch.manual_seed(3)
    other = mixtral().apply(lambda m: [p.data.normal_() for p in m.parameters(recurse=False)] and None)
    other.save_pretrained(tmp_path / "init", save_original_format=False)
    assert any(k.endswith("experts.gate_up_proj") for k in tensors(tmp_path / "init"))
    reset_checkpoint(tmp_path / "src", tmp_path / "dst", "shrink_perturb", shrink=0.25, init=tmp_path / "init")
    wanted = load_model(tmp_path / "src")
    apply_reset(wanted, {"method": "shrink_perturb", "shrink": 0.25}, initial=load_model(tmp_path / "init"))
    assert_equal(wanted, load_model(tmp_path / "dst"))


def test_a_dry_run_says_what_would_happen_and_reads_no_weights(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fire_llm.checkpoint.headers.StoredTensor.read", lambda *_: pytest.fail("a weight was read"))
    assert main(["apply", str(source), str(tmp_path / "dst"), "--dry-run", "--exclude", "up_proj"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "reset  attention           16×32  model.layers.0.self_attn.k_proj.weight  by fire, iterations 5" in lines[1]
    assert any("up_proj.weight  excluded by 'up_proj'" in line for line in lines)
    assert any(line.startswith("leave  norm") and "role norm is not among" in line for line in lines)
    assert "12 to reset, 9 to leave; nothing written (--dry-run)" in lines[-1]
    assert not (tmp_path / "dst").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Provenance


def test_the_provenance_tells_what_was_done(source, tmp_path):
    reset_checkpoint(source, tmp_path / "dst", iterations=4)
    told = json.loads((tmp_path / "dst" / "fire.json").read_text())
    assert told["resets"][0]["method"] == "fire" and told["resets"][0]["options"]["iterations"] == 4
    assert told["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert told["source"]["class"] == "LlamaForCausalLM"
    for name, hashes in told["shards"].items():
        assert hashes["source"] == hashlib.sha256((source / name).read_bytes()).hexdigest()
        assert hashes["result"] == hashlib.sha256((tmp_path / "dst" / name).read_bytes()).hexdigest()
    old, new = tensors(source), tensors(tmp_path / "dst")
    assert len(told["touched"]) == 14
    for row in told["touched"]:
        a, b = old[row["parameter"]], new[row["parameter"]]
        assert row["sfe"] == pytest.approx(sfe(a, b), rel=1e-9)
        assert row["dfi_before"] == pytest.approx(dfi(a), rel=1e-4) and row["dfi_after"] == pytest.approx(
            dfi(b), rel=1e-4
        )
        for when, matrix in (("before", a), ("after", b)):
            sigma = torch.linalg.svdvals(matrix.double())
            assert row[f"sigma_{when}"] == pytest.approx([float(sigma[0]), float(sigma[-1])], rel=1e-3)


def test_the_card_is_one_that_the_hub_reads(source, tmp_path):
    from huggingface_hub import ModelCard

    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, "_name_or_path": "owner/model"}))
    reset_checkpoint(source, tmp_path / "dst")
    card = ModelCard.load(tmp_path / "dst" / "README.md")
    assert card.data.base_model == "owner/model" and card.data.license == "apache-2.0" and "fire" in card.data.tags
    assert "not a model to use as it is" in card.text and f"fire-llm apply {source} DST --method fire" in card.text
    assert "| attention | q_proj | 2 |" in card.text


def test_push_to_hub_uploads_the_finished_folder(source, tmp_path, monkeypatch, capsys):
    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, repo_id, exist_ok):
            calls.append(("create", repo_id))
            return f"https://hub/{repo_id}"

        def upload_folder(self, *, folder_path, repo_id, commit_message):
            calls.append(("upload", Path(folder_path).name, repo_id, (Path(folder_path) / "fire.json").is_file()))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert main(["apply", str(source), str(tmp_path / "dst"), "--push-to-hub", "me/it"]) == 0
    assert calls == [("create", "me/it"), ("upload", "dst", "me/it", True)]
    assert "pushed: https://hub/me/it" in capsys.readouterr().out

    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(Api, "upload_folder", refuse)
    assert main(["apply", str(source), str(tmp_path / "dst2"), "--push-to-hub", "me/it"]) == 2
    assert "but not pushed to 'me/it': no route to host" in capsys.readouterr().err and (tmp_path / "dst2").is_dir()


def test_a_hub_id_is_looked_at_before_it_is_fetched(source, tmp_path, monkeypatch):
    """The Hub is played by a stub: which files are asked for, and where they end up."""
    import huggingface_hub

    asked = {}

    class Api:
        def model_info(self, name, revision):
            files = [p.name for p in source.iterdir()] if name == "owner/good" else ["config.json", "model.gguf"]
            siblings = [type("Sibling", (), {"rfilename": f}) for f in files]
            return type("Info", (), {"siblings": siblings})

    def download(name, **options):
        asked.update(options, name=name)
        return str(source)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(head=lambda *_, **__: None))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    reset_checkpoint("owner/good", tmp_path / "dst", revision="v1")
    assert asked["name"] == "owner/good" and asked["revision"] == "v1" and "*.safetensors" in asked["allow_patterns"]
    asked.clear()
    with pytest.raises(UserError, match="'owner/bad' holds GGUF"):
        reset_checkpoint("owner/bad", tmp_path / "dst2")
    assert not asked


# ---------------------------------------------------------------------------------------------------------------------
# Whatever stops it


def _when_told(told, src, dst) -> None:
    """Reset a checkpoint in a process of its own, everything imported before it says that it is ready."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    reset_checkpoint(src, dst, dry_run=True)
    told.send("ready")
    told.recv()
    reset_checkpoint(src, dst)
    told.send("done")


@pytest.mark.parametrize("instants", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_instant_there_is_the_whole_result_or_none(instants, tmp_path):
    src, chance, span = tmp_path / "src", random.Random(0), 0.0
    tiny_llama(hidden_size=192, intermediate_size=384, num_hidden_layers=4).save_pretrained(src, max_shard_size="1MB")
    before, whole, seen = contents(src), {}, {"absent": 0, "whole": 0, "partial": 0}
    for trial in range(instants + 1):
        out = tmp_path / f"dst{trial}"
        told, theirs = PROCESSES.Pipe()
        process = PROCESSES.Process(target=_when_told, args=(theirs, src, out))
        process.start()
        assert told.poll(60) and told.recv() == "ready"
        began = time.perf_counter()
        told.send("begin")
        if trial == 0:  # undisturbed: how long it takes, and what comes out
            assert told.poll(60) and told.recv() == "done"
            span = time.perf_counter() - began
            whole = {k: v for k, v in contents(out).items() if k not in ("fire.json", "README.md")}
        else:
            time.sleep(chance.uniform(0, 1.1 * span))
            with suppress(ProcessLookupError):  # it has finished
                os.kill(process.pid or 0, signal.SIGKILL)
        process.join(60)
        seen["whole" if out.exists() else "absent"] += 1
        seen["partial"] += bool(list(tmp_path.glob(f".{out.name}.*.partial")))
        if out.exists():
            assert {k: v for k, v in contents(out).items() if k in whole} == whole
            assert json.loads((out / "fire.json").read_text())["shards"] and (out / "README.md").is_file()
        assert contents(src) == before
    assert seen["partial"] > instants // 6, seen  # the instants did fall into the work
    left = next(tmp_path.glob(".dst*.partial"))
    out = tmp_path / left.name.split(".")[1]
    reset_checkpoint(src, out)
    assert out.is_dir() and not list(tmp_path.glob(f".{out.name}.*"))


def _peak(told, *pairs) -> None:
    """Tell by how much each reset after the first raises the peak of resident memory."""
    torch.set_num_threads(1)
    peaks = []
    for src, dst in pairs:
        reset_checkpoint(src, dst)
        lines = Path("/proc/self/status").read_text().splitlines()
        peaks.append(next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")))
    told.send([b - a for a, b in pairwise(peaks)])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_holds_a_matrix_and_not_the_model(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "small")
    tiny_llama(hidden_size=128, intermediate_size=512, vocab_size=3000, num_hidden_layers=96).save_pretrained(
        tmp_path / "deep"
    )
    size = (tmp_path / "deep" / "model.safetensors").stat().st_size
    told, theirs = PROCESSES.Pipe()
    pairs = [(tmp_path / name, tmp_path / f"{name}-dst") for name in ("small", "deep")]
    process = PROCESSES.Process(target=_peak, args=(theirs, *pairs))
    process.start()
    assert told.poll(120)
    assert size > 90e6 and told.recv()[0] < size / 2
    process.join()


def _share(rank: int, world: int, src: Path, dst: Path) -> str:
    return str(reset_checkpoint(src, dst))


def test_several_processes_write_what_one_does(tmp_path):
    mixtral().save_pretrained(tmp_path / "src", max_shard_size="10KB")
    reset_checkpoint(tmp_path / "src", tmp_path / "one")
    said = run_ranks(2, _share, tmp_path, tmp_path / "src", tmp_path / "two")
    assert "on 2 ranks" in said[0] and said[0].split(" in ")[0] == said[1].split(" in ")[0]
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {k: v for k, v in one.items() if k != "fire.json"} == {k: v for k, v in two.items() if k != "fire.json"}
    again = run_ranks(2, _share, tmp_path, tmp_path / "src", tmp_path / "two")
    assert all(isinstance(a, Raised) and "exists already" in a for a in again)


@pytest.mark.slow
def test_the_command_line_starts_several_processes(tmp_path):
    mixtral().save_pretrained(tmp_path / "src", max_shard_size="10KB")
    command = [sys.executable, "-m", "fire_llm", "apply", str(tmp_path / "src"), str(tmp_path / "two")]
    done = subprocess.run([*command, "--num-processes", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "on 2 ranks" in done.stdout and done.stdout.count("saved:") == 1
    again = subprocess.run([*command, "--num-processes", "2"], capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.count("fire-llm:") == 1 and "exists already" in again.stderr


def test_a_failure_on_the_way_leaves_nothing(source, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="the disk is full"):
        reset_checkpoint(source, tmp_path / "dst")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]
    monkeypatch.undo()
    path = next(p for p in source.glob("*.safetensors") if "model.layers.1.mlp.up_proj.weight" in read_header(p))
    at = read_header(path)["model.layers.1.mlp.up_proj.weight"].offset
    data = bytearray(path.read_bytes())
    data[at : at + 2] = struct.pack("<H", 0x7FC0)  # NaN in bf16
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' holds NaN or infinity"):
        reset_checkpoint(source, tmp_path / "dst")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["src"]


def test_a_reset_that_would_change_nothing_is_refused(tmp_path):
    config = AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=2, vocab_size=61, state_size=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "src")
    with pytest.raises(UserError, match=r"whose matrices have the roles lm_head, ssm .*Add a role with --role"):
        reset_checkpoint(tmp_path / "src", tmp_path / "dst")
    report = reset_checkpoint(tmp_path / "src", tmp_path / "dst", roles=["ssm"])
    assert {t.part for t in report.touched} == {"x", "z", "dt", "B", "C", ""}


def test_remote_code_is_never_run_and_its_native_class_may_stand_for_it(source, tmp_path):
    settings = json.loads((source / "config.json").read_text())
    code = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}
    (source / "config.json").write_text(json.dumps({**settings, "auto_map": code}))
    (source / "configuration_x.py").write_text("raise SystemExit('run')")
    (source / "modeling_x.py").write_text("raise SystemExit('run')")
    with pytest.raises(UserError, match=r"code of its own .* its own model_type 'llama' .* --native"):
        reset_checkpoint(source, tmp_path / "dst")
    assert main(["apply", str(source), str(tmp_path / "dst"), "--native"]) == 0
    assert main(["inspect", str(tmp_path / "dst"), "--native"]) == 0
