"""Hooks of mkdocs: README, CONTRIBUTING, CHANGELOG (above docs/) and the notebooks are pages of the site too."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent.parent
ABOVE = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
ITEM = re.compile(r"(-|\d+\.) ")
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that stand above docs/, the licence that they link to, and the notebooks as pages."""
    for name, page in ABOVE.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    files.append(File.generated(config, "LICENSE", content=(ROOT / "LICENSE").read_text(encoding="utf-8")))
    for path in sorted((ROOT / "docs" / "tutorials").glob("*.ipynb")):
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=of_notebook(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to where their pages stand in the site."""
    above = page.file.src_uri in ABOVE.values()

    def moved(link: re.Match[str]) -> str:
        begin, to, heading, end = link.groups()
        if above:
            to = ABOVE.get(to, to.removeprefix("docs/"))
        elif to.startswith("../"):
            to = ABOVE.get(to.removeprefix("../"), to)
        to = re.sub(r"(tutorials/\w+)\.ipynb$", r"\1.md", to)
        return f"{begin}{to}{heading or ''}{end}"

    return apart(LINK.sub(moved, markdown))


def of_notebook(path: Path) -> str:
    """Return a notebook as Markdown: its texts, its code, and what it printed."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            printed = "".join("".join(output["text"]) for output in cell["outputs"])
            parts.append(f"```python\n{source}\n```")
            parts += [f"```text\n{printed}```"] if printed else []
    return "\n\n".join(parts) + "\n"


def apart(markdown: str) -> str:
    """Return Markdown with an empty line before each list, which GitHub does not need and mkdocs does."""
    lines: list[str] = []
    code = False
    for line in markdown.splitlines():
        above = lines[-1] if lines else ""
        if ITEM.match(line) and above.strip() and not code and not ITEM.match(above) and not above.startswith("  "):
            lines.append("")
        code ^= line.lstrip().startswith("```")
        lines.append(line)
    return "\n".join(lines)
