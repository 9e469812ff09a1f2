"""Write docs/results.md from docs/results/: numbers from a JSON a study, words from a text beside it (`make schema`).

    python scripts/write_results_page.py                                    rewrite the page and its plots
    python scripts/write_results_page.py --add runs/horizon --name horizon  take a run in, or take it in again
    python scripts/write_results_page.py --check                            exit 1 where the page is not what it writes

docs/results/page.md is the page's head, and its order: `{study NAME}` stands for docs/results/NAME.md, filled from
docs/results/NAME.json. What a text says in braces, outside of code, is filled in:

    {command} {date} {machine} {seeds} {torch} …    what the JSON knows: its keys, or what its run recorded
    {tables}  {table web-text}                      all tables, each below its name; one of them
    {plot curves} {plot differences} {plot trade-off}    NLL against tokens; less that of base; old corpus against new
    {plot against-base}                             of a study of tables: each row less base, with its interval
    {web-text/fire}                                 4.7611 ± 0.0140: mean NLL ± standard deviation over the seeds
    {web-text/fire - base}                          +0.0175 ± 0.0029: paired by seed, ± half the 95 % interval
    {web-text/fire/perplexity} {web-text/fire/steps saved}    another column of the table
    {learned web-text/fire - base} {forgotten web-text/fire}  of a stream's phases, by the names in its tables
    {web-text/fire - base:3} {…:3 abs} {…:3 mean}   three digits; without its sign; without what follows ±
    {study#web-text/fire}                           of another study

The JSON of a study has `command` and either `results` or `tables`. `results` is a run's results.json without what no
table needs: every number is computed from the values of the seeds. `tables`, of benchmarks and of runs that are not
kept, holds printed numbers: by name, `columns` and `rows`. A column `web text: NLL` is printed without `web text: `
behind one that has it too. A cell is text, a number, which is printed with the digits it is written with, a list, null,
or one of {mean, sd}, {mean, half}, {value, unit}, {value, from, to}, {from, to}, with `"bold": true` where it is bold,
as a row is whose name is.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from results_plots import PLOTS, TABLE_PLOTS

from fire_llm.core.errors import UserError
from fire_llm.reporting.comparison import Comparison, paired_interval
from fire_llm.reporting.schema import Arm, CurveEntry, ResetEntry, Results, Run, Scores
from fire_llm.reporting.sequence import PhaseSequence, every_table
from fire_llm.reporting.table import DASH, Table, plain

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "results"
PLACEHOLDER = re.compile(r"(```.*?```|`[^`\n]*`)|\{([^{}\n]+)\}", re.DOTALL)
FORMAT = re.compile(r"(\d)( abs)?( mean)?")
STUDY = "{study NAME}"
START = """## {title}

{{date}}, {{machine}}, {{precision}}, torch {{torch}}, transformers {{transformers}}. Seeds {{seeds}}; {{stages}} \
stages, {{hours}} h of training.

{{command}}

The model has {{parameters}} parameters. NLL ± standard deviation over seeds; differences, paired by seed, ± half \
their 95 % interval.

{{tables}}

{{plot curves}}

