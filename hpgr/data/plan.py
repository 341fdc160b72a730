"""The order of an epoch: which windows share a batch, from (seed, epoch) alone.

A *global batch* is what all workers together take in one step; worker r of w takes its rows r, r + w, ...
So any number of workers sees the same batches in the same order, and a run can start again at any step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hpgr.data.hashing import combine, uniform
from hpgr.data.windows import Windows
from hpgr.schema import Array, Ints, offsets_of

JITTER = 0.05
"""Lengths vary by up to this share between epochs, so that a window's companions do."""


@dataclass(frozen=True)
class Group:
    """Batches whose windows lie in the same few buckets, so that one data task reads only those."""

    buckets: Ints
    batches: list[Ints]


def plan_epoch(windows: Windows, batch_tokens: int, group_tokens: int, seed: int, epoch: int | None) -> list[Group]:
    """Groups of batches of an epoch; their entries are positions in `windows`.

    Buckets are shuffled and gathered until they hold `group_tokens`; inside a group windows of like length
    share a batch (with jitter, so batches differ between epochs) and batches are shuffled. `epoch=None` is
    the fixed order of evaluation: no shuffling. Batch sizes count padding: rows * longest <= batch_tokens.
    """
    groups: list[Group] = []
    for number, buckets in enumerate(_bucket_groups(windows, group_tokens, seed, epoch)):
        inside = np.flatnonzero(np.isin(windows.bucket, buckets))
        batches = _batches(windows, inside, batch_tokens, seed, epoch)
        if epoch is not None:
            order = np.argsort(uniform(seed, epoch, number, np.arange(len(batches)), 4), kind="stable")
            batches = [batches[i] for i in order]
        groups.append(Group(np.sort(buckets), batches))
    return groups


def _bucket_groups(windows: Windows, group_tokens: int, seed: int, epoch: int | None) -> list[Ints]:
    tokens = np.bincount(windows.bucket, weights=windows.tokens) if len(windows) else np.zeros(0)
    buckets = np.flatnonzero(tokens)
    if epoch is not None:
        buckets = buckets[np.argsort(combine(seed, epoch, buckets, 3), kind="stable")]
    before = offsets_of(tokens[buckets].astype(np.int64))[:-1]
    return [buckets[before // group_tokens == g] for g in np.unique(before // group_tokens)]


def _batches(windows: Windows, inside: Ints, batch_tokens: int, seed: int, epoch: int | None) -> list[Ints]:
    order = inside[_alike(windows.take(inside), batch_tokens, seed, epoch)]
    return _cut(order, (windows.stop - windows.start)[order], (windows.t_stop - windows.t_start)[order], batch_tokens)


def _alike(windows: Windows, batch_tokens: int, seed: int, epoch: int | None) -> Ints:
    """An order in which neighbours have like histories and like numbers of impressions: both are padded [D].

    Strips of like histories hold equally many tokens; inside a strip impressions rise, in the next one they fall. A
    log of n batches has sqrt(n) strips, so that both lengths are cut alike finely.
    """
    key = windows.key.view(np.uint64)
    history, targets = (windows.stop - windows.start).astype(float), (windows.t_stop - windows.t_start).astype(float)
    if epoch is not None:
        history *= 1 + JITTER * uniform(seed, epoch, key, 5)
        targets *= 1 + JITTER * uniform(seed, epoch, key, 7)
        key = combine(seed, epoch, key, 8)
    by_history = np.lexsort((key, history))
    before = offsets_of(windows.tokens[by_history])
    strips = max(1, round(float(before[-1] / batch_tokens) ** 0.5))
    strip = np.empty(len(windows), np.int64)
    strip[by_history] = before[:-1] * strips // max(1, before[-1])
    return np.lexsort((key, history, np.where(strip % 2, -targets, targets), strip))


def _cut(order: Ints, history: Array, targets: Array, budget: int) -> list[Ints]:
    """Consecutive runs whose padded size stays in the budget; each takes one window at least."""
    out, start = [], 0
    while start < len(order):
        reach = min(len(order), start + budget)
        padded = np.maximum.accumulate(history[start:reach]) + np.maximum.accumulate(targets[start:reach])
        fits = padded * np.arange(1, reach - start + 1) <= budget
        size = max(1, int(np.argmin(fits)) if not fits.all() else len(fits))
        out.append(order[start : start + size])
        start += size
    return out


def padding_share(windows: Windows, groups: list[Group]) -> float:
    """Share of padded places among all places of a plan's batches."""
    history, targets = windows.stop - windows.start, windows.t_stop - windows.t_start
    batches = [b for g in groups for b in g.batches]
    places = sum(len(b) * (history[b].max() + targets[b].max()) for b in batches)
    return float(1 - windows.tokens.sum() / places) if places else 0.0
