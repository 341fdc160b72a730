"""Candidates to score: read, validated and dealt to shards by user.

Three forms of Parquet, told apart by their columns, which have the names of the run's log (`data.columns`):
pairs (user, item), lists (user, list of items), and one list for all users (item alone). Pairs and lists may say
`time`, the request columns and features, each under the log's own name; a list's values hold for all its items.

A shard is the users whose hash leaves its number as remainder. Dealing reads every fragment once and writes one
file of it, in which each block of rows is cut into one Arrow batch a shard: as many files as fragments, whatever
the number of shards, and a shard reads its own batches alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.ipc as ipc

from hpgr.artifacts import Folder
from hpgr.config import Data, Feature
from hpgr.data.hashing import combine, hash_items, value_keys
from hpgr.data.preparation import dealt
from hpgr.data.sources import Fragment, SourceFile, find_files, fragments, open_parquet, read
from hpgr.data.staging import writing
from hpgr.data.timelines import TARGET_ROLES
from hpgr.data.validation import (
    quarantine_table,
    read_feature,
    read_ids,
    read_times,
    request_keys,
    text,
    unmarked,
)  # fmt: skip
from hpgr.errors import DataError
from hpgr.schema import FEATURE_PREFIX, ITEM, REQUEST, TIME, USER, Ints

Kind = Literal["pairs", "lists", "all"]
BLOCK_VALUES = 500_000
"""Candidates that a dealing task holds at once."""
REQUEST_PREFIX = "request:"
ITEM_HASH, CONTENT = "item_hash", "content"
DEALT, LIST, QUARANTINE = "_work/dealt", "_work/list.parquet", "_quarantine"
"""Where dealt rows, one list for all, and unusable rows go in the job's output folder."""


@dataclass(frozen=True)
class Layout:
    """What a candidates table says: its form, and which optional columns it has (names of the log)."""

    kind: Kind
    time: bool
    request: tuple[str, ...]
    features: tuple[str, ...]

    def columns(self, data: Data) -> list[str]:
        """Columns to read."""
        c = data.columns
        given = [f.column for f in self.given(data)]
        names = [*([] if self.kind == "all" else [c.user]), c.item, *([c.time] if self.time else []), *self.request]
        return list(dict.fromkeys([*names, *given]))

    def given(self, data: Data) -> list[Feature]:
        """Features of candidates that the table has."""
        return [f for f in data.features if f.name in self.features]


@dataclass(frozen=True)
class Candidates:
    """A candidates table as found: its files and layout."""

    files: list[SourceFile]
    layout: Layout

    def plain(self) -> dict[str, Any]:
        """Plain data that changes when the table does."""
        return {"files": [asdict(f) for f in self.files], "layout": asdict(self.layout)}

    def pieces(self, data: Data) -> list[Fragment]:
        """What a dealing task reads at a time."""
        return fragments(self.files, self.layout.columns(data))


def find_candidates(paths: Sequence[str], data: Data) -> Candidates:
    """Look at a candidates table.

    Raises:
        DataError: there is none, a column is missing or of a type it can never be, or files disagree.
    """
    files = find_files(paths, "parquet", asked="--candidates")
    schemas = [open_parquet(f).schema_arrow for f in files]
    layouts = [_layout(schema, data, file.uri) for schema, file in zip(schemas, files, strict=True)]
    for file, layout in zip(files, layouts, strict=True):
        if layout != layouts[0]:
            raise DataError(f"--candidates: {file.uri} has columns for {layout}, {files[0].uri} for {layouts[0]}; "
                            "give files of one form")  # fmt: skip
    return Candidates(files, layouts[0])


def _layout(schema: pa.Schema, data: Data, where: str) -> Layout:
    c, names = data.columns, set(schema.names)
    if c.item not in names:
        optional = [c.time, *(c.request or []), *(f.column for f in target_features(data))]
        raise DataError(f"--candidates {where}: no column {c.item!r} (item ids); it has {', '.join(schema.names)}. "
                        f"Name columns as the run's log does: {c.user} and {c.item}, or {c.item} alone for one list "
                        f"for all; optional: {', '.join(optional)}")  # fmt: skip
    listed = pa.types.is_list(schema.field(c.item).type) or pa.types.is_large_list(schema.field(c.item).type)
    if listed and c.user not in names:
        raise DataError(f"--candidates {where}: column {c.item!r} holds lists and there is no column {c.user!r}; a "
                        "list for all users is a table of one item a row")  # fmt: skip
    kind: Kind = "all" if c.user not in names else "lists" if listed else "pairs"
    shown = [f.name for f in data.features if f.role in TARGET_ROLES and f.column in names]
    if kind == "all":
        return Layout(kind, False, (), tuple(shown))
    return Layout(kind, c.time in names, _request(names, data, where), tuple(shown))


