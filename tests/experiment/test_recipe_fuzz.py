"""Recipes that cannot hurt: whatever is in one, `check` prints a plan or says which key is wrong and why."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.models import tiny_gpt2
from support.recipes import GOOD, changed

from fire_llm import UserError, load_recipe
from fire_llm.cli import main
from fire_llm.experiment.context import RunContext
from fire_llm.experiment.stages import expand

LONG: dict = {
    "name": "long",
    "description": "Every section of a recipe.",
    "seed": [1, 2],
    "model": {"preset": "gpt-tiny", "context": 32, "config": {"n_embd": 32, "n_layer": 2, "n_head": 2}},
    "tokenizer": {"train": 300, "corpora": ["mine"]},
    "data_root": ".",
    "corpora": {"mine": {"files": "a.jsonl", "holdout": 0.1, "text": "text"}, "more": {"files": ["b.txt"]}},
    "optimizer": {"lr": 3.0e-3, "min_lr": 3.0e-4, "warmup": 0.1, "betas": [0.9, 0.95], "clip": 1.0},
    "batch": {"tokens_per_step": 384, "sequences_per_device": 2, "document_mask": True},
    "precision": "fp32",
    "phases": [
        {"name": "first", "data": {"mine": 1.0}, "epochs": 2.0, "keep": ["best", 6]},
        {
            "name": "second",
            "start_from": {"first": ["best", "final"]},
            "data": {"more": 0.75, "mine": 0.25},
            "tokens": 8000,
            "max_corpus_tokens": 5000,
            "sampling": "with-replacement",
            "arms": {
                "base": "keep",
                "fire": [{"method": "fire", "iterations": 5, "roles": ["attention"], "exclude": ["x"]}],
                "both": {"method": "shrink_perturb", "shrink": 0.4},
            },
        },
        {"name": "third", "start_from": {"second/fire": "final"}, "data": {"more": 1.0}, "steps": 3},
    ],
    "evaluate": {"data": ["more", "mine"], "every_steps": 4, "max_tokens": 100},
    "save_every_steps": 4,
}

GIVEN: dict = {
    "model": "./checkpoint",
    "seed": 7,
    "batch": {"tokens_per_step": 640},
    "optimizer": {"name": "muon", "schedule": "infinite", "constant_lr": 3.0e-4, "decay": 0.2, "cooldown": 0.1},
    "phases": [
        {"name": "one", "data": {"a.jsonl": 1.0}, "epochs": 1.5, "arms": {"fire": "fire", "none": "keep"}},
        {"name": "two", "data": {"a.jsonl": 1, "b.txt": 3}, "steps": 4, "arms": {"fire": "fire", "none": "keep"}},
    ],
}

WEIRD: list[Any] = [
    None, True, False, "", " ", "x", "0", "1", "6e-4", "yes", "null", "~", "*", "&a", "!!int", "{", "[", "#", "%", "@",
    0, 1, -1, 2, 3, 7, 64, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(2**63),
    0.0, -0.0, 0.5, 1.0, 1.5, 1e-12, 5e-324, 1e16, 1e308, -1e308, float("nan"), float("inf"), float("-inf"),
    [], {}, [[]], [{}], {"": ""}, {"a": {"b": [1]}}, [None], [1, 1], ["final", "final"], ["best", "best"], [1, "a", {}],
    {1: 2}, {None: 1}, {True: 1}, {2.5: 1}, {"a": 1, 1: "a"},
    "..", "../..", "/", "/etc/passwd", "./a/../b", "C:\\x", "\\\\host\\x", "a/b", "a//b", "a/b/c", "~root/x", "a" * 300,
    "a/" * 600, "x" * 20_000, "a.txt", "a.jsonl", "*.jsonl", "[.jsonl", "**", "a.jsonl/x", "https://u:p@host/a.txt",
    "hf_" + "a" * 34, "\x00", "a\x00b.txt", "\x1b[31mred", "\u202eabc", "\ud800", "é", "学习", "🙂", "a\nb",
    "\ta", "\ufeff",
    "[red]", "[/red]", "%s%n", "${HOME}", "$(true)", "`true`", "__class__", "to_dict", "CON", "seed-1", "tokenizer",
    "recipe.json", "results.json", "x.partial", ".lock", "first", "FIRST", "First", "second/fire", "fire", "keep",
    "(", "(a+)+$", "a{99999999999}", "(" * 300, "final", "best", "python-docs", "gpt-tiny", "gpt2", "bf16",
    "muon", "wsd",
    {"method": "fire"}, {"method": None}, {"method": ["fire"]}, {"method": {"a": 1}}, {"method": "fire", "method ": 1},
    {"method": "polar", "tolerance": float("nan")}, {"preset": "gpt-tiny"}, {"checkpoint": "x/y"}, {"train": 300},
    {"files": "a.jsonl"}, {"files": []}, {"files": [1]}, {"dataset": "a/b", "files": "a.jsonl"}, {"final": 1},
    {"first": "final"}, {"first": []}, {"first": [6, "6"]}, {"a.jsonl": 1.0}, {"mine": float("inf")}, {"mine": 1e308},
    {"name": "x", "data": {"mine": 1.0}, "steps": 1}, list(range(300)), {str(n): n for n in range(300)}, b"\x00\xff",
    {"a", "b"}, (1, 2),
]  # fmt: skip

KEYS = [
    "name", "seed", "model", "preset", "config", "n_layer", "n_embd", "n_positions", "vocab_size", "auto_map",
    "to_dict",
    "attn_implementation", "_attn_implementation", "layer_types", "text_config", "tokenizer", "train", "path",
    "corpora",
    "data", "data_root", "optimizer", "schedule", "decay", "batch", "phases", "arms", "start_from", "keep", "epochs",
    "steps", "tokens", "evaluate", "method", "roles", "exclude", "iterations", "holdout", "validation",
    "document", "int",
    "str", "", "x", "<<", "__proto__", "a.b", "a b", "\x00", "é",
]  # fmt: skip


def deep(depth: int) -> Any:
    value: Any = 1
    for n in range(depth):
        value = [value] if n % 2 else {"a": value}
    return value


values = st.one_of(
    st.sampled_from(WEIRD),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.dates(),
    st.builds(deep, st.sampled_from([3, 15, 17, 60])),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    ),
)


def places(data: Any, at: tuple = ()) -> list[tuple]:
    """Return the path of every value below."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path for key, value in inner for path in [(*at, key), *places(value, (*at, key))]]


