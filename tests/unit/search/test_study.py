"""The study remembers a search: nothing is tried twice, nothing that was begun is forgotten."""

from __future__ import annotations

import gc
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import RDBStorage

from hpgr.artifacts import Folder, fingerprint
from hpgr.config import Config
from hpgr.errors import StoreError
from hpgr.search.space import Space, parse_space, starting_values
from hpgr.search.study import Draw, Study

GAP = "stream.session_gap_minutes"
TOP_K = "model.pgsa.top_k"
GRID: dict[str, Any] = {GAP: {"choice": [15, 30, 60]}, TOP_K: {"choice": [8, 32]}}


def space(parameters: dict[str, Any] = GRID, **more: Any) -> Space:
    return parse_space({"parameters": parameters, **more})


def opened(folder: Path, wanted: Space | None = None, config: Config | None = None) -> Study:
    key = lambda c: fingerprint(c.stream.session_gap_minutes)
    return Study(Folder(str(folder)), wanted or space(), config or Config(), key)


def finished(study: Study, draw: Draw, auc: float, **more: Any) -> None:
    study.finish(draw.number, "finished", auc=auc, **more)


def asked(study: Study) -> Draw:
    found = study.ask()
    assert found is not None
    return found


def test_the_search_starts_from_the_configuration(tmp_path: Path) -> None:
    first = asked(opened(tmp_path))
    assert first.number == 0
    assert first.values == {GAP: 30.0, TOP_K: 32}
    assert first.config == Config()


def test_a_grid_is_walked_once_and_then_exhausted(tmp_path: Path) -> None:
    study, seen = opened(tmp_path), []
    while (found := study.ask()) is not None:
        seen.append((found.values[GAP], found.values[TOP_K]))
        finished(study, found, 0.5 + 0.001 * len(seen))
    assert sorted(seen) == [(gap, k) for gap in (15, 30, 60) for k in (8, 32)]
    assert study.tried() == 6
    states = [row.state for row in study.rows()]
    assert states.count("finished") == 6
    assert states.count("repeated") == len(states) - 6 > 0


def test_a_repeat_is_answered_with_what_is_known(tmp_path: Path) -> None:
    study = opened(tmp_path, space({TOP_K: {"choice": [8, 32]}}))
    for auc in (0.7, 0.8):
        finished(study, asked(study), auc)
    assert study.ask() is None
    known = {row.values[TOP_K]: row.auc for row in study.rows() if row.state == "finished"}
    repeats = [row for row in study.rows() if row.state == "repeated"]
    assert repeats
    assert all(row.auc == known[row.values[TOP_K]] for row in repeats)
    assert study.best() == max(row.number for row in study.rows() if row.state == "finished")


def test_stage_1_is_named_by_what_it_depends_on(tmp_path: Path) -> None:
    study, keys = opened(tmp_path), {}
    while (found := study.ask()) is not None:
        keys.setdefault(found.values[GAP], set()).add(found.stage1)
    assert all(len(names) == 1 for names in keys.values())
    assert len({name for names in keys.values() for name in names}) == 3
    off = parse_space({"parameters": {TOP_K: {"choice": [8, 32]}}})
    config = Config.model_validate({"stage1": {"enabled": False}, "model": {"pgsa": {"anchors": "live"}}})
    assert asked(opened(tmp_path / "off", off, config)).stage1 == ""


def test_what_was_interrupted_comes_back_as_it_was(tmp_path: Path) -> None:
    study = opened(tmp_path)
    done, cut = asked(study), asked(study)
    study.report(cut.number, 1.0, 0.61)
    finished(study, done, 0.7)
    again = opened(tmp_path)
    assert again.interrupted() == [cut]
    assert again.interrupted()[0].name == cut.name
    assert again._trials()[cut.number].intermediate_values == {1000: 0.61}, "Optuna ranks trials by epochs"
    rows = {row.number: row for row in again.rows()}
    assert (rows[0].state, rows[0].auc) == ("finished", 0.7)
    assert (rows[1].state, rows[1].curve) == ("running", [(1.0, 0.61)])
    assert again.tried() == 2
    keys = {done.key, cut.key}
    while (found := again.ask()) is not None:
        assert found.key not in keys
        keys.add(found.key)
    assert len(keys) == 6


