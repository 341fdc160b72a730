"""The part of a comparison that measures attention: noise planted in generated logs, and anchors on the log itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any

import numpy as np
import ray
import torch

from hpgr.artifacts import Folder
from hpgr.bootstrap import spread_of
from hpgr.config import Config
from hpgr.data.preparation import Prepared
from hpgr.data.stream import LocalSource
from hpgr.on_ray.cells import Cells, Work
from hpgr.on_ray.pipeline import Say
from hpgr.on_ray.session import quieten
from hpgr.on_ray.trials import Place
from hpgr.scoring.attention import EDGES, Sums, Truth, anchor_overlap, irrelevant_mass
from hpgr.scoring.finished import Finished
from hpgr.search.matrix import Cell, Plan, Values
from hpgr.training.two_stage import Run, stage_key

VIEWS = [[{"column": "event", "value": "view"}]]
"""History of the generated logs of this study: only of engagements is it known whether they matter."""
Open = Callable[[Config], tuple[Prepared, Place]]


@dataclass(frozen=True)
class Pair:
    """The two rows' cells of one seed on one log."""

    sparse: Work
    dense: Work

    def file(self, what: str) -> str:
        """Where what was measured of it is kept."""
        return f"noise/{what}-{self.sparse.cell.key}-{self.dense.cell.key}.json"


@dataclass
class NoiseStudy:
    """Trains what it needs beside the comparison's own cells, and measures; what is measured is not measured again."""

    plan: Plan
    folder: Folder
    cells: Cells
    open_log: Open
    train: Callable[[Sequence[Work]], None]
    say: Say

    def run(self, chosen: Mapping[str, Values], own: Callable[[Cell], Work]) -> dict[str, Any]:
        """The part `noise` of compare.json; rows have their `chosen` values, `own` is the work of a cell of the
        comparison's own log."""
        study = self.plan.matrix.noise
        assert study is not None
        seeds = len(self.plan.matrix.seeds)
        out: dict[str, Any] = {"sparse": study.sparse, "dense": study.dense, "edges": list(EDGES), "seeds": seeds,
                               "planted": [], "failed": []}  # fmt: skip
        for level in study.planted:
            pairs = self._pairs(chosen, level)
            self.say(f"noise: {level:.0%} planted, {seeds} seeds of {study.sparse} and {study.dense}")
            out["planted"].append({"noise": level, **_mass(self._measured(pairs, "irrelevant"))})
            out["failed"] += [f"{level:.0%} planted, {failed}" for pair in pairs for failed in self._failures(pair)]
        cells = [[self.plan.cell(r, s, chosen[r]) for r in (study.sparse, study.dense)] for s in self.plan.matrix.seeds]
        pairs = [Pair(own(sparse), own(dense)) for sparse, dense in cells]
        sums = self._measured(pairs, "overlap")
        out["overlap"] = {"k": pairs[0].sparse.cell.config.model.pgsa.top_k, **_overlap(sums)} if sums else None
        return out

    def _pairs(self, chosen: Mapping[str, Values], level: float) -> list[Pair]:
        """Trained cells of both rows on a log with this share of noise."""
        study = self.plan.matrix.noise
        data: dict[str, Any] = {"data.synthetic.noise": level, "data.history": VIEWS}
        assert study is not None
        works, opened = [], None
        for seed in self.plan.matrix.seeds:
            for row in (study.sparse, study.dense):
                cell = self.plan.cell(row, seed, chosen[row], data)
                prepared, place = opened = opened or self.open_log(cell.config)
                key = stage_key(cell.config, prepared, "stage1") if cell.config.stage1.enabled else ""
                works.append(Work(cell, key, place, False))
        self.train(works)
        return list(starmap(Pair, zip(works[::2], works[1::2], strict=True)))

    def _measured(self, pairs: list[Pair], what: str) -> list[Sums]:
        """Sums of each pair whose cells both finished, measured beside one another on the cluster."""
        usable = [p for p in pairs if all(self._finished(w.cell) for w in (p.sparse, p.dense))]
        missing = [p for p in usable if not self.folder.exists(p.file(what))]
        task = ray.remote(num_cpus=1)(_measure)
        ray.get([
            task.remote(what, self.folder.uri, p.file(what), [self.cells.run(w) for w in (p.sparse, p.dense)])
            for p in missing
        ])  # fmt: skip
        return [self.folder.read_json(p.file(what)) for p in usable]

    def _failures(self, pair: Pair) -> list[str]:
        """Cells of a pair that could not be trained, with why."""
        cells = [w.cell for w in (pair.sparse, pair.dense) if not self._finished(w.cell)]
        return [f"{cell.label}: {(self.cells.record(cell) or {}).get('error', 'it was not trained')}" for cell in cells]

    def _finished(self, cell: Cell) -> bool:
        done = self.cells.record(cell)
        return done is not None and done["state"] == "finished"


def _measure(what: str, folder: str, name: str, runs: list[Run]) -> None:
    """The task: both models over the validation impressions, sums into the run folder."""
    quieten()
    device = torch.device("cpu")
    sparse, dense = (Finished(run, "").click_model(device) for run in runs)
    steps = LocalSource().evaluation(runs[0].spec("click-validation"))
    if what == "irrelevant":
        truth = Truth.of(runs[0].config.data.synthetic, runs[0].prepared)
        sums = irrelevant_mass({"sparse": sparse, "dense": dense}, steps, truth, device)
    else:
        sums = anchor_overlap(sparse, dense, steps, device)
    Folder(folder).write_json(name, sums)


def _mass(parts: list[Sums]) -> dict[str, Any]:
    """Irrelevant mass of each model over all candidates and by history length, and what the sparse one cuts; of no seed
    nothing is known."""
    names = ("sparse", "dense", "uniform")
    means = {name: [sum(p[name]) / max(sum(p["n"]), 1) for p in parts] for name in names}
    cut = [1 - s / d for s, d in zip(means["sparse"], means["dense"], strict=True) if d]
    bins = _bins(parts, names) if parts else []
    return {name: spread_of(means[name]) for name in names} | {"cut": spread_of(cut), "bins": bins}


def _overlap(parts: list[Sums]) -> dict[str, Any]:
    names = ("overlap", "mass", "chance")
    means = {name: spread_of([sum(p[name]) / max(sum(p["n"]), 1) for p in parts]) for name in names}
    return means | {"candidates": int(sum(parts[0]["n"])), "bins": _bins(parts, names)}


def _bins(parts: list[Sums], names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Means by history length over the candidates of all seeds, bins with candidates only."""
    n = np.sum([p["n"] for p in parts], axis=0)
    sums = {name: np.sum([p[name] for p in parts], axis=0) for name in names}
    return [
        {"from": int(EDGES[i]), "n": int(n[i] / len(parts)), **{name: float(sums[name][i] / n[i]) for name in names}}
        for i in np.flatnonzero(n)
    ]
