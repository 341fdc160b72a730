"""Batch scoring gives evaluation's numbers, whatever shares a batch, and looks at nothing that evaluation may not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from helpers_model import CPU, inputs, make_run, quiet, random_batch, shaken, tiny
from helpers_scoring import assert_same, batch, evaluated, finished_run, impressions, raw_log, scores_in, write

from hpgr.artifacts import Folder
from hpgr.data.batches import Assembler
from hpgr.data.new_log import prepare_new
from hpgr.data.preparation import in_process
from hpgr.data.stream import build_index
from hpgr.data.timelines import events_before
from hpgr.model.inputs import with_candidates
from hpgr.model.registry import click_model
from hpgr.schema import SECOND, Timelines
from hpgr.scoring.finished import Finished
from hpgr.scoring.pairs import Pairs, Scorer
from hpgr.training.two_stage import Run

RARE = {"data": {"vocabulary": {"min_count": 9, "oov_buckets": 8}}}
VARIANTS: dict[str, dict[str, Any]] = {
    "pgsa": RARE,
    "candidates only": RARE | {"model": {"pgsa": {"scope": "candidate"}, "layers": 3}},
    "dense, no sem": RARE
    | {"model": {"pgsa": {"enabled": False}, "sem": {"in_stage2": False}, "match_features": False}},
    "hstu, research form": RARE | {"model": {"name": "hstu", "hstu_form": "research"}, "stage1": {"enabled": False}},
    "mtgr": RARE | {"model": {"name": "mtgr", "layers": 3}, "stage1": {"enabled": False}},
    "din": RARE | {"model": {"name": "din"}},
    "logistic": RARE | {"model": {"name": "logistic"}, "stage1": {"enabled": False}},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished_run(tmp_path_factory.mktemp("run"), **RARE)


# The model's two halves


@pytest.mark.parametrize("variant", VARIANTS)
def test_encoded_once_equals_the_training_forward(variant: str) -> None:
    """Every candidate by itself, in another order and twice, over histories encoded once."""
    from helpers_model import MISSES_KNOWN

    torch.manual_seed(0)
    over = VARIANTS[variant].get("model", {})
    model = shaken(click_model(tiny(model=over), MISSES_KNOWN))
    data = random_batch(3, 12, 5, seed=4)
    x = inputs(data)
    with torch.no_grad():
        whole = model(x).scores
        past = model.encode(x)
        rows = np.array([2, 0, 1, 2])
        for candidate in range(5):
            chosen = rows * 5 + candidate
            columns = {f"c_{n}": getattr(data, f"t_{n}")[chosen] for n in ("item", "time", "visible", "cat", "num")}
            one = with_candidates(x, rows, np.ones(4, np.int64), columns)
            alone = model.read(past.rows(torch.from_numpy(rows)), one)[:, 0]
            torch.testing.assert_close(alone, whole[torch.from_numpy(rows), candidate], rtol=1e-5, atol=1e-5)


# The whole way of a batch job


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_job_gives_evaluations_scores(tmp_path: Path, variant: str) -> None:
    """Lists with a time, a position and a device each; unknown items; histories longer than the window."""
    finished = finished_run(tmp_path, **VARIANTS[variant])
    asked = impressions(finished.run)
    _, ours = batch(finished, tmp_path / "out", candidates=write(tmp_path / "pairs.parquet", asked))
    theirs = evaluated(finished)
    known = pc.is_valid(theirs["item"])
    assert 0 < (~known.to_numpy(zero_copy_only=False)).sum() < theirs.num_rows
    assert int(theirs["past"].to_numpy().max()) > finished.config.stream.window
    assert ours.num_rows == asked.num_rows == theirs.num_rows
    time = theirs["time"].cast(pa.timestamp("us", "UTC"))
    theirs = theirs.set_column(theirs.column_names.index("time"), "time", time)
    names = set(theirs.filter(known)["item"].to_pylist())
    inside = pc.is_in(ours["item"], value_set=pa.array(sorted(names)))
    assert_same(ours.filter(inside), theirs.filter(known))
    rest = ours.filter(pc.invert(inside)), theirs.filter(pc.invert(known))
    np.testing.assert_allclose(*(np.sort(t["score"].to_numpy()) for t in rest), rtol=0, atol=1e-5)


def test_a_held_out_log_through_preparation_gives_evaluations_scores(finished: Finished, tmp_path: Path) -> None:
    """Other users, unknown items, later times: prepared with the run's vocabulary, evaluated and batch scored."""
    from helpers_model import log_config

    over = {"data": {"synthetic": {"seed": 99, "items": 90}, "prepared": str(tmp_path / "other")}}
    other = make_run(log_config(tmp_path, **over), tmp_path / "unused")
    log = write(tmp_path / "new/log.parquet", raw_log(other))
    data = finished.config.data
    users = prepare_new(data, finished.run.prepared, [log], in_process, quiet)
    assert users.manifest["account"]["unknown_items"] > 0
    run = Run(finished.config, Folder(str(tmp_path / "evaluation")), users)
    build_index(users, finished.config, run.index_folder, "click-test", in_process)
    theirs = evaluated(finished, run)
    asked = impressions(other, since=0)
    assert theirs.num_rows == asked.num_rows == users.manifest["account"]["splits"]["test"]["impressions"]
    pairs = write(tmp_path / "pairs.parquet", asked)
    summary, ours = batch(finished, tmp_path / "out", users=log, candidates=pairs)
    assert summary["account"]["unknown_items"] == theirs["item"].null_count > 0
    for table in (ours, theirs):
        assert table.num_rows == asked.num_rows
    by_user = [t.group_by("user").aggregate([("score", "sum")]).sort_by("user") for t in (ours, theirs)]
    assert by_user[0]["user"].equals(by_user[1]["user"])
    np.testing.assert_allclose(*(t["score_sum"].to_numpy() for t in by_user), rtol=1e-5)
    each = [np.sort(t["score"].to_numpy()) for t in (ours, theirs)]
    np.testing.assert_allclose(*each, rtol=0, atol=1e-5)


