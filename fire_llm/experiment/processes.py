"""Start workers in processes of their own, watch them, and end them."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fire_llm.core.atomic import write_json, writing
from fire_llm.core.signals import Stopped
from fire_llm.experiment.jobs import Failures
from fire_llm.experiment.progress import Overview
from fire_llm.experiment.recipe import Trial
from fire_llm.experiment.resources import environment
from fire_llm.experiment.worker import POLL_SECONDS, QUIET

_PACKAGES = str(Path(__file__).parents[2])
"""The folder that holds fire_llm; a worker may not find it by itself."""

_PROGRAM = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from fire_llm.experiment.worker import main; raise SystemExit(main(*sys.argv[1:]))"
)


class Workers:
    """Start, watch and end the processes that train the stages of one command.

    Args:
        number: How many processes.
        trials: The trials whose stages they train.
        arms: Train only these arms; all if empty.
        output: The command's folder.
        failures: Where workers write what failed.
        options: Options of `worker.work`; and `progress`, whether lines of the workers are shown.
        known: By trial, the hashes of what its stages read (`RunContext.known`), so that workers hash nothing again.
    """

    def __init__(
        self,
        number: int,
        trials: Sequence[Trial],
        arms: Sequence[str],
        output: Path,
        failures: Failures,
        options: Mapping[str, Any],
        known: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.trials, self.output, self.failures, self.options = trials, output, failures, options
        self.instructions = {
            "output": str(output),
            "failures": str(failures.folder),
            "arms": list(arms),
            "trials": [{**vars(trial), "recipe": trial.recipe.model_dump(mode="json")} for trial in trials],
            "options": dict(options),
            "known": dict(known),
        }
        self.logs = [output / ".workers" / f"{socket.gethostname()}-{n + 1}.log" for n in range(number)]
        self.processes: list[subprocess.Popen[bytes]] = []
        self._read: list[int] = []
        """By worker, how many bytes of its log were shown."""

    def train(self, overview: Overview) -> list[str]:
        """Start all workers, wait until they have ended, and return why those ended that failed or were killed.

        Args:
            overview: Shown meanwhile.

        Raises:
            Stopped: A signal came. It was passed on, and every worker has ended.
        """
        todo = self.failures.folder.with_suffix(".todo")
        try:
            self.failures.folder.mkdir(parents=True, exist_ok=True)
            write_json(todo, self.instructions)
            for n, log in enumerate(self.logs):
                self._start(n, log, todo)
            while any(process.poll() is None for process in self.processes):
                self._show(overview)
                if self.options["alone"] and self.failures.any():
                    self._end(signal.SIGTERM)
                    return []
                time.sleep(POLL_SECONDS)
            self._show(overview)
        except KeyboardInterrupt as stopped:
            number = stopped.number if isinstance(stopped, Stopped) else int(signal.SIGINT)
            self._end(number)
            raise Stopped(number, "the workers saved the steps they were in; the same command goes on") from None
        finally:
            for process in self.processes:
                assert process.stdin is not None
                process.stdin.close()  # this ends a worker that still runs
            todo.unlink(missing_ok=True)
        return [_verdict(p.returncode, n, self.logs[n]) for n, p in enumerate(self.processes) if p.returncode]

    def _start(self, n: int, log: Path, instructions: Path) -> None:
        command = [sys.executable, "-c", _PROGRAM, _PACKAGES, str(instructions), str(n), str(log)]
        with writing(self.output), log.open("a", encoding="utf-8") as file:
            self._read.append(file.tell())
            inherited = environment(n, len(self.logs), self.trials)
            self.processes.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=inherited)
            )

    def _end(self, number: int) -> None:
        """Send a signal to all workers and wait until they have ended."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)
        for process in self.processes:
            process.wait()

    def _show(self, overview: Overview) -> None:
        """Show the new lines of the workers' logs, and how far all stages are."""
        for n, log in enumerate(self.logs) if self.options["progress"] else ():
            with log.open("rb") as file:
                file.seek(self._read[n])
                complete, _, _ = file.read().rpartition(b"\n")
            if complete:
                self._read[n] += len(complete) + 1
                for line in complete.decode(errors="replace").split("\n"):
                    if not line.startswith(QUIET):
                        overview.say(line)
        overview.refresh()


def _verdict(code: int, n: int, log: Path) -> str:
    """Return in words how a worker ended."""
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    hint = ", most often because the machine ran out of memory" if code == -signal.SIGKILL else ""
    return f"worker {n + 1} {how}{hint}; see '{log}'"
