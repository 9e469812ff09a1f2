"""Start the processes of a run with accelerate, and report once what ended them.

fire-llm run --num-processes N ─▶ start ─▶ accelerate launch -m fire_llm run … ─▶ N ranks
                exit code, one message ◀── ChildFailedError ◀── error files ◀──────┘
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fire_llm.core.errors import CHECKPOINTED_ONCE, ENGINES, UserError, did_you_mean, first_line, redact
from fire_llm.core.ranks import first_rank, launched
from fire_llm.core.signals import SIGNALS, Stopped, end_with

RESUME = "what was saved stays, and the same command goes on from the newest checkpoint"
"""What to do after a run was ended."""

REPEAT = "nothing was written: run the same command again"
"""What to do after a verb was ended that makes its result at the very end."""

_OURS = "FIRE_LLM_LAUNCHER"
"""Set in processes that `start` made, to a folder: they write their message there, and the launcher prints it.

Their standard input is a pipe of the launcher's, which the system closes when that dies: see `end_with_launcher`."""

_PATIENCE = "600"
"""Seconds that ranks have to save after a signal, before torch's launcher kills them."""

MEET_SECONDS = "FIRE_LLM_MEET_SECONDS"
"""Environment variable: for how many seconds the machines wait for each other at the start; 600 where it is unset."""

_SIOCGIFADDR = 0x8915
"""Linux: ask for the address of a network interface."""

_ELSEWHERE = "192.0.2.1"
"""An address of no machine (RFC 5737): the way to it is the default route."""

_KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_HPU", "FSDP")


@dataclass(frozen=True)
class Launch:
    """How many processes to start, and accelerate's settings for them."""

    processes: int
    """On all machines together."""
    settings: Mapping[str, Any]
    """The content of a configuration file of accelerate."""

    @property
    def machines(self) -> int:
        """Return the number of machines."""
        given = self.settings.get("num_machines")
        return 1 if given is None else int(given)

    @property
    def alone(self) -> bool:
        """Return whether this process can do the work itself."""
        return self.processes == 1 and self.settings["distributed_type"] != "FSDP"


# ---- before: what was asked for


def prepare(
    processes: int | None,
    config: str | None,
    *,
    use_cpu: bool = False,
    cpu_option: str = "--accelerate-config cpu",
    machines: Mapping[str, Any] | None = None,
) -> Launch:
    """Read and check what `--num-processes` and `--accelerate-config` ask for; start nothing.

    Args:
        processes: On all machines together; None for what the configuration says.
        config: A file of accelerate's settings.
        use_cpu: Leave accelerators alone where there is no configuration.
        cpu_option: What the user can give to leave them alone, for the message about too many processes.
        machines: Settings of accelerate's about several machines, in the place of the configuration's; None is none.

    Raises:
        UserError: For a number of processes or a configuration that cannot work.
    """
    if launched():
        raise UserError(
            "--num-processes and --accelerate-config start processes, and this one was started by a launcher already "
            "(RANK or WORLD_SIZE is set): give them to that launcher, or leave out one of the two"
        )
    if processes is not None and processes < 1:
        raise UserError(f"--num-processes {processes}: at least 1 is needed")
    settings: dict[str, Any] = _read(Path(config)) if config else {"distributed_type": "MULTI_GPU", "use_cpu": use_cpu}
    settings |= {key: value for key, value in (machines or {}).items() if value is not None}
    if processes is None:
        processes = settings.get("num_processes", -1 if settings["distributed_type"] != "NO" else 1)
        if not isinstance(processes, int) or processes < 1:
            raise UserError(f"'{config}' names no number of processes: give --num-processes N")
    launch = Launch(processes, settings)
    if launch.machines < 1:
        raise UserError(f"--num-machines {launch.machines}: at least 1 is needed")
    if processes % launch.machines:
        raise UserError(
            f"{processes} processes do not divide among the {launch.machines} machines of '{config}': "
            f"give --num-processes a multiple of {launch.machines}"
        )
    _check_machines(launch)
    _check_mesh(launch, config)
    _check_devices(launch, cpu_option)
    return launch