def test_changing_the_future_changes_no_score(finished: Finished, tmp_path: Path) -> None:
    """Everything at and after the candidates' moment is another item at another time: same bits; the past counts."""
    log = raw_log(finished.run)
    moment = int(np.quantile(log["timestamp"].to_numpy(), 0.6))
    users = sorted(set(log["user_id"].to_pylist()))
    asked = pa.table({"user_id": np.repeat(users, 3), "item_id": ["i00003", "i00017", "i00031"] * len(users),
                      "timestamp": [moment] * (3 * len(users))})  # fmt: skip
    pairs = write(tmp_path / "pairs.parquet", asked)

    def scored(name: str, changed: Any) -> pa.Table:
        swapped = pc.if_else(pa.array(changed), "i00001", log["item_id"])
        moved = np.where(changed & (log["timestamp"].to_numpy() >= moment), log["timestamp"].to_numpy() + 7200,
                         log["timestamp"].to_numpy())  # fmt: skip
        other = log.set_column(1, "item_id", swapped).set_column(2, "timestamp", pa.array(moved))
        path = write(tmp_path / name / "log.parquet", other)
        return batch(finished, tmp_path / name / "out", users=path, candidates=pairs)[1].drop_columns(["run"])

    later = log["timestamp"].to_numpy() >= moment
    usual = scored("usual", np.zeros(len(later), bool))
    assert scored("future", later).equals(usual)
    assert not scored("past", ~later).equals(usual)


@pytest.fixture(scope="module")
def timelines(finished: Finished) -> pa.Table:
    return finished.run.prepared.timelines(0)


