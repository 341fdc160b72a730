"""Exact metrics that merge: any split of the rows over workers gives the same bits as one pass over all.

Click metrics keep the rows (17 to 25 bytes each) and sort them; ranks are integers, and floats are summed in
sorted order. Next-item metrics keep integer counts. Nothing here loops over users, requests or rows.

Legend: n rows, P positives (clicks), N negatives, G groups (users or requests), T groups of tied scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hpgr.errors import TrainingError
from hpgr.schema import Array, Ints, offsets_of

Reals = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Figures = dict[str, float | int | None]

EPSILON = 1e-7
"""Probabilities are clipped to [EPSILON, 1 - EPSILON] in the log loss."""
CUTOFFS = (1, 5, 10, 20)
"""The k of HR@k and NDCG@k of the next-item ranking."""
NO_REQUEST = -1
FEWEST_USERS = 20
"""Users below which an interval says nothing of others."""


@dataclass(frozen=True)
class ClickScores:
    """Scored impressions. All arrays [n]: probability, 0/1 label, user key, request key (-1 = not in a list).

    A request belongs to one user, so its key has to be unique within the user only.

    Raises:
        TrainingError: if a score is not a probability (a diverged model gives NaN).
    """

    score: Array
    label: Array
    user: Array
    request: Array

    def __post_init__(self) -> None:
        n = len(self.score)
        assert len(self.label) == len(self.user) == len(self.request) == n, "columns differ in length"
        assert bool(np.isin(self.label, (0, 1)).all()), "labels must be 0 or 1; leave unlabelled rows out"
        bad = n - int(np.count_nonzero((self.score >= 0) & (self.score <= 1)))
        if bad:
            raise TrainingError(
                f"{bad} of {n} scores are not probabilities, expected finite values in [0, 1]; "
                "the model has probably diverged: lower optimiser.lr or optimiser.clip_norm"
            )

    @classmethod
    def empty(cls) -> ClickScores:
        """No rows; `merge([empty, x])` gives the figures of x."""
        return cls(np.zeros(0), np.zeros(0, np.int8), np.zeros(0, np.uint64), np.zeros(0, np.int64))

    @classmethod
    def merge(cls, parts: Sequence[ClickScores]) -> ClickScores:
        """All rows of the parts. User keys become uint64: NumPy would join int64 and uint64 as floats."""
        if not parts:
            return cls.empty()
        return cls(
            np.concatenate([p.score for p in parts]),
            np.concatenate([p.label for p in parts]),
            np.concatenate([p.user.astype(np.uint64) for p in parts]),
            np.concatenate([p.request.astype(np.int64) for p in parts]),
        )

    def compute(self) -> Figures:
        """AUC, GAUC, log loss, calibration and, where rows have requests, NDCG and MRR per request.

        Calibration is mean prediction / mean label. A figure that is not defined for the rows is None.
        """
        score, clicked = self.score.astype(np.float64), self.label.astype(bool)
        user = self.user.astype(np.uint64)
        n, positives = len(score), int(clicked.sum())
        ordered = np.sort(score)
        figures: Figures = {
            "auc": auc(score, clicked),
            **_grouped_auc(score, clicked, user),
            "log_loss": _log_loss(np.sort(score[clicked]), np.sort(score[~clicked])) if n else None,
            "calibration": float(ordered.sum()) / positives if positives else None,
            "n": n,
            "positives": positives,
        }
        listed = self.request != NO_REQUEST
        if listed.any():
            figures |= _request_figures(score[listed], clicked[listed], user[listed], self.request[listed])
        return figures


def _log_loss(clicked: Reals, others: Reals) -> float:
    """Mean negative log likelihood of sorted probabilities; clipped as in sklearn, with our EPSILON."""
    low, high = EPSILON, 1 - EPSILON
    total = np.log(np.clip(clicked, low, high)).sum() + np.log1p(-np.clip(others, low, high)).sum()
    return -float(total) / (len(clicked) + len(others))


@dataclass(frozen=True)
class _Ties:
    """Rows sorted by group and score, cut into T runs of equal score.

    `order` [n] sorts the rows; `run` [n] is the run of a sorted row; `size`, `clicks`, `group`, `start` [T]
    count the run's rows and clicks, name its group and say how many rows of the group come before it.
    """

    order: Ints
    run: Ints
    size: Ints
    clicks: Ints
    group: Ints
    start: Ints

    @classmethod
    def of(cls, score: Reals, clicked: Bools, keys: Sequence[Array] = ()) -> _Ties:
        """Ascending score inside each distinct tuple of `keys`; needs at least one row."""
        order = np.lexsort((score, *keys))
        new_group = np.zeros(len(score), bool)
        new_group[0] = True
        for key in keys:
            new_group[1:] |= np.diff(key[order]) != 0
        sorted_score = score[order]
        new_run = new_group.copy()
        new_run[1:] |= sorted_score[1:] != sorted_score[:-1]
        first = np.flatnonzero(new_run)
        group_first = np.flatnonzero(new_group)
        group = np.cumsum(new_group)[first] - 1
        return cls(
            order=order,
            run=np.cumsum(new_run) - 1,
            size=np.diff(np.append(first, len(score))),
            clicks=np.add.reduceat(clicked[order].astype(np.int64), first),
            group=group,
            start=first - group_first[group],
        )

    def per_group(self, values: Array) -> Array:
        """Sum [T] values over the runs of each group -> [G]."""
        return np.add.reduceat(values, np.flatnonzero(np.diff(self.group, prepend=-1)))

    def doubled_wins(self) -> tuple[Ints, Ints, Ints]:
        """Per group [G]: twice the (click, other) pairs in right order, ties counting half; P; N."""
        positives, rows = self.per_group(self.clicks), self.per_group(self.size)
        rank_sums = self.per_group(self.clicks * (2 * self.start + self.size + 1))
        return rank_sums - positives * (positives + 1), positives, rows - positives


def auc(score: Array, label: Array) -> float | None:
    """Area under the ROC curve, ties by midrank as in sklearn's roc_auc_score; None without both classes.

    score [n] any finite reals, label [n] 0/1.
    """
    clicked = np.asarray(label).astype(bool)
    if clicked.all() or not clicked.any():
        return None
    wins, positives, negatives = _Ties.of(np.asarray(score), clicked).doubled_wins()
    return int(wins[0]) / (2 * int(positives[0]) * int(negatives[0]))


def auc_interval(score: Array, label: Array, user: Array) -> tuple[float, float] | None:
    """95 % interval of an AUC for other users, whose impressions are not independent (Obuchowski 1997, Biometrics 53).

    Each row is placed among those of the other class: a click by the share that scores below it, any other row by the
    share of clicks above; a user counts by how far their placements are from the AUC. score, label 0/1, user [n].
    None of one class alone or of fewer than FEWEST_USERS users.
    """
    clicked, names = np.asarray(label).astype(bool), np.unique(user, return_inverse=True)[1]
    users = int(names.max(initial=-1)) + 1
    if users < FEWEST_USERS or clicked.all() or not clicked.any():
        return None
    told = np.zeros(users)
    means = []
    for own, sign in ((clicked, 1), (~clicked, -1)):
        rivals = np.sort(sign * score[~own])
        mine = sign * score[own]
        placed = (np.searchsorted(rivals, mine, "left") + np.searchsorted(rivals, mine, "right")) / (2 * len(rivals))
        means.append(float(placed.mean()))
        told += np.bincount(names[own], placed - means[-1], users) / len(mine)
    half = 1.96 * float(np.sqrt(users / (users - 1) * (told**2).sum()))
    return max(means[0] - half, 0.0), min(means[0] + half, 1.0)


def _grouped_auc(score: Reals, clicked: Bools, user: Array) -> Figures:
    """Mean of users' AUC weighted by their impressions, over users with both classes."""
    who, area, rows = user_aucs(score, clicked, user)
    if not len(who):
        return {"gauc": None, "users_in_gauc": 0}
    return {"gauc": float((rows * area).sum()) / int(rows.sum()), "users_in_gauc": len(rows)}


