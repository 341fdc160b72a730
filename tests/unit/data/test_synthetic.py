"""The generated log: deterministic, free of leaks, with a rule worth learning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from pyarrow import fs
from sklearn.metrics import roc_auc_score

from hpgr.config import Synthetic
from hpgr.data import synthetic
from hpgr.data.synthetic import CHUNK_USERS, HOUR, LOG_COLUMNS, MAX_GAP, START, planted, relevance, write_log
from hpgr.errors import ConfigError, DataError

LOCAL = fs.LocalFileSystem()
KEYS = ["user_id", "item_id", "timestamp"]


def write(folder: Path, **settings: Any) -> tuple[pa.Table, pa.Table]:
    """Log and truth of the settings, in file order."""
    paths = write_log(Synthetic(**settings), str(folder), LOCAL)
    truth = [path.replace("/log/", "/truth/") for path in paths]
    return ds.dataset(paths).to_table(), ds.dataset(truth).to_table()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def sorted_times(views: pd.DataFrame) -> pd.DataFrame:
    return views.sort_values(["user_id", "timestamp"], kind="stable")


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Views, impressions and truth with the default settings."""
    log, truth = (t.to_pandas() for t in write(tmp_path_factory.mktemp("default")))
    views, shown = (log[log.event == kind].reset_index(drop=True) for kind in ("view", "impression"))
    assert len(views) + len(shown) == len(log)
    return views, shown, truth


def test_the_same_settings_give_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(tmp_path / name, users=30, seed=seed)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert sorted(a) == ["_DONE", "log/part-00000.parquet", "truth/part-00000.parquet"]
    assert a == b
    assert all(a[name] != c[name] for name in a)


def test_a_users_rows_do_not_depend_on_the_number_of_users(tmp_path: Path) -> None:
    few, more = CHUNK_USERS + 20, CHUNK_USERS * 2 + 5
    for small, large in zip(write(tmp_path / "s", users=few), write(tmp_path / "l", users=more), strict=True):
        old = [f"u{n:06d}" for n in range(few)]
        assert small.column("user_id").unique().to_pylist() == old
        assert len(large.column("user_id").unique()) == more
        assert large.filter(pc.is_in(large["user_id"], pa.array(old))).equals(small)


def test_columns_of_the_log(tmp_path: Path) -> None:
    log, truth = write(tmp_path, users=20)
    assert log.schema.remove_metadata() == pa.schema(
        {
            "user_id": pa.string(),
            "item_id": pa.string(),
            "timestamp": pa.int64(),
            "event": pa.string(),
            "clicked": pa.int8(),
            "list_id": pa.string(),
            "slot": pa.int32(),
            "device": pa.string(),
        }
    )
    assert tuple(log.column_names) == LOG_COLUMNS
    is_view = pc.equal(log["event"], "view")
    for name in ("clicked", "list_id", "slot"):
        assert log[name].is_null().equals(is_view)
    assert truth.select(KEYS).equals(log.filter(pc.invert(is_view)).select(KEYS))
    assert set(log["device"].to_pylist()) == {"phone", "tablet", "desktop"}


def test_engagements_fall_into_sessions(default: tuple[pd.DataFrame, ...]) -> None:
    views = sorted_times(default[0])
    gap = views.groupby("user_id").timestamp.diff().dropna()
    assert gap.gt(0).all()
    assert not gap.between(MAX_GAP + 1, HOUR - 1).any()
    sessions = 1 + gap.ge(HOUR).groupby(views.user_id).sum()
    assert sessions.min() >= 2
    assert abs(sessions.mean() - 8) < 0.3
    assert abs(len(views) / sessions.sum() - 7) < 0.2
    assert views.timestamp.min() >= START
    assert views.timestamp.max() < START + 33 * 86_400
    assert default[0].groupby("user_id").device.nunique().eq(1).all()


def test_lists_hold_distinct_items_and_follow_an_engagement(default: tuple[pd.DataFrame, ...]) -> None:
    views, shown, _ = default
    lists = shown.groupby("list_id")
    assert lists.slot.apply(list).map(lambda slots: slots == [0, 1, 2, 3]).all()
    assert lists.item_id.nunique().eq(4).all()
    assert lists[["timestamp", "user_id"]].nunique().eq(1).all(axis=None)
    assert abs(lists.ngroups / 1600 - 5) < 0.3
    first = views.groupby("user_id").timestamp.min()
    assert (shown.timestamp > shown.user_id.map(first)).all()


