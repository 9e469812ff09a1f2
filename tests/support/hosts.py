"""Two hosts on this machine: network namespaces with names of their own, joined by a virtual link; gone at the end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def missing() -> str | None:
    """Return why no hosts can be made here, None where they can."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "ip or unshare is not installed (Debian: iproute2, util-linux)"
    tried = subprocess.run(["unshare", "--net", "--uts", "true"], capture_output=True, text=True)
    return f"network namespaces cannot be made here: {tried.stderr.strip()}" if tried.returncode else None


def with_programs() -> dict[str, str]:
    """Return the environment, in which `fire-llm` is that of this Python."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"}


class Hosts:
    """Start commands on the hosts 0 and 1, kill a host, cut the link.

    Args:
        prefix: Of the namespaces' names.
    """

    ADDRESSES = ("10.77.0.1", "10.77.0.2")

    def __init__(self, prefix: str) -> None:
        self.names = [f"{prefix}{host}" for host in (0, 1)]

    def start(self, host: int, command: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Start a command on a host; what it prints goes to a file."""
        named = ["unshare", "--uts", "sh", "-c", f'hostname host-{host} && exec "$@"', "sh"]
        with log.open("wb") as file:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *named, *command],
                env={**with_programs(), **variables},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self, host: int) -> None:
        """Kill everything that runs on a host; its connections are closed."""
        for number in _ip("netns", "pids", self.names[host]).split():
            with suppress(ProcessLookupError):
                os.kill(int(number), signal.SIGKILL)

    def cut(self) -> None:
        """Take the link down; no connection is closed."""
        _ip("-n", self.names[0], "link", "set", "link0", "down")


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make two hosts; whatever happens, kill what runs on them and remove them."""
    hosts = Hosts(f"fire-llm-{os.getpid()}-")
    try:
        for name in hosts.names:
            _ip("netns", "add", name)
        a, b = hosts.names
        _ip("link", "add", "link0", "netns", a, "type", "veth", "peer", "name", "link1", "netns", b)
        for host, name in enumerate(hosts.names):
            _ip("-n", name, "addr", "add", f"{hosts.ADDRESSES[host]}/24", "dev", f"link{host}")
            for device in ("lo", f"link{host}"):
                _ip("-n", name, "link", "set", device, "up")
        yield hosts
    finally:
        for host, name in enumerate(hosts.names):
            if name in _ip("netns", "list").split():
                hosts.kill(host)
                _ip("netns", "del", name)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout
