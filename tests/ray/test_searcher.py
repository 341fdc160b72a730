"""The order in which trials are handed to Ray Tune. No cluster."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpgr.artifacts import Folder, fingerprint
from hpgr.config import Config
from hpgr.errors import StoreError
from hpgr.on_ray.searcher import Clock, StudySearcher
from hpgr.on_ray.tune import _Starts
from hpgr.search.space import Space, parse_space
from hpgr.search.study import VOID, Study

GAP, TOP_K = "stream.session_gap_minutes", "model.pgsa.top_k"
GRID = {GAP: {"choice": [15, 30, 60]}, TOP_K: {"choice": [4, 8, 16, 32]}}


def space(**more: Any) -> Space:
    return parse_space({"parameters": GRID, "sampler": {"kind": "random"}, **more})


class Bench:
    """A searcher on a study in a folder, with trials that end when told."""

    def __init__(self, folder: Path, wanted: Space) -> None:
        self.folder, self.said = Folder(str(folder)), list[str]()
        self.study = Study(self.folder, wanted, Config(), lambda c: fingerprint(c.stream.session_gap_minutes))
        self.searcher = StudySearcher(self.study, wanted, self.folder, Clock(0.0), self.said.append)
        self.count = 0

    def start(self) -> tuple[str, dict[str, Any]] | None:
        self.count += 1
        found = self.searcher.suggest(f"t{self.count}")
        return (f"t{self.count}", found) if isinstance(found, dict) else None

    def stage1_done(self, settings: dict[str, Any]) -> None:
        self.folder.write_json(f"stage1/{settings['stage1']}/done.json", {"seconds": 5.0})

    def end(self, trial: tuple[str, dict[str, Any]], auc: float = 0.7) -> None:
        self.stage1_done(trial[1])
        result = {"stage": "done", "auc": auc, "keys": 9.0, "seconds_a_million": 1.0, "seconds": 7.0}
        self.searcher.on_trial_complete(trial[0], result)


def test_no_two_trials_compute_one_stage_1(tmp_path: Path) -> None:
    bench = Bench(tmp_path, space(budget={"trials": 12}))
    running: list[tuple[str, dict[str, Any]]] = []
    computed = 0
    while True:
        trial = bench.start() if len(running) < 3 else None
        if trial is not None:
            running.append(trial)
        busy = [t[1]["stage1"] for t in running if not bench.folder.exists(f"stage1/{t[1]['stage1']}/done.json")]
        assert len(set(busy)) == len(busy), "two trials at once compute one stage 1"
        computed = max(computed, len(busy))
        if trial is None:
            if not running:
                break
            bench.end(running.pop(0))
    assert computed > 1, "different stages 1 may be computed side by side"
    rows = bench.study.rows()
    assert sum(row.state == "finished" for row in rows) == 12
    owners = [row for row in rows if row.stage1_seconds]
    assert len(owners) == 3
    assert len({row.stage1 for row in owners}) == 3


def test_a_trial_waits_only_as_long_as_it_must(tmp_path: Path) -> None:
    grid = {TOP_K: {"choice": [4, 8, 16, 32]}}
    bench = Bench(tmp_path, parse_space({"parameters": grid, "budget": {"trials": 4}}))
    first = bench.start()
    assert first is not None
    assert bench.start() is None, "all trials share the stage 1 that the first one is computing"
    assert bench.searcher.suggest("later") is None
    bench.stage1_done(first[1])
    assert bench.start() is not None
    assert bench.start() is not None


def test_no_trial_waits_for_a_stage_1_that_has_failed(tmp_path: Path) -> None:
    grid = {TOP_K: {"choice": [4, 8, 16, 32]}}
    bench = Bench(tmp_path, parse_space({"parameters": grid, "budget": {"trials": 4}}))
    first = bench.start()
    assert first is not None
    bench.folder.write_json(f"stage1/{first[1]['stage1']}/failed.json", {"error": "the loss is nan"})
    others = [bench.start() for _ in range(3)]
    for trial in (first, *others):
        assert trial is not None
        told = {"stage": "failed", "error": "the loss is nan", "seconds": 2.0}
        bench.searcher.on_trial_complete(trial[0], told)
    assert [(row.state, row.stage1_seconds) for row in bench.study.rows() if row.state not in VOID] == [
        ("failed", 0)
    ] * 4


def test_finished_is_said_when_the_budget_is_used_and_nothing_waits(tmp_path: Path) -> None:
    bench = Bench(tmp_path, space(budget={"trials": 2}))
    for _ in range(2):
        trial = bench.start()
        assert trial is not None
        bench.end(trial)
    assert bench.searcher.suggest("x") == "FINISHED"


def test_no_trial_starts_after_the_hours(tmp_path: Path) -> None:
    bench = Bench(tmp_path, space(budget={"trials": 9, "hours": 0.5}))
    trial = bench.start()
    assert trial is not None
    bench.searcher._clock.before = 3600.0
    bench.end(trial)
    assert bench.searcher.suggest("x") == "FINISHED"


def test_the_start_is_tried_even_if_preparing_used_up_the_hours(tmp_path: Path) -> None:
    bench = Bench(tmp_path, space(budget={"trials": 9, "hours": 0.5}))
    bench.searcher._clock.before = 3600.0
    first = bench.start()
    assert first is not None
    assert first[1]["is_start"]
    assert bench.searcher.suggest("x") == "FINISHED"
    bench.end(first)
    assert bench.searcher.suggest("x") == "FINISHED"
    assert bench.study.best() == first[1]["number"]


def test_the_start_is_kept_though_it_had_not_begun_when_the_hours_ended(tmp_path: Path) -> None:
    Bench(tmp_path, space()).study.ask()  # killed before it was handed on
    late = Bench(tmp_path, space(budget={"trials": 9, "hours": 0.5}))
    late.searcher._clock.before = 3600.0
    first = late.start()
    assert first is not None
    assert (first[1]["is_start"], late.study.rows()[0].state) == (True, "running")
    assert late.study.draw_of(0).config == Config()


def test_after_the_hours_what_was_interrupted_goes_on_and_what_only_waited_does_not(tmp_path: Path) -> None:
    one_stage1 = parse_space({"parameters": {TOP_K: GRID[TOP_K]}, "budget": {"trials": 4, "hours": 0.5}})
    before = Bench(tmp_path, one_stage1)
    cut = before.start()
    assert cut is not None
    assert before.start() is None
    assert len(before.searcher.waiting) > 0
    after = Bench(tmp_path, one_stage1)
    after.searcher._clock.before = 3600.0
    again = after.start()
    assert again is not None
    assert again[1] == cut[1]
    after.end(again)
    assert after.searcher.suggest("x") == "FINISHED"
    assert [row.state for row in after.study.rows() if row.state not in VOID] == ["finished"]
    assert after.study.tried() == 1


def test_what_an_accident_ended_is_tried_again_by_resume(tmp_path: Path) -> None:
    wanted = space(budget={"trials": 2})
    before = Bench(tmp_path, wanted)
    died = before.start()
    assert died is not None
    before.searcher.on_trial_complete(died[0], None, error=True)
    other = before.start()
    assert other is not None
    before.end(other)
    assert [row.state for row in before.study.rows()] == ["failed", "finished"]
    assert "--resume tries it again" in before.said[0]
    assert before.searcher.suggest("x") == "FINISHED"
    after = Bench(tmp_path, wanted)
    assert after.study.rows()[0].state == "running"
    again = after.start()
    assert again is not None
    assert again[1] == died[1]
    after.end(again)
    assert after.searcher.suggest("x") == "FINISHED"
    assert [(row.state, row.error) for row in after.study.rows()] == [("finished", "")] * 2


def test_an_error_of_the_folder_is_kept_and_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune takes it for an error of the trial, or hands on a traceback's text."""
    bench = Bench(tmp_path, space())
    trial = bench.start()
    assert trial is not None

    def refuse(*_: Any) -> None:
        raise StoreError("cannot look for it: the store is away")

    monkeypatch.setattr(Folder, "exists", refuse)
    with pytest.raises(StoreError, match="the store is away"):
        bench.searcher.on_trial_complete(trial[0], {"stage": "done", "auc": 0.7, "seconds": 1.0})
    monkeypatch.undo()
    assert isinstance(bench.searcher.failure, StoreError)
    with pytest.raises(StoreError, match="the store is away"):
        bench.searcher.suggest("next")


