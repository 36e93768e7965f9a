"""Checks of this machine or of a cluster: the result of each check, a verdict, and how to fix what is wrong."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from cxrscale.cluster import groups, nodes, probe, ray_session
from cxrscale.config import CACHE_FOLDER, DEFAULT_CACHE_FOLDER
from cxrscale.io import storage, terminal

OK, WARN, WRONG = "ok", "warn", "wrong"
COLORS = {OK: "green", WARN: "yellow", WRONG: "red"}
GIB, MB = 2**30, 1e6
THIS_MACHINE = "this machine"
"""The node's name without a cluster."""
MAX_TRANSFERS = 8
"""How many transfers between nodes are measured."""


@dataclass(frozen=True, slots=True)
class Row:
    """One check on one node."""

    check: str
    node: str
    result: str
    verdict: str = OK
    """ok, warn or wrong."""
    remedy: str = ""
    """How to fix it."""
    amount: float | None = None
    """`result` as a number; good rows that differ only in it are shown as a range."""


def examine(
    address: str | None = None, shards: Sequence[str] = (), root: str | None = None, remove_orphans: bool = False
) -> tuple[list[Row], dict[str, Any]]:
    """Check the cluster at `address`, at RAY_ADDRESS or already connected; without a cluster, this machine.

    Args:
        address: host:port of a cluster.
        shards: datasets that must be readable.
        root: where runs go; if it is a bucket, a small file is written to it.
        remove_orphans: remove the placement groups that no running job owns.

    Returns:
        The rows, and node -> its measurements by `probe`.

    Raises:
        UserError: no cluster answers at the address.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    folders = {"dataset cache": os.environ.get(CACHE_FOLDER) or DEFAULT_CACHE_FOLDER}
    remote_root = root is not None and storage.is_remote(root)
    if not remote_root:
        folders["runs folder"] = str(storage.local_path(root or "runs").absolute())
    inputs = (folders, tuple(shards), (root,) if root is not None and remote_root else ())
    if not address and not ray_session.connected():
        report = probe.light_facts(*inputs) | probe.heavy_facts_in_subprocess()
        return judge(THIS_MACHINE, report, cluster=False), {THIS_MACHINE: report}
    ray_session.connect(address)
    available = nodes.alive()
    print(f"checking {len(available)} nodes ...", file=sys.stderr)
    rows = [_capacity(available)]
    light = nodes.ask_each(probe.light_facts, available, *inputs)
    heavy = nodes.ask_each(probe.heavy_facts_in_subprocess, available, timeout=240)
    reports: dict[str, Any] = {}
    for node in available:
        failed = [answer for answer in (light[node.name], heavy[node.name]) if isinstance(answer, Exception)]
        if failed:
            rows.append(Row("answers", node.name, str(failed[0]), WRONG, "look at `ray status` and the node's logs"))
            continue
        reports[node.name] = light[node.name] | heavy[node.name]
        rows += judge(node.name, reports[node.name], cluster=True)
    rows += compare_versions(probe.versions(), {name: report["versions"] for name, report in reports.items()})
    answering = [node for node in available if node.name in reports]
    rows += [judge_clock(node.name, *_clock(node)) for node in answering]
    rows += _network(answering)
    return rows + _orphans(remove_orphans), reports


def judge(node: str, report: Mapping[str, Any], cluster: bool) -> list[Row]:
    """The rows of one machine, from `probe.light_facts` and `probe.heavy_facts` together."""
    versions = report["versions"]
    rows = [
        Row("python", node, versions["python"]),
        Row("packages", node, ", ".join(f"{name} {version}" for name, version in versions.items() if name != "python")),
        Row("CPUs", node, f"{report['cpus']}", amount=report["cpus"]),
        Row("memory", node, f"{report['memory'] / GIB:.0f} GiB", amount=report["memory"]),
        _shm(node, report["shm"], report["memory"]),
        _open_files(node, report["open_files"]),
    ]
    if report["no_bytecode"]:
        remedy = "unset PYTHONDONTWRITEBYTECODE where Ray starts: each worker recompiles torch, 11 s instead of 5"
        rows.append(Row("bytecode", node, "not saved", WARN, remedy))
    if report["auth_mode"] is None and cluster:
        remedy = "set RAY_AUTH_MODE=token on every node; Ray's default differs between its commands"
        rows.append(Row("RAY_AUTH_MODE", node, "not set", WARN, remedy))
    elif report["auth_mode"] == "disabled" and cluster:
        remedy = "whoever reaches the cluster can run code: start it with RAY_AUTH_MODE=token"
        rows.append(Row("RAY_AUTH_MODE", node, "disabled", WARN, remedy))
    elif report["auth_mode"] is not None:
        rows.append(Row("RAY_AUTH_MODE", node, report["auth_mode"]))
    rows += [_disk(node, name, disk) for name, disk in report["disks"].items()]
    for address, answer in {**report["reads"], **report["writes"]}.items():
        if "error" in answer:
            remedy = "check the address, the node's credentials (environment, role) and its network"
            rows.append(Row(address, node, answer["error"], WRONG, remedy))
        else:
            rows.append(Row(address, node, f"{answer['seconds'] * 1000:.0f} ms", amount=answer["seconds"]))
    return rows + _heavy(node, report)


def _heavy(node: str, report: Mapping[str, Any]) -> list[Row]:
    if "error" in report:
        remedy = "run `python -c 'import torch, nvidia.dali'` on the node; reinstall cxrscale if it fails"
        return [Row("torch, DALI", node, report["error"], WRONG, remedy)]
    gpus, smi = report["gpus"], report["smi"]
    if len(smi) > len(gpus):
        remedy = (
            f"torch needs CUDA {report['cuda']}: update the driver, or install the torch build for the driver's CUDA"
        )
        rows = [Row("GPUs", node, f"torch sees {len(gpus)} of {len(smi)}: {smi[0]}", WRONG, remedy)]
    elif gpus:
        names = ", ".join(f"{gpu['name']} {gpu['memory'] / GIB:.0f} GiB" for gpu in gpus)
        driver = f", driver {smi[0].split(', ')[1]}" if smi else ""
        rows = [Row("GPUs", node, f"{len(gpus)}: {names}{driver}, CUDA {report['cuda']}")]
    else:
        rows = [Row("GPUs", node, "none: training uses the CPU")]
    for device, answer in report["dali"].items():
        remedy = "" if answer == OK else "install the nvidia-dali-cuda package for the driver's CUDA"
        rows.append(Row(f"DALI on {device}", node, answer, OK if answer == OK else WRONG, remedy))
    kinds = [name for name in ("gloo", "nccl") if report[name]]
    missing = "nccl" if gpus and not report["nccl"] else "gloo" if not report["gloo"] else None
    remedy = f"install a torch build with {missing}" if missing else ""
    text = ", ".join(f"{kind} {report[kind]}" if kind == "nccl" else kind for kind in kinds) or "none"
    return [*rows, Row("collectives", node, text, WRONG if missing else OK, remedy)]


def _shm(node: str, shm: Mapping[str, int] | None, memory: int) -> Row:
    if shm is None:
        return Row("/dev/shm", node, "missing", WARN, "mount a tmpfs at /dev/shm: Ray stores its objects in it")
    text, size = f"{shm['total'] / GIB:.2g} GiB, {shm['free'] / GIB:.2g} free", shm["total"]
    remedy = "start the container with --shm-size=8g (Kubernetes: an emptyDir with medium Memory), for Ray's objects"
    if size <= 64 * 2**20:
        return Row("/dev/shm", node, text, WRONG, remedy)
    return (
        Row("/dev/shm", node, text, WARN, remedy) if size < min(8 * GIB, 0.3 * memory) else Row("/dev/shm", node, text)
    )


def _open_files(node: str, limit: int) -> Row:
    text = "no limit" if limit < 0 else f"{limit}"
    if 0 <= limit < 4096:
        return Row("open files", node, text, WARN, "raise the limit before Ray starts: ulimit -n 65536")
    return Row("open files", node, text)


def _disk(node: str, name: str, disk: Mapping[str, Any]) -> Row:
    if "error" in disk:
        setting = f"set {CACHE_FOLDER} to" if name == "dataset cache" else "give as --root"
        return Row(name, node, f"{disk['path']}: {disk['error']}", WRONG, f"{setting} a folder with write permission")
    speed = f"{disk['write'] / MB:.0f} MB/s write, {disk['read'] / MB:.0f} read"
    name, text = f"{name} {disk['path']}", f"{disk['free'] / GIB:.0f} GiB free, {speed}"
    if disk["free"] < 2 * GIB:
        return Row(name, node, text, WRONG, "free some space, or choose another disk")
    if disk["free"] < 20 * GIB:
        return Row(
            name,
            node,
            text,
            WARN,
            "little space: all of ChestX-ray14 at 512 pixels takes 6.2 GB, and a run needs some more",
        )
    if min(disk["write"], disk["read"]) < 50 * MB:
        return Row(name, node, text, WARN, "slow: choose a local SSD")
    return Row(name, node, text, amount=disk["write"])


def _capacity(available: Sequence[nodes.Node]) -> Row:
    cpus, gpus = sum(node.cpus for node in available), sum(node.gpus for node in available)
    text = f"{len(available)} nodes, {cpus:g} CPUs, {gpus:g} GPUs"
    remedy = "" if cpus else "start workers: no node offers CPUs"
    return Row("cluster", "all", text, OK if cpus else WRONG, remedy)


def compare_versions(driver: dict[str, str], by_node: dict[str, dict[str, str]]) -> list[Row]:
    """Whether every node has the same versions as the driver."""
    wrong = nodes.version_differences(driver, by_node)
    remedy = "run the same image on all nodes; `cxrscale submit` ships the code"
    return [Row("versions agree", "all", line, WRONG, remedy) for line in wrong] or [
        Row("versions agree", "all", "yes")
    ]


def judge_clock(node: str, seconds: float, uncertainty: float) -> Row:
    """The row of a clock that is this many seconds ahead of the driver's, plus or minus `uncertainty`."""
    text, error = f"{seconds:+.2f} s, +-{uncertainty:.2f}", max(0.0, abs(seconds) - uncertainty)
    verdict = WRONG if error > 60 else WARN if error > 1 else OK
    remedy = "synchronize it by NTP (chrony): signed requests to a bucket fail, and times in logs are wrong"
    return Row("clock", node, text, verdict, remedy if error > 1 else "", seconds)


