"""What a search has tried: an Optuna study in the run folder, and nothing else to remember.

A trial is written down before it starts, so what was interrupted is known; whatever a trial did is one of the
study's attributes, so a search can go on, or be read (optuna-dashboard sqlite:///RUN/study.db), from that file alone.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.exceptions import StorageInternalError
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from hpgr.artifacts import SPACE, Folder, fingerprint, refusal
from hpgr.config import Config, dump, validate
from hpgr.errors import ConfigError, StoreError
from hpgr.report.trials import TrialRow
from hpgr.search.space import Distribution, Space, draw, placed, starting_values

FILE = "study.db"
TRIES = 8
"""Draws in a row that were all known before new ones are made at random."""
RANDOM_TRIES = 1000
"""Random draws that were all known before the space counts as exhausted."""
SAVING = threading.Lock()
"""Held from a copy of the file to its arrival, or an older one could take a newer one's place. Not of the study, which
Tune pickles."""
VOID = ("repeated", "void")
"""States of draws that are no trials: known configurations, and ones that are not valid."""


@dataclass(frozen=True)
class Draw:
    """A configuration to try. `stage1` names the stage 1 it needs ("" without one)."""

    number: int
    values: dict[str, Any]
    config: Config
    key: str
    stage1: str

    @property
    def name(self) -> str:
        """Name of its folder: content-addressed, so that no trial can go on with another one's work."""
        return _folder_name(self.number, self.key)


@dataclass(frozen=True)
class Ended:
    """A trial that no resume takes up again: its folder's `name`, the stage 1 it used ("" without one), when it
    stopped, and whether it is the best or on the Pareto front. One that is neither will never be."""

    name: str
    stage1: str
    stopped: float
    may_win: bool


