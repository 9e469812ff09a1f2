"""SIGINT and SIGTERM: at a step's end with a checkpoint, elsewhere at once, at the second one at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from contextlib import suppress

import psutil
import pytest
from support.killing import outcome
from support.tiny_recipe import recipe

from fire_llm import load_recipe, run_recipe
from fire_llm.cli import main
from fire_llm.core.atomic import checkpoints
from fire_llm.core.signals import SAME_SECONDS, Stopped, asked, handled, set_step_near, signals_handled
from fire_llm.training import ContinualTrainer

WAITING = r"""
import os, sys, time
from fire_llm.core.signals import asked, signals_handled, set_step_near
with signals_handled():
    set_step_near(True)
    if "fork" in sys.argv and os.fork() == 0:
        os.write(1, f"{os.getpid()}\n".encode())
        time.sleep(60)
        os._exit(0)
    os.write(1, b"ready\n")
    for _ in range(600):
        time.sleep(0.1)
"""


@pytest.fixture
def waiting():
    """Start processes that are near a step's end and never reach it."""
    started = []

    def start(*arguments: str, **environment: str) -> subprocess.Popen:
        command = [sys.executable, "-c", WAITING, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env={**os.environ, **environment}, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once_and_an_echo_of_the_first_does_not(number, code, waiting):
    process = waiting()
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    time.sleep(0.3)
    process.send_signal(number)  # the same one, passed on by a launcher
    time.sleep(SAME_SECONDS)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM if number == signal.SIGINT else signal.SIGINT)
    assert process.wait(5) in (130, 143) and process.returncode != code
    said = process.stderr.read()
    assert f"{number.name}: the step is completed and saved first; a second one ends at once" in said
    assert said.count("second one") == 1 and "ended at once, without saving" in said


def test_other_ranks_leave_the_word_to_the_first(waiting):
    process = waiting(RANK="1")
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    time.sleep(SAME_SECONDS + 0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 143 and "completed" not in process.stderr.read()


def test_a_forked_child_dies_of_the_signal(waiting):
    process = waiting("fork")
    lines = {process.stdout.readline().strip(), process.stdout.readline().strip()}
    child = int((lines - {"ready"}).pop())
    os.kill(child, signal.SIGTERM)
    deadline = time.monotonic() + 5
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.poll() is None


def test_handlers_are_put_back_and_what_is_ignored_stays_ignored():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    ignored = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with signals_handled():
            os.kill(os.getpid(), signal.SIGTERM)
            assert handled() and not asked()
            with pytest.raises(Stopped) as stopped:
                os.kill(os.getpid(), signal.SIGINT)
            assert stopped.value.code == 130 and asked() == signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, ignored)
    assert {n: signal.getsignal(n) for n in before} == before and not handled() and not asked()


def test_a_rank_takes_signals_only_near_a_step(monkeypatch):
    """Elsewhere it may be waiting in a call that no handler interrupts."""
    monkeypatch.setenv("RANK", "0")
    before = signal.getsignal(signal.SIGTERM)
    with signals_handled():
        assert signal.getsignal(signal.SIGTERM) == before
        set_step_near(True)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked() == signal.SIGTERM
        set_step_near(False)
        assert signal.getsignal(signal.SIGTERM) == before


