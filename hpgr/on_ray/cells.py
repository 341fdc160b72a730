"""Cells of a comparison, each trained in a process of its own; what is done is in its folder and is not done again.

    <run>/cells/<key>/         a run of its own: configuration, stage 2's best weights, test scores
    <run>/cells/<key>/cell.json  its figures, written last; or the numerical error that ended it
    <run>/stage1/<key>/        a stage 1, shared by all cells that agree on it

Plain Ray tasks: a lost process is started anew and goes on from the last checkpoint; a lost driver leaves the folders.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from hpgr.artifacts import FORMAT, Folder
from hpgr.config import Config, dump, to_yaml, validate
from hpgr.data.preparation import Prepared
from hpgr.errors import HpgrError, TrainingError
from hpgr.on_ray.journal import journal
from hpgr.on_ray.parallel import cause
from hpgr.on_ray.pipeline import versions
from hpgr.on_ray.session import quieten
from hpgr.on_ray.train import Crew, train_here, train_on_workers
from hpgr.on_ray.trials import Place, cpus_of, index_of, nested, reserved, run_of
from hpgr.search.matrix import Cell
from hpgr.training.two_stage import Run, clear, has_ended

LOOK_EVERY_SECONDS = 0.5
RECORD = "cell.json"


@dataclass(frozen=True)
class Work:
    """A cell to train, and to test if its row is compared by it. `stage1` names the shared stage 1 ("" without)."""

    cell: Cell
    stage1: str
    place: Place
    test: bool


Done = dict[str, Any]
"""A cell's record: state (finished, failed), its figures, `tested`; of a failed one `error`."""


class Phases:
    """What running cells do, for the screen: an actor that they tell."""

    def __init__(self) -> None:
        self._phases: dict[str, tuple[str, float | None]] = {}

    def note(self, key: str, phase: str, auc: float | None) -> None:
        self._phases[key] = (phase, auc)

    def all(self) -> dict[str, tuple[str, float | None]]:
        return dict(self._phases)


class Cells:
    """Trains cells, `most` at once; of cells that share a stage 1 the first computes it while others wait or others
    are served."""

    def __init__(self, folder: Folder, most: int, say: Callable[[str], None], look: Callable[[], None]) -> None:
        self._folder, self._most, self._say, self._look = folder, most, say, look
        self._phases = ray.remote(num_cpus=0)(Phases).remote()
        self._running: dict[Any, Work] = {}
        self._started: dict[str, float] = {}
        self._known: dict[str, Done] = {}

    def home(self, cell: Cell) -> Folder:
        """The cell's folder."""
        return self._folder.sub("cells").sub(cell.key)

    def record(self, cell: Cell) -> Done | None:
        """What is known of a cell that has ended; read once."""
        if cell.key not in self._known:
            home = self.home(cell)
            if not home.exists(RECORD):
                return None
            self._known[cell.key] = home.read_json(RECORD)
        return self._known[cell.key]

    def run(self, work: Work) -> Run:
        """A trained cell's run, to be opened elsewhere."""
        prepared, stage1 = Prepared.open(Folder(work.place.prepared)), Folder(work.place.stage1)
        shared = stage1.sub(work.stage1) if work.stage1 else None
        return Run(work.cell.config, self.home(work.cell), prepared, shared, index_of(work.cell.config, work.place))

    def running(self) -> list[tuple[str, str, float | None, float]]:
        """Cells at work: label, what they do, best validation AUC so far, seconds since they were started."""
        told, now = ray.get(self._phases.all.remote()), time.monotonic()
        return [
            (work.cell.label, *told.get(work.cell.key, ("starting", None)), now - self._started[work.cell.key])
            for work in self._running.values()
        ]

    def train(self, works: Sequence[Work]) -> None:
        """Bring every cell to its end; one that fails is marked and ends nothing but itself."""
        asked: dict[str, Work] = {}
        for work in works:
            known = asked.get(work.cell.key, work)
            asked[work.cell.key] = replace(known, test=known.test or work.test)
        waiting = deque(work for work in asked.values() if not self._is_done(work))
        while waiting or self._running:
            self._start(waiting)
            ready, _ = ray.wait(list(self._running), timeout=LOOK_EVERY_SECONDS)
            for reference in ready:
                self._end(reference, self._running.pop(reference))
            self._look()

    def _is_done(self, work: Work) -> bool:
        done = self.record(work.cell)
        return done is not None and (done["state"] == "failed" or done["tested"] or not work.test)

    def _start(self, waiting: deque[Work]) -> None:
        for work in list(waiting):
            if len(self._running) >= self._most:
                return
            if self._is_computed_elsewhere(work):
                continue
            waiting.remove(work)
            need = reserved(work.cell.config)
            start = ray.remote(
                num_cpus=need["CPU"],
                num_gpus=need.get("GPU", 0),
                max_retries=work.cell.config.resources.max_failures,
            )(_train_cell)
            settings = {"config": dump(work.cell.config), "stage1": work.stage1, "test": work.test}
            reference = start.remote(settings, self.home(work.cell).uri, work.place, self._phases, work.cell.key)
            self._running[reference] = work
            self._started[work.cell.key] = time.monotonic()

    def _is_computed_elsewhere(self, work: Work) -> bool:
        busy = any(other.stage1 == work.stage1 for other in self._running.values())
        return bool(work.stage1) and busy and not has_ended(Folder(work.place.stage1).sub(work.stage1))

    def _end(self, reference: Any, work: Work) -> None:
        try:
            done = ray.get(reference)
        except RayError as error:
            # Not written down: an accident is tried again when the job goes on.
            done = {"state": "failed", "error": cause(error), "tested": False}
        self._known[work.cell.key] = done
        took = time.monotonic() - self._started[work.cell.key]
        auc = done.get("validation", {}).get("auc")
        figure = f" validation auc {auc:.4f}" if auc is not None else ""
        reason = f" ({done['error'].splitlines()[0][:160]})" if "error" in done else ""
        self._say(f"cell {work.cell.label}: {done['state']}{figure} after {took:.0f} s{reason}")


