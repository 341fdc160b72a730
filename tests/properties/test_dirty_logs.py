"""Broken, odd and hostile logs: each ends in a clear error or in a full account of its rows; none hangs or crashes.

The logs go through preparation as jobs/prepare.py has it, in this process.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpgr.config import Config, load_config
from hpgr.data.preparation import Prepared, in_process, prepare
from hpgr.errors import DataError, HpgrError

START = 1_600_000_000
COLUMNS = ("user_id", "item_id", "timestamp", "clicked")
Cells = dict[str, Any]


def plain(users: int = 12, events: int = 12) -> Cells:
    """A good log, to be spoilt."""
    n = users * events
    rng = np.random.default_rng(0)
    return {
        "user_id": [f"u{i % users}" for i in range(n)],
        "item_id": [f"i{k}" for k in rng.integers(0, 9, n)],
        "timestamp": [START + 60 * i for i in range(n)],
        "clicked": [(i // users + i % users) % 2 for i in range(n)],
    }


def spoilt(column: str, values: list[Any], every: int = 7) -> Cells:
    """The good log with `values`, in turn, in some of a column's rows; the column is text where they are."""
    cells = plain()
    text = any(isinstance(v, str) for v in values)
    column_cells = [str(v) if text else v for v in cells[column]]
    for k, row in enumerate(range(0, len(column_cells), every)):
        column_cells[row] = values[k % len(values)]
    return cells | {column: column_cells}


