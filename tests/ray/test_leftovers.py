"""What a search deletes of its trials' folders, and when, on a disk and on a store. No cluster."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_store import environment, store

from hpgr.artifacts import Folder, fingerprint
from hpgr.config import Config
from hpgr.errors import StoreError
from hpgr.on_ray.leftovers import GONE_AFTER_SECONDS, Leftovers
from hpgr.search.space import parse_space
from hpgr.search.study import Draw, Study

GAP, TOP_K = "stream.session_gap_minutes", "model.pgsa.top_k"
GRID = {GAP: {"choice": [15, 30, 60]}, TOP_K: {"choice": [4, 8, 16, 32]}}
WEIGHTS = ["best-00000010.safetensors", "best-00000020.safetensors"]
ALL = [*WEIGHTS, "checkpoints"]


class Bench:
    """A study, folders as trials leave them, and a clock that stands still."""

    def __init__(self, uri: str, **more: Any) -> None:
        self.folder, self.now = Folder(uri), 0.0
        space = parse_space({"parameters": GRID, "sampler": {"kind": "random"}, **more})
        self.study = Study(self.folder, space, Config(), lambda c: fingerprint(c.stream.session_gap_minutes))
        self.leftovers = Leftovers(self.folder, self.study, lambda: self.now)

    def start(self) -> Draw:
        draw = self.study.ask()
        assert draw is not None
        for stage in (f"trials/{draw.name}/stage2", f"stage1/{draw.stage1}"):
            self.write(stage)
        return draw

    def write(self, stage: str) -> None:
        for name in (*WEIGHTS, "checkpoints/step-00000020/optimiser.safetensors"):
            self.folder.write(f"{stage}/{name}", b"-")

    def stage1_done(self, draw: Draw) -> None:
        self.folder.write_json(f"stage1/{draw.stage1}/done.json", {"best_file": WEIGHTS[0]})

    def end(self, draw: Draw, state: str, **attributes: Any) -> None:
        if state == "finished":
            self.folder.write_json(f"trials/{draw.name}/stage2/done.json", {"best_file": WEIGHTS[0]})
        self.study.finish(draw.number, state, stopped=self.now, **attributes)

    def left(self, draw: Draw) -> list[str]:
        names = self.folder.entries(f"trials/{draw.name}/stage2")
        return [name for name in names if name != "done.json"]


@pytest.fixture(params=["disk", "store"])
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path)
        return
    with store("bucket") as endpoint:
        for name, value in environment(endpoint).items():
            monkeypatch.setenv(name, value)
        yield "s3://bucket/search"


def test_checkpoints_go_when_a_trial_has_ended_and_weights_when_it_cannot_win(home: str) -> None:
    bench = Bench(home)
    first, second, pruned, lost, running = (bench.start() for _ in range(5))
    bench.end(first, "finished", auc=0.7)
    bench.end(pruned, "pruned", auc=0.6)
    bench.study.suspend(lost.number, error="the node is gone", stopped=bench.now)
    bench.leftovers.clear()
    assert bench.left(pruned) == ALL, "its process may still write"
    bench.now = GONE_AFTER_SECONDS + 1
    bench.leftovers.clear()
    assert bench.left(first) == WEIGHTS[:1], "the best so far"
    assert bench.left(pruned) == []
    assert bench.left(lost) == bench.left(running) == ALL, "they go on from there"
    bench.end(second, "finished", auc=0.8)
    bench.now *= 2
    bench.leftovers.clear()
    assert (bench.left(first), bench.left(second)) == ([], WEIGHTS[:1])
    assert bench.folder.exists(f"trials/{first.name}/stage2/done.json")


def test_a_stage_1_keeps_what_trials_to_come_read(home: str) -> None:
    bench = Bench(home)
    done = bench.start()
    other = next(draw for draw in iter(bench.start, None) if draw.stage1 != done.stage1)
    bench.stage1_done(done)
    for draw in (done, other):
        bench.end(draw, "failed", error="the loss is nan")
    bench.leftovers.clear_all()
    assert bench.folder.entries(f"stage1/{done.stage1}") == [WEIGHTS[0], "done.json"]
    assert bench.folder.entries(f"stage1/{other.stage1}") == ALL, "another trial goes on with it"


def test_the_end_clears_what_a_late_process_wrote_and_a_killed_search_left(tmp_path: Path) -> None:
    before = Bench(str(tmp_path))
    best, pruned = before.start(), before.start()
    before.end(best, "finished", auc=0.7)
    before.end(pruned, "pruned", auc=0.6)
    after = Bench(str(tmp_path))
    after.now = GONE_AFTER_SECONDS + 1
    after.leftovers.clear()
    assert after.left(pruned) == []
    after.write(f"trials/{pruned.name}/stage2")
    after.leftovers.clear()
    after.leftovers.clear_all()
    assert after.left(pruned) == []


def test_the_front_and_what_was_shown_as_a_run_keep_their_weights(tmp_path: Path) -> None:
    bench = Bench(str(tmp_path), objectives=["auc", "keys"], scheduler={"kind": "none"})
    shown, cheap, good, neither = (bench.start() for _ in range(4))
    bench.folder.write_json(f"trials/{shown.name}/metrics.json", {})
    for draw, auc, keys in ((shown, 0.5, 9.0), (cheap, 0.6, 2.0), (good, 0.7, 5.0), (neither, 0.6, 5.0)):
        bench.end(draw, "finished", auc=auc, keys=keys)
    bench.leftovers.clear_all()
    assert [bench.left(draw) for draw in (shown, cheap, good, neither)] == [WEIGHTS[:1]] * 3 + [[]]


def test_a_store_that_refuses_is_asked_again_and_fails_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise StoreError("cannot delete it: the store is away")

    bench = Bench(str(tmp_path))
    pruned = bench.start()
    bench.end(pruned, "pruned", auc=0.6)
    bench.now = GONE_AFTER_SECONDS + 1
    with monkeypatch.context() as refusing:
        refusing.setattr(Folder, "delete", refuse)
        bench.leftovers.clear()
        bench.leftovers.clear_all()
    assert bench.left(pruned) == ALL
    bench.leftovers.clear()
    assert bench.left(pruned) == []
