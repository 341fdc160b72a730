"""Find the files of a log and read them in bounded pieces, whatever their format."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.json as pajson
import pyarrow.parquet as pq

from hpgr.artifacts import asked_again, resolve
from hpgr.data.quotes import Quotes
from hpgr.errors import DataError

PACKED = ("", ".gz", ".zst", ".bz2")
ENDINGS = {".parquet": "parquet", ".pq": "parquet"} | {
    kind + packed: "csv" if kind == ".csv" else "jsonl"
    for kind in (".csv", ".jsonl", ".ndjson", ".json")
    for packed in PACKED
}
BLOCK_BYTES = 16 << 20
FRAGMENT_ROWS = 500_000
TEXT_ROW_BYTES = 40
ABSENT = {b"absent": b""}
_ARRAY = re.compile(rb"\s*\[\s*\{")
RAW_LINE = "unreadable_line"
"""Column that carries the text of a line no parser could read."""


@dataclass(frozen=True)
class SourceFile:
    """A file of the log and what tells whether it has changed."""

    uri: str
    format: str
    size: int
    mtime_ns: int
    digest: str


@dataclass(frozen=True)
class Fragment:
    """A piece of a file that one task reads: row groups [first, last) of a Parquet file, else all of it."""

    file: SourceFile
    index: int
    first: int = 0
    last: int = 0
    rows: int = 0
    """Exact for Parquet, a guess from the file's size for text."""


def find_files(paths: Sequence[str], declared: str = "auto", asked: str = "data.path") -> list[SourceFile]:
    """Expand files, folders and globs, sorted by path; `asked` is the setting that messages name.

    Raises:
        DataError: nothing there, nothing readable, or a format that cannot be told.
    """
    files: dict[str, SourceFile] = {}
    for path in paths:
        filesystem, root = resolve(path)
        prefix = path.partition("://")[0] + "://" if "://" in path else ""
        for info in _expand(filesystem, root, path, declared, asked):
            uri = prefix + info.path
            files[uri] = SourceFile(uri, _format(info.path, declared), info.size, info.mtime_ns or 0,
                                    _digest(filesystem, info, uri))  # fmt: skip
    return [files[uri] for uri in sorted(files)]


def _expand(filesystem: pafs.FileSystem, root: str, path: str, declared: str, asked: str) -> list[pafs.FileInfo]:
    try:
        if any(c in root for c in "*?["):
            base = root[: min(root.index(c) for c in "*?[" if c in root)].rpartition("/")[0]
            listing = filesystem.get_file_info(pafs.FileSelector(base, recursive=True, allow_not_found=True))
            files = [i for i in listing if i.type == pafs.FileType.File and _matches(i.path, root)]
            shown = [i for i in files if not _is_hidden(i, base)]
            found = shown or files  # the pattern may ask for hidden ones
        else:
            info = filesystem.get_file_info(root)
            if info.type != pafs.FileType.Directory:
                found = [info] if info.type == pafs.FileType.File else []
            else:
                listing = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
                found = [i for i in listing if i.type == pafs.FileType.File and _is_log(i, root, declared)]
    except OSError as error:
        raise DataError(f"{asked} {path}: cannot be listed: {error}") from None
    if not found:
        raise DataError(f"{asked} {path}: no log file found there; give a file, a folder or a glob of "
                        f"{', '.join(sorted(set(ENDINGS)))} files")  # fmt: skip
    return found


def _matches(path: str, pattern: str) -> bool:
    """Whether a file, or a folder that it is in, is what a glob asks for: `*` stays in a folder, `**` goes through."""
    names, wanted = path.split("/"), pattern.split("/")
    ways = {0}  # places in the pattern up to which the names so far may be what it asks for
    for name in names:
        ways |= {w + 1 for w in ways if w < len(wanted) and wanted[w] == "**"}
        if len(wanted) in ways:
            return True
        ways = {w + (wanted[w] != "**") for w in ways if wanted[w] == "**" or fnmatch.fnmatchcase(name, wanted[w])}
    return len(wanted) in ways


