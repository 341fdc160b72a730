"""Later logs in the terms of a finished run: its column mapping and rules, its vocabulary and statistics.

Nothing is counted, split or learnt again. An item that the run does not know goes to a hashed out-of-vocabulary
index, a value of a feature that it does not know to "unknown"; a user is a user, for no model has a table of them.
Every impression of such a log is held out: its split is test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from hpgr.artifacts import FORMAT, Folder, absolute, fingerprint
from hpgr.config import Data
from hpgr.data import split as splits
from hpgr.data import staging
from hpgr.data.preparation import SPLIT_NAMES, Execute, Job, Prepared, bucket_count, ordered_rows, sole, versions
from hpgr.data.sources import find_files, fragments, inputs_fingerprint
from hpgr.data.timelines import encode, training_rows, write_timelines
from hpgr.data.validation import needed_columns
from hpgr.schema import Timelines

BEGINNING = np.iinfo(np.int64).min
ALL_HELD_OUT = splits.CutOffs(BEGINNING, BEGINNING)


def prepare_new(
    data: Data, known: Prepared, paths: Sequence[str], execute: Execute, say: Callable[[str], None]
) -> Prepared:
    """Prepare a log with the vocabulary of a prepared one, or reuse what an equal call gave before.

    Args:
        data: the run's `data` section: mapping, rules, features.
        known: the run's prepared log; the result is kept beside it, or in `data.prepared` if it is the run's own copy.
        paths: files, folders or globs of the new log.

    Raises:
        DataError: the log cannot be used; what is wrong and what to change.
    """
    files = find_files(paths, data.format, asked="--users")
    inputs = inputs_fingerprint(files)
    name = fingerprint({"format": FORMAT, "inputs": inputs, "known": known.manifest["fingerprint"]})
    own_copy = "uri" in known.manifest  # it tells where its log was
    home = absolute(data.prepared) if own_copy else known.folder.uri.rstrip("/").rpartition("/")[0]
    folder = Folder(home).sub(name)
    with sole(folder, say):
        if folder.exists("manifest.json"):
            say(f"users: inputs unchanged, reusing {folder.uri}")
            return Prepared.open(folder)
        say(f"users: {len(files)} file(s), {sum(f.size for f in files) / 1e6:,.1f} MB -> {folder.uri}")
        folder.delete()
        pieces = fragments(files, needed_columns(data))
        job = Job(data, folder, bucket_count(pieces), execute, say)
        account, _ = job.order(pieces, hours=False)
        folder.write_parquet("vocabulary.parquet", known.vocabulary().items)
        folder.write_json("vocabulary.json", known.vocabulary().to_tables())
        encoding = partial(_encode, data=data, folder=folder, lists=known.lists)
        parts = list(execute("encode", encoding, range(job.buckets)))
        manifest = {
            "format": FORMAT,
            "fingerprint": name,
            "inputs": inputs,
            "known": known.manifest["fingerprint"],
            "buckets": job.buckets,
            "account": account | _sums(parts),
            "cut_offs": asdict(ALL_HELD_OUT),
            **{key: known.manifest[key] for key in ("settings", "vocabulary", "features")},
            "versions": versions(),
        }
        folder.delete(staging.STAGING)
        folder.write_json("manifest.json", manifest)
    return Prepared(folder, manifest)


def _encode(bucket: int, data: Data, folder: Folder, lists: list[str]) -> dict[str, Any]:
    """Write a bucket's timelines; returns its account."""
    table, vocabulary = ordered_rows(bucket, folder), Prepared(folder, {}).vocabulary()
    _, account = training_rows(table, data, ALL_HELD_OUT)
    prepared = encode(table, vocabulary, data, ALL_HELD_OUT, lists)
    write_timelines(folder, bucket, prepared)
    unknown = int((Timelines.from_table(prepared).h_item < vocabulary.first_item).sum())
    return account | {"timelines": prepared.num_rows, "unknown_items": unknown}


def _sums(parts: list[dict[str, Any]]) -> dict[str, Any]:
    counted = ("users", "history_events", "unused", "timelines", "unknown_items")
    return {
        **{key: sum(p[key] for p in parts) for key in counted},
        "first_time": min(p["first_time"] for p in parts),
        "last_time": max(p["last_time"] for p in parts),
        "splits": {
            name: {"impressions": sum(p["rows"][i] for p in parts), "positives": sum(p["positives"][i] for p in parts)}
            for i, name in enumerate(SPLIT_NAMES)
        },
    }
