"""Manifest and recipe to batches: the same bits on every backend setting and rank, and early errors with a remedy."""

from __future__ import annotations

import gc
import logging
import sys
import threading
import zlib
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cxrscale import config
from cxrscale.config import Recipe, Sampler
from cxrscale.inference import PredictionsInfo, predictions
from cxrscale.loader.loader import (
    FileLoader,
    evaluation_batches,
    file_batches,
    make_loader,
    open_training_stream,
    training_batches,
    training_epoch_length,
    usable_rows,
)
from cxrscale.loader.reader import UNDECODABLE
from cxrscale.loader.sampler import steps_per_epoch
from cxrscale.shards import manifest as manifests
from cxrscale.shards.manifest import Manifest
from cxrscale.types import Batch, DistContext, Scores, UserError, logits_of
from tests.loader.test_reader import flip
from tests.small_datasets import MakeShards, chest

EVERYTHING: dict[str, Any] = {
    "size": 48,
    "hflip": 0.5,
    "rotation": 10.0,
    "noise": 0.05,
    "blur": 0.5,
    "brightness": 0.1,
    "clahe": "random",
    "probability": 0.8,
}


MASKS = {"task": "segment"}


def recipe_of(**sections: dict[str, Any]) -> Recipe:
    """A recipe for the small datasets: its sections, over images of 48 pixels and the finding Effusion."""
    defaults: dict[str, dict[str, Any]] = {"data": {"findings": ["Effusion"]}, "augment": {"size": 48}}
    merged = {name: {**defaults.get(name, {}), **sections.get(name, {})} for name in {**defaults, **sections}}
    return config.parse(Recipe, merged, where="test")


def train(
    manifest: Manifest, count: int, *, batch: int = 8, start: int = 0, dist: Any = None, **loader: Any
) -> list[Batch]:
    """The first `count` training batches after `start` steps; `loader` are fields of the section of that name."""
    recipe = recipe_of(data=MASKS, loader=loader, sampler={"batch_size": batch}, augment=EVERYTHING)
    batches = training_batches(manifest, recipe, dist or DistContext(), step=start)
    taken = list(islice(batches, count))
    batches.close()
    return taken


def fields_of(batches: list[Batch]) -> list[torch.Tensor]:
    """All tensors, with padding left out and the batches put end to end."""
    names = ("image_BCHW", "label_BF", "mask_B1HW", "row_B")
    return [torch.cat([getattr(batch, name)[batch.valid_B] for batch in batches]) for name in names]


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    """Bit-equal; NaN labels count as equal."""
    return all(
        torch.equal(torch.nan_to_num(a, -1), torch.nan_to_num(b, -1))
        for a, b in zip(fields_of(ours), fields_of(theirs), strict=True)
    )


@pytest.mark.parametrize("backend", ["dali", "opencv"])
def test_the_same_call_gives_the_same_bits(shards: Manifest, backend: str) -> None:
    assert same(train(shards, 4, backend=backend), train(shards, 4, backend=backend))


@pytest.mark.parametrize("fields", [{"num_threads": 1}, {"num_threads": 4}, {"prefetch": 1}, {"prefetch": 5}])
def test_threads_and_prefetching_change_nothing(shards: Manifest, fields: dict[str, int]) -> None:
    assert same(train(shards, 5, **fields), train(shards, 5))


@pytest.mark.parametrize("backend", ["dali", "opencv"])
@pytest.mark.parametrize("start", [1, 2, 3])
def test_a_restart_goes_on_with_the_same_bits(shards: Manifest, backend: str, start: int) -> None:
    assert same(train(shards, 5 - start, start=start, backend=backend), train(shards, 5, backend=backend)[start:])


@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_workers_sees_the_same_bits(shards: Manifest, world: int) -> None:
    ranks = [train(shards, 3, dist=DistContext(rank, world)) for rank in range(world)]
    interleaved = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert same(interleaved, train(shards, 3))


