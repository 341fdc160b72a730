"""Metrics equal sklearn or a plain loop, and merge without a changed bit."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score, roc_curve

from hpgr.errors import TrainingError
from hpgr.metrics import Bin, ClickScores, RankSums, auc, quantile_bins, roc_points


def clicks(score, label, user=None, request=None) -> ClickScores:
    n = len(score)
    return ClickScores(
        np.asarray(score, np.float64),
        np.asarray(label, np.int8),
        np.zeros(n, np.uint64) if user is None else np.asarray(user, np.uint64),
        np.full(n, -1) if request is None else np.asarray(request, np.int64),
    )


@st.composite
def rows(draw: st.DrawFn, max_size: int = 60) -> ClickScores:
    """Scores on a coarse grid (many ties), a few users, short lists, some rows without a list."""
    n = draw(st.integers(0, max_size))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    levels = draw(st.integers(1, 12))
    score = rng.integers(0, levels + 1, n) / levels if draw(st.booleans()) else rng.random(n).astype(np.float32)
    label = rng.random(n) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    return clicks(score, label, rng.integers(0, 6, n).astype(np.uint64) + np.uint64(2**64 - 7), rng.integers(-1, 5, n))


@given(rows())
def test_auc_and_log_loss_equal_sklearn(part):
    got = part.compute()
    if len(set(part.label.tolist())) == 2:
        assert got["auc"] == pytest.approx(roc_auc_score(part.label, part.score), abs=1e-12)
        assert auc(part.score, part.label) == got["auc"]
    else:
        assert got["auc"] is None
    if got["n"]:
        clipped = np.clip(part.score.astype(np.float64), 1e-7, 1 - 1e-7)
        assert got["log_loss"] == pytest.approx(log_loss(part.label, clipped, labels=[0, 1]), rel=1e-9)


@given(rows())
def test_gauc_equals_a_loop_over_users(part):
    areas, weights = [], []
    for user in sorted(set(part.user.tolist())):
        mine = part.user == user
        if len(set(part.label[mine].tolist())) == 2:
            areas.append(roc_auc_score(part.label[mine], part.score[mine]))
            weights.append(int(mine.sum()))
    got = part.compute()
    assert got["users_in_gauc"] == len(areas)
    assert got["gauc"] == (pytest.approx(np.average(areas, weights=weights)) if areas else None)


def list_figures(score, label) -> tuple[float, float]:
    """NDCG and MRR of one list as the mean over every order that its ties allow."""
    ndcg, mrr = [], []
    ideal = sum(1 / math.log2(r + 1) for r in range(1, sum(label) + 1))
    for order in itertools.permutations(range(len(score))):
        if all(score[a] >= score[b] for a, b in itertools.pairwise(order)):
            hits = [rank for rank, row in enumerate(order, 1) if label[row]]
            ndcg.append(sum(1 / math.log2(r + 1) for r in hits) / ideal)
            mrr.append(1 / hits[0])
    return float(np.mean(ndcg)), float(np.mean(mrr))


@given(rows(max_size=24))
def test_request_figures_equal_the_mean_over_all_orders_of_ties(part):
    wanted = []
    for key in sorted(set(zip(part.user.tolist(), part.request.tolist(), strict=True))):
        mine = (part.user == key[0]) & (part.request == key[1])
        if key[1] >= 0 and 2 <= mine.sum() <= 6 and part.label[mine].any():
            wanted.append(list_figures(part.score[mine].tolist(), part.label[mine].tolist()))
        elif mine.sum() > 6:
            return  # too many permutations
    got = part.compute()
    if not (part.request >= 0).any():
        assert "ndcg" not in got
    elif not wanted:
        assert (got["ndcg"], got["mrr"], got["requests"]) == (None, None, 0)
    else:
        assert got["requests"] == len(wanted)
        assert (got["ndcg"], got["mrr"]) == pytest.approx(np.mean(wanted, axis=0), abs=1e-12)


# score   label  rank  gain                     one list a block
TABLE = """
  .9       0      1     -
  .8       1      2     1/log2(3) = .63093
  .1       1      3     1/log2(4) = .5         ideal 1.63093 -> NDCG 0.693426, RR 1/2

  .3       1      1     1                      ideal 1       -> NDCG 1,        RR 1
  .2       0      2     -

  .5       1      1-2   (1 + .63093) / 2       ideal 1       -> NDCG .815465,  RR (1 + 1/2) / 2 = .75
  .5       0      1-2   -
