"""Run transformers' own trainer tests against `ContinualTrainer`, from a checkout of theirs that stays as it is.

    git clone --depth 1 --branch v5.23.0 https://github.com/huggingface/transformers THEIRS
    python scripts/trainer_tests.py --tests THEIRS --trainer control --output RESULTS
    python scripts/trainer_tests.py --tests THEIRS --output RESULTS
    python scripts/trainer_tests.py --tests THEIRS --output RESULTS --translate

`transformers.Trainer` is `ContinualTrainer` while their modules are imported; `control` leaves it as it is and shows
what can pass here at all. With `--translate`, their toy models are causal LMs. Arguments behind `--` go to pytest, and
results of several runs are added up: `-- -k resume`.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FILES = ["test_trainer", "test_trainer_callback", "test_trainer_jit_checkpoint", "test_trainer_seq2seq",
         "test_trainer_utils", "test_training_args"]  # fmt: skip
MODES = ("control", "continual", "translated")
LINES = {
    "test_dynamic_shapes", "test_evaluate", "test_evaluate_with_batch_eval_metrics", "test_predict",
    "test_evaluation_iterable_dataset", "test_predict_iterable_dataset", "test_predict_with_batch_eval_metrics",
    "test_trainer_with_datasets",
}  # fmt: skip
"""Tests that assert the numbers of their line, or give its columns: they are run as they are."""
ROW = re.compile(r"^\| `(\w+)` \| (.+) \|$", re.MULTILINE)


class Results:
    """A plugin of pytest that keeps each test's outcome: passed, skipped, or the last line of its error.

    Args:
        translate: Whether their toy models are causal LMs, but in the tests of `LINES`.
    """

    def __init__(self, translate: bool) -> None:
        self.outcomes: dict[str, str] = {}
        self.translate = translate
        self.toys: dict[str, Any] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: Any) -> None:
        theirs = sys.modules.get("tests.trainer.test_trainer")
        if not self.translate or theirs is None:
            return
        if not self.toys:
            from toy_lms import toys

            made = toys(theirs)
            self.toys = {name: (getattr(theirs, name), toy) for name, toy in made.items()}
        for module in (theirs, item.module):
            for name in self.toys.keys() & vars(module).keys():
                setattr(module, name, self.toys[name][item.originalname not in LINES])

    def pytest_runtest_logreport(self, report: Any) -> None:
        name = report.nodeid.split("::", 1)[1]
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message if crash else str(report.longrepr)
            self.outcomes[name] = " ".join(said.split())[:300]
        elif report.skipped or report.when == "call":
            self.outcomes.setdefault(name, report.outcome)


def stand_in(file: Path) -> None:
    """Set what a module of another version imports and the installed transformers lacks: who uses it fails."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            module = importlib.import_module(node.module or "")
            for name in node.names:
                if not hasattr(module, name.name):
                    setattr(module, name.name, None)


def run(tests: Path, mode: str, more: list[str]) -> dict[str, str]:
    """Run their tests in this process, with one trainer in the place of `Trainer`, and return what became of each."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HOME": tempfile.mkdtemp(prefix="trainer-tests-")}
    import transformers
    import transformers.testing_utils

    if mode != "control":
        from fire_llm import ContinualTrainer

        transformers.Trainer = ContinualTrainer
    # It is asked for by whole classes whose tests do not use it.
    transformers.testing_utils.require_sentencepiece = lambda test: test
    results = Results(mode == "translated")
    files = [tests / "tests" / "trainer" / f"{name}.py" for name in FILES]
    for file in files:
        stand_in(file)
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "--no-header", f"--rootdir={tests}", "-o", "addopts="]
    pytest.main([*map(str, files), *options, *more], plugins=[results])
    return results.outcomes


def table(found: dict[str, dict[str, str]], rows: dict[str, str]) -> str:
    """Return the counts of each mode, and each test that `control` passes and another does not, with the reason."""
    ran = {test for test, outcome in found["control"].items() if outcome != "skipped"}
    passed = {mode: {t for t in ran if outcomes.get(t) == "passed"} for mode, outcomes in found.items()}
    lines = ["| trainer | passed | of |", "|---|---|---|"]
    lines += [f"| {mode} | {len(passed[mode])} | {len(ran)} |" for mode in found]
    for mode in [m for m in found if m != "control"]:
        lines += ["", f"| not passed, {mode} | reason |", "|---|---|"]
        for test in sorted(passed["control"] - passed[mode]):
            said = found[mode].get(test, "not run")
            lines.append(f"| {test} | {rows.get(test.split('::')[-1], 'NOT EXPLAINED: ' + said)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, required=True, help="a checkout of transformers")
    parser.add_argument("--trainer", choices=["continual", "control"], default="continual")
    parser.add_argument("--translate", action="store_true", help="make their toy models causal LMs")
    parser.add_argument("--output", type=Path, required=True, help="a folder: a file of results for each mode")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, behind --")
    args = parser.parse_args()
    mode = "control" if args.trainer == "control" else "translated" if args.translate else "continual"
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    args.output.mkdir(parents=True, exist_ok=True)
    files = {mode: args.output / f"{mode}.json" for mode in MODES}
    before = json.loads(files[mode].read_text()) if files[mode].exists() else {}
    files[mode].write_text(json.dumps(before | run(args.tests.resolve(), mode, args.pytest), indent=1))
    found = {mode: json.loads(file.read_text()) for mode, file in files.items() if file.exists()}
    if "control" in found:
        page = (ROOT / "docs" / "trainer.md").read_text(encoding="utf-8")
        print(table(found, dict(ROW.findall(page))))


if __name__ == "__main__":
    main()
