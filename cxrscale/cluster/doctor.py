"""What this machine or cluster can do, a verdict on each finding, and what mends it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from cxrscale.cluster import nodes, probe, ray_session
from cxrscale.config import CACHE_FOLDER
from cxrscale.io import storage

OK, WARN, WRONG = "ok", "warn", "wrong"
COLORS = {OK: "green", WARN: "yellow", WRONG: "red"}
GIB, MB = 2**30, 1e6
HERE = "this machine"
PAIRS = 8
"""How many node-to-node transfers are measured."""


@dataclass(frozen=True, slots=True)
class Row:
    """One finding on one node."""

    check: str
    node: str
    found: str
    verdict: str = OK
    remedy: str = ""
    amount: float | None = None
    """What `found` states, as a number; good rows that differ in it alone are shown as a range."""


def examine(
    address: str | None = None, shards: Sequence[str] = (), root: str | None = None, free_orphans: bool = False
) -> tuple[list[Row], dict[str, Any]]:
    """Examine the cluster at `address`, at RAY_ADDRESS or already joined; else this machine.

    Args:
        shards: datasets that must be readable.
        root: where runs go; a bucket is written to.
        free_orphans: remove the placement groups that no living job owns.

    Returns:
        The findings, and what each node said.

    Raises:
        UserError: no cluster answers at the address.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    folders = {"shard cache": os.environ.get(CACHE_FOLDER) or "~/.cache/cxrscale"}
    remote_root = root is not None and storage.is_remote(root)
    if not remote_root:
        folders["run root"] = str(storage.local_path(root or "runs").absolute())
    asked = (folders, tuple(shards), (root,) if root is not None and remote_root else ())
    if not address and not ray_session.connected():
        said = {HERE: probe.light_facts(*asked) | probe.heavy_facts_in_subprocess()}
        return judge(HERE, said[HERE], cluster=False), said
    ray_session.connect(address)
    there = nodes.alive()
    print(f"asking {len(there)} nodes ...", file=sys.stderr)
    rows = [_room(there)]
    light, heavy = (
        nodes.ask_each(probe.light_facts, there, *asked),
        nodes.ask_each(probe.heavy_facts_in_subprocess, there, timeout=240),
    )
    said = {}
    for node in there:
        silent = [answer for answer in (light[node.name], heavy[node.name]) if isinstance(answer, Exception)]
        if silent:
            rows.append(Row("answers", node.name, str(silent[0]), WRONG, "look at `ray status` and the node's logs"))
            continue
        said[node.name] = light[node.name] | heavy[node.name]
        rows += judge(node.name, said[node.name], cluster=True)
    rows += compare_versions(probe.versions(), {name: answer["versions"] for name, answer in said.items()})
    speaking = [node for node in there if node.name in said]
    rows += [judge_clock(node.name, *_clock(node)) for node in speaking]
    rows += _network(speaking)
    return rows + _orphans(free_orphans), said


def judge(node: str, said: Mapping[str, Any], cluster: bool) -> list[Row]:
    """The verdicts on what one machine said of itself (machine.facts and machine.heavy together)."""
    versions = said["versions"]
    rows = [
        Row("python", node, versions["python"]),
        Row("packages", node, ", ".join(f"{name} {of}" for name, of in versions.items() if name != "python")),
        Row("CPUs", node, f"{said['cpus']}", amount=said["cpus"]),
        Row("memory", node, f"{said['memory'] / GIB:.0f} GiB", amount=said["memory"]),
        _shm(node, said["shm"], said["memory"]),
        _open_files(node, said["open_files"]),
    ]
    if said["no_bytecode"]:
        remedy = "unset PYTHONDONTWRITEBYTECODE where Ray starts: each worker compiles torch anew, 11 s instead of 5"
        rows.append(Row("bytecode", node, "not kept", WARN, remedy))
    if said["auth_mode"] is None and cluster:
        remedy = "set RAY_AUTH_MODE to token or disabled on every node; Ray's own choice differs between its commands"
        rows.append(Row("RAY_AUTH_MODE", node, "not set", WARN, remedy))
    elif said["auth_mode"] is not None:
        rows.append(Row("RAY_AUTH_MODE", node, said["auth_mode"]))
    rows += [_disk(node, name, disk) for name, disk in said["disks"].items()]
    for address, reached in {**said["reads"], **said["writes"]}.items():
        if "fault" in reached:
            remedy = "check the address, the node's credentials (environment, role) and its route there"
            rows.append(Row(address, node, reached["fault"], WRONG, remedy))
        else:
            rows.append(Row(address, node, f"{reached['seconds'] * 1000:.0f} ms", amount=reached["seconds"]))
    return rows + _heavy(node, said)