def signal_before(monkeypatch, name: str, call: int) -> None:
    """Send this process SIGTERM just before a method of the trainer is called for the n-th time."""
    wrapped, calls = getattr(ContinualTrainer, name), []

    def counted(trainer, *args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return wrapped(trainer, *args, **kwargs)

    monkeypatch.setattr(ContinualTrainer, name, counted)


@pytest.mark.parametrize(
    ("name", "call", "said", "saved"),
    [
        ("evaluate", 1, None, None),  # before the first step: there is nothing to save
        ("evaluate", 2, "saved at step 6; the same command goes on", 6),  # after step 5: the next one is completed
        ("training_step", 1, "saved at step 1; the same command goes on", 1),
        ("_save_checkpoint", 1, "saved at step 5; the same command goes on", 5),
        ("_save_checkpoint", 4, "saved at step 10; the same command goes on", 10),  # the last step's
        ("settle", 1, "saved at step 10; the same command goes on", 10),  # behind it
    ],
)
def test_what_a_signal_waits_for(name, call, said, saved, tmp_path, monkeypatch):
    signal_before(monkeypatch, name, call)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as stopped:
        run_recipe(load_recipe(recipe(tmp_path)), tmp_path / "run", progress=False)
    assert stopped.value.code == 143 and stopped.value.said == said
    found = checkpoints(tmp_path / "run" / "first" / "seed-1")
    assert (found[-1][1] if found else None) == saved
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_behind_the_last_save_of_all_counts(tmp_path, monkeypatch):
    """Everything is trained, and the results are not written: the command ends by the signal, as anywhere else."""
    with monkeypatch.context() as patch:
        signal_before(patch, "settle", 2)
        with pytest.raises(Stopped) as stopped:
            run_recipe(load_recipe(recipe(tmp_path)), tmp_path / "run", progress=False)
    assert stopped.value.code == 143 and stopped.value.said == "saved at step 8; the same command goes on"
    assert not (tmp_path / "run" / "results.json").exists()


def test_the_command_line_ends_with_143_says_where_and_goes_on(tmp_path, monkeypatch, capsys):
    """Step 2 is in the middle of a logged interval of three, whose mean loss must come out all the same."""
    monkeypatch.setattr("fire_llm.cli.run.show_results", lambda *_: None)
    command = ["run", str(recipe(tmp_path)), "--output", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        signal_before(patch, "training_step", 6)  # 4 a step
        assert main(command) == 143
    said = f"\n{capsys.readouterr().err}"
    assert said.endswith("\nfire-llm: ended by SIGTERM; saved at step 2; the same command goes on\n")
    assert main(command) == 0
    assert "first: goes on from step 2" in capsys.readouterr().err
    assert main([*command[:-1], str(tmp_path / "whole")]) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


# ---- what Python drops


class Dropping:
    """Something whose end calls what it was given, where no exception can be raised out of."""

    def __init__(self, what):
        self.what = what

    def __del__(self):
        self.what()


def _in_a_finaliser(signal_self):
    Dropping(signal_self)


def _in_a_weak_references_callback(signal_self):
    thing = type("Thing", (), {})()
    reference = weakref.ref(thing, lambda _: signal_self())
    del thing
    assert reference() is None


def _in_two_that_follow_each_other(signal_self):
    def again():
        until = time.monotonic() + 0.1
        while time.monotonic() < until:  # the second time it comes here
            pass

    Dropping(signal_self)
    Dropping(again)


@pytest.mark.parametrize("where", [_in_a_finaliser, _in_a_weak_references_callback, _in_two_that_follow_each_other])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_lands_where_python_drops_exceptions_is_raised_again(where, number, capsys):
    def work():
        where(lambda: os.kill(os.getpid(), number))
        time.sleep(5)
        pytest.fail("went on")

    with signals_handled(), pytest.raises(Stopped) as stopped:
        work()
    assert stopped.value.number == number and "ignored" not in capsys.readouterr().err


def test_a_signal_that_was_caught_ends_the_work_where_steps_begin():
    with signals_handled():
        with suppress(BaseException):  # as in a library
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(Stopped):
            set_step_near(True)


# ---- the command line as a program

VERB = r"""
import os, sys, time, types
verb = types.ModuleType("fire_llm.cli.report")
verb.EXAMPLES, verb.add_options = (), lambda _: None
def main(_):
    try:
        os.write(1, b"ready\n")
        time.sleep(60)
    finally:
        os.write(1, b"cleared\n")
verb.main = main
sys.modules["fire_llm.cli.report"] = verb
from fire_llm.__main__ import program
sys.argv = ["fire-llm", "report"]
program()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("pause", [0, 0.02, 0.2])
def test_every_verb_clears_up_and_a_second_signal_adds_nothing(number, code, pause):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", VERB], **pipes)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    time.sleep(pause)
    process.send_signal(number)
    said, error = process.communicate(timeout=20)
    assert said == "cleared\n" and "Traceback" not in error and error.count("fire-llm: ") <= 1
    assert process.returncode == code


def test_a_process_ends_with_the_one_that_holds_its_pipe():
    code = "import time; from fire_llm.core.signals import end_with; end_with(0); print('ready', flush=True)"
    code += "; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.stdin.close()
    assert process.wait(10) == -signal.SIGTERM
    process.stdout.close()