def test_a_full_disk_is_told_in_words_and_ends_the_search(tmp_path: Path) -> None:
    bench = Bench(tmp_path, space())
    trial = bench.start()
    assert trial is not None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "study.db").stat().st_size, limits[1]))
    told = {"stage": "stage1", "epoch": "1" * 100_000, "seconds": 1.0}  # more than the file has room for
    try:
        with pytest.raises(StoreError, match=r"cannot write .*study\.db: disk I/O error; check space and permissions"):
            bench.searcher.on_trial_result(trial[0], told)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(bench.searcher.failure, StoreError)
    with pytest.raises(StoreError, match="disk I/O error"):
        bench.searcher.suggest("next")


def test_ends_are_told_apart(tmp_path: Path) -> None:
    bench = Bench(tmp_path, space(budget={"trials": 9}))
    started = []
    for _ in range(5):
        trial = bench.start()
        assert trial is not None
        bench.stage1_done(trial[1])
        started.append(trial)
    done, stopped, failed, died, one_class = started
    told = {"stage": "stage2", "epoch": 1, "progress": 1.0, "step": 10, "best_auc": 0.6, "seconds": 4.0}
    bench.searcher.on_trial_result(done[0], told)
    bench.end(done, 0.8)
    bench.searcher.on_trial_complete(stopped[0], told)
    bench.searcher.on_trial_complete(failed[0], {"stage": "failed", "error": "the loss is nan", "seconds": 2.0})
    bench.searcher.on_trial_complete(died[0], None, error=True)
    bench.searcher.on_trial_complete(
        one_class[0], {"stage": "done", "auc": None, "keys": 1.0, "seconds_a_million": 1.0, "seconds": 1.0}
    )
    by_number = {row.number: row for row in bench.study.rows()}
    rows = [by_number[trial[1]["number"]] for trial in started]
    assert [row.state for row in rows] == ["finished", "pruned", "failed", "failed", "failed"]
    assert rows[0].auc == 0.8
    assert (rows[1].auc, rows[1].seconds, rows[1].curve) == (0.6, 4.0, [(1.0, 0.6)])
    assert "nan" in rows[2].error
    assert "died" in rows[3].error
    assert "one class" in rows[4].error
    assert len(bench.said) == 5