def _clock(node: nodes.Node) -> tuple[float, float]:
    before = time.time()
    answer = nodes.ask_all(probe.clock, [node])[node.name]
    after = time.time()
    return answer - (before + after) / 2, (after - before) / 2


def _network(available: Sequence[nodes.Node]) -> list[Row]:
    pairs = list(zip(available, [*available[1:], available[0]], strict=True)) if len(available) > 1 else []
    rows = []
    for source, target in pairs[:MAX_TRANSFERS]:
        speed = nodes.measure_transfer(source, target)
        name, text = f"{source.name} to {target.name}", f"{speed / MB:.0f} MB/s"
        if speed < 120 * MB:
            remedy = "1 Gbit/s or less slows down training: put the nodes into one placement group or zone"
            rows.append(Row("network", name, text, WARN, remedy))
        else:
            rows.append(Row("network", name, text, amount=speed))
    return rows


def _orphans(remove: bool) -> list[Row]:
    rows = []
    for orphan in groups.find_orphans():
        text = f"{orphan.name or orphan.id[:12]} of ended job {orphan.job}: {orphan.state.lower()}, {orphan.bundles}"
        if remove:
            groups.remove(orphan)
            rows.append(Row("orphans", "all", f"removed {text}"))
        else:
            rows.append(Row("orphans", "all", text, WRONG, "cxrscale doctor --remove-orphans"))
    return rows or [Row("orphans", "all", "none")]


