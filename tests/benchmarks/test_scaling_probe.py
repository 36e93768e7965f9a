"""What the scaling benchmark makes of its measurements."""

from pathlib import Path

import pytest

from cxrscale.training.distributed import LocalWorker
from tests.benchmarks import scaling, scaling_probe, scaling_start
from tests.conftest import tiny


def test_the_line_through_a_whole_and_a_half_batch() -> None:
    # 10 ms and 2 an image: 42 for 16 images, 26 for 8; the update takes 3.
    found = {"rank_pictures": 16, "half_pictures": 8, "gradient_bytes": 400, "buffer_bytes": 8}
    ms = {"whole": [42.0, 99.0, 42.0], "half": [26.0, 26.0, 90.0], "update": [3.0, 3.0, 3.0]}
    cost = scaling_probe.summary({**found, "ms": ms})
    assert (cost["picture_ms"], cost["fixed_ms"]) == (2, 13)
    assert "all_reduce_share" not in cost


def test_noise_makes_no_negative_cost() -> None:
    found = {"rank_pictures": 16, "half_pictures": 8, "gradient_bytes": 400, "buffer_bytes": 8}
    for half in (5.0, 50.0):
        cost = scaling_probe.summary({**found, "ms": {"whole": [40.0], "half": [half], "update": [1.0]}})
        assert (cost["picture_ms"], cost["fixed_ms"]) == (2.5, 1)


def test_shares_are_of_the_whole_step_within_a_round() -> None:
    found = {"rank_pictures": 8, "half_pictures": 4, "gradient_bytes": 400, "buffer_bytes": 8}
    ms = {
        "whole": [90.0, 180.0],
        "unaveraged": [80.0, 160.0],
        "half": [40.0, 80.0],
        "update": [10.0, 20.0],
        "all_reduce": [25.0, 50.0],
    }
    cost = scaling_probe.summary({**found, "ms": ms})
    assert cost["averaging_share"] == pytest.approx(0.1)
    assert cost["all_reduce_share"] == pytest.approx(0.25)
    # The cost of an image is that of the work alone, without averaging.
    assert cost["picture_ms"] == pytest.approx((120 - 60) / 4)


def test_the_rate_is_that_of_the_median_step_once_warm() -> None:
    times = [0.0, 9.0, 10.0, 10.5, 11.0, 13.0, 13.5]
    lines = [{"step": number + 1.0, "time": time} for number, time in enumerate(times)]
    assert scaling_start.rate(lines, 2) == pytest.approx(2.0)


def test_ratios_are_taken_within_a_round() -> None:
    def rounds(*pairs: tuple[float, float]) -> list[dict[str, float]]:
        return [{"steps_per_s": speed, "step": first} for speed, first in pairs]

    found = scaling.ratios(
        {
            "torchrun, 1": rounds((2, 10), (1, 20), (4, 10)),
            "torchrun, 2": rounds((3, 10), (2, 20), (4, 10)),
            "Ray, a cluster at hand, 1": rounds((1, 30), (0.5, 60), (2, 10)),
            "Ray, a cluster at hand, 2": rounds((2, 15), (1, 60), (2, 10)),
        },
        2,
    )
    # A step takes twice as long on Ray, in a quick round as in a slow one.
    assert found["step on Ray / torchrun, 1"] == 2
    assert found["first step on Ray / torchrun, 1"] == 3
    assert found["speed-up of 2: torchrun"] == 1.5


def test_the_probe_measures_a_real_net(nih_shards: str, tmp_path: Path) -> None:
    recipe = tiny(nih_shards, tmp_path)
    found = scaling_probe.probe(recipe, LocalWorker("cpu"), rounds=2)
    assert {name: len(times) for name, times in found["ms"].items()} == {"whole": 2, "half": 2, "update": 2}
    assert (found["rank_pictures"], found["half_pictures"]) == (8, 4)
    # The same bytes as are counted without the model's memory.
    assert (found["gradient_bytes"], found["buffer_bytes"]) == scaling.sent_bytes(recipe)
    cost = scaling_probe.summary(found)
    assert cost["picture_ms"] > 0
    assert cost["fixed_ms"] > 0
