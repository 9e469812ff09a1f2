"""A plugin of pytest that writes a line of JSON when a test begins and when it ends: `-p gpu.recording --record FILE`.

What was cut off can thus be read too, and what was running then.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LAST_LINES = 8


def pytest_addoption(parser: Any) -> None:
    """Add the option that names the file."""
    parser.addoption("--record", type=Path, metavar="FILE", help="a line of JSON for each test that begins or ends")


def pytest_configure(config: Any) -> None:
    """Record in the process that collects reports; pytest-xdist's workers send theirs to it."""
    if config.getoption("record") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config.getoption("record")))


class Recorder:
    """Write what becomes of each test."""

    def __init__(self, file: Path) -> None:
        self.file = file.open("a", encoding="utf-8", buffering=1)
        self.seconds: dict[str, float] = {}
        self.ends: dict[str, tuple[str, list[str]]] = {}

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Write that a test begins."""
        self._write(test=_name(nodeid))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Add up what a test's parts take; after the last, write how it ended."""
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
    return nodeid.split("::", 1)[-1].split("@")[0]  # pytest-xdist appends the group after an @
