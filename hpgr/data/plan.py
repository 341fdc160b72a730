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
    history, targets = windows.stop - windows.start, windows.t_stop - windows.t_start
    key = windows.key[inside].view(np.uint64)
    length = (history + targets)[inside].astype(float)
    if epoch is not None:
        length *= 1 + 0.1 * uniform(seed, epoch, key, 5)
    order = inside[np.lexsort((key, length))]
    return _cut(order, history[order], targets[order], batch_tokens)


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
