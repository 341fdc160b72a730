"""Tables of click rates: cells, rates and "engaged before" as a loop over the log finds them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from helpers_model import SIZES, random_batch, scrambled_history

from hpgr.data.click_tables import PRIOR, count_clicks, engaged_before, rate_users, score_test
from hpgr.data.preparation import Prepared
from hpgr.metrics import auc
from hpgr.schema import TEST, TRAIN, Timelines

DATA = {
    "columns": {"user": "user_id", "item": "item_id", "time": "timestamp", "label": "clicked", "action": "event"},
    "impressions": [[{"column": "event", "value": "shown"}]],
    "history": [[{"column": "event", "value": "view"}]],
    "features": [{"name": "slot", "column": "slot", "role": "candidate"}],
    "split": {"by": "time_fraction", "validation": 0.2, "test": 0.3},
}


@pytest.fixture
def prepared(prepare_log: Callable[..., Prepared]) -> Prepared:
    """Views and impressions of 40 users; low slots and items viewed before are clicked more."""
    rng, rows = np.random.default_rng(0), []
    for user in range(40):
        seen: set[int] = set()
        for k in range(60):
            item, shown = int(rng.integers(0, 8)), rng.random() < 0.6
            slot = int(rng.integers(0, 3))
            chance = 0.1 + 0.3 * (slot == 0) + 0.4 * (item in seen)
            rows.append({
                "user_id": f"u{user}", "item_id": f"i{item}", "timestamp": 1_600_000_000 + 60 * (k // 2) + user,
                "event": "shown" if shown else "view", "clicked": int(rng.random() < chance) if shown else None,
                "slot": slot if shown else None,
            })  # fmt: skip
            if not shown:
                seen.add(item)
    return prepare_log(rows, **DATA)


def test_engaged_before_looks_at_strictly_earlier_events(prepared: Prepared) -> None:
    for bucket in range(prepared.buckets):
        t = Timelines.from_table(prepared.timelines(bucket))
        found = engaged_before(t)
        for row in range(len(t)):
            history = slice(t.h_offsets[row], t.h_offsets[row + 1])
            for i in range(t.t_offsets[row], t.t_offsets[row + 1]):
                past = t.h_item[history][t.h_time[history] < t.t_time[i]]
                assert found[i] == (t.t_item[i] in past)
        assert 0 < found.mean() < 1


def test_scores_are_the_training_rates_of_a_loop(prepared: Prepared) -> None:
    buckets = range(prepared.buckets)
    parts = [count_clicks(b, prepared, ["slot"]) for b in buckets]
    rates = sum(parts[1:], parts[0]).rates()
    shown: dict[tuple[int, bool], list[int]] = {}
    every: list[int] = []
    for b in buckets:
        t = Timelines.from_table(prepared.timelines(b))
        for i in np.flatnonzero(t.t_split == TRAIN):
            shown.setdefault((int(t.t_cat[i, 0]), bool(engaged_before(t)[i])), []).append(int(t.t_label[i]))
            every.append(int(t.t_label[i]))
    base = np.mean(every)
    scores, labels = [], []
    for b in buckets:
        t = Timelines.from_table(prepared.timelines(b))
        got = score_test(b, prepared, ["slot"], rates)
        test = np.flatnonzero(t.t_split == TEST)
        assert len(got.score) == len(test) > 20
        for place, i in enumerate(test):
            clicks = shown.get((int(t.t_cat[i, 0]), bool(engaged_before(t)[i])), [])
            expected = (sum(clicks) + PRIOR * base) / (len(clicks) + PRIOR)
            assert got.score[place] == pytest.approx(expected)
            assert got.label[place] == t.t_label[i]
        scores.append(got.score)
        labels.append(got.label)
    area = auc(np.concatenate(scores), np.concatenate(labels))
    assert area is not None
    assert area > 0.6


def test_a_user_without_history_engaged_with_nothing(prepare_log: Callable[..., Prepared]) -> None:
    rows = [
        {
            "user_id": f"u{k}",
            "item_id": "i0",
            "timestamp": 1_600_000_000 + k,
            "event": "shown",
            "clicked": k % 2,
            "slot": 0,
        }
        for k in range(20)
    ]
    rows.append(rows[0] | {"user_id": "z", "event": "view", "clicked": None})
    prepared = prepare_log(rows, **DATA)
    for bucket in range(prepared.buckets):
        assert not engaged_before(Timelines.from_table(prepared.timelines(bucket))).any()


def test_user_rates_equal_the_loop() -> None:
    batch, rng = random_batch(rows=3, events=12, targets=6, seed=1), np.random.default_rng(0)
    items, actions = rng.random(SIZES.items), rng.random(SIZES.actions)
    batch.t_visible[0] = 0
    got, past = rate_users(batch, items, actions), set()
    for i in range(18):
        start, n = 12 * (i // 6), int(batch.t_visible[i])
        beyond = sum(actions[batch.h_action[j]] - items[batch.h_item[j]] for j in range(start, start + n))
        assert got[i] == pytest.approx(items[batch.t_item[i]] + beyond / (n + PRIOR))
        past.add(n)
    assert {0, 12} < past


def test_user_rates_look_at_strictly_earlier_events() -> None:
    """Other items, actions and times of the last event of each row change what saw it, and nothing else."""
    batch, rng = random_batch(rows=3, events=12, targets=6, seed=2), np.random.default_rng(1)
    items, actions = rng.random(SIZES.items), rng.random(SIZES.actions)
    last = np.arange(36) % 12 == 11
    other = scrambled_history(batch, last)
    saw = batch.t_visible == 12
    assert saw.any()
    moved = np.abs(rate_users(batch, items, actions) - rate_users(other, items, actions))
    assert ((moved > 1e-9) == saw).all()