def test_a_search_that_ended_while_it_drew_goes_on(tmp_path: Path) -> None:
    """Asked for, at most half named, never run."""
    study = opened(tmp_path, space(GRID))
    first = asked(study)
    study._study.ask()
    again = opened(tmp_path, space(GRID))
    assert [draw.number for draw in again.interrupted()] == [first.number]
    assert [row.state for row in again.rows()] == ["running", "void"]
    assert again.tried() == 1
    assert asked(again).number == 2


@pytest.mark.parametrize("writes", range(8))
def test_a_driver_may_die_between_any_two_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    """However much of a draw was written down, the next search opens, and tries each configuration once."""
    write, left = RDBStorage.set_trial_user_attr, writes

    def dying(storage: RDBStorage, *words: Any, **named: Any) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        write(storage, *words, **named)

    def driver() -> None:
        study = opened(tmp_path, two)
        while True:
            finished(study, asked(study), 0.5)

    two = space({TOP_K: {"choice": [8, 32]}})
    with monkeypatch.context() as patch:
        patch.setattr(RDBStorage, "set_trial_user_attr", dying)
        with pytest.raises(KeyboardInterrupt):
            driver()
    again = opened(tmp_path, two)
    for cut in again.interrupted():
        finished(again, cut, 0.5)
    while again.tried() < 2:
        finished(again, asked(again), 0.5)
    values = [row.values[TOP_K] for row in again.rows() if row.state == "finished"]
    assert sorted(values) == [8, 32]
    assert len(again.ended()) == 2


def test_a_draw_that_was_being_dropped_is_dropped(tmp_path: Path) -> None:
    study = opened(tmp_path)
    first = asked(study)
    study.note(first.number, state="void")  # and the driver dies before Optuna is told
    again = opened(tmp_path)
    assert again.interrupted() == []
    assert again.tried() == 0
    assert asked(again).values == first.values


def test_the_start_is_drawn_again_if_the_search_ended_while_it_was_drawn(tmp_path: Path) -> None:
    start = starting_values(space(), Config())
    for _ in range(2):
        opened(tmp_path)._study.ask()
    again = opened(tmp_path)
    assert again.interrupted() == []
    first = asked(again)
    assert first.values == start
    assert again.start() == first.number == 2


def test_a_draw_that_contradicts_itself_is_no_trial(tmp_path: Path) -> None:
    parameters = {
        "stage1.enabled": {"choice": [True, False]},
        "model.pgsa.anchors": {"choice": ["frozen", "live"]},
    }
    live = Config.model_validate({"model": {"pgsa": {"anchors": "live"}}})
    study, seen = opened(tmp_path, space(parameters), live), []
    while (found := study.ask()) is not None:
        seen.append((found.config.stage1.enabled, found.config.model.pgsa.anchors))
    assert sorted(seen) == [(False, "live"), (True, "frozen"), (True, "live")]
    voids = [row for row in study.rows() if row.state == "void" and row.error]
    assert all("anchors" in row.error for row in voids)


def test_a_start_on_the_grid_is_known_when_it_is_drawn_again(tmp_path: Path) -> None:
    """Binary fractions would make another configuration of it, with a stage 1 and a folder of its own."""
    wanted = space({"model.dropout": {"uniform": [0.0, 0.4], "step": 0.1}}, sampler={"kind": "random"})
    study = opened(tmp_path, wanted, Config.model_validate({"model": {"dropout": 0.3}}))
    drawn = []
    while (found := study.ask()) is not None:
        drawn.append(found.values["model.dropout"])
        finished(study, found, 0.5)
    assert drawn[0] == 0.3
    assert sorted(drawn) == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert {row.values["model.dropout"] for row in study.rows()} == set(drawn)


def test_a_suspended_trial_reads_as_failed_and_comes_back(tmp_path: Path) -> None:
    study = opened(tmp_path)
    lost = asked(study)
    study.suspend(lost.number, error="its process died", stopped=9.0)
    assert (study.rows()[0].state, study.rows()[0].error) == ("failed", "its process died")
    assert study.tried() == study.suspended() == 1
    again = opened(tmp_path)
    assert again.interrupted() == [lost]
    assert again.suspended() == 0
    row = again.rows()[0]
    assert (row.state, row.error, row.stopped) == ("running", "", None)