def user_aucs(score: Reals, clicked: Bools, user: Array) -> tuple[Array, Reals, Ints]:
    """Users with both classes in order, the AUC of each, and its number of rows; `clicked` [n] booleans."""
    if not len(score):
        return user[:0], np.zeros(0), np.zeros(0, np.int64)
    wins, positives, negatives = _Ties.of(score, clicked, (user,)).doubled_wins()
    both = (positives > 0) & (negatives > 0)
    wins, positives, negatives = wins[both], positives[both], negatives[both]
    return np.unique(user)[both], wins / (2 * positives * negatives), positives + negatives


def _request_figures(score: Reals, clicked: Bools, user: Array, request: Array) -> Figures:
    """Mean NDCG (whole list, binary gain) and reciprocal rank of the first click, over the lists that can be
    judged: a click and two candidates or more.

    Tied candidates count by expectation over their random orders: constant scores earn what chance earns.
    """
    ties = _Ties.of(-score, clicked, (request.astype(np.int64), user))
    rows, clicks = ties.per_group(ties.size), ties.per_group(ties.clicks)
    judged = (clicks > 0) & (rows > 1)
    if not judged.any():
        return {"ndcg": None, "mrr": None, "requests": 0}
    gains = np.append(0.0, np.cumsum(1 / np.log2(np.arange(2, rows.max() + 2))))
    per_click = (gains[ties.start + ties.size] - gains[ties.start]) / ties.size
    dcg = ties.per_group(ties.clicks * per_click)[judged]
    reciprocal = _reciprocal_ranks(ties)[judged]
    count = int(judged.sum())
    return {
        "ndcg": float((dcg / gains[clicks[judged]]).sum()) / count,
        "mrr": float(reciprocal.sum()) / count,
        "requests": count,
    }


