"""Start a verb on several processes: the launch that its options ask for, and the command line of each process."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from fire_llm.cli.parser import parser
from fire_llm.core.errors import UserError, did_you_mean
from fire_llm.core.launch import Launch, prepare

_MACHINES = ("num_machines", "machine_rank", "main_address")
_FOR_THE_LAUNCHER = ("num_processes", "accelerate_config", "push_to_hub", *_MACHINES)
"""Options that ranks are started without: the process that starts them acts on these."""


def training_launch(arguments: Namespace) -> Launch | None:
    """Return the launch that --num-processes or --accelerate-config asks for; None if neither is given.

    Raises:
        UserError: Options exclude each other, or the launch cannot work.
    """
    machines = _machines(arguments)
    if arguments.num_processes is None and arguments.accelerate_config is None:
        if machines:
            raise UserError("several machines need --num-processes: how many processes all of them start together")
        return None
    if arguments.workers is not None:
        raise UserError(
            "--workers trains several stages at once, --num-processes one on several processes: give one of the two"
        )
    config = arguments.accelerate_config
    return prepare(arguments.num_processes, None if config is None else _configuration(config), machines=machines)


def _machines(arguments: Namespace) -> dict[str, Any]:
    """Return the options about several machines as accelerate's settings; empty if none is given."""
    address, _, port = (arguments.main_address or "").partition(":")
    if ":" in port:  # an IPv6 address
        address, port = arguments.main_address, ""
    if port and not port.isdecimal():
        raise UserError(f"--main-address {arguments.main_address}: an address, or ADDRESS:PORT, is needed")
    settings = {
        "num_machines": arguments.num_machines,
        "machine_rank": arguments.machine_rank,
        "main_process_ip": address or None,
        "main_process_port": int(port) if port else None,
    }
    return {key: value for key, value in settings.items() if value is not None}


def device_launch(arguments: Namespace) -> Launch | None:
    """Return the launch that --num-processes asks for on the devices of --device; None if one process is enough.

    Raises:
        UserError: The device is unknown, or there are fewer devices than processes.
    """
    if arguments.num_processes is None:
        return None
    from fire_llm.models import find_device

    on_cpu = find_device(arguments.device).type == "cpu"
    launch = prepare(arguments.num_processes, None, use_cpu=on_cpu, cpu_option="--device cpu")
    return None if launch.alone else launch


def _configuration(name: str) -> str:
    """Return the file of accelerate's settings for a path, or for a name in recipes/accelerate.

    Raises:
        UserError: There is no such file; the message lists the names.
    """
    from fire_llm.experiment.recipe import recipes_folder

    if Path(name).is_file():
        return name
    files = {path.stem: str(path) for path in sorted((recipes_folder() / "accelerate").glob("*.yaml"))}
    if name not in files:
        raise UserError(
            f"--accelerate-config: there is no file '{name}', and no configuration of that name comes with the "
            f"package.{did_you_mean(Path(name).stem, files)} Names: {', '.join(files)}. `accelerate config` writes "
            "a file of your own"
        )
    return files[name]


def command_line(arguments: Namespace) -> list[str]:
    """Return the command line of each rank: the verb with its options, without those for the launcher."""
    verbs: Any = next(a for a in parser([arguments.verb])._actions if a.dest == "verb").choices
    line = [arguments.verb]
    for action in verbs[arguments.verb]._actions:
        value = getattr(arguments, action.dest, None)
        if action.dest in _FOR_THE_LAUNCHER or value in (None, False) or value == action.default:
            continue
        flag, values = action.option_strings[-1:], value if isinstance(value, list) else [value]
        if value is True:
            line += flag
        elif not flag or action.nargs == "+":
            line += [*flag, *map(str, values)]
        else:
            line += [f"{flag[0]}={v}" for v in values]
    return line
