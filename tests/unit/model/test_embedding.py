"""Tokens: what they show, time buckets, match features and padding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_model import SIZES, changed, inputs, random_batch, rows_of, shaken, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from hpgr.model.base import visible_matches
from hpgr.model.embedding import MATCH_COUNTS, MATCH_PLACES, EventEncoder, Features, MatchFeatures
from hpgr.model.inputs import unpad
from hpgr.model.timing import LONGEST, time_before, time_bucket
from hpgr.schema import SECOND


@settings(max_examples=50)
@given(st.lists(st.integers(-(10**16), 10**16), min_size=2, max_size=50), st.sampled_from([4, 12, 40, 64]))
def test_time_buckets_are_monotone_and_in_range(deltas: list[int], buckets: int) -> None:
    got = time_bucket(torch.tensor(sorted(deltas)), buckets)
    assert (got.diff() >= 0).all()
    assert got.min() >= 0
    assert got.max() < buckets


def test_time_buckets_at_both_ends() -> None:
    longest = int(LONGEST) * SECOND
    got = time_bucket(torch.tensor([-5, 0, 1, 2 * longest, 10 * longest]), 40).tolist()
    assert got == [0, 0, 0, 39, 39]
    assert len(set(time_bucket(torch.tensor([SECOND * 4**k for k in range(14)]), 40).tolist())) == 14


def test_time_before_is_that_of_the_last_visible_event() -> None:
    h_time = torch.tensor([[10, 20, 20, 30]])
    visible = torch.tensor([[0, 1, 3, 4]])
    assert time_before(h_time, visible).tolist() == [[10, 10, 20, 30]]


def test_features_whose_names_are_alike_have_tables_of_their_own() -> None:
    names = ("x.y", "x_y", "x_dy", "x._y", "x_.y")
    features = Features(replace(SIZES, categories=dict.fromkeys(names, 7), h_cat=names, h_num=names, t_num=()), 4)
    assert len(features.tables) == len(features.slopes) == len(features.missing) == len(names)


@pytest.fixture
def encoder() -> EventEncoder:
    torch.manual_seed(0)
    built = shaken(EventEncoder(tiny().model, SIZES))
    assert isinstance(built, EventEncoder)
    return built


@pytest.mark.parametrize("column", ["h_item", "h_action", "h_cat", "h_num"])
def test_history_tokens_show_each_column(encoder: EventEncoder, column: str) -> None:
    batch = random_batch(1, 6, 2)
    batch = replace(batch, h_num=np.nan_to_num(batch.h_num))
    before = encoder.history(inputs(batch), None)[0]
    after = encoder.history(inputs(changed(batch, **{column: (2, (getattr(batch, column)[2] + 1) % 4)})), None)[0]
    differs = (before != after).any(-1)
    assert differs.tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("column", ["t_item", "t_cat", "t_num"])
def test_candidate_tokens_show_each_column(encoder: EventEncoder, column: str) -> None:
    batch = random_batch(1, 6, 3)
    before = encoder.candidates(inputs(batch), None, 0.0)[0]
    after = encoder.candidates(inputs(changed(batch, **{column: (1, (getattr(batch, column)[1] + 1) % 4)})), None, 0.0)[
        0
    ]
    assert (before != after).any(-1).tolist() == [False, True, False]


def test_a_missing_number_has_a_vector_of_its_own(encoder: EventEncoder) -> None:
    batch = random_batch(1, 3, 1)
    tokens = [encoder.history(inputs(changed(batch, h_num=(slice(None), value))), None) for value in (np.nan, 0.0, 1.0)]
    assert all(t.isfinite().all() for t in tokens)
    assert not torch.equal(tokens[0], tokens[1])
    assert not torch.equal(tokens[1], tokens[2])


def test_streams_share_the_tables_of_a_feature_they_both_show(encoder: EventEncoder) -> None:
    assert sorted(encoder.features.tables) == ["f_colour", "f_device"]
    encoder.zero_grad()
    encoder.candidates(inputs(random_batch(2, 4, 3)), None, 0.0).square().sum().backward()
    assert encoder.features.tables["f_device"].weight.grad is not None
    assert encoder.features.tables["f_colour"].weight.grad is None


@pytest.mark.parametrize("places", [1, 3 * 40 * 4, 1 << 20])  # candidates one by one, in tiles, all at once
def test_match_features_equal_the_loop(monkeypatch: pytest.MonkeyPatch, places: int) -> None:
    """How often, and of the last match its age, action and place from the end, in the visible past alone; counts and
    places in buckets (0, 1, then powers of two)."""
    match = MatchFeatures(tiny().model.width, tiny().model.time_buckets, SIZES.actions)
    for table in (match.count, match.age, match.action, match.back):
        torch.nn.init.normal_(table.weight)
    batch = random_batch(3, 40, 6, seed=1)
    batch = replace(batch, h_item=4 + batch.h_item % 5, t_item=4 + batch.t_item % 6)
    x = inputs(batch)
    same = (x.c_item[..., None] == x.h_item[:, None, :]) & (x.h_time[:, None, :] < x.c_time[..., None])
    monkeypatch.setattr("hpgr.model.inputs.MAP", places)
    got = match(x.c_time, visible_matches(x))
    counts, backs = set(), set()
    for b in range(3):
        for m in range(6):
            places = torch.nonzero(same[b, m]).flatten()
            n = len(places)
            counts.add(n)
            count = min(int(np.ceil(np.log2(1 + n))), MATCH_COUNTS - 1)
            age = action = back = 0
            if n:
                last = int(places[-1])
                age = 1 + int(time_bucket(x.c_time[b, m] - x.h_time[b, last], match.buckets))
                action, seen = int(x.h_action[b, last]), int(x.c_visible[b, m])
                back = min(int(np.ceil(np.log2(1 + seen - last))), MATCH_PLACES - 1)
            backs.add(back)
            of_match = match.action.weight[action] + match.back.weight[back]
            torch.testing.assert_close(got[b, m], match.count.weight[count] + match.age.weight[age] + of_match)
    assert {0, 1} < counts
    assert {0, 1} < backs


def test_padding_goes_and_comes_back_in_row_order() -> None:
    batch = random_batch(3, 5, 4)
    picked = rows_of(batch, np.array([2, 0]))
    x = inputs(picked)
    assert unpad(x.c_time.double(), x.c_real).shape == (8,)
    np.testing.assert_array_equal(unpad(x.c_item.float(), x.c_real), picked.t_item)
    assert x.h_item.tolist() == picked.h_item.reshape(2, 5).tolist()


@pytest.mark.parametrize("buckets", [16, 64])
def test_the_last_time_bucket_begins_where_it_says(buckets: int) -> None:
    at = torch.tensor([0.99 * LONGEST, 1.01 * LONGEST], dtype=torch.float64) * SECOND
    assert time_bucket(at.long(), buckets).tolist() == [buckets - 2, buckets - 1]


@pytest.mark.parametrize(
    ("counts", "there"),
    [
        (((9, 3, 0, 0, 0), (0, 0, 5, 0, 1)), True),
        (((9, 0, 3, 0, 0), (9, 0, 0, 0, 5)), False),
        (((9, 0, 3, 0, 0), (0, 0, 0, 1, 200)), False),
        (((9, 0, 3, 0, 0), (0, 0, 0, 3, 200)), True),
    ],
    ids=["an action more than labels", "an action a label", "a stray action more", "a rare action more"],
)
def test_actions_are_graded_that_say_more_than_the_label(counts: tuple[tuple[int, ...], ...], there: bool) -> None:
    assert replace(SIZES, train_actions=counts).graded == there


@pytest.mark.parametrize(
    ("counts", "there"),
    [
        (((0, 0, 9, 0, 0), (0, 0, 0, 5, 0)), True),
        (((1, 0, 9, 0, 0), (0, 0, 0, 5, 0)), True),
        (((2, 0, 9, 0, 0), (0, 0, 0, 5, 0)), False),
        (((9, 0, 0, 0, 0), (0, 0, 0, 5, 0)), False),
        (((0, 0, 9, 0, 0), (5, 0, 0, 0, 0)), False),
    ],
    ids=["all", "nine misses in ten", "fewer misses", "clicks alone", "misses alone"],
)
def test_histories_tell_how_much_a_user_clicks_that_hold_misses_too(
    counts: tuple[tuple[int, ...], ...], there: bool
) -> None:
    assert replace(SIZES, train_actions=counts).misses_known == there
