"""A quote too many in a CSV file is told; it must not swallow rows."""

from __future__ import annotations

import csv
import io
import random
from pathlib import Path

import pyarrow as pa
import pytest

from hpgr.data import sources
from hpgr.data.quotes import Quotes
from hpgr.errors import DataError

GOOD = 'u,i,title\n1,2,"a, ""quoted"" title\nof two lines"\n3,4,5" pipe\n5,6,""\n7,8,""""\n'


def fault(text: str, piece: int = 1 << 20) -> str:
    quotes, data = Quotes(), text.encode()
    for start in range(0, len(data), piece):
        quotes.see(data[start : start + piece])
    quotes.see(b"")
    return quotes.fault()


def rows(path: Path) -> int:
    file = sources.find_files([str(path)])[0]
    return sum(table.num_rows for table, _ in sources.read(sources.fragments([file], ["u"])[0], ["u"]))


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1 << 20])
def test_quotes_as_they_should_be(piece: int) -> None:
    assert fault(GOOD, piece) == ""
    assert fault(GOOD + '9,10,"last"', piece) == ""


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1 << 20])
def test_a_quote_too_many_is_told_with_its_line(piece: int) -> None:
    assert "line 7 is never closed" in fault(GOOD + '9,10,"Great\n11,12,x\n', piece)
    assert "line 7 is closed in line 9, in the middle" in fault(
        GOOD + '9,10,"Great\n11,12,x\n13,14,"More\n15,16,x\n', piece
    )
    assert "line 7 is closed in line 8, in the middle" in fault(GOOD + '9,10,"Great\n11,12,"x"\n', piece)


def test_in_one_line_nothing_is_lost() -> None:
    assert fault('u,i,title\n1,2,"so" it is\n3,4,"more\\" of"\n') == ""


def test_any_table_that_is_written_by_the_book_passes() -> None:
    draw = random.Random(3)
    for _ in range(300):
        out = io.StringIO()
        values = [["".join(draw.choices('a",\n\r ', k=draw.randrange(6))) for _ in range(3)] for _ in range(5)]
        csv.writer(out, quoting=draw.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])).writerows([["u", "i", "t"], *values])
        assert fault(out.getvalue(), draw.randrange(1, 9)) == "", out.getvalue()


@pytest.mark.parametrize(
    ("bad", "told"), [('1,2,"Great\n', "line 3 is never closed"), ('1,2,"a\n3,4,"b\n', "line 3 is closed in line 4")]
)
def test_a_log_with_a_quote_too_many_is_refused(tmp_path: Path, bad: str, told: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text("u,i,title\n0,0,x\n" + bad + "5,6,x\n" * 50)
    with pytest.raises(DataError, match=told):
        rows(path)


def test_an_open_quote_is_named_where_arrow_only_sees_a_value_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "BLOCK_BYTES", 1 << 10)
    path = tmp_path / "log.csv"
    path.write_text('u,i,title\n0,0,"x\n' + "5,6,x\n" * 2_000)
    with pytest.raises(DataError, match="line 2 is never closed"):
        rows(path)


def test_rows_are_those_of_arrow_whatever_the_quotes(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(GOOD)
    assert rows(path) == pa.csv.read_csv(path, parse_options=pa.csv.ParseOptions(newlines_in_values=True)).num_rows == 4
