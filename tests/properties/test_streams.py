"""Streams of batches: the same from any step on and for any number of workers, every window once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_log import same

from hpgr.artifacts import Folder
from hpgr.config import Config, validate
from hpgr.data import preparation
from hpgr.data.preparation import Prepared, in_process, prepare
from hpgr.data.stream import LocalSource, Step, StreamSpec, build_index, items_of, produce, step_of
from hpgr.schema import SECOND, SPLITS, TEST, offsets_of


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
            assert b.h_time[h[k + 1] - 1] == b.h_time[h[k + 1] - 2] + SECOND
