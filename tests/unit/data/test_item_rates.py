"""How far training click rates of items are believed: by moments, and then by validation."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers_log import Make, T

from hpgr.artifacts import Folder
from hpgr.data.item_rates import WEAKER, item_prior, rate_losses
from hpgr.data.preparation import Prepared
from hpgr.schema import VALIDATION, Timelines
from hpgr.training.two_stage import Run


def test_the_prior_of_items_is_the_one_they_were_drawn_by() -> None:
    rng = np.random.default_rng(5)
    shown = rng.integers(0, 60, 5000)
    for prior in (4.0, 40.0):
        clicked = rng.binomial(shown, rng.beta(0.3 * prior, 0.7 * prior, len(shown)))
        assert item_prior(pa.table({"clicked": clicked, "shown": shown}), 0.3) == pytest.approx(prior, rel=0.1)


@pytest.mark.parametrize(
    ("clicked", "shown", "prior"),
    [
        ([3] * 9, [10] * 9, math.inf),
        ([1, 0, 0], [1, 1, 1], math.inf),
        ([0], [0], math.inf),
        ([9, 0, 0], [9, 9, 12], 1.0),
    ],
    ids=["alike", "each shown once", "not shown", "all or nothing"],
)
def test_the_prior_at_its_ends(clicked: list[int], shown: list[int], prior: float) -> None:
    assert item_prior(pa.table({"clicked": clicked, "shown": shown}), 0.3) == prior


def made(prepare_log: Make, lasting: float) -> Prepared:
    """Ten days of a log: eight to train, a ninth to validate, when the share `lasting` is as before and the rest the
    other way round, and a tenth day of nothing but clicks, which nothing may know."""
    rng, items, rows = np.random.default_rng(0), 400, []
    rate = rng.beta(0.8, 0.8, items)
    for k in range(8000):
        item, day = int(rng.integers(items)), k // 800
        chance = rate[item] if day < 8 or rng.random() < lasting else 1 - rate[item]
        label = 1 if day == 9 else int(rng.random() < chance)
        rows.append({"user_id": f"u{k % 50}", "item_id": f"i{item}", "timestamp": T + 86_400 * day + k % 800,
                     "clicked": label})  # fmt: skip
    prepared: Prepared = prepare_log(rows, split={"by": "time_fraction", "validation": 0.1, "test": 0.1})
    return prepared


def by_loop(prepared: Prepared, prior: float) -> float:
    """Log loss of validation by training rates, impression by impression."""
    items, first = prepared.vocabulary().items.to_pylist(), prepared.vocabulary().first_item
    train = prepared.manifest["account"]["splits"]["train"]
    base, loss = train["positives"] / train["impressions"], 0.0
    for bucket in range(prepared.buckets):
        for user in prepared.timelines(bucket).to_pylist():
            for item, split, label in zip(user["t_item"], user["t_split"], user["t_label"], strict=True):
                if split == VALIDATION and item >= first:
                    of = items[item - first]
                    believed = base
                    if math.isfinite(prior):
                        believed = (of["clicked"] + prior * base) / (of["shown"] + prior)
                    loss -= math.log(believed if label else 1 - believed)
    return loss


@pytest.mark.parametrize(("lasting", "weaker"), [(1.0, 1.0), (0.75, 16.0), (0.0, math.inf)])
def test_rates_are_believed_as_far_as_they_last(
    prepare_log: Make, config: Make, tmp_path: Path, lasting: float, weaker: float
) -> None:
    prepared = made(prepare_log, lasting)
    items, train = prepared.vocabulary().items, prepared.manifest["account"]["splits"]["train"]
    own = item_prior(items, train["positives"] / train["impressions"])
    losses = [by_loop(prepared, own * by) for by in WEAKER]
    found: Any = Run(config(), Folder(str(tmp_path)), prepared).sizes().item_prior
    assert found == pytest.approx(own * WEAKER[int(np.argmin(losses))]) == pytest.approx(own * weaker)
    assert prepared.manifest["item_prior"] == (found if math.isfinite(found) else None)


def test_losses_are_of_labelled_validation_impressions_of_known_items(prepare_log: Make) -> None:
    prepared, priors = made(prepare_log, 0.5), np.array([2.0, 30.0, math.inf])
    items, first = prepared.vocabulary().items, prepared.vocabulary().first_item
    train = prepared.manifest["account"]["splits"]["train"]
    base, total = train["positives"] / train["impressions"], np.zeros(3)
    for bucket in range(prepared.buckets):
        timelines = Timelines.from_table(prepared.timelines(bucket))
        total += rate_losses(timelines, items, first, base, priors)
        own = np.flatnonzero(timelines.t_split == VALIDATION)
        item, label = timelines.t_item.copy(), timelines.t_label.copy()
        item[own[::2]], label[own[1::2]] = first - 1, -1
        none = rate_losses(replace(timelines, t_item=item, t_label=label), items, first, base, priors)
        assert none.tolist() == [0.0] * 3
    assert total == pytest.approx([by_loop(prepared, prior) for prior in priors])