def test_a_trial_has_run_only_since_it_had_a_process(tmp_path: Path) -> None:
    bench = Bench(tmp_path, space())
    trial = bench.start()
    assert trial is not None
    started = bench.study.rows()[0].started
    assert started is not None
    assert bench.study.rows()[0].ran is None
    bench.searcher._clock.before = 100.0  # while an autoscaler starts a node
    starts, of = _Starts(bench.searcher, bench.said.append), SimpleNamespace(trial_id=trial[0])
    starts.on_trial_start(0, [], of)
    bench.searcher._clock.before = 200.0
    starts.on_trial_start(1, [], of)  # started anew
    row = bench.study.rows()[0]
    assert row.started == started
    assert row.ran is not None
    assert 100.0 <= row.ran < 200.0


def test_seconds_of_an_attempt_that_tune_started_anew_are_kept(tmp_path: Path) -> None:
    bench = Bench(tmp_path, space())
    trial = bench.start()
    assert trial is not None
    for seconds in (10.0, 30.0, 5.0):  # the third report comes from a new process
        bench.searcher.on_trial_result(trial[0], {"stage": "stage1", "epoch": 1, "seconds": seconds})
    bench.end(trial)
    assert bench.study.rows()[0].seconds == 37.0


@pytest.mark.usefixtures("store_in_memory")
def test_a_store_knows_that_a_trial_was_begun(tmp_path: Path) -> None:
    killed = Bench(tmp_path, space())
    trial = killed.start()
    assert trial is not None
    after = Bench(tmp_path, space(budget={"trials": 9, "hours": 0.5}))
    assert after.study.rows()[0].started is not None
    assert after.study.owns(0)
    after.searcher._clock.before = 3600.0
    again = after.start()
    assert again is not None
    assert again[1] == trial[1]


def test_seconds_of_a_stage_1_count_once_though_its_first_owner_was_lost(tmp_path: Path) -> None:
    one_stage1 = parse_space({"parameters": {TOP_K: GRID[TOP_K]}, "budget": {"trials": 3}})
    before = Bench(tmp_path, one_stage1)
    lost = before.start()
    assert lost is not None
    before.searcher.on_trial_complete(lost[0], None, error=True)
    for _ in range(2):
        trial = before.start()
        assert trial is not None
        before.end(trial)
    after = Bench(tmp_path, one_stage1)
    again = after.start()
    assert again is not None
    assert again[1] == lost[1]
    after.end(again)
    rows = [row for row in after.study.rows() if row.state == "finished"]
    assert sorted(row.stage1_seconds for row in rows) == [0.0, 0.0, 5.0]


def test_what_was_interrupted_is_served_first_in_the_folder_it_had(tmp_path: Path) -> None:
    wanted = space(budget={"trials": 5})
    before = Bench(tmp_path, wanted)
    done, cut = before.start(), before.start()
    assert done is not None
    assert cut is not None
    before.end(done)
    after, served = Bench(tmp_path, wanted), []
    while (trial := after.start()) is not None:
        after.end(trial)
        served.append(trial[1])
    assert cut[1] in served[: len(before.searcher.waiting) + 1]
    assert [row.state for row in after.study.rows()].count("finished") == 5


def test_the_start_is_marked_for_asha(tmp_path: Path) -> None:
    bench = Bench(tmp_path, space())
    first, second = bench.start(), bench.start()
    assert first is not None
    assert second is not None
    assert [first[1]["is_start"], second[1]["is_start"]] == [True, False]
