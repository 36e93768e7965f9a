"""The arithmetic of the scaling benchmark on its measurements."""

from pathlib import Path

import pytest

from cxrscale.training.distributed import LocalWorker
from tests.benchmarks import scaling, scaling_probe, scaling_start
from tests.conftest import tiny


def test_the_line_through_a_whole_and_a_half_batch() -> None:
    # 10 ms and 2 per image: 42 for 16 images, 26 for 8; the update takes 3.
    figures = {"rank_images": 16, "half_images": 8, "gradient_bytes": 400, "buffer_bytes": 8}
    ms = {"whole": [42.0, 99.0, 42.0], "half": [26.0, 26.0, 90.0], "update": [3.0, 3.0, 3.0]}
    cost = scaling_probe.summary({**figures, "ms": ms})
    assert (cost["image_ms"], cost["fixed_ms"]) == (2, 13)
    assert "all_reduce_share" not in cost


def test_noise_makes_no_negative_cost() -> None:
    figures = {"rank_images": 16, "half_images": 8, "gradient_bytes": 400, "buffer_bytes": 8}
    for half in (5.0, 50.0):
        cost = scaling_probe.summary({**figures, "ms": {"whole": [40.0], "half": [half], "update": [1.0]}})
        assert (cost["image_ms"], cost["fixed_ms"]) == (2.5, 1)


def test_shares_are_of_the_whole_step_within_a_round() -> None:
    figures = {"rank_images": 8, "half_images": 4, "gradient_bytes": 400, "buffer_bytes": 8}
    ms = {
        "whole": [90.0, 180.0],
        "unaveraged": [80.0, 160.0],
        "half": [40.0, 80.0],
        "update": [10.0, 20.0],
        "all_reduce": [25.0, 50.0],
    }
    cost = scaling_probe.summary({**figures, "ms": ms})
    assert cost["averaging_share"] == pytest.approx(0.1)
    assert cost["all_reduce_share"] == pytest.approx(0.25)
    # The cost of an image is that of the work alone, without averaging.
    assert cost["image_ms"] == pytest.approx((120 - 60) / 4)


def test_the_speed_is_that_of_the_median_step_once_warm() -> None:
    times = [0.0, 9.0, 10.0, 10.5, 11.0, 13.0, 13.5]
    lines = [{"step": number + 1.0, "time": time} for number, time in enumerate(times)]
    assert scaling_start.rate(lines, 2) == pytest.approx(2.0)


def test_ratios_are_taken_within_a_round() -> None:
    def rounds(*pairs: tuple[float, float]) -> list[dict[str, float]]:
        return [{"steps_per_s": speed, "step": first} for speed, first in pairs]

    figures = scaling.ratios(
        {
            "torchrun, 1": rounds((2, 10), (1, 20), (4, 10)),
            "torchrun, 2": rounds((3, 10), (2, 20), (4, 10)),
            "Ray, a cluster at hand, 1": rounds((1, 30), (0.5, 60), (2, 10)),
            "Ray, a cluster at hand, 2": rounds((2, 15), (1, 60), (2, 10)),
        },
        2,
    )
    # A step takes twice as long on Ray, in a quick round as in a slow one.
    assert figures["step on Ray / torchrun, 1"] == 2
    assert figures["first step on Ray / torchrun, 1"] == 3
    assert figures["speed-up of 2: torchrun"] == 1.5


def test_the_probe_measures_a_real_model(nih_shards: str, tmp_path: Path) -> None:
    recipe = tiny(nih_shards, tmp_path)
    figures = scaling_probe.probe(recipe, LocalWorker("cpu"), rounds=2)
    assert {name: len(times) for name, times in figures["ms"].items()} == {"whole": 2, "half": 2, "update": 2}
    assert (figures["rank_images"], figures["half_images"]) == (8, 4)
    # The same bytes as are counted without the model's memory.
    assert (figures["gradient_bytes"], figures["buffer_bytes"]) == scaling.sent_bytes(recipe)
    cost = scaling_probe.summary(figures)
    assert cost["image_ms"] > 0
    assert cost["fixed_ms"] > 0
