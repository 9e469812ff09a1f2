"""Checkpoints pushed to the Hub, played by a small server of this process: the clients are the real ones."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from support.recipes import changed
from support.tiny_recipe import quick_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from fire_llm import UserError, load_recipe, run_recipe
from fire_llm.cli import main
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.pushing import _chosen
from fire_llm.experiment.recipe import load_trials
from fire_llm.experiment.stages import expand

SECRET = "hf_" + "s" * 34


class Hub:
    """What the server knows: repositories by name, their branches by name, files by name."""

    def __init__(self) -> None:
        self.branches: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, str]] = []
        self.private = True
        self.refused: set[str] = set()
        """Words in the path of a request that is answered with 403."""


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, data, status=200, **headers):
            body = json.dumps(data).encode()
            self.send_response(status)
            for name, value in {
                "Content-Length": str(len(body)),
                "Content-Type": "application/json",
                **headers,
            }.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_HEAD(self):
            self.do_GET()

        def do_POST(self):
            length = int(self.headers.get("Content-Length") or 0)
            self.do_GET(self.rfile.read(length))

        def do_GET(self, body=b""):
            path = unquote(self.path)
            if self.headers.get("Authorization") != f"Bearer {SECRET}" or any(word in path for word in hub.refused):
                return self.answer({"error": f"no rights for {SECRET}"}, 403, X_Error_Message=f"no rights for {SECRET}")
            if path == "/api/whoami-v2":
                return self.answer({"name": "me", "type": "user", "orgs": []})
            if path == "/api/validate-yaml":  # of cards
                return self.answer({"errors": [], "warnings": []})
            if path == "/api/repos/create":
                hub.branches.setdefault("main", {})
                return self.answer({"url": "https://huggingface.co/me/it", "id": "me/it"})
            if match := re.fullmatch(r"/api/models/me/it/branch/(.+)", path):
                if match[1] in hub.branches:
                    return self.answer({"error": "Reference already exists"}, 409)
                hub.branches[match[1]] = dict(hub.branches["main"])
                return self.answer({}, 201)
            if re.fullmatch(r"/api/models/me/it/preupload/(.+)", path):
                files = [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
                return self.answer({"files": files})
            if match := re.fullmatch(r"/api/models/me/it/commit/(.+)", path):
                lines = [json.loads(line) for line in body.splitlines()]
                for line in lines:
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        hub.branches[match[1]][line["value"]["path"]] = content
                    elif line["key"] == "deletedFile":
                        del hub.branches[match[1]][line["value"]["path"]]
                hub.commits.append((match[1], lines[0]["value"]["summary"]))
                return self.answer(
                    {"commitUrl": "https://huggingface.co/me/it/commit/0", "commitOid": "0" * 40, "success": True}
                )
            if path.startswith("/api/models/me/it"):
                files = [{"rfilename": name} for name in hub.branches.get("main", {})]
                return self.answer({"id": "me/it", "private": hub.private, "siblings": files, "tags": []})
            return self.answer({"error": f"unknown: {path}"}, 404)

    return Handler


@pytest.fixture
def hub(monkeypatch):
    """Serve a Hub on this machine, log in to it, and yield it."""
    import huggingface_hub

    found = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(found))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


def run(folder: Path, *settings: str) -> dict:
    return run_recipe(load_recipe(quick_recipe(folder), settings), folder / "run", progress=False)


def test_each_stage_is_a_branch_that_loads_and_holds_nothing_of_this_machine(hub, tmp_path, capfd):
    run(tmp_path, "hub={repo: me/it}")
    assert set(hub.branches) == {"main", "tiny/first/seed-1", "tiny/second/fire/seed-1"}
    assert [branch for branch, _ in hub.commits] == ["main", "tiny/first/seed-1", "tiny/second/fire/seed-1"]
    pushed = hub.branches["tiny/second/fire/seed-1"]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(pushed)
    assert not {name for name in pushed if name.endswith((".pt", ".pth", ".bin")) or "state" in name}
    own = tmp_path / "run" / "second" / "fire" / "seed-1" / "checkpoint-3"
    assert pushed["model.safetensors"] == (own / "model.safetensors").read_bytes()
    for name, content in {**pushed, **hub.branches["main"]}.items():
        assert str(tmp_path).encode() not in content, name
        (tmp_path / name).write_bytes(content)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).num_parameters() == 8688
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|endoftext|>"
    card = pushed["README.md"].decode()
    assert "- arm: fire (fire," in card and "- steps of this phase: 3 of 3" in card and "| b | " in card
    assert (
        'from_pretrained("me/it", revision="tiny/second/fire/seed-1")' in card and "- fire\n" in card.partition("# ")[0]
    )
    before = list(hub.commits)
    run(tmp_path, "hub={repo: me/it}")  # nothing is new
    assert hub.commits == before
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err


def test_best_and_every_save(hub, tmp_path):
    run(tmp_path, "hub={repo: me/it, push: every save}", "keep_last=9")
    said = [message.partition(",")[0] for branch, message in hub.commits if branch == "tiny/first/seed-1"]
    assert said == ["step 2", "step 4"]
    with pytest.raises(UserError, match=r"phases\[1\].keep: hub.push is best, and 'second' keeps no best"):
        run(tmp_path, "hub={repo: me/it, push: best}")
    hub.commits.clear()
    settings = ("optimizer.lr=1.0", "optimizer.min_lr=1.0", "phases.1.keep=[best]")  # which makes the last one no best
    best = run_recipe(
        load_recipe(tmp_path / "tiny.yaml", ["hub={repo: me/it, push: best}", *settings]), tmp_path / "best",
        progress=False,
    )  # fmt: skip
    stage = tmp_path / "best" / "first" / "seed-1"
    step = json.loads((stage / "checkpoint-4" / "trainer_state.json").read_text())["best_global_step"]
    assert step != 4 and best["phases"][0]["steps"] == 4
    assert ("tiny/first/seed-1", f"step {step}") in [(b, m.partition(",")[0]) for b, m in hub.commits]
    own = (stage / f"checkpoint-{step}" / "model.safetensors").read_bytes()
    assert hub.branches["tiny/first/seed-1"]["model.safetensors"] == own


def test_a_best_checkpoint_that_a_finished_stage_did_not_keep_is_told_before_the_work(hub, tmp_path):
    settings = ("optimizer.lr=1.0", "optimizer.min_lr=1.0", "phases.1.keep=[best]")  # which makes the last one no best
    quick = "phases.0.keep=[]", *settings
    run_recipe(load_recipe(quick_recipe(tmp_path), quick), tmp_path / "run", arms=["fire"], progress=False)
    shutil.rmtree(tmp_path / "run" / "second")
    with pytest.raises(UserError, match=r"hub.push is best, and 'first/seed-1' was trained without keep: best"):
        run(tmp_path, "hub={repo: me/it, push: best}", *settings)
    assert not (tmp_path / "run" / "second").exists() and not hub.branches


def test_a_push_that_fails_loses_nothing_and_the_exit_code_tells(hub, tmp_path, capfd):
    path = quick_recipe(tmp_path)
    arguments = ["run", str(path), "--output", str(tmp_path / "run"), "--set", "hub={repo: me/it}"]
    hub.refused = {"commit/tiny/second"}
    assert main(arguments) == 1
    said = capfd.readouterr().err
    assert "warning: second / fire: step 3 was not pushed to 'me/it'" in said and SECRET not in said
    assert "its results are written, but not pushed to 'me/it': second/fire/seed-1. The same command" in said
    assert json.loads((tmp_path / "run" / "results.json").read_text())["arms"]["fire"]["final"]
    assert (tmp_path / "run" / "report.html").exists() and hub.branches["tiny/first/seed-1"]["model.safetensors"]
    hub.refused, before = set(), (tmp_path / "run" / "second" / "fire" / "seed-1" / "checkpoint-3").stat().st_mtime_ns
    assert main(arguments) == 0
    assert "model.safetensors" in hub.branches["tiny/second/fire/seed-1"]
    assert (tmp_path / "run" / "second" / "fire" / "seed-1" / "checkpoint-3").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"refused": {"whoami"}}, "hub.repo 'me/it': the login was not accepted"),
        ({"refused": {"repos/create", "api/models/me/it"}}, "hub.repo 'me/it' cannot be written to"),
        ({"refused": {"commit/main"}}, "hub.repo 'me/it' cannot be written to"),
        ({"refused": {"branch"}}, "hub.repo 'me/it' cannot be written to"),
        ({"private": False}, "hub.repo 'me/it' is public, and hub.private is true"),
    ],
)
def test_what_a_push_would_fail_at_is_found_before_the_work(change, said, hub, tmp_path):
    vars(hub).update(change)
    with pytest.raises(UserError, match=said) as error:
        run(tmp_path, "hub={repo: me/it}")
    assert SECRET not in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "run").rglob("checkpoint-*"))


def test_without_a_login_or_in_a_grid_it_is_refused(hub, tmp_path, monkeypatch):
    data = changed("hub", {"repo": "it"})
    with pytest.raises(UserError, match=r"hub.repo: 'it' is no repository of the Hub; write owner/name"):
        load_recipe(data)
    with pytest.raises(UserError, match="hub: the runs of a grid would be pushed over each other"):
        load_trials({**data, "hub": {"repo": "me/it"}, "sweep": {"seed": [1, 2]}})
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match=r"hub.repo me/it: nobody is logged in"):
        run(tmp_path, "hub={repo: me/it}")


def test_one_arm_of_a_run_goes_to_the_main_branch_with_a_card_that_compares_all(hub, tmp_path, capfd):
    arms = "phases.1.arms={base: {method: none}, fire: {method: fire}}"
    run(tmp_path, arms, f"corpora.a.files={tmp_path}/a.jsonl")
    assert main(["report", str(tmp_path / "run")]) == 0
    stale = "model-00001-of-00002.safetensors"
    hub.branches["main"] = dict.fromkeys([stale, "notes.md"], b"old")
    folder = str(tmp_path / "run")
    assert main(["push", folder, "me/it"]) == 2 and "--arm: say which: base, fire" in capfd.readouterr().err
    assert main(["push", folder, "me/it", "--arm", "fir"]) == 2
    assert "--arm: the run has no 'fir'. Did you mean 'fire'?" in capfd.readouterr().err and not hub.commits
    assert main(["push", folder, "me/it", "--arm", "fire", "--checkpoint", "best"]) == 2
    assert "kept no checkpoint 'best'" in capfd.readouterr().err and not hub.commits
    assert main(["push", folder, "me/it", "--arm", "fire"]) == 0
    said = capfd.readouterr()
    assert "pushed: https://huggingface.co/me/it/commit/0" in said.out and SECRET not in said.out + said.err
    assert [branch for branch, _ in hub.commits] == ["main"]
    pushed = hub.branches["main"]
    own = tmp_path / "run" / "second" / "fire" / "seed-1" / "checkpoint-3"
    assert pushed["model.safetensors"] == (own / "model.safetensors").read_bytes()
    card = pushed["README.md"].decode()
    assert "## All arms" in card and 'from_pretrained("me/it")' in card
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for arm in ("base", "fire"):
        assert re.search(rf"\| (\*\*)?{arm}\b.*{results['arms'][arm]['final']['b']['nll']:.4f}", card), arm
    (tmp_path / "again.yaml").write_bytes(pushed["recipe.yaml"])
    assert load_recipe(tmp_path / "again.yaml", [f"data_root={tmp_path}"]).phases[1].steps == 3
    assert {"notes.md", "report.html"} <= set(pushed) and stale not in pushed
    for name, content in pushed.items():
        assert str(tmp_path).encode() not in content, name


def test_what_is_damaged_or_a_link_is_not_pushed(hub, tmp_path, capfd):
    run(tmp_path)
    own = tmp_path / "run" / "second" / "fire" / "seed-1" / "checkpoint-3"
    (tmp_path / "private.txt").write_text("mine")
    (own / "tokenizer_private.json").symlink_to(tmp_path / "private.txt")
    assert main(["push", str(tmp_path / "run"), "me/it"]) == 2
    assert "tokenizer_private.json' is a link to a file outside of the checkpoint" in capfd.readouterr().err
    (own / "tokenizer_private.json").unlink()
    weights = own / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert main(["push", str(tmp_path / "run"), "me/it"]) == 2
    assert "is damaged" in capfd.readouterr().err and not hub.commits


def test_a_public_repository_is_pushed_to_where_that_is_said(hub, tmp_path, capfd):
    run(tmp_path)
    hub.private = False
    assert main(["push", str(tmp_path / "run"), "me/it"]) == 2
    assert "push 'me/it' is public, and --public was not given" in capfd.readouterr().err and not hub.commits
    assert main(["push", str(tmp_path / "run"), "me/it", "--public"]) == 0
    hub.refused = {"commit/main"}
    assert main(["push", str(tmp_path / "run"), "me/it", "--public"]) == 2
    assert "push: nothing was uploaded to 'me/it'" in capfd.readouterr().err
    for folder, says in (
        (tmp_path, f"one of the runs inside, such as '{tmp_path / 'run'}'"),
        (tmp_path / "run" / "first", "the folder that"),
    ):
        assert main(["push", str(folder), "me/it"]) == 2
        assert f"'{folder}' is no run: it has no recipe.json. Give {says}" in capfd.readouterr().err


def test_an_average_from_a_warm_start_is_pushed_as_such(hub, tmp_path, capfd):
    run(tmp_path, "phases.1.start_from={first: [2, final]}", "phases.1.ema={decay: 0.5}", "phases.0.keep=[2]")
    assert main(["push", str(tmp_path / "run"), "me/it"]) == 2
    assert "--start: say which: 2, final" in capfd.readouterr().err and not hub.commits
    assert main(["push", str(tmp_path / "run"), "me/it", "--start", "2", "--checkpoint", "ema"]) == 0
    own, pushed = tmp_path / "run" / "second" / "fire@2" / "seed-1" / "checkpoint-3", hub.branches["main"]
    assert pushed["model.safetensors"] == (own / "ema" / "model.safetensors").read_bytes()
    assert pushed["model.safetensors"] != (own / "model.safetensors").read_bytes()
    assert {"config.json", "tokenizer.json", "report.html", "recipe.yaml"} <= {*pushed}
    card = pushed["README.md"].decode()
    assert "# tiny: second / fire@2\n\nThe moving average of the weights after step 3, by" in card
    assert "- steps of this phase: 3 of 3" in card and "| held-out text |" in card


ARMS = "phases.1.arms={base: {method: none}, fire: {method: fire}}"
STARTS = "phases.1.start_from={first: [2, final]}"
TWO_PARENTS = (
    "phases=[{name: first, data: {a: 1.0}, steps: 1, arms: {base: none, fire: fire}}, "
    "{name: second, data: {a: 1.0}, steps: 1, start_from: {first/base: final, first/fire: final}, arms: {base: none}}]"
)


@pytest.mark.parametrize(
    ("settings", "options", "folder"),
    [
        ((ARMS, STARTS), {"arm": "fire", "start": "2"}, "second/fire@2/seed-1"),
        ((ARMS, STARTS), {"arm": "base@final", "seed": 2}, "second/base@final/seed-2"),
        ((ARMS, STARTS), {"arm": "fire"}, "--start: say which: 2, final"),
        ((ARMS, STARTS), {"arm": "fire", "start": "fianl"}, "--start: the run has no 'fianl'. Did you mean 'final'"),
        ((ARMS, STARTS), {"arm": "fire@3"}, "--arm: the run has no 'fire@3'. Did you mean 'fire'? It has: base, fire"),
        ((ARMS, STARTS), {"arm": "fire", "start": "2", "seed": 3}, "--seed: the run has no '3'. It has: 1, 2"),
        ((STARTS, "phases.1.arms={}"), {"start": "final"}, "second/final/seed-1"),
        ((STARTS, "phases.1.arms={}"), {"arm": "fire"}, "--arm: the last phase, 'second', has no arms: leave it out"),
        ((TWO_PARENTS,), {}, "--start: say which: first-base-final, first-fire-final"),
        ((TWO_PARENTS,), {"start": "first-fire-final"}, "second/base@first-fire-final/seed-1"),
    ],
)
def test_a_stage_is_chosen_by_what_folders_and_tables_call_it(settings, options, folder, tmp_path):
    recipe = load_recipe(quick_recipe(tmp_path), ["seed=[1, 2]", "phases.0.keep=[2]", *settings])
    stages, wanted = expand(RunContext(recipe)), {"arm": None, "seed": None, "start": None, **options}
    if folder.startswith("--"):
        with pytest.raises(UserError, match=re.escape(folder)):
            _chosen(stages, **wanted)
    else:
        assert _chosen(stages, **wanted).folder == folder