def parent(data: Any, path: tuple) -> Any:
    for key in path[:-1]:
        data = data[key]
    return data


@st.composite
def mutated(draw: st.DrawFn) -> dict:
    """Draw a sound recipe in which a few values are replaced, deleted, added, moved or repeated."""
    data = copy.deepcopy(draw(st.sampled_from([GOOD, LONG, GIVEN])))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        found = places(data)
        if not found:
            break
        path = draw(st.sampled_from(found))
        at, key = parent(data, path), path[-1]
        match draw(
            st.sampled_from(["replace", "replace", "replace", "delete", "add", "swap", "wrap", "repeat", "rename"])
        ):
            case "replace":
                at[key] = copy.deepcopy(draw(values))
            case "delete":
                del at[key]
            case "add" if isinstance(at, dict):
                at[draw(st.sampled_from(KEYS) | st.text(max_size=10))] = copy.deepcopy(draw(values))
            case "add":
                at.insert(key, copy.deepcopy(draw(values)))
            case "swap":
                other = draw(st.sampled_from(found))
                at[key] = copy.deepcopy(parent(data, other)[other[-1]])
            case "wrap":
                at[key] = draw(st.sampled_from([[at[key]], {"a": at[key]}, [at[key], at[key]]]))
            case "repeat" if isinstance(at, list):
                at.append(copy.deepcopy(at[key]))
            case "rename" if isinstance(at, dict):
                at[draw(st.sampled_from(KEYS))] = at.pop(key)
    return data


SNIPPETS = [
    "!!python/object/apply:os.system ['touch HURT']", "!!python/object/new:os.system ['touch HURT']",
    "!!python/name:os.x",
    "&a [*a]", "&a {x: *a}", "*nobody", "{<<: {a: 1}}", "{<<: 1}", "!!map [1]", "!!set {a, b}",
    "!!omap [a: 1]", "!!int x",
    "!!bool x", "!!float ''", "!!timestamp x", "!!binary x", "!x 1", "2020-13-45", "0b", "0x_", "1:59:59", "9" * 5000,
    "1:" * 900 + "1.0", "[" * 3000, "{a: " * 500, "'", "\"\\uD800\"", "\"\\x00\"", "\"\\x1b\"", "? [a]", "- -",
    "%TAG", "---",
    "...", "\t", "\x00", "\x07", "\ufeff", "\u2028", "a: b: c", "<<: *x", "|\n  x", ">-\n x", "? ? ?", "{}: {}",
]  # fmt: skip