def _is_log(info: pafs.FileInfo, root: str, declared: str) -> bool:
    return not _is_hidden(info, root) and (declared != "auto" or info.path.lower().endswith(tuple(ENDINGS)))


def _is_hidden(info: pafs.FileInfo, root: str) -> bool:
    """Whether it is no part of a data set by the convention of Hadoop and Spark, `_SUCCESS` for one."""
    return any(part.startswith(("_", ".")) for part in info.path[len(root) :].strip("/").split("/"))


def _format(path: str, declared: str) -> str:
    if declared != "auto":
        return declared
    for ending, kind in ENDINGS.items():
        if path.lower().endswith(ending):
            return kind
    raise DataError(f"{path}: its ending does not tell its format; set data.format to parquet, csv or jsonl")


def _digest(filesystem: pafs.FileSystem, info: pafs.FileInfo, uri: str) -> str:
    """Digest of a file's first and last 64 KiB: with size and time, enough to notice a changed input."""
    edge = 1 << 16

    def digest() -> str:
        with filesystem.open_input_file(info.path) as file:
            head = file.read(edge)
            file.seek(max(0, info.size - edge))
            return hashlib.sha256(head + file.read(edge)).hexdigest()[:16]

    try:
        return asked_again(uri, digest)
    except OSError as error:
        raise DataError(f"{info.path}: cannot be read: {error}") from None


def fragments(files: Sequence[SourceFile], columns: Sequence[str]) -> list[Fragment]:
    """Cut files into pieces of about FRAGMENT_ROWS rows and check that their columns are there.

    A CSV without a byte is a part that its writer had no rows for, and has no header to check.

    Raises:
        DataError: a file is cut short or of another format, or a column is missing or there twice.
    """
    out: list[Fragment] = []
    for index, file in enumerate(files):
        names = _column_names(file)
        if names == []:
            continue
        missing = [c for c in columns if c not in names] if names is not None else []
        if missing:
            raise DataError(f"{file.uri}: no column {', '.join(map(repr, missing))}; it has {', '.join(names or [])}; "
                            "set data.columns, data.features, data.history and data.impressions to match")  # fmt: skip
        twice = [c for c in columns if names is not None and names.count(c) > 1]
        if twice:
            raise DataError(f"{file.uri}: more than one column {', '.join(map(repr, twice))}, and no telling which is "
                            "meant; rename the others")  # fmt: skip
        out += _row_groups(file, index) if file.format == "parquet" else [_whole(file, index)]
    return out


def _whole(file: SourceFile, index: int) -> Fragment:
    return Fragment(file, index, rows=file.size // TEXT_ROW_BYTES)


def _row_groups(file: SourceFile, index: int) -> Iterator[Fragment]:
    metadata = open_parquet(file).metadata
    first = rows = 0
    for group in range(metadata.num_row_groups):
        rows += metadata.row_group(group).num_rows
        if rows >= FRAGMENT_ROWS or group + 1 == metadata.num_row_groups:
            yield Fragment(file, index, first, group + 1, rows)
            first, rows = group + 1, 0


def open_parquet(file: SourceFile) -> pq.ParquetFile:
    """Raises DataError if the file is no whole Parquet file."""
    filesystem, path = resolve(file.uri)
    try:
        return asked_again(file.uri, lambda: pq.ParquetFile(path, filesystem=filesystem))
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{file.uri}: not a whole Parquet file ({error}); it may be cut short or of another format"
        ) from None


def _column_names(file: SourceFile) -> list[str] | None:
    if file.format == "parquet":
        return list(open_parquet(file).schema_arrow.names)
    if file.format == "csv":
        return _csv_names(file)
    return None  # JSONL: any line may leave a key out


