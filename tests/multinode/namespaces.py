"""Several machines on this one: namespaces of processes, network and mounts, joined by a bridge.

Nothing of it is seen outside, no rights are needed where user namespaces are allowed, and all of it is gone when this
process is: a machine ends, with all of its processes, when its command does or its end of a pipe closes.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import psutil

HOST = "10.77.0.1"
"""The address of the bridge: who is not on a machine of the site."""
BUCKET = "10.77.0.3"
"""A second address of the bridge, which can be taken away for a while."""
DISK = "512m"
"""The size of a machine's own disk."""
NEEDED = ("unshare", "nsenter", "ip", "mount", "bash")

_BRIDGE = f"""
set -e
ip link set lo up
ip link add bridge type bridge
ip addr add {HOST}/24 dev bridge
ip addr add {BUCKET}/24 dev bridge
ip link set bridge up
echo ready
read -r _
"""

# The whole disk is read-only, what is under $HOME and in shared memory is the machine's own and goes with it. The route
# leads nowhere: programs find the machine's address by asking which one they would use to reach the world.
_BOOT = """
set -e
ip link set lo up
mount -t tmpfs -o size=DISK none "$HOME"
mount -t tmpfs none /dev/shm
mount -o remount,bind,ro /
hostname "$1"
echo booted
read -r _
ip addr add "$2/24" dev eth0
ip link set eth0 up
ip route add default via "$3"
shift 3
cd "$HOME"
echo plugged
exec 3<&0
(read -r _ <&3 || kill -KILL -1) &
"$@" </dev/null >&2
""".replace("DISK", DISK)

# A socket belongs to the network that it was made in, whoever holds it.
_LISTEN = """
import socket, sys
server = socket.create_server((sys.argv[1], int(sys.argv[2])), backlog=256)
socket.send_fds(socket.socket(fileno=int(sys.argv[3])), [b"."], [server.fileno()])
"""


class NotAllowed(Exception):
    """This machine has no namespaces for us; says why."""


