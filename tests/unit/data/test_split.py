"""Where a split cuts: to the second, and to the impression."""

from __future__ import annotations

import pytest
from helpers_log import US, Make, one_user, users

from hpgr.data.split import refine


@pytest.mark.parametrize(
    ("counts", "left", "second"),
    [({10: 4, 11: 4}, 1.0, 10), ({10: 4, 11: 4}, 3.0, 11), ({10: 4, 12: 4}, 7.0, 13), ({10: 4, 12: 4}, 2.0, 10)],
)
def test_a_cut_inside_an_hour_is_at_the_nearest_second(counts: dict[int, int], left: float, second: int) -> None:
    """Of two equally near the earlier; after the last second there is none, so that all of it comes before the cut."""
    assert refine(counts, left) == second * US


def test_a_user_s_share_is_rounded_as_on_paper(prepare_log: Make) -> None:
    """31.5 and 85 * 0.7 = 59.5 are half up, though a computer has 0.7 a little too low."""
    split = {"by": "user_fraction", "validation": 0.1, "test": 0.3}
    row = users(prepare_log(one_user(85), split=split))["a"]
    assert row["t_split"].count(2) == 25
