"""Start the processes of a run with accelerate, and report in one message what ended them.

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
"""What the user can do after a run was ended."""

REPEAT = "nothing was written: run the same command again"
"""What the user can do after a verb was ended that writes its result last."""

_OURS = "FIRE_LLM_LAUNCHER"
"""Set in processes that `start` made, to a folder. They write their message there, and the launcher prints it.

Their standard input is a pipe that the system closes when the launcher dies: see `end_with_launcher`."""

_PATIENCE = "600"
"""Seconds that ranks have to save after a signal before torch's launcher kills them."""

MEET_SECONDS = "FIRE_LLM_MEET_SECONDS"
"""Environment variable: seconds that the machines wait for each other at the start; 600 where it is unset."""

_SIOCGIFADDR = 0x8915
"""Linux's request for the address of a network interface."""

_ELSEWHERE = "192.0.2.1"
"""An address that no machine has (RFC 5737): packets to it take the default route."""

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
        number = self.settings.get("num_machines")
        return 1 if number is None else int(number)

    @property
    def port(self) -> int:
        """Return the port at which the machines meet; 0, any, on one machine."""
        return 0 if self.machines == 1 else int(self.settings.get("main_process_port") or 29500)

    @property
    def alone(self) -> bool:
        """Return whether this process can do the work itself."""
        return self.processes == 1 and self.settings["distributed_type"] != "FSDP"


# ---- before: what the user asks for


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
        processes: On all machines together; None for the number in the configuration.
        config: A file of accelerate's settings.
        use_cpu: Compute on CPUs where there is no configuration.
        cpu_option: The user's option for CPUs, which the message about too many processes names.
        machines: Settings of accelerate about several machines, which replace those of the configuration; None is none.

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
    """Read a configuration file of accelerate, and refuse engines that cannot be trained under."""
    import yaml
    from accelerate.commands.config.config_args import load_config_from_file

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
    try:
        load_config_from_file(str(path))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' is refused by accelerate: {error}") from error
    return {**data, "distributed_type": kind}


def _check_machines(launch: Launch) -> None:
    """Refuse settings with which several machines cannot meet."""
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
    seconds = _meet_seconds()
    if launch.machines > 1 and not (seconds.isdecimal() and int(seconds)):
        raise UserError(f"{MEET_SECONDS}={seconds}: it must be a whole number of seconds, at least 1")


def _check_mesh(launch: Launch, config: str | None) -> None:
    """Refuse a mesh that is not replicas × shards, or whose size is not the number of processes."""
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
    """Refuse more processes than accelerators, unless they compute on the CPU."""
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
        precision: Of the recipe: fp32, bf16 or fp16; it replaces that of accelerate's settings.
        next_step: What the user can do after the processes were ended.
    """
    from tempfile import TemporaryDirectory

    from accelerate.commands.launch import launch_command
    from torch.distributed import DistNetworkError, DistStoreError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with TemporaryDirectory(prefix="fire-llm-") as folder, _surroundings(launch, folder):
        try:
            launch_command(_arguments(launch, argv, precision, Path(folder)))
        except ChildFailedError as error:
            code, message = _verdict(error.failures, next_step)
        except SignalException as error:
            code, message = ended(Stopped(error.sigval), next_step)
            report = Path(folder) / "0"  # of the first rank, from `report_failure`
            if report.exists():
                message = report.read_text(encoding="utf-8")
        except (DistNetworkError, DistStoreError) as error:
            code = 1
            message = (
                f"the {launch.machines} machines did not meet at {launch.settings.get('main_process_ip')}, port "
                f"{launch.port}, within {_meet_seconds()} s: start the same command on each, with a --machine-rank of "
                f"its own ({first_line(error)})"
            )
        else:
            return 0
    # A killed rank leaves its progress bar without an end of line.
    sys.stderr.write(("" if code in (2, 130, 143) else "\n") + f"fire-llm: {message}\n")
    return code


def _arguments(launch: Launch, argv: list[str], precision: str, folder: Path) -> Any:
    """Write accelerate's settings into a folder, and return the arguments of `accelerate launch`."""
    import yaml
    from accelerate.commands.launch import launch_command_parser

    settings = {
        **launch.settings,
        # accelerate starts MULTI_CPU by MPI alone; MULTI_GPU starts processes on any device.
        "distributed_type": "FSDP" if launch.settings["distributed_type"] == "FSDP" else "MULTI_GPU",
        "num_processes": launch.processes,
        "mixed_precision": {"fp32": "no"}.get(precision, precision),
        "main_process_port": launch.port,
    }
    file = folder / "accelerate.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    threads = ["--num_cpu_threads_per_process", os.environ["OMP_NUM_THREADS"]]
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(file), *threads, "--module", "fire_llm", *argv]
    )
    if launch.machines == 1:
        # The ranks connect to a port that the launcher itself holds, so that no other launch can take it.
        arguments.standalone, arguments.local_addr = True, "127.0.0.1"
    else:
        arguments.rdzv_conf = ",".join(filter(None, [arguments.rdzv_conf, f"timeout={_meet_seconds()}"]))
    return arguments


def _meet_seconds() -> str:
    return os.environ.get(MEET_SECONDS, "600")


