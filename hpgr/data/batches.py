"""Timelines and windows -> jagged batches: the one place where sessions and masks meet the events."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from hpgr.data.hashing import combine, uniform
from hpgr.data.masks import session_masks
from hpgr.data.sessions import session_numbers
from hpgr.data.windows import Windows
from hpgr.schema import MASK, Array, Batch, Ints, Timelines, offsets_of, ranges


@dataclass(frozen=True)
class Masking:
    """How stage 1 hides events: share to hide, share of rows encoded left to right, run seed and epoch."""

    ratio: float
    causal_share: float
    seed: tuple[int, int]


class Assembler:
    """Timelines of some buckets with their sessions cut, from which batches are taken.

    Args:
        tables: prepared timelines by bucket number.
        gap_minutes: session gap.
    """

    def __init__(self, tables: dict[int, pa.Table], gap_minutes: float) -> None:
        self.buckets = sorted(tables)
        self.first_row = offsets_of(np.array([tables[b].num_rows for b in self.buckets]))
        self.timelines = Timelines.from_table(pa.concat_tables([tables[b] for b in self.buckets]))
        self.session = session_numbers(self.timelines.h_time, self.timelines.h_offsets, gap_minutes)

    def batch(self, windows: Windows, masking: Masking | None = None, targets: bool = True) -> Batch:
        """The batch of these windows (rows in their order). `targets=False` leaves impressions out.

        With `masking`, events are hidden and rows drawn causal or not; without, nothing is hidden.
        """
        t = self.timelines
        row = self.first_row[np.searchsorted(self.buckets, windows.bucket)] + windows.row
        h_len = windows.stop - windows.start
        t_len = windows.t_stop - windows.t_start if targets else np.zeros_like(h_len)
        h = ranges(t.h_offsets[row] + windows.start, h_len)
        i = ranges(t.t_offsets[row] + windows.t_start, t_len)
        h_row, t_row = (np.repeat(np.arange(len(row)), n) for n in (h_len, t_len))
        session = self.session[h]
        user_hash = t.user_hash[row]
        return Batch(
            user=t.user.take(pa.array(row)),
            row_key=windows.key,
            causal=_causal(windows, masking),
            h_lengths=h_len,
            t_lengths=t_len,
            h_item=t.h_item[h],
            h_time=t.h_time[h],
            h_action=t.h_action[h],
            h_visible=np.maximum(t.h_visible[h] - windows.start[h_row], 0),
            h_session=_from_zero(session, h_len),
            h_masked=self._masked(h, h_row, row, session, user_hash, masking),
            h_cat=t.h_cat[h],
            h_num=t.h_num[h],
            t_item=t.t_item[i],
            t_time=t.t_time[i],
            t_visible=t.t_visible[i] - windows.start[t_row],
            t_label=t.t_label[i],
            t_request=np.where(
                t.t_request[i] < 0, -1, (combine(user_hash[t_row], t.t_request[i]) >> np.uint64(1)).astype(np.int64)
            ),
            t_past=t.t_visible[i],
            t_cat=t.t_cat[i],
            t_num=t.t_num[i],
        )  # fmt: skip

    def _masked(
        self, h: Ints, h_row: Ints, row: Ints, session: Ints, user_hash: Array, masking: Masking | None
    ) -> Array:
        if masking is None:
            return np.zeros(len(h), bool)
        place = h - self.timelines.h_offsets[row][h_row]
        return session_masks(h_row, user_hash[h_row], place, session, masking.ratio, masking.seed)


def _causal(windows: Windows, masking: Masking | None) -> Array:
    if masking is None:
        return np.zeros(len(windows), bool)
    return uniform(*masking.seed, windows.key.view(np.uint64), 6) < masking.causal_share


def _from_zero(session: Ints, lengths: Ints) -> Ints:
    """Sessions of each window renumbered from 0."""
    first = np.minimum(offsets_of(lengths)[:-1], max(len(session) - 1, 0))
    return session - np.repeat(session[first] if len(session) else first, lengths)


def with_mask_appended(batch: Batch) -> Batch:
    """The batch as next-item queries: a hidden event after each history, at the time of its last event.

    It belongs to the last session and sees the whole history. Batches must have no impressions.
    """
    assert not batch.t_lengths.any()
    ends = offsets_of(batch.h_lengths)[1:]

    def append(values: Array, last: Array) -> Array:
        return np.insert(values, ends, last, axis=0)

    last = ends - 1
    rows = len(batch)
    return replace(
        batch,
        h_lengths=batch.h_lengths + 1,
        h_item=append(batch.h_item, np.full(rows, MASK)),
        h_time=append(batch.h_time, batch.h_time[last]),
        h_action=append(batch.h_action, np.zeros(rows)),
        h_visible=append(batch.h_visible, batch.h_lengths),
        h_session=append(batch.h_session, batch.h_session[last]),
        h_masked=append(batch.h_masked, np.ones(rows, bool)),
        h_cat=append(batch.h_cat, np.zeros((rows, batch.h_cat.shape[1]))),
        h_num=append(batch.h_num, np.full((rows, batch.h_num.shape[1]), np.nan)),
    )


def worker_rows(batch: Ints, rank: int, world: int) -> tuple[Ints, bool]:
    """A worker's share of a global batch, and whether it is real.

    A worker left without rows repeats the first one and must count nothing: it has to take part in the step.
    """
    own = batch[rank::world]
    return (own, True) if len(own) else (batch[:1], False)

