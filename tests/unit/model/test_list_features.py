"""Candidates beside their lists: buckets of differences, and which models have them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers_model import SIZES, inputs, random_batch, shaken, tiny

from hpgr.model.inputs import Inputs
from hpgr.model.lists import BUCKETS, LARGEST, ListFeatures, difference_bucket
from hpgr.model.noise import Noise
from hpgr.model.registry import click_model

COLUMNS = ("price", "list:size", "list:engaged", "list:price:mean", "list:price:preferred")
LISTED, ALONE = replace(SIZES, t_num=COLUMNS), replace(SIZES, t_num=COLUMNS[:1])


def listed_inputs() -> Inputs:
    """A batch whose candidates have numbers of lists."""
    x = inputs(random_batch(3, 12, 5, seed=1))
    told = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    told[0, 0], told[1, :, 3] = torch.nan, torch.nan
    return replace(x, c_num=torch.cat([x.c_num[..., :1], told], -1))


def test_buckets_tell_sign_and_size() -> None:
    values = torch.tensor([-50.0, -1.0, -0.05, 0.0, 0.05, 1.0, 50.0, torch.nan, torch.inf, -torch.inf])
    got = difference_bucket(values).tolist()
    assert got == [4, 15, 23, 25, 27, 35, 46, 0, 49, 1]
    assert [b - 1 - LARGEST for b in got[:7]] == [1 + LARGEST - b for b in got[6::-1]]
    steps = difference_bucket(torch.linspace(-12, 12, 4001))
    assert (steps.diff() >= 0).all()
    assert int(steps.min()) > 0
    assert int(steps.max()) < BUCKETS


def test_they_equal_the_loop() -> None:
    made, x = ListFeatures(1, 4, 8), listed_inputs()
    torch.nn.init.normal_(made.table)
    got = made(x.c_num, None)
    for b in range(3):
        for m in range(5):
            rows = [made.table[c * BUCKETS + int(difference_bucket(x.c_num[b, m, 1 + c]))] for c in range(4)]
            torch.testing.assert_close(got[b, m], torch.stack(rows).sum(0))


def test_they_start_at_nothing_and_learn() -> None:
    made = ListFeatures(1, 4, 8)
    out = made(listed_inputs().c_num, None)
    assert not out.any()
    out.sum().backward()
    assert made.table.grad is not None
    assert made.table.grad.any()


def test_training_shows_some_candidates_as_if_of_no_list() -> None:
    """About UNLISTED of them, each by its row and place alone; others as they are, and all of them without noise."""
    made = ListFeatures(0, 4, 8)
    torch.nn.init.normal_(made.table)
    num, key = torch.randn(20, 100, 4, generator=torch.Generator().manual_seed(0)), np.arange(20)
    shown, none = made(num, None), made(torch.full_like(num, torch.nan), None)
    trained = made(num, Noise(5, key, 400))
    hidden = (trained == none).all(-1)
    assert 0.07 < hidden.float().mean() < 0.13
    assert torch.equal(trained[~hidden], shown[~hidden])
    assert torch.equal(made(num[3:], Noise(5, key[3:], 400)), trained[3:])
    assert torch.equal(made.eval()(num, Noise(5, key, 400)), shown)


@pytest.mark.parametrize(
    ("model", "reads"),
    [
        ({}, True),
        ({"lists": {"enabled": False}}, False),
        ({"name": "mtgr"}, False),
        ({"name": "mtgr", "lists": {"baselines": True}}, True),
        ({"name": "hstu", "lists": {"baselines": True}}, True),
        ({"name": "hstu", "lists": {"baselines": True, "enabled": False}}, False),
        ({"name": "din"}, False),
        ({"name": "logistic", "lists": {"baselines": True}}, False),
    ],
)
def test_only_who_is_to_read_them_does(model: dict[str, Any], reads: bool) -> None:
    x = listed_inputs()
    torch.manual_seed(0)
    made = shaken(click_model(tiny(model=model), LISTED))
    other = replace(x, c_num=torch.cat([x.c_num[..., :1], x.c_num[..., 1:].roll(1, 1)], -1))
    with torch.no_grad():
        assert torch.equal(made(x).scores, made(other).scores) != reads


def test_a_log_without_lists_has_none() -> None:
    assert click_model(tiny(), ALONE).lists is None
    assert click_model(tiny(), LISTED).lists is not None
