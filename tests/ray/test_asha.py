"""When ASHA stops trials, and what earlier sessions of a search tell it. No cluster."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from hpgr.on_ray.searcher import asha
from hpgr.report.trials import TrialRow
from hpgr.search.space import Space, parse_space


def space() -> Space:
    return parse_space({"parameters": {"model.pgsa.top_k": {"choice": [4, 8, 16, 32]}}})


def stand_in(name: str, is_start: bool = False, number: int = -1) -> SimpleNamespace:
    """What the scheduler sees of a trial."""
    return SimpleNamespace(trial_id=name, config={"is_start": is_start, "number": number})


def test_asha_knows_what_earlier_sessions_saw() -> None:
    past = [
        TrialRow(n, "finished", {}, auc, None, [(1.0, auc), (3.0, auc)], 1.0, "", 0.0, 0.0, 1.0)
        for n, auc in enumerate((0.8, 0.81, 0.82))
    ]
    new = stand_in("new")

    def decision(rows: list[TrialRow], auc: float) -> str:
        scheduler = asha(space(), 9, rows)
        for row in rows:
            if row.state == "running":
                scheduler.on_trial_add(None, stand_in(f"again-{row.number}", number=row.number))
        scheduler.on_trial_add(None, new)
        return scheduler.on_trial_result(None, new, {"progress": 1.0, "best_auc": auc})

    assert decision(past, 0.7) == "STOP"
    assert decision(past, 0.9) == "CONTINUE"
    assert decision([], 0.7) == "CONTINUE"
    interrupted = [replace(row, state="running") for row in past]
    assert decision(interrupted, 0.7) == "STOP"
    assert decision(interrupted, 0.9) == "CONTINUE"


def test_asha_knows_what_a_trial_that_goes_on_has_seen_itself() -> None:
    """Or its late AUC would stand for it at early rungs, too, and stop trials that are as good as it was there."""
    curve = [(epoch, 0.58 + 0.02 * epoch) for epoch in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)]

    def rungs_and_decision(killed_after: int) -> tuple[list[dict[str, float]], str]:
        past = [TrialRow(n, "running", {}, 0.6, None, curve[:killed_after], 1.0, "", 0.0, 0.0, 1.0) for n in range(2)]
        scheduler = asha(space(), 9, past)
        trials = [stand_in(f"t{n}", number=n) for n in range(2)]
        for trial in trials:
            scheduler.on_trial_add(None, trial)
        for progress, auc in curve[killed_after:]:
            for trial in trials:
                told = {"progress": progress, "best_auc": auc}
                assert scheduler.on_trial_result(None, trial, told) == "CONTINUE"
        new = stand_in("new", number=2)
        scheduler.on_trial_add(None, new)
        rungs = [dict(recorded) for _, recorded in scheduler._brackets[0]._rungs]
        return rungs, scheduler.on_trial_result(None, new, {"progress": 1.0, "best_auc": 0.61})

    assert rungs_and_decision(killed_after=0)[1] == "CONTINUE"
    assert rungs_and_decision(killed_after=3) == rungs_and_decision(killed_after=0)


def test_asha_never_stops_the_start_but_compares_with_it() -> None:
    scheduler = asha(space(), 9, [])
    trials = {name: stand_in(name, is_start=name == "start") for name in ("good", "start", "weak")}
    for trial in trials.values():
        scheduler.on_trial_add(None, trial)
    decisions = {
        name: scheduler.on_trial_result(None, trials[name], {"progress": 1.0, "best_auc": auc})
        for name, auc in (("good", 0.9), ("start", 0.7), ("weak", 0.6))
    }
    assert decisions == {"good": "CONTINUE", "start": "CONTINUE", "weak": "STOP"}
    assert "start" in scheduler._brackets[0]._rungs[-1][1]


def test_asha_passes_over_a_validation_without_an_auc() -> None:
    scheduler = asha(space(), 3, [])
    trial = stand_in("one class")
    scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, trial, {"stage": "stage2", "progress": 1.0}) == "CONTINUE"
    scheduler.on_trial_complete(None, trial, {"stage": "done", "auc": None})


def test_asha_lets_a_trial_make_its_last_report() -> None:
    scheduler = asha(space(), 3, [])
    trial = stand_in("a")
    scheduler.on_trial_add(None, trial)
    for progress in (1.0, 2.0, 3.0):
        assert scheduler.on_trial_result(None, trial, {"progress": progress, "best_auc": 0.6}) == "CONTINUE"
    assert scheduler.on_trial_result(None, trial, {"stage": "done"}) == "CONTINUE"
