"""Check that the lowest version of every dependency that pyproject.toml allows is the one that is installed.

    python scripts/check_floors.py [NAME...]    # names that may be newer, such as torch

A floor that another dependency keeps a resolver from reaching is never tested: it is no promise.
"""

from __future__ import annotations

import sys
from importlib.metadata import requires, version

from packaging.requirements import Requirement
from packaging.version import Version

EXTRAS = ("", "tasks", "metric", "trackers", "test")


def main(newer: list[str]) -> int:
    """Name each dependency whose installed version is not its floor; return how many there are."""
    wrong = 0
    for requirement in map(Requirement, requires("fire-llm") or []):
        marker, floors = requirement.marker, [s.version for s in requirement.specifier if s.operator == ">="]
        asked = marker is None or any(marker.evaluate({"extra": extra}) for extra in EXTRAS)
        if not asked or not floors or requirement.name in newer:
            continue
        found = version(requirement.name)
        if Version(found) != Version(floors[0]):
            wrong += 1
            print(f"{requirement.name}: pyproject.toml allows {floors[0]}, the lowest that can be installed is {found}")
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
