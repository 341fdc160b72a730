"""What stands together in a request, and what is asked for twice."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from helpers_scoring import Ask

from hpgr.data.hashing import hash_items


def test_candidates_of_no_list_have_moments_of_their_own(ask: Ask, users: list[str], items: list[str]) -> None:
    """The earliest of a request is the moment of all; candidates of none are no request together."""
    asked = {"user_id": [users[0]] * 2, "item_id": items[:2], "list_id": pa.array([None, None], pa.string())}
    early, late = 1_700_000_000 + 3 * 86400, 2 * 10**9

    def scored(*times: int) -> list[float]:
        return ask(asked | {"timestamp": times})[1].sort_by("item")["score"].to_pylist()

    apart, lately, early_on = scored(early, late), scored(late, late), scored(early, early)
    order = int(sorted(items[:2])[0] != items[0])
    assert [apart[order], apart[1 - order]] == pytest.approx([early_on[order], lately[1 - order]], abs=1e-6)
    assert abs(early_on[1 - order] - lately[1 - order]) > 1e-5


def test_rows_of_a_request_shown_later_tell_nothing_of_earlier_ones(
    ask: Ask, users: list[str], items: list[str]
) -> None:
    """As in preparation: what is compared is what is shown in one second, though all see what the first one does."""

    def first(*times: int) -> float:
        n = len(times)
        asked = {
            "user_id": [users[0]] * n,
            "item_id": items[:n],
            "slot": range(n),
            "timestamp": times,
            "list_id": ["a"] * n,
        }
        return float(next(row["score"] for row in ask(asked)[1].to_pylist() if row["item"] == items[0]))

    at = 2 * 10**9
    assert first(at, at + 5, at + 5) == pytest.approx(first(at), abs=1e-6)
    assert first(at, at, at) != pytest.approx(first(at), abs=1e-4)


def test_a_pair_with_other_features_is_another_candidate(ask: Ask, users: list[str], items: list[str]) -> None:
    asked = {"user_id": [users[0]] * 3, "item_id": [items[0]] * 3, "device": ["phone", "tablet", "phone"]}
    account, _ = ask(asked)
    assert (account["pairs"], account["duplicates"]) == (2, 1)


def test_an_item_twice_in_one_list_for_all_is_scored_once(ask: Ask, users: list[str], items: list[str]) -> None:
    account, table = ask({"item_id": [items[0], items[1], items[0]]})
    assert account["repeated_in_list"] == 1
    assert table.num_rows == account["pairs"] == 2 * len(users)


def test_equal_scores_keep_the_order_of_hashes(ask: Ask, users: list[str]) -> None:
    """So that a rank does not depend on where a row stood in its file."""
    names = [f"x{k}" for k in range(40)]
    tables = [ask({"user_id": [users[0]] * 40, "item_id": order})[1] for order in (names, names[::-1])]
    assert tables[0].drop_columns(["run"]).equals(tables[1].drop_columns(["run"]))
    score, item = tables[0]["score"].to_numpy(), hash_items(tables[0]["item"])
    tied = np.flatnonzero(score[1:] == score[:-1])
    assert len(tied) > 5
    assert (item[tied] < item[tied + 1]).all()
