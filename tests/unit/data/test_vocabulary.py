"""What is counted in training time, and which words stand for what was done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from helpers_log import Make, T, one_user

from hpgr.artifacts import Folder
from hpgr.data.preparation import in_process
from hpgr.errors import DataError
from hpgr.scoring.known_features import learn_item_features
from hpgr.training.two_stage import Run


def test_clicks_of_items_are_those_of_impressions(prepare_log: Make) -> None:
    """A label on a row that was not shown is no click: an item's rate would pass 1, or tell of what is history."""
    rows = [{"user_id": "a", "item_id": f"i{k % 3}", "timestamp": T + k, "clicked": k // 2 % 2, "shown": k % 2}
            for k in range(40)]  # fmt: skip
    prepared = prepare_log(rows, impressions=[[{"column": "shown", "value": 1}]], split={"by": "user_fraction"})
    items = prepared.vocabulary().items
    training = prepared.manifest["account"]["splits"]["train"]
    assert sum(items["shown"].to_pylist()) == training["impressions"]
    assert sum(items["clicked"].to_pylist()) == training["positives"] == 8


def test_no_label_is_another_action_than_no_click(prepare_log: Make) -> None:
    rows = [{"user_id": "a", "item_id": "i", "timestamp": T + k, "clicked": [0, 1, None][k % 3]} for k in range(30)]
    words = list(prepare_log(rows, split={"by": "user_fraction"}).vocabulary().categories["action"])
    assert sorted(words) == ["|", "|0", "|1"]


def test_a_feature_may_be_called_action(prepare_log: Make, config: Make, tmp_path: Path) -> None:
    """Its words are not the actions, of which there are two here: of clicks and of no clicks."""
    rows = [row | {"kind": f"k{k % 7}"} for k, row in enumerate(one_user(60))]
    feature = {"name": "action", "column": "kind", "role": "item"}
    prepared = prepare_log(rows, features=[feature], split={"by": "user_fraction"})
    sizes = Run(config(data={"features": [feature]}), Folder(str(tmp_path)), prepared).sizes()
    assert (sizes.actions, sizes.categories) == (2 + 2, {"action": 2 + 7})


def test_a_number_is_no_kind_of_event(prepare_log: Make) -> None:
    rows = [row | {"watched": k * 0.37} for k, row in enumerate(one_user(700))]
    with pytest.raises(DataError, match=r"data.columns.action: got 560 kinds .* expected at most 500; map a number"):
        prepare_log(rows, columns={"label": "clicked", "action": "watched"}, split={"by": "user_fraction"})


@pytest.mark.parametrize("offset", [0.0, 1.7e12, -1.7e15])
def test_numbers_far_from_nought_are_told_apart(prepare_log: Make, offset: float) -> None:
    """Users' timestamps, in buckets of their own: the deviation of all is not that of any bucket."""
    rows = [row | {"at": offset + 1000.0 * u + k} for u in range(40) for k, row in enumerate(one_user(20, f"u{u}"))]
    feature = {"name": "at", "column": "at", "role": "candidate", "kind": "numeric"}
    prepared = prepare_log(rows, features=[feature], split={"by": "user_fraction"})
    trained = np.array([1000.0 * u + k for u in range(40) for k in range(16)])
    mean, sd = prepared.vocabulary().moments["feature:at"]
    assert mean - offset == pytest.approx(trained.mean(), abs=1.0)
    assert sd == pytest.approx(trained.std(), rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e-9, 1.7e15 + 0.3])
def test_a_constant_is_not_told_apart_by_rounding(prepare_log: Make, value: float) -> None:
    rows = [row | {"price": value} for u in range(40) for row in one_user(u + 3, f"u{u}")]
    feature = {"name": "price", "column": "price", "role": "candidate", "kind": "numeric"}
    words = prepare_log(rows, features=[feature], split={"by": "user_fraction"}).vocabulary()
    assert np.abs(words.standardise("feature:price", pa.array([value]))).max() < 1e-6
    assert words.moments["feature:price"][1] == 1.0


def test_items_never_clicked_are_known_by_their_impressions(prepare_log: Make, config: Make) -> None:
    """Where histories hold clicks alone; impressions of test time tell nothing."""
    rows = [row | {"item_id": f"i{k % 6}", "clicked": int(k % 6 > 2), "brand": f"b{k % 6}" if k < 50 else "new",
                   "price": float(k % 6), "slot": "s"} for k, row in enumerate(one_user(60))]  # fmt: skip
    features = [{"name": "slot", "column": "slot", "role": "candidate"},
                {"name": "brand", "column": "brand", "role": "item"},
                {"name": "watch", "column": "price", "role": "event", "kind": "numeric"},
                {"name": "price", "column": "price", "role": "item", "kind": "numeric"}]  # fmt: skip
    clicks = [[{"column": "clicked", "value": 1}]]
    data = {"features": features, "history": clicks, "split": {"by": "user_fraction"}}
    prepared = prepare_log(rows, **data)
    words, first = prepared.vocabulary(), prepared.vocabulary().first_item
    known = learn_item_features(prepared, config(data=data).data, first, words.size, in_process)
    names, brands = words.items["value"].to_pylist(), words.categories["feature:brand"]
    assert sorted(names) == [f"i{k}" for k in range(6)]
    mean, sd = words.moments["feature:price"]
    for index, name in enumerate(names, first):
        assert brands[known.cat[index, 0] - 2] == f"b{name[1:]}"
        assert known.num[index, 1] * sd + mean == pytest.approx(float(name[1:]), abs=1e-5)
        assert known.time[index] > 0