def read(fragment: Fragment, columns: Sequence[str], batch_rows: int = FRAGMENT_ROWS) -> Iterator[tuple[pa.Table, int]]:
    """Tables of the wanted columns with the position of their first row in the file.

    CSV columns come as text. Lines that cannot be parsed come as rows of the one column `RAW_LINE`.

    Raises:
        DataError: the file is unreadable.
    """
    wanted = list(dict.fromkeys(columns))
    if fragment.file.format == "parquet":
        yield from _read_parquet(fragment, wanted, batch_rows)
    elif fragment.file.format == "csv":
        yield from _read_csv(fragment.file, wanted)
    else:
        yield from _read_jsonl(fragment.file, wanted)


def _read_parquet(fragment: Fragment, columns: list[str], batch_rows: int) -> Iterator[tuple[pa.Table, int]]:
    file = open_parquet(fragment.file)
    start = sum(file.metadata.row_group(g).num_rows for g in range(fragment.first))
    try:
        groups = range(fragment.first, fragment.last)
        for batch in file.iter_batches(batch_rows, row_groups=list(groups), columns=columns):
            yield pa.Table.from_batches([batch]), start
            start += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{fragment.file.uri}: cannot be read near row {start}: {error}") from None


def _read_csv(file: SourceFile, columns: list[str]) -> Iterator[tuple[pa.Table, int]]:
    bad: list[str] = []

    def keep_bad(row: Any) -> str:
        bad.append(row.text or "")
        return "skip"

    start, quotes = 0, Quotes()
    convert = pacsv.ConvertOptions(
        include_columns=columns,
        column_types=dict.fromkeys(columns, pa.string()),
        null_values=[""],
        strings_can_be_null=True,
    )
    try:
        with _csv_reader(file, BLOCK_BYTES, convert, keep_bad, quotes) as reader:
            for batch in reader:
                yield pa.Table.from_batches([batch]), start
                start += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        open_quote = quotes.fault() if "straddling" in str(error) else ""  # else what was read last may be half a value
        why = open_quote or f"cannot be read as CSV near row {start}: {error}"
        raise DataError(f"{file.uri}: {why}") from None
    if fault := quotes.fault():
        raise DataError(f"{file.uri}: {fault}")
    if bad:
        yield pa.table({RAW_LINE: bad}), start


def _csv_names(file: SourceFile) -> list[str]:
    def header() -> list[str]:
        with _csv_reader(file, 1 << 20, pacsv.ConvertOptions(), lambda _: "skip", Quotes()) as reader:
            return list(reader.schema.names)

    try:
        return asked_again(file.uri, header)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        if "Empty CSV file" in str(error):
            return []
        raise DataError(
            f"{file.uri}: cannot be read as CSV: {error}; a log needs a header line with column names"
        ) from None


@contextmanager
def _csv_reader(
    file: SourceFile, block: int, convert: Any, on_bad: Callable[[Any], str], quotes: Quotes
) -> Iterator[Any]:
    filesystem, path = resolve(file.uri)
    with filesystem.open_input_stream(path, compression="detect") as stream:
        yield pacsv.open_csv(
            _Watched(stream, quotes),
            read_options=pacsv.ReadOptions(block_size=block, use_threads=False),
            parse_options=pacsv.ParseOptions(invalid_row_handler=on_bad, newlines_in_values=True),
            convert_options=convert,
        )


class _Watched(io.RawIOBase):
    """A stream whose bytes are shown to `Quotes` as they go by."""

    def __init__(self, stream: Any, quotes: Quotes) -> None:
        self.stream, self.quotes = stream, quotes

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        data: bytes = self.stream.read(size)
        self.quotes.see(data)
        return data


