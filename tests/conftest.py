"""Fixtures shared by all tests: small logs, configurations, prepared logs, real logs where there are some."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from hpgr import config as configuration
from hpgr.artifacts import Folder
from hpgr.data.preparation import Prepared, in_process, prepare

ROOT = Path(__file__).resolve().parents[1]
settings.register_profile("patient", deadline=None)  # a busy machine makes no property false
settings.load_profile("patient")
Rows = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]] | pa.Table


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("chaos", "random deaths (tests/faults/test_chaos.py, -m chaos)")
    group.addoption("--chaos-runs", type=int, default=20, help="jobs to disturb")
    group.addoption("--chaos-seed", type=int, default=0, help="what decides when and of what they die")


def pytest_configure(config: pytest.Config) -> None:
    """Tests that signal jobs, and themselves, mean the signals' defaults; a shell's background ignores some.

    Ray's workers are as urgent as all else: as nice as they are they would wait for the tests of another process.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ.setdefault("RAY_worker_niceness", "0")


class RayInOneProcess(LoadScopeScheduling):
    """In several processes (-n) a file's tests stay together, for what they share; those that start a Ray, all of them:
    two at a time would take the machine from each other."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "ray" if file.startswith(("tests/faults/", "tests/jobs/", "tests/ray/")) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> RayInOneProcess:
    return RayInOneProcess(config, log)


def _table(rows: Rows) -> pa.Table:
    if isinstance(rows, pa.Table):
        return rows
    return pa.table(dict(rows)) if isinstance(rows, Mapping) else pa.Table.from_pylist([dict(row) for row in rows])


def _merged(base: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in more.items():
        inner = isinstance(value, Mapping) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if inner else value
    return out


@pytest.fixture
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture
def write_log(tmp_path: Path) -> Callable[..., str]:
    """`write_log(rows, format="parquet", name="log")` writes a log file; returns its path.

    Rows are columns, a list of rows or an Arrow table; bytes are written as they are.
    """

    def write(rows: Rows | bytes, format: str = "parquet", name: str = "log") -> str:
        path = tmp_path / f"{name}.{format}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(rows, bytes):
            path.write_bytes(rows)
        elif format == "parquet":
            pq.write_table(_table(rows), path)
        elif format == "csv":
            pacsv.write_csv(_table(rows), path)
        else:
            lines = _table(rows).to_pylist() if isinstance(rows, Mapping | pa.Table) else rows
            path.write_text(
                "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines), encoding="utf-8"
            )
        return str(path)

    return write


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., configuration.Config]:
    """`config(data={...}, stream={...})`: validated, prepared logs in `tmp_path`, label column `clicked`."""
    base = {"data": {"columns": {"label": "clicked"}, "prepared": str(tmp_path / "prepared")}}

    def build(**overrides: Any) -> configuration.Config:
        return configuration.validate(_merged(base, overrides))

    return build


@pytest.fixture
def prepare_log(write_log: Callable[..., str], config: Callable[..., configuration.Config]) -> Callable[..., Prepared]:
    """`prepare_log(rows, format="parquet", name="log", **data)`: write and prepare; `data` overrides that section."""

    def run(rows: Rows | bytes, format: str = "parquet", name: str = "log", **data: Any) -> Prepared:
        path = write_log(rows, format, name)
        return prepare(config(data={"path": path, **data}), in_process, print)

    return run


@pytest.fixture
def log() -> Callable[..., dict[str, list[Any]]]:
    """`log(users=5, events=10, seed=0)`: columns of a plain log, clicks of both classes, times all different."""

    def build(users: int = 5, events: int = 10, seed: int = 0) -> dict[str, list[Any]]:
        rng = np.random.default_rng(seed)
        n = users * events
        return {
            "user_id": [f"u{i % users}" for i in range(n)],
            "item_id": [f"i{k}" for k in rng.integers(0, 9, n)],
            "timestamp": [1_600_000_000 + 60 * i for i in range(n)],
            "clicked": [(i // users + i % users) % 2 for i in range(n)],
        }

    return build


@pytest.fixture
def shared_data() -> Callable[[str], str]:
    """`shared_data(name)`: path of a real log in $HPGR_DATA, else ../shared/data; skips where there is none."""

    def find(name: str) -> str:
        folder = Path(os.environ.get("HPGR_DATA") or ROOT.parent / "shared" / "data")
        if not (folder / name).is_file():
            pytest.skip(f"real log {name} is not in {folder}; set HPGR_DATA to the folder that holds it")
        return str(folder / name)

    return find


@pytest.fixture
def store_in_memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Every folder is remote from now on, and all that is written lies here by its name."""
    written: dict[str, bytes] = {}
    monkeypatch.setattr(Folder, "is_local", property(lambda self: False))
    monkeypatch.setattr(Folder, "exists", lambda self, name="": name in written)
    monkeypatch.setattr(Folder, "read", lambda self, name: written[name])
    monkeypatch.setattr(Folder, "write", lambda self, name, content: written.__setitem__(name, content))
    return written
