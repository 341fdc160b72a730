"""From timelines to batches: nothing lost, nothing twice, nothing ahead of time."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers_log import same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpgr.config import Data, Split, Stream
from hpgr.data.batches import Assembler, Masking, mock_batch
from hpgr.data.masks import session_masks
from hpgr.data.ordering import order_rows
from hpgr.data.sessions import session_numbers, session_statistics
from hpgr.data.timelines import encode, training_rows
from hpgr.data.validation import validate as validate_rows
from hpgr.data.vocabulary import Vocabulary, count
from hpgr.data.windows import Windows, impression_windows, next_item_windows, training_windows
from hpgr.schema import SECOND, SPLITS, TEST, TRAIN, VALIDATION, Batch, Timelines, offsets_of

quick = settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
GAPS = st.sampled_from([0, 0, 1, 60, 1799, 1800, 1801, 90_000])
EVENT = st.tuples(GAPS, st.integers(0, 5), st.sampled_from([0, 1, 1, None]))
LOGS = st.lists(st.lists(EVENT, min_size=1, max_size=25), min_size=1, max_size=6)
STREAMS = st.integers(2, 9).flatmap(
    lambda window: st.builds(
        lambda stride: Stream(window=window, stride=stride), st.none() | st.integers(1, window - 1)
    )
)
DATA = Data.model_validate(
    {
        "columns": {"label": "clicked"},
        "split": {"by": "user_fraction", "validation": 0.2, "test": 0.2},
        "features": [{"name": "price", "column": "price", "role": "item", "kind": "numeric"}],
    }
)
LEFT_OUT = DATA.model_copy(update={"split": Split(by="leave_one_out")})


def table_of(log: list[list[tuple[int, int, int | None]]], data: Data = DATA) -> pa.Table:
    """Prepared timelines of users given as (gap to the event before in seconds, item, label)."""
    rows = []
    for user, events in enumerate(log):
        times = 1_600_000_000 + np.cumsum([gap for gap, _, _ in events])
        rows += [
            {"user_id": f"u{user}", "item_id": f"i{item}", "timestamp": int(time), "clicked": label, "price": item / 3}
            for (_, item, label), time in zip(events, times, strict=True)
        ]
    kinds = [("user_id", pa.string()), ("item_id", pa.string()), ("timestamp", pa.int64()), ("clicked", pa.int64())]
    raw = pa.Table.from_pylist(rows, schema=pa.schema([*kinds, ("price", pa.float64())]))
    table, _ = order_rows(validate_rows(raw, 0, data).rows)
    counts = count(table, training_rows(table, data, None)[0], data)
    return encode(table, Vocabulary.from_counts(counts, data.vocabulary, data.features), data, None)


def windows_of(timelines: Timelines, stream: Stream, kind: str) -> Windows:
    if kind == "masked":
        return training_windows(timelines, stream, 0)
    return impression_windows(timelines, stream, 0, SPLITS[kind])


# Sessions.


def sessions_by_loop(times: list[list[int]], gap_minutes: float) -> list[int]:
    """What a session is, in the plainest words."""
    out = []
    for timeline in times:
        session = 0
        for i, time in enumerate(timeline):
            if i and time - timeline[i - 1] > gap_minutes * 60 * SECOND:
                session += 1
            out.append(session)
    return out


@quick
@given(st.lists(st.lists(GAPS, max_size=12), max_size=6), st.sampled_from([0.5, 30.0, 1e4]))
def test_sessions_equal_the_plain_loop(gaps: list[list[int]], gap_minutes: float) -> None:
    times = [(np.cumsum(g) * SECOND).astype(int).tolist() for g in gaps]
    flat = np.array([t for timeline in times for t in timeline], np.int64)
    got = session_numbers(flat, offsets_of(np.array([len(t) for t in times], np.int64)), gap_minutes)
    assert got.tolist() == sessions_by_loop(times, gap_minutes)


@quick
@given(LOGS)
def test_statistics_count_each_event_and_session_once(log: list[Any]) -> None:
    timelines = Timelines.from_table(table_of(log))
    times = np.split(timelines.h_time, timelines.h_offsets[1:-1])
    sessions = [sessions_by_loop([t.tolist()], 30.0) for t in times]
    found = session_statistics(timelines, 30.0)
    assert sum(found["history_per_user"]) == sum(found["sessions_per_user"]) == len([s for s in sessions if s])
    assert sum(found["events_per_session"]) == sum(s[-1] + 1 for s in sessions if s)


# Masks.


def mask(sizes: list[list[int]], ratio: float, seed: tuple[int, int] = (0, 0), salt: int = 0) -> list[np.ndarray]:
    """Masks of rows given as the sizes of their sessions, one array a session."""
    row = np.repeat(np.arange(len(sizes)), [sum(s) for s in sizes])
    session = np.concatenate([np.repeat(np.arange(len(s)), s) for s in sizes])
    place = np.concatenate([np.arange(sum(s)) for s in sizes])
    users = (np.arange(len(sizes)) + salt + 1).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    masked = session_masks(row, users[row], place, session, ratio, seed)
    return np.split(masked, np.cumsum([n for s in sizes for n in s])[:-1])


SIZES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=6)


@quick
@given(SIZES, st.floats(0.01, 0.99), st.integers(0, 9), st.integers(0, 9))
def test_masks_keep_their_promises(sizes: list[list[int]], ratio: float, seed: int, epoch: int) -> None:
    parts = iter(mask(sizes, ratio, (seed, epoch)))
    for row in sizes:
        own = [next(parts) for _ in row]
        assert sum(p.sum() for p in own) >= 1, "every row hides one event or more"
        for part in own:
            n = len(part)
            if n >= 2:
                assert not part.all(), "one event of a session of two or more stays visible"
            rescued = sum(p.sum() for p in own) == 1
            assert np.floor(ratio * n) - 1 <= part.sum() <= np.ceil(ratio * n) or rescued


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("size", [5, 7, 10])
def test_mask_rate_is_the_ratio_at_every_place(ratio: float, size: int) -> None:
    parts = np.stack(mask([[size] * 4] * 1500, ratio))
    n = len(parts)
    spread = 5 * (ratio * (1 - ratio) / (n * size)) ** 0.5
    assert abs(parts.mean() - ratio) < spread
    assert np.abs(parts.mean(0) - ratio).max() < 5 * (ratio * (1 - ratio) / n) ** 0.5


def test_single_event_sessions_are_hidden_at_the_ratio() -> None:
    parts = np.concatenate(mask([[1] * 200] * 50, 0.2))
    assert abs(parts.mean() - 0.2) < 0.02


@pytest.mark.parametrize("other", ["row", "session", "epoch", "seed"])
def test_masks_of_rows_sessions_epochs_and_seeds_are_independent(other: str) -> None:
    a, b = _mask_and_another(10, 0.3, other)
    both = (a & b).mean()
    assert abs(both - 0.09) < 5 * (0.09 * 0.91 / a.size) ** 0.5
    assert (a != b).any(1).mean() > 0.9


@pytest.mark.parametrize("other", ["row", "session", "epoch", "seed"])
def test_how_many_are_hidden_is_drawn_anew_for_rows_sessions_epochs_and_seeds(other: str) -> None:
    """Sessions of three hide one or two at a half."""
    a, b = (m.sum(1) for m in _mask_and_another(3, 0.5, other))
    assert set(a) == set(b) == {1, 2}
    assert abs((a == b).mean() - 0.5) < 5 * (0.25 / len(a)) ** 0.5


def _mask_and_another(size: int, ratio: float, other: str) -> tuple[np.ndarray, np.ndarray]:
    """Masks of 2,000 sessions, and beside each that of another row, session, epoch or seed."""
    a = np.stack(mask([[size] * 20] * 100, ratio))
    if other in ("row", "session"):
        return a, np.roll(a, 20 if other == "row" else 1, axis=0)
    return a, np.stack(mask([[size] * 20] * 100, ratio, (0, 1) if other == "epoch" else (1, 0)))


def test_equal_keys_give_equal_masks() -> None:
    a, b = (np.concatenate(mask([[5, 3], [8]], 0.4, (3, 7))) for _ in range(2))
    assert a.tolist() == b.tolist()


@quick
@given(LOGS, STREAMS, st.randoms(use_true_random=False))
def test_masks_do_not_depend_on_the_batch(log: list[Any], stream: Stream, random: Any) -> None:
    table = table_of(log)
    assembler = Assembler({0: table}, 30.0)
    windows = training_windows(assembler.timelines, stream, 0)
    masking = Masking(0.3, 0.5, (4, 2))
    if not len(windows):
        return
    whole = assembler.batch(windows, masking, targets=False)
    together = dict(zip(whole.row_key.tolist(), np.split(whole.h_masked, np.cumsum(whole.h_lengths)[:-1]), strict=True))
    causal = dict(zip(whole.row_key.tolist(), whole.causal.tolist(), strict=True))
    order = list(range(len(windows)))
    random.shuffle(order)
    for part in (order[::2], order[1::2]):
        if not part:
            continue
        batch = assembler.batch(windows.take(np.array(part)), masking, targets=False)
        for key, found in zip(
            batch.row_key.tolist(), np.split(batch.h_masked, np.cumsum(batch.h_lengths)[:-1]), strict=True
        ):
            assert found.tolist() == together[key].tolist()
        assert batch.causal.tolist() == [causal[key] for key in batch.row_key.tolist()]
        assert not batch.t_item.size


# Windows.


@quick
@given(LOGS, STREAMS)
def test_every_impression_is_in_one_window_and_sees_enough(log: list[Any], stream: Stream) -> None:
    timelines = Timelines.from_table(table_of(log))
    served: Counter[int] = Counter()
    for name, split in SPLITS.items():
        w = impression_windows(timelines, stream, 0, split)
        for i in range(len(w)):
            h, t = timelines.h_offsets[w.row[i]], timelines.t_offsets[w.row[i]]
            targets = np.arange(t + w.t_start[i], t + w.t_stop[i])
            served.update(targets.tolist())
            assert (timelines.t_split[targets] == split).all(), name
            assert 0 < len(targets) <= stream.window
            assert 0 <= w.stop[i] - w.start[i] <= stream.window
            past = timelines.t_visible[targets]
            inside = past - w.start[i]
            assert (inside <= w.stop[i] - w.start[i]).all()
            assert (inside >= np.minimum(past, stream.window - stream.spacing + 1)).all()
            seen = timelines.h_time[h + w.start[i] : h + w.stop[i]]
            for target, n in zip(targets, inside, strict=True):
                assert (seen[:n] < timelines.t_time[target]).all()
                assert (seen[n:] >= timelines.t_time[target]).all()
    assert served == Counter(range(len(timelines.t_item)))


@quick
@given(LOGS, STREAMS, st.integers(1, 6))
def test_what_an_impression_sees_does_not_depend_on_the_future(log: list[Any], stream: Stream, cut: int) -> None:
    def seen(events: list[Any]) -> dict[tuple[int, int], list[int]]:
        t = Timelines.from_table(table_of([events]))
        out: dict[tuple[int, int], list[int]] = {}
        for split in SPLITS.values():
            w = impression_windows(t, stream, 0, split)
            for i in range(len(w)):
                for target in range(w.t_start[i], w.t_stop[i]):
                    out[target, int(t.t_time[target])] = t.h_time[w.start[i] : t.t_visible[target]].tolist()
        return out

    before = log[0][:-cut]
    if not any(label is not None for _, _, label in before) or log[0][-cut][0] == 0:
        return
    whole = seen(log[0])
    for key, events in seen(before).items():
        assert whole[key] == events


@quick
@given(LOGS, STREAMS)
def test_training_windows_hold_each_training_event_once(log: list[Any], stream: Stream) -> None:
    timelines = Timelines.from_table(table_of(log))
    w = training_windows(timelines, stream, 0)
    held: Counter[int] = Counter()
    for i in range(len(w)):
        h = timelines.h_offsets[w.row[i]]
        events = np.arange(h + w.start[i], h + w.stop[i])
        assert 0 < len(events) <= stream.window
        assert (timelines.h_time[events] < timelines.train_end[w.row[i]]).all()
        held.update(events.tolist())
    user = np.repeat(np.arange(len(timelines)), np.diff(timelines.h_offsets))
    assert held == Counter(np.flatnonzero(timelines.h_time < timelines.train_end[user]).tolist())
    assert not (w.t_stop - w.t_start).any()


@quick
@given(LOGS)
def test_the_end_of_training_is_the_first_held_out_impression(log: list[Any]) -> None:
    timelines = Timelines.from_table(table_of(log))
    for u in range(len(timelines)):
        own = slice(timelines.t_offsets[u], timelines.t_offsets[u + 1])
        held = timelines.t_time[own][timelines.t_split[own] != TRAIN]
        assert timelines.train_end[u] == min(held, default=np.iinfo(np.int64).max)
        assert timelines.t_split[own].tolist() == sorted(timelines.t_split[own])


@quick
@given(LOGS, STREAMS, st.sampled_from([VALIDATION, TEST]))
def test_next_item_windows_end_before_the_split(log: list[Any], stream: Stream, split: int) -> None:
    timelines = Timelines.from_table(table_of(log))
    w = next_item_windows(timelines, stream, 0, split)
    assert len(set(w.row.tolist())) == len(w)
    for i in range(len(w)):
        row, h = w.row[i], timelines.h_offsets[w.row[i]]
        own = slice(timelines.t_offsets[row], timelines.t_offsets[row + 1])
        begins = timelines.t_time[own][timelines.t_split[own] == split].min()
        assert 0 < w.stop[i] - w.start[i] < stream.window
        assert timelines.h_time[h + w.stop[i] - 1] < begins <= timelines.h_time[h + w.stop[i]]


@quick
@given(LOGS, STREAMS)
def test_under_leave_one_out_the_item_to_find_is_the_held_out_row(log: list[Any], stream: Stream) -> None:
    timelines = Timelines.from_table(table_of(log, LEFT_OUT))
    places = {}
    for split in (VALIDATION, TEST):
        w = next_item_windows(timelines, stream, 0, split, True)
        for row, start, stop in zip(w.row, w.start, w.stop, strict=True):
            own = slice(timelines.t_offsets[row], timelines.t_offsets[row + 1])
            (held,) = timelines.t_offsets[row] + np.flatnonzero(timelines.t_split[own] == split)
            event = timelines.h_offsets[row] + stop
            for name in ("time", "item", "action"):
                assert getattr(timelines, f"h_{name}")[event] == getattr(timelines, f"t_{name}")[held]
            assert stop - start == min(stop, stream.window - 1)
            assert stop >= timelines.n_train[row]
            places[row, split] = stop
    for row, split in places:
        assert split == TEST or places[row, VALIDATION] < places[row, TEST]


@quick
@given(LOGS, STREAMS)
def test_window_keys_differ(log: list[Any], stream: Stream) -> None:
    timelines = Timelines.from_table(table_of(log))
    for kind in ("masked", "train", "validation", "test"):
        keys = windows_of(timelines, stream, kind).key
        assert len(set(keys.tolist())) == len(keys)


# Batches.


@quick
@given(LOGS, STREAMS, st.sampled_from(["masked", "train", "validation", "test"]), st.booleans())
def test_batch_survives_the_way_through_a_table(log: list[Any], stream: Stream, kind: str, targets: bool) -> None:
    table = table_of(log)
    assembler = Assembler({0: table}, 30.0)
    windows = windows_of(assembler.timelines, stream, kind)
    masking = Masking(0.3, 0.5, (1, 2)) if kind == "masked" else None
    for part in (windows, windows.take(np.arange(min(1, len(windows))))):
        batch = assembler.batch(part, masking, targets)
        again = Batch.from_table(batch.to_table(epoch=3))
        assert same(batch, again)
        for f in fields(Batch):
            if f.name != "user":
                a, b = getattr(batch, f.name), getattr(again, f.name)
                assert (a.dtype, a.shape) == (b.dtype, b.shape), f.name


@quick
@given(LOGS, STREAMS)
def test_batch_holds_the_events_of_its_windows(log: list[Any], stream: Stream) -> None:
    assembler = Assembler({3: table_of(log), 1: table_of(log[:1])}, 30.0)
    t = assembler.timelines
    assert len(t) == len(table_of(log)) + len(table_of(log[:1]))
    windows = windows_of(Timelines.from_table(table_of(log)), stream, "train")
    windows = Windows(np.full(len(windows), 3), *(getattr(windows, f.name) for f in fields(Windows)[1:]))
    batch = assembler.batch(windows)
    h, i = 0, 0
    for k in range(len(windows)):
        row = assembler.rows(windows)[k]
        first = t.h_offsets[row] + windows.start[k]
        events = slice(first, first + batch.h_lengths[k])
        assert batch.h_time[h : h + batch.h_lengths[k]].tolist() == t.h_time[events].tolist()
        assert batch.h_item[h : h + batch.h_lengths[k]].tolist() == t.h_item[events].tolist()
        shown = slice(t.t_offsets[row] + windows.t_start[k], t.t_offsets[row] + windows.t_stop[k])
        assert batch.t_label[i : i + batch.t_lengths[k]].tolist() == t.t_label[shown].tolist()
        for target in range(i, i + batch.t_lengths[k]):
            seen = batch.h_time[h : h + batch.t_visible[target]]
            assert (seen < batch.t_time[target]).all()
            assert batch.t_visible[target] == t.t_visible[shown][target - i] - windows.start[k] >= 0
            assert batch.t_past[target] == t.t_visible[shown][target - i]
        sessions = batch.h_session[h : h + batch.h_lengths[k]].tolist()
        assert sessions == sessions_by_loop([t.h_time[events].tolist()], 30.0)
        for place in range(batch.h_lengths[k]):
            times = batch.h_time[h : h + batch.h_lengths[k]]
            assert batch.h_visible[h + place] == (times < times[place]).sum()
        h, i = h + batch.h_lengths[k], i + batch.t_lengths[k]
    assert (h, i) == (len(batch.h_item), len(batch.t_item))
    assert not batch.h_masked.any()


def test_mock_batch_is_a_batch() -> None:
    batch = mock_batch(3, 7, 2, {"h_cat": 1, "h_num": 0, "t_cat": 2, "t_num": 3}, 9, 0.3)
    assert batch.h_masked.reshape(3, 7).sum(1).tolist() == [2, 2, 2]
    assert (len(batch), len(batch.h_item), batch.t_num.shape) == (3, 21, (6, 3))
