"""Masks of session-based masked item modelling [D]: drawn inside each session, by keys alone.

An event's draw depends on (seed, epoch, user, its place in the user's history) and a session's rounding on
(seed, epoch, user, session), so any worker that sees the event hides the same ones.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from hpgr.data.hashing import U64, uniform
from hpgr.data.ordering import run_starts
from hpgr.schema import Array, Ints


def session_masks(
    row: Ints, user_hash: U64, place: Ints, session: Ints, ratio: float, seed: tuple[int, int]
) -> npt.NDArray[np.bool_]:
    """Events to hide: [E] booleans.

    In a session of n events, ratio * n are hidden, rounded up or down at random; one of two or more stays
    visible; a row whose sessions all draw none hides one event.

    Args:
        row: [E] number of each event's row, ascending.
        user_hash: [E] key of its user.
        place: [E] place in the user's whole history.
        session: [E] session in the user's whole history, ascending inside a row.
        ratio: share to hide.
        seed: run seed and epoch.
    """
    if not len(row):
        return np.zeros(0, bool)
    draw = uniform(seed[0], seed[1], user_hash, place, 1)
    start = run_starts(row, session)
    size = np.bincount(start, minlength=len(row))[start]
    rounding = uniform(seed[0], seed[1], user_hash, session, 2)
    hidden = np.minimum(np.floor(ratio * size + rounding), np.maximum(size - 1, 1)).astype(np.int64)
    masked = _rank_in_run(draw, start) < hidden
    return masked | _rescue(draw, row, masked)


def _rank_in_run(draw: Array, start: Ints) -> Ints:
    """Rank of each draw inside its run: [E]."""
    order = np.lexsort((draw, start))
    rank = np.empty(len(draw), np.int64)
    rank[order] = np.arange(len(draw)) - start[order]
    return rank


def _rescue(draw: Array, row: Ints, masked: Array) -> Array:
    """The lowest draw of each row that hides nothing."""
    row_start = run_starts(row)
    any_masked = np.bincount(row_start, weights=masked, minlength=len(row))[row_start] > 0
    return ~any_masked & (_rank_in_run(draw, row_start) == 0)
