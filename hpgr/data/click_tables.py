"""Scorers without a model: a table of training-time click rates by a few facts of an impression.

What a table of position and "engaged before" reaches is what a ranker has to beat (docs/results.md). Rates are drawn
towards the base rate by PRIOR impressions, so cells of few impressions say little.

Legend: I impressions of a bucket, C cells of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hpgr.data.preparation import Prepared
from hpgr.schema import FEATURE_PREFIX, TEST, TRAIN, Array, Ints, Timelines

PRIOR = 10
"""Impressions at the base rate that every cell begins with."""


class Counts(NamedTuple):
    """Impressions and clicks of each cell [C] in training time."""

    shown: Ints
    clicked: Ints

    def __add__(self, other: object) -> Counts:
        assert isinstance(other, Counts)
        return Counts(self.shown + other.shown, self.clicked + other.clicked)

    def rates(self) -> Array:
        """Click rate of each cell [C]."""
        base = self.clicked.sum() / max(int(self.shown.sum()), 1)
        return (self.clicked + PRIOR * base) / (self.shown + PRIOR)


def count_clicks(bucket: int, prepared: Prepared, features: Sequence[str]) -> Counts:
    """A bucket's labelled training impressions by cell."""
    timelines = Timelines.from_table(prepared.timelines(bucket))
    cell, cells = _cells(timelines, prepared, features)
    used = (timelines.t_split == TRAIN) & (timelines.t_label >= 0)
    clicked = used & (timelines.t_label == 1)
    return Counts(np.bincount(cell[used], minlength=cells), np.bincount(cell[clicked], minlength=cells))


class Scored(NamedTuple):
    """Labelled test impressions: rate of their cell, label, key of the user, number of the request."""

    score: Array
    label: Array
    user: Array
    request: Array


def score_test(bucket: int, prepared: Prepared, features: Sequence[str], rates: Array) -> Scored:
    """A bucket's labelled test impressions, scored by their cell's rate."""
    timelines = Timelines.from_table(prepared.timelines(bucket))
    cell, _ = _cells(timelines, prepared, features)
    used = (timelines.t_split == TEST) & (timelines.t_label >= 0)
    user = np.repeat(timelines.user_hash, np.diff(timelines.t_offsets))
    return Scored(rates[cell[used]], timelines.t_label[used], user[used], timelines.t_request[used].astype(np.int64))


def _cells(timelines: Timelines, prepared: Prepared, features: Sequence[str]) -> tuple[Ints, int]:
    """Cell of each impression [I], and how many cells there are: the features' values and whether the user engaged with
    the item before."""
    names, sizes = prepared.manifest["features"]["t_cat"], prepared.manifest["vocabulary"]["categories"]
    cell, cells = engaged_before(timelines).astype(np.int64), 2
    for feature in features:
        cell = cell * sizes[FEATURE_PREFIX + feature] + timelines.t_cat[:, names.index(feature)]
        cells *= sizes[FEATURE_PREFIX + feature]
    return cell, cells


def engaged_before(timelines: Timelines) -> Array:
    """Whether an impression's item is among the user's events that the impression may look at: [I]."""
    span = 1 + max(int(timelines.h_item.max(initial=0)), int(timelines.t_item.max(initial=0)))
    row = np.arange(len(timelines))
    event = np.repeat(row, np.diff(timelines.h_offsets)) * span + timelines.h_item
    known, first = np.unique(event, return_index=True)
    shown = np.repeat(row, np.diff(timelines.t_offsets))
    if not len(known):
        return np.zeros(len(shown), bool)
    wanted = shown * span + timelines.t_item
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    place = first[at] - timelines.h_offsets[:-1][shown]
    return (known[at] == wanted) & (place < timelines.t_visible)
