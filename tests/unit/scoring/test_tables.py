"""The scorer of notebooks, and the names of the package."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from helpers_scoring import assert_same, batch, evaluated, finished_run, impressions, write

import hpgr
from hpgr.errors import ArtifactError, ConfigError, DataError, HpgrError
from hpgr.scoring.finished import Finished


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished_run(tmp_path_factory.mktemp("run"))


def test_scores_of_a_table_are_those_of_evaluation_and_of_a_batch_job(finished: Finished, tmp_path: Path) -> None:
    candidates = impressions(finished.run)
    scores = hpgr.Scorer(finished.run.folder.uri).score(candidates)
    truth = evaluated(finished)
    place = truth.column_names.index("time")
    assert_same(scores, truth.set_column(place, "time", truth["time"].cast(scores.schema.field("time").type)))
    assert_same(scores, batch(finished, tmp_path / "out", candidates=write(tmp_path / "c.parquet", candidates))[1])


def test_a_frame_gives_a_frame(finished: Finished) -> None:
    scorer = hpgr.Scorer(finished.run.folder.uri)
    frame = impressions(finished.run).to_pandas()
    scores = scorer.score(frame, explain=True)
    assert isinstance(scores, pd.DataFrame)
    assert len(scores) == len(frame)
    assert scores["score"].between(0, 1).all()
    assert scores["anchors"].map(len).max() > 0
    assert set(scores["run"]) == {scorer.id}


def test_the_moment_decides_what_is_seen(finished: Finished) -> None:
    scorer = hpgr.Scorer(finished.run.folder.uri)
    user = finished.run.prepared.timelines(0)["user"][0].as_py()
    pairs = pa.table({"user_id": [user] * 3, "item_id": ["1", "2", "3"]})
    moments = (
        None,
        "1999-01-01",
        pd.Timestamp("1999-01-01"),
        datetime(1999, 1, 1, 1, tzinfo=timezone(timedelta(hours=1))),
    )
    now, *before = (scorer.score(pairs, at=at)["score"].to_numpy() for at in moments)
    assert not np.allclose(now, before[0])
    assert all(np.array_equal(scores, before[0]) for scores in before)


def test_faults_are_told(finished: Finished, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no run"):
        hpgr.Scorer(str(tmp_path))
    with pytest.raises(HpgrError, match="item_id"):
        hpgr.Scorer(finished.run.folder.uri).score(pd.DataFrame({"user": ["u"]}))


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("item_id", ["1", None, "3"], "1 of 3 candidates cannot be scored (1 null item id)"),
        ("timestamp", [1.7e12] * 3, "3 of 3 candidates cannot be scored (3 time outside data.earliest"),
    ],
)
def test_a_row_that_cannot_be_used_is_an_error(finished: Finished, column: str, values: list[Any], words: str) -> None:
    """Milliseconds in a log of seconds are one."""
    table = pa.table({"user_id": ["u"] * 3, "item_id": ["1", "2", "3"]} | {column: values})
    with pytest.raises(DataError, match=re.escape(words)):
        hpgr.Scorer(finished.run.folder.uri).score(table)


def test_top_n_of_some_users_is_theirs_of_all(finished: Finished, tmp_path: Path) -> None:
    scorer = hpgr.Scorer(finished.run.folder.uri)
    everyone = batch(finished, tmp_path / "out", top_n=3)[1].to_pandas()
    chosen = sorted(everyone["user"].unique())[:4]
    ours = scorer.top_n(3, [*chosen, "nobody"]).sort_values(["user", "rank"])
    theirs = everyone[everyone["user"].isin(chosen)].sort_values(["user", "rank"])
    assert ours[["user", "item", "rank"]].to_numpy().tolist() == theirs[["user", "item", "rank"]].to_numpy().tolist()
    np.testing.assert_allclose(ours["score"], theirs["score"], rtol=0, atol=1e-5)
    assert len(ours) == 12
    assert len(scorer.top_n(3)) == len(everyone)
    with pytest.raises(ConfigError, match="n: got 0, expected 1 or more"):
        scorer.top_n(0)


def test_a_run_is_loaded_from_a_store(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.fs as pafs

    from hpgr import artifacts

    home = Path(finished.run.folder.uri)
    store = pafs.SubTreeFileSystem(str(home.parent), pafs.LocalFileSystem())
    local = artifacts.resolve
    monkeypatch.setattr(artifacts, "resolve", lambda p: (store, p[7:]) if p.startswith("gs://b/") else local(p))
    assert hpgr.Scorer(f"gs://b/{home.name}", device="cpu").id == hpgr.Scorer(home).id


def test_the_package_loads_nothing_that_is_not_asked_for() -> None:
    code = (
        "import sys, hpgr; assert not {'torch', 'ray', 'pyarrow', 'pandas'} & set(sys.modules);"
        "hpgr.Scorer; assert 'torch' in sys.modules and 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="Scorer, __version__, prepare, train"):
        hpgr.fit  # noqa: B018
    assert set(hpgr.__all__) <= set(dir(hpgr))


def test_top_n_leaves_out_the_past_where_asked_and_takes_ids_of_any_kind(finished: Finished, tmp_path: Path) -> None:
    scorer = hpgr.Scorer(finished.run.folder.uri)
    ours, theirs = (
        t.sort_values(["user", "rank"])[["user", "item", "rank"]].to_numpy().tolist()
        for t in (
            scorer.top_n(3, drop_seen=True),
            batch(finished, tmp_path / "out", top_n=3, drop_seen=True)[1].to_pandas(),
        )
    )
    assert ours == theirs
    assert ours != scorer.top_n(3).sort_values(["user", "rank"])[["user", "item", "rank"]].to_numpy().tolist()
    assert len(scorer.top_n(3, [7])) == 0, "no such user, and no error"