def parquet(cells: Cells | pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(cells if isinstance(cells, pa.Table) else pa.table(cells), sink)
    return sink.getvalue().to_pybytes()


def csv(cells: Cells) -> bytes:
    sink = pa.BufferOutputStream()
    pacsv.write_csv(pa.table(cells), sink)
    return sink.getvalue().to_pybytes()


def jsonl(cells: Cells) -> bytes:
    rows = pa.table(cells).to_pylist()
    return b"".join(json.dumps(row, default=str).encode() + b"\n" for row in rows)


def cast(column: str, kind: pa.DataType, cells: Cells | None = None) -> bytes:
    table = pa.table(cells or plain())
    at = table.column_names.index(column)
    return parquet(table.set_column(at, column, table.column(column).cast(kind)))


def put(column: str, array: pa.Array) -> bytes:
    table = pa.table(plain())
    return parquet(table.set_column(table.column_names.index(column), column, array))


N = len(plain()["user_id"])
LINES = csv(plain()).decode().splitlines()
EVEN = list(range(N))
INT = np.iinfo(np.int64)
TIMES = pa.array([datetime.fromtimestamp(START + 60 * i, UTC) for i in range(N)])

LOGS: dict[str, tuple[str, Callable[[], bytes]]] = {
    # Values
    "null users": ("parquet", lambda: parquet(spoilt("user_id", [None]))),
    "null items": ("csv", lambda: csv(spoilt("item_id", [None]))),
    "null times": ("jsonl", lambda: jsonl(spoilt("timestamp", [None]))),
    "null labels": ("parquet", lambda: parquet(spoilt("clicked", [None]))),
    "all users null": ("parquet", lambda: put("user_id", pa.nulls(N))),
    "all times null": ("parquet", lambda: put("timestamp", pa.nulls(N, pa.int64()))),
    "all labels null": ("parquet", lambda: put("clicked", pa.nulls(N, pa.int8()))),
    "extreme times": ("parquet", lambda: parquet(spoilt("timestamp", [INT.min, INT.max, -1, 0]))),
    "extreme times as text": ("csv", lambda: csv(spoilt("timestamp", ["0001-01-01", "9999-12-31T23:59:59Z", "1e400",
                                                                      str(INT.max), str(2**70), "-", "nan", "inf"]))),
    "times nan and inf": ("parquet", lambda: parquet(spoilt("timestamp", [float("nan"), float("inf"), -1e308]))),
    "labels of all kinds": ("csv", lambda: csv(spoilt("clicked", ["2", "-1", "yes", "TRUE", "0.5", "", "1e400"]))),
    "labels nan": ("parquet", lambda: parquet(spoilt("clicked", [float("nan"), float("inf"), 2.0]))),
    "labels all 0": ("parquet", lambda: parquet(plain() | {"clicked": [0] * N})),
    "labels all 1": ("parquet", lambda: parquet(plain() | {"clicked": [1] * N})),
    "labels that are dates": ("parquet", lambda: put("clicked", TIMES)),
    "huge text": ("parquet", lambda: parquet(spoilt("item_id", ["x" * 1_000_000, "y" * 1_000_000], 40))),
    "empty text": ("csv", lambda: csv(spoilt("user_id", [""]))),
    "text of spaces": ("jsonl", lambda: jsonl(spoilt("user_id", [" ", "\t", "\u00a0"]))),
    "unicode": ("jsonl", lambda: jsonl(spoilt("item_id", ["\U0001f600", "e\u0301", "\u00e9", "\u202e", "<script>"]))),
    "NUL inside": ("parquet", lambda: parquet(spoilt("item_id", ["a\x00b", "\x00"]))),
    "NUL inside CSV": ("csv", lambda: csv(plain()).replace(b"i3", b"i\x003")),
    "lone surrogate in JSON": ("jsonl", lambda: jsonl(plain()).replace(b'"i3"', b'"\\ud800"')),
    "whole numbers past 2**53": ("parquet", lambda: parquet(spoilt("item_id", [2.0**60, 1.5]) | {
        "item_id": [float(2**53 + i) for i in range(N)]})),
    "ids of int64's ends": ("parquet", lambda: put("user_id", pa.array([INT.min, INT.max] * (N // 2)))),
    "ids of uint64's end": ("parquet", lambda: put("user_id", pa.array([2**64 - 1, 0] * (N // 2), pa.uint64()))),
    # Types
    "dictionary": ("parquet", lambda: put("item_id", pa.array(plain()["item_id"]).dictionary_encode())),
    "dictionary of numbers": ("parquet", lambda: put("item_id", pa.array([i % 5 for i in EVEN]).dictionary_encode())),
    "large text": ("parquet", lambda: cast("user_id", pa.large_string())),
    "text view": ("parquet", lambda: cast("user_id", pa.string_view())),
    "bytes": ("parquet", lambda: cast("user_id", pa.binary())),
    "bytes that are no UTF-8": ("parquet", lambda: put("item_id", pa.array([b"\xff"] * N, pa.binary()))),
    "booleans": ("parquet", lambda: put("clicked", pa.array([i % 3 == 0 for i in EVEN]))),
    "boolean ids": ("parquet", lambda: put("user_id", pa.array([i % 3 == 0 for i in EVEN]))),
    "lists": ("parquet", lambda: put("item_id", pa.array([[i] for i in EVEN]))),
    "structs": ("parquet", lambda: put("user_id", pa.array([{"a": i} for i in EVEN]))),
    "list of times": ("parquet", lambda: put("timestamp", pa.array([[START]] * N))),
    "list of labels": ("parquet", lambda: put("clicked", pa.array([[1]] * N))),
    "nested in JSON": ("jsonl", lambda: jsonl(plain()).replace(b'"i3"', b'{"id": [3]}')),
    "decimals": ("parquet", lambda: put("clicked", pa.array([i % 2 for i in EVEN]).cast(pa.decimal128(22, 2)))),
    "decimal ids": ("parquet", lambda: put("item_id", pa.array(EVEN).cast(pa.decimal128(20, 0)))),
    "decimal times": ("parquet", lambda: put("timestamp", pa.array(plain()["timestamp"]).cast(pa.decimal128(20, 0)))),
    "half floats": ("parquet", lambda: put("clicked", pa.array(np.array(EVEN, np.float16) % 2))),
    "times with a zone": ("parquet", lambda: put("timestamp", TIMES.cast(pa.timestamp("ms", "Europe/Berlin")))),
    "times with a made-up zone": ("parquet", lambda: put("timestamp", TIMES.cast(pa.timestamp("us", "Nowhere/X")))),
    "times of ns": ("parquet", lambda: put("timestamp", TIMES.cast(pa.timestamp("ns")))),
    "times of ns outside": ("parquet", lambda: put("timestamp", pa.array([INT.min + 1] * N, pa.timestamp("ns")))),
    "times of ms outside": ("parquet", lambda: put("timestamp", pa.array([INT.max, START * 1000] * (N // 2),
                                                                        pa.timestamp("ms")))),
    "dates": ("parquet", lambda: put("timestamp", TIMES.cast(pa.date32()))),
    "times of day": ("parquet", lambda: put("timestamp", pa.array(EVEN, pa.time64("us")))),
    "durations": ("parquet", lambda: put("timestamp", pa.array(EVEN, pa.duration("us")))),
    "mixed offsets": ("csv", lambda: csv(spoilt("timestamp", ["2021-01-01T00:00:00+05:30", "2021-01-01 00:00",
                                                              "2021-01-01T00:00:00Z", "01/02/2021"]))),
    # Shape
    "empty file": ("csv", lambda: b""),
    "empty parquet file": ("parquet", lambda: b""),
    "empty JSON file": ("jsonl", lambda: b"\n\n"),
    "header alone": ("csv", lambda: ",".join(COLUMNS).encode()),
    "no rows": ("parquet", lambda: parquet(pa.table(plain()).slice(0, 0))),
    "one row": ("csv", lambda: "\n".join(LINES[:2]).encode()),
    "one item": ("parquet", lambda: parquet(plain() | {"item_id": ["i"] * N})),
    "one user": ("parquet", lambda: parquet(plain(1, 60))),
    "a user an event": ("parquet", lambda: parquet(plain() | {"user_id": [f"u{i}" for i in EVEN]})),
    "one moment": ("parquet", lambda: parquet(plain() | {"timestamp": [START] * N})),
    "backwards": ("csv", lambda: "\n".join([LINES[0], *reversed(LINES[1:])]).encode()),
    "everything twice": ("csv", lambda: "\n".join([*LINES, *LINES[1:]]).encode()),
    "all rows equal": ("csv", lambda: "\n".join([LINES[0], *[LINES[1]] * 50]).encode()),
    "equal but for the label": ("parquet", lambda: parquet({k: v * 2 for k, v in plain().items()} | {
        "clicked": plain()["clicked"] + [1 - c for c in plain()["clicked"]]})),
    "all rows bad": ("csv", lambda: csv(plain() | {"timestamp": ["?"] * N})),
    "a column missing": ("csv", lambda: csv({k: v for k, v in plain().items() if k != "clicked"})),
    "a column missing in JSON": ("jsonl", lambda: jsonl({k: v for k, v in plain().items() if k != "clicked"})),
    "a column twice": ("csv", lambda: "\n".join(["item_id," + LINES[0], *("x," + n for n in LINES[1:])]).encode()),
    "a column twice in Parquet": ("parquet", lambda: parquet(pa.table(
        [pa.array(plain()[c]) for c in (*COLUMNS, "item_id")], names=[*COLUMNS, "item_id"]))),
    "a key twice in JSON": ("jsonl", lambda: jsonl(plain()).replace(b'{"user_id"', b'{"user_id": "z", "user_id"')),
    "a thousand columns": ("csv", lambda: "\n".join([LINES[0] + "," + ",".join(f"c{i}" for i in range(1000)),
                                                     *(n + ",1" * 1000 for n in LINES[1:])]).encode()),
    # Bytes
    "BOM": ("csv", lambda: b"\xef\xbb\xbf" + csv(plain())),
    "BOM in JSON": ("jsonl", lambda: b"\xef\xbb\xbf" + jsonl(plain())),
    "CRLF": ("csv", lambda: csv(plain()).replace(b"\n", b"\r\n")),
    "CR alone": ("csv", lambda: csv(plain()).replace(b"\n", b"\r")),
    "CRLF in JSON": ("jsonl", lambda: jsonl(plain()).replace(b"\n", b"\r\n")),
    "CR inside a JSON line": ("jsonl", lambda: jsonl(plain()).replace(b", ", b",\r ") + b"{broken\n"),
    "odd line ends inside JSON text": ("jsonl", lambda: jsonl(plain()).replace(b'"i3"', b'"i\x0b3\x0c\x1c"')),
    "UTF-16": ("csv", lambda: csv(plain()).decode().encode("utf-16")),
    "Latin-1": ("csv", lambda: csv(plain()).replace(b"i3", "ié".encode("latin-1"))),
    "Latin-1 in JSON": ("jsonl", lambda: jsonl(plain()).replace(b"i3", "ié".encode("latin-1"))),
    "open quote": ("csv", lambda: csv(plain()).replace(b'"i3"', b'"i3', 1)),
    "quotes inside": ("csv", lambda: csv(plain()).replace(b'"i3"', b'"i""3,\n4"')),
    "short and long lines": ("csv", lambda: "\n".join([*LINES, "a,b", "a,b,1600000000,1,5,6", "", ",,,",
                                                          ","]).encode()),
    "semicolons": ("csv", lambda: csv(plain()).replace(b",", b";")),
    "broken lines": ("jsonl", lambda: jsonl(plain()) + b"{\n[1]\n7\nnull\n{}\n\"a\"\n" + b"{" * 5000 + b"\n"),
    "deep JSON": ("jsonl", lambda: jsonl(plain()) + b'{"item_id": ' + b"[" * 5000 + b"]" * 5000 + b"}\n"),
    "huge numbers in JSON": ("jsonl", lambda: jsonl(plain()) + b'{"user_id": 1' + b"0" * 5000 + b"}\n"),
    "NaN in JSON": ("jsonl", lambda: jsonl(plain()) + b'{"user_id": NaN, "timestamp": Infinity, "clicked": 1}\n'),
    "cut short Parquet": ("parquet", lambda: parquet(plain())[:-40]),
    "half a Parquet": ("parquet", lambda: parquet(plain())[: len(parquet(plain())) // 2]),
    "Parquet with a rotten page": ("parquet", lambda: _rotten(parquet(plain(60, 60)))),
    "cut short CSV": ("csv", lambda: csv(plain())[:-5]),
    "cut short JSON": ("jsonl", lambda: jsonl(plain())[:-25]),
    "CSV named Parquet": ("parquet", lambda: csv(plain())),
    "Parquet named CSV": ("csv", lambda: parquet(plain())),
    "Parquet named JSON": ("jsonl", lambda: parquet(plain())),
    "JSON named CSV": ("csv", lambda: jsonl(plain())),
    "CSV named JSON": ("jsonl", lambda: csv(plain())),
    "CSV named gzip": ("csv.gz", lambda: csv(plain())),
    "noise named CSV": ("csv", lambda: np.random.default_rng(1).bytes(5000)),
    "noise named JSON": ("jsonl", lambda: np.random.default_rng(2).bytes(5000)),
    "noise named Parquet": ("parquet", lambda: b"PAR1" + np.random.default_rng(3).bytes(5000) + b"PAR1"),
}  # fmt: skip


def _rotten(content: bytes) -> bytes:
    at = len(content) // 3
    return content[:at] + bytes(255 - b for b in content[at : at + 64]) + content[at + 64 :]


def configured(folder: Path, path: Path, **data: str) -> Config:
    more = [f"data.{key}={value}" for key, value in data.items()]
    words = [f"data.path={path}", f"data.prepared={folder}/prepared", "data.columns.label=clicked"]
    return load_config(None, [*words, "data.max_quarantined=0.9", *more])


def account_or_error(folder: Path, content: bytes, ending: str, **data: str) -> Prepared | HpgrError:
    """Prepare a log; checks what must hold of any."""
    path = folder / f"log.{ending}"
    path.write_bytes(content)
    try:
        done = prepare(configured(folder, path, **data), in_process, lambda _: None)
    except HpgrError as error:
        text = str(error)
        assert 20 < len(text) < 3000, text
        assert "Traceback" not in text
        assert not list((folder / "prepared").glob("*/manifest.json"))
        return error
    account = done.manifest["account"]
    assert account["rows_in"] == account["kept"] + account["quarantined"] + account["duplicates"]
    assert sum(account["reasons"].values()) == account["quarantined"]
    quarantined = sorted((folder / "prepared").glob("*/quarantine/*.parquet"))
    assert sum(pq.read_metadata(f).num_rows for f in quarantined) == account["quarantined"]
    return done


@pytest.mark.timeout(60)
@pytest.mark.parametrize("what", LOGS)
def test_a_dirty_log_ends_in_an_error_or_a_full_account(what: str, tmp_path: Path) -> None:
    ending, content = LOGS[what]
    account_or_error(tmp_path, content(), ending)


ROWS = {
    "backwards": N, "everything twice": N, "BOM": N, "BOM in JSON": N, "CRLF": N, "CRLF in JSON": N, "dictionary": N,
    "large text": N, "times with a zone": N, "quotes inside": N, "one user": 60, "booleans": N, "decimals": N,
    "NUL inside": N, "unicode": N, "a thousand columns": N,
}  # fmt: skip


@pytest.mark.parametrize("what", ROWS)
def test_odd_but_good_logs_lose_no_row(what: str, tmp_path: Path) -> None:
    ending, content = LOGS[what]
    done = account_or_error(tmp_path, content(), ending)
    assert isinstance(done, Prepared), done
    assert done.manifest["account"]["kept"] == ROWS[what]
    assert done.manifest["account"]["quarantined"] == 0


@pytest.mark.parametrize("what", ["labels all 0", "labels all 1", "empty file", "header alone", "no rows",
                                  "all rows bad",
                                  "a column missing", "lists", "CSV named Parquet", "half a Parquet", "one row",
                                  "a column twice", "a column twice in Parquet"])  # fmt: skip
def test_useless_logs_are_refused(what: str, tmp_path: Path) -> None:
    ending, content = LOGS[what]
    assert isinstance(account_or_error(tmp_path, content(), ending), DataError)


def test_far_times_are_quarantined_not_wrapped_into_the_present(tmp_path: Path) -> None:
    wrapped = (2**64 + START * 10**6) // 1000  # in microseconds it would overflow to START
    times = pa.array([1000 * (START + 60 * i) if i % 3 else wrapped for i in range(N)], pa.timestamp("ms"))
    done = account_or_error(tmp_path, put("timestamp", times), "parquet")
    assert isinstance(done, Prepared), done
    assert done.manifest["account"]["reasons"] == {"time outside data.earliest and data.latest": N // 3}


def test_a_user_of_a_hundred_thousand_events(tmp_path: Path) -> None:
    cells, n = plain(), 100_000
    cells["user_id"] += ["giant"] * n
    cells["item_id"] += [f"i{i % 300}" for i in range(n)]
    cells["timestamp"] += [START + i for i in range(n)]
    cells["clicked"] += [i % 3 % 2 for i in range(n)]
    done = account_or_error(tmp_path, parquet(cells), "parquet")
    assert isinstance(done, Prepared)
    assert done.manifest["account"]["kept"] == N + n


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.sampled_from(["1", "0", "u1", "2021-01-01", "2021-01-01T00:00:00+14:00", START, START + 5, 1e18, -0.0]),
    st.lists(st.integers(0, 3), max_size=2),
)  # fmt: skip
ROW = st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    return lambda: tmp_path_factory.mktemp("fuzz")


FUZZ = settings(max_examples=40, suppress_health_check=list(HealthCheck))


@FUZZ
@given(rows=st.lists(ROW, max_size=12))
def test_any_rows_in_json(folders: Callable[[], Path], rows: list[Cells]) -> None:
    good = jsonl(plain(4, 6))
    bad = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    account_or_error(folders(), good + bad, "jsonl")


@FUZZ
@given(cells=st.lists(st.lists(st.text(max_size=6), max_size=6), max_size=12), quote=st.booleans())
def test_any_cells_in_csv(folders: Callable[[], Path], cells: list[list[str]], quote: bool) -> None:
    lines = [",".join(f'"{c}"' if quote else c for c in row) for row in cells]
    account_or_error(folders(), csv(plain(4, 6)) + "\n".join(lines).encode("utf-8", "surrogatepass"), "csv")


@FUZZ
@given(data=st.data())
def test_any_column_in_parquet(folders: Callable[[], Path], data: st.DataObject) -> None:
    table = pa.table(plain(4, 6))
    column = data.draw(st.sampled_from(COLUMNS))
    kind = data.draw(st.sampled_from([st.integers(INT.min, INT.max), st.floats(), st.text(max_size=5), st.booleans(),
                                      st.binary(max_size=4), st.datetimes(), st.dates(), st.decimals(-9, 9, places=2),
                                      st.lists(st.integers(0, 1), max_size=2)]))  # fmt: skip
    values = data.draw(st.lists(st.one_of(st.none(), kind), min_size=24, max_size=24))
    array = pa.array(values)
    account_or_error(folders(), parquet(table.set_column(COLUMNS.index(column), column, array)), "parquet")


@FUZZ
@given(ending=st.sampled_from(["parquet", "csv", "jsonl"]), data=st.data())
def test_any_damage_to_bytes(folders: Callable[[], Path], ending: str, data: st.DataObject) -> None:
    content = bytearray({"parquet": parquet, "csv": csv, "jsonl": jsonl}[ending](plain(4, 6)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    cut = data.draw(st.integers(0, len(content)))
    account_or_error(folders(), bytes(content[:cut] if data.draw(st.booleans()) else content), ending)
