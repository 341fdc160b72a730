"""What lists tell of their candidates, against plain Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers_log import item_names, one_user, users
from helpers_model import LOG, tiny

from hpgr.data.lists import last_engaged, list_columns, list_features
from hpgr.data.preparation import Prepared
from hpgr.data.timelines import column_names
from hpgr.errors import ConfigError
from hpgr.schema import SECOND, Array, Floats, Ints, offsets_of

Make = Callable[..., Any]
USERS, ITEMS, LISTS = 4, 9, 12


class Shown:
    """Random histories, one of them empty, and lists of 1 to 6 candidates; some candidates are of no list."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        lengths = np.append(rng.integers(1, 12, USERS - 1), 0)
        self.h_offsets, self.h_item = offsets_of(lengths), rng.integers(0, ITEMS, lengths.sum())
        size = rng.integers(1, 7, LISTS)
        user = rng.integers(0, USERS, LISTS)
        seen = (rng.random(LISTS) * (lengths[user] + 1)).astype(np.int64)
        self.listed = np.repeat(np.where(rng.random(LISTS) < 0.2, -1, rng.permutation(50)[:LISTS]), size)
        self.row, self.visible = np.repeat(user, size), np.repeat(seen, size)
        self.item = rng.integers(0, ITEMS, len(self.row))
        self.values = np.where(rng.random((len(self.row), 2)) < 0.2, np.nan, rng.normal(size=(len(self.row), 2)))

    def features(self, h_item: Array | None = None) -> Floats:
        history = self.h_item if h_item is None else h_item
        return list_features(
            self.h_offsets, history, self.row, self.item, self.visible, self.listed, self.values.astype(np.float32)
        )

    def past(self, candidate: int) -> list[int]:
        start = int(self.h_offsets[self.row[candidate]])
        return self.h_item[start : start + int(self.visible[candidate])].tolist()

    def last(self, candidate: int) -> int:
        places = [place for place, item in enumerate(self.past(candidate)) if item == self.item[candidate]]
        return max(places, default=-1)


def mean_of(values: list[float]) -> float:
    known = [v for v in values if not np.isnan(v)]
    return sum(known) / len(known) if known else np.nan


@pytest.mark.parametrize("seed", range(6))
def test_they_equal_the_loop(seed: int) -> None:
    shown = Shown(seed)
    got, preferred_lists = shown.features(), 0
    for i in range(len(shown.row)):
        if shown.listed[i] < 0:
            assert np.isnan(got[i]).all()
            continue
        mates = np.flatnonzero(shown.listed == shown.listed[i]).tolist()
        latest = max(shown.last(m) for m in mates)
        preferred = [m for m in mates if latest >= 0 and shown.last(m) == latest]
        preferred_lists += bool(preferred)
        expected = [len(mates), sum(shown.last(m) >= 0 for m in mates)]
        for of in (mates, preferred):
            expected += [shown.values[i, g] - mean_of(shown.values[of, g].tolist()) for g in range(2)]
        np.testing.assert_allclose(got[i], expected, rtol=1e-4, atol=1e-5)
    assert preferred_lists
    assert np.isnan(got).any()


@pytest.mark.parametrize("seed", range(3))
def test_they_do_not_know_what_follows(seed: int) -> None:
    """Each candidate's own future alone, since visible counts differ."""
    shown = Shown(seed)
    before, told = shown.features(), 0
    for i in range(len(shown.row)):
        start, stop = shown.h_offsets[shown.row[i] : shown.row[i] + 2]
        future = np.arange(start + shown.visible[i], stop)
        other = shown.h_item.copy()
        other[future] = shown.item[i]
        np.testing.assert_array_equal(shown.features(other)[i], before[i])
        past = np.arange(start, start + shown.visible[i])
        other[past] = shown.item[i]
        told += bool(len(past)) and not np.array_equal(shown.features(other)[i], before[i], equal_nan=True)
    assert told


def test_the_order_of_candidates_plays_no_part() -> None:
    shown = Shown(1)
    before = shown.features()
    order = np.random.default_rng(0).permutation(len(shown.row))
    for name in ("row", "item", "visible", "listed", "values"):
        setattr(shown, name, getattr(shown, name)[order])
    np.testing.assert_array_equal(shown.features(), before[order])


def test_the_last_engagement_is_found_in_long_timelines() -> None:
    rng = np.random.default_rng(0)
    offsets, item = np.array([0, 3000, 3001]), rng.integers(0, 1 << 30, 3001)
    row: Ints = np.array([0, 0, 1, 1])
    wanted = item[[10, 2999, 3000, 10]]
    assert last_engaged(offsets, item, row, wanted, np.array([11, 2999, 1, 1])).tolist() == [10, -1, 0, -1]
    assert last_engaged(np.array([0, 0]), item[:0], row[:2] * 0, wanted[:2], np.zeros(2, int)).tolist() == [-1, -1]


