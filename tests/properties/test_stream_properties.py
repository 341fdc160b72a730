"""From timelines to batches: nothing lost, nothing twice, nothing ahead of time, the same on any number of workers."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpgr.artifacts import Folder
from hpgr.config import Config, Data, Stream, validate
from hpgr.data import preparation
from hpgr.data.batches import Assembler, Masking, mock_batch
from hpgr.data.masks import session_masks
from hpgr.data.ordering import order_rows
from hpgr.data.preparation import Prepared, in_process, prepare
from hpgr.data.sessions import session_numbers, session_statistics
from hpgr.data.stream import LocalSource, Step, StreamSpec, build_index, items_of, produce, step_of
from hpgr.data.timelines import encode, training_rows
from hpgr.data.validation import validate as validate_rows
from hpgr.data.vocabulary import Vocabulary, count
from hpgr.data.windows import Windows, impression_windows, next_item_windows, training_windows
from hpgr.schema import SECOND, SPLITS, TEST, TRAIN, VALIDATION, Batch, Timelines, offsets_of

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
GAPS = st.sampled_from([0, 0, 1, 60, 1799, 1800, 1801, 90_000])
EVENT = st.tuples(GAPS, st.integers(0, 5), st.sampled_from([0, 1, 1, None]))
LOGS = st.lists(st.lists(EVENT, min_size=1, max_size=25), min_size=1, max_size=6)
STREAMS = st.integers(2, 9).flatmap(
    lambda window: st.builds(lambda stride: Stream(window=window, stride=stride), st.integers(1, window - 1))
)
DATA = Data.model_validate(
    {
        "columns": {"label": "clicked"},
        "split": {"by": "user_fraction", "validation": 0.2, "test": 0.2},
        "features": [{"name": "price", "column": "price", "role": "item", "kind": "numeric"}],
    }
)


def table_of(log: list[list[tuple[int, int, int | None]]]) -> pa.Table:
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
    table, _ = order_rows(validate_rows(raw, 0, DATA).rows)
    counts = count(table, training_rows(table, DATA, None)[0], DATA)
    return encode(table, Vocabulary.from_counts(counts, DATA.vocabulary, DATA.features), DATA, None)


def windows_of(timelines: Timelines, stream: Stream, kind: str) -> Windows:
    if kind == "masked":
        return training_windows(timelines, stream, 0)
    return impression_windows(timelines, stream, 0, SPLITS[kind])


def same(a: Batch, b: Batch) -> bool:
    return all(
        a.user.equals(b.user)
        if f.name == "user"
        else np.array_equal(getattr(a, f.name), getattr(b, f.name), equal_nan=f.name.endswith("num"))
        for f in fields(Batch)
    )


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
    a = np.stack(mask([[10] * 20] * 100, 0.3))
    if other == "row":
        b = np.roll(a, 20, axis=0)
    elif other == "session":
        b = np.roll(a, 1, axis=0)
    else:
        b = np.stack(mask([[10] * 20] * 100, 0.3, (0, 1) if other == "epoch" else (1, 0)))
    both = (a & b).mean()
    assert abs(both - 0.09) < 5 * (0.09 * 0.91 / a.size) ** 0.5
    assert (a != b).any(1).mean() > 0.9


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
            assert (inside >= np.minimum(past, stream.window - stream.stride + 1)).all()
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
    batch = mock_batch(3, 7, 2, {"h_cat": 1, "h_num": 0, "t_cat": 2, "t_num": 3})
    assert (len(batch), len(batch.h_item), batch.t_num.shape) == (3, 21, (6, 3))


# Streams.


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Prepared]:
    """A generated log in several buckets."""
    folder = tmp_path_factory.mktemp("stream")
    config = validate(
        {
            "data": {
                "columns": {"label": "clicked", "action": "event", "request": ["list_id"]},
                "features": [{"name": "slot", "column": "slot", "role": "candidate"}],
                "synthetic": {"users": 40, "items": 40, "categories": 4, "sessions": 3},
                "prepared": str(folder),
            },
            "stream": {"window": 20, "stride": 8, "batch_tokens": 400, "group_tokens": 500},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "BUCKET_ROWS", 500)
        prepared = prepare(config, in_process, print)
    assert prepared.buckets >= 3
    return config, prepared


def spec_of(log: tuple[Config, Prepared], folder: Path, name: str) -> StreamSpec:
    config, prepared = log
    kind: Any = name.partition("-")[0]
    return StreamSpec(
        prepared=prepared.folder.uri,
        index=build_index(prepared, config, Folder(str(folder)), name, in_process),
        kind=kind,
        gap_minutes=30.0,
        batch_tokens=config.stream.batch_tokens,
        group_tokens=config.stream.group_tokens,
        seed=5,
        mask_ratio=0.2,
        causal_share=0.5,
    )


NAMES = ["masked", "click-train", "next_item-validation"]


@pytest.mark.parametrize("name", NAMES)
def test_stream_starts_again_at_any_step(log: tuple[Config, Prepared], tmp_path: Path, name: str) -> None:
    spec = spec_of(log, tmp_path, name)
    epochs = range(2, 4)
    full = list(LocalSource().steps(spec, epochs, 0))
    steps = full[0].steps
    assert [(s.epoch, s.step) for s in full] == [(e, i) for e in epochs for i in range(_steps(full, e))]
    assert len(list(items_of(spec, [2], 0))) > (name != "next_item-validation"), (
        "several groups, or the test says little"
    )
    for first in {0, 1, steps // 3, steps // 2, steps - 1, steps}:
        tail = [step_of(t) for item in items_of(spec, epochs, first) for t in produce(item, spec, 0, 1)]
        assert [(s.epoch, s.step) for s in tail] == [(s.epoch, s.step) for s in full[first:]]
        assert all(same(a.batch, b.batch) for a, b in zip(tail, full[first:], strict=True))
    assert list(items_of(spec, epochs, len(full))) == []
    for first in {1, steps}:
        later = list(LocalSource().steps(spec, epochs, first))
        assert [(s.epoch, s.step) for s in later] == [(s.epoch, s.step) for s in full[first:]]


def _steps(steps: list[Step], epoch: int) -> int:
    (found,) = {s.steps for s in steps if s.epoch == epoch}
    return found


def rows_of(steps: list[Step]) -> dict[tuple[int, int, int], tuple[Any, ...]]:
    """What each window looks like, by (epoch, step, window)."""
    out: dict[tuple[int, int, int], tuple[Any, ...]] = {}
    for s in steps:
        b, h, t = s.batch, offsets_of(s.batch.h_lengths), offsets_of(s.batch.t_lengths)
        for k in range(len(b)):
            events, shown = slice(h[k], h[k + 1]), slice(t[k], t[k + 1])
            content = (b.h_item[events], b.h_masked[events], b.h_session[events], b.t_item[shown], b.t_label[shown])
            key = (s.epoch, s.step, int(b.row_key[k]))
            assert key not in out
            out[key] = (bool(b.causal[k]), *(c.tolist() for c in content))
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_workers_sees_the_same_batches(
    log: tuple[Config, Prepared], tmp_path: Path, name: str, world: int
) -> None:
    spec = spec_of(log, tmp_path, name)
    alone = list(LocalSource().steps(spec, range(1), 0))
    shares = [list(LocalSource(rank, world).steps(spec, range(1), 0)) for rank in range(world)]
    assert {len(share) for share in shares} == {len(alone)}, "all workers take part in every step"
    assert rows_of([s for share in shares for s in share if s.real]) == rows_of(alone)


def test_evaluation_holds_every_impression_once(log: tuple[Config, Prepared], tmp_path: Path) -> None:
    _, prepared = log
    for split in ("validation", "test"):
        spec = spec_of(log, tmp_path, f"click-{split}")
        steps = [s for rank in range(3) for s in LocalSource(rank, 3).evaluation(spec) if s.real]
        got: Counter[Any] = Counter()
        for b in (s.batch for s in steps):
            shown_to = np.repeat(b.user.to_pylist(), b.t_lengths).tolist()
            got.update(zip(shown_to, b.t_time.tolist(), b.t_item.tolist(), b.t_label.tolist(), strict=True))
        expected: Counter[Any] = Counter()
        for b in range(prepared.buckets):
            for row in prepared.timelines(b).to_pylist():
                shown = zip(row["t_split"], row["t_time"], row["t_item"], row["t_label"], strict=True)
                expected.update((row["user"], t, i, c) for s, t, i, c in shown if s == SPLITS[split])
        assert got == expected
        assert got.total() == prepared.manifest["account"]["splits"][split]["impressions"]


def test_lists_keep_one_key_across_windows(log: tuple[Config, Prepared], tmp_path: Path) -> None:
    steps = list(LocalSource().evaluation(spec_of(log, tmp_path, "click-train")))
    times: dict[int, set[tuple[str, int]]] = {}
    for s in steps:
        users = np.repeat(s.batch.user.to_pylist(), s.batch.t_lengths).tolist()
        for request, user, time in zip(s.batch.t_request.tolist(), users, s.batch.t_time.tolist(), strict=True):
            times.setdefault(request, set()).add((user, time))
    assert -1 not in times
    assert all(len(found) == 1 for found in times.values())


def test_masks_change_with_the_epoch(log: tuple[Config, Prepared], tmp_path: Path) -> None:
    spec = spec_of(log, tmp_path, "masked")
    first, second = (
        {key[2]: row for key, row in rows_of(list(LocalSource().steps(spec, range(e, e + 1), 0))).items()}
        for e in (0, 1)
    )
    assert first.keys() == second.keys()
    assert [row[1] for row in first.values()] == [second[key][1] for key in first]
    assert np.mean([first[k][2] != second[k][2] for k in first]) > 0.9
    assert {row[0] for row in first.values()} == {True, False}
    assert np.mean([first[k][0] != second[k][0] for k in first]) > 0.2
    assert all(row[4] == [] for row in first.values()), "stage 1 never sees an impression"


def test_next_item_batch_hides_the_event_after_the_window(log: tuple[Config, Prepared], tmp_path: Path) -> None:
    _, prepared = log
    rows = {r["user"]: r for b in range(prepared.buckets) for r in prepared.timelines(b).to_pylist()}
    steps = list(LocalSource().evaluation(spec_of(log, tmp_path, "next_item-test")))
    assert steps
    for s in steps:
        b, h, t = s.batch, offsets_of(s.batch.h_lengths), offsets_of(s.batch.t_lengths)
        for k, user in enumerate(b.user.to_pylist()):
            row, past = rows[user], b.t_item[t[k] : t[k + 1]].tolist()
            begins = min(time for time, part in zip(row["t_time"], row["t_split"], strict=True) if part == TEST)
            known = sum(time < begins for time in row["h_time"])
            assert past == sorted(set(row["h_item"][:known]))
            items, masked = b.h_item[h[k] : h[k + 1]].tolist(), b.h_masked[h[k] : h[k + 1]].tolist()
            assert items == row["h_item"][max(0, known - 19) : known + 1]
            assert masked == [False] * (len(items) - 1) + [True]
            assert b.h_visible[h[k + 1] - 1] == len(items) - 1
            assert b.h_action[h[k + 1] - 1] == 0
            assert b.h_time[h[k + 1] - 1] == b.h_time[h[k + 1] - 2]
