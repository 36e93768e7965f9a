"""What packing costs, beside the bare work and beside what others use, interleaved in one run.

    python -m tests.benchmarks.pack --nih DIR --siim DIR [--rounds 5] [--out results/pack.json]

DIR are raw archives. Every contender of a round works on the same images, one after the other, so that a machine
that slows down slows all of them; ratios are medians over rounds of the ratio within a round. Peers that are not
installed are left out and named: pip install img2dataset litdata.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import platform
import resource
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import webdataset
from PIL import Image

from cxrscale import sources
from cxrscale.config import Pack
from cxrscale.io import rle_masks
from cxrscale.shards import build, layout, pack
from cxrscale.sources import siim
from cxrscale.types import ImageRecord

SIZE = 512
Work = Callable[[Path], object]


def cpu() -> float:
    """CPU seconds of this process and its finished children."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def bare(records: list[ImageRecord], out: Path) -> None:
    """OpenCV alone: decode, resize, encode; nothing is checked, nothing written but the images."""
    for record in records:
        gray = cv2.imdecode(np.fromfile(record.path, np.uint8), cv2.IMREAD_GRAYSCALE)
        assert gray is not None
        small = cv2.resize(gray, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
        jpeg = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
        (out / f"{Path(record.path).stem}.jpg").write_bytes(jpeg.tobytes())


def assigned(records: list[ImageRecord], settings: Pack) -> layout.SplitRecords:
    """The records with their splits, as `cxrscale shard` packs them."""
    return layout.SplitRecords(records, build.assign(records, settings))


def ours(records: list[ImageRecord], out: Path) -> None:
    """cxrscale shard nih --local once the tables are read: checked, with manifest, fingerprints, CRCs and digests."""
    settings = Pack(size=SIZE)
    pack.pack(assigned(records, settings), settings, str(out / "shards"), local=True)


def usual(records: list[ImageRecord], out: Path) -> None:
    """What most people write: PIL and webdataset.ShardWriter."""
    with webdataset.ShardWriter(str(out / "%05d.tar"), maxcount=2000, verbose=0) as writer:
        for record in records:
            image = Image.open(record.path).convert("L").resize((SIZE, SIZE), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=95)
            key = Path(record.path).stem
            writer.write({"__key__": key, "jpg": buffer.getvalue(), "json": json.dumps(dict(record.findings))})


def img2dataset_peer(records: list[ImageRecord], out: Path) -> None:
    """img2dataset over file:// addresses, one process, one thread."""
    from img2dataset import download  # type: ignore[import-not-found,unused-ignore]

    listed = out / "urls.txt"
    listed.write_text("\n".join(f"file://{record.path}" for record in records))
    download(
        url_list=str(listed),
        output_folder=str(out / "i2d"),
        image_size=SIZE,
        resize_mode="no",
        encode_quality=95,
        output_format="webdataset",
        processes_count=1,
        thread_count=1,
        number_sample_per_shard=2000,
        disallowed_header_directives=[],
        enable_wandb=False,
    )


def litdata_peer(records: list[ImageRecord], out: Path) -> None:
    """litdata.optimize with the bare OpenCV work as its function, one worker."""
    from litdata import optimize  # type: ignore[import-not-found,unused-ignore]

    optimize(
        fn=_litdata_sample,
        inputs=[record.path for record in records],
        output_dir=str(out / "lit"),
        chunk_bytes="64MB",
        num_workers=1,
        verbose=False,
    )


def _litdata_sample(path: str) -> dict[str, Any]:
    gray = cv2.imread(path, cv2.IMREAD_GRAYSCALE)
    assert gray is not None
    small = cv2.resize(gray, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return {"id": path, "jpg": cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()}


def measured(work: Work) -> dict[str, float]:
    """CPU and wall seconds of work in a fresh folder."""
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    try:
        wall, spent = time.perf_counter(), cpu()
        work(folder)
        return {"wall": time.perf_counter() - wall, "cpu": cpu() - spent}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def interleaved(contenders: dict[str, Work], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Rounds of every contender in turn; the first round only warms up."""
    times: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, work in contenders.items():
            seconds = measured(work)
            if number:
                times[name].append(seconds)
    return times


def table(title: str, times: dict[str, list[dict[str, float]]], count: int, against: str) -> dict[str, Any]:
    """Print and return medians in ms an image, and ratios to one contender within each round."""
    print(f"\n{title} ({count} items, {len(times[against])} rounds)")
    print(f"{'':28}{'cpu ms':>9}{'wall ms':>9}{'cpu ratio':>11}{'wall ratio':>12}")
    found: dict[str, Any] = {}
    for name, rounds in times.items():
        row = {kind: 1000 * statistics.median(r[kind] for r in rounds) / count for kind in ("cpu", "wall")}
        for kind in ("cpu", "wall"):
            pairs = zip(rounds, times[against], strict=True)
            row[f"{kind}_ratio"] = statistics.median(own[kind] / max(1e-9, other[kind]) for own, other in pairs)
        found[name] = row
        print(f"{name:28}{row['cpu']:9.2f}{row['wall']:9.2f}{row['cpu_ratio']:11.2f}{row['wall_ratio']:12.2f}")
    return found


def siim_contenders(records: list[ImageRecord]) -> dict[str, Work]:
    """The source codec, which passes JPEG frames through, against pixel_array and PNG."""
    settings = Pack(codec="source")

    def passed(out: Path) -> None:
        pack.pack(assigned(records, settings), settings, str(out / "shards"), local=True)

    def decoded(out: Path) -> None:
        with tarfile.open(out / "a.tar", "w") as tar:
            for number, record in enumerate(records):
                image = pydicom.dcmread(record.path).pixel_array
                buffer = io.BytesIO()
                Image.fromarray(image).save(buffer, "PNG")
                member = tarfile.TarInfo(f"{number}.png")
                member.size = len(buffer.getvalue())
                tar.addfile(member, io.BytesIO(buffer.getvalue()))

    return {"ours, pass-through": passed, "pixel_array + PNG": decoded}


def rle_loop_decode(rle: str, side: int) -> np.ndarray[Any, Any]:
    """The challenge's own decoder: a loop over runs with a division a run."""
    mask = np.zeros(side * side)
    numbers = np.asarray([int(x) for x in rle.split()])
    position = 0
    for start, length in zip(numbers[0::2], numbers[1::2], strict=True):
        position += start
        mask[position : position + length] = 255
        position += length
    return mask.reshape(side, side).T


def rle_pixel_decode(rle: str, side: int) -> np.ndarray[Any, Any]:
    """The other decoder one meets: a loop over the pixels of every run."""
    mask = np.zeros(side * side, np.uint8)
    numbers = [int(x) for x in rle.split()]
    position = 0
    for start, length in zip(numbers[0::2], numbers[1::2], strict=True):
        position += start
        for _ in range(length):
            mask[position] = 255
            position += 1
    return mask.reshape(side, side).T


def rle_loop_encode(mask: np.ndarray[Any, Any]) -> str:
    """The challenge's way to encode: every pixel asked for in turn, column by column."""
    columns = mask.T * 255
    runs: list[str] = []
    last, since, start, length = 0, 0, -1, 0
    for x in range(columns.shape[0]):
        for y in range(columns.shape[1]):
            color = columns[x][y]
            if color != last:
                if color == 255:
                    start, length = since, 1
                else:
                    runs += [str(start), str(length)]
                    start, length, since = -1, 0, 0
            elif start > -1:
                length += 1
            last = color
            since += 1
    return " ".join(runs) if runs else "-1"


def each(work: Callable[[Any], object], items: Sequence[Any]) -> None:
    """Work on each item, letting go of the result: a hundred kept masks would time the page faults."""
    for item in items:
        work(item)


def rle_contenders(table: str) -> tuple[dict[str, Work], ...]:
    # The table, not only the images at hand: masks of all sizes.
    rles = list(itertools.islice((rle for rows in siim.read_table(table).values() for rle in rows), 100))
    drawn = [rle_masks.decode(rle, (1024, 1024)) for rle in rles]
    for rle, mask in zip(rles, drawn, strict=True):
        assert np.array_equal(rle_loop_decode(rle, 1024) > 0, mask)
        assert np.array_equal(rle_pixel_decode(rle, 1024) > 0, mask)
    assert [rle_loop_encode(mask) for mask in drawn[:1]] == [rle_masks.encode(mask) for mask in drawn[:1]]
    return (
        {
            "ours, decode": lambda _: each(lambda rle: rle_masks.decode(rle, (1024, 1024)), rles),
            "loop over pixels, decode": lambda _: each(lambda rle: rle_pixel_decode(rle, 1024), rles),
            "loop over runs, decode": lambda _: each(lambda rle: rle_loop_decode(rle, 1024), rles),
        },
        {
            "ours, encode": lambda _: each(rle_masks.encode, drawn[:10]),
            "loop, encode": lambda _: each(rle_loop_encode, drawn[:10]),
        },
    )


def workers_contenders(records: list[ImageRecord]) -> dict[str, Work]:
    """One and two Ray tasks at a time over many shards, so that both stay busy to the end."""

    def spread(workers: int) -> Work:
        settings = Pack(size=SIZE, samples_per_shard=30, workers=workers)
        return lambda out: pack.pack(assigned(records, settings), settings, str(out / "shards"))

    return {"two workers": spread(2), "one worker": spread(1)}


def installed(name: str) -> bool:
    """Whether a peer can be imported."""
    import importlib.util

    return importlib.util.find_spec(name) is not None


def main() -> None:
    """Run everything and print; --out keeps the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nih", required=True)
    parser.add_argument("--siim", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    cv2.setNumThreads(1)
    records = sorted(sources.read("nih", given.nih).records, key=lambda record: record.image_id)[: given.count]
    contenders: dict[str, Work] = {
        "bare OpenCV": lambda out: bare(records, out),
        "ours, in-process": lambda out: ours(records, out),
        "PIL + ShardWriter": lambda out: usual(records, out),
    }
    for name, work in (("img2dataset", img2dataset_peer), ("litdata", litdata_peer)):
        if installed(name):
            contenders[name] = lambda out, work=work: work(records, out)  # type: ignore[misc]
        else:
            print(f"{name} is not installed and is left out")
    found = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "nih": table("NIH PNG -> 512 JPEG", interleaved(contenders, given.rounds), len(records), "bare OpenCV"),
    }
    images = [record for record in sources.read("siim", given.siim).records if record.rles is not None]
    found["siim"] = table(
        "SIIM DICOM", interleaved(siim_contenders(images), given.rounds), len(images), "pixel_array + PNG"
    )
    decode, encode = rle_contenders(str(Path(given.siim) / "train-rle.csv"))
    found["rle_decode"] = table("RLE decode", interleaved(decode, given.rounds), 100, "loop over runs, decode")
    found["rle_encode"] = table("RLE encode", interleaved(encode, given.rounds), 10, "loop, encode")
    # The same files five times under other names: long enough for what starting costs to vanish.
    many = [replace(r, image_id=f"{n}-{r.image_id}", path=r.path) for n in range(5) for r in records]
    spread = interleaved(workers_contenders(many), given.rounds)
    found["workers"] = table("On Ray, shards of 30", spread, len(many), "one worker")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
