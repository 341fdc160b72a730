"""The total order of a log against its plain definition."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from hpgr.config import Data
from hpgr.data import ordering
from hpgr.data.hashing import U64, combine, hash_items, hash_text
from hpgr.data.timelines import events_before
from hpgr.data.validation import empty_rows
from hpgr.schema import IN_HISTORY, IS_TARGET, ITEM, LABEL, ORDER, ORDER_DIGITS, SECOND, TIME, USER

quick = settings(max_examples=150)
FAR = 2**62 - 1
ROW = st.tuples(
    st.integers(0, 3), st.sampled_from([-FAR, -7, 0, 1, 2, FAR]), st.sampled_from([0.0, 1.5]),
    st.integers(0, 2), st.integers(0, 1),
)  # fmt: skip
"""User, time, order, item and content; few of each, so that all kinds of ties come."""


DATA = Data.model_validate({"columns": {"order": "step"}})


def colliding(values: pa.Array) -> U64:
    """Hashes as ever, but users 2 and 3 share one, above all signed integers."""
    words = values.to_pylist()
    return np.where(np.isin(words, ["u2", "u3"]), np.uint64(2**63 + 2), hash_text(values))


def canonical(rows: list[tuple[int, int, float, int, int]]) -> pa.Table:
    """Rows whose content is their label, and the last digit of their order."""
    empty = empty_rows(DATA)
    user, time, order, item, content = (list(c) for c in zip(*rows, strict=True)) if rows else [[]] * 5
    given: dict[str, list[Any]] = {USER: [f"u{u}" for u in user], ITEM: [f"i{i}" for i in item], TIME: time}
    given |= {ORDER: order, ORDER_DIGITS: content, LABEL: content}
    columns = [given.get(f.name, [True] * len(rows)) for f in empty.schema]
    return pa.Table.from_arrays(
        [pa.array(c, f.type) for c, f in zip(columns, empty.schema, strict=True)], schema=empty.schema
    )


def keys_of(table: pa.Table) -> list[tuple[Any, ...]]:
    """User's hash, user, time, order, its digits, hash of the item, and hash of what else a row says."""
    user, item = (table.column(name).combine_chunks().cast(pa.string()) for name in (USER, ITEM))
    flags = [table.column(name).to_numpy(zero_copy_only=False) for name in (LABEL, IN_HISTORY, IS_TARGET)]
    order, digits = table.column(ORDER).to_numpy(), table.column(ORDER_DIGITS).to_numpy()
    content = combine(flags[0], order.view(np.uint64), digits, *flags[1:])
    columns = [colliding(user), user, table.column(TIME).to_numpy(), order, digits, hash_items(item), content]
    return list(zip(*(column.tolist() for column in columns), strict=True))


@quick
@given(st.lists(ROW, max_size=40))
def test_rows_are_sorted_by_all_keys_once_each(rows: list[tuple[int, int, float, int, int]]) -> None:
    table = canonical(rows)
    with patch.object(ordering, "hash_text", colliding):
        ordered, duplicates = ordering.order_rows(table)
    got = keys_of(ordered)
    assert got == sorted(set(keys_of(table)))
    assert duplicates == len(rows) - len(got)


WITHIN = [k * SECOND + more for k in (-2, -1, 0, 1) for more in (0, 1, SECOND - 1)]
MOMENT = st.tuples(st.integers(0, 3), st.sampled_from([-FAR, *WITHIN, FAR]))


@quick
@given(st.lists(MOMENT, max_size=30), st.lists(MOMENT, max_size=10))
def test_events_before_a_moment_are_counted(history: list[tuple[int, int]], moments: list[tuple[int, int]]) -> None:
    def columns(rows: list[tuple[int, int]]) -> npt.NDArray[np.int64]:
        return np.array(rows, np.int64).reshape(-1, 2).T

    history = sorted(history)
    expected = [sum(u == user and t // SECOND < time // SECOND for u, t in history) for user, time in moments]
    assert events_before(*columns(history), *columns(moments)).tolist() == expected
