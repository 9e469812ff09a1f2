"""A Slurm of one node, with a configuration, keys and daemons of its own in a temporary folder; gone at the end."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from support.hosts import with_programs

ROOT = Path(__file__).parents[2]
NODE = "here"
CONFIGURATION = """
ClusterName=fire
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
GresTypes=gpu
KillWait=60
ReturnToService=2
NodeName={node} NodeAddr=127.0.0.1 CPUs=64 Gres=gpu:2
PartitionName=all Nodes={node} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Return why there is no Slurm to test with, None where there is."""
    needed = ("slurmctld", "slurmd", "sbatch", "munged")
    absent = [name for name in needed if shutil.which(name, path=with_programs()["PATH"]) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: slurm-wlm, munge)"
    return None if os.geteuid() == 0 else "slurmd needs root"


class Slurm:
    """Submit jobs to it and ask what became of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**with_programs(), "SLURM_CONF": str(folder / "slurm.conf")}

    def do(self, *command: str, **variables: str) -> str:
        """Run one of its commands and return what it printed."""
        done = self.ask(*command, **variables)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def ask(self, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run one of its commands, in the folder that holds the scripts."""
        environment = {**self.environment, **variables}
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)

    def job(self, number: str) -> dict[str, str]:
        """Return what it says about a job."""
        words = self.do("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, seconds: float = 300) -> dict[str, str]:
        """Wait until a job is in one of these states; return what is said about it then."""
        deadline = time.monotonic() + seconds
        while (found := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number} is {found['JobState']}, {found.get('Reason')}"
            time.sleep(0.5)
        return found


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Start munged, slurmctld and slurmd; end them, and what they started, with the block."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    for name in ("gpu0", "gpu1"):  # two more of /dev/null
        os.mknod(folder / name, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(folder=folder, ports=ports, node=NODE, host=socket.gethostname())
    )
    (folder / "gres.conf").write_text(f"NodeName={NODE} Name=gpu File={folder}/gpu[0-1]\n")
    running = Slurm(folder)
    daemons = [
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}",
         f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"],
        ["slurmctld", "-D", "-i", "-f", f"{folder}/slurm.conf"],
        ["slurmd", "-D", "-N", NODE, "-f", f"{folder}/slurm.conf"],
    ]  # fmt: skip
    started: list[subprocess.Popen[bytes]] = []
    try:
        with (folder / "daemons.log").open("wb") as log:
            for command in daemons:
                started.append(
                    subprocess.Popen(command, env=running.environment, stdout=log, stderr=log, start_new_session=True)
                )
                time.sleep(1)
        deadline = time.monotonic() + 60
        while "idle" not in running.ask("sinfo", "--noheader", "--format=%T").stdout:
            logs = "".join(log.read_text() for log in sorted(folder.glob("*.log")))
            assert time.monotonic() < deadline and all(d.poll() is None for d in started), logs[-3000:]
            time.sleep(0.5)
        yield running
    finally:
        # A job's processes belong to slurmstepd, which leaves slurmd.
        mine = [p for p in psutil.process_iter() if _of(p, folder)]
        for process in {q for p in mine for q in [*p.children(recursive=True), p]}:
            with suppress(psutil.Error):
                process.kill()
        for daemon in started:
            daemon.kill()
            daemon.wait()


def _of(process: psutil.Process, folder: Path) -> bool:
    """Return whether a process is a step of this Slurm's."""
    try:
        named = process.name() == "slurmstepd"
        return named and any(file.path == str(folder / "slurmd.log") for file in process.open_files())
    except psutil.Error:
        return False