def _heavy(node: str, said: Mapping[str, Any]) -> list[Row]:
    if "fault" in said:
        remedy = "run `python -c 'import torch, nvidia.dali'` there; install cxrscale again if it fails"
        return [Row("torch, DALI", node, said["fault"], WRONG, remedy)]
    gpus, smi = said["gpus"], said["smi"]
    if len(smi) > len(gpus):
        remedy = f"torch wants CUDA {said['cuda']}: update the driver, or install the torch build for the driver's CUDA"
        rows = [Row("GPUs", node, f"torch sees {len(gpus)} of {len(smi)}: {smi[0]}", WRONG, remedy)]
    elif gpus:
        names = ", ".join(f"{gpu['name']} {gpu['memory'] / GIB:.0f} GiB" for gpu in gpus)
        driver = f", driver {smi[0].split(', ')[1]}" if smi else ""
        rows = [Row("GPUs", node, f"{len(gpus)}: {names}{driver}, CUDA {said['cuda']}")]
    else:
        rows = [Row("GPUs", node, "none: the CPU trains")]
    for device, answer in said["dali"].items():
        remedy = "" if answer == OK else "install the nvidia-dali-cuda package for the driver's CUDA"
        rows.append(Row(f"DALI on {device}", node, answer, OK if answer == OK else WRONG, remedy))
    kinds = [name for name in ("gloo", "nccl") if said[name]]
    missing = "nccl" if gpus and not said["nccl"] else "gloo" if not said["gloo"] else None
    remedy = f"install a torch build with {missing}" if missing else ""
    found = ", ".join(f"{kind} {said[kind]}" if kind == "nccl" else kind for kind in kinds) or "none"
    return [*rows, Row("collectives", node, found, WRONG if missing else OK, remedy)]


def _shm(node: str, shm: Mapping[str, int] | None, memory: int) -> Row:
    if shm is None:
        return Row("/dev/shm", node, "not there", WARN, "mount a tmpfs there: Ray keeps its objects in it")
    text, size = f"{shm['total'] / GIB:.2g} GiB, {shm['free'] / GIB:.2g} free", shm["total"]
    remedy = "give the container --shm-size=8g (Kubernetes: an emptyDir with medium Memory); Ray's objects lie there"
    if size <= 64 * 2**20:
        return Row("/dev/shm", node, text, WRONG, remedy)
    return (
        Row("/dev/shm", node, text, WARN, remedy) if size < min(8 * GIB, 0.3 * memory) else Row("/dev/shm", node, text)
    )


def _open_files(node: str, limit: int) -> Row:
    text = "no limit" if limit < 0 else f"{limit}"
    if 0 <= limit < 4096:
        return Row("open files", node, text, WARN, "raise it before Ray starts: ulimit -n 65536")
    return Row("open files", node, text)


def _disk(node: str, name: str, disk: Mapping[str, Any]) -> Row:
    if "fault" in disk:
        where = f"set {CACHE_FOLDER}" if name == "shard cache" else "give another --root"
        return Row(name, node, f"{disk['path']}: {disk['fault']}", WRONG, f"{where} to a folder you may write to")
    speed = f"{disk['write'] / MB:.0f} MB/s write, {disk['read'] / MB:.0f} read"
    name, text = f"{name} {disk['path']}", f"{disk['free'] / GIB:.0f} GiB free, {speed}"
    if disk["free"] < 2 * GIB:
        return Row(name, node, text, WRONG, "free space there, or choose another disk")
    if disk["free"] < 20 * GIB:
        return Row(
            name, node, text, WARN, "little room: all of ChestX-ray14 at 512 pixels takes 6.2 GB, a run some more"
        )
    if min(disk["write"], disk["read"]) < 50 * MB:
        return Row(name, node, text, WARN, "slow: choose a local SSD")
    return Row(name, node, text, amount=disk["write"])


