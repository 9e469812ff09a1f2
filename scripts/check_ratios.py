"""Run the benchmarks whose ratios are tracked in scripts/ratios.json, and compare each ratio with its threshold.

    python scripts/check_ratios.py [--only plan data]    # ends with 1 where a ratio is below its threshold or missing
    python scripts/check_ratios.py --write               # and takes the figures in

The file has an entry a command: processor and versions of its last figures, and for each tracked ratio the last figure
and the threshold, which is changed by hand. More is better in every ratio. A benchmark writes its ratios as
{"ratios": {NAME: FIGURE}} into the file that `--json` names; what is not in scripts/ratios.json is not tracked. Each
process has one thread, unless OMP_NUM_THREADS says otherwise: threads that wait for each other measure what else the
machine does.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path


def measure(command: str, folder: Path) -> dict[str, float]:
    """Run a benchmark of a folder, which prints to standard error; return its ratios, none where it failed."""
    script, *options = shlex.split(command)
    with tempfile.TemporaryDirectory() as name:
        figures = Path(name) / "figures.json"
        words = [sys.executable, str(folder / script), *options, "--json", str(figures)]
        done = subprocess.run(words, stdout=2, env={"OMP_NUM_THREADS": "1", **os.environ})
        if done.returncode:
            print(f"{command} ended with {done.returncode}")
            return {}
        return json.loads(figures.read_text())["ratios"]


def taken_with() -> dict[str, str]:
    """Return what figures that are taken now depend on."""
    from fire_llm.experiment.collect import hardware, versions

    machine, used = hardware(), versions()
    return {
        "processor": f"{machine.cpu}, {machine.cores} cores",
        "versions": f"torch {used.torch}, transformers {used.transformers}",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="commands that have one of these words in them")
    parser.add_argument("--write", action="store_true", help="take the figures in, not the thresholds")
    parser.add_argument("--file", type=Path, default=Path(__file__).with_name("ratios.json"), help="what is tracked")
    args = parser.parse_args()
    tracked = json.loads(args.file.read_text())
    chosen = [command for command in tracked if not args.only or any(word in command for word in args.only)]
    if not chosen:
        parser.error(f"--only {' '.join(args.only)}: in no command of {args.file}: {'; '.join(tracked)}")
    missed = 0
    for command in chosen:
        ratios = measure(command, args.file.parent)
        print(f"{command}\n{'':4}{'was':>10}{'is':>10}{'least':>10}")
        for name, row in tracked[command]["ratios"].items():
            now = ratios.get(name, math.nan)
            reached = now >= row["threshold"]
            missed += not reached
            print(
                f"{'' if reached else '!!':4}{row['last']:10.3g}{now:10.3g}{row['threshold']:10.3g}  {name}", flush=True
            )
            if args.write and name in ratios:
                row["last"] = float(f"{now:.3g}")
        if args.write and ratios:
            tracked[command] |= taken_with()
    if args.write:
        args.file.write_text(json.dumps(tracked, indent=1) + "\n")
    print(f"{missed} below their thresholds or missing" if missed else "all reach their thresholds")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
