"""Bad logs and stores: each ends in a message that helps. What is wrong with rows alone is in test_bad_rows."""

from __future__ import annotations

import gzip
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from helpers_log import check_account

from hpgr.artifacts import FORMAT
from hpgr.data.preparation import in_process, prepare
from hpgr.errors import ArtifactError, ConfigError, DataError, HpgrError, StoreError

T = 1_600_000_000
Columns = dict[str, list[Any]]
Make = Callable[..., Any]


@pytest.fixture
def refused(config: Make) -> Callable[..., str]:
    """`refused(path, kind, **data)`: the message with which preparing that path fails."""

    def run(path: str | None, kind: type[HpgrError] = DataError, **data: Any) -> str:
        with pytest.raises(HpgrError) as caught:
            prepare(config(data={"path": path, **data}), in_process, print)
        assert type(caught.value) is kind
        return str(caught.value)

    return run


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder whose files another user could read, were their mode to allow it; run as such a user if root."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        root = os.geteuid() == 0
        nobody = 65534
        try:
            if root:
                os.seteuid(nobody)
            yield folder
        finally:
            if root:
                os.seteuid(0)


# Files that are not there or cannot be read.


@pytest.mark.parametrize("pattern", ["nothing.parquet", "nothing/", "*.csv", "nothing/**/*.jsonl"])
def test_missing_path_says_what_to_give(refused: Make, tmp_path: Path, pattern: str) -> None:
    message = refused(str(tmp_path / pattern))
    assert pattern.rstrip("/") in message
    assert "no log file found there; give a file, a folder or a glob" in message


def test_a_configuration_of_another_log_asks_where_that_is(refused: Make) -> None:
    said = refused(None, ConfigError, columns={"user": "uid", "label": "clicked"})
    assert said.startswith("data.path: got none, and the generated log has no column 'uid'; expected where")


def test_a_list_of_no_paths_is_no_wish_for_the_generated_log(config: Make) -> None:
    with pytest.raises(DataError, match="the log is empty"):
        prepare(config(data={"path": []}), in_process, print)


def test_path_below_a_file_is_missing(refused: Make, write_log: Make, log: Make) -> None:
    path = write_log(log()) + "/more"
    assert path in refused(path)


def test_unreadable_file_is_named(refused: Make, unprivileged: Path, log: Make) -> None:
    path = unprivileged / "log.parquet"
    pq.write_table(pa.table(log()), path)
    path.chmod(0)
    message = refused(str(path))
    assert str(path) in message
    assert "cannot be read" in message


def test_unreadable_folder_is_named(refused: Make, unprivileged: Path) -> None:
    (unprivileged / "logs").mkdir()
    (unprivileged / "logs").chmod(0)
    assert f"{unprivileged / 'logs'}: cannot be listed" in refused(str(unprivileged / "logs"))
    (unprivileged / "logs").chmod(0o700)


def test_empty_folder_says_what_to_give(refused: Make, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "_SUCCESS").touch()
    (tmp_path / "logs" / "notes.txt").write_text("not a log")
    assert "no log file found there; give a file, a folder or a glob of .csv" in refused(str(tmp_path / "logs"))


def test_what_is_no_part_of_a_data_set_is_left_out_of_globs_too(
    config: Make, write_log: Make, log: Make, tmp_path: Path
) -> None:
    write_log(log(), name="logs/date=2024-01-01/part-0")
    (tmp_path / "logs/date=2024-01-01/_SUCCESS").touch()
    (tmp_path / "logs/date=2024-01-01/.part-0.crc").touch()
    for path in ("logs/date=*", "logs/*", "logs"):
        prepared = prepare(config(data={"path": str(tmp_path / path)}), in_process, print)
        assert [Path(file["uri"]).name for file in prepared.manifest["inputs"]] == ["part-0.parquet"]


