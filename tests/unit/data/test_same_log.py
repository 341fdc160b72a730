"""The same log in another form, again, or in other units of time gives the same timelines."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers_log import BUSY, US, Make, busy_log, content, permuted, quarantined, users

from hpgr.data import preparation, sources
from hpgr.data.preparation import in_process, prepare

# Same log, other form.


@pytest.mark.parametrize("format", ["csv", "jsonl", "csv.gz", "jsonl.gz"])
def test_formats_give_equal_timelines(prepare_log: Make, write_log: Make, format: str) -> None:
    rows, (plain, _, packed) = busy_log(), format.partition(".")
    rows["timestamp"] = [float(t) + 0.25 for t in rows["timestamp"]]
    settings = BUSY | {"columns": BUSY["columns"] | {"request": ["page"]}}
    expected = prepare_log(rows, "parquet", **settings)
    written: Any = Path(write_log(rows, plain)).read_bytes()
    got = prepare_log(gzip.compress(written) if packed else written, format, **settings)
    assert got.manifest["account"] == expected.manifest["account"]
    assert content(got) == content(expected)


@pytest.mark.parametrize("format", ["csv", "jsonl"])
def test_one_broken_line_does_not_change_the_others(prepare_log: Make, write_log: Make, format: str) -> None:
    rows = busy_log()
    expected = prepare_log(rows, format, **BUSY)
    broken = Path(write_log(rows, format)).read_bytes() + b'{"user_id"\n'
    assert content(prepare_log(broken, format, name="broken", **BUSY)) == content(expected)


@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet"])
def test_boolean_labels_are_labels_in_every_format(prepare_log: Make, log: Make, format: str) -> None:
    rows = log()
    expected = prepare_log(rows, name="numbers")
    got = prepare_log(rows | {"clicked": [bool(c) for c in rows["clicked"]]}, format)
    assert content(got) == content(expected)


@pytest.mark.parametrize(
    "rule", [{"column": "clicked", "value": 1}, {"column": "clicked", "op": "!=", "value": 0},
             {"column": "clicked", "op": "in", "value": [1]}, {"column": "clicked", "value": True}]
)  # fmt: skip
def test_rules_read_booleans_alike_in_every_format(prepare_log: Make, write_log: Make, log: Make, rule: Any) -> None:
    """A block of JSONL with a broken line comes as text."""
    rows = log()
    rows["clicked"] = [bool(c) for c in rows["clicked"]]
    settings = {"history": [[rule]], "max_quarantined": 0.1}
    expected = prepare_log(rows, **settings)
    assert 0 < expected.manifest["account"]["history_events"] < 50
    broken = Path(write_log(rows, "jsonl")).read_bytes() + b'{"user_id"\n'
    for got in (prepare_log(rows, "csv", **settings), prepare_log(broken, "jsonl", name="broken", **settings)):
        assert content(got) == content(expected)


def test_cells_of_csv_may_span_lines_wherever_blocks_end(
    prepare_log: Make, log: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = log() | {"title": [f"a\nb{i % 3}" for i in range(50)]}
    feature = {"name": "title", "column": "title", "role": "event"}
    expected = prepare_log(rows, features=[feature])
    for size in (200, 300, 1000):
        monkeypatch.setattr("hpgr.data.sources.BLOCK_BYTES", size)
        got = prepare_log(rows, "csv", name=f"csv{size}", features=[feature])
        assert got.manifest["account"]["quarantined"] == 0
        assert content(got) == content(expected)


def test_several_files_are_one_log(prepare_log: Make, write_log: Make, config: Make, tmp_path: Path) -> None:
    rows = busy_log()
    expected = prepare_log(rows, **BUSY)
    write_log(permuted(rows, range(100)), "parquet", "logs/day=1/part")
    write_log(permuted(rows, range(100, 101)), "csv", "logs/day=2/part")
    write_log(permuted(rows, range(101, 240)), "jsonl", "logs/day=2/part")
    write_log(b"not read", "csv", "logs/_temporary/part")
    folder = str(tmp_path / "logs")
    for path in (folder, folder + "/day=*/p*", [folder + "/day=1", folder + "/day=2", folder]):
        got = prepare(config(data={"path": path, **BUSY}), in_process, print)
        assert len(got.manifest["inputs"]) == 3
        assert content(got) == content(expected)


@pytest.mark.parametrize("seed", range(3))
def test_shuffled_rows_give_byte_equal_timelines(prepare_log: Make, seed: int) -> None:
    rows = busy_log()
    expected = prepare_log(rows, **BUSY)
    order = np.random.default_rng(seed).permutation(240)
    shuffled = prepare_log(permuted(rows, order), name="shuffled", **BUSY)
    assert shuffled.folder != expected.folder
    assert content(shuffled) == content(expected)


def test_duplicated_log_is_the_log(prepare_log: Make) -> None:
    rows = busy_log()
    expected = prepare_log(rows, **BUSY)
    account = expected.manifest["account"]
    twice = prepare_log({name: values * 2 for name, values in rows.items()}, name="twice", **BUSY)
    assert content(twice) == content(expected)
    assert twice.manifest["account"] == account | {"rows_in": 480, "duplicates": account["duplicates"] + 240}


def test_rows_that_differ_in_one_mapped_value_are_no_duplicates(prepare_log: Make, log: Make) -> None:
    rows = log() | {"event": ["view"] * 50, "city": ["x"] * 50, "unmapped": list(range(50))}
    base = {name: values[0] for name, values in rows.items()}
    for change in ({}, {"unmapped": 99}, {"event": "cart"}, {"city": "y"}, {"clicked": 1}, {"city": None}):
        for name, value in (base | change).items():
            rows[name].append(value)
    settings = {"columns": {"label": "clicked", "action": "event"}, "features": [BUSY["features"][1]]}
    assert prepare_log(rows, **settings).manifest["account"]["duplicates"] == 2


def test_many_buckets_hold_the_same_users(prepare_log: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = busy_log()
    expected = prepare_log(rows, **BUSY)
    monkeypatch.setattr(preparation, "BUCKET_ROWS", 200)
    got = prepare_log(rows, name="again", **BUSY)
    assert expected.buckets == 1 < got.buckets
    assert got.folder.read("vocabulary.parquet") == expected.folder.read("vocabulary.parquet")
    one, many = users(expected), users(got)
    numbered = "t_request"
    for user, row in one.items():
        same = [name for name in row if name not in (numbered, "t_num", "h_num")]
        assert {name: row[name] for name in same} == {name: many[user][name] for name in same}
        for name in ("t_num", "h_num"):
            np.testing.assert_allclose(row[name], many[user][name], rtol=1e-5)
        assert [row[numbered].index(r) for r in row[numbered]] == [
            many[user][numbered].index(r) for r in many[user][numbered]
        ]


# Reuse.


def test_reuse_says_so(
    prepare_log: Make, config: Make, log: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepare_log(log())
    assert "reusing" not in capsys.readouterr().out
    again = prepare(config(data={"path": str(tmp_path / "log.parquet")}), in_process, print)
    assert f"inputs and settings unchanged, reusing {first.folder.uri}" in capsys.readouterr().out
    assert again.folder == first.folder
    assert again.manifest == first.manifest


@pytest.mark.parametrize("change", ["content", "settings", "more files"])
def test_a_changed_input_is_noticed(
    prepare_log: Make, write_log: Make, config: Make, log: Make, tmp_path: Path, change: str
) -> None:
    rows = log()
    write_log(rows, name="logs/a")
    first = prepare(config(data={"path": str(tmp_path / "logs")}), in_process, print)
    settings: dict[str, Any] = {}
    if change == "content":
        write_log(rows | {"clicked": [1 - c for c in rows["clicked"]]}, name="logs/a")
    elif change == "settings":
        settings = {"vocabulary": {"min_count": 2}}
    else:
        write_log(rows | {"user_id": ["new"] * 50}, name="logs/b")
    second = prepare(config(data={"path": str(tmp_path / "logs"), **settings}), in_process, print)
    assert second.folder != first.folder
    assert content(second) != content(first) or change == "settings"


# Times.


def as_text(micros: int) -> str:
    return str(np.datetime64(micros, "us")) + "Z"


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize(
    ("unit", "convert"),
    [
        ("s", lambda t: pa.array([x / US for x in t])),
        ("ms", lambda t: pa.array([x // 1000 for x in t])),
        ("us", lambda t: pa.array(t)),
        ("ns", lambda t: pa.array([x * 1000 + 999 for x in t])),
        ("ns", lambda t: pa.array(t, pa.timestamp("us"))),
        ("s", lambda t: pa.array([x * 1000 + 999 for x in t], pa.timestamp("ns"))),
        ("s", lambda t: pa.array([x // 1000 for x in t], pa.timestamp("ms", "Europe/Warsaw"))),
        ("s", lambda t: pa.array([as_text(x) for x in t])),
        ("s", lambda t: pa.array([as_text(x).replace("T", " ").replace("Z", "+00:00") for x in t])),
        ("s", lambda t: pa.array([as_text(x).replace("T", " ").replace("Z", " UTC") for x in t])),
    ],
)
def test_time_units_agree(prepare_log: Make, log: Make, format: str, unit: str, convert: Make) -> None:
    rows = log()
    micros = [t * US + 120_000 for t in rows["timestamp"]]
    expected = prepare_log(rows | {"timestamp": micros}, name="expected", time_unit="us")
    table = pa.table(rows | {"timestamp": convert(micros)})
    if format == "jsonl" and pa.types.is_timestamp(table.column("timestamp").type):
        table = table.set_column(2, "timestamp", pa.array([as_text(x) for x in micros]))
    got = prepare_log(table, format, time_unit=unit)
    assert users(got)["u0"]["h_time"] == users(expected)["u0"]["h_time"] == micros[::5]
    assert content(got) == content(expected)


def test_a_file_read_in_pieces_is_the_file(
    prepare_log: Make, config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of row groups, each a task of its own, whose bad rows are kept apart, too."""
    rows = busy_log()
    rows["user_id"][3] = rows["user_id"][200] = None
    expected = prepare_log(rows, **BUSY)
    (tmp_path / "pieces").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "pieces/log.parquet", row_group_size=30)
    monkeypatch.setattr(sources, "FRAGMENT_ROWS", 60)
    got = prepare(config(data={"path": str(tmp_path / "pieces/log.parquet"), **BUSY}), in_process, print)
    assert len(got.folder.entries("quarantine")) == 2
    assert content(got) == content(expected)
    assert quarantined(got) == quarantined(expected) == [(3, "null user id"), (200, "null user id")]