def test_a_log_names_its_lists_numbers() -> None:
    listed = tiny(data=LOG).data
    names = ["list:size", "list:engaged", "list:place:mean", "list:place:preferred"]
    assert list_columns(listed) == names
    assert column_names(listed, "t_", "num", names) == ["place", *names]
    assert column_names(listed, "t_", "cat", names) == ["slot", "device"]
    alone = tiny(data=LOG | {"columns": LOG["columns"] | {"request": None}}).data
    assert list_columns(alone) == []


def test_a_feature_may_not_take_their_names() -> None:
    feature = {"name": "list:size", "column": "slot", "role": "candidate"}
    with pytest.raises(ConfigError, match="may not begin with 'list:'"):
        tiny(data=LOG | {"features": [feature]})


# Whole logs


def numbers(prepared: Prepared, name: str, user: str = "a") -> dict[str, float]:
    """A list column of the user's last request, by item."""
    width, place = 1 + len(list_columns(LISTED)), 1 + list_columns(LISTED).index(name)
    row = users(prepared)[user]
    column = np.array(row["t_num"], np.float32).reshape(-1, width)[:, place].tolist()
    every = zip(row["t_time"], item_names(prepared, row["t_item"]), column, strict=True)
    out = {item: number for time, item, number in every if time == max(row["t_time"])}
    assert "?" not in out
    return out


def pages(rows: list[tuple[int, str, int, int, int | None]]) -> list[dict[str, Any]]:
    """Shown rows of user a (page, item, second, place, label), after a page each of twenty other users."""
    names = ("page", "item_id", "timestamp", "place", "clicked")
    others = [(u, (0, f"i{(3 * u + k) % 10}", u, k, int(k == 1))) for u in range(20) for k in range(3)]
    every = [(f"u{u}", row) for u, row in others] + [("a", row) for row in rows]
    shown = [{"user_id": user, "shown": 1} | dict(zip(names, row, strict=True)) for user, row in every]
    return [row | {"timestamp": 1_600_000_000 + row["timestamp"]} for row in shown]


SETTINGS: dict[str, Any] = {
    "columns": {"label": "clicked", "request": ["page"]},
    "features": [{"name": "place", "column": "place", "role": "candidate", "kind": "numeric"}],
    "split": {"by": "time_fraction", "validation": 0.2, "test": 0.2},
}
LISTED = tiny(data=LOG | SETTINGS).data


def test_a_list_is_what_was_shown_not_what_has_a_label(prepare_log: Make) -> None:
    """What follows the click has no label: were it left out, the last of a list would be the clicked one."""
    page = [(7, f"i{k}", 500, k, [0, 0, 1, None, None, None][k]) for k in range(6)]
    prepared = prepare_log(pages(page), **SETTINGS, impressions=[[{"column": "shown", "value": 1}]])
    assert numbers(prepared, "list:size") == dict.fromkeys(["i0", "i1", "i2"], 6)
    mean = numbers(prepared, "list:place:mean")
    assert mean["i0"] < mean["i1"] < mean["i2"] < 0, "the labelled ones stand above the middle"
    assert set(numbers(prepared, "list:size", "u3").values()) == {3}
    told = prepare_log(pages(page), name="told", **SETTINGS)  # without rules a label says what was shown
    assert set(numbers(told, "list:size").values()) == {3}


@pytest.mark.parametrize("late", ["clicks", "all but the first"])
def test_a_log_whose_rows_have_times_of_their_own_compares_no_lists(
    prepare_log: Make, capsys: pytest.CaptureFixture[str], late: str
) -> None:
    """A click logged when it happened would stand alone in its second; what precedes it in a feed would tell it."""
    rows = pages([(7, f"i{k}", 500, k, int(k == 3)) for k in range(6)])
    for row in rows:
        row["timestamp"] += 7 * (row["clicked"] if late == "clicks" else row["place"])
    prepared = prepare_log(rows, **SETTINGS)
    assert prepared.manifest["features"]["t_num"] == ["place"]
    assert {len(r["t_num"]) / len(r["t_item"]) for r in users(prepared).values()} == {1.0}
    assert "100.0% of training's clicks or other impressions come seconds after" in capsys.readouterr().out
    assert set(users(prepared)["a"]["t_time"]) == {1_600_000_500 * SECOND}, "the list's first row"


