"""Measure on one GPU, in minutes, what a CPU cannot show: tests, Newton-Schulz, training, perplexity, arms of a recipe.

    python scripts/gpu_report.py --data FOLDER --output DIR [--seconds 540] [--stages tests training …]
    python scripts/gpu_report.py --output DIR [DIR …] --write-docs docs/gpu-results.md
    python scripts/gpu_report.py --size tiny --device cpu --data FOLDER --output DIR    (a dry run)

Each stage has a limit in seconds and a JSON of its own in DIR, which is rewritten after every measurement. A failure or
a timeout is recorded there, and the next stage begins. Later stages are shortened or left out to fit into --seconds.
FOLDER holds wikitext2-tok/, webtext/ and gpt2-tokenizer/. One process measures all stages but the tests, so that they
share compiled code. If it ends too early, another process begins with the next stage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {
    # stage: (most seconds, seconds below which it is not begun)
    "environment": (60, 3),  # includes loading the libraries, unless the tests ran meanwhile
    "tests": (110, 15),
    "newton-schulz": (45, 10),
    "training": (200, 45),
    "perplexity": (60, 10),
    "evidence": (600, 60),
}
CHOICES = [stage for stage in LIMITS if stage != "environment"]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
LIBRARIES = ("torch", "triton", "transformers", "accelerate", "numpy", "pydantic", "datasets", "tokenizers")
TESTS = ["tests/accelerators/test_gpu.py", "-m", "gpu", "-o", "addopts=", "-W", "default", "-p", "no:cacheprovider"]
TESTS += ["-q", "--tb=short", "--show-capture=no", "-p", "gpu.recording"]
GROUPS = ("compiled in fp32", "compiled in bf16", "cuSOLVER")
"""Groups of tests that share a slow start; each group runs in a process of its own, and so do all other tests."""
GRACE = 12
"""Seconds after a stage's limit before its process is killed."""
LAST_LINES = 8


class OutOfTime(BaseException):
    """Ends a stage at its limit; a stage's own `except Exception` does not catch it."""


class Stage:
    """Collect the measurements of a stage, and write them into the stage's file."""

    def __init__(self, name: str, args: argparse.Namespace, seconds: float) -> None:
        self.name, self.args, self.limit = name, args, seconds
        self.began = time.monotonic()
        self.lines: list[str] = []
        self.found: dict[str, Any] = {
            "stage": name,
            "status": "not finished",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "limit_seconds": round(seconds, 1),
            "size": args.size,
            "failures": {},
        }
        earlier = args.output / f"{name}.json"
        if earlier.exists():  # the description of the machine, which needs no torch, was written before
            self.found |= {k: v for k, v in json.loads(earlier.read_text(encoding="utf-8")).items() if k == "machine"}

    def left(self) -> float:
        """Return the seconds until the limit."""
        return self.limit - (time.monotonic() - self.began)

    def note(self, **measured: Any) -> None:
        """Add measurements, and write the file."""
        self.found |= measured
        self.found["seconds"] = round(time.monotonic() - self.began, 2)
        write(self.args.output / f"{self.name}.json", self.found)

    def file(self, name: str, data: Any) -> None:
        """Write another JSON file beside the stage's own."""
        write(self.args.output / name, data)

    def say(self, line: str) -> None:
        """Add a line to the stage's table."""
        self.lines.append(line)

    def attempt(self, what: str, measure: Callable[[], Any]) -> Any:
        """Return what `measure` returns; if it fails, record why and return None."""
        try:
            return measure()
        except Exception:
            self.found["failures"][what] = tail()
            self.note()
            return None

    def run(self, measure: Callable[[Stage], None]) -> None:
        """Run a stage until it ends, fails or reaches its limit; the file says which."""
        self.note()
        status, previous = "done", signal.signal(signal.SIGALRM, _out_of_time)
        signal.setitimer(signal.ITIMER_REAL, max(0.1, self.limit))
        try:
            measure(self)
        except OutOfTime:
            status = "out of time"
        except Exception:
            status, self.found["failures"][self.name] = "failed", tail()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        self.note(status=status)