def _room(there: Sequence[nodes.Node]) -> Row:
    cpus, gpus = sum(node.cpus for node in there), sum(node.gpus for node in there)
    text = f"{len(there)} nodes, {cpus:g} CPUs, {gpus:g} GPUs"
    remedy = "" if cpus else "start workers: no node has CPUs to give"
    return Row("cluster", "all", text, OK if cpus else WRONG, remedy)


def compare_versions(here: dict[str, str], there: dict[str, dict[str, str]]) -> list[Row]:
    """Whether every node has the driver's versions."""
    wrong = nodes.version_differences(here, there)
    remedy = "run one image on all nodes; `cxrscale submit` ships the code"
    return [Row("versions agree", "all", line, WRONG, remedy) for line in wrong] or [
        Row("versions agree", "all", "yes")
    ]


def judge_clock(node: str, seconds: float, doubt: float) -> Row:
    """The verdict on a clock that is so many seconds ahead of the driver's, give or take `doubt`."""
    text, off = f"{seconds:+.2f} s, +-{doubt:.2f}", max(0.0, abs(seconds) - doubt)
    remedy = "keep time by NTP (chrony): signed requests to a bucket fail, and logs mislead"
    return Row("clock", node, text, WRONG if off > 60 else WARN if off > 1 else OK, remedy if off > 1 else "", seconds)


def _clock(node: nodes.Node) -> tuple[float, float]:
    before = time.time()
    answer = nodes.ask_all(probe.clock, [node])[node.name]
    after = time.time()
    return answer - (before + after) / 2, (after - before) / 2


def _network(there: Sequence[nodes.Node]) -> list[Row]:
    pairs = list(zip(there, [*there[1:], there[0]], strict=True)) if len(there) > 1 else []
    rows = []
    for source, target in pairs[:PAIRS]:
        speed = nodes.transfer(source, target)
        name, text = f"{source.name} to {target.name}", f"{speed / MB:.0f} MB/s"
        if speed < 120 * MB:
            remedy = "1 Gbit/s or less: gradients will wait; put the nodes in one placement group or zone"
            rows.append(Row("network", name, text, WARN, remedy))
        else:
            rows.append(Row("network", name, text, amount=speed))
    return rows


def _orphans(free: bool) -> list[Row]:
    rows = []
    for orphan in nodes.orphans():
        text = f"{orphan.name or orphan.id[:12]} of ended job {orphan.job}: {orphan.state.lower()}, {orphan.bundles}"
        if free:
            nodes.free(orphan)
            rows.append(Row("orphans", "all", f"freed {text}"))
        else:
            rows.append(Row("orphans", "all", text, WRONG, "cxrscale doctor --free-orphans"))
    return rows or [Row("orphans", "all", "none")]


def merged(rows: Iterable[Row]) -> list[Row]:
    """Rows that say the same of several nodes as one; good ones that differ in a number alone as a range."""
    rows = list(rows)
    everyone = {row.node for row in rows if row.check == "CPUs"}
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        same = "" if row.verdict == OK and row.amount is not None else row.found
        groups.setdefault((row.check, same, row.remedy), []).append(row)
    found = []
    for group in groups.values():
        least, most = (edge(group, key=lambda row: row.amount or 0.0) for edge in (min, max))
        text = least.found if least.found == most.found else f"{least.found} ... {most.found}"
        names = [row.node for row in group]
        node = f"all {len(everyone)}" if len(everyone) > 1 and set(names) == everyone else ", ".join(names)
        found.append(Row(least.check, node, text, least.verdict, least.remedy))
    return found


def show(rows: Iterable[Row]) -> None:
    """Print the findings as a table."""
    table = Table("check", "node", "found", "verdict", "remedy")
    for row in merged(rows):
        table.add_row(row.check, row.node, row.found, f"[{COLORS[row.verdict]}]{row.verdict}[/]", row.remedy)
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)


def write(rows: Iterable[Row], said: Mapping[str, Any], out: str) -> None:
    """The findings, and all that the nodes said, as JSON."""
    listed = [asdict(row) for row in rows]
    storage.write(out, json.dumps({"findings": listed, "nodes": said}, indent=2) + "\n")
