"""The paired bootstrap: draws equal brute force, pairing removes what users share, known cases."""

from __future__ import annotations

import numpy as np
import pytest

from hpgr.bootstrap import CHUNK_CELLS, METRICS, Resampled, resample, times_drawn
from hpgr.errors import DataError
from hpgr.metrics import FEWEST_USERS, ClickScores, auc, auc_interval


def scores(seed: int, users: int = 30, quality: float = 1.0, grain: int = 0, world: int = 0) -> ClickScores:
    """Scores of one world's impressions, by a model of this quality; `grain` rounds them, so that some tie."""
    rng, noise = np.random.default_rng(world), np.random.default_rng(1000 + seed)
    user = np.sort(rng.integers(0, users, users * 12)).astype(np.uint64) * 7919
    taste, mood = rng.normal(size=len(user)), rng.normal(size=users)[(user // 7919).astype(int)]
    label = (rng.random(len(user)) < 1 / (1 + np.exp(-2 * taste + 1))).astype(np.int8)
    score = 1 / (1 + np.exp(-quality * taste - 2 * mood - 0.5 * noise.normal(size=len(user))))
    return ClickScores(np.round(score, grain) if grain else score, label, user, np.full(len(user), -1))


def repeated(part: ClickScores, times: np.ndarray) -> ClickScores:
    """The rows of a draw, one by one; a user who is drawn twice is two users, as the definition of GAUC wants."""
    users = np.unique(part.user)
    rows, owner = [], []
    for u, count in zip(users, times.astype(int), strict=True):
        for copy in range(count):
            mine = np.flatnonzero(part.user == u)
            rows.append(mine)
            owner.append(np.full(len(mine), u * 100 + copy))
    index = np.concatenate(rows)
    return ClickScores(part.score[index], part.label[index], np.concatenate(owner), part.request[index])


@pytest.mark.parametrize("grain", [0, 1])
def test_figures_of_a_draw_equal_those_of_its_rows_one_by_one(grain: int) -> None:
    models = {"a": {0: scores(0, grain=grain)}, "b": {0: scores(1, quality=0.5, grain=grain)}}
    found, times = resample(models, 20, 5), times_drawn(30, 20, [5, 0])
    for model, by_seed in models.items():
        for c in range(20):
            expected = repeated(by_seed[0], times[c]).compute()
            for metric in METRICS:
                assert found.drawn[model][0][metric][c] == pytest.approx(expected[metric], abs=1e-12)


@pytest.mark.parametrize("grain", [0, 1])
def test_figures_on_all_users_are_those_of_the_metrics(grain: int) -> None:
    part = scores(0, grain=grain)
    found, expected = resample({"a": {3: part}}, 1, 0), part.compute()
    assert found.whole["a"][3] == pytest.approx({m: expected[m] for m in METRICS})
    assert found.users == 30


def test_every_draw_takes_as_many_users_as_there_are() -> None:
    times = times_drawn(40, 300, [1])
    assert (times.sum(1) == 40).all()
    assert times.mean() == 1
    assert times.var() == pytest.approx(1 - 1 / 40, abs=0.1)  # binomial(40, 1 / 40)


def test_chunks_change_nothing_but_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    part = {"a": {0: scores(0)}}
    monkeypatch.setattr("hpgr.bootstrap.CHUNK_CELLS", 8 * 360)
    small = resample(part, 20, 0)
    assert len(small.drawn["a"][0]["auc"]) == 20
    assert len(np.unique(small.drawn["a"][0]["auc"])) == 20
    assert CHUNK_CELLS > 20 * 360


def test_a_model_differs_from_itself_by_nothing() -> None:
    same = {"a": {s: scores(s) for s in range(3)}}
    gap = resample(same | {"b": same["a"]}, 200, 0).difference("a", "b", "auc")
    assert gap is not None
    assert (gap["mean"], gap["low"], gap["high"], gap["relative"]) == (0, 0, 0, 0)
    assert (gap["users"], gap["seeds"], gap["draws"]) == (30, 3, 200)


def test_pairing_makes_a_clear_difference_certain() -> None:
    models = {"good": {s: scores(s, 200) for s in range(3)}, "poor": {s: scores(9 + s, 200, 0.6) for s in range(3)}}
    found = resample(models, 500, 0)
    gap, back = found.difference("good", "poor", "auc"), found.difference("poor", "good", "auc")
    assert gap is not None
    assert back is not None
    assert 0 < gap["low"] < gap["mean"] < gap["high"]
    assert back["low"] == pytest.approx(-gap["high"])
    spreads = [np.mean([found.drawn[m][s]["auc"] for s in range(3)], axis=0).std() for m in ("good", "poor")]
    assert (gap["high"] - gap["low"]) / (2 * 1.96) < 0.8 * np.hypot(*spreads)  # what users share cancels
    reference = np.mean([found.whole["poor"][s]["auc"] for s in range(3)])
    assert gap["relative"] == pytest.approx(gap["mean"] / reference)
    assert 0 < gap["relative_low"] < gap["relative"] < gap["relative_high"]
    each = [found.whole["good"][s]["auc"] - found.whole["poor"][s]["auc"] for s in range(3)]
    assert gap["sd"] == pytest.approx(np.std(each, ddof=1))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Two models of equal quality on 60 worlds: about 95 % of the intervals hold 0."""
    held = 0
    for world in range(60):
        models = {name: {0: scores(at, 60, world=world)} for name, at in (("a", 2 * world), ("b", 2 * world + 1))}
        gap = resample(models, 200, world).difference("a", "b", "auc")
        assert gap is not None
        held += gap["low"] <= 0 <= gap["high"]
    assert 51 <= held <= 60


def test_only_seeds_that_both_models_have_count() -> None:
    models = {"a": {0: scores(0), 1: scores(1)}, "b": {1: scores(2), 2: scores(3)}, "none": {}}
    found = resample(models, 50, 0)
    gap = found.difference("a", "b", "log_loss")
    assert gap is not None
    assert (gap["seeds"], gap["sd"]) == (1, None)
    assert gap["mean"] == pytest.approx(found.whole["a"][1]["log_loss"] - found.whole["b"][1]["log_loss"])
    assert found.difference("a", "none", "auc") is None


def test_draws_without_a_figure_are_left_out_and_counted() -> None:
    user = np.array([1, 1, 2, 2, 3, 3], np.uint64)
    label = np.array([1, 1, 0, 0, 0, 0], np.int8)  # without user 1 there is no click, and nobody has both classes
    none = np.full(6, -1)
    a = ClickScores(np.array([0.9, 0.8, 0.3, 0.1, 0.2, 0.5]), label, user, none)
    b = ClickScores(np.array([0.2, 0.8, 0.3, 0.9, 0.2, 0.5]), label, user, none)
    found = resample({"a": {0: a}, "b": {0: b}}, 300, 0)
    gap = found.difference("a", "b", "auc")
    assert gap is not None
    missing = int((times_drawn(3, 300, [0, 0])[:, 0] % 3 == 0).sum())
    assert 300 - gap["draws"] == missing > 0
    assert found.difference("a", "b", "gauc") is None


def test_other_impressions_are_refused() -> None:
    with pytest.raises(DataError, match=r"b \(seed 1\) and a \(seed 0\) are not of the same impressions"):
        resample({"a": {0: scores(0)}, "b": {1: scores(0, world=1)}}, 10, 0)


def test_nothing_to_draw_from() -> None:
    assert resample({"a": {}}, 10, 0) == Resampled({"a": {}}, {"a": {}}, 0)


def test_the_interval_of_one_model_is_that_of_drawn_users() -> None:
    part = scores(0)
    drawn = resample({"a": {0: part}}, 2000, 5).drawn["a"][0]["auc"]
    assert auc_interval(part.score, part.label, part.user) == pytest.approx(
        np.quantile(drawn, (0.025, 0.975)), abs=0.015
    )


def test_rows_of_a_user_are_not_taken_for_independent() -> None:
    """Each user's rows ten times over say no more of other users."""
    part = scores(0)
    again = auc_interval(np.repeat(part.score, 10), np.repeat(part.label, 10), np.repeat(part.user, 10))
    assert again == pytest.approx(auc_interval(part.score, part.label, part.user))


def test_an_interval_asks_for_users_and_both_classes() -> None:
    part = scores(0)
    few = part.user < np.unique(part.user)[19]
    assert auc_interval(part.score[few], part.label[few], part.user[few]) is None
    assert auc_interval(part.score, np.ones_like(part.label), part.user) is None
    rare = np.arange(len(part.label)) == 3
    low, high = auc_interval(part.score, rare.astype(np.int8), part.user) or (0.0, 0.0)
    assert 0 <= low < high <= 1


def test_an_interval_leaves_out_one_draw_in_forty_on_either_side() -> None:
    models = {"good": {s: scores(s) for s in range(2)}, "poor": {s: scores(9 + s, quality=0.6) for s in range(2)}}
    found = resample(models, 400, 0)
    gap = found.difference("good", "poor", "auc")
    assert gap is not None
    good, poor = (np.mean([found.drawn[m][s]["auc"] for s in range(2)], axis=0) for m in ("good", "poor"))
    assert (gap["low"], gap["high"]) == pytest.approx(tuple(np.quantile(good - poor, (0.025, 0.975))))
    relative = np.quantile((good - poor) / poor, (0.025, 0.975))
    assert (gap["relative_low"], gap["relative_high"]) == pytest.approx(tuple(relative))


def test_the_interval_of_one_model_equals_the_loop() -> None:
    """Obuchowski's variance, user by user."""
    part = scores(0, users=FEWEST_USERS)
    low, high = auc_interval(part.score, part.label, part.user) or (0.0, 0.0)
    clicks, others = part.score[part.label == 1], part.score[part.label == 0]
    area, users = auc(part.score, part.label), np.unique(part.user)
    assert len(users) == FEWEST_USERS
    told = []
    for user in users:
        mine = part.user == user
        wins = [np.mean((others < s) + (others == s) / 2) - area for s in part.score[mine & (part.label == 1)]]
        losses = [np.mean((clicks > s) + (clicks == s) / 2) - area for s in part.score[mine & (part.label == 0)]]
        told.append(sum(wins) / len(clicks) + sum(losses) / len(others))
    half = 1.96 * (len(users) / (len(users) - 1) * np.sum(np.square(told))) ** 0.5
    assert (low, high) == pytest.approx((area - half, area + half))
