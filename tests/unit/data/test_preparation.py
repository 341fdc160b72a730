"""Logs -> timelines: the small expected tables stand beside the input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from helpers_log import BUSY, US, Make, T, busy_log, item_names, one_user, splits, users, vocabulary

from hpgr.data import preparation
from hpgr.data.hashing import hash_text
from hpgr.data.preparation import in_process, prepare
from hpgr.errors import DataError
from hpgr.schema import FIRST_OOV, NO_ACTION, TEST, TRAIN, VALIDATION

# Splits.

A, B = one_user(10, "a"), one_user(5, "b", start=100)
C = one_user(1, "c", start=200)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        (
            {"by": "user_fraction"},
            {"a": "8 train, 1 val, 1 test", "b": "4 train, 1 val, 0 test", "c": "1 train, 0 val, 0 test"},
        ),
        (
            {"by": "user_fraction", "validation": 0.2, "test": 0.4},
            {"a": "4 train, 2 val, 4 test", "b": "2 train, 1 val, 2 test", "c": "0 train, 1 val, 0 test"},
        ),
        (
            {"by": "time_fraction", "validation": 0.125, "test": 0.25},
            {"a": "10 train, 0 val, 0 test", "b": "0 train, 2 val, 3 test", "c": "0 train, 0 val, 1 test"},
        ),
        (
            {"by": "date", "validation_from": "2020-09-13T12:26:45Z", "test_from": "2020-09-13T12:28:22"},
            {"a": "5 train, 5 val, 0 test", "b": "0 train, 2 val, 3 test", "c": "0 train, 0 val, 1 test"},
        ),
        (
            {"by": "leave_one_out"},
            {"a": "8 train, 1 val, 1 test", "b": "3 train, 1 val, 1 test", "c": "0 train, 0 val, 1 test"},
        ),
    ],
)
def test_split_gives_the_expected_shares(prepare_log: Make, split: dict[str, Any], expected: dict[str, str]) -> None:
    found = splits(prepare_log(A + B + C, split=split))
    assert {u: ", ".join(f"{s.count(n)} {n}" for n in ("train", "val", "test")) for u, s in found.items()} == expected
    for parts in found.values():
        assert parts == sorted(parts, key=["train", "val", "test"].index)


def test_account_of_the_split_adds_up(prepare_log: Make) -> None:
    account = prepare_log(A + B + C, split={"by": "user_fraction"}).manifest["account"]
    assert account["splits"] == {
        "train": {"impressions": 13, "positives": 6},
        "validation": {"impressions": 2, "positives": 0},
        "test": {"impressions": 1, "positives": 1},
    }
    assert (account["users"], account["history_events"], account["unused"]) == (3, 16, 0)
    assert (account["first_time"], account["last_time"]) == (T * US, (T + 200) * US)


@pytest.mark.parametrize("by", ["user_fraction", "time_fraction", "date", "leave_one_out"])
def test_a_list_is_never_split(prepare_log: Make, by: str) -> None:
    """Lists of 4 whose rows are 3 s apart and overlap the next list's: every cut falls inside one."""
    rows = [
        {"user_id": u, "item_id": f"i{k}", "timestamp": T + 5 * page + 3 * k, "clicked": int(k == 1), "page": page}
        for u in ("a", "b")
        for page in range(9)
        for k in range(4)
    ]
    dates = {"validation_from": "2020-09-13T12:27:02Z", "test_from": "2020-09-13T12:27:11Z"}
    cut = dates if by == "date" else {"validation": 0.2, "test": 0.2}
    prepared = prepare_log(rows, columns={"label": "clicked", "request": ["page"]}, split={"by": by, **cut})
    for row in users(prepared).values():
        lists: dict[int, set[tuple[int, int]]] = {}
        for request, part, time in zip(row["t_request"], row["t_split"], row["t_time"], strict=True):
            lists.setdefault(request, set()).add((part, time))
        assert len(lists) == 9
        assert all(len(found) == 1 for found in lists.values()), "a list has one split and one time"
        assert {TRAIN, VALIDATION, TEST} == set(row["t_split"])
        assert row["t_split"] == sorted(row["t_split"])
        assert sorted(t for ((_, t),) in lists.values()) == [(T + 5 * page) * US for page in range(9)]