def _train_cell(settings: dict[str, Any], folder: str, place: Place, phases: Any, key: str) -> Done:
    """The task. Numerical failure is a result; anything else is an accident, and raised."""
    quieten()
    config, home = validate(settings["config"]), Folder(folder)
    if not home.exists("run.json"):
        home.write("config.yaml", to_yaml(config).encode())
        home.write_json("run.json", {"format": FORMAT, "config": dump(config), "versions": versions()})
    run = run_of(config, home, settings["stage1"], place)
    run.prepared.keep(home.sub("prepared"))

    def report(told: dict[str, Any]) -> None:
        phases.note.remote(key, f"{told['stage']} epoch {told['epoch']}", told.get("best_auc"))

    try:
        done = _record(_trained(run, report, settings["test"]), settings["test"])
    except TrainingError as error:
        if error.goes_on:  # workers lost
            raise
        done = {"state": "failed", "error": str(error), "tested": settings["test"]}
    home.write_json(RECORD, done)
    with suppress(HpgrError):  # what a store refuses to delete ends no cell that is done
        clear(home.sub("stage2"))
        if run.stage1 is not None and has_ended(run.stage1):
            clear(run.stage1)
    return done


def _trained(run: Run, report: Callable[[dict[str, Any]], None], test: bool) -> dict[str, Any]:
    config, threads = run.config, max(1, int(cpus_of(run.config)))
    with journal(run.folder, partial(print, flush=True)) as say:
        if nested(config):
            return train_on_workers(run, say, Crew(cpus_of(config), threads, test=test))
        torch.set_num_threads(threads)
        return train_here(run, _device(config), say, report, test)


def _device(config: Config) -> torch.device:
    return torch.device("cuda" if config.resources.on_gpu else "cpu")


def _record(figures: dict[str, Any], test: bool) -> Done:
    stage2, seconds = figures["stage2"], figures["seconds"]
    parts = {"stage2": stage2} | ({"stage1": figures["stage1"]} if "stage1" in figures else {})
    return {
        "state": "finished",
        "tested": test,
        "validation": stage2["validation"],
        "test": stage2["test"] if test else None,
        "next_item": parts["stage1"]["test" if test else "validation"] if "stage1" in parts else None,
        "baselines": figures.get("baselines", {}),
        "seconds": {name: seconds[name] for name in parts},
        "scoring_a_million": seconds["scoring_a_million"],
        "keys": stage2["cost"]["keys"],
        "parameters": stage2["parameters"],
        "steps": {name: part["steps"] for name, part in parts.items()},
    }
