"""Compare the losses of the tests' tiny recipe with tests/references/losses.json, or write that file.

    python scripts/write_losses.py            # by stage, the largest relative difference
    python scripts/write_losses.py --write    # after a change of numerics that is wanted: its commit says why

`tolerance` in the file is relative, and changed by hand: tests/support/losses.py says how it was chosen.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.losses import FILE, apart, losses, wider_recipe
from support.runs import write_texts

from fire_llm import load_recipe, run_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the file anew")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        recipe = load_recipe(wider_recipe(write_texts(Path(name))))
        results = run_recipe(recipe, Path(name) / "run", progress=False)
    known = json.loads(FILE.read_text()) if FILE.exists() else {"tolerance": 1.0e-5, "stages": {}}
    found, worst = losses(results), {}
    for number, (_, _, difference) in apart(found, known["stages"]).items():
        stage = number.split(", ")[0]
        worst[stage] = max(difference, worst.get(stage, 0.0))
    for stage, difference in worst.items():
        print(f"{stage:24} {difference:.1e}")
    if args.write:
        versions = {name: results["versions"][name] for name in ("torch", "transformers", "tokenizers", "numpy")}
        written_with = {**versions, "processor": results["hardware"]["cpu"]}
        FILE.write_text(json.dumps({**known, "written_with": written_with, "stages": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