@pytest.mark.parametrize(
    ("glob", "found"),
    [("*.parquet", ["a", "p"]), ("**/*.parquet", ["a", "b", "c", "p"]), ("*/*.parquet", ["b", "p"]), ("x", ["b", "c"]),
     ("x/**", ["b", "c"]), ("?/[b]*", ["b"])],
)  # fmt: skip
def test_a_star_stays_in_its_folder(
    config: Make, write_log: Make, log: Make, tmp_path: Path, glob: str, found: list[str]
) -> None:
    """A folder that fits, such as Spark's of one table, is read whole."""
    for name in ("a", "x/b", "x/y/c", "t.parquet/p"):
        write_log(log(), name=f"logs/{name}")
    inputs = prepare(config(data={"path": str(tmp_path / "logs" / glob)}), in_process, print).manifest["inputs"]
    assert sorted(Path(file["uri"]).stem for file in inputs) == found


def test_a_name_that_no_json_line_has_is_refused(refused: Make, write_log: Make, log: Make) -> None:
    """Each line may leave a key out, so only the whole log tells that a name is mistyped."""
    path = write_log(log(), "jsonl")
    for data in ({"columns": {"action": "evnt"}}, {"columns": {"request": ["pageid"]}},
                 {"features": [{"name": "price", "column": "prce", "role": "item", "kind": "numeric"}]}):  # fmt: skip
        assert "no line of data.path has '" in refused(path, **data)


@pytest.mark.parametrize("broken", [b"", b'{"user_id"\n'])
def test_a_name_whose_values_are_all_null_is_none_that_is_mistyped(
    prepare_log: Make, write_log: Make, log: Make, broken: bytes
) -> None:
    rows = log() | {"deleted_at": [None] * 50}
    content = Path(write_log(rows, "jsonl")).read_bytes() + broken
    history = [[{"column": "deleted_at", "op": "is_null"}]]
    account = prepare_log(content, "jsonl", history=history, max_quarantined=0.1).manifest["account"]
    assert account["history_events"] == 50


@pytest.mark.parametrize("kind", [pa.binary(2), pa.binary(), pa.large_binary()])
def test_columns_of_bytes_are_refused_by_name(refused: Make, write_log: Make, log: Make, kind: pa.DataType) -> None:
    table = pa.table(log()).append_column("page", pa.array([b"\xff\xfe"] * 50, kind))
    assert "column 'page' is" in refused(write_log(table), columns={"request": ["page"]})
    feature = {"name": "page", "column": "page", "role": "candidate"}
    assert "column 'page' is" in refused(write_log(table), features=[feature])


def test_a_declared_format_goes_for_any_name_in_a_folder(
    config: Make, write_log: Make, log: Make, tmp_path: Path
) -> None:
    Path(write_log(log(), name="logs/a")).rename(tmp_path / "logs/000000_0")
    (tmp_path / "logs/_SUCCESS").touch()
    data = {"path": str(tmp_path / "logs"), "format": "parquet"}
    assert prepare(config(data=data), in_process, print).manifest["account"]["kept"] == 50


def test_unknown_scheme_says_which_there_are(refused: Make) -> None:
    assert "use a local path, s3:// or gs://" in refused("nonsense://bucket/log.parquet", ArtifactError)


def test_ending_that_tells_no_format_asks_for_one(refused: Make, write_log: Make) -> None:
    assert "set data.format to parquet, csv or jsonl" in refused(write_log(b"x", "dat"))


@pytest.mark.parametrize(
    ("format", "content", "wording"),
    [
        ("parquet", None, "the log is empty: no row"),
        ("csv", b"user_id,item_id,timestamp,clicked\n", "the log is empty: no row"),
        ("jsonl", b"\n \n", "the log is empty: no row"),
        ("parquet", b"", "not a whole Parquet file"),
        ("csv", b"", "the log is empty: no row"),
        ("jsonl", b"", "the log is empty: no row"),
    ],
)
def test_empty_log_is_refused(
    refused: Make, write_log: Make, log: Make, format: str, content: bytes | None, wording: str
) -> None:
    rows = pa.table(log()).slice(0, 0) if content is None else content
    assert wording in refused(write_log(rows, format))


