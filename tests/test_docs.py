"""The pages say what the code does: keys and defaults, links, commands, recipes, paths and names."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from support import tiny_recipe
from support.recipes import validator
from transformers import TrainingArguments

from fire_llm import __version__, load_recipe, run_recipe
from fire_llm.architectures.matrices import ROLES
from fire_llm.cli.parser import VERBS, parser
from fire_llm.data.corpora import CORPORA, CorpusSpec
from fire_llm.experiment.evaluate_run import evaluate_run
from fire_llm.experiment.recipe import Recipe, recipe_schema
from fire_llm.experiment.recipe.faults import arm_faults, contradictions
from fire_llm.experiment.recipe.sections import (
    BatchSection,
    EmaSection,
    EvaluateSection,
    GenerateSection,
    HubSection,
    ModelSection,
    OptimizerSection,
    PhaseSection,
    StopSection,
    TokenizerSection,
    as_list,
)
from fire_llm.reporting.schema import EVALUATION_PARTS, PARTS, results_schema
from fire_llm.resets import RESETS, ResetSpec

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```([\w-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
IN_LINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)


@cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return FENCE.sub("", text_of(page))


def spans(page: Path) -> list[str]:
    """Return what stands in backticks in a page's prose."""
    return [span.replace("\\|", "|") for span in IN_LINE.findall(prose(page))]


def blocks(page: Path, *languages: str) -> list[str]:
    return [content for language, content in FENCE.findall(text_of(page)) if language in languages]


# ---- recipes.md against the schema

SECTIONS: dict[str, tuple[type[BaseModel], str]] = {
    "": (Recipe, ""), "model": (ModelSection, "ModelSection"), "tokenizer": (TokenizerSection, "TokenizerSection"),
    "corpora": (CorpusSpec, "CorpusSpec"), "optimizer": (OptimizerSection, "OptimizerSection"),
    "batch": (BatchSection, "BatchSection"), "phases": (PhaseSection, "PhaseSection"),
    "evaluate": (EvaluateSection, "EvaluateSection"), "ema": (EmaSection, "EmaSection"),
    "stop": (StopSection, "StopSection"), "generate": (GenerateSection, "GenerateSection"),
    "hub": (HubSection, "HubSection"),
}  # fmt: skip
KINDS = {"string": "text", "integer": "integer", "number": "number", "array": "list", "object": "mapping"}


