from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from helpers_scoring import Ask, batch, finished_run, write
from torch_fixtures import one_thread

from hpgr.scoring.finished import Finished

__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def users(finished: Finished) -> list[str]:
    return finished.run.prepared.timelines(0)["user"].to_pylist()


@pytest.fixture(scope="module")
def items(finished: Finished) -> list[str]:
    return finished.run.prepared.vocabulary().items["value"].to_pylist()


@pytest.fixture
def ask(finished: Finished, tmp_path: Path) -> Ask:
    """`ask(columns, **wish)`: a job over a candidates table (None: none); its account and scores."""
    count = iter(range(99))

    def run(columns: dict[str, Any] | pa.Table | None, **wish: Any) -> tuple[dict[str, Any], pa.Table]:
        place = tmp_path / str(next(count))
        given = {} if columns is None else {"candidates": write(place / "candidates.parquet", columns)}
        summary, scores = batch(finished, place / "out", **given, **wish)
        return summary["account"], scores

    return run


@pytest.fixture
def pairs(tmp_path: Path, users: list[str], items: list[str]) -> str:
    columns = {"user_id": [u for u in users for _ in items[:10]], "item_id": items[:10] * len(users)}
    return write(tmp_path / "pairs.parquet", columns)
