"""Search a space over the cluster with Ray Tune; everything worth keeping is in the run folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.tune
from ray.tune.error import TuneError

from hpgr.artifacts import FORMAT, Folder, absolute, check_format
from hpgr.config import Config, Tracking, dump, to_yaml, validate
from hpgr.data.preparation import check_log
from hpgr.data.stream import build_index
from hpgr.errors import ArtifactError, ConfigError, HpgrError, TrainingError
from hpgr.locks import held
from hpgr.on_ray.beside import watched
from hpgr.on_ray.cluster import here, settle
from hpgr.on_ray.leftovers import Leftovers
from hpgr.on_ray.parallel import RayExecute
from hpgr.on_ray.pipeline import (
    Request,
    Say,
    changed_sections,
    keep_log,
    nothing_in,
    prepared_log,
    stored_config,
    tell_of_copy,
    two_stage,
    versions,
)
from hpgr.on_ray.searcher import Clock, StudySearcher, asha
from hpgr.on_ray.session import session
from hpgr.on_ray.tracking import check_tracking, record_search
from hpgr.on_ray.trials import Place, demand, index_of, nested, places, reserved, trial
from hpgr.report.search import board, render_search
from hpgr.report.trials import Dimension, SearchData, TrialRow
from hpgr.search import space as spaces
from hpgr.search.space import Distribution, Space, longest, parse_space, read_space
from hpgr.search.study import VOID, Study
from hpgr.training.two_stage import INDEXES, stage_key


@dataclass(frozen=True)
class SearchRequest:
    """What the job was asked; `config` and `space` None with `resume`: the folder's own."""

    run: str
    config: Config | None
    space: Space | None
    resume: bool


def search(request: SearchRequest, say: Say) -> tuple[dict[str, Any], SearchData]:
    """Run, or go on with, a search; returns search.json and what its report shows.

    Raises:
        HpgrError: the space does not fit, the cluster can never run a trial, no trial finished, or another job works
            on the folder.
    """
    with held(Folder(absolute(request.run)), "jobs/tune.py", say):
        return _search(request, say)


def _search(request: SearchRequest, say: Say) -> tuple[dict[str, Any], SearchData]:
    start = time.monotonic()
    config, space, folder = open_search(request)
    tell_of_copy(folder, say)
    check_tracking(config)
    check_log(config.data)
    with session(say):
        config = settle(config, here(), say, "trial")
        most = places(config, "trial", space.concurrency)
        study = Study(folder, space, config, lambda c: stage_key(c, prepared, "stage1"))  # asked for by draws alone
        clock = Clock(study.memory("seconds", 0.0), start)
        leftovers = Leftovers(folder, study, clock)
        with study.in_words(), watched(study, clock) as watch:
            execute = RayExecute(say)
            prepared = prepared_log(config, execute, say)
            keep_log(folder, prepared)
            place = Place(prepared.folder.uri, folder.sub("stage1").uri, folder.sub("index").uri)
            for name in INDEXES:
                build_index(prepared, config, index_of(config, place), name, execute)
            job = _Search(config, space, folder, study, clock, place, say)
            searcher = StudySearcher(study, space, folder, clock, say)
            watch.board, watch.clear = partial(job.board, searcher), leftovers.clear
            job.run(searcher, most)
            tested = job.promote()
        with study.in_words():
            found = job.conclude(tested)
            leftovers.clear_all()
        return found


def open_search(request: SearchRequest) -> tuple[Config, Space, Folder]:
    """The search's settings and folder, which gets them written where they are new.

    Raises:
        ArtifactError: the folder holds a search and `resume` was not asked, or the reverse, or something else.
        ConfigError: the space does not fit the configuration, or a resumed search would change its settings.
    """
    folder = Folder(absolute(request.run))
    if not folder.exists("run.json"):
        if request.resume:
            raise nothing_in(folder, "search")
        assert request.config is not None
        assert request.space is not None
        spaces.check(request.space, request.config)
        _keep(folder, request.config, request.space, versions())
        return request.config, request.space, folder
    stored = folder.read_json("run.json")
    check_format(stored, f"run folder {folder.uri}")
    if stored.get("kind") != "search":
        raise ArtifactError(f"{folder.uri} holds a run of another job, not a search; give another --run")
    if not request.resume:
        raise ArtifactError(
            f"{folder.uri} already holds a search; add --resume to go on with it, or give another --run"
        )
    _refuse_change(stored, request)
    config, space = request.config or validate(stored["config"]), request.space or parse_space(stored["space"])
    if request.config is not None or request.space is not None:
        _keep(folder, config, space, stored["versions"])
    return config, space, folder


def stored_space(run: str, overrides: Sequence[str]) -> Space | None:
    """The space of a search that goes on, changed by overrides; None if nothing is to change.

    Raises:
        ArtifactError: there is no search in the folder.
    """
    folder = Folder(absolute(run))
    return read_space(folder.read("space.yaml").decode(), f"{folder.uri}/space.yaml", overrides) if overrides else None