def _request(names: set[str], data: Data, where: str) -> tuple[str, ...]:
    """The request columns, all or none; those that say something else too (a time, a feature) are no sign of lists."""
    c, request = data.columns, data.columns.request or []
    missing = [name for name in request if name not in names]
    if not missing:
        return tuple(request)
    other = {c.user, c.item, c.time, *(f.column for f in data.features)}
    given = [name for name in request if name in names and name not in other]
    if given:
        raise DataError(f"--candidates {where}: the run's log names a list by {', '.join(request)}, and the candidates "
                        f"have no column {', '.join(map(repr, missing))}; add it, or leave {', '.join(given)} out to "
                        "score candidates of no list")  # fmt: skip
    return ()


def empty_candidates(data: Data, layout: Layout) -> pa.Table:
    """No rows, with the canonical schema of candidates."""
    kinds = {USER: pa.string(), ITEM: pa.string(), TIME: pa.int64(), REQUEST: pa.int64()}
    kinds |= {REQUEST_PREFIX + name: pa.string() for name in layout.request}
    for f in target_features(data):
        kinds[FEATURE_PREFIX + f.name] = pa.string() if f.kind == "categorical" else pa.float64()
    kinds |= {ITEM_HASH: pa.uint64(), CONTENT: pa.uint64()}
    return pa.schema(list(kinds.items())).empty_table()


def target_features(data: Data) -> list[Feature]:
    """Features that candidates show."""
    return [f for f in data.features if f.role in TARGET_ROLES]


def deal(fragment: Fragment, data: Data, layout: Layout, folder: Folder, shards: int) -> dict[str, Any]:
    """Validate a fragment and write it cut by shard; returns its account, `rows` being [shards] counts."""
    rows, reasons, bad, empty_lists = np.zeros(shards, np.int64), Counter[str](), [], 0
    schema = empty_candidates(data, layout).schema
    filesystem, path = folder.path(dealt_name(fragment))
    with writing(path):
        filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        options = ipc.IpcWriteOptions(compression="lz4")
        with filesystem.open_output_stream(path) as sink, ipc.new_file(sink, schema, options=options) as writer:
            for raw, first in _blocks(fragment, data, layout):
                block, quarantined, nothing = validate_candidates(raw, first, data, layout)
                rows += _write_cut(writer, block, schema, shards)
                empty_lists += nothing
                reasons.update(quarantined.column("reason").to_pylist())
                bad += [quarantined] if quarantined.num_rows else []
    quarantine(fragment, bad, folder)
    return {"rows": rows, "reasons": dict(reasons), "empty_lists": empty_lists}


def quarantine(fragment: Fragment, bad: list[pa.Table], folder: Folder) -> None:
    """Keep a fragment's unusable rows with their reasons."""
    if bad:
        table = pa.concat_tables(bad)
        table = table.append_column("file", pa.array([fragment.file.uri] * table.num_rows))
        folder.write_parquet(f"{QUARANTINE}/{fragment.index:06d}-{fragment.first:06d}.parquet", table)


def dealt_name(fragment: Fragment) -> str:
    """File of a fragment's dealt rows."""
    return f"{DEALT}/{fragment.index:06d}-{fragment.first:06d}.arrow"


def _write_cut(writer: ipc.RecordBatchFileWriter, block: pa.Table, schema: pa.Schema, shards: int) -> Ints:
    block, starts = dealt(block, shards)
    block, counts = block.cast(schema).combine_chunks(), np.diff(starts)
    for start, size in zip(starts, counts, strict=False):
        batches = block.slice(start, size).to_batches()
        writer.write_batch(batches[0] if batches else pa.RecordBatch.from_pylist([], schema=block.schema))
    return counts


def dealt_rows(shard: int, shards: int, folder: Folder, data: Data, layout: Layout) -> pa.Table:
    """Canonical rows of one shard from all dealt fragments, in the fragments' order."""

    def of_shard(filesystem: pafs.FileSystem, path: str) -> list[pa.Table]:
        with filesystem.open_input_file(path) as source, ipc.open_file(source) as file:
            batches = [file.get_batch(i) for i in range(shard, file.num_record_batches, shards)]
        return [pa.Table.from_batches([batch]) for batch in batches]

    parts = [empty_candidates(data, layout)]
    for name in folder.entries(DEALT):
        parts += folder.reading(f"{DEALT}/{name}", of_shard)
    return pa.concat_tables(parts).combine_chunks()


def read_list(
    fragments: Iterable[Fragment], data: Data, layout: Layout, folder: Folder
) -> tuple[pa.Table, Counter[str]]:
    """Canonical rows of one list for all, each once; unusable rows are quarantined, and their reasons counted."""
    parts, reasons = [empty_candidates(data, layout)], Counter[str]()
    for fragment in fragments:
        bad = []
        for raw, first in read(fragment, layout.columns(data)):
            rows, quarantined, _ = validate_candidates(raw, first, data, layout)
            parts.append(rows.cast(parts[0].schema))
            reasons.update(quarantined.column("reason").to_pylist())
            bad += [quarantined] if quarantined.num_rows else []
        quarantine(fragment, bad, folder)
    rows = pa.concat_tables(parts).combine_chunks()
    return distinct(rows, np.zeros(rows.num_rows, np.int64))[0], reasons