def test_a_batch_outlives_those_after_it(shards: Manifest) -> None:
    batches = evaluation_batches(shards, ["train"], recipe_of(sampler={"eval_batch_size": 2}))
    held = [(batch, batch.image_BCHW.clone()) for batch in batches]
    gc.collect()
    assert len(held) == 8
    assert all(torch.equal(batch.image_BCHW, copy) for batch, copy in held)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_has_each_image_once(shards: Manifest, world: int) -> None:
    findings = ["Effusion", "Mass"]
    recipe = recipe_of(data={"findings": findings}, sampler={"eval_batch_size": 3})
    rows, images = [], {}
    for rank in range(world):
        for batch in evaluation_batches(shards, ["val"], recipe, DistContext(rank, world)):
            assert batch.image_BCHW.shape == (3, 1, 48, 48)
            for row, image, label in zip(
                batch.row_B[batch.valid_B], batch.image_BCHW[batch.valid_B], batch.label_BF[batch.valid_B], strict=True
            ):
                rows.append(int(row))
                images[int(row)] = image
                assert np.array_equal(label.numpy(), shards.labels(findings)[int(row)], equal_nan=True)
    assert sorted(rows) == shards.rows("val").tolist()
    complete = next(evaluation_batches(shards, ["val"], recipe_of(sampler={"eval_batch_size": 8})))
    assert all(torch.equal(complete.image_BCHW[i], images[int(row)]) for i, row in enumerate(complete.row_B))


def test_a_corrupt_byte_makes_one_row_invalid(make_shards: MakeShards) -> None:
    manifest = make_shards()
    clean = train(manifest, 4)
    flip(manifest, 4)
    found = train(manifest, 4)
    for before, after in zip(clean, found, strict=True):
        assert torch.equal(after.valid_B, before.row_B != 4)
        kept = after.valid_B
        assert torch.equal(before.image_BCHW[kept], after.image_BCHW[kept])
        assert bool(torch.isfinite(after.image_BCHW).all())
    assert sum(int((~batch.valid_B).sum()) for batch in found) == 2


def spoil(manifest: Manifest, row: int, member: str = "image") -> Manifest:
    """Garbage behind a member's first bytes, packed as if it were right: its CRC-32 is that of the garbage."""
    root, place = Path(manifest.table["root"][0].as_py()), manifest.table[f"{member}_offset"][row].as_py()
    path, length = root / manifest.table["shard"][row].as_py(), manifest.table[f"{member}_length"][row].as_py()
    content = bytearray(path.read_bytes())
    garbage = np.random.default_rng(0).integers(0, 256, length - 4).astype(np.uint8).tobytes()
    content[place + 4 : place + length] = garbage
    path.write_bytes(content)
    crcs = manifest.table[f"{member}_crc"].to_pylist()
    crcs[row] = zlib.crc32(content[place : place + length])
    table = manifest.table.drop_columns(["root"])
    at = table.column_names.index(f"{member}_crc")
    manifests.write(
        str(root / manifests.NAME),
        table.set_column(at, f"{member}_crc", pa.array(crcs, pa.uint32())),
        manifest.metadata[0],
    )
    return manifests.load(str(root))


@pytest.mark.parametrize("fields", [{"prefetch": 1}, {"prefetch": 4}, {"backend": "opencv"}])
@pytest.mark.parametrize("member", ["image", "mask"])
def test_what_cannot_be_decoded_makes_one_row_invalid(
    make_shards: MakeShards, caplog: pytest.LogCaptureFixture, member: str, fields: dict[str, Any]
) -> None:
    manifest = make_shards()
    clean = train(manifest, 6, **fields)
    manifest = spoil(manifest, 4, member)
    with caplog.at_level(logging.WARNING, "cxrscale"):
        found = train(manifest, 6, **fields)
    messages = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert [message.split(": ", 1)[1] for message in messages] == [
        f"{UNDECODABLE}; left out, shard it again from its source"
    ]
    for before, after in zip(clean, found, strict=True):
        assert torch.equal(before.row_B, after.row_B)
        assert torch.equal(after.valid_B, before.row_B != 4)
        assert torch.equal(before.image_BCHW[after.valid_B], after.image_BCHW[after.valid_B])
        assert bool(torch.isfinite(after.image_BCHW).all())
    assert same(train(manifest, 3, start=3, **fields), found[3:])
    recipe = recipe_of(data=MASKS, loader=fields, sampler={"eval_batch_size": 5})
    evaluated = list(evaluation_batches(manifest, ["train", "val"], recipe))
    rows = torch.cat([batch.row_B[batch.valid_B] for batch in evaluated])
    assert sorted(rows.tolist()) == [row for row in range(24) if row != 4]


