"""Rows that cannot be used are quarantined with a reason, and odd ones are kept: every row is accounted for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from helpers_log import check_account, quarantined, users

from hpgr.data import sources
from hpgr.data.preparation import Prepared
from hpgr.errors import DataError

T = 1_600_000_000
Columns = dict[str, list[Any]]
Make = Callable[..., Any]


# Rows that are quarantined, each with its reason.


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("timestamp", -5, "time outside data.earliest and data.latest"),
        ("timestamp", 0, "time outside data.earliest and data.latest"),
        ("timestamp", 631_151_999, "time outside data.earliest and data.latest"),
        ("timestamp", 4_102_444_800, "time outside data.earliest and data.latest"),
        ("timestamp", 99_999_999_999, "time outside data.earliest and data.latest"),
        ("timestamp", 2**60, "time outside data.earliest and data.latest"),
        ("timestamp", 2**63 - 1, "time outside data.earliest and data.latest"),
        ("timestamp", None, "null time"),
        ("user_id", None, "null user id"),
        ("user_id", "", "null user id"),
        ("item_id", None, "null item id"),
        ("clicked", 2, "label is not 0 or 1"),
        ("clicked", -1, "label is not 0 or 1"),
        ("position", None, "order is not a finite number"),
    ],
)
@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
def test_bad_value_is_quarantined_with_its_reason(
    prepare_log: Make, log: Make, format: str, column: str, value: Any, reason: str
) -> None:
    rows = log() | {"position": list(range(50))}
    rows[column][7] = value
    columns = {"label": "clicked", "order": "position"}
    check_account(prepare_log(rows, format, columns=columns), 50, [(7, reason)])


def test_the_first_and_the_last_second_within_bounds_are_kept(prepare_log: Make, log: Make) -> None:
    rows = log()
    rows["timestamp"][3], rows["timestamp"][7] = 631_152_000, 4_102_444_799  # 1990 begins, 2099 ends
    check_account(prepare_log(rows), 50, [])


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
def test_unreadable_time_text_is_quarantined(prepare_log: Make, log: Make, format: str) -> None:
    rows = log()
    rows["timestamp"] = [str(t) for t in rows["timestamp"]]
    bad = {3: "yesterday", 5: "nan", 8: "inf", 9: "2020-13-01"}
    for row, text in bad.items():
        rows["timestamp"][row] = text
    check_account(prepare_log(rows, format), 50, [(row, "unreadable time") for row in bad])


def test_a_log_of_unreadable_times_shows_one(prepare_log: Make, log: Make) -> None:
    rows = log() | {"timestamp": [f"11/{k % 28 + 1:02}/2019 9:05:58 AM" for k in range(50)]}
    with pytest.raises(DataError, match=r"50 unreadable time.* of ISO 8601 .*The first is .*'11/01/2019 9:05:58 AM'"):
        prepare_log(rows)


def test_dates_beyond_the_calendar_are_quarantined(prepare_log: Make, log: Make) -> None:
    days = pa.array([18_000 + i for i in range(50)], pa.int32())
    days = pa.concat_arrays([days[:7], pa.array([10_000_000], pa.int32()), days[8:]]).cast(pa.date32())
    table = pa.table(log()).set_column(2, "timestamp", days)
    check_account(prepare_log(table), 50, [(7, "time outside data.earliest and data.latest")])


def test_numbers_whose_squares_are_none_are_quarantined(prepare_log: Make, log: Make) -> None:
    rows = log() | {"price": [1.0] * 49 + [1.7e308]}
    feature = {"name": "price", "column": "price", "role": "candidate", "kind": "numeric"}
    check_account(prepare_log(rows, features=[feature]), 50, [(49, "feature price is not a finite number")])


def test_infinite_and_nan_float_times_are_quarantined(prepare_log: Make, log: Make) -> None:
    rows = log()
    rows["timestamp"][2:4] = [float("inf"), float("nan")]
    prepared = prepare_log({**rows, "timestamp": [float(t) for t in rows["timestamp"]]})
    check_account(prepared, 50, [(2, "unreadable time"), (3, "null time")])


def test_float_ids_with_nan_keep_whole_numbers(prepare_log: Make, log: Make) -> None:
    rows = log()
    rows["user_id"] = [float(u[1:]) for u in rows["user_id"]]
    rows["user_id"][4:7] = [float("nan"), float("inf"), 1.5]
    prepared = prepare_log(rows)
    fraction = "user id is not a whole number"
    check_account(prepared, 50, [(4, "null user id"), (5, fraction), (6, fraction)])
    assert sorted(prepared.timelines(0).column("user").to_pylist()) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_infinite_numeric_feature_is_quarantined_and_a_missing_one_is_not(
    prepare_log: Make, log: Make, format: str
) -> None:
    rows = log() | {"price": [1.0 + i for i in range(50)]}
    rows["price"][6:10] = [float("inf"), -float("inf"), None, -1.0]
    feature = {"name": "price", "column": "price", "role": "event", "kind": "numeric", "transform": "log1p"}
    infinite, small = "feature price is not a finite number", "feature price is too small for log1p"
    check_account(prepare_log(rows, format, features=[feature]), 50, [(6, infinite), (7, infinite), (9, small)])


def test_text_in_a_numeric_feature_is_quarantined(prepare_log: Make, log: Make) -> None:
    rows = log() | {"price": ["1.5"] * 49 + ["cheap"]}
    feature = {"name": "price", "column": "price", "role": "event", "kind": "numeric"}
    check_account(prepare_log(rows, features=[feature]), 50, [(49, "feature price is not a finite number")])


def test_label_rule_over_text_quarantines_what_is_no_number(prepare_log: Make, log: Make) -> None:
    rows = log() | {"clicked": [str(i % 5 + 1) for i in range(49)] + ["good"]}
    prepared = prepare_log(rows, label_rule={"op": ">=", "value": 4})
    check_account(prepared, 50, [(49, "label is not a number")])
    positives = sum(part["positives"] for part in prepared.manifest["account"]["splits"].values())
    assert positives == sum(i % 5 + 1 >= 4 for i in range(49))


@pytest.mark.parametrize(
    ("rule", "clicks"),
    [({"op": "==", "value": "buy"}, {"buy"}), ({"op": "in", "value": ["cart", "buy"]}, {"cart", "buy"}),
     ({"op": "not_in", "value": ["view"]}, {"cart", "buy"})],
)  # fmt: skip
def test_actions_become_clicks_by_a_rule(prepare_log: Make, log: Make, rule: dict[str, Any], clicks: set[str]) -> None:
    events = [("view", "cart", "buy")[i % 3] for i in range(50)]
    prepared = prepare_log(log() | {"clicked": events}, label_rule=rule)
    check_account(prepared, 50, [])
    positives = sum(part["positives"] for part in prepared.manifest["account"]["splits"].values())
    assert positives == sum(event in clicks for event in events)


@pytest.mark.parametrize("value", [1, True])
def test_a_rule_asks_a_true_or_false_column_by_either_spelling(prepare_log: Make, log: Make, value: object) -> None:
    rows = log() | {"clicked": [i % 2 == 1 for i in range(50)]}
    prepared = prepare_log(rows, history=[[{"column": "clicked", "value": value}]])
    assert prepared.manifest["account"]["history_events"] == 25


@pytest.mark.parametrize("nothing", [None, float("nan")])
@pytest.mark.parametrize(
    ("rule", "there"), [({"op": "is_null"}, 10), ({"op": "not_null"}, 40), ({"op": "!=", "value": 5}, 40),
                        ({"op": "not_in", "value": [5.0]}, 40)],
)  # fmt: skip
def test_nan_is_null_to_rules(
    prepare_log: Make, log: Make, capsys: pytest.CaptureFixture[str], nothing: Any, rule: dict[str, Any], there: int
) -> None:
    """Parquet may hold either; rows that this leaves without use are told."""
    rows = pa.table(log()).append_column(
        "dwell", pa.array([nothing if k < 10 else 2.0 for k in range(50)], pa.float64())
    )
    prepared = prepare_log(
        rows, history=[[{"column": "dwell"} | rule]], impressions=[[{"column": "user_id", "value": "u1"}]]
    )
    assert prepared.manifest["account"]["history_events"] == there
    unused = 40 - there + there // 5
    assert prepared.manifest["account"]["unused"] == unused
    assert f"prepare: {unused} row(s) are used for nothing" in capsys.readouterr().out


def test_rows_of_lists_without_a_label_are_told(
    prepare_log: Make, log: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = log() | {"page": [f"p{k // 5}" for k in range(50)]}
    rows["clicked"][3] = rows["clicked"][13] = None
    columns = {"label": "clicked", "request": ["page"]}
    prepare_log(rows, columns=columns)
    assert "prepare: 2 row(s) of lists have no label and so do not count as shown" in capsys.readouterr().out
    prepare_log(rows, columns=columns, impressions=[[{"column": "page", "op": "not_null"}]])
    assert "of lists have no label" not in capsys.readouterr().out


def test_rule_over_missing_label_quarantines_nothing(prepare_log: Make, log: Make) -> None:
    rows = log() | {"clicked": [None if i % 10 == 0 else i % 2 for i in range(50)]}
    prepared = prepare_log(rows)
    check_account(prepared, 50, [])
    assert sum(p["impressions"] for p in prepared.manifest["account"]["splits"].values()) == 45


# Lines no parser can read.


def check_unreadable(prepared: Prepared, lines: int, shown: str) -> None:
    """Beside 50 good rows there are so many lines that cannot be read, kept with their text."""
    account = prepared.manifest["account"]
    assert account["reasons"] == {"unreadable line": lines}
    assert (account["rows_in"], account["kept"]) == (50 + lines, 50)
    table = prepared.folder.read_parquet(f"quarantine/{prepared.folder.entries('quarantine')[0]}")
    assert any(shown in text for text in table.column("values").to_pylist())


def test_broken_json_lines_are_quarantined(prepare_log: Make, log: Make) -> None:
    lines = [json.dumps(row) for row in pa.table(log()).to_pylist()]
    lines[4:4] = ['{"user_id": "u1", "item', "[1, 2]", "7"]
    prepared = prepare_log("\n".join(lines).encode(), "jsonl")
    check_unreadable(prepared, 3, '"item')


def test_csv_lines_with_a_wrong_number_of_fields_are_quarantined(prepare_log: Make, log: Make) -> None:
    columns = log()
    lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    lines[4:4] = ["u1,i1", f"u1,i1,{T},1,more"]
    prepared = prepare_log("\n".join(lines).encode(), "csv")
    check_unreadable(prepared, 2, "u1,i1")


def test_text_that_is_not_utf8_is_quarantined(prepare_log: Make, log: Make) -> None:
    lines = [json.dumps(row).encode() for row in pa.table(log()).to_pylist()]
    lines[3] = lines[3].replace(b'"u3"', b'"\xff\xfe"')
    prepared = prepare_log(b"\n".join(lines), "jsonl")
    assert prepared.manifest["account"]["reasons"] == {"unreadable line": 1}


# Odd but valid rows.


def test_ids_of_mixed_type_in_json_are_the_same_text(prepare_log: Make, log: Make) -> None:
    columns = log()
    columns["user_id"] = [int(u[1:]) for u in columns["user_id"]]
    rows = pa.table(columns).to_pylist()
    for i, row in enumerate(rows):
        row["user_id"] = [row["user_id"], str(row["user_id"]), float(row["user_id"])][i // 5 % 3]
    prepared = prepare_log(rows, "jsonl")
    check_account(prepared, 50, [])
    assert sorted(prepared.timelines(0).column("user").to_pylist()) == ["0", "1", "2", "3", "4"]


def test_ids_beyond_64_bits_keep_their_digits_in_json(prepare_log: Make, log: Make) -> None:
    """Arrow takes them, and the smaller ones beside them, for doubles."""
    ids = [2**64 - 1, 2**63, 10**30 + 1, 5, 2**53 + 1]
    rows = [row | {"user_id": ids[k % 5]} for k, row in enumerate(pa.table(log()).to_pylist())]
    prepared = prepare_log(rows, "jsonl")
    check_account(prepared, 50, [])
    assert set(users(prepared)) == {str(i) for i in ids}


def test_ids_that_look_like_dates_stay_text_in_json(prepare_log: Make, log: Make) -> None:
    columns = log()
    columns["user_id"] = [f"2020-01-0{int(u[1:]) + 1}" for u in columns["user_id"]]
    prepared = prepare_log(columns, "jsonl")
    check_account(prepared, 50, [])
    assert sorted(prepared.timelines(0).column("user").to_pylist()) == [f"2020-01-0{i}" for i in range(1, 6)]


def test_unsorted_rows_come_out_in_time_order(prepare_log: Make, log: Make) -> None:
    prepared = prepare_log({k: v[::-1] for k, v in log().items()})
    check_account(prepared, 50, [])
    for times in prepared.timelines(0).column("h_time").to_pylist():
        assert times == sorted(times)
        assert len(times) == 10


def test_duplicated_rows_are_dropped_and_counted(prepare_log: Make, log: Make) -> None:
    rows = {k: v + v[:7] + v[:2] for k, v in log().items()}
    check_account(prepare_log(rows), 59, [], duplicates=9)


def test_bad_rows_and_duplicates_together_add_up(prepare_log: Make, log: Make) -> None:
    rows = log()
    rows["timestamp"][3] = -1
    rows["user_id"][8] = None
    rows = {k: v + v[:5] for k, v in rows.items()}
    outside = "time outside data.earliest and data.latest"
    check_account(prepare_log(rows), 55, [(3, outside), (8, "null user id"), (53, outside)], duplicates=4)


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("id", ["użytkownik-北京-🎈", "x" * 10_000, ' "quoted, with\tcommas" ', "nan", "1e5", "007"])
def test_ids_of_any_text_survive(prepare_log: Make, log: Make, format: str, id: str) -> None:
    rows = log()
    rows["user_id"] = [id if u == "u1" else u for u in rows["user_id"]]
    rows["item_id"] = [id if i == "i1" else i for i in rows["item_id"]]
    prepared = prepare_log(rows, format)
    check_account(prepared, 50, [])
    assert sorted(prepared.timelines(0).column("user").to_pylist()) == sorted(["u0", id, "u2", "u3", "u4"])
    assert id in prepared.vocabulary().items.column("value").to_pylist()


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_rows_are_named_by_their_place_in_the_file_in_later_blocks_too(
    prepare_log: Make, log: Make, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 300)
    rows = log()
    rows["user_id"][3] = rows["user_id"][44] = None
    assert quarantined(prepare_log(rows, format, max_quarantined=0.5)) == [(3, "null user id"), (44, "null user id")]
