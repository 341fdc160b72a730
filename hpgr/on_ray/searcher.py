"""What Ray Tune asks for trials: draws from the study, in an order that computes no stage 1 twice."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from types import SimpleNamespace
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyarrow.fs as pafs
import ray
from ray._raylet import PlacementGroupID
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.placement_group import PlacementGroup, remove_placement_group

from hpgr.artifacts import Folder
from hpgr.config import dump
from hpgr.errors import HpgrError
from hpgr.on_ray.trials import DONE, FAILED
from hpgr.report.trials import TrialRow
from hpgr.search.space import Space
from hpgr.search.study import Draw, Study
from hpgr.training.two_stage import has_ended

P = ParamSpec("P")
R = TypeVar("R")
TIME, METRIC = "progress", "best_auc"
"""Report keys that ASHA compares trials by: epochs of stage 2 done, and best validation AUC so far."""
FREE_AFTER_SECONDS = 3.0 + float(os.environ["TUNE_FORCE_TRIAL_CLEANUP_S"])


@dataclass
class Clock:
    """Seconds that the search has run, all sessions together."""

    before: float
    start: float = field(default_factory=time.monotonic)

    def __call__(self) -> float:
        return self.before + time.monotonic() - self.start


@dataclass
class _Running:
    draw: Draw
    before: float
    """Seconds of earlier attempts."""
    seconds: float = 0.0
    place: str = ""
    """Placement group of its Ray Train workers, if it has some."""


def _noted(method: Callable[Concatenate[StudySearcher, P], R]) -> Callable[Concatenate[StudySearcher, P], R]:
    """Keeps the error that ends a call from Tune, which hands on no more than the text of its traceback."""

    @wraps(method)
    def call(self: StudySearcher, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with self._study.in_words():
                return method(self, *args, **kwargs)
        except HpgrError as error:
            self.failure = self.failure or error
            raise

    return call


class StudySearcher(Searcher):  # type: ignore[misc]
    """Serves what was interrupted, then new draws. One whose stage 1 another trial is computing waits its turn while
    others are served."""

    def __init__(self, study: Study, space: Space, folder: Folder, clock: Clock, say: Callable[[str], None]) -> None:
        super().__init__(metric=METRIC, mode="max")
        self._study, self._space, self._folder, self._clock, self._say = study, space, folder, clock, say
        self._waiting = deque(study.interrupted())
        self._running: dict[str, _Running] = {}
        self._settled: set[str] = set()
        self._exhausted = False
        self.failure: HpgrError | None = None
        """What ended a call from Tune: nothing more is served after it."""

    @property
    def waiting(self) -> list[int]:
        """Numbers of draws that wait for a stage 1 or for their turn."""
        return [draw.number for draw in list(self._waiting)]  # the watch asks while Tune's thread changes it

    @_noted
    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's settings, None to wait, FINISHED when all is asked."""
        if self.failure is not None:  # Tune takes one that ended a trial for the trial's own, and would go on
            raise self.failure
        draw = self._next()
        if draw is None:
            return None if self._waiting or self._more() else Searcher.FINISHED
        row = self._study.rows()[draw.number]
        self._running[trial_id] = _Running(draw, row.seconds)
        if row.started is None:
            owns = bool(draw.stage1) and not self._is_settled(draw.stage1)
            self._study.note(draw.number, owns=owns, started=self._clock())  # in this order: the last tells of both
        self._study.note(draw.number, phase="starting")
        self._study.save()
        return {
            "number": draw.number,
            "is_start": draw.number == self._study.start(),
            "folder": self._folder.sub("trials").sub(draw.name).uri,
            "stage1": draw.stage1,
            "config": dump(draw.config),
        }

    def _next(self) -> Draw | None:
        if self._is_late():
            self._drop_unstarted()
        for draw in list(self._waiting):
            if not self._is_computed_elsewhere(draw):
                self._waiting.remove(draw)
                return draw
        # As many may wait as run: beyond that, draws would only be made with less knowledge.
        while self._more() and len(self._waiting) <= len(self._running):
            new = self._study.ask()
            if new is None:
                self._exhausted = True
                self._say(f"search: space {self._space.name} has no further configuration")
                return None
            if not self._is_computed_elsewhere(new):
                return new
            self._waiting.append(new)
        return None

    def _more(self) -> bool:
        """Whether the budget allows another draw; of hours even if preparing has used them up, the first."""
        if self._exhausted or self._study.tried() >= self._space.budget.trials:
            return False
        return not self._is_late() or self._study.tried() == 0

    def _is_late(self) -> bool:
        hours = self._space.budget.hours
        return hours is not None and self._clock() > 3600 * hours

    def _drop_unstarted(self) -> None:
        """Forget draws that only waited; those that were interrupted go on, and the search must have its start."""
        rows, start = self._study.rows(), self._study.start()
        for draw in list(self._waiting):
            if rows[draw.number].started is None and draw.number != start:
                self._study.drop(draw)
                self._waiting.remove(draw)

    def _is_computed_elsewhere(self, draw: Draw) -> bool:
        busy = {r.draw.stage1 for r in self._running.values()}
        return bool(draw.stage1) and draw.stage1 in busy and not self._is_settled(draw.stage1)

    def _is_settled(self, stage1: str) -> bool:
        if stage1 not in self._settled and has_ended(self._folder.sub("stage1").sub(stage1)):
            self._settled.add(stage1)
        return stage1 in self._settled

    @_noted
    def on_trial_start(self, trial_id: str) -> None:
        """Write down when a trial's process first began: until then it may have waited for a node."""
        running = self._running.get(trial_id)
        if running is not None and self._study.rows()[running.draw.number].ran is None:
            self._study.note(running.draw.number, ran=self._clock())

    @_noted
    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Write down a validation."""
        running = self._running.get(trial_id)
        if running is None or "stage" not in result:
            return
        if running.place and result.get("place", running.place) != running.place:
            self._free(running.place)
        running.place = result.get("place", running.place)
        seconds = result.get("seconds", result.get("time_total_s", 0.0))
        if seconds < running.seconds:  # Tune has started the trial anew
            running.before += running.seconds
        running.seconds = seconds
        number = running.draw.number
        if result["stage"] in (DONE, FAILED):
            return
        phase = f"{result['stage']} epoch {result['epoch']}"
        self._study.note(number, phase=phase, seconds=running.before + seconds)
        if result.get(METRIC) is not None:
            self._study.note(number, auc=result[METRIC])
            self._study.report(number, result[TIME], result[METRIC])

    @_noted
    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Write down how a trial ended."""
        result = result or {}
        self.on_trial_result(trial_id, result)  # Tune keeps the one that the scheduler stopped at to itself
        running = self._running.pop(trial_id, None)
        if running is None:
            return
        draw = running.draw
        kept: dict[str, Any] = {"stopped": self._clock(), "seconds": running.before + running.seconds, "phase": ""}
        rows = self._study.rows()
        row = rows[draw.number]
        # Two own a stage 1 if the first was lost before it was done; whoever ends first has its seconds.
        counted = any(r.stage1_seconds and r.stage1 == row.stage1 for r in rows if r.number != draw.number)
        owns = self._study.owns(draw.number) and not counted
        if owns and self._folder.exists(f"stage1/{draw.stage1}/done.json"):
            kept["stage1_seconds"] = self._folder.read_json(f"stage1/{draw.stage1}/done.json")["seconds"]
        stage = result.get("stage")
        if error:
            state, kept = "failed", kept | {"error": self._crash(draw)}
        elif stage == FAILED:
            state, kept = "failed", kept | {"error": result["error"]}
        elif stage == DONE and result["auc"] is None:
            state, kept = "failed", kept | {"error": "validation has clicks of one class only, so there is no AUC"}
        elif stage == DONE:
            state, kept = "finished", kept | {k: result[k] for k in ("auc", "keys", "seconds_a_million")}
        else:
            state = "pruned"
        if running.place and stage != DONE:
            self._free(running.place)
        if error:
            self._study.suspend(draw.number, **kept)
        else:
            self._study.finish(draw.number, state, **kept)
        self._tell(draw, state, kept, row, "; --resume tries it again" if error else "")

    def _free(self, place: str) -> None:
        """Give back the places of a stopped trial's workers, once Tune has ended its process.

        Ray Train leaves it to an actor that asks the dashboard's API, and that fails where there is no dashboard, or
        where several Rays run on one machine (2.60). While the process lives, it would only start new workers.
        """
        timer = threading.Timer(FREE_AFTER_SECONDS, _remove, (place,))
        timer.daemon = True
        timer.start()

    def _crash(self, draw: Draw) -> str:
        folder = self._folder.sub("trials").sub(draw.name)
        if folder.exists("error.txt"):
            return folder.read("error.txt").decode(errors="replace")[:2000]
        return "its process died without a word, again and again (out of memory?)"

    def _tell(self, draw: Draw, state: str, kept: dict[str, Any], row: TrialRow, hint: str) -> None:
        auc = kept.get("auc", row.auc)
        figure = f" auc {auc:.4f}" if auc is not None else ""
        values = " ".join(f"{path.rpartition('.')[2]}={_short(value)}" for path, value in draw.values.items())
        reason = f" ({kept['error'].splitlines()[0][:160]}{hint})" if "error" in kept else ""
        self._say(f"trial {draw.number}: {state}{figure} after {kept['seconds']:.0f} s | {values}{reason}")

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study is the state."""
        with pafs.LocalFileSystem().open_output_stream(checkpoint_path):
            pass

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study is the state."""


