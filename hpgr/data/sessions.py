"""Cut a sorted history into sessions. [D] A session ends where the next event is more than the gap away."""

from __future__ import annotations

import numpy as np

from hpgr.schema import SECOND, Ints


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
    first = np.repeat(running[np.minimum(offsets[:-1], len(time) - 1)] if len(time) else running, np.diff(offsets))
    return np.asarray(running - first, np.int64)