class Study:
    """The study of a search. Not safe for several writers: the driver alone holds it.

    What the disk refuses is Optuna's or SQLite's error; `in_words` around calls makes a StoreError of it.
    """

    def __init__(self, folder: Folder, space: Space, config: Config, stage1_key: Callable[[Config], str]) -> None:
        self._folder, self._space, self._config, self._stage1_key = folder, space, config, stage1_key
        self._tree = dump(config)
        self._path = Path(folder.path(FILE)[1]) if folder.is_local else self._scratch() / FILE
        with refusal("write", str(self._path), SPACE), self.in_words():
            self._open()

    def _open(self) -> None:
        folder, space, config = self._folder, self._space, self._config
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not folder.is_local and folder.exists(FILE):
            self._path.write_bytes(folder.read(FILE))
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        down = len(space.objectives) - 1
        self._storage = optuna.storages.RDBStorage(f"sqlite:///{self._path}")
        self._study = optuna.create_study(
            storage=self._storage,
            study_name=space.name,
            directions=[StudyDirection.MAXIMIZE] + [StudyDirection.MINIMIZE] * down,
            load_if_exists=True,
        )
        self._study_id = self._storage.get_study_id_from_name(space.name)
        self._study.sampler = _sampler(space, len(self._study.trials))
        # A search may end while it draws a trial; what was dropped may be drawn again.
        drawn = [t for t in self._study.trials if "key" in t.user_attrs and _state(t) not in VOID]
        if not drawn and not any(t.state is TrialState.WAITING for t in self._study.trials):
            self._study.enqueue_trial(starting_values(space, config))
        self._known = {t.user_attrs["key"]: t.number for t in drawn}

    @contextmanager
    def in_words(self) -> Iterator[None]:
        """Turns what the disk refuses of the file into a StoreError."""
        try:
            yield
        except (StorageInternalError, SQLAlchemyError, sqlite3.Error) as error:
            raise StoreError(f"cannot write {self._path}: {_innermost(error)}{SPACE}") from error

    def _scratch(self) -> Path:
        """A folder on this machine for as long as the study is used."""
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return Path(folder)

    def interrupted(self) -> list[Draw]:
        """Trials that were running when the search last ended, or were suspended; they count as running again."""
        out = []
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if "key" in trial.user_attrs and _state(trial) in VOID:
                self._tell(trial.number, _state(trial))  # it was being dropped
            elif "key" in trial.user_attrs:
                if "state" in trial.user_attrs:
                    self.note(trial.number, state="running", error="", stopped=None)
                out.append(self._draw_of(trial.number, trial.params))
            else:
                self._tell(trial.number, "void", error="the search ended while it was being drawn")
        return out

    def ask(self) -> Draw | None:
        """A configuration that was not tried before, or None when the space has no other.

        A draw that is known is told what is known; one that contradicts itself is told to have failed. A sampler that
        keeps to what it knows is helped out with a random draw that is new.
        """
        tries = 0
        while (found := self._new()) is None:
            tries += 1
            if tries >= TRIES:
                fresh = self._fresh()
                if fresh is None:
                    return None
                self._study.enqueue_trial(fresh)
        self._known[found.key] = found.number
        self.save()
        return found

    def _new(self) -> Draw | None:
        """The sampler's next draw, if it is a trial."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = self._study.ask()
            values = draw(self._space, self._tree, lambda path, d: _suggest(trial, path, d))
        try:
            found = self._draw_of(trial.number, values)
        except ConfigError as error:
            self._tell(trial.number, "void", error=str(error).splitlines()[-1].strip())
            return None
        if found.key in self._known:
            self._repeat(trial.number, self._known[found.key])
            return None
        self.note(trial.number, stage1=found.stage1)
        self.note(trial.number, key=found.key)  # last: what has it is a trial, however soon after the driver dies
        return found

    def _fresh(self) -> dict[str, Any] | None:
        """Random values that were not tried; None when RANDOM_TRIES find none."""
        rng = np.random.default_rng([self._space.sampler.seed, len(self._known)])
        for _ in range(RANDOM_TRIES):
            values = draw(self._space, self._tree, lambda path, d: d.sample(rng))
            try:
                if self._draw_of(-1, values).key not in self._known:
                    return values
            except ConfigError:
                continue
        return None

    def note(self, number: int, **attributes: Any) -> None:
        """Keep attributes of a trial, as `TrialRow` names them."""
        for name, value in attributes.items():
            self._storage.set_trial_user_attr(self._id(number), name, value)

    def report(self, number: int, progress: float, auc: float) -> None:
        """Validation AUC of a running trial after `progress` epochs. Optuna, which ranks trials by how far they came,
        gets thousandths of them: of steps an epoch has the more the smaller a trial's batches are."""
        curve = self._attributes(number).get("curve", [])
        if not curve or curve[-1][0] < progress:
            self.note(number, curve=[*curve, [progress, auc]])
            if len(self._space.objectives) == 1:
                Trial(self._study, self._id(number)).report(auc, round(1000 * progress))

    def finish(self, number: int, state: str, **attributes: Any) -> None:
        """End a trial: `finished` (attributes hold its objectives), `pruned` or `failed` (with an `error`)."""
        self._tell(number, state, **attributes)
        self.save()

    def suspend(self, number: int, **attributes: Any) -> None:
        """A trial that an accident ended: it reads as failed, and is taken up again when the search goes on."""
        self.note(number, state="failed", **attributes)
        self.save()

    def suspended(self) -> int:
        """How many trials read as failed but will be taken up again."""
        return sum(row.suspended for row in self.rows())

    def drop(self, draw: Draw) -> None:
        """Forget a draw that was never started: it is no trial, and may be drawn again."""
        self._tell(draw.number, "void")
        del self._known[draw.key]
        self.save()

    def ended(self) -> list[Ended]:
        """Trials that have ended for good, however they did."""
        winners = {self.best(), *self.pareto()}
        done = [t for t in self._trials() if t.state.is_finished() and _state(t) in ("finished", "pruned", "failed")]
        return [
            Ended(_folder_name(t.number, kept["key"]), kept["stage1"], kept.get("stopped", 0.0), t.number in winners)
            for t in done
            if (kept := t.user_attrs)
        ]

    def rows(self) -> list[TrialRow]:
        """All draws in order."""
        return [self._row(trial) for trial in self._trials()]

    def owns(self, number: int) -> bool:
        """Whether the trial is the one that computes its stage 1."""
        return bool(self._attributes(number).get("owns"))

    def start(self) -> int | None:
        """Number of the starting configuration's trial: 0, unless the search ended while it was being drawn."""
        return min(self._known.values(), default=None)

    def tried(self) -> int:
        """How many different configurations have been asked for."""
        return len(self._known)

    def best(self) -> int | None:
        """Number of the finished trial of highest AUC; the first of equal ones."""
        done = [row for row in self.rows() if row.state == "finished" and row.auc is not None]
        return max(done, key=lambda row: (row.auc, -row.number)).number if done else None

    def pareto(self) -> list[int]:
        """Finished trials that no other one beats in both objectives; empty for one objective."""
        if len(self._space.objectives) == 1:
            return []
        return [t.number for t in self._study.best_trials if _state(t) == "finished"]

    def importance(self) -> dict[str, float]:
        """Share of each dimension in what makes a trial good (PED-ANOVA); empty for too few trials."""
        done = [row for row in self.rows() if row.state == "finished"]
        if len(done) < 4 or len({row.auc for row in done}) < 2:
            return {}
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        # The evaluator takes a target for one to be low, whatever the study's direction.
        target = (lambda t: -t.values[0]) if len(self._space.objectives) > 1 else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            shares = optuna.importance.get_param_importances(self._study, evaluator=evaluator, target=target)
        return {path: float(share) for path, share in shares.items()}

    def memory(self, name: str, default: Any) -> Any:
        """What the search keeps over resumes."""
        return self._study.user_attrs.get(name, default)

    def remember(self, name: str, value: Any) -> None:
        self._study.set_user_attr(name, value)

    def save(self) -> None:
        """Bring the file to where it belongs; every draw and every end of a trial does so too. Any thread may."""
        if not self._folder.is_local:
            with SAVING:
                self._folder.write(FILE, self._copy())

    def _copy(self) -> bytes:
        """The file as it is between two commits: another thread may be amid one."""
        with closing(sqlite3.connect(self._path)) as file, closing(sqlite3.connect(":memory:")) as whole:
            file.backup(whole)
            return whole.serialize()

    def draw_of(self, number: int) -> Draw:
        """The configuration of a trial."""
        return self._draw_of(number, self._trials()[number].params)

    def _draw_of(self, number: int, values: dict[str, Any]) -> Draw:
        values = self._on_grid(values)
        config = validate(placed(self._tree, values))
        tree = dump(config)
        key = fingerprint({k: tree[k] for k in ("seed", "stream", "model", "stage1", "stage2", "evaluation")})
        return Draw(number, values, config, key, self._stage1_key(config) if config.stage1.enabled else "")

    def _on_grid(self, values: dict[str, Any]) -> dict[str, Any]:
        return {path: self._space.parameters[path].on_grid(value) for path, value in values.items()}

    def _repeat(self, number: int, known: int) -> None:
        """Answer a draw with what an equal one got; one that is still running has no answer yet."""
        before = self._trials()[known]
        result = {k: v for k, v in before.user_attrs.items() if k in ("auc", *self._space.objectives)}
        self.note(number, repeats=known)
        if _state(before) == "finished":
            self._tell(number, "repeated", **result)
        elif _state(before) == "pruned" and before.intermediate_values:
            step, value = max(before.intermediate_values.items())
            Trial(self._study, self._id(number)).report(value, step)
            self._tell(number, "repeated", as_state=TrialState.PRUNED)
        else:
            self._tell(number, "repeated", as_state=TrialState.FAIL)

    def _tell(self, number: int, state: str, as_state: TrialState | None = None, **attributes: Any) -> None:
        self.note(number, state=state, **attributes)
        if as_state is None:
            as_state = {"pruned": TrialState.PRUNED, "failed": TrialState.FAIL, "void": TrialState.FAIL}.get(state)
        if as_state is TrialState.PRUNED and len(self._space.objectives) > 1:
            as_state = TrialState.FAIL
        values = None if as_state else [attributes[name] for name in self._space.objectives]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._study.tell(number, values, state=as_state)

    def _row(self, trial: FrozenTrial) -> TrialRow:
        kept = trial.user_attrs
        return TrialRow(
            number=trial.number,
            state=_state(trial),
            values=self._on_grid(trial.params),
            auc=kept.get("auc") if _state(trial) != "void" else None,
            cost=kept.get(self._space.objectives[-1]) if len(self._space.objectives) > 1 else None,
            curve=[(at, auc) for at, auc in kept.get("curve", [])],
            seconds=kept.get("seconds", 0.0),
            stage1=kept.get("stage1", "")[:8],
            stage1_seconds=kept.get("stage1_seconds", 0.0),
            started=kept.get("started"),
            ran=kept.get("ran"),
            stopped=kept.get("stopped"),
            error=kept.get("error", ""),
            phase=kept.get("phase", ""),
            suspended=trial.state is TrialState.RUNNING and _state(trial) == "failed",
        )

    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def _attributes(self, number: int) -> dict[str, Any]:
        return self._storage.get_trial(self._id(number)).user_attrs