@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_of_events_asks_for_lines(refused: Make, write_log: Make, log: Make, indent: int | None) -> None:
    text = json.dumps(pa.table(log()).to_pylist(), indent=indent)
    message = refused(write_log(text.encode(), "json"))
    assert "holds an array of objects, expected an object a line; jq -c '.[]' writes it so" in message


def test_parts_without_a_byte_add_nothing_and_stop_nothing(config: Make, tmp_path: Path, log: Make) -> None:
    rows = pa.table(log())
    pacsv.write_csv(rows, tmp_path / "part-1.csv")
    for name in ("part-0.csv", "part-2.csv", "part-3.jsonl"):
        (tmp_path / name).touch()
    with gzip.open(tmp_path / "part-4.csv.gz", "wb"):
        pass
    prepared = prepare(config(data={"path": str(tmp_path)}), in_process, print)
    check_account(prepared, rows.num_rows, [])


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_parquet_cut_short_is_refused(refused: Make, write_log: Make, log: Make, tmp_path: Path, keep: float) -> None:
    whole = Path(write_log(log())).read_bytes()
    message = refused(write_log(whole[: int(len(whole) * keep)], name="cut"))
    assert "cut.parquet: not a whole Parquet file" in message
    assert "it may be cut short or of another format" in message


def test_parquet_with_broken_pages_is_refused(refused: Make, write_log: Make, log: Make) -> None:
    path = Path(write_log(log(users=50, events=50)))
    whole = bytearray(path.read_bytes())
    whole[4:800] = bytes(796)
    path.write_bytes(whole)
    assert "log.parquet: cannot be read near row 0" in refused(str(path))


def test_gzip_cut_short_is_refused(refused: Make, write_log: Make, log: Make) -> None:
    lines = "\n".join(json.dumps(row) for row in pa.table(log(users=50)).to_pylist()).encode()
    assert "cannot be read" in refused(write_log(gzip.compress(lines)[:-40], "jsonl.gz"))


def test_csv_that_is_not_utf8_is_refused(refused: Make, write_log: Make) -> None:
    csv = b"user_id,item_id,timestamp,clicked\n\xff\xfe,i,1600000000,1\n"
    assert "invalid UTF8" in refused(write_log(csv, "csv", "latin"))


# Columns that are missing or of the wrong type.


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_missing_column_lists_those_there_are(refused: Make, write_log: Make, log: Make, format: str) -> None:
    rows = {("uid" if k == "user_id" else k): v for k, v in log().items()}
    message = refused(write_log(rows, format))
    assert "no column 'user_id'; it has uid, item_id, timestamp, clicked; set data.columns" in message


def test_column_missing_from_one_of_several_files_names_the_file(
    refused: Make, write_log: Make, log: Make, tmp_path: Path
) -> None:
    write_log(log(), name="logs/a")
    write_log({k: v for k, v in log().items() if k != "clicked"}, name="logs/b")
    message = refused(str(tmp_path / "logs"))
    assert "b.parquet: no column 'clicked'" in message


def test_key_missing_from_every_json_line_says_so(refused: Make, write_log: Make, log: Make) -> None:
    rows = {("uid" if k == "user_id" else k): v for k, v in log().items()}
    message = refused(write_log(rows, "jsonl"))
    assert "50 of 50 rows cannot be used (50 null user id)" in message
    assert "Check data.columns" in message


