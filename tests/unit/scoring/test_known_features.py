"""Features that candidates do not tell."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers_model import LOG
from helpers_scoring import batch, finished_run, raw_log, write

from hpgr.errors import ArtifactError
from hpgr.scoring.finished import Finished, open_finished


@pytest.fixture(scope="module")
def branded(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run whose log tells a brand and a price of each item; the brand changes once, in test time."""
    root = tmp_path_factory.mktemp("branded")
    log = raw_log(finished_run(root / "plain").run)
    late = log["timestamp"].to_numpy() > np.quantile(log["timestamp"].to_numpy(), 0.9)
    number = np.array([int(i[1:]) for i in log["item_id"].to_pylist()])
    brand = pa.array([f"b{n % 5}" if not new else "new" for n, new in zip(number, late, strict=True)])
    log = log.append_column("brand", brand).append_column("price", pa.array(number * 1.5))
    features = [*LOG["features"], {"name": "brand", "column": "brand", "role": "item"},
                {"name": "price", "column": "price", "role": "item", "kind": "numeric"}]  # fmt: skip
    return finished_run(root, data={"path": write(root / "log/log.parquet", log), "features": features})


def test_features_of_the_item_come_from_its_last_training_event(branded: Finished, tmp_path: Path) -> None:
    """Left out or told as they were in training: the same scores, for pairs as for top-n. Test time is not read."""
    users = branded.run.prepared.timelines(0)["user"].to_pylist()
    items = branded.run.prepared.vocabulary().items["value"].to_pylist()
    numbers = [int(i[1:]) for i in items] * len(users)
    pairs = {"user_id": [u for u in users for _ in items], "item_id": items * len(users)}
    told = pairs | {"brand": [f"b{n % 5}" for n in numbers], "price": [n * 1.5 for n in numbers]}
    wrong = told | {"brand": ["b0"] * len(numbers)}
    scores = [batch(branded, tmp_path / name, candidates=write(tmp_path / f"{name}.parquet", t))[1].sort_by(
        [("user", "ascending"), ("item", "ascending")]) for name, t in
        (("silent", pairs), ("told", told), ("wrong", wrong))]  # fmt: skip
    silent, right, other = (t["score"].to_numpy() for t in scores)
    np.testing.assert_allclose(silent, right, rtol=0, atol=1e-6)
    assert np.abs(other - right).max() > 1e-3
    _, top = batch(branded, tmp_path / "top", top_n=len(items), retrieve=len(items), measure=True)
    np.testing.assert_allclose(
        top.sort_by([("user", "ascending"), ("item", "ascending")])["score"].to_numpy(), right, rtol=0, atol=1e-6
    )


def test_features_of_the_item_are_unknown_until_its_event(branded: Finished, tmp_path: Path) -> None:
    """In the log's first second, nothing is known of any item."""
    items = branded.run.prepared.vocabulary().items["value"].to_pylist()
    first = branded.run.prepared.manifest["account"]["first_time"] // 10**6
    pairs = {"user_id": ["u"] * len(items), "item_id": items, "timestamp": [first] * len(items)}
    missing = {"brand": pa.nulls(len(items), pa.string()), "price": pa.nulls(len(items), pa.float64())}
    told = {"brand": [f"b{int(i[1:]) % 5}" for i in items], "price": [int(i[1:]) * 1.5 for i in items]}
    silent, unknown, known = (
        batch(branded, tmp_path / name, candidates=write(tmp_path / f"{name}.parquet", pairs | columns))[1]
        .sort_by("item")["score"]
        .to_numpy()
        for name, columns in (("silent", {}), ("missing", missing), ("told", told))
    )
    np.testing.assert_allclose(silent, unknown, rtol=0, atol=1e-6)
    assert np.abs(silent - known).max() > 1e-3


def test_a_run_folder_alone_says_which_features_it_lacks(branded: Finished, tmp_path: Path) -> None:
    """Before the users' log is prepared; with the prepared log, where it is now, or the features, it goes on."""
    log, items = write(tmp_path / "new/log.parquet", raw_log(branded.run)), ["i00001", "i00002"]
    asked = {"users": log, "candidates": write(tmp_path / "items.parquet", {"item_id": items})}
    told = {"item_id": items, "brand": ["b1", "b2"], "price": [1.5, 3.0]}
    place, moved = Path(branded.run.prepared.folder.uri), tmp_path / "moved/log"
    branded.run.prepared.keep(branded.run.folder.sub("prepared"))
    shutil.copytree(place, moved)
    hidden = place.rename(place.with_name("hidden"))
    (hidden / "manifest.json").rename(hidden / "kept.json")
    try:
        alone = open_finished(branded.run.folder.uri)
        with pytest.raises(ArtifactError, match=r"item features brand, price .* --prepared DIR"):
            batch(alone, tmp_path / "out", **asked)
        assert not (tmp_path / "out").exists()
        batch(alone, tmp_path / "told", users=log, candidates=write(tmp_path / "told.parquet", told))
        batch(alone, tmp_path / "out", prepared=str(moved), **asked)
    finally:
        (hidden / "kept.json").rename(hidden / "manifest.json")
        hidden.rename(place)