def test_leave_one_out_leaves_out_whole_lists(prepare_log: Make) -> None:
    rows = [
        {"user_id": "a", "item_id": f"i{k}", "timestamp": T + 9 * page, "clicked": int(k == 1), "page": page}
        for page, size in enumerate([3, 1, 4, 2])
        for k in range(size)
    ]
    prepared = prepare_log(rows, columns={"label": "clicked", "request": ["page"]}, split={"by": "leave_one_out"})
    assert splits(prepared)["a"] == ["train"] * 4 + ["val"] * 4 + ["test"] * 2


# What an impression may see.


def test_visible_counts_strictly_earlier_events(prepare_log: Make) -> None:
    times = [0, 0, 5, 5, 5, 7, 9, 9, 12, 12]
    rows = [{"user_id": "a", "item_id": f"i{k}", "timestamp": T + t, "clicked": k % 2} for k, t in enumerate(times)]
    row = users(prepare_log(rows, split={"by": "user_fraction"}))["a"]
    expected = [0, 0, 2, 2, 2, 5, 6, 6, 8, 8]
    assert row["h_time"] == row["t_time"] == [(T + t) * US for t in times]
    assert row["h_visible"] == row["t_visible"] == expected


def test_a_second_is_a_second_however_fine_the_clock(prepare_log: Make) -> None:
    """Items shown milliseconds apart, one of them clicked, do not inform one another; nor do events of that second."""
    times = [0, 400, 5000, 5001, 5002, 5999, 6000, 9000, 9999, 12000]
    row = {"user_id": "a", "clicked": 1}
    rows = [row | {"item_id": f"i{k}", "timestamp": T * 1000 + t, "clicked": k % 2} for k, t in enumerate(times)]
    row = users(prepare_log(rows, time_unit="ms", split={"by": "user_fraction"}))["a"]
    assert row["h_visible"] == row["t_visible"] == [0, 0, 2, 2, 2, 2, 6, 7, 7, 9]
    lists = [r | {"page": k // 2} for k, r in enumerate(rows)]
    columns, split = {"label": "clicked", "request": ["page"]}, {"by": "user_fraction", "validation": 0.2, "test": 0.2}
    row = users(prepare_log(lists, time_unit="ms", columns=columns, split=split))["a"]
    assert row["t_visible"] == [0, 0, 2, 2, 2, 2, 6, 6, 7, 7]


def test_the_order_column_never_makes_the_same_second_visible(prepare_log: Make) -> None:
    rows = [
        {"user_id": "a", "item_id": f"i{k}", "timestamp": T + k // 4, "clicked": k % 2, "step": 100 - k}
        for k in range(20)
    ]
    prepared = prepare_log(rows, columns={"label": "clicked", "order": "step"}, split={"by": "user_fraction"})
    row = users(prepared)["a"]
    assert row["h_visible"] == [k - k % 4 for k in range(20)]
    within = [k - k % 4 + 3 - k % 4 for k in range(20)]
    assert row["t_label"] == [k % 2 for k in within], "equal times are ordered by the column"


def test_a_lists_own_click_is_never_in_its_history(prepare_log: Make) -> None:
    """The list's rows differ in time; its click, and what happened between its rows, stay unseen."""
    filler = one_user(20, "z")
    view = {"user_id": "a", "clicked": None, "page": None}
    shown = {"user_id": "a", "page": "p"}
    rows = [
        *(r | {"page": None} for r in filler),
        view | {"item_id": "i0", "timestamp": T + 9},
        view | {"item_id": "i1", "timestamp": T + 11},
        shown | {"item_id": "i0", "timestamp": T + 14, "clicked": 0},
        shown | {"item_id": "i1", "timestamp": T + 12, "clicked": 1},
        shown | {"item_id": "i2", "timestamp": T + 10, "clicked": 0},
        view | {"item_id": "i2", "timestamp": T + 20},
        {"user_id": "a", "page": "q", "item_id": "i2", "timestamp": T + 30, "clicked": 1},
    ]
    history = [[{"column": "clicked", "op": "is_null"}], [{"column": "clicked", "value": 1}]]
    prepared = prepare_log(rows, columns={"label": "clicked", "request": ["page"]}, history=history)
    row = users(prepared)["a"]
    assert [(t - T * US) // US for t in row["h_time"]] == [9, 11, 12, 20, 30]
    assert [(t - T * US) // US for t in row["t_time"]] == [10, 10, 10, 30]
    assert row["t_visible"] == [1, 1, 1, 4]
    assert row["t_request"][0] == row["t_request"][1] == row["t_request"][2] != row["t_request"][3]


# What training knows.


def test_a_history_rule_that_no_row_matches_is_refused(prepare_log: Make) -> None:
    with pytest.raises(DataError, match=r"no row matches data\.history"):
        prepare_log(A + B, history=[[{"column": "clicked", "value": 7}]])
    assert prepare_log(A + B, history=[]).manifest["account"]["history_events"] == 0  # as asked


def test_items_that_training_has_not_seen_are_counted_and_told(
    config: Make, write_log: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    log = pd.DataFrame(LATE).to_dict("list")
    prepared = prepare(config(data={"path": write_log(log), "split": {"by": "user_fraction"}}), in_process, print)
    assert prepared.manifest["account"]["unknown_items"] == {"train": 0, "validation": 1, "test": 2}
    assert "100% of the test impressions are out of vocabulary and share 64 vectors" in capsys.readouterr().out


LATE = [
    *one_user(16, "a"),
    {"user_id": "a", "item_id": "i0", "timestamp": T + 50, "clicked": 0},
    {"user_id": "a", "item_id": "late", "timestamp": T + 60, "clicked": 1},
    {"user_id": "a", "item_id": "later", "timestamp": T + 70, "clicked": 1},
    {"user_id": "a", "item_id": "later", "timestamp": T + 80, "clicked": 1},
]


@pytest.mark.parametrize("by", ["time_fraction", "user_fraction"])
def test_items_of_held_out_time_are_out_of_vocabulary(prepare_log: Make, by: str) -> None:
    prepared = prepare_log(LATE, split={"by": by}, vocabulary={"oov_buckets": 5})
    items = prepared.vocabulary().items.to_pylist()
    assert items == [
        {"value": "i0", "count": 6, "shown": 6, "clicked": 3, "history": 6},
        {"value": "i1", "count": 5, "shown": 5, "clicked": 3, "history": 5},
        {"value": "i2", "count": 5, "shown": 5, "clicked": 2, "history": 5},
    ]
    row = users(prepared)["a"]
    assert item_names(prepared, row["h_item"])[-4:] == ["i0", "?", "?", "?"]
    assert item_names(prepared, row["t_item"])[-4:] == ["i0", "?", "?", "?"]
    late, later, again = row["h_item"][-3:]
    assert later == again
    assert all(FIRST_OOV <= index < FIRST_OOV + 5 for index in (late, later))
    assert row["n_train"] == 16
    assert row["train_end"] == (T + 50) * US


@pytest.mark.parametrize("history", [None, [[{"column": "event", "value": "view"}]]], ids=["every row", "views"])
@pytest.mark.parametrize("by", ["user_fraction", "time_fraction"])
def test_history_counts_are_the_events_that_stage_1_reads(prepare_log: Make, by: str, history: Any) -> None:
    """Clicked or not: of an item's count nothing may tell its training labels.

    Where a user's split begins within a second, training rows of that second are counted and stage 1 leaves them out.
    """
    rules = {} if history is None else {"history": history}
    words = {"min_count": 15, "oov_buckets": 3}
    prepared = prepare_log(busy_log(), split={"by": by}, vocabulary=words, **BUSY, **rules)
    found, read = prepared.vocabulary(), np.zeros(0, np.int64)
    for row in users(prepared).values():
        read = np.append(read, row["h_item"][: row["n_train"]])
    more = found.history - np.bincount(read, minlength=found.size)[FIRST_OOV:]
    assert more.min() == 0
    assert more.sum() <= (2 if by == "user_fraction" else 0)
    assert found.oov_history.any()
    assert found.items.num_rows > 1
    assert (found.items.column("history").to_numpy() != found.items.column("clicked").to_numpy()).any()


def test_popularity_does_not_depend_on_the_future(prepare_log: Make) -> None:
    """Ten thousand later clicks change neither vocabulary, statistics nor what training reads."""
    more = {"user_id": "a", "item_id": "later", "clicked": 1}
    future = [more | {"timestamp": T + 100 + k} for k in range(200)]
    dates = {"by": "date", "validation_from": "2020-09-13T12:27:20Z", "test_from": "2020-09-13T12:27:41Z"}
    few = prepare_log(LATE, split=dates)
    many = prepare_log(LATE + future, name="future", split=dates)
    assert few.vocabulary().items.equals(many.vocabulary().items)
    assert few.folder.read("vocabulary.json") == many.folder.read("vocabulary.json")
    past, all_ = users(few)["a"], users(many)["a"]
    for name, values in past.items():
        assert (all_[name][: len(values)] if isinstance(values, list) else all_[name]) == values


def test_ids_of_quarantined_rows_alone_are_nowhere(prepare_log: Make) -> None:
    """Ids are told once a block, those of bad rows too."""
    bad = [{"user_id": "b", "item_id": "x", "timestamp": -(10**12), "clicked": 1}] * 3
    found, expected = prepare_log(A + bad, name="bad"), prepare_log(A)
    assert found.manifest["account"]["quarantined"] == 3
    assert users(found) == users(expected)
    assert vocabulary(found) == vocabulary(expected)


def test_times_and_items_are_written_as_differences(prepare_log: Make) -> None:
    """Parquet's writer passes over names it does not know."""
    prepared = prepare_log(A)
    path = Path(prepared.folder.uri) / "timelines/bucket-00000.parquet"
    columns = pq.ParquetFile(path).metadata.row_group(0).to_dict()["columns"]
    packed = {c["path_in_schema"].partition(".")[0] for c in columns if "DELTA_BINARY_PACKED" in c["encodings"]}
    assert packed == {"h_item", "h_time", "t_item", "t_time"}


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
def test_large_numbers_order_and_tell_rows_apart_by_their_last_digits(prepare_log: Make, format: str) -> None:
    """Ids of events are beyond 2**53, where neighbours are one float."""
    ids = [1_700_000_000_000_000_000 + k for k in range(6)]
    rows = A + [{"user_id": "z", "item_id": f"i{k % 2}", "timestamp": T, "clicked": 1} for k in range(6)]
    rows = [r | {"eid": eid} for r, eid in zip(rows, [*range(len(A)), *reversed(ids)], strict=True)]
    prepared = prepare_log(rows, format, columns={"order": "eid"})
    assert prepared.manifest["account"]["duplicates"] == 0
    assert item_names(prepared, users(prepared)["z"]["h_item"]) == ["i1", "i0"] * 3


@pytest.mark.parametrize("nothing", [None, "", float("nan")])
def test_an_empty_request_is_none(prepare_log: Make, nothing: Any) -> None:
    page: list[Any] = [1.0 if isinstance(nothing, float) else "p"] * 2 + [nothing] * (len(A) - 2)
    kind = pa.float64() if isinstance(nothing, float) else pa.string()
    table = pa.Table.from_pylist(A).append_column("page", pa.array(page, kind, from_pandas=False))
    request = users(prepare_log(table, columns={"request": ["page"]}))["a"]["t_request"]
    assert request[2:] == [-1] * (len(A) - 2)


def test_vocabulary_keeps_the_frequent(prepare_log: Make) -> None:
    assert vocabulary(prepare_log(LATE, vocabulary={"min_count": 6})) == ["i0"]
    assert vocabulary(prepare_log(LATE, vocabulary={"max_items": 2})) == ["i0", "i1"]


def test_statistics_come_from_training_only(prepare_log: Make) -> None:
    rows = [
        r | {"price": 1000.0 if k >= 16 else [2.0, 4.0, None, 6.0][k % 4], "shop": "new" if k >= 16 else f"s{k % 2}"}
        for k, r in enumerate(LATE)
    ]
    features = [
        {"name": "price", "column": "price", "role": "candidate", "kind": "numeric"},
        {"name": "shop", "column": "shop", "role": "candidate"},
    ]
    prepared = prepare_log(rows, features=features)
    known = prepared.vocabulary()
    mean, sd = known.moments["feature:price"]
    assert (mean, sd) == pytest.approx((4.0, (8 / 3) ** 0.5))
    assert list(known.categories["feature:shop"]) == ["s0", "s1"]
    row = users(prepared)["a"]
    expected = [(p - 4) / sd if p else np.nan for p in [2.0, 4.0, None, 6.0]] * 4 + [5.0] * 4
    np.testing.assert_allclose(row["t_num"], expected, rtol=1e-6)
    assert row["t_cat"] == [2, 3] * 8 + [1] * 4


# Rules and features.


def test_trivago_rules_make_history_of_engagements_and_clicks(prepare_log: Make, root: Path) -> None:
    settings = yaml.safe_load((root / "jobs/configs/trivago.yaml").read_text())["data"]
    names = ["item_id", "timestamp", "event_type", "is_impression", "label", "step", "session_id"]
    events = [
        # item, time, event type, impression, label, step, session
        ("i1", 0, "search", False, None, 1, "s1"),
        ("i2", 5, "image", False, None, 2, "s1"),
        ("i1", 9, "impression", True, 0, 3, "s1"),
        ("i2", 9, "impression", True, 1, 3, "s1"),
        ("i3", 9, "impression", True, 0, 3, "s1"),
        ("i3", 20, "image", False, 1, 4, "s1"),
        ("i3", 30, "impression", True, 1, 5, "s1"),
        ("i1", 30, "impression", True, 0, 5, "s1"),
        ("i9", 40, "impression", True, None, 6, "s1"),
    ]
    rest = {"device": "mobile", "platform": "PL", "city": "c", "position": 1, "price": 80.0}
    rows = [dict(zip(names, e, strict=True)) | rest | {"user_id": "a"} for e in events]
    rows = [r | {"timestamp": T + r["timestamp"]} for r in rows]
    filler = rows[0] | {"is_impression": True, "event_type": "impression", "session_id": "s2", "item_id": "f"}
    rows += [filler | {"user_id": "z", "timestamp": T + k, "step": k, "label": k % 2} for k in range(200)]
    split = {"by": "date", "validation_from": "2020-09-13T12:29:00Z", "test_from": "2020-09-13T12:29:10Z"}
    prepared = prepare_log(rows, **settings | {"vocabulary": {"min_count": 1}, "split": split})
    row = users(prepared)["a"]
    assert item_names(prepared, row["h_item"]) == ["i1", "i2", "i2", "i3", "i3"]
    assert [t // US - T for t in row["h_time"]] == [0, 5, 9, 20, 30]
    shown = sorted(
        zip(row["t_time"], item_names(prepared, row["t_item"]), row["t_label"], row["t_visible"], strict=True)
    )
    assert [(t // US - T, *more) for t, *more in shown] == [
        (9, "i1", 0, 2),
        (9, "i2", 1, 2),
        (9, "i3", 0, 2),
        (30, "i1", 0, 4),
        (30, "i3", 1, 4),
    ]
    done = row["h_action"][2]  # the click at 9
    assert done > NO_ACTION
    assert row["t_action"] == [done if label else NO_ACTION for label in row["t_label"]], "no click, nothing done"
    assert prepared.manifest["account"]["unused"] == 1


def test_impressions_bring_what_was_done_with_their_items(prepare_log: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """By item and moment, whatever order lists put impressions in; training's alone are counted, by label."""
    monkeypatch.setattr(preparation, "BUCKET_ROWS", 60)
    rng = np.random.default_rng(5)
    rows = [
        {"user_id": f"u{u}", "item_id": f"i{item}", "timestamp": T + k // 3, "rating": int(rng.integers(1, 6)),
         "page": f"p{k % 2}-{k // 6}"}
        for u in range(9) for k, item in enumerate(rng.permutation(24))
    ]  # fmt: skip
    prepared = prepare_log(
        rows, columns={"label": "rating", "action": "rating", "request": ["page"]},
        label_rule={"op": ">=", "value": 4}, split={"by": "user_fraction", "validation": 0.2, "test": 0.2},
    )  # fmt: skip
    assert prepared.buckets > 1
    rated = {(r["user_id"], r["item_id"]): r["rating"] for r in rows}
    words = ["", "", *prepared.vocabulary().categories["action"]]
    counts = np.zeros((2, len(words)), int)
    for user, row in users(prepared).items():
        shown = zip(item_names(prepared, row["t_item"]), row["t_action"], row["t_label"], row["t_split"], strict=True)
        for item, action, label, split in shown:
            assert words[action] == f"{rated[user, item]}|{label}"
            counts[label, action] += split == TRAIN
    assert prepared.manifest["train_actions"] == counts.tolist()
    assert (counts > 0).sum() == 5


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ({"column": "event", "value": "view"}, [0, 1, 5]),
        ({"column": "event", "op": "!=", "value": "view"}, [2, 4]),
        ({"column": "event", "op": "in", "value": ["cart", "buy"]}, [2, 4]),
        ({"column": "event", "op": "not_in", "value": ["cart", "view"]}, [4]),
        ({"column": "event", "op": "is_null"}, [3]),
        ({"column": "event", "op": "not_null"}, [0, 1, 2, 4, 5]),
        ({"column": "stay", "op": ">=", "value": 20}, [2, 3, 4]),
        ({"column": "stay", "op": "<", "value": 10.5}, [0, 1]),
        ({"column": "stay", "op": "in", "value": [0, 40]}, [0, 4]),
        ({"column": "stay", "op": "not_in", "value": [0, 40]}, [1, 2, 3]),
        ({"column": "seen", "value": True}, [0, 2, 4]),
        ({"column": "seen", "op": "!=", "value": True}, [1, 3, 5]),
    ],
)
def test_rules_choose_the_history(prepare_log: Make, format: str, rule: dict[str, Any], kept: list[int]) -> None:
    """A comparison with null is false, whatever the operator."""
    events, stays = ["view", "view", "cart", None, "buy", "view"], [0, 10, 20, 30, 40, None]
    rows = [
        {"user_id": "a", "item_id": f"i{k}", "timestamp": T + k, "clicked": k % 2,
         "event": events[k], "stay": stays[k], "seen": k % 2 == 0}
        for k in range(6)
    ]  # fmt: skip
    split = {"by": "date", "validation_from": "2020-09-13T12:26:44Z", "test_from": "2020-09-13T12:26:45Z"}
    row = users(prepare_log(rows, format, history=[[rule]], split=split))["a"]
    assert [t // US - T for t in row["h_time"]] == kept
    assert len(row["t_item"]) == 6


def test_features_reach_the_streams_of_their_role(prepare_log: Make, log: Make) -> None:
    roles = ["item", "event", "user", "candidate"]
    features = [{"name": f"{r}_cat", "column": f"{r}_c", "role": r} for r in roles]
    features += [{"name": f"{r}_num", "column": f"{r}_n", "role": r, "kind": "numeric"} for r in roles]
    rows = log(users=1, events=40)
    for r in roles:
        rows[f"{r}_c"] = [f"{r}{k % 2}" for k in range(40)]
        rows[f"{r}_n"] = [float(k % 2) + 10 * roles.index(r) for k in range(40)]
    rows["candidate_c"][5] = None
    prepared = prepare_log(rows, features=features)
    assert prepared.manifest["features"] == {
        "h_cat": ["item_cat", "event_cat", "user_cat"],
        "h_num": ["item_num", "event_num", "user_num"],
        "t_cat": ["item_cat", "user_cat", "candidate_cat"],
        "t_num": ["item_num", "user_num", "candidate_num"],
    }
    row = users(prepared)["u0"]
    even = {k: 2 + k % 2 for k in range(40)}
    assert np.reshape(row["h_cat"], (40, 3)).tolist() == [[even[k]] * 3 for k in range(40)]
    candidate = [2 if k % 2 == 0 else 3 for k in range(40)]
    assert np.reshape(row["t_cat"], (40, 3))[:, :2].tolist() == [[even[k]] * 2 for k in range(40)]
    assert (np.reshape(row["t_cat"], (40, 3))[:, 2] == candidate).sum() == 39
    assert row["t_cat"][5 * 3 + 2] == 0
    for name in ("h_num", "t_num"):
        np.testing.assert_allclose(np.reshape(row[name], (40, 3)), [[2.0 * (k % 2) - 1] * 3 for k in range(40)])


def test_the_label_is_part_of_the_action(prepare_log: Make, log: Make) -> None:
    rows = log() | {"event": ["view", "view", "cart"] * 16 + ["view"] * 2}
    prepared = prepare_log(rows, columns={"label": "clicked", "action": "event"})
    words = list(prepared.vocabulary().categories["action"])
    assert sorted(words) == ["cart|0", "cart|1", "view|0", "view|1"]
    row = users(prepared)["u0"]
    events, labels = rows["event"][::5], rows["clicked"][::5]
    assert [words[a - 2] for a in row["h_action"]] == [f"{e}|{c}" for e, c in zip(events, labels, strict=True)]


def test_rows_no_rule_uses_are_counted(prepare_log: Make, log: Make) -> None:
    rows = log() | {"event": ["view", "noise"] * 25, "clicked": [k // 2 % 2 for k in range(50)]}
    view = [[{"column": "event", "value": "view"}]]
    account = prepare_log(rows, impressions=view, history=view).manifest["account"]
    assert (account["kept"], account["unused"], account["history_events"]) == (50, 25, 25)


# Real logs.


def test_ml_100k_gives_its_known_counts(shared_data: Make, config: Make) -> None:
    columns = {"label": "rating", "action": "rating"}
    settings = {"label_rule": {"op": ">=", "value": 4}, "split": {"by": "user_fraction"}, "columns": columns}
    prepared = prepare(config(data={"path": shared_data("ml-100k.parquet"), **settings}), in_process, print)
    account = prepared.manifest["account"]
    assert (account["rows_in"], account["kept"], account["users"]) == (100_000, 100_000, 943)
    assert sum(part["positives"] for part in account["splits"].values()) == 55_375
    assert account["splits"]["test"]["impressions"] == pytest.approx(10_000, rel=0.01)


def test_trivago_lists_never_see_their_own_click(shared_data: Make, config: Make, root: Path) -> None:
    settings = yaml.safe_load((root / "jobs/configs/trivago.yaml").read_text())["data"]
    path = shared_data("trivago.parquet")
    prepared = prepare(config(data={"path": path, **settings}), in_process, print)
    account = prepared.manifest["account"]
    assert account["rows_in"] == pq.read_metadata(path).num_rows == 235_943
    assert sum(part["impressions"] for part in account["splits"].values()) == 190_344 - _duplicates(path)
    for row in users(prepared).values():
        times = np.array(row["h_time"], np.int64)
        assert row["t_visible"] == np.searchsorted(times, row["t_time"], side="left").tolist()


def _duplicates(path: str) -> int:
    """Impressions that repeat another in every column the configuration reads."""
    names = ["user_id", "item_id", "timestamp", "label", "event_type", "session_id", "step", "position", "price",
             "device", "platform", "city", "is_impression"]  # fmt: skip
    frame: pd.DataFrame = pq.read_table(path, columns=names).to_pandas()
    return int(frame[frame["is_impression"]].duplicated().sum())


def test_hashes_do_not_depend_on_the_others(log: Make) -> None:
    """Bucket and order of a row come from its own text alone."""
    words = [f"w{k}" for k in range(50)] + [None]
    together = hash_text(pa.array(words))
    alone = [hash_text(pa.array([w], pa.string()))[0] for w in words]
    assert together.tolist() == [int(h) for h in alone]
    assert len(set(alone)) == 51
