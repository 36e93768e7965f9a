"""Commands from a raw source to a dataset: shard, verify, audit, preview."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from cxrscale import config, sources
from cxrscale.cli import progress
from cxrscale.cli.group import Local, Overrides, RecipePath, app
from cxrscale.config import Recipe
from cxrscale.io import storage, terminal
from cxrscale.types import UserError

if TYPE_CHECKING:
    from cxrscale.shards import PackResult

# Each command imports what it runs: torch, Ray and DALI take seconds that `--help` and a typing mistake need not.


@app.command("shard")
def shard_command(
    source: Annotated[str, typer.Argument(help="The source's name: nih, siim, rsna or kermany.")],
    root: Annotated[str, typer.Argument(help="The source's folder or address.")],
    overrides: Overrides = None,
    out: Annotated[str, typer.Option(help="Where the dataset goes.")] = "shards",
    patients_from: Annotated[
        str | None, typer.Option(help="A dataset with the same images under their true patients (NIH, for SIIM).")
    ] = None,
    keep_map: Annotated[
        str | None, typer.Option(help="A private file outside the dataset: its ids and the source's own, as CSV.")
    ] = None,
    local: Local = False,
) -> None:
    """Pack a raw source into a dataset: cxrscale shard nih /data/nih --out shards/nih pack.size=512."""
    from cxrscale.shards import build, ids, pack

    tree = config.override({"pack": dict(sources.get(source).pack_defaults)}, overrides or [])
    settings = config.parse(Recipe, tree, where="shard").pack
    if keep_map is not None:
        ids.check_map_address(keep_map, out)
    total = [0, 0]
    with progress.bar(f"sharding {source}", None, "images") as bar:

        def on_shard(images: int, quarantined: int, planned: int) -> None:
            bar.set_total(planned)
            total[0] += images
            total[1] += quarantined
            bar.update(total[0], f"{total[1]} quarantined")

        prepared = build.prepare(source, root, settings, patients_from_dataset=patients_from, local=local)
        if keep_map is not None:
            ids.write_map(keep_map, out, prepared.private_map())
        packed = pack.pack(prepared, settings, out, local=local, progress=on_shard)
    if keep_map is not None:
        print(f"private map of the ids: {Path(keep_map).resolve()}")
    _show_quarantined(packed, {record.image_id: record.path for record in prepared.records})
    if packed.tiny_masks:
        print(
            f"{packed.tiny_masks} masks cover no stored pixel by half and keep one pixel; a larger pack.size shows them"
        )
    if packed.burned_in:
        print(f"{packed.burned_in} images have text burned in, they say; pack.burned_in=quarantine leaves them out")
    for line in prepared.book.lines(names=sys.stdout.isatty()) if prepared.book else ():
        print(terminal.printable(line))
    note = "" if packed.fresh else ", all from an earlier run"
    print(f"{packed.images} images, {packed.quarantined} quarantined{note}")
    print(packed.root if storage.is_remote(packed.root) else Path(packed.root).resolve())
    if packed.quarantined > settings.max_quarantined:
        quarantine = storage.join(packed.root, pack.QUARANTINE)
        raise UserError(f"{packed.quarantined} unreadable images, more than pack.max_quarantined; see {quarantine}")


def _show_quarantined(packed: PackResult, path_of: Mapping[str, str], at_most: int = 10) -> None:
    """Name the files to whoever sits at a terminal; logs and quarantine.jsonl have their ids only."""
    if not packed.quarantined or not sys.stderr.isatty():
        return
    from cxrscale.shards import pack

    lines = storage.read(storage.join(packed.root, pack.QUARANTINE)).decode().splitlines()
    for line in map(json.loads, lines[:at_most]):
        print(terminal.printable(f"quarantined {path_of[line['image_id']]}: {line['reason']}"), file=sys.stderr)
    if len(lines) > at_most:
        print(f"and {len(lines) - at_most} more in quarantine.jsonl", file=sys.stderr)


@app.command("verify")
def verify_command(
    root: Annotated[str, typer.Argument(help="A dataset, a run or a search.")],
    mend: Annotated[
        bool,
        typer.Option("--repair", help="First rewrite what of a dataset can be rebuilt: indices and fingerprints."),
    ] = False,
) -> None:
    """Re-read every byte of a dataset or run: files against their digests, tables against images and JSON."""
    from cxrscale.shards import manifest, repair, verify

    if not storage.exists(storage.join(root, manifest.NAME)) and _is_run(root):
        if mend:
            raise UserError(f"{root} is a run, and --repair rewrites what of a dataset can be rebuilt; leave it out")
        _verify_run(root)
        return
    for line in repair.repair(root) if mend else ():
        print(line)
    with progress.bar(f"verifying {root}", None, "images") as bar:
        faults = verify.verify(root, lambda count: bar.update(bar.done + count))
    for line in faults:
        print(terminal.printable(line))
    if faults:
        raise UserError(
            f"{root}: {len(faults)} faults; --repair rewrites indices and fingerprints; for all else remove the "
            "damaged tars and the manifest, then shard again"
        )
    print(root)


def _is_run(root: str) -> bool:
    from cxrscale.training import resume, run_info

    return any(storage.exists(storage.join(root, name)) for name in (run_info.RUN_INFO, resume.SEARCH_INFO))


def _verify_run(run: str) -> None:
    from cxrscale.training import run_files

    with progress.bar(f"verifying {run}", None, "files") as bar:
        files = run_files.verify(run, lambda: bar.update(bar.done + 1))
    for line in files.faults:
        print(terminal.printable(line))
    for name in files.without:
        print(terminal.printable(f"{name}: carries no digest; nothing is known of it"))
    kept_by_others = f", {files.others} of Weights & Biases and Ray not checked" if files.others else ""
    print(f"{files.checked} files fit the digest that they carry, {len(files.without)} carry none{kept_by_others}")
    if files.faults:
        raise UserError(
            f"{run}: {len(files.faults)} faults; take these files from a backup, or write them again: reports by "
            "`cxrscale evaluate`, checkpoints by training again"
        )
    print(run)


@app.command()
def audit(
    shards: Annotated[list[str], typer.Argument(help="One or more datasets that are meant to be used together.")],
    out: Annotated[str, typer.Option(help="The page; the JSON goes beside it.")] = "audit.html",
) -> None:
    """Count findings, splits, people, pixels and masks; name the patients and images that splits or sets share."""
    from cxrscale.reporting import audit_page
    from cxrscale.shards import audit as auditing

    result = auditing.audit(*shards)
    leaks = result.leaks
    table = Table(title=f"{result.images} images of {leaks.patients} patients")
    for heading in ("present", *result.splits):
        table.add_column(heading, justify="right" if heading != "present" else "left")
    for finding, counts in result.findings.items():
        table.add_row(finding, *(str(counts[split].present) for split in result.splits))
    table.add_row("all images", *map(str, result.splits.values()), style="bold")
    terminal.show(table)
    print(f"{len(result.quarantined)} quarantined, {len(leaks.patients_in_two_splits)} patients in two splits")
    for line in result.notes:
        print(terminal.printable(f"note: {line}"))
    for line in leaks.not_checked:
        print(terminal.printable(f"not checked: {line}"))
    for line in leaks.verdict:
        print(terminal.printable(line))
    page = audit_page.write(result, out)
    print(page if storage.is_remote(page) else Path(page).resolve())


@app.command("preview")
def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Annotated[str, typer.Option(help="The page.")] = "preview.html",
) -> None:
    """Look before you train: images as the model will see them, and the first epoch's sampling, counted."""
    from cxrscale.reporting import batch_preview

    resolved = config.load_recipe(recipe, overrides or [])
    for line in batch_preview.write(resolved, Path(recipe).stem, out):
        print(terminal.printable(line))
    print(out if storage.is_remote(out) else Path(out).resolve())