**What a sceptic would write.** …
"""


class Figure(float):
    """A number of a JSON file, with the digits that it is written with."""

    def __new__(cls, text: str) -> Figure:
        self = super().__new__(cls, text)
        self.text = text
        return self


@dataclass(frozen=True)
class Cell:
    """A number with its spread."""

    mean: float
    spread: float | None = None
    signed: bool = False
    digits: int = 4
    unit: str = ""

    def write(self, digits: int | None = None, absolute: bool = False, alone: bool = False) -> str:
        """Return the cell as text.

        Args:
            digits: Digits after the point; by default, the cell's own.
            absolute: Without its sign.
            alone: Without its spread.
        """
        places = self.digits if digits is None else digits
        sign = "+" if self.signed and not absolute else ""
        mean = f"{abs(self.mean) if absolute else self.mean:{sign}.{places}f}".replace("-", "−")
        return mean + ("" if alone or self.spread is None else f" ± {self.spread:.{places}f}") + self.unit


def level(values: Iterable[float]) -> Cell:
    """Return the mean over seeds with their standard deviation."""
    known = [*values]
    return Cell(fmean(known), stdev(known) if len(known) > 1 else None)


def paired(values: Iterable[float]) -> Cell:
    """Return the mean of differences by seed with half the width of its interval."""
    known = [*values]
    interval = paired_interval(known)
    return Cell(fmean(known), (interval[1] - interval[0]) / 2 if interval else None, signed=True)


# ---- two kinds of studies


class OfRun:
    """A study that keeps the results of every seed; all numbers are computed from them."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.results = Results.model_validate(data["results"])
        self.of = Comparison(self.results)
        self.sequence = PhaseSequence(self.of)

    @cached_property
    def facts(self) -> dict[str, str]:
        results, hardware, measured = self.results, self.results.hardware, self.results.measurement
        recipe = results.recipe or {}
        asked = str(recipe.get("precision", ""))
        # With evaluate.precision: training, the precision of the measurements is that of training.
        as_trained = measured is not None and (recipe.get("evaluate") or {}).get("precision") == "training"
        runs = [*results.phases, *(run for arm in results.arms.values() for run in arm.runs)]
        known = {
            "date": (results.created or "")[:10],
            "machine": hardware.accelerator or f"{hardware.cores} cores of {hardware.cpu}",
            "precision": asked if asked != "auto" else (as_trained and measured.precision) or "precision auto",
            "seeds": ", ".join(map(str, sorted({run.seed for run in runs}))),
            "stages": str(len(runs)),
            "hours": f"{sum(run.seconds or 0 for run in runs) / 3600:.1f}",
            "parameters": f"{results.model.parameters:,}" if results.model else "",
            **{name: str(version).partition("+")[0] for name, version in results.versions.model_dump().items()},
        }
        return {key: value for key, value in known.items() if value}

    def tables(self) -> dict[str, str]:
        return {table.caption: self._markdown(table) for table in every_table(self.of)}

    def _markdown(self, table: Table) -> str:
        """Return a table with a heading for each warm start, and with the number of seeds if arms differ in it."""
        kept = [i for i, name in enumerate(table.columns) if any(row.cells[i] != DASH for row in table.rows)]
        seeds = ("seeds",) if self.of.partial else ()
        columns = [*table.names, *seeds, *(table.columns[i] for i in kept)]
        starts: dict[str, list[Any]] = {}
        for row in table.rows:
            starts.setdefault(row.name.partition("@")[2], []).append(row)
        rows: list[list[str]] = []
        for start, own in starts.items():
            if start:
                rows.append([f"*from {plain(start)}*", *[""] * (len(columns) - 1)])
            for row in own:
                cells = [str(self.of.seeds(row.name))] * len(seeds) + [typeset(row.cells[i]) for i in kept]
                bold = row.best or row is self._lowest(own, table.caption)
                rows.append(emboldened([plain(row.name.partition("@")[0]), *cells], bold))
        return markdown(columns, rows)

    def _lowest(self, rows: list[Any], corpus: str) -> Any:
        """Return the row with the lowest NLL among those that lack no seed."""
        known = [(nll, i) for i, r in enumerate(rows) if (nll := self.of.nll(r.name, corpus)) is not None]
        known = [(nll, i) for nll, i in known if rows[i].name not in self.of.partial]
        return rows[min(known)[1]] if known else None

    def notes(self) -> list[str]:
        """Return warnings that belong to the tables."""
        left, (same, batches) = len(self.results.unfinished), self.of.batches()
        said = [f"Unfinished: {left} stages; the tables are of the rest."] if left else []
        return [*said, *([batches] if same is False else [])]

    def cell(self, address: str) -> Cell:
        kind, _, rest = address.partition(" ")
        if kind not in ("learned", "forgotten"):
            kind, rest = "", address
        names = {self.sequence.name(phase): phase for phase in self.sequence.phases} if kind else {}
        corpora = [*names, *self.of.corpora]
        corpus = next((c for c in sorted(corpora, key=len, reverse=True) if rest.startswith(f"{c}/")), None)
        if corpus is None:
            raise UserError(f"no corpus of this study: {', '.join(dict.fromkeys(corpora))}")
        arm, _, other = rest[len(corpus) + 1 :].partition(" - ")
        arm, column = (arm, "") if arm in self.of.arms else arm.partition("/")[::2]
        for name in (arm, other or arm):
            if name not in self.of.arms:
                raise UserError(f"'{name}' is no arm of this study: {', '.join(self.of.arms)}")

        def values(of: str) -> dict[int, float]:
            if kind == "learned":
                return self.sequence.learned(of).get(names.get(corpus, ""), {})
            if kind == "forgotten" and corpus in names:
                left = self.of.by_seed(of, self.sequence.phases[names[corpus]])
                learned = self.sequence.learned(of).get(names[corpus], {})
                return {seed: left[seed] - nll for seed, nll in learned.items() if seed in left}
            return self.of.forgotten(of, corpus) if kind else self.of.by_seed(of, corpus)

        mine = values(arm)
        if other:
            theirs = values(other)
            mine = {seed: value - theirs[seed] for seed, value in mine.items() if seed in theirs}
        if not mine:
            raise UserError("no seed has it")
        if column not in ("", "NLL") and (other or kind):
            raise UserError(f"'{column}' is a column of an arm's own table: leave it out of a difference")
        if column in ("", "NLL"):
            return paired(mine.values()) if other or kind == "forgotten" else level(mine.values())
        if column == "perplexity":
            return Cell(math.exp(fmean(mine.values())), digits=2)
        if column == "steps saved" and (saved := self.of.saved(arm)[0]) is not None:
            return Cell(100 * saved, digits=0, unit=" %")
        raise UserError(f"no column '{column}': NLL, perplexity, or steps saved where the arm gets there")


