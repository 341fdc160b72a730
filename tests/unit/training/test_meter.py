"""Figures of a stretch of training."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hpgr.training.loop import _duration
from hpgr.training.meter import Meter, counts_of


def batch(lengths: list[int], session: list[int], candidates: int = 0) -> Any:
    """What the meter reads of a batch."""
    own = SimpleNamespace(h_lengths=np.array(lengths), h_session=np.array(session), t_item=np.zeros(candidates))
    return type("B", (), {"__len__": lambda _: len(lengths), **vars(own)})()


def padded(rows: int, width: int, candidates: int = 1) -> Any:
    """What it reads of the batch's tensors."""
    return SimpleNamespace(h_item=torch.zeros(rows, width), c_item=torch.zeros(rows, candidates))


def test_sessions_are_counted_a_row_and_padding_as_the_model_sees_it() -> None:
    # Row 1 has sessions 0 and 1, row 2 none, row 3 session 1: alike to its neighbour's, and yet another.
    assert counts_of(batch([3, 0, 17], [0, 0, 1, *[1] * 17]), padded(3, 24)) == [3, 3, 20, 20, 3 * 24]
    assert counts_of(batch([0, 0], []), padded(2, 1)) == [2, 0, 0, 0, 2]
    assert counts_of(batch([2, 1], [0, 0, 0], 7), padded(2, 2, 5)) == [2, 2, 3, 10, 2 * (2 + 5)]


def test_figures_are_ratios_of_sums_not_means_of_ratios() -> None:
    meter = Meter()
    meter.add(10.0, 4.0, [2, 4, 30, 40, 50])
    meter.time(1.0, 0.5)
    meter.add(2.0, 8.0, [2, 6, 90, 110, 150])
    meter.time(3.0, 0.0)
    found = meter.figures()
    assert found == {
        "loss": 1.0, "rows_per_second": 1.0, "sessions_per_second": 2.5, "tokens_per_second": 30.0,
        "data_wait_share": 0.125, "padding_share": 0.25,
    }  # fmt: skip
    assert all(math.isfinite(value) for value in found.values())
    assert Meter().figures() == {}


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_durations_read_well(seconds: float, text: str) -> None:
    assert _duration(seconds) == text
