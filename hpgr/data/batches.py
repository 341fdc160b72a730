"""Timelines and windows -> jagged batches: the one place where sessions and masks meet the events."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from hpgr.data.hashing import combine, uniform
from hpgr.data.masks import session_masks
from hpgr.data.sessions import session_numbers
from hpgr.data.windows import Windows
from hpgr.schema import SECOND, Array, Batch, Ints, Timelines, offsets_of, ranges


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

    def rows(self, windows: Windows) -> Ints:
        """Timeline of each window: [W]."""
        return np.asarray(self.first_row[np.searchsorted(self.buckets, windows.bucket)] + windows.row)

    def batch(self, windows: Windows, masking: Masking | None = None, targets: bool = True) -> Batch:
        """The batch of these windows (rows in their order). `targets=False` leaves impressions out.

        With `masking`, events are hidden and rows drawn causal or not; without, nothing is hidden.
        """
        t = self.timelines
        row = self.rows(windows)
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
            t_action=t.t_action[i],
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


def next_item_batch(assembler: Assembler, windows: Windows) -> Batch:
    """Histories as next-item queries whose truth is the event that follows the window (see `query_batch`)."""
    t = assembler.timelines
    row = assembler.rows(windows)
    return query_batch(assembler, windows, t.h_item[t.h_offsets[row] + windows.stop])


def query_batch(assembler: Assembler, windows: Windows, truth: Array, moment: int = 0) -> Batch:
    """Histories as next-item queries: after each, a hidden event a second after its last event.

    That is the shortest gap that training knows between an event and what it sees [D]. The hidden event belongs to
    the last session and sees the whole history; `truth` [W] is its item. After no
    history at all it is at `moment` (microseconds). The distinct items of the user's whole past (not only the
    window) come as the impressions' items, for filtering.
    """
    t = assembler.timelines
    batch = assembler.batch(windows, targets=False)
    past_row, past_item = _distinct_past(t, assembler.rows(windows), windows.stop)
    ends, some = offsets_of(batch.h_lengths)[1:], batch.h_lengths > 0

    def append(values: Array, last: Array) -> Array:
        return np.insert(values, ends, last, axis=0)

    def repeat(values: Array, otherwise: int, later: int = 0) -> Array:
        out = np.full(len(batch), otherwise, np.int64)
        out[some] = values[ends[some] - 1] + later
        return out

    n = len(batch)
    nothing = np.zeros(len(past_item), np.int64)
    return replace(
        batch,
        h_lengths=batch.h_lengths + 1,
        h_item=append(batch.h_item, truth),
        h_time=append(batch.h_time, repeat(batch.h_time, moment, SECOND)),
        h_action=append(batch.h_action, np.zeros(n)),
        h_visible=append(batch.h_visible, batch.h_lengths),
        h_session=append(batch.h_session, repeat(batch.h_session, 0)),
        h_masked=append(batch.h_masked, np.ones(n, bool)),
        h_cat=append(batch.h_cat, np.zeros((n, batch.h_cat.shape[1]))),
        h_num=append(batch.h_num, np.full((n, batch.h_num.shape[1]), np.nan)),
        t_lengths=np.bincount(past_row, minlength=n),
        t_item=past_item,
        t_time=nothing,
        t_visible=nothing,
        t_label=nothing - 1,
        t_action=nothing,
        t_request=nothing - 1,
        t_past=nothing,
        t_cat=np.zeros((len(past_item), batch.t_cat.shape[1]), np.int32),
        t_num=np.zeros((len(past_item), batch.t_num.shape[1]), np.float32),
    )


def _distinct_past(t: Timelines, row: Ints, stop: Ints) -> tuple[Ints, Ints]:
    """Each row's distinct items before its window's end: row numbers, ascending, and items."""
    past = ranges(t.h_offsets[row], stop)
    pairs = np.unique(np.repeat(np.arange(len(row)), stop) << 32 | t.h_item[past].astype(np.int64))
    return pairs >> 32, pairs & 0xFFFFFFFF


def worker_rows(batch: Ints, rank: int, world: int) -> tuple[Ints, bool]:
    """A worker's share of a global batch, and whether it is real.

    A worker left without rows repeats the first one and must count nothing: it has to take part in the step.
    """
    own = batch[rank::world]
    return (own, True) if len(own) else (batch[:1], False)


def mock_batch(rows: int, history: int, targets: int, widths: dict[str, int], item: int, mask_ratio: float) -> Batch:
    """The heaviest batch a plan allows, with invented content: run first, it finds a lack of memory early.

    Args:
        rows, history, targets: its padded shape.
        widths: features of h_cat, h_num, t_cat and t_num.
        item: what all events and impressions are of; of the catalogue, or stage 1 would ask for nothing.
        mask_ratio: share of the events that are hidden.
    """
    h, t = rows * history, rows * targets
    place = np.tile(np.arange(history), rows)
    return Batch(
        user=pa.array(["mock"] * rows),
        row_key=np.arange(rows),
        causal=np.arange(rows) % 2 == 0,
        h_lengths=np.full(rows, history),
        t_lengths=np.full(rows, targets),
        h_item=np.full(h, item),
        h_time=place * 60_000_000,
        h_action=np.zeros(h, np.int64),
        h_visible=place,
        h_session=place // 10,
        h_masked=np.floor((place + 1) * mask_ratio) > np.floor(place * mask_ratio),
        h_cat=np.zeros((h, widths["h_cat"]), np.int32),
        h_num=np.zeros((h, widths["h_num"]), np.float32),
        t_item=np.full(t, item),
        t_time=np.full(t, history * 60_000_000),
        t_visible=np.full(t, history),
        t_label=np.zeros(t, np.int8),
        t_action=np.zeros(t, np.int64),
        t_request=np.full(t, -1),
        t_past=np.full(t, history),
        t_cat=np.zeros((t, widths["t_cat"]), np.int32),
        t_num=np.zeros((t, widths["t_num"]), np.float32),
    )
