"""Cut a sorted history into sessions. [D] A session ends where the next event is more than the gap away."""

from __future__ import annotations

import numpy as np

from hpgr.data.ordering import run_starts
from hpgr.schema import SECOND, Ints, Timelines


def session_numbers(time: Ints, offsets: Ints, gap_minutes: float) -> Ints:
    """Session of each event, counted from 0 in its timeline: [E].

    Args:
        time: [E] microseconds, ascending inside each timeline.
        offsets: [U + 1] start of each timeline.
        gap_minutes: a gap of exactly this length does not end a session.
    """
    starts_timeline = np.zeros(len(time) + 1, bool)
    starts_timeline[offsets[:-1]] = True
    new = starts_timeline[:-1].copy()
    new[1:] |= np.diff(time) > gap_minutes * 60 * SECOND
    running = np.cumsum(new)
    lengths = np.diff(offsets)
    first = running[offsets[:-1][lengths > 0]]
    return np.asarray(running - np.repeat(first, lengths[lengths > 0]), np.int64)


EDGES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1 << 40]
"""Edges of the histograms below; the last bin is open."""


def session_statistics(timelines: Timelines, gap_minutes: float) -> dict[str, list[int]]:
    """Histograms, over EDGES, of events a session, sessions a user and history events a user."""
    lengths = np.diff(timelines.h_offsets)
    session = session_numbers(timelines.h_time, timelines.h_offsets, gap_minutes)
    user = np.repeat(np.arange(len(lengths)), lengths)
    size = np.bincount(run_starts(user, session)) if len(user) else np.zeros(0, np.int64)
    last = timelines.h_offsets[1:][lengths > 0] - 1
    parts = {
        "events_per_session": size[size > 0],
        "sessions_per_user": session[last] + 1,
        "history_per_user": lengths[lengths > 0],
    }
    return {name: np.histogram(values, EDGES)[0].tolist() for name, values in parts.items()}
