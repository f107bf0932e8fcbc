"""Machines of a small network, each a set of Linux namespaces: what test_machines.py needs of them.

A machine has its own network, mounts and host name; memory and processors are those of this one.
Its link can be cut, a folder of it hidden. Nothing outside of the namespaces changes, and all goes
when the processes end.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUB = "10.99.0.1"  # the address of the first machine; the others count on
_COMMANDS = ("unshare", "nsenter", "setpriv", "ip", "bridge", "mount")
_NAMESPACES = ["--net", "--mount", "--uts"]
_ENDS_WITH_US = ["setpriv", "--pdeathsig", "KILL"]
_AS_ROOT = [] if hasattr(os, "getuid") and os.getuid() == 0 else ["--user", "--map-root-user"]


def problem() -> str | None:
    """Why there can be no such machines here; None if there can."""
    if sys.platform != "linux":
        return "this is not Linux"
    if missing := [name for name in _COMMANDS if not shutil.which(name)]:
        return f"without {', '.join(missing)}"
    try:
        with network("first", "second") as net:
            net.machines[1].hide(Path("/tmp"))
            net.isolate_workers()
    except (OSError, RuntimeError) as error:
        return str(error)
    return None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Namespaces that a process keeps; ``address`` is its own in the network of the machines."""

    name: str
    address: str
    keeper: subprocess.Popen[str]
    stack: ExitStack

    def command(self, *command: Any) -> list[str]:
        """A command that runs there."""
        user = ["--user", "--preserve-credentials"] if _AS_ROOT else []
        enter = ["nsenter", "--target", str(self.keeper.pid), *user, *_NAMESPACES]
        return [*enter, *_ENDS_WITH_US, *map(str, command)]

    def do(self, *command: Any) -> str:
        """Run a command there, and wait for it; -> what it prints. Raises RuntimeError."""
        done = subprocess.run(self.command(*command), capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")
        return done.stdout

    def start(self, *command: Any, **options: Any) -> subprocess.Popen[str]:
        """Start a command there; it is killed when the network goes."""
        process = subprocess.Popen(self.command(*command), text=True, **options)
        self.stack.callback(_end, process)
        return process

    def can_reach(self, address: str) -> bool:
        """Whether a machine of that address answers, if only that it has nothing at a port."""
        code = "import socket, sys; s = socket.socket(); s.settimeout(2); "
        code += "print(s.connect_ex((sys.argv[1], 9)))"
        return int(self.do(sys.executable, "-c", code, address)) == errno.ECONNREFUSED

    def hide(self, folder: Path) -> None:
        """An empty folder in the place of one."""
        self.do("mount", "-t", "tmpfs", "none", folder)

    def make_read_only(self, folder: Path) -> None:
        self.do("mount", "--bind", folder, folder)
        self.do("mount", "-o", "remount,bind,ro", folder)

    def show_as(self, folder: Path, other: Path) -> None:
        """Another folder, or file, in the place of one."""
        self.do("mount", "--bind", other, folder)


@dataclass(frozen=True, kw_only=True)
class Network:
    """Machines, the first of which all others are linked to."""

    machines: list[Machine]

    @property
    def hub(self) -> Machine:
        return self.machines[0]

    def set_link(self, machine: Machine, state: str) -> None:
        """Cut a machine off ("down"), or bring its link back ("up")."""
        self.hub.do("ip", "link", "set", f"to-{machine.name}", state)

    def isolate_workers(self) -> None:
        """From now on, all but the first machine reach the first alone."""
        for machine in self.machines[1:]:
            self.hub.do("bridge", "link", "set", "dev", f"to-{machine.name}", "isolated", "on")


@contextmanager
def network(*names: str) -> Iterator[Network]:
    """Machines of these names, all linked to the first by a bridge."""
    with ExitStack() as stack:
        hub = _machine(names[0], HUB, stack, ["unshare", *_AS_ROOT, *_NAMESPACES])
        hub.do("ip", "link", "add", "eth0", "type", "bridge")
        hub.do("ip", "address", "add", f"{HUB}/24", "dev", "eth0")
        hub.do("ip", "link", "set", "eth0", "up")
        machines = [hub]
        for i, name in enumerate(names[1:], start=11):
            address = f"10.99.0.{i}"
            new = _machine(name, address, stack, hub.command("unshare", *_NAMESPACES))
            link, there = f"to-{name}", str(new.keeper.pid)
            hub.do("ip", "link", "add", link, "type", "veth", "peer", "eth0", "netns", there)
            hub.do("ip", "link", "set", link, "master", "eth0", "up")
            new.do("ip", "address", "add", f"{address}/24", "dev", "eth0")
            new.do("ip", "link", "set", "eth0", "up")
            machines.append(new)
        yield Network(machines=machines)


def _machine(name: str, address: str, stack: ExitStack, unshare: list[str]) -> Machine:
    keep = [
        *unshare,
        *_ENDS_WITH_US,
        "sh",
        "-c",
        'hostname "$0" && echo ready && exec sleep infinity',
        name,
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    keeper = subprocess.Popen(keep, text=True, **pipes)  # type: ignore[call-overload]
    stack.callback(_end, keeper)
    if keeper.stdout.readline() != "ready\n":
        raise RuntimeError(f"no namespaces: {keeper.stderr.read().strip()}")
    machine = Machine(name=name, address=address, keeper=keeper, stack=stack)
    machine.do("ip", "link", "set", "lo", "up")
    return machine


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


SLURM = """
ClusterName=two
SlurmctldHost={hub}({address})
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
"""


def start_slurm(machines: Network, folder: Path) -> dict[str, str]:
    """A SLURM whose nodes, of one processor each, are all machines but the first.

    Returns the variables of the environment that its commands need.
    """
    nodes = [
        f"NodeName={node.name} NodeAddr={node.address} CPUs=1 RealMemory=4000 State=UNKNOWN"
        for node in machines.machines[1:]
    ]
    names = ",".join(node.name for node in machines.machines[1:])
    conf, key = folder / "slurm.conf", folder / "munge.key"
    text = SLURM.format(hub=machines.hub.name, address=HUB, folder=folder)
    text += "\n".join([*nodes, f"PartitionName=normal Nodes={names} Default=YES State=UP", ""])
    conf.write_text(text)
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    munge = [f"--{what}-file={folder}/munge.{what}" for what in ("key", "pid", "log", "seed")]
    socket = ["--socket", folder / "munge.socket"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    hub = machines.hub
    hub.start("munged", "--foreground", "--force", *munge, *socket, **quiet)
    hub.start("slurmctld", "-D", "-f", conf, "-L", folder / "slurmctld.log", **quiet)
    for node in machines.machines[1:]:
        node.start("slurmd", "-D", "-f", conf, "-L", folder / f"{node.name}.log", **quiet)
    return {"SLURM_CONF": str(conf)}