@pytest.mark.parametrize(
    ("column", "values", "wording"),
    [
        ("user_id", [["u"]], "(user ids) is list<element: string>; expected integers or text"),
        ("item_id", [{"id": 1}], "(item ids) is struct"),
        ("item_id", [True], "(item ids) is bool; expected integers or text"),
        ("timestamp", [[1]], "(time) is list<element: int64>; expected a timestamp, a number or text"),
        ("timestamp", [True], "(time) is bool"),
        ("clicked", [[1]], "'clicked'"),
        ("action", [[1]], "'action' is list<element: int64>; expected text or numbers"),
        ("price", [[1.0]], "'price'"),
    ],
)
def test_column_of_a_wrong_type_is_named(
    refused: Make, write_log: Make, log: Make, column: str, values: list[Any], wording: str
) -> None:
    rows = log() | {"action": ["a"] * 50, "price": [1.0] * 50} | {column: values * 50}
    message = refused(
        write_log(rows),
        columns={"label": "clicked", "action": "action"},
        features=[{"name": "price", "column": "price", "role": "event", "kind": "numeric"}],
    )
    assert f"column {column!r}" in message
    assert wording in message


def test_rule_that_cannot_be_compared_names_its_column(refused: Make, write_log: Make, log: Make) -> None:
    message = refused(write_log(log()), history=[[{"column": "timestamp", "value": "yesterday"}]])
    assert "rule on column 'timestamp': int64 cannot be compared with 'yesterday'" in message


# Logs nothing can be learnt from.


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_is_refused(refused: Make, write_log: Make, log: Make, label: int) -> None:
    message = refused(write_log(log() | {"clicked": [label] * 50}))
    assert f"all 40 training impressions have label {label}; a click model needs both classes" in message


def test_no_label_at_all_is_refused(refused: Make, write_log: Make, log: Make) -> None:
    rows = log() | {"clicked": pa.nulls(50, pa.int64())}
    assert "no impressions: no row matches data.impressions and has a label" in refused(write_log(rows))


@pytest.mark.parametrize(
    ("split", "empty"),
    [
        ({"by": "user_fraction", "validation": 0, "test": 0.1}, "no validation impressions"),
        ({"by": "user_fraction", "validation": 0.1, "test": 0}, "no test impressions"),
        ({"by": "date", "validation_from": "2031-01-01", "test_from": "2032-01-01"}, "no validation and no test"),
        ({"by": "date", "validation_from": "2001-01-01", "test_from": "2002-01-01"}, "no train and no validation"),
    ],
)
def test_split_without_a_part_is_refused(
    refused: Make, write_log: Make, log: Make, split: dict[str, Any], empty: str
) -> None:
    message = refused(write_log(log()), split=split)
    assert empty in message
    assert "change data.split (time_fraction asks no user for many)" in message


def test_vocabulary_without_items_is_refused(refused: Make, write_log: Make, log: Make) -> None:
    message = refused(write_log(log()), vocabulary={"min_count": 1000})
    assert "lower data.vocabulary.min_count" in message


def test_too_many_quarantined_stops_and_keeps_the_rows(
    refused: Make, write_log: Make, log: Make, tmp_path: Path
) -> None:
    rows = log()
    rows["timestamp"][:6] = [-1] * 6
    message = refused(write_log(rows), max_quarantined=0.1)
    assert "6 of 50 rows cannot be used (6 time outside data.earliest and data.latest)" in message
    assert "data.max_quarantined allows 10%" in message
    assert len(list((tmp_path / "prepared").glob("*/quarantine/*.parquet"))) == 1


def test_wrong_time_unit_points_at_the_setting(refused: Make, write_log: Make, log: Make) -> None:
    assert "data.time_unit" in refused(write_log(log()), time_unit="ns")


# Small and large logs that are fine.


def test_one_user_is_enough(prepare_log: Make, log: Make) -> None:
    prepared = prepare_log(log(users=1, events=40))
    check_account(prepared, 40, [])
    assert prepared.manifest["account"]["users"] == 1


