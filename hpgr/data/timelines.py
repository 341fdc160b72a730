"""Ordered rows of a bucket -> encoded timelines, one row a user."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from hpgr.artifacts import Folder
from hpgr.config import Data, Feature
from hpgr.data.hashing import hash_text
from hpgr.data.lists import compared_features, list_features, number_lists
from hpgr.data.ordering import moment_keys, run_starts, user_codes
from hpgr.data.split import CutOffs, Targets, assign, targets_of, train_ends
from hpgr.data.vocabulary import Vocabulary, actions
from hpgr.schema import (
    FEATURE_PREFIX,
    IN_HISTORY,
    IS_SHOWN,
    ITEM,
    LABEL,
    NO_ACTION,
    REQUEST,
    SECOND,
    TIME,
    TRAIN,
    USER,
    Array,
    Ints,
    offsets_of,
    timeline_schema,
)  # fmt: skip

HISTORY_ROLES = ("item", "event", "user")
TARGET_ROLES = ("item", "user", "candidate")


def features_of(features: Sequence[Feature], stream: str, kind: str) -> list[Feature]:
    """Features shown by a stream (`h_` or `t_`) of a kind (`cat` or `num`), in their column order."""
    roles = HISTORY_ROLES if stream == "h_" else TARGET_ROLES
    wanted = "categorical" if kind == "cat" else "numeric"
    return [f for f in features if f.role in roles and f.kind == wanted]


def column_names(data: Data, stream: str, kind: str, lists: Sequence[str]) -> list[str]:
    """Names of a stream's features of a kind, in column order; candidates' numbers end with those of their `lists`."""
    names = [f.name for f in features_of(data.features, stream, kind)]
    return [*names, *lists] if (stream, kind) == ("t_", "num") else names


def training_rows(table: pa.Table, data: Data, cuts: CutOffs | None) -> tuple[Array, dict[str, Any]]:
    """Which rows may inform vocabularies and statistics, and the account of the bucket's split.

    A row counts if it is a training impression, or history before its user's end of training: [rows] booleans.
    """
    targets = targets_of(table)
    split = assign(targets, data.split, cuts)
    users = user_codes(table)
    ends = train_ends(targets, split, int(users.max(initial=-1)) + 1, cuts)
    time, in_history = table.column(TIME).to_numpy(), _flags(table, IN_HISTORY)
    training = in_history & (time < ends[users])
    training[targets.row[split == TRAIN]] = True
    used = in_history.copy()
    used[targets.row] = True
    return training, _account(table, targets, split, used, users)


def _account(table: pa.Table, targets: Targets, split: Array, used: Array, users: Ints) -> dict[str, Any]:
    label = _labels(table)[targets.row]
    time = table.column(TIME).to_numpy()
    listed = (split == TRAIN) & (targets.request != 0)
    late = listed & (time[targets.row] // SECOND > targets.time // SECOND)
    return {
        "listed": [int((listed & (label == of)).sum()) for of in (0, 1)],
        "late": [int((late & (label == of)).sum()) for of in (0, 1)],
        "rows": [int((split == s).sum()) for s in range(3)],
        "positives": [int(label[split == s].sum()) for s in range(3)],
        "history_events": int(_flags(table, IN_HISTORY).sum()),
        "unused": int((~used).sum()),
        "unlabelled": _unlabelled(table),
        "users": int(np.count_nonzero(np.bincount(users[used]))),
        "first_time": int(time.min(initial=np.iinfo(np.int64).max)),
        "last_time": int(time.max(initial=np.iinfo(np.int64).min)),
    }


def encode(
    table: pa.Table, vocabulary: Vocabulary, data: Data, cuts: CutOffs | None, lists: Sequence[str] = ()
) -> pa.Table:
    """Timelines of an ordered bucket; users whose rows no rule uses have none. Schema: `timeline_schema`.

    `lists` names the numbers that lists tell of candidates (`list_columns`), if they are to be told.
    """
    targets = targets_of(table)
    split = assign(targets, data.split, cuts)
    codes, time = user_codes(table), table.column(TIME).to_numpy()
    n_users = int(codes.max(initial=-1)) + 1
    first = np.searchsorted(codes, np.arange(n_users))
    in_history = _flags(table, IN_HISTORY)
    history, events = np.flatnonzero(in_history), offsets_of(in_history)
    visible = events[run_starts(codes, time // SECOND)] - events[first][codes]
    listed = bool(targets.request.any())
    h_user, h_time = codes[history], time[history]
    ends = train_ends(targets, split, n_users, cuts)
    h_counts, t_counts = (np.bincount(u, minlength=n_users) for u in (h_user, targets.user))

    encoded_items = vocabulary.item_indices(table.column(ITEM).combine_chunks())
    action = actions(table)
    encoded_actions = vocabulary.category_indices("action", action.dictionary)[action.indices.to_numpy()]
    columns: dict[str, Array] = {
        "h_item": encoded_items[history],
        "h_time": h_time,
        "h_action": encoded_actions[history],
        "h_visible": visible[history],
        "t_item": encoded_items[targets.row],
        "t_time": targets.time,
        "t_visible": events_before(h_user, h_time, targets.user, targets.time) if listed else visible[targets.row],
        "t_label": _labels(table)[targets.row],
        "t_action": np.where(in_history, encoded_actions, NO_ACTION)[targets.row],
        "t_split": split,
        "t_request": _first_of_list(targets) if listed else np.full(len(split), -1),
    }
    for stream, rows in (("h_", history), ("t_", targets.row)):
        columns[stream + "cat"], columns[stream + "num"] = feature_arrays(table, rows, stream, vocabulary, data)
    if lists:
        past = offsets_of(h_counts), columns["h_item"]
        told = _lists(table, targets, columns["t_visible"], codes, encoded_items, past, vocabulary, data)
        columns["t_num"] = np.column_stack([columns["t_num"], told])
    n_train = np.bincount(h_user[h_time < ends[h_user]], minlength=n_users)
    users = _user_columns(table, first) | {"train_end": ends, "n_train": n_train}
    widths = {s + k: len(column_names(data, s, k, lists)) for s in ("h_", "t_") for k in ("cat", "num")}
    return _to_lists(users, columns, h_counts, t_counts, widths)


def events_before(h_user: Ints, h_time: Ints, t_user: Ints, t_time: Ints) -> Ints:
    """How many of a user's history events are before the second of each moment: [I].

    Histories must be ordered by (user, time); moments need not be.
    """
    key = moment_keys(np.concatenate([h_user, t_user]), np.concatenate([h_time, t_time]) // SECOND)
    return np.searchsorted(key[: len(h_user)], key[len(h_user) :]) - np.searchsorted(h_user, t_user)


def _flags(table: pa.Table, name: str) -> Array:
    return np.array(table.column(name).to_numpy(zero_copy_only=False), bool)


def _unlabelled(table: pa.Table) -> int:
    """Rows that name a list and have no label."""
    if REQUEST not in table.column_names:
        return 0
    return int(((table.column(REQUEST).to_numpy() != 0) & (_labels(table) < 0)).sum())


def _labels(table: pa.Table) -> Array:
    return table.column(LABEL).fill_null(-1).to_numpy().astype(np.int8)


def _first_of_list(targets: Targets) -> Ints:
    """Place of the first impression of each one's list, -1 for those of none: [I]."""
    start = run_starts(targets.user, targets.time, np.where(targets.request == 0, targets.row, targets.request))
    return np.where(targets.request == 0, -1, start)