def _read(path: Path) -> dict[str, Any]:
    """Read a configuration file of accelerate and refuse what cannot be trained under."""
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"'{path}'{line} is not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(data, dict) or "distributed_type" not in data:
        raise UserError(f"'{path}' is no accelerate configuration: it must hold distributed_type: {', '.join(_KINDS)}")
    kind = str(data["distributed_type"]).upper()
    fsdp = data.get("fsdp_config") or {}
    if kind == "FSDP" and int(fsdp.get("fsdp_version", 1)) != 2:
        kind = "FSDP1"
    if data.get("deepspeed_config"):
        kind = "DEEPSPEED"
    if kind in ENGINES:
        raise UserError(f"'{path}': {ENGINES[kind]}")
    if kind not in _KINDS:
        raise UserError(
            f"'{path}': distributed_type {data['distributed_type']} is not supported.{did_you_mean(kind, _KINDS)} "
            f"It must be one of {', '.join(_KINDS)}"
        )
    if fsdp.get("fsdp_activation_checkpointing"):
        raise UserError(f"'{path}': fsdp_activation_checkpointing {CHECKPOINTED_ONCE}")
    _check_keys(path)
    return {**data, "distributed_type": kind}


def _check_keys(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        load_config_from_file(str(path))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' is refused by accelerate: {error}") from error


def _check_machines(launch: Launch) -> None:
    """Refuse several machines that cannot meet."""
    rank, port = launch.settings.get("machine_rank") or 0, launch.settings.get("main_process_port")
    if not 0 <= int(rank) < launch.machines:
        raise UserError(
            f"--machine-rank {rank}: the {launch.machines} machine(s) count from 0 to {launch.machines - 1}; "
            "--num-machines says how many there are"
        )
    if launch.machines > 1 and not launch.settings.get("main_process_ip"):
        raise UserError(f"--num-machines {launch.machines} needs --main-address: where all find the first machine")
    if launch.machines > 1 and port is not None and not 0 < int(port) < 1 << 16:
        raise UserError(f"--main-address: port {port} is none; 1 to 65535 are, and 29500 where none is given")
    meeting = os.environ.get(MEET_SECONDS, "600")
    if launch.machines > 1 and not (meeting.isdecimal() and int(meeting)):
        raise UserError(f"{MEET_SECONDS}={meeting}: it must be a whole number of seconds, at least 1")


def _check_mesh(launch: Launch, config: str | None) -> None:
    """Refuse a mesh that is not replicas × shards, or that another number of processes would fill."""
    mesh = dict(launch.settings.get("parallelism_config") or {})
    sizes = {key.removeprefix("parallelism_config_"): value for key, value in mesh.items() if key.endswith("_size")}
    others = [key for key, value in sizes.items() if value != 1 and key not in ("dp_replicate_size", "dp_shard_size")]
    if others:
        raise UserError(
            f"'{config}': {others[0]} {sizes[others[0]]} is not supported: a mesh is dp_replicate_size × dp_shard_size"
        )
    total = int(sizes.get("dp_replicate_size", 1)) * int(sizes.get("dp_shard_size", 1))
    if sizes and total != launch.processes:
        raise UserError(
            f"'{config}': dp_replicate_size × dp_shard_size is {total}, and there are {launch.processes} processes: "
            "make them equal"
        )


def _check_devices(launch: Launch, cpu_option: str) -> None:
    """Refuse more processes than there are accelerators, unless they are to compute on the CPU."""
    import torch

    if launch.settings.get("use_cpu") or not torch.accelerator.is_available():
        return
    here, present = launch.processes // launch.machines, torch.accelerator.device_count()
    if here > present:
        raise UserError(
            f"--num-processes {launch.processes}: this machine has {present} accelerator(s), and each process takes "
            f"one. Use at most {present * launch.machines}, or compute on the CPU: {cpu_option}"
        )


# ---- the processes


def start(launch: Launch, argv: list[str], precision: str, next_step: str = RESUME) -> int:
    """Run `python -m fire_llm` with these arguments on every rank, and return the exit code to end with.

    Args:
        launch: From `prepare`.
        argv: Verb and arguments, without those that start processes.
        precision: Of the recipe: fp32, bf16 or fp16; it decides, whatever accelerate's settings say.
        next_step: What the user can do after the processes were ended.
    """
    from tempfile import TemporaryDirectory

    import yaml
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    settings = {
        **launch.settings,
        # accelerate has no launcher for MULTI_CPU but MPI's; this one starts processes on any device.
        "distributed_type": "FSDP" if launch.settings["distributed_type"] == "FSDP" else "MULTI_GPU",
        "num_processes": launch.processes,
        "mixed_precision": {"fp32": "no"}.get(precision, precision),
    }
    meeting = os.environ.get(MEET_SECONDS, "600")
    if launch.machines == 1:
        settings["main_process_port"] = 0
    elif settings.get("main_process_port") is None:
        settings["main_process_port"] = 29500
    with TemporaryDirectory(prefix="fire-llm-") as folder, _surroundings(launch, folder):
        file = Path(folder) / "accelerate.yaml"
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        threads = ["--num_cpu_threads_per_process", os.environ["OMP_NUM_THREADS"]]
        arguments = launch_command_parser().parse_args(
            ["--config_file", str(file), *threads, "--module", "fire_llm", *argv]
        )
        if launch.machines == 1:
            # The ranks connect at a port that the launcher itself holds, so that no other launch can take it.
            arguments.standalone, arguments.local_addr = True, "127.0.0.1"
        else:
            arguments.rdzv_conf = ",".join(filter(None, [arguments.rdzv_conf, f"timeout={meeting}"]))
        try:
            launch_command(arguments)
        except ChildFailedError as error:
            code, message = _verdict(error.failures, next_step)
        except SignalException as error:
            code, message = ended(Stopped(error.sigval), next_step)
            reported = Path(folder) / "0"  # by the first rank, in `report_failure`
            if reported.exists():
                message = reported.read_text(encoding="utf-8")
        except (DistNetworkError, DistStoreError) as error:
            code = 1
            message = (
                f"the {launch.machines} machines did not meet at {settings.get('main_process_ip')}, port "
                f"{settings['main_process_port']}, within {meeting} s: start the same command on each, with a "
                f"--machine-rank of its own ({first_line(error)})"
            )
        else:
            return 0
    # A rank that was killed leaves its progress bar without an end of line.
    sys.stderr.write(("" if code in (2, 130, 143) else "\n") + f"fire-llm: {message}\n")
    return code


@contextmanager
def _surroundings(launch: Launch, folder: str) -> Iterator[None]:
    """Set what the ranks inherit, and keep the launcher's own libraries from logging."""
    import logging

    before, level = dict(os.environ), logging.root.manager.disable
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    reader, writer = os.pipe()
    stdin = os.dup(0)
    os.dup2(reader, 0)
    os.close(reader)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() * launch.machines // launch.processes)))
    os.environ[_OURS] = folder
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _PATIENCE)
    if launch.machines > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # sockets of a machine that is gone
        if interface := _interface_to(str(launch.settings["main_process_ip"])):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if launch.settings.get("use_cpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        for number, handler in handlers.items():  # torch's launcher leaves its own behind
            signal.signal(number, handler)
        os.dup2(stdin, 0)
        os.close(stdin)
        os.close(writer)
        logging.disable(level)
        os.environ.clear()
        os.environ.update(before)


def _interface_to(address: str) -> str | None:
    """Return the name of the network interface that leads to another machine, None where that is not known.

    gloo takes the one that has this machine's name: 127.0.1.1 on many, where no other machine finds it.
    """
    import fcntl
    import socket

    for target in (address, _ELSEWHERE):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect((target, 9))  # sends nothing
            own = probe.getsockname()[0]
            if own.startswith("127.") and not address.startswith("127."):
                continue  # this machine's own name, which the others read as another address
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # one without an address
                    asked = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, name.encode()[:15].ljust(256, b"\0"))
                    if asked[20:24] == socket.inet_aton(own):
                        return name
    return None