@pytest.mark.parametrize("by", ["time_fraction", "user_fraction", "leave_one_out"])
def test_user_with_one_event_is_kept(prepare_log: Make, log: Make, by: str) -> None:
    rows = log()
    for name, value in {"user_id": "lone", "item_id": "i0", "timestamp": T + 5, "clicked": 1}.items():
        rows[name].append(value)
    prepared = prepare_log(rows, split={"by": by})
    check_account(prepared, 51, [])
    lone = {row["user"]: row for row in prepared.timelines(0).to_pylist()}["lone"]
    assert (lone["h_time"], lone["t_visible"], lone["t_label"]) == ([(T + 5) * 1_000_000], [0], [1])


def test_user_with_100_000_events_is_fast(prepare_log: Make) -> None:
    n = 100_000
    rows = {"user_id": pa.array(["u"] * n), "item_id": pa.array(range(n)), "timestamp": pa.array(range(T, T + n)),
            "clicked": pa.array([i % 2 for i in range(n)])}  # fmt: skip
    started = time.monotonic()
    prepared = prepare_log(rows)
    assert time.monotonic() - started < 10
    account = prepared.manifest["account"]
    assert (account["rows_in"], account["kept"], account["timelines"]) == (n, n, 1)


# Stores.


def test_store_that_refuses_writes_says_so(refused: Make, write_log: Make, log: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    message = refused(write_log(log()), StoreError, prepared=str(tmp_path / "file" / "prepared"))
    assert f"cannot write {tmp_path / 'file' / 'prepared'}" in message
    assert "check space and permissions" in message


def test_store_that_refuses_the_generated_log_says_so(refused: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    message = refused(None, StoreError, prepared=str(tmp_path / "file" / "prepared"))
    assert "check space and permissions" in message


def test_store_that_fills_up_says_so(refused: Make, write_log: Make, log: Make) -> None:
    path = write_log(log(users=100, events=100))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        message = refused(path, StoreError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot write" in message
    assert "check space and permissions" in message


def test_store_without_permission_says_so(refused: Make, unprivileged: Path, log: Make) -> None:
    pq.write_table(pa.table(log()), unprivileged / "log.parquet")
    (unprivileged / "locked").mkdir()
    (unprivileged / "locked").chmod(0o500)
    path = str(unprivileged / "log.parquet")
    message = refused(path, StoreError, prepared=str(unprivileged / "locked" / "prepared"))
    assert "check space and permissions" in message


def test_prepared_log_of_another_version_is_refused(
    prepare_log: Make, refused: Make, log: Make, tmp_path: Path
) -> None:
    prepared = prepare_log(log())
    prepared.folder.write_json("manifest.json", prepared.manifest | {"format": 99})
    message = refused(str(tmp_path / "log.parquet"), ArtifactError)
    assert f"has format 99, this version reads {FORMAT}; use another folder" in message


@pytest.mark.parametrize("content", [b"", b'{"format": 1, ', b"\x00\x01"])
def test_manifest_cut_short_is_refused(
    prepare_log: Make, refused: Make, log: Make, tmp_path: Path, content: bytes
) -> None:
    prepared = prepare_log(log())
    prepared.folder.write("manifest.json", content)
    assert "manifest.json is not JSON" in refused(str(tmp_path / "log.parquet"), ArtifactError)


def test_preparation_that_stopped_half_way_starts_again(
    prepare_log: Make, log: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = prepare_log(log())
    before = prepared.timelines(0)
    Path(prepared.folder.uri, "manifest.json").unlink()
    prepared.folder.write("staging/raw/00000/000009-000000.arrow", b"left by a task that died")
    again = prepare_log(log())
    assert "reusing" not in capsys.readouterr().out
    assert again.timelines(0).equals(before)
    assert not again.folder.exists("staging")


def test_as_many_quarantined_as_allowed_are_no_reason_to_stop(prepare_log: Make, log: Make) -> None:
    rows = log()
    assert prepare_log(rows, max_quarantined=0.0).manifest["account"]["quarantined"] == 0
    rows["user_id"][0] = None
    assert prepare_log(rows, name="one", max_quarantined=0.02).manifest["account"]["quarantined"] == 1
