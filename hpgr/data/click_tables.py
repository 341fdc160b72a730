"""Scorers without a model: training-time click rates by a few facts of an impression, or of items and users.

What a table of position and "engaged before" reaches is what a ranker has to beat (docs/results.md), and, where
histories hold misses too, what items are usually worth and how the user has differed from that. Rates are drawn towards
the base rate by PRIOR impressions, so what was seen a few times says little.

Legend: I impressions of a bucket or batch, C cells of a table, V item table, A actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hpgr.data.preparation import Prepared
from hpgr.schema import FEATURE_PREFIX, TEST, TRAIN, Array, Batch, Ints, Timelines, offsets_of

PRIOR = 10
"""Impressions at the base rate that every cell, and past events as usual that every user, begins with."""


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


def rate_users(batch: Batch, item_rates: Array, action_rates: Array) -> Array:
    """Click rate of each candidate's item [V], plus how much better than usual the user took past items: [I].

    The baseline estimate of item and user (Koren 2008, section 2.1) of clicks: a visible event tells by its action [A]
    how likely it was a click, and what exceeds its item's rate is the user's, a mean that PRIOR events draw to zero.
    """
    beyond = np.concatenate([[0.0], np.cumsum(action_rates[batch.h_action] - item_rates[batch.h_item])])
    start = np.repeat(offsets_of(batch.h_lengths)[:-1], batch.t_lengths)
    own = (beyond[start + batch.t_visible] - beyond[start]) / (batch.t_visible + PRIOR)
    return item_rates[batch.t_item] + own