def end_with_launcher() -> None:
    """End this process, its step saved, when the `start` that made it is gone; does nothing in others."""
    if _OURS in os.environ and launched():
        end_with(0)


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- after: what ended them


def ended(interruption: KeyboardInterrupt, next_step: str = RESUME) -> tuple[int, str]:
    """Return exit code and message for what a signal ended: what was saved, or what to do next."""
    number = interruption.number if isinstance(interruption, Stopped) else signal.SIGINT
    by = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    said = interruption.said if isinstance(interruption, Stopped) else None
    return 128 + number, f"{by}; {said or next_step}"


def report_failure(code: int, message: str, *, ask: bool = True) -> None:
    """Report why this process ends: on the terminal where it is alone, to the launcher where there is one.

    Of ranks that another launcher started, the first to fail prints its message.

    Args:
        code: The exit code to end with.
        message: Why.
        ask: Ask the other ranks whether one has reported; otherwise the first of each machine does.
    """
    message = redact(message)
    _leave_for_launcher(code, message)
    folder = Path(os.environ.get(_OURS, ""))
    if code > 128 and launched() and _OURS in os.environ and folder.is_dir():
        # torch's launcher reads no error files where a signal ended the launcher itself.
        (folder / os.environ["LOCAL_RANK"]).write_text(message, encoding="utf-8")
    if not (launched() and os.environ.get(_OURS)) and _first_to_report(ask):
        sys.stderr.write(f"fire-llm: {message}\n")