def some_pairs(timelines: pa.Table, seed: int = 0, count: int = 300) -> Pairs:
    """Candidates at any moment of any user: before the first event, inside the history, after it."""
    rng = np.random.default_rng(seed)
    t = Timelines.from_table(timelines)
    user = np.repeat(np.arange(len(t)), np.diff(t.h_offsets))
    row = np.sort(rng.integers(0, len(t), count))
    event = t.h_offsets[row] + (rng.random(count) * np.diff(t.h_offsets)[row]).astype(np.int64)
    time = t.h_time[event] + rng.choice([0, SECOND], count)
    cat, num = rng.integers(0, 3, (count, t.t_cat.shape[1])), np.zeros((count, t.t_num.shape[1]), np.float32)
    return Pairs(row, rng.integers(2, 40, count), time, events_before(user, t.h_time, row, time), cat, num)


@pytest.mark.parametrize(("tokens", "cells"), [(16, 16), (100, 300), (1 << 20, 1 << 20)])
def test_scores_do_not_depend_on_batches_or_order(
    finished: Finished, timelines: pa.Table, tokens: int, cells: int
) -> None:
    scorer = Scorer(finished.click_model(CPU), finished.config.stream, CPU)
    assembler, pairs = Assembler({0: timelines}, 30), some_pairs(timelines)
    usual = scorer.score(assembler, pairs)
    shuffle = np.random.default_rng(3).permutation(len(pairs))
    other = replace(scorer, history_tokens=tokens, cells=cells).score(assembler, pairs.take(shuffle))
    np.testing.assert_allclose(other, usual[shuffle], rtol=0, atol=1e-5)
    assert len(np.unique(usual)) > 100


def test_scores_do_not_depend_on_companions(finished: Finished, timelines: pa.Table) -> None:
    """Each pair alone, without the other users' timelines, equals the pair in company."""
    scorer = Scorer(finished.click_model(CPU), finished.config.stream, CPU)
    pairs = some_pairs(timelines)
    usual = scorer.score(Assembler({0: timelines}, 30), pairs)
    for place in range(0, len(pairs), 23):
        alone = replace(pairs.take(np.array([place])), row=np.zeros(1, np.int64))
        table = timelines.slice(int(pairs.row[place]), 1).combine_chunks()
        assert scorer.score(Assembler({0: table}, 30), alone)[0] == pytest.approx(usual[place], abs=1e-5)


def test_a_feed_whose_rows_come_seconds_apart_is_scored_as_evaluated(tmp_path: Path) -> None:
    """A request's rows see what its first one does, with a label or without, and are compared with none."""
    log = raw_log(finished_run(tmp_path / "source").run)
    slot = pc.fill_null(log["slot"], 0)
    feed = log.set_column(log.column_names.index("timestamp"), "timestamp", pc.add(log["timestamp"], slot))
    unseen = pc.if_else(pc.equal(slot, 0), pa.scalar(None, log["clicked"].type), log["clicked"])
    feed = feed.set_column(log.column_names.index("clicked"), "clicked", unseen)
    path = write(tmp_path / "feed.parquet", feed)
    finished = finished_run(tmp_path / "feed", data={"path": path, "impressions": [[{"column": "slot", "op": ">=",
                                                                                     "value": 0}]]})  # fmt: skip
    assert finished.run.sizes().t_num == ("place",)
    shown = feed.filter(pc.is_valid(log["slot"])).drop_columns(["clicked", "event"])
    _, ours = batch(finished, tmp_path / "out", candidates=write(tmp_path / "pairs.parquet", shown))
    frame = ours.to_pandas()  # each row bears its own time, evaluation's that of its list
    assert sorted(frame["time"].map(pd.Timestamp.timestamp)) == sorted(shown["timestamp"].to_pylist())
    frame["time"] = frame.groupby(["user", "list_id"])["time"].transform("min")
    ours, theirs = pa.Table.from_pandas(frame, ours.schema, preserve_index=False), evaluated(finished)
    moments = theirs["time"].cast(pa.timestamp("us", "UTC"))
    theirs = theirs.set_column(theirs.column_names.index("time"), "time", moments)
    rows = set(zip(*(theirs[name].to_pylist() for name in ("user", "time", "item")), strict=True))
    tested = [key in rows for key in zip(*(ours[name].to_pylist() for name in ("user", "time", "item")), strict=True)]
    assert_same(ours.filter(pa.array(tested)), theirs)


