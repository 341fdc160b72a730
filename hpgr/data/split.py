"""Training, validation and test impressions. A list shown together stays together; the past comes first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from hpgr.config import Split, utc_us
from hpgr.data.ordering import run_starts, user_codes
from hpgr.errors import DataError
from hpgr.schema import IS_SHOWN, IS_TARGET, REQUEST, SECOND, TEST, TIME, TRAIN, VALIDATION, Array, Ints

NEVER = np.iinfo(np.int64).max
HOUR = 3600 * SECOND


@dataclass(frozen=True)
class Targets:
    """A bucket's impressions ordered by (user, time of the list, list, row). All arrays [I].

    `time` is the earliest time of the list, of rows without a label too: nothing at or after it may inform any of its
    candidates.
    """

    row: Ints
    user: Ints
    time: Ints
    request: Ints


@dataclass(frozen=True)
class CutOffs:
    """First microsecond of validation and of test, for splits by time."""

    validation: int
    test: int


def target_times(table: pa.Table) -> Ints:
    """Times of an ordered bucket's impressions, as of `targets_of`: [I]."""
    if REQUEST in table.column_names:
        return targets_of(table).time
    return np.asarray(table.column(TIME).to_numpy()[table.column(IS_TARGET).to_numpy(zero_copy_only=False)])


def targets_of(table: pa.Table) -> Targets:
    """Impressions of an ordered bucket."""
    target = table.column(IS_TARGET).to_numpy(zero_copy_only=False)
    listed = REQUEST in table.column_names
    shown = target | table.column(IS_SHOWN).to_numpy(zero_copy_only=False) if listed else target
    row = np.flatnonzero(shown)
    user = user_codes(table)[row] if len(row) else np.zeros(0, np.int64)
    time = table.column(TIME).to_numpy()[row]
    if not listed:  # the bucket's own order is already theirs
        return Targets(row, user, time, np.zeros(len(row), np.int64))
    request = table.column(REQUEST).to_numpy()[row]
    alone = request == 0
    group = np.where(alone, row, request)
    by_list = np.lexsort((time, group, alone, user))
    start = run_starts(user[by_list], alone[by_list], group[by_list])
    list_time = np.empty_like(time)
    list_time[by_list] = time[by_list][start]
    rank = np.lexsort((row, group, list_time, user))
    rank = rank[target[row[rank]]]
    return Targets(row[rank], user[rank], list_time[rank], request[rank])


def assign(targets: Targets, split: Split, cuts: CutOffs | None) -> Array:
    """Split of each impression: [I] int8. To leave one out is to leave out one list, where there are lists."""
    if cuts is not None:
        return np.where(
            targets.time >= cuts.test, TEST, np.where(targets.time >= cuts.validation, VALIDATION, TRAIN)
        ).astype(np.int8)
    if not len(targets.user):
        return np.zeros(0, np.int8)
    own = np.where(targets.request == 0, targets.row, targets.request)
    list_start, user_start = run_starts(targets.user, targets.time, own), run_starts(targets.user)
    n = np.bincount(targets.user)[targets.user]
    if split.by == "leave_one_out":
        lists = np.cumsum(list_start == np.arange(len(n)))
        place, last = lists - lists[user_start], (lists[user_start + n - 1] - lists[user_start])
        first, second = last - 1, last
    else:
        place = list_start - user_start
        first = np.floor(n * (1 - split.validation - split.test) + 0.5 + 1e-9)
        second = np.floor(n * (1 - split.test) + 0.5 + 1e-9)
    return np.where(place >= second, TEST, np.where(place >= first, VALIDATION, TRAIN)).astype(np.int8)


def train_ends(targets: Targets, split: Array, n_users: int, cuts: CutOffs | None) -> Ints:
    """Moment before which a user's events are training data: [users]; NEVER if nothing is held out."""
    if cuts is not None:
        return np.full(n_users, cuts.validation, np.int64)
    ends = np.full(n_users, NEVER, np.int64)
    held = split != TRAIN
    np.minimum.at(ends, targets.user[held], targets.time[held])
    return ends


def date_cut_offs(split: Split) -> CutOffs:
    """Cut-offs of a split by date."""
    assert split.validation_from is not None
    assert split.test_from is not None
    return CutOffs(utc_us(split.validation_from), utc_us(split.test_from))


def histogram(times: Ints, unit: int) -> dict[int, int]:
    """Impressions a unit of time (HOUR or SECOND): {start // unit: count}."""
    units, counts = pa.array(times // unit).value_counts().flatten()
    return dict(zip(units.to_pylist(), counts.to_pylist(), strict=True))


def locate(counts: dict[int, int], share: float) -> tuple[int, float]:
    """Unit in which the given share of the impressions ends, and the impressions left to go inside it."""
    units = sorted(counts)
    total = np.cumsum([counts[u] for u in units])
    wanted = share * total[-1]
    i = int(np.searchsorted(total, wanted, side="right"))
    i = min(i, len(units) - 1)
    return units[i], wanted - (total[i - 1] if i else 0)


def refine(counts: dict[int, int], left: float) -> int:
    """Start, in microseconds, of the second nearest to `left` impressions into the counted seconds."""
    units = sorted(counts)
    before = np.concatenate([[0], np.cumsum([counts[u] for u in units])])
    i = int(np.argmin(np.abs(before - left)))
    return (units[i] if i < len(units) else units[-1] + 1) * SECOND


def check(rows: dict[str, int], split: Split) -> None:
    """Refuse a split without validation or test impressions.

    Raises:
        DataError: says which part is empty.
    """
    empty = [name for name in ("train", "validation", "test") if not rows.get(name)]
    if empty:
        raise DataError(
            f"no {' and no '.join(empty)} impressions after the split by {split.by} (got {rows}); "
            "change data.split (time_fraction asks no user for many), or give a log that is longer in time"
        )