def _blocks(fragment: Fragment, data: Data, layout: Layout) -> Iterator[tuple[pa.Table, int]]:
    """Raw rows in blocks of about BLOCK_VALUES candidates."""
    rows = BLOCK_VALUES
    if layout.kind == "lists":
        rows = max(1, int(BLOCK_VALUES * max(fragment.rows, 1) // max(candidates_in(fragment, data), 1)))
    yield from read(fragment, layout.columns(data), min(rows, BLOCK_VALUES))


def candidates_in(fragment: Fragment, data: Data) -> int:
    """Candidates of a fragment by its file's own counts: list entries, not rows."""
    metadata = open_parquet(fragment.file).metadata
    paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    name = data.columns.item  # a list's entries lie below it, under names that differ from writer to writer
    item = next(i for i, path in enumerate(paths) if path == name or path.startswith(f"{name}."))
    return sum(metadata.row_group(g).column(item).num_values for g in range(fragment.first, fragment.last))


def validate_candidates(raw: pa.Table, first_row: int, data: Data, layout: Layout) -> tuple[pa.Table, pa.Table, int]:
    """Canonical rows (cast them to the schema of `empty_candidates`), quarantined ones with reasons, and how many lists
    are empty.

    A row without a usable id, time or feature is quarantined; a null time means "no time given".
    """
    source, nothing = np.arange(first_row, first_row + raw.num_rows), 0
    if layout.kind == "lists":
        raw, parent, nothing = _flattened(raw, data.columns.item)
        source = source[parent]
    reasons = np.full(raw.num_rows, None, object)
    columns = {
        USER: pa.nulls(raw.num_rows, pa.string()) if layout.kind == "all"
        else read_ids(raw, data.columns.user, "user", reasons),
        ITEM: read_ids(raw, data.columns.item, "item", reasons),
        TIME: _candidate_times(raw, data, layout, reasons),
        REQUEST: pa.array(request_keys(raw, list(layout.request)).view(np.int64)),
    }  # fmt: skip
    columns |= {REQUEST_PREFIX + name: text(raw, name) for name in layout.request}
    for f in target_features(data):
        absent = pa.nulls(raw.num_rows, pa.string() if f.kind == "categorical" else pa.float64())
        columns[FEATURE_PREFIX + f.name] = read_feature(raw, f, reasons) if f.name in layout.features else absent
    rows = pa.table(columns).filter(pa.array(unmarked(reasons))).combine_chunks()
    bad = quarantine_table(raw, reasons, 0)
    bad = bad.set_column(0, "row", pa.array(source[bad.column("row").to_numpy()], pa.int64()))
    return _hashed(rows, data, layout), bad, nothing


def _flattened(raw: pa.Table, item: str) -> tuple[pa.Table, Ints, int]:
    """One row an entry of each list, the place of its list, and how many lists have none."""
    lists = raw.column(item).combine_chunks()
    lists = pa.concat_arrays(lists.chunks) if isinstance(lists, pa.ChunkedArray) else lists
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    parent = pc.list_parent_indices(lists)
    out = raw.drop_columns([item]).take(parent).append_column(item, pc.list_flatten(lists))
    return out, parent.to_numpy(), int((lengths == 0).sum())


def _candidate_times(raw: pa.Table, data: Data, layout: Layout, reasons: Any) -> pa.Array:
    """Microseconds, null where none is given."""
    if not layout.time:
        return pa.nulls(raw.num_rows, pa.int64())
    column = raw.column(data.columns.time)
    absent = np.asarray(pc.is_null(column, nan_is_null=True), bool)
    told = np.where(absent, "none given", reasons)
    micros = read_times(column, data, told)
    reasons[~absent] = told[~absent]
    return pa.array(micros, pa.int64(), mask=absent)


def _hashed(rows: pa.Table, data: Data, layout: Layout) -> pa.Table:
    """Hashes that order and compare candidates; `content` covers time, request and features."""
    names = [TIME, REQUEST, *(FEATURE_PREFIX + f.name for f in layout.given(data))]
    content = combine(*(value_keys(rows.column(name)) for name in names))
    rows = rows.append_column(ITEM_HASH, pa.array(hash_items(rows.column(ITEM))))
    return rows.append_column(CONTENT, pa.array(content))


def distinct(rows: pa.Table, user: Ints) -> tuple[pa.Table, Ints, int]:
    """Rows by (user, request, item, content) without repeated ones, their users, and how many were repeated.

    Args:
        rows: canonical candidates.
        user: [rows] number of each row's user.
    """
    keys = [user, *(rows.column(name).to_numpy() for name in (REQUEST, ITEM_HASH, CONTENT))]
    order = np.lexsort(keys[::-1])
    new = np.ones(len(order), bool)
    if len(order):
        new[1:] = np.logical_or.reduce([key[order][1:] != key[order][:-1] for key in keys])
    kept = order[new]
    return rows.take(pa.array(kept)), user[kept], int((~new).sum())
