"""Manifest and recipe to batches: the same bits however they are read, and early refusals with a remedy."""

from __future__ import annotations

import gc
import threading
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from cxrscale.batches import feed, plan
from cxrscale.config import Augment, Data, Plan
from cxrscale.schema import Batch, InputError
from cxrscale.shards.manifest import Manifest
from tests.batches.conftest import MakeShards, chest
from tests.batches.test_source import flip

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


def train(
    manifest: Manifest, count: int, *, batch: int = 8, rank: int = 0, world: int = 1, start: int = 0, **fields: Any
) -> list[Batch]:
    """The first `count` training batches after `start` steps."""
    data = Data.model_validate({"findings": ("Effusion",), "task": "segment", **fields})
    batches = feed.training(
        manifest, data, Plan(batch=batch), Augment.model_validate(EVERYTHING), rank, world, step=start
    )
    found = list(islice(batches, count))
    batches.close()
    return found


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


@pytest.mark.parametrize("reader", ["dali", "reference"])
def test_the_same_call_gives_the_same_bits(shards: Manifest, reader: str) -> None:
    assert same(train(shards, 4, reader=reader), train(shards, 4, reader=reader))


@pytest.mark.parametrize("fields", [{"threads": 1}, {"threads": 4}, {"prefetch": 1}, {"prefetch": 5}])
def test_threads_and_prefetching_change_nothing(shards: Manifest, fields: dict[str, int]) -> None:
    assert same(train(shards, 5, **fields), train(shards, 5))


@pytest.mark.parametrize("reader", ["dali", "reference"])
@pytest.mark.parametrize("start", [1, 2, 3])
def test_a_restart_goes_on_with_the_same_bits(shards: Manifest, reader: str, start: int) -> None:
    assert same(train(shards, 5 - start, start=start, reader=reader), train(shards, 5, reader=reader)[start:])


@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_workers_sees_the_same_bits(shards: Manifest, world: int) -> None:
    ranks = [train(shards, 3, rank=rank, world=world) for rank in range(world)]
    interleaved = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert same(interleaved, train(shards, 3))


def test_a_batch_outlives_those_after_it(shards: Manifest) -> None:
    data, augment = Data(findings=("Effusion",)), Augment(size=48)
    batches = feed.evaluation(shards, ["train"], data, Plan(eval_batch=2), augment)
    held = [(batch, batch.image_BCHW.clone()) for batch in batches]
    gc.collect()
    assert len(held) == 8
    assert all(torch.equal(batch.image_BCHW, copy) for batch, copy in held)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_has_each_picture_once(shards: Manifest, world: int) -> None:
    data = Data(findings=("Effusion", "Mass"))
    rows, images = [], {}
    for rank in range(world):
        for batch in feed.evaluation(shards, ["val"], data, Plan(eval_batch=3), Augment(size=48), rank, world):
            assert batch.image_BCHW.shape == (3, 1, 48, 48)
            for row, image, label in zip(
                batch.row_B[batch.valid_B], batch.image_BCHW[batch.valid_B], batch.label_BF[batch.valid_B], strict=True
            ):
                rows.append(int(row))
                images[int(row)] = image
                assert np.array_equal(label.numpy(), shards.labels(data.findings)[int(row)], equal_nan=True)
    assert sorted(rows) == shards.rows("val").tolist()
    whole = next(feed.evaluation(shards, ["val"], data, Plan(eval_batch=8), Augment(size=48)))
    assert all(torch.equal(whole.image_BCHW[i], images[int(row)]) for i, row in enumerate(whole.row_B))


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


def test_lossless_and_untouched_shards_read_alike(make_shards: MakeShards) -> None:
    data, augment = Data(findings=("Effusion",)), Augment(size=48)
    sets = [make_shards(codec, codec=codec) for codec in ("png", "source")]
    first, second = (next(feed.evaluation(each, ["val"], data, Plan(), augment)) for each in sets)
    assert torch.equal(first.image_BCHW, second.image_BCHW)


@pytest.mark.parametrize("reader", ["dali", "reference"])
def test_files_in_memory(reader: str) -> None:
    names = [".png", ".jpg", ".png"]
    files = [cv2.imencode(name, chest(i, 60 + i))[1].tobytes() for i, name in enumerate(names)]
    data = Data.model_validate({"findings": ("Effusion", "Mass"), "reader": reader})
    batches = list(feed.files([*files, b"no picture"], data, Plan(eval_batch=3), Augment(size=48)))
    assert [batch.valid_B.tolist() for batch in batches] == [[True] * 3, [False] * 3]
    assert batches[0].row_B.tolist() == [0, 1, 2]
    assert batches[0].label_BF.shape == (3, 2)
    assert bool(batches[0].label_BF.isnan().all())
    assert batches[0].mask_B1HW is None
    assert list(feed.files([], data, Plan(), Augment(size=48))) == []


def test_the_length_of_an_epoch(shards: Manifest) -> None:
    data = Data(findings=("Effusion",))
    assert feed.training_rows(shards, data, Plan()) == 16
    assert feed.training_rows(shards, data, Plan(sampling="positives")) == 8
    assert plan.steps_per_epoch(feed.training_rows(shards, data, Plan()), Plan(batch=5)) == 3


def test_many_iterators_leave_no_threads_behind(shards: Manifest) -> None:
    train(shards, 1)
    gc.collect()
    before, native = threading.active_count(), len(list(Path("/proc/self/task").iterdir()))
    for _ in range(8):
        train(shards, 1)
        list(feed.evaluation(shards, ["val"], Data(findings=("Effusion",)), Plan(), Augment(size=48)))
    gc.collect()
    assert threading.active_count() == before
    assert len(list(Path("/proc/self/task").iterdir())) <= native + 1


def test_refusals(shards: Manifest, make_shards: MakeShards) -> None:
    unmasked = make_shards(masks=False)
    fits = Augment(size=48)
    segment = Data(findings=("Effusion",), task="segment")
    cases = [
        (unmasked, segment, Plan(), fits, r"pack.masks=true"),
        (shards, Data(findings=("Hernia",)), Plan(), fits, r"no label 'Hernia'; they have Effusion, Mass"),
        (shards, Data(findings=("Effusion",)), Plan(), Augment(size=65), r"augment.size=65 .* 64 pixels"),
        (shards, Data(findings=("Mass",)), Plan(sampling="positives"), fits, r"no picture has a finding present"),
        (shards, Data(findings=("Mass",), train_split="x"), Plan(), fits, r"'x' has no pictures; .*train \(16\)"),
    ]
    for manifest, data, planned, augment, message in cases:
        with pytest.raises(InputError, match=message) as error:
            feed.training(manifest, data, planned, augment)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"pack.masks=true"):
        feed.evaluation(unmasked, ["val"], segment, Plan(), fits)