def test_a_dropped_draw_is_no_trial_and_may_be_drawn_again(tmp_path: Path) -> None:
    study = opened(tmp_path, space({TOP_K: {"choice": [8, 32]}}))
    finished(study, asked(study), 0.7)
    dropped = asked(study)
    study.drop(dropped)
    assert study.tried() == 1
    assert study.rows()[dropped.number].state == "void"
    again = opened(tmp_path, space({TOP_K: {"choice": [8, 32]}}))
    assert again.interrupted() == []
    assert asked(again).values == dropped.values


def test_a_dropped_start_is_drawn_first_again(tmp_path: Path) -> None:
    study = opened(tmp_path)
    start = asked(study)
    study.drop(start)
    again = opened(tmp_path)
    first = asked(again)
    assert first.values == start.values
    assert again.start() == first.number


def test_a_disk_that_refuses_the_file_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "a file").touch()
    (tmp_path / "folder/study.db").mkdir(parents=True)
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage/study.db").write_bytes(b"no database" * 100)
    for name, reason in (("a file", ""), ("folder", "unable to open"), ("garbage", "not a database")):
        with pytest.raises(StoreError, match=f"cannot write .*study.db: .*{reason}.*; check space and permissions"):
            opened(tmp_path / name)


def test_pruned_and_failed_trials_are_kept_and_never_best(tmp_path: Path) -> None:
    study = opened(tmp_path)
    good, pruned, failed = asked(study), asked(study), asked(study)
    study.report(pruned.number, 1.0, 0.9)
    study.finish(pruned.number, "pruned", auc=0.9)
    study.finish(failed.number, "failed", error="the loss is nan")
    assert study.best() is None
    finished(study, good, 0.6, seconds=3.0)
    assert study.best() == good.number
    rows = study.rows()
    assert [row.state for row in rows] == ["finished", "pruned", "failed"]
    assert rows[2].error == "the loss is nan"
    assert rows[0].seconds == 3.0


def test_two_objectives_have_a_front(tmp_path: Path) -> None:
    wanted = space(objectives=["auc", "keys"], scheduler={"kind": "none"})
    study = opened(tmp_path, wanted)
    for auc, keys in ((0.70, 30.0), (0.72, 60.0), (0.69, 40.0), (0.60, 5.0)):
        finished(study, asked(study), auc, keys=keys)
    assert sorted(study.pareto()) == [0, 1, 3]
    assert study.best() == 1
    assert [row.cost for row in study.rows()] == [30.0, 60.0, 40.0, 5.0]
    assert opened(tmp_path / "one").pareto() == []


def test_importance_finds_the_dimension_that_matters(tmp_path: Path) -> None:
    parameters = {"model.dropout": {"uniform": [0.0, 0.8]}, "model.pgsa.sigma": {"uniform": [0.0, 8.0]}}
    study = opened(tmp_path, space(parameters, sampler={"kind": "random"}))
    assert study.importance() == {}
    for _ in range(40):
        found = asked(study)
        finished(study, found, 0.5 + 0.3 * found.values["model.dropout"] + 1e-4 * found.values["model.pgsa.sigma"])
    shares = study.importance()
    assert set(shares) == set(parameters)
    assert shares["model.dropout"] > 0.7


def test_importance_asks_what_makes_the_auc_high_beside_a_second_objective_too(tmp_path: Path) -> None:
    """One dimension makes the few good trials, the other the few bad ones."""
    parameters = {"model.dropout": {"uniform": [0.0, 0.8]}, "model.pgsa.sigma": {"uniform": [0.0, 8.0]}}
    shares = []
    for objectives in (["auc"], ["auc", "keys"]):
        wanted = space(parameters, objectives=objectives, sampler={"kind": "random"}, scheduler={"kind": "none"})
        study = opened(tmp_path / str(len(objectives)), wanted)
        for _ in range(24):
            found = asked(study)
            good, bad = found.values["model.dropout"] < 0.15, found.values["model.pgsa.sigma"] > 6.5
            noise = 1e-3 * found.values["model.dropout"] * found.values["model.pgsa.sigma"]
            finished(study, found, 0.7 + 0.05 * good - 0.1 * bad + noise, keys=found.values["model.pgsa.sigma"])
        shares.append(study.importance())
    assert shares[0] == pytest.approx(shares[1])
    assert next(iter(shares[0])) == "model.dropout"


