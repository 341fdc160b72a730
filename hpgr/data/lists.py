"""What the list that a candidate is shown in tells of it: numbers beside the features of candidates [D].

A user looks at a list as a whole: a price is low or high among its neighbours, and whoever has looked at one of its
items goes on from there. So each candidate is compared with the mean of its list and with the list's preferred item:
the one that the user engaged with last, before the list was shown. Items and features of a list are known when it is
shown; of labels nothing is read, and of history only what is visible.

Legend: E history events, I candidates, G features that are compared.
"""

from __future__ import annotations

import numpy as np

from hpgr.config import Data, Feature
from hpgr.data.ordering import run_starts
from hpgr.schema import LIST_PREFIX, Array, Floats, Ints

LATE = 0.001
"""Largest share of training's clicks, or of its other impressions, that may come seconds after the list's first row."""
SIZE, ENGAGED = LIST_PREFIX + "size", LIST_PREFIX + "engaged"


def compared_features(data: Data) -> list[Feature]:
    """Numeric features that may differ among the candidates of a list."""
    return [f for f in data.features if f.kind == "numeric" and f.role in ("item", "candidate")]


def list_columns(data: Data) -> list[str]:
    """Names of the numbers that `list_features` gives; none where the log does not name lists."""
    if not data.columns.request:
        return []
    names = [f.name for f in compared_features(data)]
    return [SIZE, ENGAGED, *(f"{LIST_PREFIX}{name}:{to}" for to in ("mean", "preferred") for name in names)]


def list_features(h_offsets: Ints, h_item: Array, row: Ints, item: Array, visible: Array, listed: Ints,
                  values: Array) -> Floats:  # fmt: skip
    """Each candidate in its list, in the order of `list_columns`: [I, 2 + 2 G], NaN for candidates of none.

    How many the list holds, with how many of them the user has engaged, and by how much each feature is above the
    list's mean and above that of the list's preferred candidate (NaN where there is none). The order of candidates
    plays no part.

    Args:
        h_offsets, h_item: history items of timelines, in time order: timeline r has [h_offsets[r], h_offsets[r + 1]).
        row, item, visible: [I] timeline and item of each candidate, and how many of the timeline's events it may see.
        listed: [I] number of each candidate's list, -1 for none.
        values: [I, G] features of candidates; NaN is missing.
    """
    out = np.full((len(row), 2 + 2 * values.shape[1]), np.nan, np.float32)
    shown = np.flatnonzero(listed >= 0)
    if not len(shown):
        return out
    group = np.unique(listed[shown], return_inverse=True)[1]
    last = last_engaged(h_offsets, h_item, row[shown], item[shown], visible[shown])
    latest = np.full(int(group.max()) + 1, -1)
    np.maximum.at(latest, group, last)
    own, preferred = values[shown].astype(np.float64), (last >= 0) & (last == latest[group])
    out[shown] = np.column_stack([
        np.bincount(group)[group],
        np.bincount(group, weights=last >= 0)[group],
        own - _means(own, group, np.ones(len(group), bool)),
        own - _means(own, group, preferred),
    ])  # fmt: skip
    return out


def number_lists(user: Ints, request: Ints, second: Ints) -> Ints:
    """A number for what is shown together, a request's rows of one second: [I]. Later rows of a request do not tell
    of earlier ones: a feed that ends with the click would tell where it is."""
    order = np.lexsort((second, request, user))
    out = np.empty(len(order), np.int64)
    out[order] = run_starts(user[order], request[order], second[order])
    return out


def last_engaged(h_offsets: Ints, h_item: Array, row: Ints, item: Array, visible: Array) -> Ints:
    """Place in its timeline of the last visible event of each candidate's item, -1 where there is none: [I]."""
    lengths = np.diff(h_offsets)
    h_row = np.repeat(np.arange(len(lengths)), lengths)
    pair = np.concatenate([h_row, row]) << 32 | np.concatenate([h_item, item]).astype(np.int64)
    code, span = np.unique(pair, return_inverse=True)[1], int(lengths.max(initial=0)) + 1
    event, wanted = code[: len(h_row)], code[len(h_row) :]
    if not len(event):
        return np.full(len(row), -1)
    events = np.sort(event * span + np.arange(len(h_row)) - h_offsets[h_row])
    found = events[np.maximum(np.searchsorted(events, wanted * span + visible) - 1, 0)]
    # The first event of all stands in for "none before": it is of a later place, or of another pair.
    return np.where((found // span == wanted) & (found % span < visible), found % span, -1)


def _means(values: Array, group: Ints, counted: Array) -> Array:
    """Mean of the counted values of each one's group, by feature; NaN where there is none: [I, G] -> [I, G]."""
    known = counted[:, None] & ~np.isnan(values)
    out = np.full(values.shape, np.nan)
    for g in range(values.shape[1]):
        n = np.bincount(group, weights=known[:, g])
        total = np.bincount(group, weights=np.where(known[:, g], values[:, g], 0.0))
        out[:, g] = np.divide(total, n, out=np.full(len(n), np.nan), where=n > 0)[group]
    return out