def test_dali_is_asked_about_files_that_opencv_accepts(
    make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = train(make_shards(), 4)
    manifest = spoil(make_shards(), 4)
    monkeypatch.setattr("cxrscale.loader.dali.find_undecodable", lambda _: np.zeros(0, np.int64))
    found = train(manifest, 4)
    assert [batch.valid_B.tolist() for batch in found] == [(batch.row_B != 4).tolist() for batch in clean]
    monkeypatch.setattr("cxrscale.loader.dali._decodes", lambda *_: True)
    with pytest.raises(RuntimeError, match=r"decoders.image"):
        train(manifest, 4)


def test_lossless_and_untouched_shards_read_alike(make_shards: MakeShards) -> None:
    datasets = [make_shards(codec, codec=codec) for codec in ("png", "source")]
    first, second = (next(evaluation_batches(dataset, ["val"], recipe_of())) for dataset in datasets)
    assert torch.equal(first.image_BCHW, second.image_BCHW)


@pytest.mark.parametrize("backend", ["dali", "opencv"])
def test_files_in_memory(backend: str) -> None:
    names = [".png", ".jpg", ".png"]
    files = [cv2.imencode(name, chest(i, 60 + i))[1].tobytes() for i, name in enumerate(names)]
    recipe = recipe_of(
        data={"findings": ["Effusion", "Mass"]}, loader={"backend": backend}, sampler={"eval_batch_size": 3}
    )
    batches = list(file_batches([*files, b"no image"], recipe))
    assert [batch.valid_B.tolist() for batch in batches] == [[True] * 3, [False] * 3]
    assert batches[0].row_B.tolist() == [0, 1, 2]
    assert batches[0].label_BF.shape == (3, 2)
    assert bool(batches[0].label_BF.isnan().all())
    assert batches[0].mask_B1HW is None
    assert list(file_batches([], recipe)) == []


@pytest.mark.parametrize("backend", ["dali", "opencv"])
def test_a_file_loader_gives_the_batches_of_graphs_built_anew(backend: str) -> None:
    files = [cv2.imencode(".png", chest(i, 60 + i))[1].tobytes() for i in range(6)]
    recipe = recipe_of(loader={"backend": backend}, sampler={"eval_batch_size": 6})
    expected = next(file_batches(files, recipe)).image_BCHW
    other = recipe.augment.model_copy(update={"size": 24})
    also = next(file_batches(files, recipe.model_copy(update={"augment": other}))).image_BCHW
    loader, built = FileLoader(recipe, also=(other,)), list[object]()
    for rows in ([0, 1], [2, 3, 4], [5], [0], [1, 2], [0, 1, 2, 3, 4, 5]):
        batch = loader.batch([files[row] for row in rows])
        assert torch.equal(batch.image_BCHW, expected[rows])
        assert torch.equal(batch.also_BCHW[0], also[rows])
        assert batch.row_B.tolist() == list(range(len(rows)))
        assert batch.valid_B.all()
        built.append(loader._batches)
    assert len(set(map(id, built))) == 3  # a graph takes as many files as its first batch had
    # PNG that no decoder takes, between two that can be decoded.
    broken = files[1][:200]
    for images, valid in (([files[0], broken, files[2]], [True, False, True]), ([b"", files[0]], [False, True])):
        batch = loader.batch(images)
        assert batch.valid_B.tolist() == valid
        assert torch.equal(batch.image_BCHW[valid], expected[[0, 2] if len(images) == 3 else [0]])
    assert torch.equal(loader.batch(files).image_BCHW, expected)
    loader.close()


def test_the_length_of_an_epoch(shards: Manifest) -> None:
    assert training_epoch_length(shards, recipe_of()) == 16
    assert training_epoch_length(shards, recipe_of(sampler={"sampling": "positives"})) == 8
    assert steps_per_epoch(training_epoch_length(shards, recipe_of()), Sampler(batch_size=5)) == 3


def test_many_loaders_leave_no_threads_behind(shards: Manifest) -> None:
    train(shards, 1)
    gc.collect()
    before, native = threading.active_count(), len(list(Path("/proc/self/task").iterdir()))
    for _ in range(8):
        train(shards, 1)
        list(evaluation_batches(shards, ["val"], recipe_of()))
    gc.collect()
    assert threading.active_count() == before
    assert len(list(Path("/proc/self/task").iterdir())) <= native + 1


def predictions_file(path: Path, manifest: Manifest, score: dict[str, float], finding: str = "Effusion") -> str:
    """A predictions file of the training split as a run writes it: 0.5 for all but the given ids."""
    rows = manifest.rows("train")
    ids = manifest.image_id[rows]
    score_NF = np.array([[score.get(name, 0.5)] for name in ids], np.float32)
    scores = Scores(ids, manifest.patient[rows], logits_of(score_NF), manifest.labels([finding])[rows], (finding,))
    info = PredictionsInfo(split="train", checkpoint="", manifest=manifest.digest, unreadable=0, recipe=Recipe())
    predictions.write_predictions(path, scores, info)
    return str(path)


def sampled(manifest: Manifest, steps: int = 40, **sampler: Any) -> Counter[int]:
    """How often each row comes in the first steps."""
    row_TG, _ = open_training_stream(manifest, recipe_of(sampler=sampler)).take(0, steps)
    return Counter(row_TG.ravel().tolist())


def test_what_a_run_got_wrong_comes_again(shards: Manifest, tmp_path: Path) -> None:
    # Rows 3k + 1 have the effusion; so 4 is a clear false negative and 6 a clear false positive.
    path = predictions_file(tmp_path / "p.parquet", shards, {"4.png": 0.01, "6.png": 0.99, "7.png": 0.9})
    hard = {"sampling": "hard", "hard_predictions": path, "hard_share": 0.125, "hard_repeats": 2, "batch_size": 4}
    assert training_epoch_length(shards, recipe_of(sampler=hard)) == 16 + 2 * 2
    assert sampled(shards, 5, **hard) == {row: 3 if row in (4, 6) else 1 for row in shards.rows("train").tolist()}


def test_weights_follow_the_findings(shards: Manifest) -> None:
    count = sampled(shards, sampling="weighted", weights={"Effusion": 3, "No Finding": 0}, batch_size=50)
    label_NF = shards.labels(["Effusion", "Mass"])
    rows = shards.rows("train")
    # Where the mass is unlabeled not every finding is absent: neither listed nor healthy, weight 1.
    unlisted = [row for row in rows.tolist() if label_NF[row, 0] == 0 and np.isnan(label_NF[row, 1])]
    ill = [row for row in rows.tolist() if label_NF[row, 0] == 1]
    assert set(count) == {*unlisted, *ill}
    share = sum(count[row] for row in ill) / sum(count.values())
    expected = 3 * len(ill) / (3 * len(ill) + len(unlisted))
    assert abs(share - expected) < 5 * (0.25 / sum(count.values())) ** 0.5


def test_datasets_are_mixed(make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = [make_shards("a", count=6), make_shards("b", count=24)]
    monkeypatch.setattr("cxrscale.shards.manifest._check_unique", lambda _: None)
    joined = manifests.load(*(str(dataset.table["root"][0]) for dataset in datasets))
    recipe = recipe_of(sampler={"dataset_weights": (1, 3), "batch_size": 8})
    rows, _ = open_training_stream(joined, recipe).take(0, 20)
    assert ((rows < 6).sum(axis=1) == 2).all()
    message = r"sampler.dataset_weights=\[1.0\] has 1 weights for 2 data.shards; give one for each"
    with pytest.raises(UserError, match=message):
        training_epoch_length(joined, recipe_of(sampler={"dataset_weights": (1,)}))


def test_predictions_and_weights_that_do_not_fit(shards: Manifest, tmp_path: Path) -> None:
    path = predictions_file(tmp_path / "p.parquet", shards, {})
    table = pq.read_table(path)
    changed = {
        "others": table.set_column(0, "image_id", pa.array([f"x{i}" for i in range(len(table))])),
        "unlabelled": table.set_column(2, "score.Effusion", pa.nulls(len(table), pa.float32())),
        "nameless": table.drop_columns(["image_id"]),
    }
    for name, other in changed.items():
        pq.write_table(other, tmp_path / f"{name}.parquet")
    (tmp_path / "text.parquet").write_text("no table")
    mass = predictions_file(tmp_path / "mass.parquet", shards, {}, "Mass")

    def hard(name: str) -> dict[str, Any]:
        return {"sampling": "hard", "hard_predictions": str(tmp_path / name)}

    cases = [
        (hard("others.parquet"), r"covers none of the 16 training images; .*predictions-train.parquet"),
        (hard("unlabelled.parquet"), r"covers none of the 16 training images"),
        (hard("nameless.parquet"), r"no image_id with a score for any of Effusion; give the predictions"),
        (hard(Path(mass).name), r"with a score for any of Effusion; give"),
        (hard("text.parquet"), r"is not a Parquet file \(.*; give"),
        (hard("absent.parquet"), r"absent.parquet"),
        (
            {"sampling": "weighted", "weights": {"Hernia": 2}},
            r"no label 'Hernia'; they have Effusion, Mass, No Finding",
        ),
    ]
    for settings, message in cases:
        with pytest.raises(UserError, match=message) as error:
            training_batches(shards, recipe_of(sampler=settings))
        assert "\n" not in str(error.value)
    for override, message in (("hard", "predictions-train.parquet"), ("weighted", "sampler.weights={Hernia: 5}")):
        with pytest.raises(UserError, match=message) as error:
            config.parse(Recipe, {"sampler": {"sampling": override}}, where="test")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("policy", ["ratio", "weighted", "hard"])
def test_every_policy_restarts_and_spreads_with_the_same_bits(shards: Manifest, tmp_path: Path, policy: str) -> None:
    path = predictions_file(tmp_path / "p.parquet", shards, {"4.png": 0.01})
    sampler = {
        "batch_size": 6,
        "sampling": policy,
        "weights": {"Effusion": 2},
        "hard_predictions": path,
        "positive_share_epochs": 2,
    }
    recipe = recipe_of(data=MASKS, sampler=sampler, augment=EVERYTHING)

    def some(count: int, dist: DistContext = DistContext(), epoch: int = 0, step: int = 0) -> list[Batch]:
        batches = training_batches(shards, recipe, dist, epoch, step)
        taken = list(islice(batches, count))
        batches.close()
        return taken

    steps = steps_per_epoch(training_epoch_length(shards, recipe), recipe.sampler)
    complete = some(steps + 3)
    assert same(some(2, epoch=1, step=1), complete[steps + 1 :])
    ranks = [some(3, DistContext(rank, 2)) for rank in range(2)]
    assert same([batch for step in zip(*ranks, strict=True) for batch in step], complete[:3])


def test_refusals(shards: Manifest, make_shards: MakeShards) -> None:
    unmasked = make_shards(masks=False)
    mass: dict[str, Any] = {"findings": ["Mass"]}
    cases = [
        (unmasked, recipe_of(data=MASKS), r"pack.masks=true"),
        (shards, recipe_of(data={"findings": ["Hernia"]}), r"no label 'Hernia'; they have Effusion, Mass"),
        (shards, recipe_of(augment={"size": 65}), r"augment.size=65 .* 64 pixels"),
        (shards, recipe_of(data=mass, sampler={"sampling": "positives"}), r"no image has a finding present"),
        (shards, recipe_of(data={**mass, "train_split": "x"}), r"'x' has no images; .*train \(16\)"),
    ]
    for manifest, recipe, message in cases:
        with pytest.raises(UserError, match=message) as error:
            training_batches(manifest, recipe)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"pack.masks=true"):
        evaluation_batches(unmasked, ["val"], recipe_of(data=MASKS))


def test_without_dali_auto_takes_opencv_and_dali_is_refused(
    shards: Manifest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opencv = train(shards, 2, backend="opencv")
    assert not same(train(shards, 2), opencv)  # DALI's warp rounds otherwise
    assert same(train(shards, 2), train(shards, 2, backend="dali"))
    monkeypatch.delitem(sys.modules, "cxrscale.loader.dali")
    monkeypatch.delattr("cxrscale.loader.dali", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with caplog.at_level(logging.WARNING, "cxrscale"):
        assert same(train(shards, 2), opencv)
        assert same(train(shards, 2, backend="opencv"), opencv)
    assert len([record for record in caplog.records if "loader.backend=auto: no DALI" in record.getMessage()]) == 1
    with pytest.raises(UserError, match=r"loader.backend=dali: .*; install nvidia-dali or set loader.backend=opencv"):
        train(shards, 1, backend="dali")


def test_a_loader_per_split(shards: Manifest) -> None:
    recipe = recipe_of(data={**MASKS, "val_split": ["val", "train"]}, sampler={"batch_size": 4, "eval_batch_size": 4})
    training = make_loader(recipe, shards)
    assert same(list(islice(training, 9)), list(islice(training_batches(shards, recipe), 9)))

    def rows(split: str, dist: DistContext = DistContext()) -> list[int]:
        return [int(row) for batch in make_loader(recipe, shards, split, dist) for row in batch.row_B[batch.valid_B]]

    assert sorted(rows("val")) == list(range(24))
    assert sorted(rows("val", DistContext(0, 2)) + rows("val", DistContext(1, 2))) == list(range(24))
    with pytest.raises(UserError, match="'test' has no images"):
        make_loader(recipe, shards, "test")
    with pytest.raises(UserError, match="'fold7' has no images"):
        make_loader(recipe, shards, "fold7")


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("task", ["classify", "segment"])
def test_negatives_without_any_finding(shards: Manifest, split: str, task: str) -> None:
    # Effusion in a third of the images, Mass absent or, in every fifth, unlabeled.
    table = shards.table.to_pylist()
    recipe = recipe_of(data={"negatives": "no_finding", "task": task}, sampler={"eval_batch_size": 4})
    kept = set(usable_rows(shards, [split], recipe.data).tolist())
    for row, image in enumerate(table):
        healthy = image["label.Effusion"] == 0 and image["label.Mass"] == 0
        assert (row in kept) == (image["split"] == split and (image["label.Effusion"] == 1 or healthy))
    left_out = set(shards.rows(split).tolist()) - kept
    assert kept
    assert left_out
    seen = [int(row) for batch in evaluation_batches(shards, [split], recipe) for row in batch.row_B[batch.valid_B]]
    assert sorted(seen) == sorted(kept)
    if split == "train":
        assert training_epoch_length(shards, recipe) == len(kept)


def test_negatives_of_another_finding_are_not_normal(shards: Manifest) -> None:
    # No image shows a Mass, so all that are kept have every finding absent: those with an Effusion go.
    data = recipe_of(data={"findings": ["Mass"], "negatives": "no_finding"}).data
    label_NF = shards.labels(("Effusion", "Mass"))
    assert (label_NF[usable_rows(shards, ["train"], data)] == 0).all()
    present = pa.array([1] * shards.table.num_rows, pa.int8())
    column = shards.table.column_names.index("label.Effusion")
    sick = Manifest(shards.table.set_column(column, "label.Effusion", present), shards.digest, shards.metadata)
    with pytest.raises(UserError, match=r"no_finding: split train has no image with Mass .*negatives=any"):
        usable_rows(sick, ["train"], data)
