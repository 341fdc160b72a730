"""How good top-n is: the held-out next events of the run's test split, by retrieval alone and with ranking."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from hpgr.data.batches import Assembler
from hpgr.data.preparation import Execute
from hpgr.data.timelines import features_of
from hpgr.data.vocabulary import MISSING
from hpgr.metrics import RankSums
from hpgr.schema import Array, Ints, ranges
from hpgr.scoring.finished import Finished, open_finished
from hpgr.scoring.known_features import ItemFeatures, with_known_features
from hpgr.scoring.pairs import Pairs, Scorer
from hpgr.scoring.retrieval import NONE, Retriever

INDEX = "next_item-test"
Sums = tuple[RankSums, RankSums]


def top_n_quality(
    finished: Finished, retrieve: int, drop_seen: bool, known: ItemFeatures | None, execute: Execute
) -> dict[str, Any]:
    """HR@k and NDCG@k of each test user's next event, as stage 1's own test chooses users and events.

    Retrieval hands `retrieve` items to ranking; the event that is not among them has the worst rank in both. The
    candidates' moment is the event's own. Test users have been held out of training; the figures are for the report,
    not for choosing `retrieve`.
    """
    buckets = np.unique(finished.run.spec(INDEX).windows().bucket).tolist()
    run = finished.run
    task = partial(_bucket, (run.folder.uri, run.prepared.folder.uri), retrieve, drop_seen, known)
    parts: list[Sums] = list(execute("measure", task, buckets))
    retrieval, ranking = (sum((p[i] for p in parts), RankSums.empty()) for i in range(2))
    return {
        "split": "test",
        "retrieve": retrieve,
        "drop_seen": drop_seen,
        "retrieval": retrieval.compute(),
        "retrieval and ranking": ranking.compute(),
    }


def _bucket(
    run: tuple[str, str], retrieve: int, drop_seen: bool, items_known: ItemFeatures | None, bucket: int
) -> Sums:
    """Ranks of one bucket's users; `run` is the run folder and its prepared log."""
    finished, device = open_finished(*run), torch.device("cpu")
    config = finished.config
    windows = finished.run.spec(INDEX).windows()
    windows = windows.take(np.flatnonzero(windows.bucket == bucket))
    assembler = Assembler({bucket: finished.run.prepared.timelines(bucket)}, config.stream.session_gap_minutes)
    t, row, seen = assembler.timelines, windows.row, windows.stop
    truth = t.h_offsets[row] + seen
    retriever = Retriever(finished.item_model(device), config.stream, device)
    items = retriever.top(assembler, row, seen, 0, retrieve, drop_seen)
    place = np.flatnonzero(items.ravel() != NONE)
    user = place // items.shape[1]
    widths = [len(features_of(config.data.features, "t_", kind)) for kind in ("cat", "num")]
    cat, num = np.full((len(user), widths[0]), MISSING), np.full((len(user), widths[1]), np.nan, np.float32)
    pairs = Pairs(row[user], items.ravel()[place], t.h_time[truth][user], seen[user], cat, num)
    pairs = with_known_features(pairs, t, items_known, config.data, (), bool(finished.run.prepared.lists))
    scores = np.full(items.shape, -np.inf, np.float32)
    scorer = Scorer(finished.click_model(device), config.stream, device)
    scores.ravel()[place] = scorer.score(assembler, pairs)
    ranked = np.take_along_axis(items, np.argsort(-scores, axis=1, kind="stable"), 1)
    known, worst = t.h_item[truth], finished.run.sizes().items
    repeated = _in_past(assembler, row, seen, known) & (known >= finished.run.sizes().first_item)
    sums = [RankSums.from_ranks(_ranks(lists, known, worst), repeated) for lists in (items, ranked)]
    return sums[0], sums[1]


def _ranks(lists: Array, truth: Array, worst: int) -> Ints:
    """Place of each truth in its list, from 1; `worst` where it is not in it."""
    hit = lists == truth[:, None]
    return np.where(hit.any(1), 1 + hit.argmax(1), worst)


def _in_past(assembler: Assembler, row: Ints, seen: Ints, item: Array) -> Array:
    """Whether each timeline's first `seen` events hold an item."""
    t = assembler.timelines
    user = np.repeat(np.arange(len(row)), seen)
    past = t.h_item[ranges(t.h_offsets[row], seen)]
    return np.bincount(user[past == item[user]], minlength=len(row)) > 0
