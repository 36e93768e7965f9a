"""Forged artifacts end a command with one line or are read; nothing outside of what was given is opened.

A few of each kind are tried here; `python -m tests.fuzz.artifacts` tries thousands.
"""

from __future__ import annotations

import json
import resource
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cxrscale.io import parquet
from cxrscale.models import load_tensors
from cxrscale.shards import manifest, verify
from cxrscale.sources.synthetic.archive import SyntheticPaths
from cxrscale.types import UserError
from tests.fuzz import hostile
from tests.fuzz.artifacts import KINDS, World, attempt, campaign, cheap, make_world, table, undamaged
from tests.small_datasets import MakeShards

RUNS = 4 * len(KINDS)


@pytest.fixture(scope="module")
def world(
    classifier_run: str, nih_shards: str, drawn: SyntheticPaths, tmp_path_factory: pytest.TempPathFactory
) -> World:
    root = tmp_path_factory.mktemp("forged")
    shutil.copy(next(drawn.nih.rglob("*.png")), root / "image.png")
    with cheap():
        return make_world(root, nih_shards, classifier_run)


def test_what_nobody_touched_is_read(world: World) -> None:
    assert undamaged(world) == {}


def test_forged_artifacts_are_one_line_or_read(world: World) -> None:
    ends = campaign(world, RUNS, 7, list(KINDS))
    print(table(ends))
    assert [(end.kind, end.number, end.fault) for end in ends if end.fault] == []
    assert len(ends) == RUNS
    assert sum(bool(end.code) for end in ends) > RUNS / 2  # harmless faults would prove nothing


def test_a_report_needs_epochs_but_no_version(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str, part: str | None = None) -> Callable[[bytes, Any], bytes]:
        def forge(data: bytes, _: Any) -> bytes:
            lines = [json.loads(line) for line in (data.splitlines() if part is None else [data])]
            for line in lines:
                (line if part is None else line[part]).pop(name)
                line.pop("seal", None)
                line.pop("crc", None)
            return "\n".join(map(json.dumps, lines)).encode()

        return forge

    report = (lambda w: ["report", str(w.run)],)
    forged = {"log": without("epoch"), "run.json": without("cxrscale", "versions")}
    kinds = {kind: replace(KINDS[kind], forge=forge, commands=report) for kind, forge in forged.items()}
    monkeypatch.setattr("tests.fuzz.artifacts.KINDS", kinds)
    with cheap():
        ends = [attempt(world, kind, 0, 0) for kind in kinds]
    assert [(end.code, end.fault) for end in ends] == [(2, ""), (0, "")]
    assert ends[0].said.endswith("a line of a validation has no epoch; remove that line")


def test_a_command_that_fails_otherwise_or_looks_elsewhere_is_a_fault(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise KeyError("x")

    def looks(*_: object) -> list[str]:
        (world.outside / "canary.tar").read_bytes()
        return []

    for what, said in ((fails, "KeyError"), (looks, "read ")):
        monkeypatch.setattr(verify, "verify", what)
        kinds = {"manifest": replace(KINDS["manifest"], forge=lambda data, _: data, commands=_VERIFY)}
        monkeypatch.setattr("tests.fuzz.artifacts.KINDS", kinds)
        assert attempt(world, "manifest", 0, 0).fault.startswith(said)


_VERIFY = (lambda w: ["verify", str(w.dataset)],)

Change = Callable[[dict[str, list[Any]], dict[str, Any]], None]


def _first(name: str, value: Any) -> Change:
    return lambda columns, _: columns[name].__setitem__(0, value)


def _about(name: str, value: Any) -> Change:
    def change(_: dict[str, list[Any]], about: dict[str, Any]) -> None:
        about["shards"] = {"part-00000.tar": {"blake3": "0" * 64, "bytes": 10**6}}
        about["shards"] |= {f"part-0000{n}.tar": {"blake3": "0" * 64, "bytes": 10**6} for n in (1, 2)}
        node = about
        *parents, leaf = name.split("/", 2)
        for parent in parents:
            node = node[parent]
        node[leaf] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_first("shard", "../../x.tar"), "column shard is not the name of a tar in the dataset's folder"),
        (_first("shard", "/etc/passwd"), "column shard is not the name of a tar"),
        (_first("shard", "s3://b/x.tar"), "column shard is not the name of a tar"),
        (_first("shard", ".tar"), "column shard is not the name of a tar"),
        (_first("image_offset", -1), "image_offset of row 0 is -1"),
        (_first("image_length", 0), "image_length of row 0 is 0"),
        (_first("mask_crc", None), "without all of mask_offset"),
        (_first("label.Effusion", 2), "label Effusion is 2 for an image"),
        (_first("width", 0), "width of row 0 is 0"),
        (_first("image_id", ""), "image_id of row 0 is ''"),
        (_first("patient", None), "column patient has no value in row 0"),
        (_first("spacing_row_mm", float("inf")), "spacing_row_mm of row 0 is inf"),
        (lambda columns, _: [values.clear() for values in columns.values()] and None, "has no images"),
        (lambda columns, _: columns.pop("split") and None, "has no column split"),
        (
            lambda columns, _: columns.update(key=[str(key) for key in columns["key"]]),
            "column key is string, not int64",
        ),
        (_about("shards/part-00000.tar/blake3", "../../x"), "metadata shards.part-00000.tar.blake3 is '../../x'"),
        (_about("shards/part-00000.tar/bytes", 600), "beyond the end of its tar"),
        (
            lambda _, about: about["shards"].update({"../x.tar": {"blake3": "0" * 64, "bytes": 1}}),
            "is not the name of a tar",
        ),
        (_about("shards", {"a.tar": {"blake3": "0" * 64, "bytes": 1}}), "is not among those of its metadata"),
        (_about("pack/codec", "bmp"), "metadata pack.codec is 'bmp'"),
        (_about("pack/size", -1), "metadata pack.size is -1"),
        (_about("format", True), "manifest format True"),
        (_about("quarantined", {"a": 1}), "metadata quarantined is"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(change: Change, said: str, make_shards: MakeShards) -> None:
    root = make_shards().table["root"][0].as_py()
    path = Path(root) / manifest.NAME
    rows = pq.ParquetFile(path).read(use_threads=False)
    about = json.loads(rows.schema.metadata[b"cxrscale"])
    columns = rows.to_pydict()
    change(columns, about)
    kinds = {name: rows.schema.field(name).type for name in columns}
    if columns.get("key") and isinstance(columns["key"][0], str):
        kinds["key"] = pa.string()
    fields = [pa.field(name, kind) for name, kind in kinds.items()]
    manifest.write(str(path), pa.table(columns, pa.schema(fields)), about)
    with pytest.raises(UserError) as caught:
        manifest.load(root)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bomb", hostile.BOMBS)
def test_a_small_table_takes_little_memory(bomb: str) -> None:
    data = hostile.bomb(bomb)
    assert len(data) < 1_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"which no table of ours does; remove it"):
        parquet.read_table(data, "x.parquet", "remove it")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_a_small_checkpoint_takes_little_memory(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(1).expand(10**6, 10**6)}}, tmp_path / "wide.pt")
    with pytest.raises(ValueError, match=r"1,000,000,000,000 values in 4 bytes"):
        load_tensors((tmp_path / "wide.pt").read_bytes())
    torch.save({"model": {"w": torch.zeros(3_000_000)}}, tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "zip.pt", "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match="unpack to"):
        load_tensors((tmp_path / "zip.pt").read_bytes())
