"""MTGR's mask and norms, DIN's activation unit, the logistic floor: each equals a plain statement of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers_model import SIZES, changed, inputs, random_batch, shaken, tiny
from torch.nn import functional as F

from hpgr.model.din import ActivationUnit
from hpgr.model.logistic import LogisticClick
from hpgr.model.mtgr import GroupLayerNorm, MtgrClick, closed_mask, live_masks
from hpgr.schema import SECOND

GAP = 1800 * SECOND


def mtgr(**over: object) -> MtgrClick:
    torch.manual_seed(0)
    model = shaken(MtgrClick(tiny(model={"name": "mtgr", **over}), SIZES))
    assert isinstance(model, MtgrClick)
    return model


def test_mtgr_a_candidate_sees_closed_sessions_and_the_open_one_apart() -> None:
    """A session is open for a candidate that comes within the gap of its last visible event."""
    batch = random_batch(4, 12, 6, seed=3)
    moved = batch.t_time.reshape(4, -1)
    moved[:, 0] += 5 * 3600 * SECOND  # long after the last visible event
    h_time = batch.h_time.reshape(4, -1)
    visible = (h_time[:, None] < moved[..., None]).sum(-1)
    batch = replace(batch, t_time=moved.ravel(), t_visible=visible.ravel())
    x = inputs(batch)
    closed, live = live_masks(x, *mtgr()._of_candidates(x))
    some_open = some_closed = 0
    for b in range(4):
        for m in range(6):
            n = int(visible[b, m])
            session = int(x.h_session[b, n - 1]) if n else -1
            is_open = n > 0 and moved[b, m] - h_time[b, n - 1] <= GAP
            for j in range(12):
                real_time = j < n and is_open and int(x.h_session[b, j]) == session
                assert bool(live[b, m, j]) == real_time
                assert bool(closed[b, m, j]) == (j < n and not real_time)
                some_open, some_closed = some_open + real_time, some_closed + bool(closed[b, m, j])
    assert some_open > 10
    assert some_closed > 10


def test_mtgr_history_tokens_see_both_ways_up_to_their_own_session() -> None:
    x = inputs(random_batch(4, 12, 2, seed=5))
    mask = closed_mask(x)
    for b in range(4):
        for i in range(12):
            for j in range(12):
                assert bool(mask[b, i, j]) == (i != j and int(x.h_session[b, j]) <= int(x.h_session[b, i]))
    assert mask.triu(1).any(), "later events of the same session are seen"


def test_mtgr_a_closed_session_is_read_in_another_form_than_an_open_one() -> None:
    """An event that follows in its session changes how a closed event reads, not how a real-time one does."""
    model = mtgr(layers=2)
    batch = random_batch(1, 6, 2, seed=0, ties=False)
    times = (1_700_000_000 + np.array([0, 60, 120, 90_000, 90_060, 90_120])) * SECOND
    batch = replace(
        batch,
        h_time=times,
        h_session=np.array([0, 0, 0, 1, 1, 1]),
        h_visible=np.arange(6),
        t_time=np.array([times[1] + 1, times[5] + 1]),
        t_visible=np.array([2, 6]),
    )
    other = changed(batch, h_item=(2, 2 + (batch.h_item[2] - 1) % 20), h_action=(2, 1 + batch.h_action[2] % 4))
    with torch.no_grad():
        before, after = (list(model.encode(inputs(b)).shown)[1][0] for b in (batch, other))
    same = (before == after).all(1).all(-1)[0]  # keys of the second block: events as history, then as real-time
    assert same.tolist()[:2] == [False, False], "closed form: earlier events of the session have seen it"
    assert same.tolist()[6:8] == [True, True], "real-time form: they have not"
    assert same.tolist()[9:] == [False] * 3, "the next session's real-time events have seen the closed session"


def test_mtgr_each_token_type_has_a_norm_of_its_own() -> None:
    norm = GroupLayerNorm(3, 8)
    torch.nn.init.normal_(norm.gain)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 8)
    for group in range(3):
        expected = F.layer_norm(x, (8,)) * norm.gain[group] + norm.bias[group]
        torch.testing.assert_close(norm(x, group), expected)


def test_din_weights_are_an_mlp_of_candidate_event_difference_and_product() -> None:
    """The decomposed first layer equals one over the concatenation (c, h, c - h, c * h)."""
    torch.manual_seed(0)
    unit = ActivationUnit(8, 5)
    c, h = torch.randn(2, 3, 8), torch.randn(2, 7, 8)
    difference = torch.randn(5, 8)
    first = torch.cat([unit.of_candidate.weight - difference, unit.of_event.weight + difference, difference,
                       unit.of_product], 1)  # fmt: skip
    cs, hs = c[:, :, None].expand(2, 3, 7, 8), h[:, None].expand(2, 3, 7, 8)
    hidden = F.linear(torch.cat([cs, hs, cs - hs, cs * hs], -1), first, unit.of_candidate.bias)
    expected = unit.out(torch.where(hidden > 0, hidden, unit.slope * hidden))[..., 0]
    torch.testing.assert_close(unit(c, h), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def logistic() -> LogisticClick:
    torch.manual_seed(0)
    model = LogisticClick(tiny(model={"name": "logistic"}), SIZES)
    n = SIZES.items - SIZES.first_item
    model.know_items(pa.table({"count": np.arange(n) * 3, "shown": np.arange(n)[::-1]}))
    shaken(model)
    return model


def test_logistic_knows_an_item_by_its_popularity_alone(logistic: LogisticClick) -> None:
    batch = random_batch(2, 12, 5, seed=1)
    apart = replace(batch, h_item=np.full(24, 2))  # no candidate was engaged with
    popularity = logistic.popularity.clone()
    popularity[7] = popularity[19]
    logistic.popularity.copy_(popularity)
    with torch.no_grad():
        scores = [logistic(inputs(replace(apart, t_item=np.full(10, item)))).scores for item in (7, 19, 11)]
    assert torch.equal(scores[0], scores[1])
    assert (scores[0] != scores[2]).all()


def test_logistic_popularity_is_standardised_over_the_catalogue(logistic: LogisticClick) -> None:
    known = logistic.popularity[SIZES.first_item :]
    torch.testing.assert_close(known.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(known.std(0, correction=0), torch.ones(2), atol=1e-5, rtol=0)
    assert (logistic.popularity[: SIZES.first_item] == logistic.popularity[0]).all(), "unknown items count nought"


def test_logistic_weights_add_up(logistic: LogisticClick) -> None:
    """A logit is the sum of its parts: moving one feature moves every logit alike."""
    batch = random_batch(2, 12, 5, seed=1)
    with torch.no_grad():
        before = logistic(inputs(batch)).scores
        numbers = logistic(inputs(replace(batch, t_num=batch.t_num + 1))).scores
    torch.testing.assert_close(numbers - before, (numbers - before)[0, 0].expand_as(before), rtol=1e-4, atol=1e-4)


def test_logistic_starts_from_the_base_rate() -> None:
    """Values that training never shows keep what they begin with."""
    model = LogisticClick(tiny(model={"name": "logistic"}), SIZES)
    assert all((table == 0).all() for table in model.features.tables.parameters())
    assert model.features.tables


def test_logistic_knows_nothing_of_unknown_items_where_counts_are_alike() -> None:
    model = LogisticClick(tiny(model={"name": "logistic"}), SIZES)
    n = SIZES.items - SIZES.first_item
    model.know_items(pa.table({"count": np.full(n, 9), "shown": np.full(n, 9)}))
    assert model.popularity.abs().max() < 10
