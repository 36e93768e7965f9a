"""Optimizers that resume to the bit, the moving average by hand, learning rates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cxrscale.config import Optim
from cxrscale.training import checkpoint, optim
from cxrscale.training.checkpoint import Progress, TrainState

NAMES = ("adam", "adamw", "sgd")
Name = Literal["adam", "adamw", "sgd"]


def net() -> nn.Module:
    torch.manual_seed(0)
    # No bias before batch normalization: its gradient is rounding noise, which Adam blows up to whole steps.
    return nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 6 * 6, 2))


def learner(settings: Optim) -> TrainState:
    made = net()
    return TrainState(made, optim.build_optimizer(made, settings), optim.ema_model(made, settings), Progress())


def step(each: TrainState, number: int) -> None:
    torch.manual_seed(number)
    each.net(torch.randn(4, 1, 8, 8)).square().mean().backward()
    each.optimizer.step()
    each.optimizer.zero_grad()
    if each.average is not None:
        each.average.update_parameters(each.net)


def assert_equal(one: TrainState, other: TrainState) -> None:
    for name, value in one.net.state_dict().items():
        assert torch.equal(value, other.net.state_dict()[name]), name
    assert one.average is not None
    assert other.average is not None
    for name, value in one.average.state_dict().items():
        assert torch.equal(value, other.average.state_dict()[name]), name


@pytest.mark.parametrize("name", NAMES)
def test_a_fused_optimizer_goes_on_from_a_file_as_if_nothing_had_happened(name: Name) -> None:
    settings = Optim(name=name, lr=0.05, weight_decay=0.1, ema_decay=0.9)
    whole = learner(settings)
    assert whole.optimizer.defaults["fused"]
    for number in range(3):
        step(whole, number)
    content = checkpoint.dump(whole.state())
    again = learner(settings)
    again.load(checkpoint.read(content, "test"))
    for number in range(3, 6):
        step(whole, number)
        step(again, number)
    assert_equal(whole, again)


@pytest.mark.parametrize("name", NAMES)
def test_fused_is_what_the_plain_optimizer_does(name: Name) -> None:
    settings = Optim(name=name, lr=0.01, weight_decay=0.1, betas=(0.8, 0.9))
    one, other = net(), net()
    kinds: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "adam": lambda p: torch.optim.Adam(p, 0.01, betas=(0.8, 0.9), weight_decay=0.1, foreach=False),
        "adamw": lambda p: torch.optim.AdamW(p, 0.01, betas=(0.8, 0.9), weight_decay=0.1, foreach=False),
        "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.8, weight_decay=0.1, nesterov=True, foreach=False),
    }
    fused, plain = optim.build_optimizer(one, settings), kinds[name](other.parameters())
    for number in range(3):
        for each, made in ((one, fused), (other, plain)):
            torch.manual_seed(number)
            made.zero_grad()
            each(torch.randn(4, 1, 8, 8)).square().mean().backward()
            made.step()
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_what_is_frozen_is_not_the_optimizers_business() -> None:
    made = net()
    next(made.parameters()).requires_grad_(False)
    held = optim.build_optimizer(made, Optim()).param_groups[0]["params"]
    assert len(held) == len(list(made.parameters())) - 1


def test_the_moving_average_is_the_one_by_hand() -> None:
    each = learner(Optim(lr=0.1, ema_decay=0.7))
    assert each.average is not None
    assert each.chosen is each.average.module
    by_hand: list[torch.Tensor] = []
    for number in range(5):
        step(each, number)
        weights = [parameter.detach().double() for parameter in each.net.parameters()]
        # The first step's weights are the first average: the initial ones have not learnt anything.
        by_hand = [0.7 * a + 0.3 * w for a, w in zip(by_hand, weights, strict=True)] if by_hand else weights
    for mine, expected in zip(each.chosen.parameters(), by_hand, strict=True):
        torch.testing.assert_close(mine.detach().double(), expected, rtol=0, atol=1e-6)
    for buffer, own in zip(each.chosen.buffers(), each.net.buffers(), strict=True):
        assert torch.equal(buffer, own)


def test_without_a_moving_average_the_model_itself_is_chosen() -> None:
    each = learner(Optim())
    assert each.average is None
    assert each.chosen is each.net
    before = copy.deepcopy(each.net.state_dict())
    step(each, 0)
    assert not torch.equal(before["3.weight"], each.chosen.state_dict()["3.weight"])


@given(
    lr=st.floats(1e-6, 1),
    warmup=st.integers(0, 50),
    more=st.integers(1, 200),
    schedule=st.sampled_from(["constant", "cosine", "plateau"]),
)
def test_the_rate_rises_to_its_highest_and_never_again(
    lr: float, warmup: int, more: int, schedule: Literal["constant", "cosine", "plateau"]
) -> None:
    settings = Optim(lr=lr, warmup_steps=warmup, schedule=schedule)
    rates = [optim.learning_rate(settings, step, warmup + more) for step in range(warmup + more + 5)]
    assert all(0 <= rate <= lr for rate in rates)
    assert rates[warmup] == pytest.approx(lr)
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    if schedule == "cosine":
        assert rates[-1] == pytest.approx(0, abs=1e-12)
    else:
        assert set(rates[warmup:]) == {lr}