BOMB = "\n".join(["a0: &a0 [1]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12))])


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Draw the bytes of a recipe's file: YAML of a mutated recipe, or what only looks like it."""
    kind = draw(
        st.sampled_from(["recipe"] * 12 + ["line"] * 6 + ["cut", "twice", "bytes", "noise", "bomb", "utf16", "bom"])
    )
    if kind == "bytes":
        return draw(st.binary(max_size=200))
    text = yaml.dump(draw(mutated()), allow_unicode=draw(st.booleans()), sort_keys=False, Dumper=yaml.Dumper)
    lines = text.splitlines()
    place = draw(st.integers(0, max(0, len(lines) - 1)))
    if kind == "line" and lines:
        line = lines[place]
        head = line.partition(":")[0] + ": " if ":" in line else line[: len(line) - len(line.lstrip(" -"))]
        lines[place] = head + draw(st.sampled_from(SNIPPETS))
    elif kind == "twice" and lines:
        lines.insert(place, lines[place])
    elif kind == "bomb":
        lines += [BOMB, draw(st.sampled_from(["name: *a11", "phases: *a11", "seed: *a11"]))]
    text = "\n".join(lines) + "\n"
    if kind == "cut":
        text = text[: draw(st.integers(0, len(text)))]
    elif kind == "noise":
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.text(max_size=5)) + text[at:]
    if kind == "utf16":
        return text.encode("utf-16", "surrogatepass")
    return (b"\xef\xbb\xbf" if kind == "bom" else b"") + text.encode("utf-8", "surrogatepass")


dotted = st.lists(
    st.sampled_from(
        [*KEYS, "phases.0", "phases[1]", "phases.1.arms.fire", "[", "]", "-1", "99", "²", "9" * 30, "first"]
    )
    | st.text(max_size=5),
    max_size=4,
).map(".".join)
overrides = st.just([]) | st.lists(
    st.one_of(
        st.builds(lambda key, value: f"{key}={value}", dotted, st.sampled_from([*SNIPPETS, *map(str, WEIRD[:110])])),
        st.sampled_from(
            ["name=n", "seed=[1, 2]", "phases.0.steps=3", "optimizer.lr=1.0e-3", "batch.document_mask=true"]
        ),
        st.text(max_size=10),
        dotted,
    ),
    max_size=2,
)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory):
    """Stand in a folder with two corpora and a checkpoint, in which nothing else may appear."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "a.jsonl").write_text('{"text": "a b c"}\n' * 50)
    (folder / "b.txt").write_text("a b c\n\nd e f\n")
    tiny_gpt2().config.save_pretrained(folder / "checkpoint")
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


def check(room: Path, data: bytes, changes: list[str]) -> None:
    """Assert that `check` ends with 0 and a plan, or with 2 and a fault that names its place."""
    (room / "r.yaml").write_bytes(data)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["check", "r.yaml", *(f"--set={change}" for change in changes)])
    said = err.getvalue()
    for text in (out.getvalue(), said):
        text.encode("utf-8")
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", text), text
    assert sorted(os.listdir(room)) == ["a.jsonl", "b.txt", "checkpoint", "r.yaml"]
    if code == 0:
        assert "no fault found" in out.getvalue() and "in all: " in out.getvalue() and not said
        return
    assert code == 2, said
    assert not out.getvalue()
    recipes = r"('r\.yaml' (is|holds) no)|('r\.yaml' is not YAML: ..)"
    place = rf"({recipes}|(--set .*: ..)|(phase '.*: ..)|([a-z_]+[\w\[\].+-]*: ..))"
    if re.match(r"fire-llm: (one fault|\d+ faults) in 'r\.yaml':\n", said):
        for line in said.splitlines()[1:]:
            assert re.match(r"  \S.*: \S", line) or not line.startswith("  "), said
    elif re.match(r"fire-llm: \d+ faults:\n", said):
        for line in said.splitlines()[1:]:
            assert re.match(f"  {place}", line), said
    else:
        assert re.match(f"fire-llm: {place}", said), said


@settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=files(), changes=overrides)
def test_no_recipe_hurts(room: Path, data: bytes, changes: list[str]):
    check(room, data, changes)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(max_examples=10_000, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=files(), changes=overrides)
def test_no_recipe_of_ten_thousand_hurts(room: Path, data: bytes, changes: list[str]):
    check(room, data, changes)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (BOMB, "more than 20,000 values"),
        ("a: &a [*a]", "nested more than 16 deep (or holds itself)"),
        ("a: " + "[" * 100_000, "nested too deeply"),
        ("a: " + "[" * 30 + "]" * 30, "nested more than 16 deep"),
        ("x: 1\n" * 300_000, "300,000 are allowed"),
        ("a: " + "9" * 5000, "a number in it cannot be read"),
        ("a: 10000000000000000000", "a: a whole number beyond"),
        ("a: {<<: {b: 1}}", "line 1: '<<' is not for recipes"),
        ("a: !!python/object/apply:os.system [x]", "the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("a: {1: 2}", "a: the key 1 is not text; put it in quotes"),
        ("a: .inf", "a: inf is not allowed; give a finite number"),
        ('a: "\\e[31m"', "a: the text holds the character U+001B"),
        ('"\\uD800": 1', "recipe: a key holds the character U+D800"),
        ("model: gpt2\ndata_root: https://me:secret@host", "data_root: the text holds a password or a token"),
        ("a: " + "x" * 300, "a: the text is too long for a path"),
    ],
    ids=range(15),
)
def test_what_no_recipe_holds(tmp_path, capsys, text, reason):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert main(["check", str(path)]) == 2
    said = capsys.readouterr().err
    assert reason in said and "secret" not in said


def test_an_alias_bomb_costs_no_memory(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(BOMB)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["check", str(tmp_path / "r.yaml")]) == 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB; written out it is 9¹¹ numbers


def test_dates_are_text_and_aliases_are_copies(tmp_path):
    text = yaml.dump({k: v for k, v in GOOD.items() if k != "phases"}) + (
        "name: 2026-11-21\nphases:\n- {name: one, data: &d {python-docs: 1.0}, steps: 2}\n"
        "- {name: two, data: *d, steps: 2}\n"
    )
    (tmp_path / "r.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "r.yaml", ["phases.1.data.python-docs=2.0"])
    assert recipe.name == "2026-11-21"
    assert [phase.data["python-docs"] for phase in recipe.phases] == [1.0, 2.0]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("phases/1/start_from", {}, "phases[1].start_from: it names no checkpoint"),
        ("phases/1/start_from", {"one": []}, "phases[1].start_from: it names no checkpoint"),
        (
            "phases/1/start_from",
            {"one": ["final", "final"]},
            "start_from.one: ['final', 'final'] names a checkpoint twice",
        ),
        ("phases/1/name", "/", "phases[1].name: '/' names a folder"),
        ("phases/1/name", "ONE", "phases[1].name: 'ONE' is the name of an earlier phase"),
        (
            "phases/1/arms",
            {"A": "keep", "a": "keep"},
            "phases[1].arms: two arms are called 'a' but for capital letters",
        ),
        ("phases/1/arms/fire", [], "phases[1].arms.fire: an empty list resets nothing; write none"),
        ("phases/1/arms/fire/method", {"a": 1}, "phases[1].arms.fire.method: unknown reset"),
        ("phases/1/arms/fire/exclude", ["a{99999999999}"], "phases[1].arms.fire.exclude"),
        ("seed", -1, "seed[0]: -1 is not allowed"),
        ("seed", 2**32, "seed[0]: 4294967296 is not allowed"),
        ("optimizer/betas", [0.9, 1.0], "optimizer.betas[1]: 1.0 is not allowed"),
        ("model/config", {"to_dict": 1}, "model: GPT2Config has no attribute 'to_dict'"),
        (
            "model/config",
            {"n_layer": 10**6},
            "model.config: n_layer is 1000000; at most 2,000 is allowed",
        ),
        ("model/config", {"n_head": 7}, "model.config: transformers cannot build GPT2 from this config"),
        ("model/config", {"n_embd": "wide"}, "model.config"),
    ],
)
def test_faults_that_are_plain_data(tmp_path, capsys, path, value, message):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(changed(path, value)))
    assert main(["check", str(tmp_path / "r.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_stages_neither_multiply_without_end_nor_share_a_folder():
    one = {"data": {"python-docs": 1.0}, "steps": 2, "keep": [1]}
    later = ({"name": f"p{n}", "start_from": {f"p{n - 1}": ["final", 1]}, **one} for n in range(1, 30))
    many = [{"name": "p0", **one}, *later]
    with pytest.raises(UserError, match="phases: more than 2,000 stages"):
        expand(RunContext(load_recipe({**GOOD, "phases": many})))
    duplicates = [
        {"name": "x", "arms": {"y": "keep"}, **one},
        {"name": "x-y", "start_from": {"x/y": 1}, **one},
        {"name": "z", "start_from": {"x/y": "final", "x-y": "final"}, **one},
    ]
    with pytest.raises(UserError, match="phases: two stages would share the folder 'z/x-y-final/seed-1'"):
        expand(RunContext(load_recipe({**GOOD, "phases": duplicates})))
