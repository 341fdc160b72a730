"""What is counted in training time, and which words stand for what was done."""

from __future__ import annotations

from helpers_log import Make, T


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
