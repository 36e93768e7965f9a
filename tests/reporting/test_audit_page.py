"""The audit's page: complete, self-contained, and its examples are images of the datasets."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np

from cxrscale.io import read_artifact
from cxrscale.reporting import audit_page
from cxrscale.shards import Audit, audit, leakage
from tests.reporting.pages import read_page


def test_the_page_is_complete_and_needs_no_network(nih_shards: str, siim_shards: str, tmp_path: Path) -> None:
    result = audit.audit(nih_shards, siim_shards)
    page = read_page(audit_page.write(result, str(tmp_path / "audit.html")))
    assert page.count["svg"] > 3
    assert page.count["img"] == audit_page.EXAMPLES
    assert all(name in page.text for name in ("Cardiomegaly", "augment.mean=", "pack.size=64", result.manifest))

    assert read_artifact(Audit, str(tmp_path / "audit.json"), "") == result
    assert audit_page.render(result) == page.source


def test_examples_show_findings_and_masks(siim_shards: str, nih_shards: str) -> None:
    sets = leakage.join_datasets(nih_shards)
    data = sets.data
    shown = audit_page.examples(sets)
    assert {"Cardiomegaly", "Effusion", "Mass"} <= {name for e in shown for name in e.title.split(", ")}
    assert len({example.image_id for example in shown}) == audit_page.EXAMPLES
    assert all(example.caption.startswith("train") for example in shown[:8])
    order = np.random.default_rng(0).permutation(len(data))
    shuffled = replace(data, table=data.table.take(order))
    assert [e.image_id for e in audit_page.examples(replace(sets, data=shuffled))] == [e.image_id for e in shown]
    masked = audit_page.examples(leakage.join_datasets(siim_shards))
    assert [bool(example.thumbnail.outlines) for example in masked].count(True) >= 4
    assert all(("mask" in example.caption) == bool(example.thumbnail.outlines) for example in masked)


def test_a_lost_tar_file_leaves_a_page_that_says_so(nih_shards: str, tmp_path: Path) -> None:
    root = shutil.copytree(nih_shards, tmp_path / "nih").as_posix()
    for tar in Path(root).glob("*.tar"):
        tar.unlink()
    page = Path(audit_page.write(audit.audit(root), str(tmp_path / "audit.json"))).read_text()
    assert page.count("cannot be read: run `cxrscale verify`") == audit_page.EXAMPLES


def test_datasets_in_a_bucket_are_audited_there(s3: str, siim_shards: str) -> None:
    files = fsspec.filesystem("s3")
    files.put(siim_shards, f"{s3}/audited/", recursive=True)
    root = f"{s3}/audited/{Path(siim_shards).name}"
    page = audit_page.write(audit.audit(root), f"{s3}/audit.html")
    assert page == f"{s3}/audit.html"
    text = files.cat_file(page).decode()
    assert text.count("data:image/jpeg") == audit_page.EXAMPLES
    assert "cannot be read" not in text
    assert [dataset["root"] for dataset in json.loads(files.cat_file(f"{s3}/audit.json"))["datasets"]] == [root]