def _reciprocal_ranks(ties: _Ties) -> Reals:
    """Expected 1 / rank of the first click of each group -> [G]; 0 where nothing was clicked.

    The first run with a click decides. Of m tied rows with c clicks, the first click stands at place j
    (from 0) with probability C(m - 1 - j, c - 1) / C(m, c): the other clicks fill c - 1 of the m - 1 - j
    places after it.
    """
    hit = np.flatnonzero(ties.clicks > 0)
    deciding = hit[np.diff(ties.group[hit], prepend=-1) != 0]
    size, clicks, start = ties.size[deciding], ties.clicks[deciding], ties.start[deciding]
    places = size - clicks + 1
    begins = offsets_of(places)
    which = np.repeat(np.arange(len(deciding)), places)
    j = np.arange(begins[-1]) - begins[which]
    m, c = size[which], clicks[which]
    # Logarithms of factorials: the binomials themselves overflow from a few hundred tied rows on.
    log = np.append(0.0, np.cumsum(np.log(np.arange(1, ties.size.max() + 1))))
    chance = np.exp(log[m - 1 - j] - log[c - 1] - log[m - c - j] - log[m] + log[c] + log[m - c])
    out = np.zeros(int(ties.group[-1]) + 1)
    if len(deciding):
        out[ties.group[deciding]] = np.add.reduceat(chance / (start[which] + j + 1), begins[:-1])
    return out


def roc_points(score: Array, label: Array, most: int = 400) -> tuple[Reals, Reals] | None:
    """False and true positive rates, each [at most `most`] from 0 to 1; None without both classes."""
    clicked = np.asarray(label).astype(bool)
    if clicked.all() or not clicked.any():
        return None
    ties = _Ties.of(-np.asarray(score, np.float64), clicked)
    hits, rows = offsets_of(ties.clicks), offsets_of(ties.size)
    kept = np.unique(np.linspace(0, len(hits) - 1, most).round().astype(np.int64))
    return (rows - hits)[kept] / (rows[-1] - hits[-1]), hits[kept] / hits[-1]


