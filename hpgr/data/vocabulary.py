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
from hpgr.data.hashing import U64, hash_items, spelled_once
from hpgr.errors import DataError
from hpgr.schema import ACTION, FEATURE_PREFIX, FIRST_OOV, IN_HISTORY, IS_TARGET, ITEM, LABEL, Array, Floats, Ints

ITEM_FIELD = "item"
OF_ITEMS, OF_NUMBERS = ("shown", "clicked", "history"), ("sum", "squares")
"""What is counted of items alone, and of numeric features alone."""
ACTIONS = 500
"""Most kinds of events that training has room for: candidates count theirs of each kind."""
ROUNDED = 1e-14
"""Deviations of a constant from its mean, as a share of it: what rounding leaves."""
MISSING, UNKNOWN = 0, 1
"""Category index of a null and of a value unseen in training; known values follow."""


def actions(table: pa.Table) -> pa.DictionaryArray:
    """Action text of each row: the mapped action and the label, whichever there are: [rows]. Spelled once a kind."""
    if ACTION in table.column_names:
        action = pc.fill_null(table.column(ACTION), "").combine_chunks().dictionary_encode()
    else:
        action = pa.DictionaryArray.from_arrays(pa.array(np.zeros(table.num_rows, np.int32)), pa.array([""]))
    label = pc.fill_null(table.column(LABEL), -1).to_numpy().astype(np.int32) + 1
    labels = pa.array(["", "0", "1"])
    kind = np.arange(len(action.dictionary) * len(labels), dtype=np.int32)
    words = pc.binary_join_element_wise(
        action.dictionary.take(pa.array(kind // len(labels))), labels.take(pa.array(kind % len(labels))), "|"
    )
    return pa.DictionaryArray.from_arrays(pa.array(action.indices.to_numpy() * np.int32(len(labels)) + label), words)


def count(table: pa.Table, training: npt.NDArray[np.bool_], data: Data) -> pa.Table:
    """Occurrences of every value in training rows: field, value, count, shown, clicked, history, sum, squares.

    `shown`, `clicked` and `history` count an item's impressions, clicks and events of histories; `sum`, and `squares`
    of the deviations from the mean, are for numeric features.
    """
    rows = table.filter(pa.array(training))
    parts = [_count_items(rows), _count_words("action", actions(rows))]
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
                    squares=[((values - values.mean()) ** 2).sum() if len(values) else 0.0],
                )
            )
    return pa.concat_tables(parts)


def _count_items(rows: pa.Table) -> pa.Table:
    item = rows.column(ITEM).combine_chunks()
    code, words = item.indices.to_numpy(), item.dictionary
    target, history = (rows.column(name).to_numpy(zero_copy_only=False) for name in (IS_TARGET, IN_HISTORY))
    clicked = pc.fill_null(rows.column(LABEL), 0).to_numpy() * target > 0
    every = np.bincount(code, minlength=len(words))
    sums = {name: np.bincount(code[rows_of], minlength=len(words))
            for name, rows_of in zip(OF_ITEMS, (target, clicked, history), strict=True)}  # fmt: skip
    there = np.flatnonzero(every)
    return _frame(ITEM_FIELD, words.take(pa.array(there)), every[there], **{k: v[there] for k, v in sums.items()})


def _count_words(field: str, values: pa.DictionaryArray) -> pa.Table:
    counts = np.bincount(values.indices.to_numpy(), minlength=len(values.dictionary))
    there = np.flatnonzero(counts)
    return _frame(field, values.dictionary.take(pa.array(there)), counts[there])


def _count_values(field: str, values: Any) -> pa.Table:
    grouped = pa.table({"value": values}).group_by("value").aggregate([([], "count_all")])
    grouped = grouped.filter(pc.is_valid(grouped.column("value")))
    return _frame(field, grouped.column("value").cast(pa.string()), grouped.column("count_all"))


def _frame(field: str, value: Any, counts: Any, **more: Any) -> pa.Table:
    n = len(value)
    columns = {"field": pa.array([field] * n, pa.string()), "value": value, "count": counts}
    columns |= {k: more.get(k, np.zeros(n)) for k in (*OF_ITEMS, *OF_NUMBERS)}
    kinds = [pa.string(), pa.string(), pa.int64(), *[pa.int64()] * len(OF_ITEMS), *[pa.float64()] * len(OF_NUMBERS)]
    return pa.table(columns).cast(pa.schema(list(zip(columns, kinds, strict=True))))


def merge(parts: Iterable[pa.Table]) -> pa.Table:
    """Counts of several buckets together, in an order that does not depend on theirs."""
    table = _about_one_mean(pa.concat_tables(parts))
    sums = [(name, "sum") for name in ("count", *OF_ITEMS, *OF_NUMBERS)]
    merged = table.group_by(["field", "value"], use_threads=False).aggregate(sums)
    merged = merged.rename_columns([n.removesuffix("_sum") for n in merged.column_names])
    return merged.sort_by([("field", "ascending"), ("count", "descending"), ("value", "ascending")])


