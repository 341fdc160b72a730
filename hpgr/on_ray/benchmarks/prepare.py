"""Preparing a log against DuckDB and Polars that sort and sessionise the same files on the same cores.

The peers read the files, order all rows by user and time, number each user's sessions (a gap of more than 30 minutes
starts one) and write one Parquet file. `prepare` leaves sessions to the stream, where their gap may vary; it validates
every row, drops exact duplicates, breaks ties by content, splits, counts and encodes a vocabulary, and checks that no
row is lost; none of that is taken off its time. Each way runs in a process of its own; the ways take turns. Peak memory
is the sum of the proportional shares (PSS) of the way's processes, less what Ray itself holds before the log is
touched; to look at it slows what is looked at, so it has a turn of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hpgr.config import validate
from hpgr.on_ray.benchmarks import Greatest, machine, peers_of, spread

Say = Callable[[str], None]
ROWS_A_FILE = 1_000_000
GAP_SECONDS = 1800
PEERS = {"duckdb": ("duckdb",), "polars": ("polars",)}
"""Modules by name."""
Measure = Callable[[Callable[[], Any]], float]


def arguments(parser: argparse.ArgumentParser) -> None:
    """What is built and measured."""
    parser.add_argument("--rows", default="10000000", help="rows of the log; several numbers, separated by commas")
    parser.add_argument("--rounds", type=int, default=3, help="turns of the ways")
    parser.add_argument("--peers", default=",".join(PEERS),
                        help="which of duckdb and polars; one that is not installed is left out")  # fmt: skip
    parser.add_argument("--keep", metavar="DIR", help="build in this folder and leave the log")


def run(options: argparse.Namespace, say: Say) -> dict[str, Any]:
    """Write the log, run the ways in turns; returns the figures.

    Raises:
        ConfigError: a peer is unknown.
    """
    peers, left_out = peers_of(options.peers, PEERS, "peers", say)
    folder = Path(options.keep or tempfile.mkdtemp(prefix="hpgr-benchmark-"))
    sizes = [int(n) for n in options.rows.split(",")]
    try:
        found = {str(rows): turns(folder, rows, ("prepare", *peers), options.rounds, say) for rows in sizes}
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    rates = {rows: {way: spread([int(rows) / s for s in measured.seconds]) for way, measured in ways.items()}
             for rows, ways in found.items()}  # fmt: skip
    return {
        "ratios": {f"over_{peer}": {rows: ways["prepare"]["median"] / ways[peer]["median"]
                                    for rows, ways in rates.items()} for peer in peers},
        "rows_per_second": rates,
        "peak_mb": {rows: {way: measured.peak_mb for way, measured in ways.items()} for rows, ways in found.items()},
        "left_out": left_out,
        "settings": {"rounds": options.rounds, "session_gap_seconds": GAP_SECONDS},
        "machine": machine(*peers),
    }  # fmt: skip


@dataclass
class Turns:
    """What was measured of one way."""

    seconds: list[float] = field(default_factory=list)
    peak_mb: float = 0.0


def turns(folder: Path, rows: int, ways: tuple[str, ...], rounds: int, say: Say) -> dict[str, Turns]:
    """Seconds of every way in every turn, and its peak megabytes."""
    log = folder / f"log-{rows}"
    write_log(log, rows, say)
    out = {way: Turns() for way in ways}
    for turn in range(rounds + 1):
        for way in ways:
            target = folder / f"out-{way}"
            shutil.rmtree(target, ignore_errors=True)
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                found = pool.submit(measure, way, str(log), str(target), turn == rounds).result()
            shutil.rmtree(target, ignore_errors=True)
            if turn == rounds:
                out[way].peak_mb = found
                say(f"prepare: {rows:,} rows, {way}: {found:,.0f} MB")
            else:
                out[way].seconds.append(found)
                say(f"prepare: {rows:,} rows, {way}: {found:.1f} s, {rows / found:,.0f} rows/s")
    return out


def write_log(log: Path, rows: int, say: Say) -> None:
    """A log in no order of users, 100 events each on average, items by a heavy-tailed popularity; kept if there."""
    if (log / "_SUCCESS").exists():
        return
    say(f"prepare: writing a log of {rows:,} rows")
    log.mkdir(parents=True, exist_ok=True)
    rng, users = np.random.default_rng(0), max(1, rows // 100)
    for first in range(0, rows, ROWS_A_FILE):
        n = min(ROWS_A_FILE, rows - first)
        item = np.minimum(rng.zipf(1.2, n), 50_000)
        table = pa.table({
            "user_id": pa.array(rng.integers(0, users, n)),
            "item_id": pa.array(item),
            "timestamp": pa.array(1_600_000_000 + rng.integers(0, 90 * 86_400, n)),
            "clicked": pa.array((rng.random(n) < 0.3).astype(np.int8)),
        })  # fmt: skip
        pq.write_table(table, log / f"{first:012d}.parquet")
    (log / "_SUCCESS").touch()


def measure(way: str, log: str, target: str, memory: bool) -> float:
    """Seconds, or peak megabytes, of one way in this process and its children."""
    return {"prepare": _prepare, "duckdb": _duckdb, "polars": _polars}[way](log, target, most_held if memory else timed)


def timed(work: Callable[[], Any]) -> float:
    """Seconds of some work."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def most_held(work: Callable[[], Any]) -> float:
    """The most megabytes that some work holds beyond what was held before."""
    before = held()
    with Greatest(held) as memory:
        work()
    return max(0.0, memory.value - before)