def rows(table: str) -> list[list[str]]:
    """Return the cells of a Markdown table below its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[trial.strip() for trial in line.strip("|").split("|")] for line in lines[2:]]


def part(after: str, before: str) -> str:
    return text_of(ROOT / "docs" / "recipes.md").partition(after)[2].partition(before)[0]


def kinds(schema: dict[str, Any]) -> set[str]:
    """Return the types that a value may have: the page's words, or allowed values in backticks."""
    if "$ref" in schema:
        return {"mapping"}
    if "anyOf" in schema:
        return set().union(*map(kinds, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return {f"`{yaml.safe_dump(v).splitlines()[0]}`" for v in schema.get("enum", [schema.get("const")])}
    if schema.get("type") == "boolean":
        return {"`true`", "`false`"}
    return set() if schema.get("type") == "null" else {KINDS[schema.get("type", "object")]}


def check_row(key: str, kind: str, default: str, field: Any, schema: dict[str, Any]) -> None:
    """Compare a row with the field it is about."""
    assert set(re.split(", | or ", kind)) == kinds(schema), key
    literal = re.fullmatch("`([^`]+)`", default)
    value = field.get_default(call_default_factory=True)
    if field.is_required():
        assert default == "required", key
    elif isinstance(value, BaseModel) or value in (None, "", [], (), {}):
        assert default and default != "required" and not literal, f"{key}: the schema has no default for it"
    else:
        assert literal, f"{key}: the default is {value}"
        told = yaml.safe_load(literal[1])
        assert as_list(told) == as_list(value) and type(as_list(told)[0]) is type(as_list(value)[0]), key


@pytest.mark.parametrize("name", SECTIONS)
def test_every_key_of_a_recipe_stands_in_the_page_with_its_type_and_default(name: str) -> None:
    section, definition = SECTIONS[name]
    keys = part("## Keys\n", "## Resets")
    table = rows((keys.partition(f"**`{name}`**")[2] if name else keys).partition("**`")[0])
    schema = recipe_schema()
    properties = (schema["$defs"][definition] if definition else schema)["properties"]
    assert [row[0].strip("`") for row in table] == list(section.model_fields)
    for key, kind, default, meaning in table:
        assert meaning
        check_row(key, kind, default, section.model_fields[key.strip("`")], properties[key.strip("`")])


def test_no_section_of_the_schema_lacks_a_table() -> None:
    told = {definition for _, definition in SECTIONS.values() if definition}
    assert told == set(recipe_schema()["$defs"]) - {"PhaseOptimizerSection"}  # the keys of OptimizerSection
    assert set(re.findall(r"^\*\*`(\w+)`\*\*", part("## Keys\n", "## Resets"), re.MULTILINE)) == {*SECTIONS} - {""}


def test_every_method_and_option_stands_in_the_page() -> None:
    methods, options = part("## Resets\n", "## Optimizers").split("| method | option |")
    listed = rows("\n".join(line for line in methods.splitlines() if line.startswith("|")))
    there = {name.strip("`") for name, *_ in listed}
    assert there ^ {*RESETS} == set(), "docs/recipes.md, Resets, first table: a row a method, and no other"
    assert len(listed) == len(there)
    for name, when, acts_on, _ in listed:
        method = RESETS[name.strip("`")]
        roles = "every parameter" if method.roles == ROLES else ", ".join(method.roles)
        assert acts_on == ("nothing" if method.name == "none" else roles), name
        assert when == ("once" if method.when == "transition" else "during"), name
    found: dict[str, set[str]] = {name: set() for name in RESETS}
    for names, option, kind, default, meaning in rows("| method | option |" + options):
        key = option.strip("`")
        for name in RESETS if names == "every method" else re.findall("`([^`]+)`", names):
            assert key not in found[name] and meaning
            found[name].add(key)
            schema = RESETS[name].options
            own = schema.model_json_schema()["properties"][key]
            if names == "every method":
                assert set(kind.split(" or ")) == kinds(own), key
            else:
                check_row(f"{name}.{key}", kind, default, schema.model_fields[key], own)
    for name, method in RESETS.items():
        assert found[name] ^ {*method.options.model_fields} == set(), f"docs/recipes.md, Resets, options of {name}"


def test_the_recipes_that_come_with_the_package_are_listed() -> None:
    listed = rows(part("## Recipes that come with the package\n", "\n## "))
    there = [p.relative_to(ROOT / "recipes").with_suffix("") for p in (ROOT / "recipes").rglob("*.yaml")]
    assert {row[0].strip("`") for row in listed} == {str(p) for p in there if p.parts[0] != "accelerate"}


def test_the_corpora_that_come_with_the_package_are_listed() -> None:
    table = text_of(ROOT / "docs" / "data.md").partition("| name | what |")[2].partition("\n\n")[0]
    assert [row[0].strip("`") for row in rows("| name |" + table)] == list(CORPORA)


# ---- results-schema.md against what a run writes

NAMES = {"corpora", "arms", "final", "final_ema", "eval", "ema", "loss_jump", "phase_corpus", "left_out", "weights"}
"""Keys of mappings from names."""
FREE = {"recipe", "options"}
"""Keys of what other pages tell of."""


def fields(data: Any, names: bool = False) -> set[str]:
    """Return the keys of nested mappings, those that are names left out."""
    if isinstance(data, list):
        return set().union(*map(fields, data))
    if not isinstance(data, dict):
        return set()
    inner = [fields(value, key in NAMES) for key, value in data.items() if names or key not in FREE]
    return set().union(set() if names else {*data}, *inner)


def test_every_field_that_a_run_writes_stands_in_the_page_and_no_other(tmp_path: Path) -> None:
    page = ROOT / "docs" / "results-schema.md"
    recipe = load_recipe(
        tiny_recipe.recipe(tmp_path),
        [
            "evaluate.diagnostics_every_steps=5",
            "generate={prompts: a, max_new_tokens: 4}",
            "phases.1.arms.fire=[fire, {method: rescale, when: overtrained}]",
        ],
    )
    results = run_recipe(recipe, tmp_path / "run", progress=False)
    written = fields(results) | fields(evaluate_run(tmp_path / "run", progress=False))
    told = set(re.findall(r"\w+", " ".join([*spans(page), *blocks(page, "json")])))
    assert written - told == set()
    own = text_of(page).partition("## What `fire-llm eval --json` writes")[0]
    listed = {key for row in re.findall(r"^\| (`.+?`) \|", own, re.MULTILINE) for key in IN_LINE.findall(row)}
    assert listed - written == set()


def test_the_tables_of_fields_and_the_json_schema_are_what_the_models_say() -> None:
    spec = importlib.util.spec_from_file_location("write_schema_page", ROOT / "scripts" / "write_schema_page.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    page = text_of(ROOT / "docs" / "results-schema.md")
    assert page == script.page(page), "run `make schema`"
    assert set(script.MODELS) == {name for _, name, _ in script.TABLE.findall(page)}
    assert json.loads(text_of(ROOT / "docs" / "results.schema.json")) == results_schema(), "run `make schema`"


def test_every_field_of_the_results_is_described_and_a_run_writes_what_the_json_schema_says(finished) -> None:
    for model in (*PARTS, *EVALUATION_PARTS):
        assert all(field.description for field in model.model_fields.values()), model.__name__
        assert model.__doc__
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(json.loads((finished[0] / "results.json").read_text()), results_schema())


# ---- links


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    slugs: list[str] = []
    found = set()
    for heading in re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.add(f"{slug}-{slugs.count(slug)}" if slug in slugs else slug)
        slugs.append(slug)
    return found


def links(page: Path) -> list[tuple[Path, str]]:
    """Return (file, anchor) of every link of a page to a file of ours."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    inner = [target.partition("#") for target in targets if not re.match(r"[a-z]+:", target)]
    return [((page.parent / file).resolve() if file else page, anchor) for file, _, anchor in inner]


@pages
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for file, anchor in links(page):
        assert file.exists(), f"{page.name} links to {file}, which is not there"
        assert not anchor or anchor in anchors(file), f"{page.name}: {file.name} has no heading #{anchor}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, left = set(), [ROOT / "README.md"]
    while left:
        if (page := left.pop()) not in reached and page.suffix == ".md":
            reached.add(page)
            left += [file for file, _ in links(page)]
    assert reached == set(PAGES)


# ---- commands

FLAGS = {
    name: {flag for action in verb._actions for flag in action.option_strings}
    for name, verb in next(a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)).choices.items()
}


def commands(page: Path) -> list[str]:
    """Return the commands of ours in a page's code blocks, without comments."""
    lines = "\n".join(blocks(page, "", "sh", "bash")).replace("\\\n", " ").splitlines()
    cut = (line[line.index("fire-llm ") :] for line in lines if re.match(r"(srun .* |)fire-llm \S", line))
    return [shlex.join(shlex.split(line, comments=True)) for line in cut]


@pages
def test_commands_in_blocks_are_what_the_parser_takes(page: Path) -> None:
    for command in commands(page):
        parser().parse_args(shlex.split(command)[1:])  # ends with a message and 2 where it does not


def theirs(page: Path) -> set[str]:
    """Return the options of transformers' run_clm.py, on the page that is for those who come from there."""
    if page.name != "coming-from-run-clm.md":
        return set()
    own = (
        "model_name_or_path model_type config_overrides config_name tokenizer_name cache_dir use_fast_tokenizer "
        "model_revision token trust_remote_code dtype dataset_name dataset_config_name train_file validation_file "
        "max_train_samples max_eval_samples streaming block_size overwrite_cache validation_split_percentage "
        "preprocessing_num_workers keep_linebreaks"
    )
    return {f"--{name}" for name in [*own.split(), *TrainingArguments.__dataclass_fields__]}


@pages
def test_commands_in_prose_name_verbs_and_options_that_are_there(page: Path) -> None:
    for span in spans(page):
        found = re.search(r"(?:fire-llm|-m fire_llm) ([a-z]+)(.*)", span)
        if found:
            assert found[1] in VERBS, span
            assert set(re.findall(r"(?<![\w-])--[a-z-]+", found[2])) <= FLAGS[found[1]], span
        elif re.match(r"--[\w-]+( |$|=)", span):
            assert re.match(r"--[\w-]+", span)[0] in set().union(theirs(page), *FLAGS.values()), span


@pytest.mark.parametrize(("verb", "after"), [("apply", "## Options"), ("inspect", "## `inspect`")])
def test_the_page_on_checkpoints_lists_every_option(verb: str, after: str) -> None:
    section = text_of(ROOT / "docs" / "checkpoints.md").partition(f"{after}\n")[2].partition("\n## ")[0]
    told = [flag for option, _ in rows(section) for flag in re.findall(r"`(--[a-z-]+)", option)]
    assert sorted(told) == sorted(FLAGS[verb] - {"-h", "--help"})


@pages
def test_targets_of_make_are_there(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE)
    for line in [*"\n".join(blocks(page, "")).splitlines(), *spans(page)]:
        if found := re.match(r"make ([a-z-]+)", line):
            assert found[1] in targets, line


# ---- recipes


def complete(fragment: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe that holds a fragment of one, keys of a phase in its only phase."""
    recipe = {"model": {"preset": "gpt-tiny"}, "tokenizer": {"train": 512}, **fragment}
    own = {key: recipe.pop(key) for key in set(recipe) - set(Recipe.model_fields)}
    return {"phases": [{"name": "one", "data": {"python-docs": 1.0}, "steps": 10, **own}], **recipe}


@pages
def test_recipes_in_blocks_are_valid(page: Path) -> None:
    for content in blocks(page, "yaml"):
        data = complete(yaml.safe_load(content))
        validator().validate(data)
        assert arm_faults(data) == []
        faults = [*contradictions(Recipe.model_validate(data))]
        # What a page trains on is not on this machine.
        assert [f for f in faults if "there is no file" not in f and "no file matches" not in f] == [], content


@pages
def test_arms_in_prose_are_valid(page: Path) -> None:
    own = set(re.findall(r'@register_\w+\(\s*"(\w+)"', text_of(page)))  # of a page on how to add one
    for span in spans(page):
        if re.match(r"\[?\{method: (?!NAME)|\[\w+, \{method: ", span):
            for reset in as_list(yaml.safe_load(span)):
                name = reset if isinstance(reset, str) else reset["method"]
                assert name in own or ResetSpec.check(reset)[0] == [], span


# ---- names


@pages
def test_paths_in_prose_are_there(page: Path) -> None:
    for span in spans(page):
        path = span.split("::")[0].split(" ")[-1]
        if re.fullmatch(r"(fire_llm|docs|tests|recipes|scripts)/[\w./*-]*", path) and "recipes/small/web" not in path:
            assert list(ROOT.glob(path.rstrip("/"))), f"{page.name}: {path}"
        elif re.fullmatch(r"test_\w+\.py", path):
            assert list((ROOT / "tests").rglob(path)), f"{page.name}: {path}"
        elif re.fullmatch(r"(small|gpt-0\.1b)/[\w-]+", path) and path != "small/web":
            assert (ROOT / "recipes" / f"{path}.yaml").exists(), f"{page.name}: {path}"


def named(dotted: str) -> Any:
    """Return what a dotted name stands for: a module, or an attribute of one."""
    module, _, name = dotted.rpartition(".")
    parent = importlib.import_module(module)
    return getattr(parent, name) if hasattr(parent, name) else importlib.import_module(dotted)


@pages
def test_names_of_the_package_are_there(page: Path) -> None:
    for span in spans(page):
        if found := re.match(r"fire_llm(\.\w+)+", span):
            named(found[0])


@pages
def test_python_in_blocks_imports_and_calls_what_is_there(page: Path) -> None:
    known: dict[str, Any] = {}
    for content in blocks(page, "python"):
        tree = ast.parse(content)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fire_llm"):
                known |= {a.name: named(f"{node.module}.{a.name}") for a in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
                inspect.signature(known[node.func.id]).bind_partial(
                    *node.args, **{k.arg: k.value for k in node.keywords if k.arg}
                )


def test_the_version_is_the_newest_of_the_changelog_and_that_of_the_citation() -> None:
    newest = re.search(r"^## (\d\S+) – (\S+)$", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)
    cited = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    assert newest is not None
    assert newest.groups() == (__version__, str(cited["date-released"])) and cited["version"] == __version__


# ---- papers.md

ARXIV = re.compile(r"(?<![\d.])\d{4}\.\d{5}(?![\d.])")


def test_the_index_of_papers_holds_every_paper_that_is_named_and_no_other() -> None:
    index = ROOT / "docs" / "papers.md"
    naming = [*(ROOT / "fire_llm").rglob("*.py"), *(ROOT / "recipes").rglob("*.yaml"), *(set(PAGES) - {index})]
    named_ids = {paper for path in naming for paper in ARXIV.findall(text_of(path))}
    assert {*ARXIV.findall(text_of(index))} == named_ids
    for link in re.findall(r"\[arXiv [\d.]+\]\(\S+\)", text_of(index)):
        shown, to = ARXIV.findall(link)
        assert shown == to and link.endswith(f"(https://arxiv.org/abs/{to})"), link


# ---- footguns.md, whose code runs

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


def check_line(statement: ast.stmt, told: str, scope: dict[str, Any]) -> None:
    """Run a line behind which stands what it gives, or the error or the warning that it ends with."""
    code = ast.unparse(statement)
    if raised := re.match(r"(\w+(?:Error|Warning)): (.*)", told):
        with pytest.raises((Exception, Warning)) as caught:
            exec(code, scope)
        assert type(caught.value).__name__ == raised[1], code
        assert raised[2] in str(caught.value), code
        return
    found = repr(eval(code, scope))
    assert NUMBER.sub("0", found) == NUMBER.sub("0", told), f"{code} gives {found}, the page says {told}"
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (found, told)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.02), f"{code} gives {found}, the page says {told}"


@pytest.mark.filterwarnings("error")
def test_code_behind_which_stands_what_it_gives_gives_it() -> None:
    page = ROOT / "docs" / "footguns.md"
    scope: dict[str, Any] = {"__name__": "footguns"}
    for content in blocks(page, "python"):
        lines = content.splitlines()
        for statement in ast.parse(content).body:
            if found := re.search("  # [❌✅] (.+)$", lines[(statement.end_lineno or 0) - 1]):
                check_line(statement, found[1], scope)
            else:
                exec(compile(ast.Module([statement], []), page.name, "exec"), scope)