def test_draws_differ_between_seeds_and_repeat_for_one(tmp_path: Path) -> None:
    def values(name: str, seed: int) -> list[float]:
        wanted = space({"model.dropout": {"uniform": [0.0, 0.8]}}, sampler={"seed": seed})
        study = opened(tmp_path / name, wanted)
        out = []
        for _ in range(4):
            found = asked(study)
            finished(study, found, 0.5)
            out.append(found.values["model.dropout"])
        return out

    first = values("a", 1)
    assert values("b", 1) == first
    assert values("c", 2) != first


def test_a_search_that_goes_on_draws_what_it_has_not_drawn(tmp_path: Path) -> None:
    """Its random draws do not begin anew, to be dropped as repeats."""
    wanted = space({"model.dropout": {"uniform": [0.0, 0.8]}})
    for _ in range(3):
        study = opened(tmp_path, wanted)
        for _ in range(2):
            finished(study, asked(study), 0.5)
    assert [row.state for row in opened(tmp_path, wanted).rows()] == ["finished"] * 6


def test_tpe_beats_random_on_a_known_surface(tmp_path: Path) -> None:
    def best(kind: str, seed: int) -> float:
        parameters = {"model.dropout": {"uniform": [0.0, 0.9]}, "model.pgsa.sigma": {"uniform": [0.0, 9.0]}}
        wanted = space(parameters, sampler={"kind": kind, "seed": seed})
        study = opened(tmp_path / f"{kind}{seed}", wanted)
        for _ in range(30):
            found = asked(study)
            off = (found.values["model.dropout"] - 0.63) ** 2 + (found.values["model.pgsa.sigma"] / 10 - 0.71) ** 2
            finished(study, found, 0.8 - off)
        return max(row.auc or 0.0 for row in study.rows())

    tpe, random = (sum(best(kind, seed) for seed in range(3)) / 3 for kind in ("tpe", "random"))
    assert tpe > random


@pytest.mark.usefixtures("store_in_memory")
def test_it_lives_on_a_store(tmp_path: Path) -> None:
    """A remote folder gets the file after every draw and every end."""
    study = opened(tmp_path)
    done, cut = asked(study), asked(study)
    finished(study, done, 0.7)
    again = opened(tmp_path)
    assert again.best() == done.number
    assert again.interrupted() == [cut]


def test_a_store_never_gets_an_older_file_after_a_newer_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    slow, is_copied = threading.Event(), threading.Event()

    def write(folder: Folder, name: str, content: bytes) -> None:
        if threading.current_thread() is first:
            is_copied.set()
            slow.wait(0.3)  # the store takes its time, and meanwhile another thread saves
        written.append(content)

    monkeypatch.setattr(Folder, "is_local", property(lambda self: False))
    monkeypatch.setattr(Folder, "exists", lambda self, name="": False)
    monkeypatch.setattr(Folder, "write", write)
    study = opened(tmp_path)
    first = threading.Thread(target=study.save)
    first.start()
    is_copied.wait(5.0)
    study.remember("seconds", 9.0)
    study.save()
    slow.set()
    first.join()
    assert len(written) == 2
    assert written[1] == study._copy()


def test_a_store_gets_whole_commits_and_this_machine_keeps_no_copy(
    tmp_path: Path, store_in_memory: dict[str, bytes]
) -> None:
    study = opened(tmp_path)
    with closing(sqlite3.connect(study._path, check_same_thread=False)) as other:
        other.execute("BEGIN EXCLUSIVE")
        other.execute("CREATE TABLE amid (a)")
        commit = threading.Timer(0.3, other.commit)
        commit.start()
        study.save()
        commit.join()
    (tmp_path / "copy.db").write_bytes(store_in_memory["study.db"])
    with closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        assert copy.execute("SELECT count(*) FROM amid").fetchone() == (0,)
        assert copy.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    scratch = study._path.parent
    assert scratch.exists()
    del study
    gc.collect()
    assert not scratch.exists()


def test_of_equal_trials_the_first_is_the_best(tmp_path: Path) -> None:
    study = opened(tmp_path)
    for auc in (0.5, 0.6, 0.6):
        finished(study, asked(study), auc)
    first = next(row.number for row in study.rows() if row.auc == 0.6)
    assert study.best() == first
