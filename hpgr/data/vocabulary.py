"""Ids <-> indices and statistics, from training time only. Everything else is out of vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from hpgr.config import Data, Feature
from hpgr.config import Vocabulary as VocabularyConfig
from hpgr.data.hashing import U64
from hpgr.schema import ACTION, FEATURE_PREFIX, FIRST_OOV, IS_TARGET, ITEM, LABEL, Array, Floats

ITEM_FIELD = "item"
MISSING, UNKNOWN = 0, 1
"""Category index of a null and of a value unseen in training; known values follow."""


def actions(table: pa.Table) -> pa.Array:
    """Action text of each row: the mapped action and the label, whichever there are: [rows]."""
    label = pc.if_else(pc.is_valid(table.column(LABEL)), pc.cast(table.column(LABEL), pa.string()), "")
    action = pc.fill_null(table.column(ACTION), "")
    return pc.binary_join_element_wise(action, label, "|").combine_chunks()


def count(table: pa.Table, training: npt.NDArray[np.bool_], data: Data) -> pa.Table:
    """Occurrences of every value in training rows: field, value, count, shown, clicked, sum, squares.

    `shown` and `clicked` count an item's impressions and clicks; `sum` and `squares` are for numeric features.
    """
    rows = table.filter(pa.array(training))
    parts = [_count_items(rows), _count_values("action", actions(rows))]
    for feature in data.features:
        column = rows.column(FEATURE_PREFIX + feature.name)
        if feature.kind == "categorical":
            parts.append(_count_values(FEATURE_PREFIX + feature.name, column))
        else:
            values = column.drop_null().to_numpy()
            parts.append(
                _frame(
                    FEATURE_PREFIX + feature.name,
                    [""],
                    [len(values)],
                    sum=[values.sum()],
                    squares=[(values**2).sum()],
                )
            )
    return pa.concat_tables(parts)


def _count_items(rows: pa.Table) -> pa.Table:
    target = rows.column(IS_TARGET).to_numpy(zero_copy_only=False).astype(np.int64)
    clicked = pc.fill_null(rows.column(LABEL), 0).to_numpy().astype(np.int64) * target
    items = pa.table({"value": rows.column(ITEM), "shown": target, "clicked": clicked})
    grouped = items.group_by("value").aggregate([([], "count_all"), ("shown", "sum"), ("clicked", "sum")])
    return _frame(ITEM_FIELD, grouped.column("value"), grouped.column("count_all"),
                  shown=grouped.column("shown_sum"), clicked=grouped.column("clicked_sum"))  # fmt: skip


def _count_values(field: str, values: Any) -> pa.Table:
    grouped = pa.table({"value": values}).group_by("value").aggregate([([], "count_all")])
    grouped = grouped.filter(pc.is_valid(grouped.column("value")))
    return _frame(field, grouped.column("value"), grouped.column("count_all"))


def _frame(field: str, value: Any, counts: Any, **more: Any) -> pa.Table:
    n = len(value)
    columns = {"field": pa.array([field] * n, pa.string()), "value": value, "count": counts}
    columns |= {k: more.get(k, np.zeros(n)) for k in ("shown", "clicked", "sum", "squares")}
    kinds = [pa.string(), pa.string(), pa.int64(), pa.int64(), pa.int64(), pa.float64(), pa.float64()]
    return pa.table(columns).cast(pa.schema(list(zip(columns, kinds, strict=True))))


def merge(parts: Iterable[pa.Table]) -> pa.Table:
    """Counts of several buckets together, in an order that does not depend on theirs."""
    table = pa.concat_tables(parts)
    sums = [(name, "sum") for name in ("count", "shown", "clicked", "sum", "squares")]
    merged = table.group_by(["field", "value"], use_threads=False).aggregate(sums)
    merged = merged.rename_columns([n.removesuffix("_sum") for n in merged.column_names])
    return merged.sort_by([("field", "ascending"), ("count", "descending"), ("value", "ascending")])


@dataclass(frozen=True)
class Vocabulary:
    """Indices of ids. `items` has V rows in index order: value, count, shown, clicked."""

    items: pa.Table
    categories: dict[str, pd.Index]
    moments: dict[str, tuple[float, float]]
    oov_buckets: int

    @classmethod
    def from_counts(cls, counts: pa.Table, config: VocabularyConfig, features: Iterable[Feature]) -> Vocabulary:
        """Most frequent first, ties by id: so no index depends on the order of the log."""
        items = counts.filter(pc.equal(counts.column("field"), ITEM_FIELD))
        items = items.filter(pc.greater_equal(items.column("count"), config.min_count))
        items = items.slice(0, config.max_items).combine_chunks()
        categories = {"action": _index(counts, "action")}
        moments: dict[str, tuple[float, float]] = {}
        for feature in features:
            field = FEATURE_PREFIX + feature.name
            if feature.kind == "categorical":
                categories[field] = _index(counts, field)
            else:
                moments[field] = _moments(counts, field)
        return cls(items.select(["value", "count", "shown", "clicked"]), categories, moments, config.oov_buckets)

    @property
    def first_item(self) -> int:
        return FIRST_OOV + self.oov_buckets

    @property
    def size(self) -> int:
        """Rows of an item table: padding, mask, out-of-vocabulary buckets, catalogue."""
        return self.first_item + self.items.num_rows

    def item_indices(self, values: pa.Array, hashes: U64) -> Array:
        """Index of each item; unknown ones by hash into the out-of-vocabulary buckets: [rows] int32."""
        known = pc.index_in(values, value_set=self.items.column("value").combine_chunks())
        position = pc.fill_null(known, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        unknown = FIRST_OOV + (hashes % np.uint64(self.oov_buckets)).astype(np.int64)
        return np.where(position >= 0, self.first_item + position, unknown).astype(np.int32)

    def category_indices(self, field: str, values: pa.Array) -> Array:
        """MISSING for null, UNKNOWN for unseen values, else 2 and up: [rows] int32."""
        found = pc.index_in(values, value_set=pa.array(self.categories[field], pa.string()))
        index = pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int32)
        index = np.where(index >= 0, index + 2, UNKNOWN)
        return np.where(np.asarray(pc.is_null(values), bool), MISSING, index).astype(np.int32)

    def standardise(self, field: str, values: pa.Array) -> Floats:
        """(x - mean) / sd by training moments, clipped to [-5, 5], NaN where missing: [rows]."""
        mean, sd = self.moments[field]
        raw = values.to_numpy(zero_copy_only=False).astype(float)
        return np.clip((raw - mean) / sd, -5, 5).astype(np.float32)

    def category_size(self, field: str) -> int:
        return len(self.categories[field]) + 2

    def to_tables(self) -> dict[str, Any]:
        """Plain data beside the `items` table, for the manifest."""
        return {
            "categories": {k: list(v) for k, v in self.categories.items()},
            "moments": {k: list(v) for k, v in self.moments.items()},
            "oov_buckets": self.oov_buckets,
        }

    @classmethod
    def from_tables(cls, items: pa.Table, plain: dict[str, Any]) -> Vocabulary:
        categories = {k: pd.Index(v, dtype=object) for k, v in plain["categories"].items()}
        moments = {k: (float(m), float(s)) for k, (m, s) in plain["moments"].items()}
        return cls(items, categories, moments, int(plain["oov_buckets"]))


def _index(counts: pa.Table, field: str) -> pd.Index:
    rows = counts.filter(pc.equal(counts.column("field"), field))
    return pd.Index(rows.column("value").to_pylist(), dtype=object)


def _moments(counts: pa.Table, field: str) -> tuple[float, float]:
    row = counts.filter(pc.equal(counts.column("field"), field)).to_pylist()
    n = row[0]["count"] if row else 0
    if not n:
        return 0.0, 1.0
    mean = row[0]["sum"] / n
    return mean, max(row[0]["squares"] / n - mean**2, 0.0) ** 0.5 or 1.0
