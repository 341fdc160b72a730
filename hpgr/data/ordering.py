"""The total order of a log: users side by side, each user's rows by time, exact duplicates gone.

Rows of one user and time are ordered by `data.columns.order` where it is mapped, then by hashes of the
item and of the row's content (our decision). So the order does not depend on where a row stood in its
file: shuffled input files give the same timelines. The hashes tell nothing about the label.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hpgr.data.validation import CONTENT, ITEM_HASH, USER_HASH
from hpgr.schema import ORDER, TIME, USER, Array, Ints


def order_rows(table: pa.Table) -> tuple[pa.Table, int]:
    """Sort one bucket's canonical rows and drop exact duplicates; returns the table and how many were dropped."""
    if not table.num_rows:
        return table, 0
    key = moment_keys(rank_users(table), table.column(TIME).to_numpy())
    others = [table.column(name).to_numpy() for name in (ORDER, ITEM_HASH, CONTENT)]
    rank = np.argsort(key)
    same = np.zeros(len(rank), bool)
    same[1:] = key[rank[1:]] == key[rank[:-1]]
    tied = np.flatnonzero(same | np.append(same[1:], False))
    if len(tied):  # few rows of most logs share their user's moment; the other keys need sort those alone
        rows, moment = rank[tied], np.cumsum(~same)[tied]
        rank[tied] = rows[np.lexsort((rows, *(column[rows] for column in reversed(others)), moment))]
        later = np.flatnonzero(same)
        for column in others:
            later = later[column[rank[later]] == column[rank[later - 1]]]
        same[:] = False
        same[later] = True
    return table.take(pa.array(rank[~same])), int(same.sum())


def moment_keys(user: Ints, time: Ints) -> Ints:
    """One integer a row in the order of (user, time), users counted from 0: [rows].

    It sorts several times as fast as two keys. Times too far apart to leave users their bits are ranked first.
    """
    if not len(time):
        return np.zeros(0, np.int64)
    first, last = int(time.min()), int(time.max())
    if (int(user.max()) + 1) * (last - first + 1) >= 2**63:
        time = np.unique(time, return_inverse=True)[1]
        first, last = 0, int(time.max())
    return user * (last - first + 1) + (time - first)


def rank_users(table: pa.Table) -> Ints:
    """Rank of each row's user by (hash, id): [rows]. Ids decide, so a hash collision is harmless."""
    encoded = table.column(USER).combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy()
    hashes = np.zeros(len(encoded.dictionary), np.uint64)
    hashes[codes] = table.column(USER_HASH).to_numpy()
    order = np.argsort(hashes, kind="stable")
    if (np.diff(hashes[order]) == 0).any():
        ids = encoded.dictionary.to_pylist()
        order = np.array(sorted(range(len(ids)), key=lambda i: (hashes[i], ids[i])))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank[codes]


def user_codes(table: pa.Table) -> Ints:
    """Number of each row's user in an ordered bucket, from 0: [rows]."""
    if not table.num_rows:
        return np.zeros(0, np.int64)
    user = table.column(USER).combine_chunks()
    changes = pc.not_equal(user[1:], user[:-1]).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.cumsum(changes)]).astype(np.int64)


def run_starts(*keys: Array) -> Ints:
    """Index of the first row of each row's run of equal keys: [rows] -> [rows]. Rows must be grouped by the keys."""
    n = len(keys[0])
    new = np.ones(n, bool)
    new[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    return np.maximum.accumulate(np.where(new, np.arange(n), 0)) if n else np.zeros(0, np.int64)