class OfTables:
    """A study that keeps printed numbers."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data: dict[str, Any] = data["tables"]
        self.facts = {key: str(value) for key, value in data.items() if key not in ("tables", "command")}

    def tables(self) -> dict[str, str]:
        return {name: self._markdown(**table) for name, table in self.data.items()}

    @staticmethod
    def _markdown(columns: list[str], rows: list[list[Any]]) -> str:
        before = ["", *(name.partition(": ")[0] for name in columns)]
        heads = [n.removeprefix(f"{b}: ") for n, b in zip(columns, before, strict=False)]
        texts = [emboldened([*map(shown, row)], str(row[0]).startswith("**")) for row in rows]
        numbers = [any(not isinstance(row[i], str) for row in rows if len(row) > i) for i in range(len(columns))]
        return markdown(heads, [row + [""] * (len(columns) - len(row)) for row in texts], numbers)

    def notes(self) -> list[str]:
        return []

    def cell(self, address: str) -> Cell:
        corpus, _, rest = address.partition("/")
        row, _, other = rest.partition(" - ")
        row, _, column = row.partition("/")
        wanted = [f"{corpus}: {f'vs {other}' if other else column or 'NLL'}", *([] if other or column else [corpus])]
        found = [
            cells[table["columns"].index(name)]
            for table in self.data.values()
            for name in table["columns"]
            for cells in table["rows"]
            if slug(name) in map(slug, wanted) and slug(shown(cells[0])) == slug(row)
        ]
        if len(found) != 1:
            raise UserError(f"{len(found)} cells of row '{row}' in a column '{' or '.join(wanted)}'")
        cell = found[0] if isinstance(found[0], dict) else {"mean": found[0]}
        if not isinstance(cell.get("mean"), Figure):
            raise UserError(f"'{shown(found[0])}' is no number with a mean")
        digits = len(cell["mean"].text.partition(".")[2])
        return Cell(cell["mean"], cell.get("sd", cell.get("half")), "half" in cell, digits)


def slug(name: str) -> str:
    """Return the name of a row or column as placeholders write it, without `**` and brackets."""
    return re.sub(r"\*\*| \([^)]*\)", "", name).strip().lower().replace(" ", "-")


def shown(cell: Any) -> str:
    """Return a cell of a JSON table as the page shows it."""
    if isinstance(cell, list):
        return ", ".join(map(shown, cell))
    if isinstance(cell, dict):
        if "value" in cell:
            value, unit = cell["value"], cell.get("unit")
            text = shown(value) if unit is None or isinstance(value, Figure) else f"{value:,}"
            text += "" if unit is None else f" {unit}"
            text += f" ({shown(cell['from'])} to {shown(cell['to'])})" if "from" in cell else ""
        elif "from" in cell:
            text = f"{shown(cell['from'])}–{shown(cell['to'])}"
        else:
            sign = "+" if "half" in cell and cell["mean"] >= 0 else ""
            text = f"{sign}{shown(cell['mean'])} ± {shown(cell.get('half', cell.get('sd')))}"
        return f"**{text}**" if cell.get("bold") else text
    text = DASH if cell is None else cell.text if isinstance(cell, Figure) else str(cell)
    return text if isinstance(cell, str) else re.sub("^-", "−", text)


def typeset(cell: str) -> str:
    """Return a cell of a run's table with the page's minus and percent."""
    return re.sub(r"^-", "−", cell).replace("%", " %")


def emboldened(cells: list[str], bold: bool) -> list[str]:
    """Return a row's cells, in bold if `bold`."""
    return [f"**{c}**" if bold and c not in ("", DASH) and not c.startswith("**") else c for c in cells]