def test_the_truth_predicts_clicks_and_popularity_does_not(default: tuple[pd.DataFrame, ...]) -> None:
    views, shown, truth = default
    clicked = shown.clicked.astype(int)
    oracle = roc_auc_score(clicked, truth.probability)
    popularity = roc_auc_score(clicked, shown.item_id.map(views.item_id.value_counts()).fillna(0))
    assert 0.78 < oracle < 0.88
    assert popularity < 0.65 < oracle - 0.1
    assert 0.15 < clicked.mean() < 0.30


def test_clicks_are_drawn_from_the_truth(default: tuple[pd.DataFrame, ...]) -> None:
    _, shown, truth = default
    tenth = pd.qcut(truth.probability, 10)
    observed = shown.clicked.groupby(tenth, observed=True).mean()
    assert np.allclose(observed, truth.probability.groupby(tenth, observed=True).mean(), atol=0.03)


def test_popularity_is_skewed_inside_categories(tmp_path: Path) -> None:
    for skew, low, high in ((0.0, 1.0, 2.0), (1.2, 5.0, 50.0)):
        log, _ = write(tmp_path / str(skew), users=500, items=40, categories=2, interests=1, skew=skew)
        counts = log.filter(pc.equal(log["event"], "view"))["item_id"].value_counts()
        n = np.sort(counts.field("counts").to_numpy())[::-1]
        assert low < n[:4].mean() / n[-4:].mean() < high


def test_relevance_holds_every_strictly_past_pair(tmp_path: Path) -> None:
    settings = Synthetic(users=CHUNK_USERS + 8)
    users = [f"u{n:06d}" for n in (3, 0, CHUNK_USERS + 7)]
    pairs = relevance(settings, users).to_pandas()
    log, _ = write(tmp_path, users=settings.users)
    log = log.to_pandas().query("user_id in @users")
    views, shown = log[log.event == "view"], log[log.event == "impression"]
    expected = shown[KEYS].merge(views[KEYS], on="user_id", suffixes=("", "_past"))
    expected = expected[expected.timestamp_past < expected.timestamp]
    got = pairs[[*KEYS, "past_item_id", "past_timestamp"]]
    assert sorted(got.itertuples(index=False, name=None)) == sorted(expected.itertuples(index=False, name=None))
    assert (pairs.past_timestamp < pairs.timestamp).all()
    assert relevance(settings, []).num_rows == 0


def test_weights_decay_and_noise_has_none() -> None:
    settings = Synthetic(users=100, memory_days=2.0)
    pairs = relevance(settings, [f"u{n:06d}" for n in range(100)]).to_pandas()
    assert (pairs.weight[pairs.is_noise] == 0).all()
    past = pairs.drop_duplicates(["user_id", "past_timestamp"])
    assert abs(past.is_noise.mean() - settings.noise) < 0.04
    relevant = pairs[pairs.weight > 0]
    assert 0.1 < len(relevant) / len(pairs) < 0.4
    age = (relevant.timestamp - relevant.past_timestamp) / 86_400
    assert np.allclose(relevant.weight, np.exp(-age / 2.0))


def test_noise_share_follows_the_setting() -> None:
    for noise in (0.0, 0.6):
        pairs = relevance(Synthetic(users=60, noise=noise), [f"u{n:06d}" for n in range(60)]).to_pandas()
        assert abs(pairs.is_noise.mean() - noise) < 0.05


def test_probability_is_explained_by_relevance_alone(tmp_path: Path) -> None:
    """Log-odds less the item's quality rise with the summed weights, by one function for all users."""
    settings = Synthetic(users=40)
    _, truth = write(tmp_path, users=40)
    evidence = relevance(settings, [f"u{n:06d}" for n in range(40)]).to_pandas().groupby(KEYS).weight.sum()
    rows = truth.to_pandas().merge(evidence.reset_index(), on=KEYS)
    assert len(rows) == truth.num_rows
    logit = np.log(rows.probability / (1 - rows.probability))
    quality = synthetic._world(settings).quality[rows.item_id.str[1:].astype(int)]
    order = np.argsort(rows.weight.to_numpy(), kind="stable")
    assert (np.diff((logit - quality).to_numpy()[order]) > -1e-9).all()


def test_without_strength_probability_is_a_matter_of_the_item(tmp_path: Path) -> None:
    _, truth = write(tmp_path / "off", users=200, strength=0.0)
    assert truth.to_pandas().groupby("item_id").probability.nunique().eq(1).all()
    _, truth = write(tmp_path / "on", users=200)
    assert not truth.to_pandas().groupby("item_id").probability.nunique().eq(1).all()


