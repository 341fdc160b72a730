"""Paired bootstrap over users: how far apart two models are, and how sure that is.

Users are drawn with replacement, the same draw for all models, and every figure is computed anew from each draw's
rows. So what a hard or easy user does to both models cancels out of their difference, and impressions of one user are
never taken for independent ones.

A draw needs no sorting of its own: scores are ordered once, and a draw only changes how often each row counts.

Legend: n rows, P clicks, N others, U users, C draws of a chunk, D draws in all.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from hpgr.errors import DataError
from hpgr.metrics import EPSILON, ClickScores, Reals, user_aucs
from hpgr.schema import Array, Ints

METRICS = ("auc", "gauc", "log_loss")
"""What a draw computes."""
CHUNK_CELLS = 1 << 21
"""Draws times rows at once; bounds memory."""
LEVEL = 0.95
Scored = Mapping[str, Mapping[int, ClickScores]]
"""Test scores of each model by seed."""


@dataclass(frozen=True)
class Rows:
    """One model's scored impressions, ordered once so that any number of draws is cheap. `user` [n] are places among
    the users drawn from."""

    score: Reals
    clicked: npt.NDArray[np.bool_]
    user: Ints
    users: int

    @cached_property
    def _ordered(self) -> tuple[Ints, Ints, Ints, Ints]:
        """User of each other [N] by rising score; user of each click [P], and how many others score below, and at most
        as high as, it [P]."""
        others = np.sort(self.score[~self.clicked])
        order = np.argsort(self.score[~self.clicked], kind="stable")
        score = self.score[self.clicked]
        below, upto = (np.searchsorted(others, score, side) for side in ("left", "right"))
        return self.user[~self.clicked][order], self.user[self.clicked], below, upto

    @cached_property
    def _sums(self) -> tuple[Reals, Reals, Reals, Reals]:
        """Of each user [U]: rows, summed log loss, rows in GAUC, and their sum of AUC."""
        chance = np.clip(self.score, EPSILON, 1 - EPSILON)
        loss = -np.where(self.clicked, np.log(chance), np.log1p(-chance))
        who, area, rows = user_aucs(self.score, self.clicked, self.user)
        counted, earned = np.zeros(self.users), np.zeros(self.users)
        counted[who], earned[who] = rows, rows * area
        total = np.bincount(self.user, minlength=self.users).astype(np.float64)
        return total, np.bincount(self.user, loss, self.users).astype(np.float64), counted, earned

    def figures(self, times: Reals) -> dict[str, Reals]:
        """METRICS of draws in which user u counts times[c, u] times, [C] each; NaN where a draw has none."""
        rows, loss, counted, earned = self._sums
        with np.errstate(invalid="ignore", divide="ignore"):
            gauc = (times @ earned) / (times @ counted)
            return {"auc": self._auc(times), "gauc": gauc, "log_loss": (times @ loss) / (times @ rows)}

    def _auc(self, times: Reals) -> Reals:
        """Pairs of a click and an other in right order, ties counting half, over all pairs."""
        other_user, click_user, below, upto = self._ordered
        passed = np.zeros((len(times), len(other_user) + 1))
        np.cumsum(times[:, other_user], axis=1, out=passed[:, 1:])
        beaten = passed[:, below]
        if not np.array_equal(below, upto):
            beaten = (beaten + passed[:, upto]) / 2
        clicks = times[:, click_user]
        return np.einsum("cp,cp->c", clicks, beaten) / (clicks.sum(1) * passed[:, -1])


def spread_of(values: Sequence[float]) -> dict[str, Any]:
    """One figure over seeds: its mean, sample standard deviation (None of one value) and values."""
    return {
        "mean": statistics.fmean(values) if values else None,
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "values": list(values),
    }


def times_drawn(users: int, draws: int, seed: Sequence[int]) -> Reals:
    """How often each user is in each draw of `users` with replacement: [draws, users]."""
    drawn = np.random.default_rng(seed).integers(0, users, (draws, users))
    drawn += np.arange(draws)[:, None] * users
    return np.bincount(drawn.ravel(), minlength=draws * users).reshape(draws, users).astype(np.float64)


@dataclass(frozen=True)
class Resampled:
    """Figures on all users, and in each draw [D], of each model and seed: `whole[model][seed][metric]`."""

    whole: Mapping[str, Mapping[int, Mapping[str, float]]]
    drawn: Mapping[str, Mapping[int, Mapping[str, Reals]]]
    users: int

    def difference(self, model: str, baseline: str, metric: str) -> dict[str, Any] | None:
        """`model` less `baseline` over the seeds that both have, with its LEVEL percentile interval.

        Returns:
            mean, low and high; `sd` over the seeds of their differences (None of one seed), which the interval leaves
            out; mean, low and high relative to the baseline's figure; users that were drawn; seeds; `draws` that had a
            figure. None if no seed has one of both.
        """
        seeds = [s for s in self.whole[model] if s in self.whole[baseline]]
        ours, theirs = (np.array([self.whole[m][s][metric] for s in seeds]) for m in (model, baseline))
        if not seeds or not np.isfinite(ours - theirs).all():
            return None
        mean, reference = float((ours - theirs).mean()), float(theirs.mean())
        a, b = (np.mean([self.drawn[m][s][metric] for s in seeds], axis=0) for m in (model, baseline))
        usable = np.isfinite(a) & np.isfinite(b)
        gap = (a - b)[usable]
        return {
            "mean": mean,
            "sd": spread_of((ours - theirs).tolist())["sd"],
            **_interval(gap, ""),
            "relative": mean / reference if reference else None,
            **_interval(gap / b[usable], "relative_"),
            "users": self.users,
            "seeds": len(seeds),
            "draws": int(usable.sum()),
        }


def _interval(values: Reals, prefix: str) -> dict[str, float | None]:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values, (tail, 1 - tail)) if len(values) else (np.nan, np.nan)
    return {prefix + "low": _known(low), prefix + "high": _known(high)}


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def resample(scores: Scored, draws: int, seed: int) -> Resampled:
    """Draw users `draws` times, jointly for all models and seeds, and compute METRICS of each.

    Raises:
        DataError: the models were not scored on the same impressions.
    """
    keys = [(model, s) for model, by_seed in scores.items() for s in by_seed]
    if not keys:
        return Resampled({m: {} for m in scores}, {m: {} for m in scores}, 0)
    users, rows = _rows_of(scores, keys)
    size = max(1, CHUNK_CELLS // max(len(rows[0].score), users))
    drawn: list[list[dict[str, Reals]]] = [[] for _ in keys]
    for first in range(0, draws, size):
        times = times_drawn(users, min(size, draws - first), [seed, first])
        for own, part in zip(drawn, rows, strict=True):
            own.append(part.figures(times))
    everyone = np.ones((1, users))
    whole: dict[str, dict[int, dict[str, float]]] = {model: {} for model in scores}
    by_draw: dict[str, dict[int, dict[str, Reals]]] = {model: {} for model in scores}
    for (model, s), part, own in zip(keys, rows, drawn, strict=True):
        whole[model][s] = {name: float(v[0]) for name, v in part.figures(everyone).items()}
        by_draw[model][s] = {name: np.concatenate([d[name] for d in own]) for name in METRICS}
    return Resampled(whole, by_draw, users)


def _rows_of(scores: Scored, keys: Sequence[tuple[str, int]]) -> tuple[int, list[Rows]]:
    """Number of users, and the rows of each key, users counted alike in all."""
    known: Array | None = None
    first: Array | None = None
    rows = []
    for model, seed in keys:
        part = scores[model][seed]
        users, place = np.unique(part.user, return_inverse=True)
        clicked = part.label.astype(bool)
        facts = np.sort(2 * place + clicked)
        if known is None or first is None:
            known, first = users, facts
        if not (np.array_equal(users, known) and np.array_equal(facts, first)):
            name, other = f"{model} (seed {seed})", f"{keys[0][0]} (seed {keys[0][1]})"
            raise DataError(f"test scores of {name} and {other} are not of the same impressions: got {len(part.user)} "
                            f"rows of {len(users)} users, expected {len(first)} of {len(known)}; compare runs on one "
                            "prepared log")  # fmt: skip
        rows.append(Rows(part.score.astype(np.float64), clicked, place, len(users)))
    assert known is not None
    return len(known), rows
