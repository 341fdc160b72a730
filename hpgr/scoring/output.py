"""Where scores go, exactly once: write aside, commit by a record, publish at the end.

    _request.json            what was asked; another request may not use the folder
    _work/                   candidates dealt to shards
    _pending/<part>          a shard's scores, whole (renamed or uploaded in one go)
    _commits/<shard>.json    written after its parts: counts, bytes, checksums
    part-*.parquet           after every shard has committed and the counts agree
    _SUCCESS                 last: counts, checksums, run, versions

A shard counts as done if its commit record is there and its parts, pending or published, have their bytes. Nothing
relies on a rename being atomic across files, so an object store serves as well as a disk. A shard scored twice (a
worker lost after writing) writes the same bytes to the same name. Readers of data sets pass over names that begin
with an underscore.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from hpgr.artifacts import ASIDE, Folder
from hpgr.errors import ArtifactError
from hpgr.scoring.request import Request
from hpgr.scoring.shards import Outcome

REQUEST, SUCCESS, QUALITY, LOCK = "_request.json", "_SUCCESS", "_metrics.json", "_lock"
WORK, PENDING, COMMITS, EMBEDDINGS = "_work", "_pending", "_commits", "_embeddings"
ITEMS = f"{WORK}/items.parquet"
STORE_THREADS = 16
"""Requests to a store at once."""


def claim(folder: Folder, record: dict[str, Any]) -> bool:
    """Take the folder for a request, or find that it is this request's own; returns whether it has finished.

    Raises:
        ArtifactError: it belongs to another request, or holds other files.
    """
    if folder.exists(REQUEST):
        found = folder.read_json(REQUEST)
        differing = [k for k in sorted(found.keys() | record.keys()) if found.get(k) != record.get(k)]
        if differing:
            changes = ", ".join(f"{k} is {record.get(k)!r} and there {found.get(k)!r}" for k in differing)
            raise ArtifactError(f"--output {folder.uri} belongs to another request: {changes}; give another --output, "
                                "or the same command to go on with that one")  # fmt: skip
        return folder.exists(SUCCESS)
    others = [name for name in folder.entries() if not name.startswith(f"{LOCK}-") and not name.endswith(ASIDE)]
    if others:
        raise ArtifactError(f"--output {folder.uri} holds other files ({', '.join(others[:3])}); give an empty or new "
                            "folder")  # fmt: skip
    folder.write_json(REQUEST, record)
    return False


def commit(request: Request, shard: int, outcome: Outcome) -> dict[str, Any]:
    """Write a shard's parts aside, then its record; returns the record."""
    folder = Folder(request.output)
    parts = {}
    if outcome.scores.num_rows or shard == 0:  # the first part tells readers the columns, even of nothing
        parts[request.part(shard)] = outcome.scores
    if outcome.users is not None and outcome.users.num_rows:
        parts[f"{EMBEDDINGS}/users/{request.users_part(shard)}"] = outcome.users
    files = {name: _write(folder, name, table) for name, table in parts.items()}
    record = {"shard": shard, "account": outcome.account, "files": files}
    folder.write_json(f"{COMMITS}/{shard:05d}.json", record)
    return record


def _write(folder: Folder, name: str, table: pa.Table) -> dict[str, Any]:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    folder.write(f"{PENDING}/{name}", content)
    return {"rows": table.num_rows, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def committed(request: Request) -> dict[int, dict[str, Any]]:
    """Records of the shards that are done, by shard."""
    folder = Folder(request.output)
    with ThreadPoolExecutor(STORE_THREADS) as pool:
        names = [n for n in folder.sizes(COMMITS) if n.endswith(".json")]
        records = list(pool.map(lambda name: folder.read_json(f"{COMMITS}/{name}"), names))
    sizes = _sizes(folder, "") | _sizes(folder, f"{PENDING}/")
    return {
        r["shard"]: r for r in records if all(sizes.get(name) == file["bytes"] for name, file in r["files"].items())
    }


def _sizes(folder: Folder, place: str) -> dict[str, int]:
    """Bytes of the parts in a place, by their final name."""
    users = f"{EMBEDDINGS}/users/"
    return folder.sizes(place.rstrip("/")) | {
        users + name: size for name, size in folder.sizes(place + users.rstrip("/")).items()
    }


def totals(records: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Sums of the shards' accounts."""
    out: Counter[str] = Counter()
    for record in records:
        out.update(record["account"])
    return dict(out)


@dataclass(frozen=True)
class Expected:
    """What must have been written. `rows` [shards] are requested pairs, repeated ones too, and `total` their sum,
    where they are known before scoring."""

    shards: int
    rows: list[int] | None
    total: int | None = None


def check(request: Request, records: dict[int, dict[str, Any]], expected: Expected) -> None:
    """Requested against written pairs, shard by shard, by the accounts and by the parts' own row counts.

    Raises:
        ArtifactError: pairs are missing or too many; which shards.
    """
    wrong = [s for s in range(expected.shards) if s not in records]
    for shard, record in records.items():
        account, part = record["account"], record["files"].get(request.part(shard), {"rows": 0})
        asked = account["pairs"] + account["duplicates"]
        dealt = asked if expected.rows is None else expected.rows[shard]
        if asked != dealt or not account["pairs"] == account["written"] == part["rows"]:
            wrong.append(shard)
    written = sum(record["account"]["written"] for record in records.values())
    if expected.total is not None and expected.rows is None and written != expected.total:
        wrong.append(-1)
    if wrong:
        raise ArtifactError(f"{request.output}: requested and written pairs differ (shards {wrong[:5]}): the "
                            "candidates changed while they were read, or files were lost; run the same command again, "
                            "and if it says so again give another --output")  # fmt: skip


def publish(request: Request, records: dict[int, dict[str, Any]]) -> None:
    """Move every part to its final name; parts moved before stay as they are.

    Raises:
        ArtifactError: a part is gone, or holds another number of rows than its record.
    """
    folder = Folder(request.output)
    pending = _sizes(folder, f"{PENDING}/")
    files = [(name, file) for _, r in sorted(records.items()) for name, file in r["files"].items()]

    def one(entry: tuple[str, dict[str, Any]]) -> None:
        """Check one part against its record and move it to its final name."""
        name, file = entry
        place = f"{PENDING}/{name}" if pending.get(name) == file["bytes"] else name
        rows = folder.reading(
            place, lambda filesystem, path: pq.ParquetFile(path, filesystem=filesystem).metadata.num_rows
        )
        if rows != file["rows"]:
            raise ArtifactError(f"{request.output}/{place} does not hold the {file['rows']} rows of its record; delete "
                                f"{request.output} and run the same command again")  # fmt: skip
        if place != name:
            folder.move(place, name)

    with ThreadPoolExecutor(STORE_THREADS) as pool:
        list(pool.map(one, files))


def succeed(request: Request, records: dict[int, dict[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    """Write `_SUCCESS`, remove what only an unfinished job needs, and return what was written."""
    folder = Folder(request.output)
    whole = summary | {"files": {name: file for _, r in sorted(records.items()) for name, file in r["files"].items()}}
    folder.write_json(SUCCESS, whole)
    clean(folder)
    return whole


def clean(folder: Folder) -> None:
    """Remove the working folders of a finished job."""
    for name in (PENDING, COMMITS, WORK):
        folder.delete(name)
