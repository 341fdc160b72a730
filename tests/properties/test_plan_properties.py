"""Plans of epochs: every window once, in budget, with little padding, in an order of its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpgr.data.batches import worker_rows
from hpgr.data.plan import padding_share, plan_epoch
from hpgr.data.windows import Windows

quick = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])


def random_windows(seed: int, n: int, buckets: int = 3) -> Windows:
    """An index of n windows of all lengths, for planning."""
    rng = np.random.default_rng(seed)
    stop, t_stop = rng.integers(0, 50, n), rng.integers(1, 20, n)
    nothing, row = np.zeros(n, np.int64), np.arange(n)
    return Windows(
        np.sort(rng.integers(0, buckets, n)), row, nothing, stop, nothing, t_stop, rng.permutation(n) - n // 2
    )


PLANS = st.tuples(st.integers(0, 99), st.integers(0, 80), st.integers(30, 400), st.sampled_from([1, 300, 10**9]))


@quick
@given(PLANS, st.integers(0, 5), st.sampled_from([None, 0, 1, 7]))
def test_plan_holds_every_window_once_within_the_budget(
    plan: tuple[int, int, int, int], seed: int, epoch: int | None
) -> None:
    windows, budget = random_windows(plan[0], plan[1]), plan[2]
    groups = plan_epoch(windows, budget, plan[3], seed, epoch)
    batches = [b for g in groups for b in g.batches]
    assert sorted(np.concatenate([np.zeros(0, np.int64), *batches]).tolist()) == list(range(len(windows)))
    history, targets = windows.stop - windows.start, windows.t_stop - windows.t_start
    for group in groups:
        assert set(windows.bucket[np.concatenate(group.batches)]) <= set(group.buckets.tolist())
    for batch in batches:
        assert len(batch) == 1 or len(batch) * (history[batch].max() + targets[batch].max()) <= budget
    assert 0 <= padding_share(windows, groups) < 1
    again = plan_epoch(windows, budget, plan[3], seed, epoch)
    assert [b.tolist() for g in again for b in g.batches] == [b.tolist() for b in batches]


def flat(windows: Windows, seed: int, epoch: int | None) -> list[list[int]]:
    return [b.tolist() for g in plan_epoch(windows, 300, 2000, seed, epoch) for b in g.batches]


def test_plans_of_epochs_and_seeds_differ_in_order_and_company() -> None:
    windows = random_windows(0, 400)
    base = flat(windows, 0, 0)
    for other in (flat(windows, 0, 1), flat(windows, 1, 0), flat(windows, 0, None)):
        assert other != base
        assert {frozenset(b) for b in other} != {frozenset(b) for b in base}
    assert flat(windows, 0, None) == flat(windows, 5, None), "evaluation has one order whatever the seed"


def test_epochs_do_not_go_from_short_to_long() -> None:
    windows = random_windows(0, 600, buckets=1)
    length = windows.tokens
    means = [length[b].mean() for b in flat(windows, 0, 0)]
    place = np.arange(len(means))
    assert abs(np.corrcoef(place, means)[0, 1]) < 0.5


def test_padding_is_small_in_histories_and_in_impressions() -> None:
    windows = random_windows(0, 20_000)
    for some in (windows, replace(windows, t_stop=windows.t_start), replace(windows, stop=windows.start)):
        groups = plan_epoch(some, 2000, 10**9, 0, 0)
        assert padding_share(some, groups) < 0.1
        assert sum(len(g.batches) for g in groups) < some.tokens.sum() / 2000 * 1.15


@quick
@given(st.integers(1, 12), st.integers(1, 3))
def test_shares_of_workers_partition_the_batch(rows: int, world: int) -> None:
    batch = np.arange(100, 100 + rows)
    shares = [worker_rows(batch, rank, world) for rank in range(world)]
    assert sorted(np.concatenate([own for own, real in shares if real]).tolist()) == batch.tolist()
    assert all(len(own) >= 1 for own, _ in shares)
    sizes = [len(own) * real for own, real in shares]
    assert max(sizes) - min(sizes) <= 1