def _out_of_time(*_: Any) -> None:
    raise OutOfTime


def tail() -> list[str]:
    """Return the last lines of the current exception's traceback."""
    return [line[:300] for line in traceback.format_exc().strip().splitlines()[-LAST_LINES:]]


def write(path: Path, data: Any) -> None:
    """Write JSON in one rename, so that a reader never sees half of it."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(data, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(partial, path)


# ---- the process that measures


def work(args: argparse.Namespace) -> None:
    """Measure the stages that lines of standard input name, and answer each with a line when it ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # the output of libraries goes to the log
    sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
    from gpu.evidence import evidence, prepare
    from gpu.kernels import clean, environment, orthogonalisers
    from gpu.perplexity import evaluation
    from gpu.training import training

    stages: dict[str, Callable[[Stage], None]] = {
        "environment": environment,
        "newton-schulz": orthogonalisers,
        "training": training,
        "perplexity": evaluation,
        "evidence": evidence,
    }
    answers.write(json.dumps({"ready": True}) + "\n")
    prepared = threading.Thread(target=prepare, args=[args], daemon=True)
    prepared.start()  # tokenises while the tests run
    for line in sys.stdin:
        asked, began = json.loads(line), time.monotonic()
        prepared.join(asked["seconds"] / 2)
        stage = Stage(asked["stage"], args, asked["seconds"] - (time.monotonic() - began))
        stage.run(stages[stage.name])
        sound = clean(args)
        answers.write(json.dumps({"lines": stage.lines, "status": stage.found["status"], "sound": sound}) + "\n")
        if not sound:
            os._exit(1)  # a CUDA error stays with its process


class Worker:
    """Start the process that measures, and start it again if it ended."""

    def __init__(self, args: argparse.Namespace, options: list[str]) -> None:
        self.args, self.options = args, options
        self.process: subprocess.Popen[str] | None = None
        self.ready = False
        self.answers: queue.Queue[str | None] = queue.Queue()

    def start(self) -> None:
        """Start the process; it loads its libraries at once."""
        with (self.args.output / "log.txt").open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, *self.options, "--worker"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self.answers, self.ready = queue.Queue(), False
        self.reader = threading.Thread(target=self._read, args=[self.process, self.answers], daemon=True)
        self.reader.start()

    @staticmethod
    def _read(process: subprocess.Popen[str], answers: queue.Queue[str | None]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answers.put(line)
        answers.put(None)

    def stop(self) -> None:
        """End the process and all processes that it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.reader.join()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):  # the process may have ended before it read everything
                    pipe and pipe.close()
            self.process = None

    def measure(self, name: str, seconds: float, end: float) -> dict[str, Any]:
        """Let the process measure a stage, and return its answer: table and status.

        Args:
            name: The stage.
            seconds: Its limit.
            end: When everything has to end, by time.monotonic; the process is killed then.
        """
        if self.process is None:
            self.start()
        assert self.process is not None and self.process.stdin is not None
        limit = time.monotonic() + seconds
        until = min(end, limit + GRACE)
        asked = False
        while True:
            if self.ready and not asked:
                left = max(1.0, limit - time.monotonic())  # loading the libraries took a part of it
                self.process.stdin.write(json.dumps({"stage": name, "seconds": left}) + "\n")
                self.process.stdin.flush()
                asked = True
            try:
                answer, why = self.answers.get(timeout=max(0.1, until - time.monotonic())), "its process ended"
            except queue.Empty:
                answer, why = None, "out of time, and its process did not answer"
            if answer is None:
                self.stop()
                return self._ended(name, why)
            message: dict[str, Any] = json.loads(answer)
            if "ready" in message:
                self.ready = True
                continue
            if not message["sound"]:
                self.stop()
            return message

    def _ended(self, name: str, why: str) -> dict[str, Any]:
        file, log = self.args.output / f"{name}.json", self.args.output / "log.txt"
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"stage": name, "failures": {}}
        last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        found.setdefault("failures", {})[why] = [line[:300] for line in last]
        write(file, found | {"status": why})
        return {"lines": [], "status": why}


# ---- the tests


def run_tests(stage: Stage) -> None:
    """Run the GPU tests in processes of their own, and count how they ended."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        record, output = Path(folder) / "record.jsonl", Path(folder) / "said.txt"
        command = [sys.executable, "-m", "pytest", *TESTS, f"--record={record}"]
        chosen = [["--groups", name] for name in (*GROUPS, "!" + ",".join(GROUPS))]
        if stage.args.size == "tiny":
            chosen = [["-k", "singular_values"]]
        environment = dict(os.environ)
        environment["PYTHONPATH"] += f"{os.pathsep}{ROOT / 'scripts'}"
        if stage.args.device == "cpu":
            environment["FIRE_LLM_GPU_TESTS"] = "cpu"
        stage.note(command=" ".join(["python", *command[1:]]).replace(folder, "TMP"), parts=chosen)
        code: int | None = 0
        processes: list[subprocess.Popen[bytes]] = []
        try:
            with output.open("a", encoding="utf-8") as file:
                for n, part in enumerate(chosen):
                    started = subprocess.Popen(
                        [*command, f"--basetemp={folder}/{n}", *part], cwd=ROOT, env=environment, stdout=file,
                        stderr=subprocess.STDOUT, start_new_session=True,
                    )  # fmt: skip
                    processes.append(started)
            codes = [process.wait(max(1.0, stage.left() - 2)) for process in processes]
            code = next((code for code in codes if code not in (0, 1)), max(codes))  # a crash is a negative one
        except BaseException:
            code = None
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        found = read_record(record.read_text(encoding="utf-8").splitlines() if record.exists() else [])
        last = [line[:300] for line in output.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]]
        stage.note(exit_code=code, **found, last_lines=last)
    counted = ", ".join(f"{count} {word}" for word, count in found["counts"].items())
    stage.say(counted or "no test was collected")
    stage.say("slowest: " + "; ".join(f"{name} {took:.1f} s" for name, took in [*found["slowest_seconds"].items()][:5]))
    for name in found["failed"]:
        stage.say(f"  failed: {name}")
    for name in found["running"]:
        stage.say(f"  cut off: {name}")
    if code is None:
        raise OutOfTime
    if code not in (0, 1):
        raise RuntimeError(f"pytest ended with exit code {code}: {' | '.join(last)}")