def _remove(place: str) -> None:
    if ray.is_initialized():
        remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(place)))


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class _Asha(AsyncHyperBandScheduler):  # type: ignore[misc]
    """ASHA that compares with the starting configuration but never stops it: only a finished trial can be the best, and
    the search must not end below its start.

    `past` has the curves of trials that go on, by number. Without them a trial's next AUC, which is of a late epoch,
    would also stand for it at the rungs that it passed before, and stop new trials there.
    """

    def __init__(self, past: dict[int, Sequence[tuple[float, float]]], **settings: Any) -> None:
        super().__init__(**settings)
        self._past = past

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        for progress, auc in self._past.get(trial.config["number"], ()):
            super().on_trial_result(tune_controller, trial, {TIME: progress, METRIC: auc})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        return str(TrialScheduler.CONTINUE if trial.config["is_start"] else decision)


def asha(space: Space, epochs: int, past: list[TrialRow]) -> AsyncHyperBandScheduler:
    """ASHA on validation AUC by epoch, knowing what earlier sessions of the search have seen.

    `epochs` are those of the longest trial. Trials of `past` that were interrupted go on, under names that Tune gives.
    """
    scheduler = _Asha(
        {row.number: row.curve for row in past if row.state == "running"},
        time_attr=TIME,
        metric=METRIC,
        mode="max",
        max_t=epochs + 1,  # it stops what reaches max_t, and a trial still has its last report to make
        grace_period=min(space.scheduler.grace_epochs, epochs),
        reduction_factor=space.scheduler.reduction,
    )
    for row in (row for row in past if row.state != "running"):
        stand_in = SimpleNamespace(trial_id=f"past-{row.number}", config={"is_start": False, "number": row.number})
        scheduler.on_trial_add(None, stand_in)
        for progress, auc in row.curve:
            scheduler.on_trial_result(None, stand_in, {TIME: progress, METRIC: auc})
    return scheduler