# Explanations


def test_explanations_are_pgsas_anchors_and_their_shares(finished: Finished, tmp_path: Path) -> None:
    """Against the model itself, candidate by candidate over its own window of history."""
    asked = impressions(finished.run)
    pairs = write(tmp_path / "pairs.parquet", asked)
    _, plain = batch(finished, tmp_path / "plain", candidates=pairs)
    _, table = batch(finished, tmp_path / "explained", candidates=pairs, explain=True)
    np.testing.assert_allclose(table["score"].to_numpy(), plain["score"].to_numpy(), rtol=0, atol=1e-6)
    config, counts = finished.config, set()
    history = {(u, t): i for u, i, t in zip(*(raw_log(finished.run)[c].to_pylist() for c in
                                              ("user_id", "item_id", "timestamp")), strict=True)}  # fmt: skip
    for row in table.to_pylist():
        anchors = row["anchors"]
        counts.add(len(anchors))
        assert sum(a["share"] for a in anchors) <= 1 + 1e-5
        assert all(0 <= a["share"] <= 1 and 0 < a["weight"] <= 0.5 for a in anchors)
        assert all(a["time"] < row["time"] for a in anchors)
        for a in anchors:
            assert a["item"] is None or (row["user"], int(a["time"].timestamp())) in history
    assert max(counts) == config.model.pgsa.top_k
    assert len(scores_in(tmp_path / "explained")) == asked.num_rows


def test_anchors_equal_a_plain_selection(finished: Finished, timelines: pa.Table) -> None:
    model, stream = finished.click_model(CPU), finished.config.stream
    assembler, pairs = Assembler({0: timelines}, 30), some_pairs(timelines, seed=7, count=40)
    _, anchors = Scorer(model, stream, CPU).explain(assembler, pairs)
    t, ends = assembler.timelines, np.cumsum(anchors.lengths)
    for p in range(len(pairs)):
        own = slice(ends[p] - anchors.lengths[p], ends[p])
        seen = int(pairs.visible[p])
        start = max(0, -(-(seen - stream.window) // stream.spacing)) * stream.spacing
        first = int(t.h_offsets[pairs.row[p]])
        window = slice(first + start, first + seen)
        vectors = model.anchor_vectors(torch.from_numpy(t.h_item[window].astype(np.int64))).double()
        query = model.anchor_vectors(torch.tensor(int(pairs.item[p]))).double()
        relevance = (vectors @ query).float().numpy()
        best = np.lexsort((-np.arange(seen - start), -relevance))[: finished.config.model.pgsa.top_k]
        assert anchors.time[own].tolist() == t.h_time[window][best].tolist()
        assert anchors.item[own].tolist() == t.h_item[window][best].tolist()


def test_weights_and_shares_of_anchors_are_the_attentions(tmp_path: Path) -> None:
    """Without Gaussians a query's K anchors and itself weigh alike; shares are means over layers and heads."""
    finished = finished_run(tmp_path, model={"layers": 3, "pgsa": {"sigma": 0.0}})
    model, table = finished.click_model(CPU), finished.run.prepared.timelines(0)
    told: list[Any] = []
    read = model.read

    def spy(past: Any, x: Any, noise: Any = None, shares: Any = None) -> Any:
        out = read(past, x, noise, shares)
        told.append((torch.stack(shares).mean(0), *model.anchors(past, x)))
        return out

    model.read = spy
    pairs, scorer = some_pairs(table, seed=7, count=20), Scorer(model, finished.config.stream, CPU)
    for p in range(20):
        _, anchors = scorer.explain(Assembler({0: table}, 30), pairs.take(np.array([p])))
        shares, place, real = (t[0, 0] for t in told[-1])
        np.testing.assert_allclose(anchors.weight, 1 / (1 + int(real.sum())), rtol=1e-5)
        np.testing.assert_allclose(anchors.share, shares[place[real]], rtol=1e-5)
        assert shares.sum() < 1