def _leave_for_launcher(code: int, message: str) -> None:
    """Write the error file that torch's launcher gives every rank; it reads the message and the time."""
    name = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not launched() or not name:
        return
    path = Path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"message": message, "timestamp": int(time.time()), "code": code}))
        os.replace(partial, path)
    except OSError:
        pass  # the exit code is left


def _first_to_report(ask: bool) -> bool:
    if not launched():
        return True
    dist = sys.modules.get("torch.distributed")
    if not ask or dist is None or not dist.is_available() or not dist.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"  # before the ranks connect, all of a machine find the same
    try:
        return bool(dist.distributed_c10d._get_default_store().add("fire_llm/reported", 1) == 1)
    except RuntimeError:  # the store went with its process
        return first_rank()


def _verdict(failures: Mapping[int, Any], next_step: str = RESUME) -> tuple[int, str]:
    """Return exit code and message for what the ranks ended with; causes come before what followed from them."""
    by_time = sorted(failures.items(), key=lambda item: (item[1].timestamp, item[0]))
    said = [(rank, f) for rank, f in by_time if "code" in f.error_file_data]
    for _, failure in said:
        if failure.error_file_data["code"] == 2:
            return 2, str(failure.message)
    # The launcher ends the others with SIGTERM once one has failed.
    killed = [(rank, f) for rank, f in by_time if f.exitcode < 0 and -f.exitcode not in (signal.SIGTERM, signal.SIGINT)]
    if killed:
        rank, failure = killed[0]
        hint = ": most often the machine ran out of memory" if -failure.exitcode == signal.SIGKILL else ""
        return 1, f"rank {rank} (process {failure.pid}) was killed by {failure.signal_name()}{hint}; {next_step}"
    for rank, failure in said:
        if failure.error_file_data["code"] == 1:
            return 1, f"{failure.message} (rank {rank} of {len(failures)} that ended); {next_step}"
    for _, failure in said:
        if failure.error_file_data["code"] > 128:
            return int(failure.error_file_data["code"]), str(failure.message)
    if any(f.exitcode in (130, -signal.SIGINT) for _, f in by_time):
        return ended(KeyboardInterrupt(), next_step)
    rank, failure = next(((r, f) for r, f in by_time if f.exitcode > 0), by_time[0])
    how = f"exit code {failure.exitcode}" if failure.exitcode > 0 else failure.signal_name()
    return 1, f"rank {rank} (process {failure.pid}) ended with {how}; {next_step}"
