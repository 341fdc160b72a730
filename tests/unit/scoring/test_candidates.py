"""Candidate tables: their forms, what is refused, and how they are dealt to shards."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from helpers_model import LOG, tiny
from helpers_scoring import write

from hpgr.artifacts import Folder
from hpgr.config import Data
from hpgr.data import candidates
from hpgr.data.candidates import candidates_in, deal, dealt_rows, find_candidates, validate_candidates
from hpgr.errors import DataError
from hpgr.scoring.request import Options

DATA: Data = tiny(data=LOG).data
PAIRS: dict[str, Any] = {"user_id": ["a", "b"], "item_id": ["x", "y"]}


@pytest.mark.parametrize(
    ("columns", "kind", "time", "request_columns", "features"),
    [
        (PAIRS, "pairs", False, (), ()),
        (
            PAIRS | {"timestamp": [1, 2], "list_id": ["l", "m"], "slot": [0, 1]},
            "pairs",
            True,
            ("list_id",),
            ("slot", "place"),
        ),
        ({"user_id": ["a"], "item_id": [["x", "y"]]}, "lists", False, (), ()),
        ({"item_id": ["x", "y"], "device": ["p", "p"]}, "all", False, (), ("device",)),
        ({"item_id": ["x"], "timestamp": [1], "extra": [None]}, "all", False, (), ()),
    ],
)
def test_the_form_follows_from_the_columns(
    tmp_path: Path, columns: dict[str, Any], kind: str, time: bool, request_columns: tuple[str], features: tuple[str]
) -> None:
    layout = find_candidates([write(tmp_path / "c.parquet", columns)], DATA).layout
    assert (layout.kind, layout.time, layout.request, layout.features) == (kind, time, request_columns, features)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"user": ["a"], "item": ["x"]}, "no column 'item_id'"),
        ({"item_id": [["x"]]}, "no column 'user_id'"),
    ],
)
def test_tables_that_cannot_be_read_say_why(tmp_path: Path, columns: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        find_candidates([write(tmp_path / "c.parquet", columns)], DATA)


def test_files_of_different_forms_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "c/1.parquet", PAIRS)
    write(tmp_path / "c/2.parquet", {"item_id": ["x"]})
    with pytest.raises(DataError, match="files of one form"):
        find_candidates([str(tmp_path / "c")], DATA)


def naming_lists_by(*request: str) -> Data:
    return DATA.model_copy(update={"columns": DATA.columns.model_copy(update={"request": list(request)})})


def test_request_columns_are_given_all_or_none(tmp_path: Path) -> None:
    """A time that is also part of a list's name is no list."""
    listed = write(tmp_path / "listed.parquet", PAIRS | {"list_id": ["l", "m"]})
    with pytest.raises(DataError, match=r"names a list by list_id, page, .* no column 'page'; .* leave list_id out"):
        find_candidates([listed], naming_lists_by("list_id", "page"))
    timed = write(tmp_path / "timed.parquet", PAIRS | {"timestamp": [1, 2]})
    assert find_candidates([timed], naming_lists_by("list_id", "timestamp")).layout.request == ()


@pytest.mark.parametrize("entries", ["item_id.list.element", "item_id.bag.array", "item_id.array", "item_id"])
def test_entries_of_lists_are_counted_in_every_encoding(entries: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow reads all of them, but writes the first alone."""
    paths = ["user_id", "item_id_2", entries]
    group = SimpleNamespace(column=lambda i: SimpleNamespace(num_values=7 if paths[i] == entries else 0))
    schema = SimpleNamespace(column=lambda i: SimpleNamespace(path=paths[i]))
    metadata = SimpleNamespace(num_columns=len(paths), schema=schema, row_group=lambda _: group)
    monkeypatch.setattr(candidates, "open_parquet", lambda _: SimpleNamespace(metadata=metadata))
    piece: Any = SimpleNamespace(file=None, first=0, last=2)
    assert candidates_in(piece, DATA) == 14


def test_an_unusable_entry_of_a_list_is_kept_with_its_row_of_the_file() -> None:
    lists = pa.array([["a", "b", "c"], [], [None, "d"]], pa.list_(pa.string()))
    layout = candidates.Layout("lists", False, (), ())
    rows, bad, empty = validate_candidates(pa.table({"user_id": ["x", "y", "z"], "item_id": lists}), 10, DATA, layout)
    assert (rows.num_rows, bad["row"].to_pylist(), empty) == (4, [12], 1)


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.parquet").write_text("user_id,item_id")
    with pytest.raises(DataError, match="not a whole Parquet file"):
        find_candidates([str(tmp_path / "c.parquet")], DATA)


@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize("lists", [False, True])
def test_every_candidate_is_dealt_to_one_shard_with_its_user(
    tmp_path: Path, shards: int, lists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several files, read in several blocks."""
    monkeypatch.setattr(candidates, "BLOCK_VALUES", 16)
    rng, asked = np.random.default_rng(0), []
    for number in range(3):
        users = [f"u{i}" for i in rng.integers(0, 12, 20)]
        items = [[f"i{j}" for j in rng.integers(0, 9, rng.integers(0, 4))] for _ in users]
        pairs = [(u, i) for u, some in zip(users, items, strict=True) for i in some]
        asked += pairs
        columns = (users, items) if lists else ([u for u, _ in pairs], [i for _, i in pairs])
        write(tmp_path / f"c/{number}.parquet", dict(zip(("user_id", "item_id"), columns, strict=True)))
    found, folder = find_candidates([str(tmp_path / "c")], DATA), Folder(str(tmp_path / "out"))
    pieces = found.pieces(DATA)
    counts = sum(deal(p, DATA, found.layout, folder, shards)["rows"] for p in pieces)
    if not lists:
        assert sum(candidates_in(p, DATA) for p in pieces) == len(asked)
    parts = [dealt_rows(s, shards, folder, DATA, found.layout) for s in range(shards)]
    assert [p.num_rows for p in parts] == counts.tolist()
    got = [list(zip(p["user"].to_pylist(), p["item"].to_pylist(), strict=True)) for p in parts]
    assert sorted(pair for part in got for pair in part) == sorted(asked)
    homes = [{user for user, _ in part} for part in got]
    assert sum(map(len, homes)) == len(set().union(*homes))


@pytest.mark.parametrize(("buckets", "pairs", "expected"), [(1, 0, 1), (3, 10, 3), (3, 1000, 12), (8, 10**9, 8192)])
def test_shards_are_a_multiple_of_the_buckets(buckets: int, pairs: int, expected: int) -> None:
    assert Options(0, shard_pairs=100).shards(buckets, pairs) == expected


def test_unusable_rows_of_every_block_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "BLOCK_VALUES", 4)
    item = [None if k in (1, 5, 11) else f"i{k}" for k in range(12)]
    write(tmp_path / "c/0.parquet", {"user_id": ["u"] * 12, "item_id": item})
    found, folder = find_candidates([str(tmp_path / "c")], DATA), Folder(str(tmp_path / "out"))
    (account,) = (deal(p, DATA, found.layout, folder, 3) for p in found.pieces(DATA))
    assert (account["rows"].sum(), account["reasons"]) == (9, {"null item id": 3})
    kept = ds.dataset(str(tmp_path / "out/_quarantine")).to_table()
    assert kept["row"].to_pylist() == [1, 5, 11]
