"""A plugin of pytest that writes a line of JSON when a test begins and when it ends: `-p gpu.recording --record FILE`.

So the record of a session that was cut off can be read too, and shows which tests were running. Several processes may
share the file, each with other tests: `--groups A,B` takes those marked xdist_group(A) or xdist_group(B), `--groups
!A,B` all others.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LAST_LINES = 8


def pytest_addoption(parser: Any) -> None:
    """Add the option that names the file."""
    parser.addoption("--record", type=Path, metavar="FILE", help="a line of JSON for each test that begins or ends")
    parser.addoption("--groups", default="!", metavar="[!]NAME,…", help="groups of tests to run, or not to run")


def pytest_configure(config: Any) -> None:
    """Record, where a file is named."""
    if config.getoption("record"):
        config.pluginmanager.register(Recorder(config.getoption("record")))


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep the tests of the groups that are asked for."""
    asked = config.getoption("groups")
    names = {*asked.removeprefix("!").split(",")}
    wanted = [(asked[:1] != "!") == bool(_groups(item) & names) for item in items]
    config.hook.pytest_deselected(items=[item for item, keep in zip(items, wanted, strict=True) if not keep])
    items[:] = [item for item, keep in zip(items, wanted, strict=True) if keep]


def _groups(item: Any) -> set[str]:
    return {mark.args[0] for mark in item.iter_markers("xdist_group")}


class Recorder:
    """Record how each test ends."""

    def __init__(self, file: Path) -> None:
        self.file = file.open("a", encoding="utf-8", buffering=1)
        self.seconds: dict[str, float] = {}
        self.ends: dict[str, tuple[str, list[str]]] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Write that a test begins."""
        self._write(test=_name(nodeid))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Add up the seconds of a test's parts; after the last part, write how it ended."""
        test = report.nodeid
        self.seconds[test] = self.seconds.get(test, 0.0) + report.duration
        if report.failed:
            said = str(report.longrepr).strip().splitlines()
            word = "failed" if report.when == "call" else "errors"
            self.ends.setdefault(test, (word, [line[:300] for line in said[-LAST_LINES:]]))
        elif report.skipped:
            self.ends.setdefault(test, ("skipped", []))
        if report.when == "teardown":
            word, said = self.ends.get(test, ("passed", []))
            self._write(test=_name(test), ended=word, seconds=round(self.seconds[test], 2), said=said)

    def _write(self, **line: Any) -> None:
        self.file.write(json.dumps(line) + "\n")


def _name(nodeid: str) -> str:
    return nodeid.split("::", 1)[-1]