def _about_one_mean(parts: pa.Table) -> pa.Table:
    """Parts whose `squares` add up: each about the mean of all (Chan, Golub and LeVeque 1983). Sums of plain squares
    would lose what tells apart times of one day."""
    squares = parts.column("squares").to_numpy().copy()
    numeric = pc.and_(pc.equal(parts.column("value"), ""), pc.greater(parts.column("count"), 0))
    at = np.flatnonzero(numeric.to_numpy())
    some = parts.take(pa.array(at)).to_pandas()
    of_field = some.groupby("field")[["sum", "count"]].transform("sum")
    between = some["sum"] / some["count"] - of_field["sum"] / of_field["count"]
    squares[at] += some["count"] * between**2
    return parts.set_column(parts.column_names.index("squares"), "squares", pa.array(squares))


@dataclass(frozen=True)
class Vocabulary:
    """Indices of ids.

    `items` has V rows in index order: value, count, shown, clicked, history; `oov_history` counts the events of
    histories whose item has no index of its own, by bucket.
    """

    items: pa.Table
    oov_history: Ints
    categories: dict[str, pd.Index]
    moments: dict[str, tuple[float, float]]

    @classmethod
    def from_counts(cls, counts: pa.Table, config: VocabularyConfig, features: Iterable[Feature]) -> Vocabulary:
        """Most frequent first, ties by id: so no index depends on the order of the log."""
        every = counts.filter(pc.equal(counts.column("field"), ITEM_FIELD))  # most frequent first
        enough = int(pc.sum(pc.greater_equal(every.column("count"), config.min_count)).as_py() or 0)
        size = min(enough, config.max_items or enough)
        items, others = every.slice(0, size).combine_chunks(), every.slice(size)
        bucket = _bucket(hash_items(others.column("value")), config.oov_buckets)
        oov = np.bincount(bucket, others.column("history").to_numpy(), config.oov_buckets).astype(np.int64)
        categories = {"action": _index(counts, "action")}
        if len(categories["action"]) > ACTIONS:
            raise DataError(f"data.columns.action: got {len(categories['action']):,} kinds of events (of each label), "
                            f"expected at most {ACTIONS:,}; map a number, such as watch time, as a numeric feature of "
                            "role event, or a column of bins of it")  # fmt: skip
        moments: dict[str, tuple[float, float]] = {}
        for feature in features:
            field = FEATURE_PREFIX + feature.name
            if feature.kind == "categorical":
                categories[field] = _index(counts, field)
            else:
                moments[field] = _moments(counts, field)
        chosen = items.select(["value", "count", *OF_ITEMS])
        return cls(chosen, oov, categories, moments)

    @property
    def oov_buckets(self) -> int:
        return len(self.oov_history)

    @property
    def history(self) -> Ints:
        """Events of training histories by index, from FIRST_OOV on: [buckets + V]."""
        return np.concatenate([self.oov_history, self.items.column("history").to_numpy()])

    @property
    def first_item(self) -> int:
        return FIRST_OOV + self.oov_buckets

    @property
    def size(self) -> int:
        """Rows of an item table: padding, mask, out-of-vocabulary buckets, catalogue."""
        return self.first_item + self.items.num_rows

    def item_indices(self, values: pa.Array) -> Array:
        """Index of each item; unknown ones by hash into the out-of-vocabulary buckets: [rows] int32."""
        encoded = spelled_once(values)
        words = encoded.dictionary
        known = pc.index_in(words, value_set=self.items.column("value").combine_chunks())
        index = self.first_item + pc.fill_null(known, -1).to_numpy(zero_copy_only=False)
        new = np.asarray(pc.is_null(known), bool)
        index[new] = FIRST_OOV + _bucket(hash_items(words.filter(pa.array(new))), self.oov_buckets)
        return np.asarray(index.astype(np.int32)[encoded.indices.to_numpy()])

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
            "oov_history": self.oov_history.tolist(),
        }

    @classmethod
    def from_tables(cls, items: pa.Table, plain: dict[str, Any]) -> Vocabulary:
        categories = {k: pd.Index(v, dtype=object) for k, v in plain["categories"].items()}
        moments = {k: (float(m), float(s)) for k, (m, s) in plain["moments"].items()}
        return cls(items, np.array(plain["oov_history"], np.int64), categories, moments)


def _bucket(hashes: U64, buckets: int) -> Ints:
    return np.asarray((hashes % np.uint64(buckets)).astype(np.int64))


def _index(counts: pa.Table, field: str) -> pd.Index:
    rows = counts.filter(pc.equal(counts.column("field"), field))
    return pd.Index(rows.column("value").to_pylist(), dtype=object)


def _moments(counts: pa.Table, field: str) -> tuple[float, float]:
    row = counts.filter(pc.equal(counts.column("field"), field)).to_pylist()
    n = row[0]["count"] if row else 0
    if not n:
        return 0.0, 1.0
    mean, sd = row[0]["sum"] / n, (row[0]["squares"] / n) ** 0.5
    return mean, sd if sd > ROUNDED * abs(mean) else 1.0
