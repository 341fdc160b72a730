"""What a search has tried, as plain data, and what its page and its board ask of that. No optuna, torch or Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpgr.report.page import NONE, clip, number, real, setting

STATES = ("running", "finished", "pruned", "failed", "waiting", "repeated")


@dataclass(frozen=True)
class Dimension:
    """A setting that varies: a number between low and high, or a category of `choices` (any YAML scalars)."""

    path: str
    kind: str
    """number or category."""
    log: bool = False
    low: float | None = None
    high: float | None = None
    choices: tuple[Any, ...] = ()

    @property
    def ordered(self) -> bool:
        """Whether more and less mean something: a number, or a choice of numbers."""
        return self.kind != "category" or all(real(c) is not None for c in self.choices)

    @property
    def searched(self) -> str:
        """What is searched: `0.0002 to 0.005, log` or `candidate, all`."""
        if self.kind == "category":
            return ", ".join(setting(c) for c in self.choices)
        ends = [NONE if end is None else number(end) for end in (self.low, self.high)]
        return " to ".join(ends) + (", log" if self.log else "")


@dataclass(frozen=True)
class TrialRow:
    """One trial. state: finished, pruned, failed, repeated, running or waiting; seconds since the search began."""

    number: int
    state: str
    values: Mapping[str, Any]
    """Drawn value by path; a conditional dimension may be absent."""
    auc: float | None
    """Best validation AUC so far."""
    cost: float | None
    """Second objective, where there is one."""
    curve: Sequence[tuple[float, float]]
    """(epoch of stage 2, validation AUC)."""
    seconds: float
    """Time in training, all attempts together."""
    stage1: str
    """Short key of the stage 1 it uses, "" without one."""
    stage1_seconds: float
    """What it spent computing stage 1; 0: it was reused."""
    started: float | None
    """When it was given to Ray Tune, which may then wait for a node."""
    stopped: float | None
    error: str = ""
    phase: str = ""
    """What a running trial does: "stage1 epoch 3"."""
    ran: float | None = None
    """When its process first began."""
    suspended: bool = False
    """Whether it failed by an accident, and is tried again when the search goes on."""

    def value(self, path: str) -> str:
        """The drawn value as it is written in YAML, - where it was not drawn."""
        return setting(self.values[path]) if path in self.values else NONE

    @property
    def doing(self) -> str:
        """The phase while it runs, else its state."""
        return self.phase if self.phase and self.state == "running" else self.state

    @property
    def reason(self) -> str:
        """Last line of the error: where a traceback says what went wrong."""
        return self.error.strip().rpartition("\n")[2]


Scored = list[tuple[TrialRow, float]]
"""Trials beside their AUC."""


@dataclass(frozen=True)
class SearchData:
    """All a report of a search shows, as plain values; sequences and mappings may be empty.

    cost_name: the second objective, less is better; "" for a search by AUC alone.
    importance: share by path. pareto: numbers of the trials on the front. best, default: trial numbers; default is
    the starting configuration. test: stage 2's test figures of the best trial.
    account: trials, trials_finished, trials_pruned, trials_failed, repeats, stage1_computed, stage1_reused,
        stage1_seconds_saved, seconds, training_seconds, node_hours.
    nodes: (seconds since the search began, worker nodes alive, CPUs in the cluster), a step function.
    """

    name: str
    run: str
    config_yaml: str
    space_yaml: str
    dimensions: Sequence[Dimension]
    cost_name: str
    trials: Sequence[TrialRow]
    importance: Mapping[str, float]
    pareto: Sequence[int]
    best: int | None
    default: int | None
    test: Mapping[str, Any]
    account: Mapping[str, Any]
    nodes: Sequence[tuple[float, int, float]]

    def labels(self) -> dict[str, str]:
        """Short name by path: the last part of the path, or as many as tell it from the others."""
        names = {}
        for path in (d.path for d in self.dimensions):
            parts = path.split(".")
            ends = [".".join(parts[-k:]) for k in range(1, len(parts) + 1)]
            others = [f".{d.path}" for d in self.dimensions if d.path != path]
            names[path] = next((e for e in ends if not any(o.endswith(f".{e}") for o in others)), path)
        return names

    def by_importance(self) -> list[Dimension]:
        """Dimensions, the most important first; in their own order where nothing is known."""
        return sorted(self.dimensions, key=lambda d: -self.importance.get(d.path, 0.0))

    def scored(self, *states: str) -> Scored:
        """Trials in order that have an AUC; only those of some states, where any are given."""
        chosen = [t for t in self.trials if not states or t.state in states]
        known = [(t, real(t.auc)) for t in sorted(chosen, key=lambda t: t.number)]
        return [(t, auc) for t, auc in known if auc is not None]

    def leaders(self) -> Scored:
        """Finished trials, the best first; the earlier of equal ones."""
        return sorted(self.scored("finished"), key=lambda pair: (-pair[1], pair[0].number))

    def trial(self, number: int | None) -> tuple[TrialRow, float] | None:
        """The trial of that number beside its AUC, if it has one."""
        return next((pair for pair in self.scored() if pair[0].number == number), None)

    def measure(self) -> tuple[TrialRow, float] | None:
        """The default beside its AUC, once it has finished: one on the way is too low to measure others against."""
        found = self.trial(self.default)
        return found if found is not None and found[0].state == "finished" else None

    def gain(self) -> str:
        """What the best trial has over the default."""
        start = next((t for t in self.trials if t.number == self.default), None)
        if start is not None and start.state != "finished":
            return "the default did not finish" + "; --resume tries it again" * start.suspended
        best, default = self.trial(self.best), self.measure()
        if best is None or default is None:
            return "the default has no AUC"
        if self.best == self.default:
            return "the default is the best"
        return f"{best[1] - default[1]:+.4f} over the default {default[1]:.4f}"

    def counts(self, *leave_out: str) -> str:
        """How many trials there are of each state: `2 running, 18 finished, 7 pruned`."""
        count = Counter(t.state for t in self.trials)
        named = [*STATES, *sorted(set(count) - set(STATES))]
        return ", ".join(f"{count[s]} {s}" for s in named if count[s] and s not in leave_out)

    def numbered(self, trial: TrialRow) -> str:
        return f"{trial.number} (default)" if trial.number == self.default else str(trial.number)

    def settings(self, trial: TrialRow) -> str:
        """`top_k=32, lr=0.0003`: what was drawn, most important first, each short enough for a line."""
        short = self.labels()
        drawn = [d.path for d in self.by_importance() if d.path in trial.values]
        return ", ".join(f"{clip(short[path], 36)}={clip(trial.value(path), 28)}" for path in drawn)