def merge_rows(rows: Iterable[Row]) -> list[Row]:
    """One row per result instead of one per node; good rows that differ only in their amount become a range."""
    rows = list(rows)
    all_nodes = {row.node for row in rows if row.check == "CPUs"}
    alike: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        result = "" if row.verdict == OK and row.amount is not None else row.result
        alike.setdefault((row.check, result, row.remedy), []).append(row)
    merged = []
    for group in alike.values():
        least, most = (edge(group, key=lambda row: row.amount or 0.0) for edge in (min, max))
        text = least.result if least.result == most.result else f"{least.result} ... {most.result}"
        names = [row.node for row in group]
        node = f"all {len(all_nodes)}" if len(all_nodes) > 1 and set(names) == all_nodes else ", ".join(names)
        merged.append(Row(least.check, node, text, least.verdict, least.remedy))
    return merged


def show(rows: Iterable[Row]) -> None:
    """Print the rows as a table."""
    table = Table("check", "node", "result", "verdict", "how to fix")
    for row in merge_rows(rows):
        table.add_row(row.check, row.node, row.result, Text(row.verdict, COLORS[row.verdict]), row.remedy)
    terminal.show(table)


def write(rows: Iterable[Row], reports: Mapping[str, Any], out: str) -> None:
    """Write the rows and the measurements of all nodes as JSON."""
    content = {"checks": [asdict(row) for row in rows], "nodes": reports}
    storage.write(out, json.dumps(content, indent=2) + "\n")