def _innermost(error: BaseException) -> BaseException:
    """SQLite's own word: around it are SQLAlchemy's of the statement and Optuna's guess at the data."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _folder_name(number: int, key: str) -> str:
    return f"{number:04d}-{key[:8]}"


def _state(trial: FrozenTrial) -> str:
    waiting = {TrialState.WAITING: "void", TrialState.RUNNING: "running"}
    return str(trial.user_attrs.get("state", waiting.get(trial.state, "void")))


def _suggest(trial: Trial, path: str, distribution: Distribution) -> Any:
    kind = distribution.optuna()
    if isinstance(kind, CategoricalDistribution):
        return trial.suggest_categorical(path, kind.choices)
    if isinstance(kind, FloatDistribution):
        return trial.suggest_float(path, kind.low, kind.high, step=kind.step, log=kind.log)
    return trial.suggest_int(path, kind.low, kind.high, step=kind.step, log=kind.log)


def _sampler(space: Space, tried: int) -> BaseSampler:
    """A sampler that draws anew after a resume: its seed takes in how many trials there are."""
    settings = space.sampler
    seed = settings.seed + 1009 * tried
    if settings.kind == "random":
        return RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TPESampler(
            seed=seed, n_startup_trials=settings.startup_trials, multivariate=True, group=True, constant_liar=True
        )