def _read_jsonl(file: SourceFile, columns: list[str]) -> Iterator[tuple[pa.Table, int]]:
    filesystem, path = resolve(file.uri)
    start, rest = 0, b""
    try:
        with filesystem.open_input_stream(path, compression="detect") as stream:
            while block := stream.read(BLOCK_BYTES):
                if not start and not rest and _ARRAY.match(block):
                    raise DataError(f"{file.uri}: holds an array of objects, expected an object a line; "
                                    "jq -c '.[]' writes it so")  # fmt: skip
                whole, newline, rest = (rest + block).rpartition(b"\n")
                for table in _parse_lines(whole + newline, columns):
                    yield table, start
                    start += table.num_rows
    except OSError as error:
        raise DataError(f"{file.uri}: cannot be read near line {start}: {error}") from None
    for table in _parse_lines(rest, columns):
        yield table, start
        start += table.num_rows


def _parse_lines(text: bytes, columns: list[str]) -> list[pa.Table]:
    if not text.strip():
        return []
    try:
        text.decode()  # Arrow takes bytes that are no UTF-8 for text
        table = _parse_block(text)
        dates = [f.name for f in table.schema if f.name in columns and pa.types.is_timestamp(f.type)]
        if dates:  # Arrow turned text into dates: an id that looks like one is still text
            table = _parse_block(text, pa.schema([(name, pa.string()) for name in dates]))
        present = [c for c in columns if c in table.column_names]
        if any(_lost_digits(table.column(c)) for c in present):
            return _parse_one_by_one(text, columns)
        table = table.select(present) if present else pa.table({columns[0]: pa.nulls(table.num_rows)})
        return [_with_missing(table, columns)]
    except (pa.ArrowException, UnicodeDecodeError):
        return _parse_one_by_one(text, columns)


def _lost_digits(column: pa.ChunkedArray) -> bool:
    """Whether Arrow took whole numbers too large for 64 bits, ids for one, for doubles."""
    return pa.types.is_floating(column.type) and bool(pc.any(pc.greater_equal(pc.abs(column), 2.0**53)).as_py())


def _parse_block(text: bytes, known: pa.Schema | None = None) -> pa.Table:
    return pajson.read_json(
        pa.BufferReader(text),
        read_options=pajson.ReadOptions(use_threads=False, block_size=len(text) + 1),
        parse_options=pajson.ParseOptions(explicit_schema=known),
    )


def _parse_one_by_one(text: bytes, columns: list[str]) -> list[pa.Table]:
    """Slow path for a block with a broken line or a column of mixed types: values become text, bad lines raw."""
    rows: list[dict[str, str | None]] = []
    bad: list[str] = []
    for line in text.split(b"\n"):
        row = _row(line, columns)
        if row is not None:
            rows.append(row)
        elif line.strip():
            bad.append(line.decode("utf-8", "replace"))
    keys = set().union(*rows)
    found = {c: pa.array([r.get(c) for r in rows], pa.string()) for c in columns if c in keys}
    tables = [_with_missing(pa.table(found or {columns[0]: pa.nulls(len(rows))}), columns)] if rows else []
    return [*tables, pa.table({RAW_LINE: bad})] if bad else tables


def _row(line: bytes, columns: list[str]) -> dict[str, str | None] | None:
    """A line's values as text; None if it is no JSON object, nested too deep, or has text that is none in UTF-8."""
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            return None
        out = {c: None if row[c] is None else _text(row[c]) for c in columns if c in row}
        "".join(filter(None, out.values())).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError):
        return None
    return out


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)  # as Arrow writes a column of whole numbers
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _with_missing(table: pa.Table, columns: list[str]) -> pa.Table:
    for column in columns:
        if column not in table.column_names:
            table = table.append_column(pa.field(column, pa.null(), metadata=ABSENT), pa.nulls(table.num_rows))
    return table.select(columns)


def is_absent(field: pa.Field) -> bool:
    """Whether no line of a table of JSONL has this key."""
    return field.metadata == ABSENT


def inputs_fingerprint(files: Sequence[SourceFile]) -> list[dict[str, Any]]:
    """Plain data that changes when any file of the log does."""
    return [asdict(file) for file in files]