@dataclass(frozen=True)
class Bin:
    """Impressions with a value in [low, high]: their count, clicks, mean score and AUC (None: one class)."""

    low: float
    high: float
    n: int
    positives: int
    predicted: float
    auc: float | None

    @property
    def observed(self) -> float:
        """Share of impressions clicked."""
        return self.positives / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `observed` after Wilson (1927); it does not collapse at no click or all clicks."""
        z, p, n = 1.96, self.observed, self.n
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return float(min(max(middle - half, 0.0), p)), float(max(min(middle + half, 1.0), p))


def quantile_bins(values: Array, score: Array, label: Array, count: int) -> list[Bin]:
    """Cut rows into at most `count` bins of about equal size by `values` [n]; equal values share a bin."""
    if not len(values):
        return []
    upper = np.unique(np.quantile(values, np.arange(1, count + 1) / count, method="lower"))
    where = np.searchsorted(upper, values, side="left")
    members = (np.flatnonzero(where == b) for b in range(len(upper)))
    return [_bin(values[rows], np.asarray(score[rows], np.float64), label[rows]) for rows in members]


def _bin(values: Array, score: Reals, label: Array) -> Bin:
    mean = float(np.sort(score).sum()) / len(score)
    low, high = float(values.min()), float(values.max())
    return Bin(low, high, len(score), int(np.count_nonzero(label)), mean, auc(score, label))


@dataclass(frozen=True)
class RankCounts:
    """Counts of ranks 1..20 and the sum of 1 / rank in whole units of 2**-60: integers, so sums are exact."""

    n: int
    at_rank: tuple[int, ...]
    reciprocal: int

    @classmethod
    def of(cls, rank: Array) -> RankCounts:
        """From ranks [n], 1 = best."""
        ranks, counts = np.unique(rank, return_counts=True)
        pairs = list(zip(ranks.tolist(), counts.tolist(), strict=True))
        head = np.bincount(rank[rank <= CUTOFFS[-1]], minlength=CUTOFFS[-1] + 1)[1:]
        return cls(len(rank), tuple(head.tolist()), sum(c * (2**60 // r) for r, c in pairs))

    def __add__(self, other: RankCounts) -> RankCounts:
        at_rank = tuple(a + b for a, b in zip(self.at_rank, other.at_rank, strict=True))
        return RankCounts(self.n + other.n, at_rank, self.reciprocal + other.reciprocal)

    def compute(self, suffix: str = "") -> Figures:
        """HR@k, NDCG@k and MRR, names ended by `suffix`; None when there is no rank."""
        counts = np.array(self.at_rank, np.float64)
        gains = counts / np.log2(np.arange(2, len(counts) + 2))
        sums: dict[str, float] = {f"hr@{k}": float(counts[:k].sum()) for k in CUTOFFS}
        sums |= {f"ndcg@{k}": float(gains[:k].sum()) for k in CUTOFFS}
        sums["mrr"] = self.reciprocal / 2**60
        figures: Figures = {name + suffix: s / self.n if self.n else None for name, s in sums.items()}
        return {**figures, f"n{suffix}": self.n}


@dataclass(frozen=True)
class RankSums:
    """Next-item ranking over the catalogue: every target, and those not in the user's history ("unseen")."""

    every: RankCounts
    unseen: RankCounts

    @classmethod
    def from_ranks(cls, rank: Array, seen: Array) -> RankSums:
        """rank [n] integers from 1 (best), seen [n] whether the target is in the user's history."""
        rank, seen = np.asarray(rank, np.int64), np.asarray(seen, bool)
        assert len(rank) == len(seen), f"got {len(rank)} ranks and {len(seen)} flags"
        assert not len(rank) or int(rank.min()) >= 1, f"got rank {rank.min()}, ranks start at 1"
        return cls(RankCounts.of(rank), RankCounts.of(rank[~seen]))

    @classmethod
    def empty(cls) -> RankSums:
        """The zero of `+`."""
        return cls.from_ranks(np.zeros(0, np.int64), np.zeros(0, bool))

    def __add__(self, other: RankSums) -> RankSums:
        return RankSums(self.every + other.every, self.unseen + other.unseen)

    def __radd__(self, other: Any) -> RankSums:
        """Lets `sum(parts)` start at 0."""
        return self if other == 0 else NotImplemented

    def compute(self) -> Figures:
        """hr@k, ndcg@k for k of CUTOFFS, mrr, n; the same with "_unseen"."""
        return self.every.compute() | self.unseen.compute("_unseen")
