"""Logs of a few rows for the tests of preparation, and their timelines read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np

from hpgr.data.preparation import Prepared
from hpgr.schema import TEST, TRAIN, VALIDATION, Batch

T = 1_600_000_000
US = 1_000_000
Make = Callable[..., Any]
NAMES = {TRAIN: "train", VALIDATION: "val", TEST: "test"}


def users(prepared: Prepared) -> dict[str, dict[str, Any]]:
    """Timelines of all buckets by user."""
    rows = [row for b in range(prepared.buckets) for row in prepared.timelines(b).to_pylist()]
    assert len({row["user"] for row in rows}) == len(rows) == prepared.manifest["account"]["timelines"]
    return {row["user"]: row for row in rows}


def splits(prepared: Prepared) -> dict[str, list[str]]:
    """The split of each impression of a user, in time order."""
    return {user: [NAMES[s] for s in row["t_split"]] for user, row in users(prepared).items()}


def vocabulary(prepared: Prepared) -> list[str]:
    return prepared.vocabulary().items.column("value").to_pylist()


def item_names(prepared: Prepared, indices: list[int]) -> list[str]:
    """Ids of item indices; `?` for out of vocabulary."""
    words, first = vocabulary(prepared), prepared.vocabulary().first_item
    return [words[i - first] if i >= first else "?" for i in indices]


def content(prepared: Prepared) -> list[bytes]:
    """The prepared files that training reads, byte for byte."""
    names = ["vocabulary.parquet", "vocabulary.json"]
    names += [f"timelines/{n}" for n in prepared.folder.entries("timelines")]
    return [prepared.folder.read(name) for name in names]


def quarantined(prepared: Prepared) -> list[tuple[int, str]]:
    """(row, reason) of every quarantined row, in file order."""
    tables = [prepared.folder.read_parquet(f"quarantine/{n}") for n in prepared.folder.entries("quarantine")]
    rows = [row for table in tables for row in table.to_pylist()]
    assert all(row["file"] and row["values"] for row in rows)
    return sorted((row["row"], row["reason"]) for row in rows)


def check_account(prepared: Prepared, rows_in: int, bad: list[tuple[int, str]], duplicates: int = 0) -> None:
    """Every input row is kept, quarantined or a duplicate, and the quarantine holds the rows and reasons."""
    account = prepared.manifest["account"]
    assert (account["rows_in"], account["quarantined"], account["duplicates"]) == (rows_in, len(bad), duplicates)
    assert account["rows_in"] == account["kept"] + account["quarantined"] + account["duplicates"]
    assert quarantined(prepared) == sorted(bad)
    reasons = [reason for _, reason in bad]
    assert account["reasons"] == {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    events = sum(
        len(row) for b in range(prepared.buckets) for row in prepared.timelines(b).column("h_item").to_pylist()
    )
    assert events == account["history_events"] == account["kept"]


def one_user(n: int, user: str = "a", start: int = 0) -> list[dict[str, Any]]:
    """n impressions a second apart, clicked in turn."""
    return [{"user_id": user, "item_id": f"i{k % 3}", "timestamp": T + start + k, "clicked": k % 2} for k in range(n)]


def busy_log(seed: int = 0) -> dict[str, list[Any]]:
    """Users with many equal times, repeated items, lists, missing values and features of every role."""
    rng = np.random.default_rng(seed)
    n = 240
    return {
        "user_id": [f"u{k}" for k in rng.integers(0, 7, n)],
        "item_id": [f"i{k}" for k in rng.integers(0, 12, n)],
        "timestamp": (T + rng.integers(0, 60, n)).tolist(),
        "clicked": rng.choice([0, 1, None], n).tolist(),
        "event": rng.choice(["view", "cart", None], n).tolist(),
        "page": rng.choice(["p1", "p2", "p3", None], n).tolist(),
        "price": [None if k % 11 == 0 else round(float(v), 3) for k, v in enumerate(rng.gamma(2, 9, n))],
        "city": rng.choice(["北京", "São Paulo", "Łódź"], n).tolist(),
    }


BUSY = {
    "columns": {"label": "clicked", "action": "event", "request": ["page", "timestamp"]},
    "features": [
        {"name": "price", "column": "price", "role": "item", "kind": "numeric", "transform": "log1p"},
        {"name": "city", "column": "city", "role": "user"},
    ],
}


def permuted(rows: dict[str, list[Any]], order: Any) -> dict[str, list[Any]]:
    return {name: [values[i] for i in order] for name, values in rows.items()}


def same(a: Batch, b: Batch) -> bool:
    """Equal to the bit."""
    return all(
        a.user.equals(b.user)
        if f.name == "user"
        else np.array_equal(getattr(a, f.name), getattr(b, f.name), equal_nan=f.name.endswith("num"))
        for f in fields(Batch)
    )
