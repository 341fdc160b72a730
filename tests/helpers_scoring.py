"""Runs that look finished, raw logs of their impressions as candidates, and batch jobs run in this process. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch
from helpers_model import CPU, log_config, make_run, merged, quiet, shaken

from hpgr.artifacts import FORMAT, Folder
from hpgr.config import dump
from hpgr.data.preparation import in_process
from hpgr.data.stream import LocalSource
from hpgr.evaluation import score
from hpgr.model.base import ClickModel
from hpgr.model.registry import click_model, item_model
from hpgr.schema import SECOND
from hpgr.scoring import job, output
from hpgr.scoring.finished import Finished, open_finished
from hpgr.scoring.request import Request
from hpgr.training.checkpoint import to_bytes
from hpgr.training.two_stage import Run, stage_key

KEYS = ["user", "time", "item"]
Ask = Callable[..., tuple[dict[str, Any], pa.Table]]
"""`ask(columns, **wish)`: a job over a candidates table; its account and scores."""


def finished_run(root: Path, **over: Any) -> Finished:
    """A run folder under `root` with shaken weights in place of trained ones; timelines outgrow its window.

    Actions are devices, several to a label, so its click model has all that reads graded ones. Few factors, as products
    of many shaken ones make all scores 0 or 1.
    """
    base = {"data": {"columns": {"action": "device"}}, "model": {"asvd": {"factors": 4}}}
    config = log_config(root, **merged(base, over))
    run = make_run(config, root / "run")
    run.folder.write_json("run.json", {"format": FORMAT, "config": dump(config)})
    torch.manual_seed(0)
    stages: dict[str, Any] = {"stage1": item_model, "stage2": click_model}
    for name, model in stages.items():
        folder = run.folder.sub(name)
        made = shaken(model(config, run.sizes()), scale=0.2)
        if isinstance(made, ClickModel):
            made.know_items(run.prepared.folder.read_parquet("vocabulary.parquet"))
        folder.write("best.safetensors", to_bytes(made.state_dict()))
        done = {"settings": stage_key(config, run.prepared, name), "best_file": "best.safetensors"}
        folder.write_json("done.json", done)
    return open_finished(run.folder.uri)


def raw_log(run: Run) -> pa.Table:
    """The rows of a run's generated log."""
    return pa.concat_tables(pq.read_table(file["uri"]) for file in run.prepared.manifest["inputs"])


def impressions(run: Run, since: int | None = None) -> pa.Table:
    """The log's impressions from the test cut-off (or `since`, microseconds) on, as candidates: no labels."""
    log = raw_log(run)
    since = run.prepared.manifest["cut_offs"]["test"] if since is None else since
    shown = pc.and_(pc.is_valid(log["clicked"]), pc.greater_equal(pc.multiply(log["timestamp"], SECOND), since))
    return log.filter(shown).drop_columns(["clicked", "event"])


def evaluated(finished: Finished, run: Run | None = None) -> pa.Table:
    """Evaluation's own scores of the test impressions, with items by their ids."""
    run = run or finished.run
    table = score(finished.click_model(CPU), LocalSource().evaluation(run.spec("click-test")), CPU)
    return table.drop_columns(["item"]).append_column("item", pa.array(item_ids(finished, table["item"].to_numpy())))


def item_ids(finished: Finished, index: Any) -> list[str | None]:
    """Ids of item indices; None outside the catalogue."""
    vocabulary = finished.run.prepared.vocabulary()
    names = vocabulary.items["value"].to_pylist()
    return [names[i - vocabulary.first_item] if i >= vocabulary.first_item else None for i in index]


def score_here(request: Request, missing: list[int], _: output.Expected) -> int:
    """Scores shards one after the other in this process."""
    shards = job.open_shards(request, CPU)
    return sum(output.commit(request, s, shards.run(s))["account"]["pairs"] for s in missing)


def write(path: Path, table: pa.Table | dict[str, Any]) -> str:
    """A Parquet file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table if isinstance(table, pa.Table) else pa.table(table), path)
    return str(path)


def batch(finished: Finished, folder: Path | str, **wish: Any) -> tuple[dict[str, Any], pa.Table]:
    """A batch job in this process: what `_SUCCESS` says, and the scores as any reader finds them."""
    asked = job.Wish(run=finished.run.folder.uri, output=str(folder), **wish)
    summary = job.batch_score(asked, in_process, score_here, quiet)
    return summary, scores_in(folder)


def scores_in(folder: Path | str) -> pa.Table:
    """All scores of an output folder, in one order."""
    filesystem, path = Folder(str(folder)).path()
    table = ds.dataset(path, filesystem=filesystem).to_table()
    return table.sort_by([(name, "ascending") for name in table.column_names if name in ("user", "list_id", "rank")])


def sorted_scores(table: pa.Table, keys: Sequence[str] = KEYS) -> pa.Table:
    return table.sort_by([(name, "ascending") for name in keys])


def assert_same(ours: pa.Table, theirs: pa.Table, keys: Sequence[str] = KEYS, tolerance: float = 1e-5) -> None:
    """Equal rows by `keys`, scores within the tolerance."""
    a, b = sorted_scores(ours, keys), sorted_scores(theirs, keys)
    assert a.num_rows == b.num_rows > 0
    for key in keys:
        assert [str(v) for v in a[key].to_pylist()] == [str(v) for v in b[key].to_pylist()], key
    np.testing.assert_allclose(a["score"].to_numpy(), b["score"].to_numpy(), rtol=0, atol=tolerance)
