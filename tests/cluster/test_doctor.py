"""The doctor's verdicts, and real checks of this machine and of the test session's cluster."""

import json
from pathlib import Path
from typing import Any

import pytest

from cxrscale.cluster import doctor, probe
from cxrscale.cluster.doctor import OK, WARN, WRONG, Row

GIB = 2**30


def healthy() -> dict[str, Any]:
    """The measurements of a GPU node without problems."""
    return {
        "versions": {"python": "3.11.7", "torch": "2.15.0"},
        "no_bytecode": False,
        "auth_mode": "token",
        "cpus": 16,
        "memory": 128 * GIB,
        "shm": {"total": 64 * GIB, "free": 60 * GIB},
        "open_files": 65536,
        "disks": {"dataset cache": {"path": "/cache", "free": 500 * GIB, "write": 9e8, "read": 2e9}},
        "reads": {"s3://cxr/nih": {"seconds": 0.03}},
        "writes": {},
        "cuda": "13.0",
        "gpus": [{"name": "H200", "memory": 140 * GIB}],
        "gloo": True,
        "nccl": "2.30.7",
        "dali": {"cpu": "ok", "cuda:0": "ok"},
        "smi": ["H200, 580.1, 143771 MiB"],
    }


def test_a_healthy_node_has_only_good_rows() -> None:
    rows = doctor.judge("a", healthy(), cluster=True)
    assert {row.verdict for row in rows} == {OK}
    assert [row.result for row in rows if row.check == "GPUs"] == ["1: H200 140 GiB, driver 580.1, CUDA 13.0"]


@pytest.mark.parametrize(
    ("change", "check", "verdict", "remedy"),
    [
        ({"shm": {"total": 64 * 2**20, "free": 0}}, "/dev/shm", WRONG, "--shm-size"),
        ({"shm": {"total": 2 * GIB, "free": 0}}, "/dev/shm", WARN, "--shm-size"),
        ({"shm": None}, "/dev/shm", WARN, "mount a tmpfs"),
        ({"open_files": 1024}, "open files", WARN, "ulimit -n"),
        ({"no_bytecode": True}, "bytecode", WARN, "unset PYTHONDONTWRITEBYTECODE"),
        ({"auth_mode": None}, "RAY_AUTH_MODE", WARN, "on every node"),
        ({"auth_mode": "disabled"}, "RAY_AUTH_MODE", WARN, "can run code"),
        ({"gpus": []}, "GPUs", WRONG, "update the driver"),
        ({"dali": {"cpu": "ok", "cuda:0": "no nvJPEG"}}, "DALI on cuda:0", WRONG, "nvidia-dali-cuda"),
        ({"nccl": None}, "collectives", WRONG, "torch build with nccl"),
        ({"gloo": False}, "collectives", WRONG, "torch build with gloo"),
        ({"error": "ImportError: libcuda"}, "torch, DALI", WRONG, "reinstall cxrscale"),
        ({"reads": {"s3://cxr/nih": {"error": "403"}}}, "s3://cxr/nih", WRONG, "credentials"),
        ({"disks": {"runs folder": {"path": "/r", "free": 0, "error": "Read-only"}}}, "runs folder", WRONG, "--root"),
        (
            {"disks": {"runs folder": {"path": "/r", "free": GIB, "write": 9e8, "read": 9e8}}},
            "runs folder /r",
            WRONG,
            "free",
        ),
        (
            {"disks": {"runs folder": {"path": "/r", "free": 99 * GIB, "write": 1e7, "read": 9e8}}},
            "runs folder /r",
            WARN,
            "SSD",
        ),
    ],
)
def test_a_problem_has_a_verdict_and_a_remedy(change: dict[str, Any], check: str, verdict: str, remedy: str) -> None:
    rows = doctor.judge("a", healthy() | change, cluster=True)
    bad = [row for row in rows if row.verdict != OK]
    assert [(row.check, row.verdict) for row in bad] == [(check, verdict)]
    assert remedy in bad[0].remedy


def test_clocks_are_judged_by_the_certain_part_of_the_difference() -> None:
    assert doctor.judge_clock("a", 0.4, 0.01).verdict == OK
    assert doctor.judge_clock("a", -30.0, 0.01).verdict == WARN
    assert doctor.judge_clock("a", 90.0, 0.01).verdict == WRONG
    assert doctor.judge_clock("a", 90.0, 100.0).verdict == OK  # a slow answer proves nothing


def test_rows_with_the_same_result_are_merged() -> None:
    rows = [Row("CPUs", name, "8", amount=8) for name in "abc"]
    rows += [
        Row("network", f"{name} to x", f"{speed} MB/s", amount=speed) for name, speed in (("a", 5), ("b", 9), ("c", 7))
    ]
    rows += [Row("open files", "a", "1024", WARN, "raise it"), Row("open files", "b", "1024", WARN, "raise it")]
    merged = doctor.merge_rows(rows)
    assert [(row.node, row.result) for row in merged] == [
        ("all 3", "8"),
        ("a to x, b to x, c to x", "5 MB/s ... 9 MB/s"),
        ("a, b", "1024"),
    ]


def test_this_machine_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXRSCALE_CACHE", str(tmp_path / "cache"))
    report = probe.light_facts({"dataset cache": str(tmp_path / "cache")}) | probe.heavy_facts_in_subprocess()
    rows = doctor.judge("this machine", report, cluster=False)
    assert {row.verdict for row in rows if row.check in ("python", "DALI on cpu", "collectives")} == {OK}
    assert list(tmp_path.iterdir()) == []
    doctor.show(rows)
    shown = capsys.readouterr().out
    assert "collectives" in shown
    doctor.write(rows, {"this machine": report}, str(tmp_path / "doctor.json"))
    content = json.loads((tmp_path / "doctor.json").read_text())
    assert content["nodes"]["this machine"]["dali"]["cpu"] == "ok"
    assert {row["check"] for row in content["checks"]} == {row.check for row in rows}


@pytest.mark.usefixtures("ray_cluster")
def test_a_cluster_is_checked(nih_shards: str, s3: str) -> None:
    rows, reports = doctor.examine(shards=[nih_shards], root=f"{s3}/doctor")
    assert len(reports) == 1
    by_check = {row.check: row for row in rows}
    assert by_check["versions agree"].result == "yes"
    assert by_check[f"{s3}/doctor"].verdict == OK
    assert by_check["clock"].verdict == OK
    assert by_check["orphans"].result == "none"
    assert {row.check for row in rows if row.verdict == WRONG} == set()