@contextmanager
def _surroundings(launch: Launch, folder: str) -> Iterator[None]:
    """Set the environment that the ranks inherit, and silence the logs of the launcher's libraries."""
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
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no warnings about sockets of a lost machine
        if interface := _interface_to(str(launch.settings["main_process_ip"])):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if launch.settings.get("use_cpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        for number, handler in handlers.items():  # torch's launcher leaves its own handlers
            signal.signal(number, handler)
        os.dup2(stdin, 0)
        os.close(stdin)
        os.close(writer)
        logging.disable(level)
        os.environ.clear()
        os.environ.update(before)


def _interface_to(address: str) -> str | None:
    """Return the network interface by which packets reach another machine; None where that is not known.

    gloo takes the interface of this machine's host name. On many machines that is 127.0.1.1, which no other can reach.
    """
    import fcntl
    import socket

    for target in (address, _ELSEWHERE):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.connect((target, 9))  # sends nothing
            own = probe.getsockname()[0]
            if own.startswith("127.") and not address.startswith("127."):
                continue  # `address` is this machine's own name, and has another address on the others
            for _, name in socket.if_nameindex():
                with suppress(OSError):  # an interface without an address
                    answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, name.encode()[:15].ljust(256, b"\0"))
                    if answer[20:24] == socket.inet_aton(own):
                        return name
    return None


def end_with_launcher() -> None:
    """Save and end this process when the launcher that made it is gone; do nothing in other processes."""
    if _OURS in os.environ and launched():
        end_with(0)


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- after: what ended the processes


def ended(interruption: KeyboardInterrupt, next_step: str = RESUME) -> tuple[int, str]:
    """Return exit code and message after a signal: what was saved, or what to do next."""
    stopped = interruption if isinstance(interruption, Stopped) else Stopped(signal.SIGINT)
    by = "interrupted" if stopped.number == signal.SIGINT else f"ended by {signal.Signals(stopped.number).name}"
    return stopped.code, f"{by}; {stopped.said or next_step}"


def report_failure(code: int, message: str, *, ask: bool = True) -> None:
    """Report why this process ends: on the terminal where it is alone, else to its launcher.

    Of ranks that another launcher started, the first to fail prints its message.

    Args:
        code: The exit code to end with.
        message: Why it ends.
        ask: Ask the other ranks whether one has reported. Otherwise the first of each machine reports.
    """
    message = redact(message)
    _leave_for_launcher(code, message)
    folder = Path(os.environ.get(_OURS, ""))
    if code > 128 and launched() and _OURS in os.environ and folder.is_dir():
        # torch's launcher does not read error files when a signal ends the launcher itself.
        (folder / os.environ["LOCAL_RANK"]).write_text(message, encoding="utf-8")
    if not (launched() and os.environ.get(_OURS)) and _first_to_report(ask):
        sys.stderr.write(f"fire-llm: {message}\n")


def _leave_for_launcher(code: int, message: str) -> None:
    """Write the error file that torch's launcher names for every rank, and from which it reads message and time."""
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
        pass  # the launcher still gets the exit code


def _first_to_report(ask: bool) -> bool:
    if not launched():
        return True
    dist = sys.modules.get("torch.distributed")
    if not ask or dist is None or not dist.is_available() or not dist.is_initialized():
        return os.environ.get("LOCAL_RANK", "0") == "0"  # before they connect, all ranks of a machine fail alike
    try:
        return bool(dist.distributed_c10d._get_default_store().add("fire_llm/reported", 1) == 1)
    except RuntimeError:  # the process that holds the store is gone
        return first_rank()


def _verdict(failures: Mapping[int, Any], next_step: str = RESUME) -> tuple[int, str]:
    """Return exit code and message for the failures of some ranks; causes count before their consequences."""
    by_time = sorted(failures.items(), key=lambda item: (item[1].timestamp, item[0]))
    reports = [(rank, f) for rank, f in by_time if "code" in f.error_file_data]
    for _, failure in reports:
        if failure.error_file_data["code"] == 2:
            return 2, str(failure.message)
    # The launcher ends the others with SIGTERM once one has failed.
    killed = [(rank, f) for rank, f in by_time if f.exitcode < 0 and -f.exitcode not in (signal.SIGTERM, signal.SIGINT)]
    if killed:
        rank, failure = killed[0]
        hint = ": most often the machine ran out of memory" if -failure.exitcode == signal.SIGKILL else ""
        return 1, f"rank {rank} (process {failure.pid}) was killed by {failure.signal_name()}{hint}; {next_step}"
    for rank, failure in reports:
        if failure.error_file_data["code"] == 1:
            return 1, f"{failure.message} (rank {rank} of {len(failures)} that ended); {next_step}"
    for _, failure in reports:
        if failure.error_file_data["code"] > 128:
            return int(failure.error_file_data["code"]), str(failure.message)
    if any(f.exitcode in (130, -signal.SIGINT) for _, f in by_time):
        return ended(KeyboardInterrupt(), next_step)
    rank, failure = next(((r, f) for r, f in by_time if f.exitcode > 0), by_time[0])
    how = f"exit code {failure.exitcode}" if failure.exitcode > 0 else failure.signal_name()
    return 1, f"rank {rank} (process {failure.pid}) ended with {how}; {next_step}"