"""


def test_small_table_by_hand():
    score = [0.9, 0.8, 0.1, 0.3, 0.2, 0.5, 0.5]
    label = [0, 1, 1, 1, 0, 1, 0]
    got = clicks(score, label, request=[7, 7, 7, 8, 8, 9, 9]).compute()
    assert got["ndcg"] == pytest.approx((0.693426 + 1 + 0.815465) / 3, abs=1e-6), TABLE
    assert got["mrr"] == pytest.approx((0.5 + 1 + 0.75) / 3), TABLE
    assert (got["requests"], got["n"], got["positives"]) == (3, 7, 4)


def test_lists_without_a_click_or_a_choice_are_left_out():
    got = clicks([0.1, 0.2, 0.3, 0.9, 0.4], [0, 0, 1, 1, 0], request=[1, 1, 2, 3, 3]).compute()
    assert (got["requests"], got["ndcg"], got["mrr"]) == (1, 1.0, 1.0)


def test_long_ties_do_not_overflow():
    n = 3000
    got = clicks(np.full(n, 0.5), np.arange(n) % 3 == 0, request=np.zeros(n)).compute()
    first = sum((2 / 3) ** j / 3 / (j + 1) for j in range(200))  # geometric limit of the first click's place
    assert got["mrr"] == pytest.approx(first, rel=1e-2)


def test_same_request_key_of_two_users_is_two_lists():
    got = clicks([0.9, 0.1, 0.9, 0.1], [1, 0, 0, 1], user=[1, 1, 2, 2], request=[0, 0, 0, 0]).compute()
    assert (got["requests"], got["mrr"]) == (2, 0.75)


@given(rows(), st.integers(0, 2**32), st.integers(1, 5))
def test_merged_parts_equal_the_whole_to_the_bit(whole, seed, count):
    rng = np.random.default_rng(seed)
    n = len(whole.score)
    order, part_of = rng.permutation(n), rng.integers(0, count, n)
    parts = [
        ClickScores(*(getattr(whole, f)[order][part_of == p] for f in ("score", "label", "user", "request")))
        for p in range(count)
    ]
    merged = ClickScores.merge([ClickScores.empty(), *parts]).compute()
    nested = ClickScores.merge([ClickScores.merge(parts[1:]), parts[0]]).compute()
    assert merged == nested == whole.compute()


def test_merge_keeps_signed_and_unsigned_keys_apart():
    key = 2**63 + 1  # as float64 this would equal 2**63
    parts = [clicks([0.9, 0.1], [1, 0], [key, key]), clicks([0.2, 0.8], [1, 0], [2**63, 2**63])]
    signed = ClickScores(parts[1].score, parts[1].label, parts[1].user.astype(np.int64), parts[1].request)
    assert ClickScores.merge([parts[0], signed]).compute()["gauc"] == 0.5
    assert ClickScores.merge([parts[0], signed]).compute()["users_in_gauc"] == 2


@pytest.mark.parametrize(("label", "calibration"), [(0, None), (1, 0.5)])
def test_one_class_is_none(label, calibration):
    got = clicks([0.4, 0.6], [label, label]).compute()
    assert (got["auc"], got["gauc"], got["calibration"]) == (None, None, calibration)
    assert got["log_loss"] is not None


def test_no_rows_is_none():
    got = ClickScores.merge([]).compute()
    assert {k for k, v in got.items() if v is None} == {"auc", "gauc", "log_loss", "calibration"}
    assert (got["n"], got["positives"], got["users_in_gauc"]) == (0, 0, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1, 1.5])
def test_a_score_that_is_no_probability_is_an_error(bad):
    with pytest.raises(TrainingError, match=r"1 of 2 scores are not probabilities.*lower"):
        clicks([0.5, bad], [0, 1])


def test_columns_must_agree():
    with pytest.raises(AssertionError, match="differ in length"):
        ClickScores(np.zeros(2), np.zeros(1, np.int8), np.zeros(2, np.uint64), np.zeros(2, np.int64))
    with pytest.raises(AssertionError, match="0 or 1"):
        clicks([0.5], [-1])


def test_roc_points_follow_sklearn():
    rng = np.random.default_rng(0)
    score, label = rng.integers(0, 30, 500) / 30, rng.random(500) < 0.3
    points = roc_points(score, label)
    assert points is not None
    false, true, _ = roc_curve(label, score, drop_intermediate=False)
    np.testing.assert_allclose(points, (false, true))
    assert np.trapezoid(points[1], points[0]) == pytest.approx(auc(score, label))
    assert roc_points(score, np.ones(500)) is None


def test_roc_of_many_scores_is_thinned_and_keeps_its_ends():
    rng = np.random.default_rng(0)
    points = roc_points(rng.random(10_000), rng.random(10_000) < 0.5, most=50)
    assert points is not None
    assert [len(p) for p in points] == [50, 50]
    assert [(p[0], p[-1]) for p in points] == [(0, 1), (0, 1)]


@given(rows(), st.integers(1, 8))
def test_bins_hold_every_row_once_in_order(part, count):
    bins = quantile_bins(part.request, part.score, part.label, count)
    assert len(bins) <= count
    assert sum(b.n for b in bins) == len(part.score)
    assert sum(b.positives for b in bins) == part.label.sum()
    assert all(a.high < b.low for a, b in itertools.pairwise(bins))
    assert all(0 <= b.interval[0] <= b.observed <= b.interval[1] <= 1 for b in bins)
    assert all((b.auc is None) == (b.observed in (0, 1)) for b in bins)


@given(st.lists(st.tuples(st.integers(1, 60), st.booleans()), max_size=50), st.integers(0, 50))
def test_rank_sums_equal_a_loop_and_merge_exactly(pairs, cut):
    rank = np.array([p[0] for p in pairs], np.int64)
    seen = np.array([p[1] for p in pairs], bool)
    got = RankSums.from_ranks(rank, seen)
    for suffix, mine in (("", rank.tolist()), ("_unseen", rank[~seen].tolist())):
        for k in (1, 5, 10, 20):
            gain = [1 / math.log2(r + 1) for r in mine if r <= k]
            assert got.compute()[f"hr@{k}{suffix}"] == (len(gain) / len(mine) if mine else None)
            wanted = pytest.approx(sum(gain) / len(mine), abs=1e-12) if mine else None
            assert got.compute()[f"ndcg@{k}{suffix}"] == wanted
        wanted = pytest.approx(np.mean([1 / r for r in mine]), abs=1e-12) if mine else None
        assert got.compute()[f"mrr{suffix}"] == wanted
        assert got.compute()[f"n{suffix}"] == len(mine)
    parts = [RankSums.from_ranks(rank[:cut], seen[:cut]), RankSums.from_ranks(rank[cut:], seen[cut:])]
    assert parts[0] + parts[1] == got == sum([parts[1], parts[0], RankSums.empty()])


def test_ranks_start_at_one():
    with pytest.raises(AssertionError, match="start at 1"):
        RankSums.from_ranks(np.array([0]), np.array([False]))


@pytest.mark.parametrize(
    ("n", "positives", "expected"), [(10, 0, (0.0, 0.2775)), (10, 5, (0.2366, 0.7634)), (263, 81, (0.2553, 0.3662))]
)
def test_wilsons_intervals_are_those_of_tables(n: int, positives: int, expected: tuple[float, float]) -> None:
    """Newcombe 1998, method 3, has the last: 81 of 263."""
    assert Bin(0.0, 1.0, n, positives, 0.5, None).interval == pytest.approx(expected, abs=1e-4)
