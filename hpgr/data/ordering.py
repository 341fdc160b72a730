"""The total order of a log: users side by side, each user's rows by time, exact duplicates gone.

Rows of one user and time are ordered by `data.columns.order` where it is mapped, then by hashes of the
item and of the row's content (our decision). So the order does not depend on where a row stood in its
file: shuffled input files give the same timelines. The hashes tell nothing about the label.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from hpgr.data.hashing import combine, hash_items, hash_text, spelled_once, value_keys
from hpgr.schema import IS_SHOWN, ITEM, ORDER, ORDER_DIGITS, TIME, USER, Array, Ints


def order_rows(table: pa.Table) -> tuple[pa.Table, int]:
    """Sort one bucket's canonical rows and drop exact duplicates; returns the table and how many were dropped."""
    if not table.num_rows:
        return table, 0
    key = moment_keys(rank_users(table.column(USER).combine_chunks()), table.column(TIME).to_numpy())
    rank = np.argsort(key)
    same = np.zeros(len(rank), bool)
    same[1:] = key[rank[1:]] == key[rank[:-1]]
    tied = np.flatnonzero(same | np.append(same[1:], False))
    if len(tied):  # few rows of most logs share their user's moment; the other keys are made and sorted for those alone
        rows, moment = rank[tied], np.cumsum(~same)[tied]
        others = tie_keys(table.take(pa.array(rows)))
        by = np.lexsort((rows, *_not_shown(table, rows), *reversed(others), moment))
        rank[tied], others = rows[by], [column[by] for column in others]
        equal = np.logical_and.reduce([same[tied][1:], *(column[1:] == column[:-1] for column in others)])
        same[tied] = np.append(False, equal)
    return table.take(pa.array(rank[~same])), int(same.sum())


def tie_keys(table: pa.Table) -> list[Array]:
    """What orders rows of one user and moment: their order, where it is mapped, and hashes of item and content.

    Content is every mapped value but user, item and time; rows that agree in all keys are the same row.
    """
    order = [table.column(name).to_numpy() for name in (ORDER, ORDER_DIGITS) if name in table.column_names]
    others = [name for name in table.column_names if name not in (USER, ITEM, TIME, IS_SHOWN)]
    return [*order, hash_items(table.column(ITEM)), combine(*(value_keys(table.column(name)) for name in others))]


def _not_shown(table: pa.Table, rows: Ints) -> list[Array]:
    """Of rows that are the same but for a rule, one that counts as shown comes first, and stays."""
    return [~np.array(table.column(IS_SHOWN).to_numpy(), bool)[rows]] if IS_SHOWN in table.column_names else []


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


def rank_users(user: pa.Array) -> Ints:
    """Rank of each row's user by (hash, id): [rows]. Ids decide, so a hash collision is harmless."""
    encoded = spelled_once(user)
    hashes = hash_text(encoded.dictionary)
    order = np.argsort(hashes, kind="stable")
    if (np.diff(hashes[order]) == 0).any():
        ids = encoded.dictionary.to_pylist()
        order = np.array(sorted(range(len(ids)), key=lambda i: (hashes[i], ids[i])))
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return rank[encoded.indices.to_numpy()]


def user_codes(table: pa.Table) -> Ints:
    """Number of each row's user in an ordered bucket, from 0: [rows]."""
    if not table.num_rows:
        return np.zeros(0, np.int64)
    code = table.column(USER).combine_chunks().indices.to_numpy()
    return np.concatenate([[0], np.cumsum(code[1:] != code[:-1])]).astype(np.int64)


def run_starts(*keys: Array) -> Ints:
    """Index of the first row of each row's run of equal keys: [rows] -> [rows]. Rows must be grouped by the keys."""
    n = len(keys[0])
    new = np.ones(n, bool)
    new[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    return np.maximum.accumulate(np.where(new, np.arange(n), 0)) if n else np.zeros(0, np.int64)