def markdown(heads: list[str], rows: list[list[str]], numbers: list[bool] | None = None) -> str:
    """Return a table; columns of numbers, by default all but the first, are aligned to the right."""
    right = numbers or [False, *[True] * (len(heads) - 1)]

    def line(cells: list[str]) -> str:
        return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)

    lines = [line(heads), "|" + "|".join("---:" if r else "---" for r in right) + "|"]
    return "\n".join(lines + [line(row) for row in rows])


# ---- the page


class Page:
    """Turn the studies of a folder into a page and its plots."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder
        self.plots: dict[str, str] = {}
        self.names = {f.stem for f in folder.glob("*.json")}

    def study(self, name: str) -> OfRun | OfTables:
        data = self.data(name)
        return OfRun(data) if "results" in data else OfTables(data)

    def data(self, name: str) -> dict[str, Any]:
        if name not in self.names:
            raise UserError(f"no study '{name}': {', '.join(sorted(self.names))}")
        text = (self.folder / f"{name}.json").read_text(encoding="utf-8")
        data: dict[str, Any] = json.loads(text)
        return data if "results" in data else json.loads(text, parse_float=Figure)

    def files(self) -> dict[Path, str]:
        """Return the content of the page and of the plots, by file."""
        order: list[str] = []

        def section(key: str) -> str:
            kind, _, name = key.partition(" ")
            if kind != "study":
                raise UserError(f"only {STUDY} is known here")
            order.append(name)
            return self.section(name)

        head = self.folder / "page.md"
        text = fill(head.read_text(encoding="utf-8"), section, head.name)
        if left := self.names - set(order):
            raise UserError(f"{head.name}: no {STUDY} for {', '.join(sorted(left))}")
        page = self.folder.parent / f"{self.folder.name}.md"
        return {page: text, **{self.folder / name: svg for name, svg in self.plots.items()}}

    def section(self, name: str) -> str:
        study, command = self.study(name), self.data(name).get("command")
        tables = study.tables()
        file = self.folder / f"{name}.md"

        def known(key: str) -> str:
            if key == "command" and command:
                return f"```\n{command}\n```"
            if key == "tables":
                named = [f"**{plain(caption)}**\n\n{text}" for caption, text in tables.items()]
                return "\n\n".join([*named, *study.notes()])
            if key.startswith("table "):
                if (wanted := key.removeprefix("table ")) not in tables:
                    raise UserError(f"no table of that name: {', '.join(tables)}")
                return tables[wanted]
            if key.startswith("plot "):
                return self._plot(name, key.removeprefix("plot "), study)
            if key in study.facts:
                return study.facts[key]
            address, _, form = key.partition(":")
            other, _, address = address.rpartition("#")
            if form and not FORMAT.fullmatch(form):
                raise UserError(f"'{form}' is no format: digits, then 'abs', then 'mean', as in ':3 abs mean'")
            digits, absolute, alone = FORMAT.fullmatch(form).groups() if form else (None, None, None)
            if "/" not in address:
                raise UserError(f"neither a cell (CORPUS/ARM) nor a key: command, tables, {', '.join(study.facts)}")
            cell = (self.study(other) if other else study).cell(address)
            return cell.write(int(digits) if digits else None, bool(absolute), bool(alone))

        return fill(file.read_text(encoding="utf-8").rstrip("\n"), known, file.name)

    def _plot(self, name: str, kind: str, study: OfRun | OfTables) -> str:
        known: dict[str, Any] = dict(PLOTS if isinstance(study, OfRun) else TABLE_PLOTS)
        if kind not in known:
            raise UserError(f"plots of a kept run are {', '.join(PLOTS)}; of tables {', '.join(TABLE_PLOTS)}")
        draw, words = known[kind]
        self.plots[f"{name}-{kind}.svg"] = draw(study.of if isinstance(study, OfRun) else study.data)
        return f"![{words}]({self.folder.name}/{name}-{kind}.svg)\n\n*{words}*"


def fill(text: str, value_of: Callable[[str], str], where: str) -> str:
    """Return a text with its placeholders filled.

    Raises:
        UserError: Naming the file and the placeholder that cannot be.
    """

    def one(found: re.Match[str]) -> str:
        if found[1]:
            return found[1]
        try:
            return value_of(found[2])
        except UserError as fault:
            raise UserError(f"{where}: {found[0]}: {fault}") from None

    return PLACEHOLDER.sub(one, text)


# ---- a study from a run


def add(run: Path, name: str, command: str | None = None, folder: Path = FOLDER) -> None:
    """Write the JSON of a run; if they do not exist, also its text and its place on the page."""
    from fire_llm.cli.report import results_of

    results = results_of(run)
    if not results.arms:
        raise UserError(f"{run}: no arm is finished; a study compares arms")
    file = folder / f"{name}.json"
    before = json.loads(file.read_text(encoding="utf-8")).get("command") if file.exists() else None
    data = {"command": command or before or usual_command(results), "results": kept(results)}
    file.write_text(lines(data) + "\n", encoding="utf-8")
    text = folder / f"{name}.md"
    if not text.exists():
        text.write_text(START.format(title=name.replace("-", " ").capitalize()), encoding="utf-8")
    page = folder / "page.md"
    entry, old = STUDY.replace("NAME", name), page.read_text(encoding="utf-8")
    if entry not in old:
        head, mark, rest = old.partition("{study ")
        page.write_text(f"{head}{entry}\n\n{mark}{rest}" if mark else f"{head.rstrip()}\n\n{entry}\n", encoding="utf-8")


def usual_command(results: Results) -> str:
    """Return the command that runs the recipe of a run."""
    recipe = next((ROOT / "recipes").rglob(f"{results.name}.yaml"), None)
    named = recipe.relative_to(ROOT / "recipes").with_suffix("") if recipe else f"{results.name}.yaml"
    data = " --set data_root=FOLDER" if (results.recipe or {}).get("data_root") else ""
    return f"fire-llm run {named}{data}"


def kept(results: Results) -> dict[str, Any]:
    """Return the part of a run's results that tables and plots need: seeds, mean curves, where each stage began."""
    runs = [*results.phases, *(run for arm in results.arms.values() for run in arm.runs)]
    starts = {(s.phase, s.arm, run.seed, s.step) for run in runs if (s := run.start)}

    def scores(found: dict[str, Scores]) -> dict[str, Scores]:
        return {c: Scores(nll=rounded(s.nll), nll_std=rounded(s.nll_std)) for c, s in found.items()}

    def entry(of: CurveEntry) -> CurveEntry:
        return CurveEntry(step=of.step, tokens=of.tokens, eval=scores(of.eval), ema=scores(of.ema))

    def run(of: Run) -> Run:
        measured = [one for one in of.curve if one.eval or one.ema]
        ends = (0, measured[-1].step if measured else 0)
        # If runs stopped early at different steps, the mean curve does not show when each reached a loss.
        all_of_it = of.planned_steps is not None
        curve = [e for e in measured if all_of_it or e.step in ends or (of.phase, of.arm, of.seed, e.step) in starts]
        return of.model_copy(
            update={
                "checkpoint": None, "weights": {}, "throughput": [], "samples": [], "loss_jump": {},
                "diagnosed_on": None, "curve": [*map(entry, curve)],
                "final": scores(of.final), "final_ema": scores(of.final_ema),
                "reset": ResetEntry(resets=of.reset.resets, training=of.reset.training) if of.reset else None,
            }
        )  # fmt: skip

    def arm(of: Arm) -> Arm:
        final = {c: s.model_copy(update={"perplexity": rounded(of.final[c].perplexity)})
                 for c, s in scores(of.final).items()}  # fmt: skip
        curve = [entry(one) for one in of.curve if one.eval]
        return of.model_copy(update={"final": final, "curve": curve, "runs": [*map(run, of.runs)]})

    cut = results.model_copy(
        update={"phases": [*map(run, results.phases)], "arms": {name: arm(one) for name, one in results.arms.items()}}
    )
    # Required fields stay, as they have no default. Paths of the machine do not belong on the page.
    data: dict[str, Any] = cut.model_dump(mode="json", exclude_defaults=True)
    return without_paths(data)


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 9)


