"""Masks in a dataset: at the stored size for training, at the image's own size for scoring; no positive is empty."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from cxrscale.config import Pack
from cxrscale.io import rle_masks
from cxrscale.shards import build, manifest
from cxrscale.shards.manifest import Manifest
from cxrscale.sources import siim
from tests.cli.test_app import run
from tests.dicom_files import dicom_file, gray_image

SIDE = 256


def drawn(*boxes: tuple[int, int, int, int]) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    """A mask of rectangles: (y, x, height, width)."""
    mask = np.zeros((SIDE, SIDE), dtype=np.bool_)
    for y, x, height, width in boxes:
        mask[y : y + height, x : x + width] = True
    return mask


MASKS = {
    "none": [],
    "tiny": [drawn((100, 60, 3, 3))],
    "one": [drawn((100, 60, 80, 50))],
    "two": [drawn((100, 60, 80, 50)), drawn((120, 80, 80, 50), (10, 10, 4, 4))],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four labeled images, one without a row in the table."""
    root = tmp_path_factory.mktemp("siim")
    for seed, name in enumerate((*MASKS, "unlabeled")):
        (root / f"{name}.dcm").write_bytes(dicom_file(gray_image(SIDE, SIDE, seed=seed)))
    rows = [f"{name}, {rle_masks.encode(mask)}" for name, masks in MASKS.items() for mask in masks]
    (root / "train-rle.csv").write_text("\n".join(["ImageId, EncodedPixels", "none, -1", *rows]))
    return root


@pytest.fixture(scope="module")
def packed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, int]:
    """(The dataset with masks of 32 pixels, how many of its masks were tiny.)"""
    out = str(tmp_path_factory.mktemp("out"))
    settings = Pack(size=32, masks=True, patient_ids="original", val_fraction=0, test_fraction=0)
    result = build.build_shards("siim", str(root), settings, out, local=True)
    return manifest.load(out), result.tiny_masks


def test_a_tiny_mask_keeps_a_pixel_and_is_counted(packed: tuple[Manifest, int]) -> None:
    data, tiny_masks = packed
    pixels = dict(zip(data.image_id.tolist(), data.column("mask_pixels").tolist(), strict=True))
    assert (pixels["none"], pixels["tiny"]) == (0, 1)
    assert pixels["one"] == pytest.approx(80 * 50 / 64, rel=0.05)
    assert np.isnan(pixels["unlabeled"])
    assert tiny_masks == data.metadata[0]["tiny_masks"] == 1


def test_the_manifest_holds_the_union_at_the_images_own_size(packed: tuple[Manifest, int]) -> None:
    data, _ = packed
    assert data.has_own_masks
    encodings = dict(zip(data.image_id.tolist(), data.table["mask_rle"].to_pylist(), strict=True))
    assert {name for name, encoding in encodings.items() if encoding} == {"tiny", "one", "two"}
    for row, name in enumerate(data.image_id.tolist()):
        expected = np.any(MASKS.get(name) or [drawn()], axis=0)
        assert np.array_equal(data.own_mask(row), expected)


def test_a_dataset_of_an_earlier_version_is_opened_without_masks_of_its_own_size(
    packed: tuple[Manifest, int], tmp_path: Path
) -> None:
    data, _ = packed
    rows = data.table.drop_columns(["mask_rle", "root"])
    manifest.write(str(tmp_path / manifest.NAME), rows, data.metadata[0])
    older = manifest.load(str(tmp_path))
    assert len(older) == len(data)
    assert not older.has_own_masks
    assert "mask_rle" not in pq.read_schema(tmp_path / manifest.NAME).names


def test_the_command_says_how_many_masks_were_tiny(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("shard", "siim", str(root), "pack.size=32", "--out", str(tmp_path / "out"), "--local")
    for _ in range(2):  # made, and found finished
        code, out, _ = run(capsys, *words)
        assert code == 0
        assert "1 masks cover no stored pixel by half and keep one pixel; a larger pack.size shows them" in out


def test_no_real_positive_becomes_empty_and_ties_do_not_enlarge(real: Path) -> None:
    """Of SIIM's 2,669 masks, the smallest (55 pixels) was empty at 224; those below 1,000 pixels grew by 3% at 256."""
    from cxrscale.io import resize_mask

    table = siim.read_table(str(real / "siim" / "train-rle.csv"))
    masks = [rle_masks.union(rles, (1024, 1024)) for rles in table.values() if 0 < _length(rles) < 1000]
    assert len(masks) == 74
    stored = {size: [int(resize_mask(mask, size).sum()) for mask in masks] for size in (128, 224, 512)}
    assert all(min(pixels) > 0 for pixels in stored.values())
    area = sum(int(mask.sum()) for mask in masks)
    assert sum(stored[512]) * 4 / area == pytest.approx(1, abs=0.001)


def _length(rles: tuple[str, ...]) -> int:
    """Pixels of the union; overlaps are decoded."""
    if len(rles) == 1:
        return sum(map(int, rles[0].split()[1::2]))
    return int(rle_masks.union(rles, (1024, 1024)).sum()) if rles else 0