class Machine:
    """A machine of the site, from its boot to its end."""

    def __init__(self, process: subprocess.Popen[str], log: Path, port: str) -> None:
        self.process = process
        self.log = log
        """What its command says."""
        self.port = port
        """Its end of the cable on the bridge."""

    def titles(self) -> list[tuple[int, str]]:
        """(process id as seen from here, command line) of each of its processes."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                found.append((process.pid, " ".join(process.cmdline())))
            except psutil.NoSuchProcess:
                continue
        return found


class Site:
    """A network of its own with a bridge, to which machines are plugged. Use it in a `with`."""

    def __init__(self, folder: Path) -> None:
        """`folder` is an empty one for $HOME of all machines, each of which has its own disk there; and for logs."""
        self.home, self.logs = folder / "home", folder
        self._machines: list[Machine] = []
        self._started: list[subprocess.Popen[str]] = []
        self._numbers = itertools.count(1)

    def __enter__(self) -> Site:
        """Make the network.

        Raises:
            NotAllowed: it cannot be made here.
        """
        if missing := [name for name in NEEDED if shutil.which(name, path=_PATH) is None]:
            raise NotAllowed(f"no {', '.join(missing)} on this machine")
        self.home.mkdir()
        command = ["unshare", "--user", "--map-root-user", "--net", "bash", "-c", _BRIDGE]
        self._process = _start(command, os.environ, self.logs / "site.log")
        self._inside = ["nsenter", "--target", str(self._process.pid), "--user", "--net", "--preserve-credentials"]
        _expect(self._process, "ready", self.logs / "site.log")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in self._started:
            _end(process)
        for machine in list(self._machines):
            self.kill(machine)
        _end(self._process)

    @property
    def pid(self) -> int:
        """The process that keeps the network."""
        return self._process.pid

    def boot(self, name: str, address: str, command: Sequence[str], environment: Mapping[str, str]) -> Machine:
        """A new machine that runs the command; a machine of the same address must be gone.

        Raises:
            NotAllowed: it cannot be made here.
        """
        unshare = ["unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        number = next(self._numbers)
        log, port = self.logs / f"{name}-{number}.log", f"port{number}"
        environment = {**environment, "HOME": str(self.home), "TMPDIR": str(self.home)}
        words = [*self._inside, *unshare, "bash", "-c", _BOOT, "machine", name, address, HOST, *command]
        machine = Machine(_start(words, environment, log), log, port)
        self._machines.append(machine)
        _expect(machine.process, "booted", log)
        # An address keeps its hardware address: the others remember it for half a minute.
        hardware = f"02:00:00:00:00:{int(address.rsplit('.', 1)[1]):02x}"
        peer = ["peer", "name", "eth0", "address", hardware, "netns", str(machine.process.pid)]
        self._ip("link", "add", port, "type", "veth", *peer)
        self._ip("link", "set", port, "master", "bridge", "up")
        assert machine.process.stdin
        machine.process.stdin.write("\n")
        machine.process.stdin.flush()
        _expect(machine.process, "plugged", log)
        return machine

    def kill(self, machine: Machine) -> None:
        """SIGKILL to all of its processes at once."""
        self._machines.remove(machine)
        _end(machine.process)
        subprocess.run([*self._inside, "ip", "link", "delete", machine.port], capture_output=True, env=_environment())

    def unplug(self, machine: Machine) -> None:
        """Pull its cable: nobody hears of it any more, not even that a connection has closed."""
        self._ip("link", "set", machine.port, "down")

    def plug(self, machine: Machine) -> None:
        """Put its cable back; what its connections had under way is sent again."""
        self._ip("link", "set", machine.port, "up")

    @contextmanager
    def slowed(self, machine: Machine, seconds: float, loss: float) -> Iterator[None]:
        """Inside, what the machine sends and gets comes so many seconds late, or is lost with that probability."""
        near, far = f"{machine.port}n", f"{machine.port}f"
        self._ip("link", "add", near, "type", "veth", "peer", "name", far)
        self._ip("link", "set", far, "up")
        self._ip("link", "set", machine.port, "nomaster")
        self._ip("link", "set", near, "master", "bridge", "up")
        program = str(Path(__file__).with_name("slow_link.py"))
        given = [sys.executable, "-I", "-S", program, machine.port, far, str(seconds), str(loss)]
        log = self.logs / f"{machine.port}-slow.log"
        relay = _start([*self._inside, *given], _environment(), log)
        try:
            _expect(relay, "ready", log)
            yield
            assert relay.poll() is None, log.read_text()
        finally:
            _end(relay)
            self._ip("link", "delete", near)
            if machine in self._machines:
                self._ip("link", "set", machine.port, "master", "bridge")

    @contextmanager
    def without(self, address: str) -> Iterator[None]:
        """Inside, an address of the bridge is nobody's: connections to it stay silent, new ones have no way."""
        self._ip("addr", "del", f"{address}/24", "dev", "bridge")
        try:
            yield
        finally:
            self._ip("addr", "add", f"{address}/24", "dev", "bridge")

    def fill_disk(self, machine: Machine) -> Path:
        """Fill a machine's own disk; returns the file that fills it, as `on_machine` takes it."""
        path = self.home / "filler"
        # Until there is no room: rc 1.
        self.on_machine(machine, "dd", "if=/dev/zero", f"of={path}", "bs=64k", check=False)
        return path

    def on_machine(self, machine: Machine, *words: str, check: bool = True) -> str:
        """The output of a command that sees a machine's disk."""
        words = ("nsenter", "--target", str(machine.process.pid), "--user", "--mount", "--preserve-credentials", *words)
        return subprocess.run(words, check=check, capture_output=True, text=True, env=_environment()).stdout

    def start(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> subprocess.Popen[str]:
        """A process with this machine's disk and the site's network; stdout and stderr in one."""
        words = [*self._inside, *command]
        piped = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(words, env=dict(environment), cwd=folder, text=True, **piped)  # type: ignore[call-overload]
        self._started.append(process)
        return process  # type: ignore[no-any-return]

    def listen(self, address: str, port: int) -> socket.socket:
        """A server socket at an address of the bridge, for a thread of this very process."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            command = [
                *self._inside,
                sys.executable,
                "-I",
                "-S",
                "-c",
                _LISTEN,
                address,
                str(port),
                str(theirs.fileno()),
            ]
            subprocess.run(command, check=True, pass_fds=[theirs.fileno()], env=_environment())
            _, sent, _, _ = socket.recv_fds(ours, 1, 1)
        return socket.socket(fileno=sent[0])

    def _ip(self, *words: str) -> None:
        ran = subprocess.run([*self._inside, "ip", *words], capture_output=True, text=True, env=_environment())
        if ran.returncode:
            raise NotAllowed(f"ip {' '.join(words)}: {ran.stderr.strip()}")


_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": _PATH}


def _start(command: list[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[str]:
    with log.open("w") as file:
        return subprocess.Popen(
            command,
            env={**environment, "PATH": f"{environment.get('PATH', '')}:{_PATH}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            # Ctrl-C at the terminal is for the test alone, which then ends what it has started.
            start_new_session=True,
        )


def _expect(process: subprocess.Popen[str], word: str, log: Path) -> None:
    """Wait for the line; a process that ends before could not make its namespaces."""
    assert process.stdout
    if process.stdout.readline().strip() != word:
        process.wait()
        raise NotAllowed(" ".join(log.read_text().split()) or f"{word} never came")


def _end(process: subprocess.Popen[str]) -> None:
    everyone = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            stream.close()
    # The kernel ends the others; until it has, their memory is still taken.
    psutil.wait_procs(everyone, timeout=30)