def without_paths(data: Any) -> Any:
    """Return data in which the folder of each absolute path is replaced by FOLDER."""
    if isinstance(data, dict):
        return {key: without_paths(value) for key, value in data.items()}
    if isinstance(data, list):
        return [*map(without_paths, data)]
    return re.sub(r"^(/|~).*/", "FOLDER/", data) if isinstance(data, str) else data


def lines(data: Any, at: str = "") -> str:
    """Return JSON in which everything that fits on a line stands on one."""
    flat = json.dumps(data, ensure_ascii=False)
    if len(at) + len(flat) < 120 or not data or not isinstance(data, dict | list):
        return flat
    inner = at + " "
    if isinstance(data, list):
        return "[\n" + ",\n".join(inner + lines(value, inner) for value in data) + f"\n{at}]"
    pairs = [f"{inner}{json.dumps(key, ensure_ascii=False)}: {lines(value, inner)}" for key, value in data.items()]
    return "{\n" + ",\n".join(pairs) + f"\n{at}}}"


def main(argv: list[str] | None = None, folder: Path = FOLDER) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--add", type=Path, metavar="RUN_DIR", help="a run, finished or as far as it is")
    parser.add_argument("--name", metavar="NAME", help="what its study is called")
    parser.add_argument("--command", help="what ran it (the study's command so far, or fire-llm run and its recipe)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something would change")
    args = parser.parse_args(argv)
    if bool(args.add) != bool(args.name) or (args.command and not args.add) or (args.add and args.check):
        parser.error("--add RUN_DIR and --name NAME go together, --command goes with them, --check alone")
    if args.name and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", args.name):
        parser.error(f"--name {args.name}: small letters, digits, '-' and '.', as in a file's name")
    if args.name == "page":
        parser.error("--name page: page.md is the page's head; choose another name")
    try:
        if args.add:
            add(args.add, args.name, args.command, folder)
        files = Page(folder).files()
    except UserError as fault:
        parser.error(str(fault))
    drawn = {*folder.glob("*.svg")}
    stale = [f for f, text in files.items() if not f.exists() or f.read_text(encoding="utf-8") != text]
    stale += drawn - set(files)
    if args.check:
        print("\n".join(f"{file}: not what this script writes" for file in stale), end="\n" if stale else "")
        return int(bool(stale))
    for file in stale:
        if file in files:
            file.write_text(files[file], encoding="utf-8")
        else:
            file.unlink()
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