def _user_columns(table: pa.Table, first: Ints) -> dict[str, Any]:
    user = table.column(USER).take(pa.array(first)).combine_chunks().cast(pa.string())
    return {"user": user, "user_hash": hash_text(user)}


def feature_arrays(table: pa.Table, rows: Ints, stream: str, vocabulary: Vocabulary, data: Data) -> tuple[Array, Array]:
    """Encoded features that a stream (`h_` or `t_`) shows of some rows: indices [rows, F] and numbers [rows, G]."""

    names = [FEATURE_PREFIX + f.name for f in features_of(data.features, stream, "cat")]
    cat = [vocabulary.category_indices(name, table.column(name).combine_chunks()) for name in names]
    indices = np.stack([c[rows] for c in cat], 1) if cat else np.zeros((len(rows), 0), np.int32)
    return indices, _numbers(table, rows, features_of(data.features, stream, "num"), vocabulary)


def _numbers(table: pa.Table, rows: Ints, features: Sequence[Feature], vocabulary: Vocabulary) -> Array:
    """Standardised numeric features of some rows: [rows, G]."""
    names = [FEATURE_PREFIX + f.name for f in features]
    columns = [vocabulary.standardise(name, table.column(name).combine_chunks())[rows] for name in names]
    return np.stack(columns, 1) if columns else np.zeros((len(rows), 0), np.float32)


def _lists(
    table: pa.Table, targets: Targets, visible: Array, users: Ints, items: Array, history: tuple[Ints, Array],
    vocabulary: Vocabulary, data: Data,
) -> Array:  # fmt: skip
    """What lists tell of the impressions: [I, columns of `list_columns`].

    A list is all of a request that is shown in one second, labelled or not: that a row has a label may tell a label.
    `visible` [I] is of the impressions, `users` and `items` [rows] are of the table, `history` has offsets and items.
    """
    request, second = table.column(REQUEST).to_numpy(), table.column(TIME).to_numpy() // SECOND
    shown = np.flatnonzero(_flags(table, IS_SHOWN) & (request != 0))
    listed = number_lists(users[shown], request[shown], second[shown])
    some = np.flatnonzero(targets.request)
    place = np.searchsorted(shown, targets.row[some])
    seen = np.zeros(len(shown), np.int64)
    seen[listed[place]] = visible[some]  # alike for all of a request
    values = _numbers(table, shown, compared_features(data), vocabulary)
    told = list_features(*history, users[shown], items[shown], seen[listed], listed, values)
    out = np.full((len(targets.row), told.shape[1]), np.nan, np.float32)
    out[some] = told[place]
    return out


def write_timelines(folder: Folder, bucket: int, timelines: pa.Table) -> None:
    """One file a bucket. Dictionaries of numbers are slow to make; lz4 of differences is as small as zstd of values."""
    deltas = {f"{name}.list.element": "DELTA_BINARY_PACKED" for name in ("h_item", "h_time", "t_item", "t_time")}
    folder.write_parquet(f"timelines/bucket-{bucket:05d}.parquet", timelines, compression="lz4",
                         use_dictionary=False, write_statistics=False, column_encoding=deltas)  # fmt: skip


def _to_lists(
    users: dict[str, Any], columns: dict[str, Array], h_counts: Ints, t_counts: Ints, widths: dict[str, int]
) -> pa.Table:
    schema = timeline_schema(widths)
    arrays = []
    for field in schema:
        if not pa.types.is_list(field.type):
            arrays.append(pa.array(users[field.name]).cast(field.type))
            continue
        lengths = (h_counts if field.name.startswith("h_") else t_counts) * widths.get(field.name, 1)
        values = pa.array(np.ravel(columns[field.name])).cast(field.type.value_type)
        arrays.append(pa.ListArray.from_arrays(pa.array(offsets_of(lengths), pa.int32()), values))
    table, used = pa.Table.from_arrays(arrays, schema=schema), h_counts + t_counts > 0
    return table if used.all() else table.filter(pa.array(used))
