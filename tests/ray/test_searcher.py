"""The order in which trials are handed to Ray Tune, and what earlier sessions tell its scheduler. No cluster."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hpgr.artifacts import Folder, fingerprint
from hpgr.config import Config
from hpgr.on_ray.searcher import Clock, StudySearcher, asha
from hpgr.report.trials import TrialRow
from hpgr.search.space import Space, parse_space
from hpgr.search.study import Study

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


def test_seconds_of_an_attempt_that_tune_started_anew_are_kept(tmp_path: Path) -> None:
    bench = Bench(tmp_path, space())
    trial = bench.start()
    assert trial is not None
    for seconds in (10.0, 30.0, 5.0):  # the third report comes from a new process
        bench.searcher.on_trial_result(trial[0], {"stage": "stage1", "epoch": 1, "seconds": seconds})
    bench.end(trial)
    assert bench.study.rows()[0].seconds == 37.0


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


def test_asha_knows_what_earlier_sessions_saw() -> None:
    past = [
        TrialRow(n, "finished", {}, auc, None, [(1.0, auc), (3.0, auc)], 1.0, "", 0.0, 0.0, 1.0)
        for n, auc in enumerate((0.8, 0.81, 0.82))
    ]
    new = SimpleNamespace(trial_id="new")

    def decision(rows: list[TrialRow], auc: float) -> str:
        scheduler = asha(space(), 9, rows)
        scheduler.on_trial_add(None, new)
        return scheduler.on_trial_result(None, new, {"progress": 1.0, "best_auc": auc})

    assert decision(past, 0.7) == "STOP"
    assert decision(past, 0.9) == "CONTINUE"
    assert decision([], 0.7) == "CONTINUE"


def test_asha_lets_a_trial_make_its_last_report() -> None:
    scheduler = asha(space(), 3, [])
    trial = SimpleNamespace(trial_id="a")
    scheduler.on_trial_add(None, trial)
    for progress in (1.0, 2.0, 3.0):
        assert scheduler.on_trial_result(None, trial, {"progress": progress, "best_auc": 0.6}) == "CONTINUE"
    assert scheduler.on_trial_result(None, trial, {"stage": "done"}) == "CONTINUE"