def test_a_few_late_rows_leave_lists_as_they_are(prepare_log: Make) -> None:
    """Of 1,600 training impressions without a click one may come later than its list, two may not."""
    for late in (1, 2):
        rows = [{"user_id": f"u{u}", "page": u, "item_id": f"i{k}", "timestamp": 1_600_000_000 + u, "place": k,
                 "clicked": int(k == 0)} for u in range(1334) for k in range(3)]  # fmt: skip
        for row in rows[1 : 3 * late : 3]:
            row["timestamp"] += 5
        prepared = prepare_log(rows, name=f"late-{late}", **SETTINGS)
        assert prepared.lists == ([] if late > 1 else list_columns(LISTED))


def test_a_row_without_a_label_begins_its_list(prepare_log: Make) -> None:
    """What the user did after it was shown is not seen by the rest of the list."""
    page = [(7, "i0", 500, 0, None), (7, "i1", 505, 1, 0), (7, "i2", 505, 2, 1)]
    rules = {"impressions": [[{"column": "shown", "value": 1}]], "history": [[{"column": "clicked", "value": 1}]]}
    prepared = prepare_log(pages([(1, "i2", 300, 0, 1), (2, "i1", 502, 0, 1), *page]), **SETTINGS, **rules)
    row = users(prepared)["a"]
    assert row["t_time"] == [1_600_000_000 * SECOND + s * SECOND for s in (300, 500, 500, 502)]
    assert row["t_visible"] == [0, 1, 1, 1]


def test_rows_shown_later_tell_nothing(prepare_log: Make) -> None:
    """A feed of one request, a pair of rows every 5 seconds, ends with the click, in a log that has few of them."""
    feed = [(7, f"i{k}", 500 + 5 * (k // 2), k, int(k == 5)) for k in range(6)]
    prepared = prepare_log(pages(feed), **SETTINGS)
    assert numbers(prepared, "list:size") == dict.fromkeys([f"i{k}" for k in range(6)], 2)
    mean = numbers(prepared, "list:place:mean")
    assert mean["i0"] < 0 < mean["i1"]
    np.testing.assert_allclose([mean[f"i{k}"] for k in range(6)], [mean["i0"], mean["i1"]] * 3, rtol=1e-4)


def test_the_preferred_item_is_the_one_engaged_with_last(prepare_log: Make) -> None:
    seen = [(1, "i4", 100, 0, 1), (2, "i2", 200, 0, 1), (3, "i9", 300, 0, 1)]
    page = [(7, f"i{k}", 500, k, int(k == 3)) for k in range(6)]
    prepared = prepare_log(pages(seen + page), **SETTINGS, history=[[{"column": "clicked", "value": 1}]])
    assert set(numbers(prepared, "list:engaged").values()) == {2}
    above = numbers(prepared, "list:place:preferred")
    assert above["i2"] == 0 < above["i3"]
    np.testing.assert_allclose([above[f"i{k}"] / above["i3"] for k in range(6)], range(-2, 4), rtol=1e-3)


def test_of_two_rows_that_differ_by_a_rule_alone_the_shown_one_stays(prepare_log: Make) -> None:
    page = [(7, f"i{k}", 500, k, [0, 1, None][k]) for k in range(3)]
    rows = pages(page)
    twin = {**rows[-1], "shown": 0}
    for name, order in (("before", [twin, *rows]), ("after", [*rows, twin])):
        prepared = prepare_log(order, name=name, **SETTINGS, impressions=[[{"column": "shown", "value": 1}]])
        assert prepared.manifest["account"]["duplicates"] == 1
        assert numbers(prepared, "list:size") == {"i0": 3, "i1": 3}


def test_a_request_that_one_of_its_columns_does_not_name_is_none(prepare_log: Make) -> None:
    """Rows without a page, told by their day alone, would be one list."""
    rows = [r | {"page": None if k < 4 else f"p{k // 2}", "day": "monday"} for k, r in enumerate(one_user(20))]
    row = users(prepare_log(rows, columns={"label": "clicked", "request": ["page", "day"]}))["a"]
    assert row["t_request"][:4] == [-1] * 4
    assert -1 not in row["t_request"][4:]


def test_rows_of_one_second_are_not_late(prepare_log: Make) -> None:
    """However fine the clock: milliseconds of a page are its making, not its clicks'."""
    rows = pages([(7, f"i{k}", 500, k, int(k == 3)) for k in range(6)])
    for row in rows:
        row["timestamp"] = row["timestamp"] * 1000 + 100 * row["place"]
    assert prepare_log(rows, **SETTINGS, time_unit="ms").lists == list_columns(LISTED)
