"""The total order of a log against its plain definition."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from hpgr.config import Data
from hpgr.data.ordering import order_rows
from hpgr.data.timelines import events_before
from hpgr.data.validation import CONTENT, ITEM_HASH, USER_HASH, empty_rows
from hpgr.schema import ORDER, TIME, USER

quick = settings(max_examples=150, deadline=None)
FAR = 2**62 - 1
ROW = st.tuples(
    st.integers(0, 3), st.sampled_from([-FAR, -7, 0, 1, 2, FAR]), st.sampled_from([0.0, 1.5]),
    st.integers(0, 2), st.integers(0, 1),
)  # fmt: skip
"""User, time, order, item and content; few of each, so that all kinds of ties come."""


def canonical(rows: list[tuple[int, int, float, int, int]]) -> pa.Table:
    empty = empty_rows(Data())
    user, time, order, item, content = (list(c) for c in zip(*rows, strict=True)) if rows else [[]] * 5
    given = {USER: [f"u{u}" for u in user], TIME: time, ORDER: order, CONTENT: content}
    # Users 2 and 3 collide; a hash of 63 bits or more is above all signed integers.
    given |= {USER_HASH: [2**63 + min(u, 2) for u in user], ITEM_HASH: [2**63 * i % 2**64 for i in item]}
    columns = [given.get(f.name, [None] * len(rows)) for f in empty.schema]
    return pa.Table.from_arrays(
        [pa.array(c, f.type) for c, f in zip(columns, empty.schema, strict=True)], schema=empty.schema
    )


@quick
@given(st.lists(ROW, max_size=40))
def test_rows_are_sorted_by_all_keys_once_each(rows: list[tuple[int, int, float, int, int]]) -> None:
    table = canonical(rows)
    keys = list(zip(*(table.column(n).to_pylist() for n in (USER_HASH, USER, TIME, ORDER, ITEM_HASH, CONTENT)),
                    strict=True))  # fmt: skip
    ordered, duplicates = order_rows(table)
    got = list(zip(*(ordered.column(n).to_pylist() for n in (USER_HASH, USER, TIME, ORDER, ITEM_HASH, CONTENT)),
                   strict=True))  # fmt: skip
    assert got == sorted(set(keys))
    assert duplicates == len(keys) - len(got)


MOMENT = st.tuples(st.integers(0, 3), st.sampled_from([-FAR, -5, -1, 0, 1, 2, 3, FAR]))


@quick
@given(st.lists(MOMENT, max_size=30), st.lists(MOMENT, max_size=10))
def test_events_before_a_moment_are_counted(history: list[tuple[int, int]], moments: list[tuple[int, int]]) -> None:
    def columns(rows: list[tuple[int, int]]) -> npt.NDArray[np.int64]:
        return np.array(rows, np.int64).reshape(-1, 2).T

    history = sorted(history)
    expected = [sum(u == user and t < time for u, t in history) for user, time in moments]
    assert events_before(*columns(history), *columns(moments)).tolist() == expected
