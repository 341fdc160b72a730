"""Names and typed tables shared by data, model and jobs.

Legend: U users (timelines), E history events of a table, I impressions of a table, B rows of a batch,
N padded history length, M padded candidates of a row.

A *timeline* holds one user's history events in time order and, apart from them, the user's impressions.
`visible` of a history event or an impression is the number of the user's history events before its second:
those are all it may ever look at, and they are a prefix of the history. Whatever happens in the same second
or later cannot leak, however fine the log's clock (design decision; see the docs/logs.md, "No leakage").

`action` of an impression is that of its row where the row is in the history too, else NO_ACTION: what a loss may ask.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

PAD, MASK = 0, 1
"""Item index of padding and of a masked event. Hashed out-of-vocabulary indices follow, then the catalogue."""
FIRST_OOV = 2

NO_ACTION, OOV_ACTION = 0, 1
NO_LABEL = -1
TRAIN, VALIDATION, TEST = 0, 1, 2
SPLITS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}

SECOND = 1_000_000
"""Times are whole microseconds since 1970 everywhere past validation."""

# Canonical columns of a validated log, one row an input row.
USER, ITEM, TIME = "user", "item", "time"
LABEL, ACTION, REQUEST, ORDER, ORDER_DIGITS = "label", "action", "request", "order", "order_digits"
IN_HISTORY, IS_TARGET, IS_SHOWN, SOURCE = "in_history", "is_target", "is_shown", "source"
FEATURE_PREFIX = "feature:"
LIST_PREFIX = "list:"
"""Begins the names of numbers that tell of a candidate in its list."""
_FEATURES = ("h_cat", "h_num", "t_cat", "t_num")

HISTORY_FIELDS = {"item": pa.int32(), "time": pa.int64(), "action": pa.int32(), "visible": pa.int32()}
TARGET_FIELDS = {
    "item": pa.int32(),
    "time": pa.int64(),
    "visible": pa.int32(),
    "label": pa.int8(),
    "action": pa.int32(),
    "split": pa.int8(),
    "request": pa.int32(),
}


def timeline_schema(feature_counts: dict[str, int]) -> pa.Schema:
    """Arrow schema of a prepared timeline row; feature columns are flattened [events x features] lists.

    `feature_counts` maps h_cat, h_num, t_cat and t_num to their number of features.
    """
    columns = [
        pa.field("user", pa.string()),
        pa.field("user_hash", pa.uint64()),
        pa.field("train_end", pa.int64()),
        pa.field("n_train", pa.int32()),
    ]
    for prefix, kinds in (("h_", HISTORY_FIELDS), ("t_", TARGET_FIELDS)):
        columns += [pa.field(prefix + name, pa.list_(kind)) for name, kind in kinds.items()]
        columns += [
            pa.field(prefix + "cat", pa.list_(pa.int32())),
            pa.field(prefix + "num", pa.list_(pa.float32())),
        ]
    return pa.schema(columns, metadata={k: str(n) for k, n in feature_counts.items()})


def offsets_of(lengths: Array) -> Ints:
    """Start of each run and the end of the last: [n] lengths -> [n + 1] offsets."""
    out = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=out[1:])
    return out


def ranges(starts: Array, lengths: Array) -> Ints:
    """Concatenated integer ranges start, start + 1, ... of the given lengths, without a Python loop."""
    offsets = offsets_of(lengths)
    return np.arange(offsets[-1], dtype=np.int64) + np.repeat(np.asarray(starts) - offsets[:-1], lengths)


def _check_columns(table: Timelines | Batch, prefix: str, size: int, layout: str) -> None:
    """All flat columns of a stream hold one entry an event; `layout` ends the name of the one that does not."""
    for f in fields(table):
        if f.name.startswith(prefix) and not f.name.endswith(layout):
            got = len(getattr(table, f.name))
            assert got == size, f"{f.name}: got {got} entries, expected {size}"


@dataclass(frozen=True)
class Timelines:
    """Timelines in flat form. History arrays have E entries, target arrays I; features are [E or I, F]."""

    user: pa.StringArray
    user_hash: npt.NDArray[np.uint64]
    train_end: Ints
    n_train: Ints
    h_offsets: Ints
    t_offsets: Ints
    h_item: Array
    h_time: Ints
    h_action: Array
    h_visible: Array
    h_cat: Array
    h_num: Array
    t_item: Array
    t_time: Ints
    t_visible: Array
    t_label: Array
    t_action: Array
    t_split: Array
    t_request: Array
    t_cat: Array
    t_num: Array

    def __post_init__(self) -> None:
        n = len(self.user_hash)
        assert len(self.user) == len(self.train_end) == len(self.n_train) == n
        for prefix, offsets in (("h_", self.h_offsets), ("t_", self.t_offsets)):
            assert len(offsets) == n + 1, f"{prefix}offsets: got {len(offsets)}, expected {n + 1}"
            _check_columns(self, prefix, int(offsets[-1]), "offsets")

    def __len__(self) -> int:
        return len(self.user_hash)

    @classmethod
    def from_table(cls, table: pa.Table) -> Timelines:
        """Read a prepared table without copying its values. Schema as `timeline_schema`."""
        meta = table.schema.metadata or {}
        columns: dict[str, Any] = {}
        table = table.combine_chunks()
        for prefix in ("h_", "t_"):
            lists = _list_array(table.column(prefix + "item"))
            columns[prefix + "offsets"] = lists.offsets.to_numpy().astype(np.int64) - lists.offsets[0].as_py()
        for field in table.schema:
            if pa.types.is_list(field.type):
                columns[field.name] = _list_array(table.column(field.name)).flatten().to_numpy()
            elif field.name == "user":
                columns["user"] = _list_array(table.column("user"))
            else:
                columns[field.name] = table.column(field.name).to_numpy()
        for prefix in ("h_", "t_"):
            rows = columns[prefix + "offsets"][-1]
            for name in (prefix + "cat", prefix + "num"):
                columns[name] = columns[name].reshape(rows, int(meta.get(name.encode(), b"0")))
        return cls(**columns)


def _list_array(column: pa.ChunkedArray) -> Any:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])


@dataclass(frozen=True)
class Batch:
    """Jagged batch of B windows; flat arrays of E history events and I candidates (targets).

    `h_lengths`, `t_lengths` [B]; `visible` counts from the start of the window; `masked` marks events that
    stage 1 hides (then `h_item` still holds the truth and the model's input layer hides it); `session`
    numbers the window's sessions from 0; `causal` [B] says which rows stage 1 encodes left to right;
    `row_key` [B] identifies the window, so that noise drawn for it does not depend on its neighbours.
    """

    user: pa.StringArray
    row_key: Ints
    causal: Array
    h_lengths: Ints
    t_lengths: Ints
    h_item: Array
    h_time: Ints
    h_action: Array
    h_visible: Array
    h_session: Array
    h_masked: Array
    h_cat: Array
    h_num: Array
    t_item: Array
    t_time: Ints
    t_visible: Array
    t_label: Array
    t_action: Array
    t_request: Array
    t_past: Array
    t_cat: Array
    t_num: Array

    def __post_init__(self) -> None:
        rows = len(self.row_key)
        assert len(self.user) == len(self.causal) == len(self.h_lengths) == len(self.t_lengths) == rows
        for prefix, lengths in (("h_", self.h_lengths), ("t_", self.t_lengths)):
            _check_columns(self, prefix, int(lengths.sum()), "lengths")

    def __len__(self) -> int:
        return len(self.row_key)

    def to_table(self, **extra: int) -> pa.Table:
        """One Arrow row with list columns (and integer columns `extra`): how a batch crosses processes."""
        columns: dict[str, pa.Array] = {name: pa.array([value], pa.int64()) for name, value in extra.items()}
        for name in _FEATURES:
            columns[name + "_width"] = pa.array([getattr(self, name).shape[1]], pa.int64())
        for f in fields(self):
            value = getattr(self, f.name)
            flat = value if isinstance(value, pa.Array) else pa.array(np.ravel(value))
            columns[f.name] = pa.ListArray.from_arrays(pa.array([0, len(flat)], pa.int32()), flat)
        return pa.table(columns)

    @classmethod
    def from_table(cls, table: pa.Table) -> Batch:
        """Inverse of `to_table`."""
        assert table.num_rows == 1, f"got {table.num_rows} rows, expected one batch a row"
        values: dict[str, Any] = {}
        for f in fields(cls):
            flat = _list_array(table.column(f.name)).flatten()
            values[f.name] = flat if f.name == "user" else flat.to_numpy(zero_copy_only=False)
        for name in _FEATURES:
            width = table.column(name + "_width")[0].as_py()
            values[name] = values[name].reshape(len(values[name[:2] + "item"]), width)
        return cls(**values)
