"""Optimizers that resume bit for bit, the moving average by hand, learning rates."""

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
from cxrscale.training.state import Progress, TrainState

NAMES = ("adam", "adamw", "sgd")
Name = Literal["adam", "adamw", "sgd"]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    # No bias before batch normalization: its gradient is rounding noise, which Adam blows up to whole steps.
    return nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 6 * 6, 2))


def new_state(settings: Optim) -> TrainState:
    model = small_model()
    return TrainState(model, optim.build_optimizer(model, settings), optim.build_ema(model, settings), Progress())


def step(state: TrainState, number: int) -> None:
    torch.manual_seed(number)
    state.model(torch.randn(4, 1, 8, 8)).square().mean().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    if state.ema is not None:
        state.ema.update_parameters(state.model)


def assert_equal(one: TrainState, other: TrainState) -> None:
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    assert one.ema is not None
    assert other.ema is not None
    for name, value in one.ema.state_dict().items():
        assert torch.equal(value, other.ema.state_dict()[name]), name


@pytest.mark.parametrize("name", NAMES)
def test_a_fused_optimizer_resumed_from_a_file_continues_bit_for_bit(name: Name) -> None:
    settings = Optim(name=name, lr=0.05, weight_decay=0.1, ema_decay=0.9)
    whole = new_state(settings)
    assert whole.optimizer.defaults["fused"]
    for number in range(3):
        step(whole, number)
    content = checkpoint.dump({**whole.state_dict(), "manifest": "its digest"})
    again = new_state(settings)
    again.load_state_dict(checkpoint.read(content, "test"))
    for number in range(3, 6):
        step(whole, number)
        step(again, number)
    assert_equal(whole, again)


@pytest.mark.parametrize("name", NAMES)
def test_the_fused_optimizer_equals_the_plain_one(name: Name) -> None:
    settings = Optim(name=name, lr=0.01, weight_decay=0.1, betas=(0.8, 0.9))
    one, other = small_model(), small_model()
    kinds: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "adam": lambda p: torch.optim.Adam(p, 0.01, betas=(0.8, 0.9), weight_decay=0.1, foreach=False),
        "adamw": lambda p: torch.optim.AdamW(p, 0.01, betas=(0.8, 0.9), weight_decay=0.1, foreach=False),
        "sgd": lambda p: torch.optim.SGD(p, 0.01, momentum=0.8, weight_decay=0.1, nesterov=True, foreach=False),
    }
    fused, plain = optim.build_optimizer(one, settings), kinds[name](other.parameters())
    for number in range(3):
        for model, optimizer in ((one, fused), (other, plain)):
            torch.manual_seed(number)
            optimizer.zero_grad()
            model(torch.randn(4, 1, 8, 8)).square().mean().backward()
            optimizer.step()
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_frozen_parameters_are_not_given_to_the_optimizer() -> None:
    model = small_model()
    next(model.parameters()).requires_grad_(False)
    trained = optim.build_optimizer(model, Optim()).param_groups[0]["params"]
    assert len(trained) == len(list(model.parameters())) - 1


def test_the_moving_average_equals_the_one_by_hand() -> None:
    state = new_state(Optim(lr=0.1, ema_decay=0.7))
    assert state.ema is not None
    assert state.eval_model is state.ema.module
    by_hand: list[torch.Tensor] = []
    for number in range(5):
        step(state, number)
        weights = [parameter.detach().double() for parameter in state.model.parameters()]
        # The first step's weights are the first average: the initial ones have not learned anything.
        by_hand = [0.7 * a + 0.3 * w for a, w in zip(by_hand, weights, strict=True)] if by_hand else weights
    for mine, expected in zip(state.eval_model.parameters(), by_hand, strict=True):
        torch.testing.assert_close(mine.detach().double(), expected, rtol=0, atol=1e-6)
    for buffer, own in zip(state.eval_model.buffers(), state.model.buffers(), strict=True):
        assert torch.equal(buffer, own)


def test_without_a_moving_average_the_model_itself_is_evaluated() -> None:
    state = new_state(Optim())
    assert state.ema is None
    assert state.eval_model is state.model
    before = copy.deepcopy(state.model.state_dict())
    step(state, 0)
    assert not torch.equal(before["3.weight"], state.eval_model.state_dict()["3.weight"])


@given(
    lr=st.floats(1e-6, 1),
    warmup=st.integers(0, 50),
    more=st.integers(1, 200),
    schedule=st.sampled_from(["constant", "cosine", "plateau"]),
)
def test_the_learning_rate_rises_to_its_maximum_once(
    lr: float, warmup: int, more: int, schedule: Literal["constant", "cosine", "plateau"]
) -> None:
    settings = Optim(lr=lr, warmup_steps=warmup, schedule=schedule)
    lrs = [optim.learning_rate(settings, step, warmup + more) for step in range(warmup + more + 5)]
    assert all(0 <= value <= lr for value in lrs)
    assert lrs[warmup] == pytest.approx(lr)
    assert lrs[: warmup + 1] == sorted(lrs[: warmup + 1])
    assert lrs[warmup:] == sorted(lrs[warmup:], reverse=True)
    if schedule == "cosine":
        assert lrs[-1] == pytest.approx(0, abs=1e-12)
    else:
        assert set(lrs[warmup:]) == {lr}
