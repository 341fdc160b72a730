"""Scores and ranks of held-out data: the one way in which validation, test and batch scoring use a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hpgr.data.hashing import hash_text
from hpgr.data.stream import Step
from hpgr.metrics import ClickScores, RankSums
from hpgr.model.base import ClickModel, ItemModel
from hpgr.model.inputs import Inputs, pad, unpad
from hpgr.schema import Array, Batch

LOGITS_AT_ONCE = 2**26
"""Places of the matrix of users by catalogue that ranking holds at once: 256 MB a copy."""


def score(
    model: ClickModel, steps: Iterable[Step], device: torch.device, plain: Callable[[Batch], Array] | None = None
) -> pa.Table:
    """Probability of a click for every impression of the steps' batches.

    Returns:
        columns user, user_hash, item (index), time (microseconds), label, request, past (history events before
        the impression), score, and plain, the scores of a scorer without a model (null where there is none); one row an
        impression.
    """
    model.eval()
    parts = []
    for step in steps:
        if not step.real:
            continue
        batch = step.batch
        inputs = pad(batch, device)
        with torch.no_grad():
            probability = torch.sigmoid(model(inputs).scores)
        row = np.repeat(np.arange(len(batch)), batch.t_lengths)
        user = batch.user.take(pa.array(row))
        parts.append(pa.table({
            "user": user, "user_hash": pa.array(hash_text(user)),
            "item": pa.array(batch.t_item, pa.int32()), "time": pa.array(batch.t_time, pa.int64()),
            "label": pa.array(batch.t_label, pa.int8()), "request": pa.array(batch.t_request, pa.int64()),
            "past": pa.array(batch.t_past, pa.int64()),
            "score": pa.array(unpad(probability, inputs.c_real), pa.float32()),
            "plain": pa.nulls(len(row), pa.float32()) if plain is None else pa.array(plain(batch), pa.float32()),
        }))  # fmt: skip
    return pa.concat_tables(parts) if parts else SCORES.empty_table()


SCORES = pa.schema([
    ("user", pa.string()), ("user_hash", pa.uint64()), ("item", pa.int32()), ("time", pa.int64()), ("label", pa.int8()),
    ("request", pa.int64()), ("past", pa.int64()), ("score", pa.float32()), ("plain", pa.float32()),
])  # fmt: skip


def click_scores(scores: pa.Table) -> ClickScores:
    """The labelled rows of a score table as mergeable metrics."""
    keep = scores.filter(pa.array(scores.column("label").to_numpy() >= 0))
    return ClickScores(
        score=keep.column("score").to_numpy(),
        label=keep.column("label").to_numpy(),
        user=keep.column("user_hash").to_numpy(),
        request=keep.column("request").to_numpy(),
    )


def scoring_cost(model: ClickModel, steps: Sequence[Step], device: torch.device) -> tuple[int, int, float]:
    """Candidates of the steps' batches, history events that they attend to in a layer, and seconds to score them."""
    candidates = keys = 0
    for step in steps:
        if step.real:
            x = pad(step.batch, device)
            with torch.no_grad():
                kept = model.kept_keys(x)
            candidates, keys = candidates + int(x.c_real.sum()), keys + int(kept[x.c_real].sum())
    start = time.perf_counter()
    score(model, steps, device)
    return candidates, keys, time.perf_counter() - start


def rank_next_items(model: ItemModel, steps: Iterable[Step], device: torch.device, filter_seen: bool) -> RankSums:
    """Rank of each user's next event among the whole catalogue, by the hidden event appended to its history.

    `filter_seen` leaves the user's past items out (never the target). A target outside the catalogue ranks last.
    Equal scores go to the lower index.
    """
    model.eval()
    total = RankSums.from_ranks(np.zeros(0, np.int64), np.zeros(0, bool))
    for step in steps:
        if not step.real:
            continue
        inputs = pad(step.batch, device)
        with torch.no_grad():
            rank, seen = _ranks(model, inputs, filter_seen)
        total = total + RankSums.from_ranks(rank, seen)
    return total


def _ranks(model: ItemModel, x: Inputs, filter_seen: bool) -> tuple[Array, Array]:
    rows = torch.arange(len(x.h_item), device=x.h_item.device)
    last = x.h_real.sum(1) - 1
    state, truth = model.encode(x)[rows, last], x.h_item[rows, last] - model.first_item
    past = torch.where(x.c_real, x.c_item - model.first_item, -1).clamp(min=-1)
    seen = ((past == truth[:, None]) & (past >= 0)).any(1)
    each = max(1, LOGITS_AT_ONCE // max(1, len(model.item_bias)))
    parts = zip(*(torch.split(t, each) for t in (state, truth, past)), strict=True)
    rank = torch.cat([_ranks_among_all(model.catalogue_logits(s).float(), t, p, filter_seen) for s, t, p in parts])
    return rank.cpu().numpy(), seen.cpu().numpy()


def _ranks_among_all(logits: Tensor, truth: Tensor, past: Tensor, filter_seen: bool) -> Tensor:
    """Ranks [R] of the catalogue items `truth` [R] (negative: it is in none) by logits [R, V]; `past` is [R, P]."""
    size, known, target = logits.shape[1], truth >= 0, truth.clamp(min=0)
    wanted = logits.gather(1, target[:, None])
    if filter_seen:
        logits = _without(logits, past)
    place = torch.arange(size, device=logits.device)
    ahead = ~(logits <= wanted) | ((logits == wanted) & (place < target[:, None]))  # what is no number is ahead
    return torch.where(known, 1 + ahead.sum(1), size + 1)


def _without(logits: Tensor, past: Tensor) -> Tensor:
    """Logits with past items (index -1 = none) at minus infinity."""
    padded = torch.cat([logits, logits.new_zeros(len(logits), 1)], 1)
    return padded.scatter(1, past % padded.shape[1], float("-inf"))[:, :-1]
