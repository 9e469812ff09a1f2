"""The tutorials run, and print what they show; the site has a page for each page of docs/."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

import fire_llm

ROOT = Path(__file__).parent.parent
SCRIPT = "write_notebooks"
NOTEBOOKS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))


@pytest.fixture
def notebooks(script):
    """Return the script that runs notebooks; transformers has said by then that W&B is offline."""
    import transformers.integrations.integration_utils  # noqa: F401

    return script


@pytest.mark.filterwarnings("default")  # a reader's notebook goes on after a warning
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_tutorial_runs_and_prints_what_it_shows(path: Path, notebooks) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for found, shown in zip(notebooks.run(notebook, path.name), notebooks.stored(notebook), strict=True):
        assert notebooks.alike(found, shown), f"shown:\n{shown}\nfound:\n{found}"


def test_every_page_stands_in_the_navigation_of_the_site() -> None:
    text = re.sub(r"!!python\S+( \{.*?\}\})?", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    pages: set[str] = set()

    def gather(entry: object) -> None:
        if isinstance(entry, str):
            pages.add(entry)
        for part in entry if isinstance(entry, list) else entry.values() if isinstance(entry, dict) else ():
            gather(part)

    gather(yaml.safe_load(text)["nav"])
    above = {"readme.md", "contributing.md", "changelog.md"}
    tutorials = {f"tutorials/{path.stem}.md" for path in NOTEBOOKS}
    assert pages == {path.name for path in (ROOT / "docs").glob("*.md")} | tutorials | above


def test_the_reference_holds_every_public_name() -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    told = re.findall(r"^::: (fire_llm\.\S+)$", page, re.MULTILINE)
    assert {*fire_llm.__all__} <= {name.rpartition(".")[2] for name in told}
    for name in told:
        module, _, attribute = name.rpartition(".")
        assert hasattr(__import__(module, fromlist=[attribute]), attribute), name