def read_record(lines: list[str]) -> dict[str, Any]:
    """Read the record of gpu/recording.py, which may be cut off.

    Returns:
        counts: tests by how they ended; failed: the last lines of each failure; running: tests that did not end;
        slowest_seconds: the slowest 15, with their fixtures; seconds_of_all.
    """
    began: list[str] = []
    ended: dict[str, dict[str, Any]] = {}
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # the last may be cut off
            event = json.loads(line)
            if "ended" in event:
                ended[event["test"]] = event
            else:
                began.append(event["test"])
    words = [event["ended"] for event in ended.values()]
    slowest = sorted(ended.values(), key=lambda event: -event["seconds"])[:15]
    return {
        "counts": {word: words.count(word) for word in dict.fromkeys(words)},
        "failed": {name: event["said"] for name, event in ended.items() if event["ended"] in ("failed", "errors")},
        "running": [name for name in began if name not in ended],
        "slowest_seconds": {event["test"]: event["seconds"] for event in slowest},
        "seconds_of_all": round(sum(event["seconds"] for event in ended.values()), 2),
    }


# ---- the command


def prepare_environment(args: argparse.Namespace) -> None:
    """Set the environment of this process's children."""
    fast = Path("/dev/shm")
    cache = args.cache or (fast / "cache" if fast.is_dir() else Path(tempfile.gettempdir()) / "cache")
    os.environ |= ENVIRONMENT | {
        "FIRE_LLM_CACHE": str(cache / "tokens"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def describe_machine() -> dict[str, Any]:
    """Return what is known of the machine without loading torch."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    fields = (
        "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,mig.mode.current"
    )
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
        values = [value.strip() for value in done.stdout.strip().splitlines()[0].split(",")]
        smi: Any = dict(zip(fields.split(","), values, strict=False))
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        smi = f"nvidia-smi: {error}"
    return {"versions": versions, "nvidia_smi": smi, "cores": os.cpu_count(), "processor": platform.processor()}


def measure(args: argparse.Namespace, options: list[str]) -> int:
    """Measure all stages that fit, print their tables, and return 0 if all are done."""
    end = time.monotonic() + args.seconds
    args.output.mkdir(parents=True, exist_ok=True)
    prepare_environment(args)
    placed = ["--output", str(args.output), "--data", str(args.data)]
    worker, statuses = Worker(args, [*options, *placed]), {}
    stages = ["environment", *(stage for stage in CHOICES if stage in args.stages)]
    if "tests" in stages:
        stages = ["tests", *(stage for stage in stages if stage != "tests")]  # loading the libraries takes as long
    worker.start()
    file = args.output / "environment.json"
    commands = json.loads(file.read_text(encoding="utf-8"))["machine"].get("commands", []) if file.exists() else []
    commands.append("python scripts/gpu_report.py " + " ".join(options))
    machine = {"commands": commands, **describe_machine()}
    write(args.output / "environment.json", {"stage": "environment", "status": "not finished", "machine": machine})
    try:
        for name in stages:
            most_seconds, least_seconds = LIMITS[name]
            most_seconds = args.limits.get(name, most_seconds)
            seconds = min(most_seconds, end - time.monotonic() - 3)
            began = time.monotonic()
            if seconds < least_seconds and args.size == "full":
                write(args.output / f"{name}.json", {"stage": name, "status": "left out: no time was left"})
                answer: dict[str, Any] = {"lines": [], "status": "left out: no time was left"}
            elif name == "tests":
                stage = Stage(name, args, seconds)
                stage.run(run_tests)
                answer = {"lines": stage.lines, "status": stage.found["status"]}
            else:
                answer = worker.measure(name, seconds, end)
            statuses[name] = answer["status"]
            print(f"== {name}: {answer['status']}, {time.monotonic() - began:.1f} s", flush=True)
            for line in answer["lines"]:
                print(f"   {line}", flush=True)
    finally:
        worker.stop()
    return int(any(status != "done" for status in statuses.values()))


def limit(text: str) -> tuple[str, float]:
    """Read a stage's limit: training=115."""
    stage, _, seconds = text.partition("=")
    if stage not in LIMITS:
        raise argparse.ArgumentTypeError(f"'{text}': there is no stage '{stage}'; there are {', '.join(LIMITS)}")
    return stage, float(seconds)


def main(argv: list[str] | None = None) -> int:
    """Read the options and do what they ask for."""
    options = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, nargs="+", required=True, metavar="DIR", help="where the JSONs go; several for a page"
    )
    parser.add_argument("--seconds", type=float, default=540, help="for everything (540)")
    parser.add_argument("--stages", nargs="+", choices=CHOICES, default=CHOICES, help="all by default")
    parser.add_argument("--limits", nargs="+", type=limit, default=[], metavar="STAGE=SECONDS", help="other limits")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: a dry run of small models")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", default=ROOT.parent / "shared" / "data", help="default: ../shared/data"
    )
    parser.add_argument("--cache", type=Path, metavar="DIR", help="of tokens and compiled code (/dev/shm/cache)")
    parser.add_argument("--seed", type=int, default=1, help="of the evidence (1)")
    parser.add_argument("--write-docs", type=Path, metavar="FILE", help="write a page on what DIR holds, and end")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(options)
    args.limits = dict(args.limits)
    if args.write_docs:
        from gpu.page import page

        args.write_docs.write_text(page(args.output), encoding="utf-8")
        return 0
    if len(args.output) > 1:
        parser.error("--output: several folders make a page, with --write-docs FILE; measurements go to one")
    args.output, args.data = args.output[0].resolve(), args.data.resolve()
    if args.worker:
        work(args)
        return 0
    return measure(args, options)


if __name__ == "__main__":
    sys.exit(main())
