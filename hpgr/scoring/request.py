"""What is asked of a batch job, and how it is cut into shards."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from hpgr.artifacts import FORMAT, fingerprint
from hpgr.data.candidates import Layout

SHARD_PAIRS = 1 << 16
"""Pairs that a shard should hold: what a crash loses, and what a worker keeps in memory."""
MOST_SHARDS = 1 << 13


@dataclass(frozen=True)
class Options:
    """Options that change what is written.

    `at` is the moment (microseconds) of candidates without a time; `top_n` (0: score the candidates given) items are
    chosen of `retrieve` retrieved ones, without the user's past items if `drop_seen`; a shard has about `shard_pairs`.
    """

    at: int
    top_n: int = 0
    retrieve: int = 0
    drop_seen: bool = False
    explain: bool = False
    embeddings: bool = False
    shard_pairs: int = SHARD_PAIRS

    def shards(self, buckets: int, pairs: int) -> int:
        """Shards for so many pairs: a multiple of the timelines' buckets, so that each reads one bucket."""
        wanted = min(MOST_SHARDS, math.ceil(pairs / self.shard_pairs))
        return buckets * max(1, math.ceil(wanted / buckets))


@dataclass(frozen=True)
class Request:
    """All that a worker must know of a job; small, sent to each.

    `run`, `users` (a prepared log) and `output` are URIs, `run_id` the run's weights, `layout` what candidates tell.
    """

    run: str
    prepared: str
    users: str
    output: str
    run_id: str
    id: str
    shards: int
    options: Options
    layout: Layout | None = None

    def part(self, shard: int) -> str:
        """Name of a shard's scores; the request's fingerprint in it keeps jobs apart."""
        return f"part-{shard:05d}-{self.id}.parquet"

    def users_part(self, shard: int) -> str:
        """Name of a shard's user vectors."""
        return f"users-{shard:05d}-{self.id}.parquet"


def record(run_id: str, users: str, candidates: dict[str, Any] | None, options: Options) -> dict[str, Any]:
    """What tells one request from another, as plain data; its fingerprint is the request's id."""
    return {
        "format": FORMAT,
        "run": run_id,
        "users": users,
        "candidates": None if candidates is None else fingerprint(candidates),
        **asdict(options),
    }
