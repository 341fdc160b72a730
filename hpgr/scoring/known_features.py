"""Features that candidates do not tell, from what the log told last, and what their lists tell of them [D].

A feature of the user is that of the user's last visible event. A feature of an item is that of its last event or
impression in the run's training time, of whichever user: later ones would tell a test what only the future knows. A
candidate whose moment is not after that does not know it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from hpgr.config import Data, Feature
from hpgr.data.lists import compared_features, list_features
from hpgr.data.preparation import Execute, Prepared
from hpgr.data.timelines import features_of
from hpgr.data.vocabulary import MISSING
from hpgr.schema import SECOND, TRAIN, Array, Ints, Timelines
from hpgr.scoring.pairs import Pairs

KINDS: tuple[tuple[str, float], ...] = (("cat", MISSING), ("num", np.nan))


@dataclass(frozen=True)
class ItemFeatures:
    """Last known history features of catalogue items, `cat` [V, F] and `num` [V, G], and since when (`time` [V],
    microseconds) they are known, by item index."""

    time: Ints
    cat: Array
    num: Array

    def to_table(self) -> pa.Table:
        """One row an item index."""
        columns = {"time": self.time}
        columns |= {f"{kind}{i}": c for kind, _ in KINDS for i, c in enumerate(getattr(self, kind).T)}
        return pa.table(columns)

    @classmethod
    def from_table(cls, table: pa.Table) -> ItemFeatures:
        parts = {kind: [table[n].to_numpy() for n in table.column_names if n.startswith(kind)] for kind, _ in KINDS}
        empty = np.zeros((table.num_rows, 0))
        own = (np.stack(parts[kind], 1) if parts[kind] else empty for kind, _ in KINDS)
        return cls(table["time"].to_numpy(), *own)


def learn_item_features(prepared: Prepared, data: Data, first_item: int, size: int, execute: Execute) -> ItemFeatures:
    """Features of each item's last training event or impression; missing for items without one and unknown items."""
    last_told = partial(_last_told, prepared=prepared, data=data)
    parts = list(execute("item features", last_told, range(prepared.buckets)))
    item, time, cat, num = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.lexsort((time, item))
    last = order[np.flatnonzero(np.diff(item[order], append=-1))]
    last = last[item[last] >= first_item]
    out = ItemFeatures(
        time=np.zeros(size, np.int64),
        cat=np.full((size, cat.shape[1]), MISSING),
        num=np.full((size, num.shape[1]), np.nan, np.float32),
    )
    out.time[item[last]], out.cat[item[last]], out.num[item[last]] = time[last], cat[last], num[last]
    return out


def _last_told(bucket: int, prepared: Prepared, data: Data) -> tuple[Array, Array, Array, Array]:
    """Item, time and features of each item's last training event or impression in a bucket; at one moment, the event's.

    Histories may hold clicks alone: without impressions, items that were never clicked would be without features.
    """
    t = Timelines.from_table(prepared.timelines(bucket))
    place = np.arange(len(t.h_item)) - np.repeat(t.h_offsets[:-1], np.diff(t.h_offsets))
    event = np.flatnonzero(place < np.repeat(t.n_train, np.diff(t.h_offsets)))
    shown = np.flatnonzero(t.t_split == TRAIN)
    item = np.concatenate([t.t_item[shown], t.h_item[event]]).astype(np.int64)
    time = np.concatenate([t.t_time[shown], t.h_time[event]])
    order = np.lexsort((time, item))
    last = order[np.flatnonzero(np.diff(item[order], append=-1))]
    of_event = last >= len(shown)
    event, shown = event[last[of_event] - len(shown)], shown[last[~of_event]]
    told = []
    for kind, missing in KINDS:
        of_events = getattr(t, f"h_{kind}")
        values = np.empty((len(last), of_events.shape[1]), of_events.dtype)
        values[of_event] = of_events[event]
        values[~of_event] = _as_events(data, kind, getattr(t, f"t_{kind}")[shown], missing)
        told.append(values)
    return item[last], time[last], told[0], told[1]


def _as_events(data: Data, kind: str, values: Array, missing: float) -> Array:
    """Impressions' item features of a kind in the columns that events have: [P, F]; other features are missing."""
    columns, own = features_of(data.features, "h_", kind), features_of(data.features, "t_", kind)
    out = np.full((len(values), len(columns)), missing, values.dtype)
    for place, feature in enumerate(columns):
        if feature.role == "item":
            out[:, place] = values[:, own.index(feature)]
    return out


def lacking_item_features(data: Data, given: Iterable[str]) -> list[Feature]:
    """Item features that the model shows and candidates do not tell."""
    shown = [f for kind, _ in KINDS for f in features_of(data.features, "t_", kind)]
    return [f for f in shown if f.role == "item" and f.name not in given]


def with_known_features(
    pairs: Pairs,
    timelines: Timelines,
    items: ItemFeatures | None,
    data: Data,
    given: Iterable[str],
    lists: bool,
    listed: Ints | None = None,
) -> Pairs:
    """The pairs with their users' and items' known features in place of those not `given`, and with what their lists
    tell, if the run's log tells of `lists`. `listed` numbers each pair's list, -1 for none: [P]; None where none is
    shown in a list."""
    last = np.maximum(timelines.h_offsets[pairs.row] + pairs.visible - 1, 0)
    out: dict[str, Any] = {}
    for kind, missing in KINDS:
        history = getattr(timelines, "h_" + kind)
        shown = [f.name for f in features_of(data.features, "h_", kind)]
        values = getattr(pairs, kind).copy()
        for place, feature in enumerate(features_of(data.features, "t_", kind)):
            if feature.name in given:
                continue
            if feature.role == "user" and len(history):
                known = history[np.minimum(last, len(history) - 1), shown.index(feature.name)]
                values[:, place] = np.where(pairs.visible > 0, known, missing)
            elif feature.role == "item" and items is not None:
                known = getattr(items, kind)[pairs.item, shown.index(feature.name)]
                before = items.time[pairs.item] // SECOND < pairs.time // SECOND
                values[:, place] = np.where(before, known, missing)
        out[kind] = values
    if lists:
        listed = np.full(len(pairs), -1) if listed is None else listed
        every = features_of(data.features, "t_", "num")
        values = out["num"][:, [every.index(f) for f in compared_features(data)]]
        own = timelines.h_offsets, timelines.h_item, pairs.row, pairs.item, pairs.visible, listed
        out["num"] = np.column_stack([out["num"], list_features(*own, values)])
    return replace(pairs, **out)