def _keep(folder: Folder, config: Config, space: Space, began_with: dict[str, str]) -> None:
    """Write the settings down; `began_with` are the versions that the search began with."""
    folder.write("config.yaml", to_yaml(config).encode())
    folder.write("space.yaml", spaces.to_yaml(space).encode())
    plain = space.model_dump(mode="json", exclude_defaults=True)
    identity = {"format": FORMAT, "kind": "search", "config": dump(config), "space": plain, "versions": began_with}
    folder.write_json("run.json", identity)


def _refuse_change(stored: dict[str, Any], request: SearchRequest) -> None:
    """Only resources and the budget of a search may change when it goes on."""
    changed = []
    if request.config is not None:
        changed += changed_sections(validate(stored["config"]), request.config)
    if request.space is not None:
        old, now = parse_space(stored["space"]).model_dump(), request.space.model_dump()
        changed += [f"space.{k}" for k in old if old[k] != now[k] and k not in ("budget", "concurrency")]
    if changed:
        raise ConfigError(f"--resume goes on with the search's own settings, but {', '.join(changed)} differ(s); leave "
                          "--config, --space and --set out (the budget may change), or start anew")  # fmt: skip


@dataclass
class _Search:
    config: Config
    space: Space
    folder: Folder
    study: Study
    clock: Clock
    place: Place
    say: Say

    def run(self, searcher: StudySearcher, most: int) -> None:
        """Try configurations, `most` at once, until the budget is used.

        Raises:
            HpgrError: the run folder could not be read or written between trials.
        """
        states = [row.state for row in self.study.rows() if row.state not in VOID]
        if states:
            self.say(f"search: going on; {states.count('finished')} trials finished, {states.count('pruned')} pruned, "
                     f"{states.count('running')} interrupted")  # fmt: skip
        if self.study.tried() >= self.space.budget.trials and "running" not in states:
            self.say("search: all trials of the budget are done; a larger space.budget.trials would go on")
            return
        each = f"{demand(self.config)['CPU']:g} CPU"
        if nested(self.config):
            each = f"{self.config.resources.count} Ray Train workers, {each} in all"
        self.say(f"search: {self.space.budget.trials} trials, up to {most} at once, each with {each}")
        try:
            self._tuner(searcher, most).fit()
        except TuneError:
            if searcher.failure is None:
                raise
        finally:
            self.folder.delete("ray_tune")
        if searcher.failure is not None:
            raise searcher.failure

    def _tuner(self, searcher: StudySearcher, most: int) -> ray.tune.Tuner:
        scheduler = None
        if self.space.scheduler.kind == "asha":
            scheduler = asha(self.space, longest(self.space, self.config), self.study.rows())
        filesystem, path = self.folder.path()
        return ray.tune.Tuner(
            ray.tune.with_resources(partial(trial, place=self.place), reserved(self.config)),
            tune_config=ray.tune.TuneConfig(
                search_alg=searcher,
                scheduler=scheduler,
                num_samples=-1,
                max_concurrent_trials=most,
                trial_dirname_creator=lambda t: f"{t.config['number']:04d}",
            ),
            run_config=ray.tune.RunConfig(
                name="ray_tune",
                storage_path=path,
                storage_filesystem=None if self.folder.is_local else filesystem,
                failure_config=ray.tune.FailureConfig(max_failures=self.config.resources.max_failures),
                callbacks=[_Starts(searcher, self.say)],
                verbose=0,
            ),
        )

    def promote(self) -> tuple[int, dict[str, Any]]:
        """Make the best trial's folder a whole run: with its stage 1, tested, with a report of its own.

        Raises:
            HpgrError: no trial finished; a TrainingError if --resume could not change that.
        """
        best = self.study.best()
        if best is None:
            errors = [row.error.splitlines()[0] for row in self.study.rows() if row.state == "failed"]
            if not errors and self.space.budget.hours is not None:
                raise HpgrError("no trial finished: budget.hours ended before any trial could; raise "
                                "space.budget.hours and --resume")  # fmt: skip
            kind = HpgrError if self.study.suspended() else TrainingError
            raise kind(f"no trial finished; {len(errors)} failed, the first with: {(errors or ['-'])[0]}")
        draw = self.study.draw_of(best)
        run = self.folder.sub("trials").sub(draw.name)
        if draw.stage1 and not run.exists("stage1/done.json"):
            shared = self.folder.sub("stage1").sub(draw.stage1)
            for name in (shared.read_json("done.json")["best_file"], "done.json"):
                run.write(f"stage1/{name}", shared.read(name))
        windows = index_of(draw.config, self.place)
        for name in windows.entries():
            if not run.exists(f"index/{name}"):
                run.write(f"index/{name}", windows.read(name))
        self.say(f"search: testing trial {best}, the best")
        config = draw.config
        if not nested(config) and not config.resources.on_gpu:
            here = config.resources.model_copy(update={"workers": 0})
            config = config.model_copy(update={"resources": here})
        config = config.model_copy(update={"tracking": Tracking()})
        metrics, _ = two_stage(Request(run.uri, config, run.exists("run.json")), lambda _: None)
        return best, metrics

    def conclude(self, tested: tuple[int, dict[str, Any]]) -> tuple[dict[str, Any], SearchData]:
        """Write best.yaml, search.json and the report."""
        best, metrics = tested
        draw, test = self.study.draw_of(best), metrics["stage2"]["test"]
        data = self.data(best, test)
        rows = {row.number: row for row in data.trials}
        start, measure = data.default, data.measure()
        files = {"run": metrics["files"]["report"].removesuffix("/report.html")} | metrics["files"]
        result = {
            "best": {"trial": best, "auc": rows[best].auc, "values": draw.values, "test": test, **files},
            **data.account,
            "default": {"trial": start, "auc": measure[1] if measure else None} if start is not None else None,
            "pareto": list(data.pareto),
            "history": [_plain(row) for row in data.trials],
            "nodes": [list(point) for point in data.nodes],
            "versions": versions(),
        }
        # Resources as they were asked for: what `auto` is for a trial says nothing of a run of its own.
        asked = {"resources": stored_config(self.folder.uri, (), "search").resources}
        self.folder.write("best.yaml", to_yaml(draw.config.model_copy(update=asked)).encode())
        self.folder.write("report.html", render_search(data).encode())
        self.folder.write_json("search.json", result)
        record_search(self.config, self.folder, result, self.say)
        return result, data

    def data(self, best: int | None, test: dict[str, Any]) -> SearchData:
        """What the page, the summary and the live table show."""
        rows = self.study.rows()
        return SearchData(
            name=self.space.name,
            run=self.folder.uri,
            config_yaml=to_yaml(self.config),
            space_yaml=spaces.to_yaml(self.space),
            dimensions=[_dimension(path, d) for path, d in self.space.parameters.items()],
            cost_name=COSTS[self.space.objectives[-1]],
            trials=rows,
            importance=self.study.importance() if best is not None else {},
            pareto=self.study.pareto(),
            best=best,
            default=self.study.start(),
            test=test,
            account=self._account(rows),
            nodes=[tuple(point) for point in self.study.memory("nodes", [])],
        )

    def board(self, searcher: StudySearcher) -> str:
        """The live table."""
        waiting = set(searcher.waiting)
        data = self.data(self.study.best(), {})
        rows = [replace(row, state="waiting") if row.number in waiting else row for row in data.trials]
        return board(replace(data, trials=rows), self.clock())

    def _account(self, rows: list[TrialRow]) -> dict[str, Any]:
        """Counts and costs, all sessions of the search together."""
        shared = self.folder.sub("stage1")
        took = {key[:8]: shared.read_json(f"{key}/done.json")["seconds"] for key in shared.entries()
                if shared.exists(f"{key}/done.json")}  # fmt: skip
        reused = [row for row in rows if row.stage1 in took and row.curve and not row.stage1_seconds]
        states = [row.state for row in rows]
        seconds, nodes = self.clock(), self.study.memory("nodes", [])
        ends = [at for at, _, _ in [*nodes, (seconds, 0, 0)][1:]]
        return {
            "trials": sum(state not in VOID for state in states),
            **{f"trials_{state}": states.count(state) for state in ("finished", "pruned", "failed")},
            "repeats": states.count("repeated"),
            "stage1_computed": len(took),
            "stage1_reused": len(reused),
            "stage1_seconds_saved": sum(took[row.stage1] for row in reused),
            "seconds": seconds,
            "training_seconds": sum(row.seconds for row in rows),
            "node_hours": sum(n * (end - at) for (at, n, _), end in zip(nodes, ends, strict=True)) / 3600,
        }


class _Starts(ray.tune.Callback):  # type: ignore[misc]
    """Notes when trials have a process, and tells in a line of those that Tune starts anew, where it would print a
    traceback."""

    def __init__(self, searcher: StudySearcher, say: Say) -> None:
        self._searcher, self._say = searcher, say

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._searcher.on_trial_start(trial.trial_id)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        told = Path(trial.error_file).read_text(errors="replace").strip().rpartition("\n")[2]
        self._say(f"trial {trial.config['number']}: interrupted ({told[:160]}), going on from its last checkpoint")


def _dimension(path: str, distribution: Distribution) -> Dimension:
    if distribution.choice is not None:
        return Dimension(path, "category", choices=tuple(distribution.choice))
    low, high = distribution.ends()
    log = distribution.log_uniform is not None or distribution.log_integer is not None
    return Dimension(path, "number", log, low, high)


def _plain(row: TrialRow) -> dict[str, Any]:
    return asdict(row) | {"values": dict(row.values)}


COSTS = {"auc": "", "keys": "keys a candidate", "seconds_a_million": "seconds a million candidates"}
"""Names of the second objective."""
