"""Windows of next-item queries under leave-one-out: the item to find is the held-out impression itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_log import Make, T, item_names

from hpgr.artifacts import Folder
from hpgr.data.batches import Assembler, next_item_batch
from hpgr.data.preparation import Prepared, in_process
from hpgr.data.stream import build_index
from hpgr.data.windows import Windows, next_item_windows, query_windows, training_windows
from hpgr.schema import SPLITS, TRAIN, Batch, Timelines

EARLY: list[dict[str, Any]] = [
    {"user_id": "a", "item_id": f"early{k}", "timestamp": T + k, "clicked": k % 2, "price": 0.0} for k in range(3)
]
LEFT = {"by": "leave_one_out"}


def page(*items: str, second: int = 10, **more: Any) -> list[dict[str, Any]]:
    """Rows of one second."""
    return [{"user_id": "a", "item_id": i, "timestamp": T + second, "clicked": 1, **more} for i in items]


def timelines(prepared: Prepared) -> Timelines:
    """Those of a log of one bucket."""
    assert prepared.buckets == 1
    return Timelines.from_table(prepared.timelines(0))


def query(prepared: Prepared, config: Make, folder: Path, split: str, by: str = "leave_one_out") -> Batch:
    """The split's queries, as a run has them."""
    of_log = config(data={"split": {"by": by}})
    uri = build_index(prepared, of_log, Folder(str(folder)), f"next_item-{split}", in_process)
    table = Folder(str(folder)).read_parquet(uri.rpartition("/")[2])
    return next_item_batch(Assembler({0: prepared.timelines(0)}, 30.0), Windows.from_table(table))


def test_of_a_page_in_one_second_each_split_finds_its_own_row(prepare_log: Make, config: Make, tmp_path: Path) -> None:
    """Four rows share the last second: two are history to both queries, then comes validation's, then the test's."""
    prepared = prepare_log(EARLY + page("x1", "x2", "x3", "x4"), split=LEFT)
    t = timelines(prepared)
    for name, at in (("validation", 5), ("test", 6)):
        batch = query(prepared, config, tmp_path / name, name)
        assert batch.h_item.tolist() == t.h_item[: at + 1].tolist()
        assert batch.h_item[-1] == t.t_item[t.t_split == SPLITS[name]]
        assert batch.h_visible[-1] == at
        assert sorted(batch.t_item.tolist()) == sorted(t.h_item[:at].tolist())
    trained = training_windows(t, config().stream, 0)
    assert item_names(prepared, t.h_item[: trained.stop[0]].tolist()) == ["early0", "early1", "early2"]


def test_rows_of_one_item_and_second_are_told_apart(prepare_log: Make, config: Make, tmp_path: Path) -> None:
    """The last two impressions are one item twice; content alone, which no stream shows, makes them two rows."""
    rows = EARLY + page("x", price=1.0) + page("x", price=2.0)
    price = {"name": "price", "column": "price", "role": "event", "kind": "numeric"}
    prepared = prepare_log(rows, split=LEFT, features=[price])
    lengths = [query(prepared, config, tmp_path / s, s).h_lengths.tolist() for s in ("validation", "test")]
    assert lengths == [[4], [5]]


def test_an_event_that_is_no_impression_is_not_the_truth(prepare_log: Make, config: Make, tmp_path: Path) -> None:
    prepared = prepare_log(EARLY + page("x1", "x2") + page("x1", "x2", clicked=None), split=LEFT)
    t = timelines(prepared)
    batch = query(prepared, config, tmp_path, "test")
    place = batch.h_lengths[0] - 1
    assert (t.h_item[place], t.h_action[place]) == (t.t_item[-1], t.t_action[-1])


@pytest.mark.parametrize(
    ("asked", "lengths"),
    [
        ({"history": [[{"column": "item_id", "value": "early0"}]]}, []),
        ({"columns": {"label": "clicked", "request": ["list"]}}, [3 + 1]),
    ],
    ids=["no event", "a list"],
)
def test_what_has_no_event_of_its_own_goes_by_time(
    prepare_log: Make, config: Make, tmp_path: Path, asked: Any, lengths: list[int]
) -> None:
    rows = [{**row, "list": f"of {row['timestamp']}"} for row in EARLY + page("x1", "x2")]
    prepared = prepare_log(rows, split=LEFT, **asked)
    assert query(prepared, config, tmp_path, "test").h_lengths.tolist() == lengths


def test_other_splits_still_end_before_their_first_second(prepare_log: Make, config: Make, tmp_path: Path) -> None:
    split = {"by": "user_fraction", "validation": 0.2, "test": 0.3}
    prepared = prepare_log(EARLY + page("x1", "x2", "x3", "x4"), split=split)
    t = timelines(prepared)
    assert np.unique(t.t_split[t.t_time == t.t_time[-1]]).tolist() != [TRAIN]
    for name in ("validation", "test"):
        assert query(prepared, config, tmp_path / name, name, "user_fraction").h_lengths.tolist() == [3 + 1]


def test_a_query_comes_a_second_after_its_history(prepare_log: Make, config: Make, tmp_path: Path) -> None:
    """As near as training knows events to be to those that they see; after no history it is at the moment given."""
    prepared = prepare_log(EARLY + page("x", "y"), split=LEFT)
    t = timelines(prepared)
    batch = query(prepared, config, tmp_path, "test")
    assert batch.h_time[-1] == t.h_time[batch.h_lengths[0] - 2] + 1_000_000


def test_a_query_leaves_room_in_the_window_for_its_hidden_event(prepare_log: Make, config: Make) -> None:
    """Of a long past the last events: with the hidden one there are as many as training's windows hold."""
    t = timelines(prepare_log(EARLY + page("x", "y", "z"), split=LEFT))
    stream = config(stream={"window": 4}).stream
    windows = [query_windows(t, stream, np.array([0]), np.array([seen])) for seen in range(7)]
    assert [(int(w.start[0]), int(w.stop[0])) for w in windows] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 4),
        (2, 5),
        (3, 6),
    ]


def test_users_have_a_next_item_in_logs_that_begin_before_1970(prepare_log: Make, config: Make) -> None:
    """Times may be relative, and below nought."""
    rows = EARLY + page("x", "y") + page("z", second=20)
    of_old = [row | {"timestamp": row["timestamp"] - T - 15} for row in rows]
    found = []
    for name, log, earliest in (("new", rows, "1990-01-01"), ("old", of_old, "1960-01-01")):
        t = timelines(prepare_log(log, name=name, earliest=earliest, split=LEFT))
        windows = [next_item_windows(t, config().stream, 0, SPLITS[s]) for s in ("validation", "test")]
        found.append([(w.start.tolist(), w.stop.tolist()) for w in windows])
    assert found[0] == found[1] == [([0], [3]), ([0], [5])]


@pytest.mark.parametrize("price", range(6))
def test_a_view_of_the_held_out_item_in_its_second_is_not_the_truth(
    prepare_log: Make, config: Make, tmp_path: Path, price: int
) -> None:
    """Hashes of content decide which comes first; taken for the truth, a later view would show the query its answer."""
    rows = page("x", price=price) + page("x", price=price, clicked=None)
    feature = {"name": "price", "column": "price", "role": "event", "kind": "numeric"}
    prepared = prepare_log(EARLY + rows, split=LEFT, features=[feature])
    t = timelines(prepared)
    place = query(prepared, config, tmp_path, "test").h_lengths[0] - 1
    assert (t.h_item[place], t.h_action[place]) == (t.t_item[-1], t.t_action[-1])
