"""Cut long timelines into windows so that memory is bounded and every impression appears exactly once."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa

from hpgr.config import Stream
from hpgr.data.hashing import combine
from hpgr.data.ordering import run_starts
from hpgr.schema import TEST, Array, Ints, Timelines, ranges


@dataclass(frozen=True)
class Windows:
    """An index of W windows. History events [start, stop) and impressions [t_start, t_stop) of a timeline.

    `bucket` and `row` find the timeline; impressions are numbered inside it. `key` names the window.
    A stage 1 window has no impressions; a stage 2 window's impressions all belong to one split.
    """

    bucket: Ints
    row: Ints
    start: Ints
    stop: Ints
    t_start: Ints
    t_stop: Ints
    key: Ints

    def __len__(self) -> int:
        return len(self.row)

    @property
    def tokens(self) -> Ints:
        """History events and impressions of each window: [W]."""
        return (self.stop - self.start) + (self.t_stop - self.t_start)

    def take(self, index: Array) -> Windows:
        return Windows(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to_table(self) -> pa.Table:
        return pa.table({f.name: getattr(self, f.name) for f in fields(self)})

    @classmethod
    def from_table(cls, table: pa.Table) -> Windows:
        return cls(**{f.name: table.column(f.name).to_numpy() for f in fields(cls)})


def training_windows(timelines: Timelines, stream: Stream, bucket: int) -> Windows:
    """Stage 1: the history before the training cut-off in pieces of `window`, counted back from its end."""
    pieces = -(-timelines.n_train // stream.window)
    row = np.repeat(np.arange(len(timelines)), pieces)
    from_end = ranges(np.zeros(len(pieces), np.int64), pieces)
    stop = timelines.n_train[row] - from_end * stream.window
    start = np.maximum(0, stop - stream.window)
    nothing = np.zeros(len(row), np.int64)
    return _build(timelines, bucket, row, start, stop, nothing, nothing)


def impression_windows(timelines: Timelines, stream: Stream, bucket: int, split: int) -> Windows:
    """Stage 2: windows `stride` apart that together hold each impression of the split once.

    An impression with c past events is served by the window that ends at the first multiple of the stride
    (counted from `window`) at or after c, so it sees min(c, window - stride + 1 ... window) of them, and which
    ones depends on c alone: not on the future, the batch or the split. Impressions of one window are at
    most `window`; more go to further windows over the same history.
    """
    user = np.repeat(np.arange(len(timelines)), np.diff(timelines.t_offsets))
    chosen = np.flatnonzero(timelines.t_split == split)
    user, seen = user[chosen], timelines.t_visible[chosen].astype(np.int64)
    step = _step(seen, stream)
    gap = np.cumsum(np.diff(chosen, prepend=-1) > 1)
    run = run_starts(user, step, gap)
    piece = (np.arange(len(chosen)) - run) // stream.window
    first = np.flatnonzero(np.diff(run_starts(run, piece), prepend=-1) > 0) if len(chosen) else np.zeros(0, np.int64)
    last = np.append(first[1:], len(chosen))[: len(first)] - 1
    start = step[first] * stream.spacing
    stop = np.maximum(start, seen[last])
    inside = timelines.t_offsets[user[first]]
    return _build(timelines, bucket, user[first], start, stop, chosen[first] - inside, chosen[last] + 1 - inside)


def _step(seen: Ints, stream: Stream) -> Ints:
    """How many strides before its window starts are skipped by whoever has so many past events."""
    return np.maximum(0, -(-(seen - stream.window) // stream.spacing))


def serving_windows(timelines: Timelines, stream: Stream, row: Ints, seen: Ints) -> tuple[Windows, Ints, Ints]:
    """Histories that serve moments of timelines: the same events as `impression_windows` would give them.

    Args:
        row: [P] timeline of each moment; `seen` [P] history events strictly before it.

    Returns:
        the W windows (as of bucket 0, without impressions), the order [P] in which moments of one window stand side
        by side, and where each window's begin in it: [W + 1].
    """
    step = _step(seen, stream)
    order = np.lexsort((seen, step, row))
    run = run_starts(row[order], step[order])
    first = np.flatnonzero(run == np.arange(len(run)))
    bounds = np.append(first, len(run))
    start = step[order][first] * stream.spacing
    stop, nothing = seen[order][bounds[1:] - 1], np.zeros(len(first), np.int64)
    return _build(timelines, 0, row[order][first], start, stop, nothing, nothing), order, bounds


def query_windows(timelines: Timelines, stream: Stream, row: Ints, seen: Ints) -> Windows:
    """The last events before a moment of each timeline, with room for the hidden event of a next-item query: [R]."""
    start, nothing = np.maximum(0, seen - (stream.window - 1)), np.zeros(len(row), np.int64)
    return _build(timelines, 0, row, start, seen, nothing, nothing)


def _build(
    timelines: Timelines, bucket: int, row: Ints, start: Ints, stop: Ints, t_start: Ints, t_stop: Ints
) -> Windows:
    key = combine(timelines.user_hash[row], start, t_start).view(np.int64)
    return Windows(np.full(len(row), bucket, np.int64), row, start, stop, t_start, t_stop, key)


def next_item_windows(timelines: Timelines, stream: Stream, bucket: int, split: int, one_out: bool = False) -> Windows:
    """Stage 1 as a next-item model: one window a user, its history before the split's first event of history.

    The item to find is the event right after the window: the first one at or after the split begins for the
    user [D]. Users without such an event, or without any past, have no window.

    Args:
        one_out: the split leaves one out. The item to find is then the held-out impression's own event, and the window
            ends with the event before it in the log's order, as in published figures. Events of its own second
            that come before it are shown to the query: here alone they inform one another in evaluation [D].
    """
    begins = split_begins(timelines, split)
    user = np.repeat(np.arange(len(timelines)), np.diff(timelines.h_offsets))
    before = timelines.h_time < begins[user]
    seen = np.bincount(user[before], minlength=len(timelines))
    if one_out:
        seen = _held_out_places(timelines, split, seen)
    row = np.flatnonzero((seen > 0) & (seen < np.diff(timelines.h_offsets)))
    stop = seen[row]
    start, nothing = np.maximum(0, stop - (stream.window - 1)), np.zeros(len(row), np.int64)
    return _build(timelines, bucket, row, start, stop, nothing, nothing)


def _held_out_places(timelines: Timelines, split: int, otherwise: Ints) -> Ints:
    """Place in the history of each user's impression that a leave-one-out split holds out: [U].

    It is known by time, item and action; of several events alike the last is the test's, the one before validation's.
    `otherwise` [U] where nothing is found: the impression is no event, or one of a list, whose rows share a moment.
    """
    t, length = timelines, np.diff(timelines.h_offsets)
    end = length if split == TEST else _held_out_places(t, TEST, length)
    held = np.flatnonzero((t.t_split == split) & (t.t_request < 0))
    impression = np.full(len(t), -1)
    impression[np.searchsorted(t.t_offsets, held, "right") - 1] = held
    user, place = np.repeat(np.arange(len(t)), length), ranges(np.zeros(len(t), np.int64), length)
    event = np.flatnonzero((impression[user] >= 0) & (place < end[user]))
    own = impression[user[event]]
    for of_event, of_impression in ((t.h_time, t.t_time), (t.h_item, t.t_item), (t.h_action, t.t_action)):
        alike = of_event[event] == of_impression[own]
        event, own = event[alike], own[alike]
    out = otherwise.copy()
    out[user[event]] = place[event]  # of several the last stays
    return out


def split_begins(timelines: Timelines, split: int) -> Ints:
    """Time of each user's first impression of the split: [U]; later than any event where there is none."""
    user = np.repeat(np.arange(len(timelines)), np.diff(timelines.t_offsets))
    begins = np.full(len(timelines), np.iinfo(np.int64).max)
    held = timelines.t_split == split
    np.minimum.at(begins, user[held], timelines.t_time[held])
    return begins