def test_rows_grow_with_users_and_knobs(tmp_path: Path) -> None:
    def rows(name: str, **settings: Any) -> int:
        return write(tmp_path / name, **settings)[0].num_rows

    base = rows("base", users=300)
    assert abs(base / (300 * (8 * 7 + 5 * 4)) - 1) < 0.1
    assert abs(rows("users", users=1200) / base - 4) < 0.2
    assert rows("sessions", users=300, sessions=16) > 1.5 * base
    assert abs(rows("lists", users=300, list_size=8) - base - 300 * 5 * 4) < 300 * 4


def test_a_second_call_does_nothing_and_other_settings_replace_the_log(tmp_path: Path) -> None:
    settings = Synthetic(users=CHUNK_USERS + 1)
    paths = write_log(settings, str(tmp_path), LOCAL)
    assert [Path(p).name for p in paths] == ["part-00000.parquet", "part-00001.parquet"]
    Path(paths[0]).write_bytes(b"untouched")
    assert write_log(settings, str(tmp_path), LOCAL) == paths
    assert Path(paths[0]).read_bytes() == b"untouched"
    (tmp_path / "log" / "notes.txt").write_text("not ours")
    (path,) = write_log(Synthetic(users=9), str(tmp_path), LOCAL)
    assert sorted(p.name for p in (tmp_path / "log").iterdir()) == ["notes.txt", "part-00000.parquet"]
    assert len(pq.read_table(path)["user_id"].unique()) == 9
    assert json.loads((tmp_path / "_DONE").read_text())["users"] == 9


def test_an_interrupted_write_is_done_again(tmp_path: Path) -> None:
    settings = Synthetic(users=9)
    write_log(settings, str(tmp_path), LOCAL)
    whole = contents(tmp_path)
    (tmp_path / "_DONE").unlink()
    (tmp_path / "log" / "part-00000.parquet").write_bytes(b"cut sho")
    write_log(settings, str(tmp_path), LOCAL)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(
    "extreme",
    [
        {"items": 20, "categories": 20, "interests": 20, "list_size": 10},
        {"items": 20, "categories": 2, "interests": 1, "list_size": 10, "skew": 3.0},
        {"sessions": 1, "session_events": 1, "impressions": 1, "list_size": 1},
        {"memory_days": 1e-3, "skew": 0.0, "noise": 0.0},
    ],
)
def test_extreme_settings_work(tmp_path: Path, extreme: dict[str, Any]) -> None:
    log, truth = write(tmp_path, users=25, **extreme)
    assert len(log["user_id"].unique()) == 25
    assert np.isfinite(truth["probability"].to_numpy()).all()
    per_list = log.to_pandas().dropna().groupby("list_id").item_id.nunique()
    assert per_list.eq(Synthetic(**extreme).list_size).all()


@pytest.mark.parametrize(
    "impossible",
    [{"items": 20, "categories": 21}, {"categories": 4, "interests": 5}, {"items": 20, "list_size": 11}],
)
def test_impossible_worlds_are_refused_before_anything_is_written(tmp_path: Path, impossible: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"data\.synthetic\.\w+: got \d+, expected at most \d+"):
        write_log(Synthetic(**impossible), str(tmp_path / "log"), LOCAL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("user_id", ["u000005", "000001", "u1", "everyone"])
def test_unknown_users_are_refused(user_id: str) -> None:
    with pytest.raises(DataError, match="expected u000000 to u000004"):
        relevance(Synthetic(users=5), [user_id])


def test_what_is_planted_is_what_relevance_weighs() -> None:
    """The compact form says the same of every pair: relevant if of one category and not noise."""
    settings = Synthetic(users=CHUNK_USERS + 20)
    items, events = (t.to_pandas() for t in planted(settings))
    assert len(items) == items.item_id.nunique() == settings.items
    assert not events.duplicated(["user_id", "timestamp"]).any()
    assert events.user_id.nunique() == settings.users
    pairs = relevance(settings, ["u000003", "u000100", f"u{CHUNK_USERS + 5:06d}"]).to_pandas()
    category = items.set_index("item_id").category
    known = pairs.merge(events, left_on=["user_id", "past_timestamp"], right_on=["user_id", "timestamp"])
    assert len(known) == len(pairs) > 1000
    same = category[known.item_id].to_numpy() == category[known.past_item_id].to_numpy()
    assert ((known.weight > 0) == (same & ~known.is_noise_y)).all()
    assert (known.is_noise_x == known.is_noise_y).all()