def _prepare(log: str, target: str, measured: Measure) -> float:
    from hpgr.data.preparation import prepare
    from hpgr.on_ray.parallel import RayExecute
    from hpgr.on_ray.session import session

    columns = {"user": "user_id", "item": "item_id", "time": "timestamp", "label": "clicked"}
    config = validate({"data": {"path": log, "columns": columns, "time_unit": "s", "prepared": target}})

    def quiet(_: str) -> None:
        return None

    with session(quiet):
        RayExecute(quiet)("warm up", loaded, range(2 * (os.cpu_count() or 1)))
        return measured(lambda: prepare(config, RayExecute(quiet), quiet))


def loaded(_: int) -> str:
    """A worker loads what the passes need, as the peers are loaded before their clock starts; slow enough that each
    worker has its turn."""
    from hpgr.data import preparation

    time.sleep(0.5)
    return preparation.__name__


def _duckdb(log: str, target: str, measured: Measure) -> float:
    import duckdb

    Path(target).mkdir(parents=True)
    query = f"""
        COPY (
            SELECT *, sum(starts) OVER (PARTITION BY user_id ORDER BY timestamp ROWS UNBOUNDED PRECEDING) AS session
            FROM (SELECT *, CAST(coalesce(timestamp - lag(timestamp) OVER (PARTITION BY user_id ORDER BY timestamp)
                                          > {GAP_SECONDS}, false) AS INTEGER) AS starts
                  FROM read_parquet('{log}/*.parquet'))
            ORDER BY user_id, timestamp
        ) TO '{target}/out.parquet' (FORMAT parquet)
    """
    with duckdb.connect() as connection:
        connection.execute(f"SET threads = {os.cpu_count()}; SET temp_directory = '{target}/spill'")
        return measured(lambda: connection.execute(query))


def _polars(log: str, target: str, measured: Measure) -> float:
    os.environ["POLARS_MAX_THREADS"] = str(os.cpu_count())
    import polars as pl

    Path(target).mkdir(parents=True)
    gap = pl.col("timestamp").diff().over("user_id").fill_null(0) > GAP_SECONDS
    table = pl.scan_parquet(f"{log}/*.parquet").sort("user_id", "timestamp", maintain_order=True)
    numbered = table.with_columns(gap.cast(pl.Int32).cum_sum().over("user_id").alias("session"))
    return measured(lambda: numbered.sink_parquet(f"{target}/out.parquet"))


def held() -> float:
    """Megabytes (PSS) of this process and all below it. Linux."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    family, grown = {os.getpid()}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in family} - family
        family, grown = family | more, bool(more)
    total = 0
    for process in family:
        with suppress(OSError):
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1e3
