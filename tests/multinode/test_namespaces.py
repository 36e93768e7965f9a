"""Machines of the multi-node tests: apart from each other, joined by a network, and gone when they should be."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from tests.multinode.namespaces import Machine, Site

ADDRESSES = ("10.77.0.21", "10.77.0.22")
SERVES = "import http.server; http.server.test(http.server.SimpleHTTPRequestHandler, port=8000)"
ASKS = f"""
import pathlib, time, urllib.request
pathlib.Path("mine").touch()
while True:
    try:
        print(urllib.request.urlopen("http://{ADDRESSES[0]}:8000", timeout=1).read().decode(), flush=True)
    except OSError as error:
        print(error, flush=True)
    time.sleep(0.1)
"""
LEAVES = """
import os, signal, sys
from pathlib import Path
from tests.multinode.namespaces import Site

with Site(Path(sys.argv[1])) as site:
    machine = site.boot("left", "10.77.0.21", ["sh", "-c", "sleep 600 & sleep 600"], os.environ)
    while len(machine.titles()) < 5:
        pass
    print(site.pid, machine.process.pid, *(pid for pid, _ in machine.titles()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def until(true: Callable[[], bool], machine: Machine) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, machine.log.read_text()
        time.sleep(0.02)


def python(program: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", program]


def test_machines_share_a_network_and_nothing_else(site: Site) -> None:
    one = site.boot("one", ADDRESSES[0], python(SERVES), os.environ)
    two = site.boot("two", ADDRESSES[1], python(ASKS), os.environ)
    until(lambda: "Directory listing" in two.log.read_text(), two)
    # What one wrote into the folder of the same name is not among what the other has there.
    assert "mine" not in two.log.read_text()
    assert not list(site.home.iterdir())
    site.unplug(one)
    until(lambda: two.log.read_text().rstrip().endswith(("timed out>", "No route to host>")), two)
    left = [pid for pid, _ in one.titles()]
    assert left
    site.kill(one)
    assert not any(map(psutil.pid_exists, left))
    site.kill(two)


def test_a_killed_process_takes_its_machines_with_it(site: Site, tmp_path: Path) -> None:  # noqa: ARG001 - or skipped
    root = Path(__file__).resolve().parents[2]
    ran = subprocess.run([sys.executable, "-c", LEAVES, tmp_path], cwd=root, capture_output=True, text=True, timeout=60)
    pids = [int(word) for word in ran.stdout.split()]
    assert len(pids) >= 6, ran.stderr
    ending = []
    for pid in pids:
        # They are going while this looks at them.
        with suppress(psutil.NoSuchProcess):
            ending.append(psutil.Process(pid))
    _, alive = psutil.wait_procs(ending, timeout=30)
    assert not alive


ASK = f"""
import sys, time, urllib.request
began = time.monotonic()
try:
    urllib.request.urlopen("http://{ADDRESSES[0]}:8000", timeout=30).read()
    print(time.monotonic() - began)
except OSError as error:
    print(error)
"""


def asked(site: Site, folder: Path) -> str:
    """What a request to the first machine says: how many seconds it took, or why it failed."""
    out, _ = site.start(python(ASK), os.environ, folder).communicate(timeout=60)
    return out


def test_a_link_can_be_slow_or_away_and_is_whole_afterwards(site: Site, tmp_path: Path) -> None:
    machine = site.boot("slow", ADDRESSES[0], python(SERVES), os.environ)
    until(lambda: "refused" not in asked(site, tmp_path), machine)
    with site.slowed(machine, seconds=0.1, loss=0.0):
        # A round trip to connect and one for the answer.
        assert float(asked(site, tmp_path)) >= 0.4
    site.unplug(machine)
    assert "No route to host" in asked(site, tmp_path)
    site.plug(machine)
    assert float(asked(site, tmp_path)) > 0
    site.kill(machine)


def test_a_machines_disk_is_full_alone(site: Site) -> None:
    one = site.boot("one", ADDRESSES[0], ["sleep", "600"], os.environ)
    two = site.boot("two", ADDRESSES[1], ["sleep", "600"], os.environ)
    filler = site.fill_disk(one)
    free = [site.on_machine(machine, "df", "--output=avail", str(site.home)).split()[-1] for machine in (one, two)]
    assert free[0] == "0"
    assert int(free[1]) > 400_000
    site.on_machine(one, "rm", str(filler))
    assert site.on_machine(one, "df", "--output=avail", str(site.home)).split()[-1] != "0"
    site.kill(one)
    site.kill(two)
