"""Compare rows of a matrix: tune each alike, train it with every seed, test once, and say how sure the differences are.

Cells are named by what they compute, so a row may change, or another seed be added, and only what is new is trained.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from ray.exceptions import RayError
from rich.live import Live
from rich.text import Text

from hpgr.artifacts import FORMAT, Folder, absolute, check_format
from hpgr.bootstrap import METRICS, resample, spread_of
from hpgr.config import Config, dump, validate
from hpgr.config import to_yaml as config_yaml
from hpgr.data.click_tables import count_clicks, score_test
from hpgr.data.preparation import Prepared, check_log
from hpgr.data.stream import build_index
from hpgr.errors import ArtifactError, ConfigError, HpgrError, TrainingError
from hpgr.locks import held
from hpgr.metrics import ClickScores, auc
from hpgr.on_ray.cells import Cells, Done, Work
from hpgr.on_ray.cluster import here, settle
from hpgr.on_ray.learnt import learn, names_of
from hpgr.on_ray.noise import NoiseStudy
from hpgr.on_ray.parallel import RayExecute, cause
from hpgr.on_ray.pipeline import Say, changed_sections, keep_log, prepared_log, tell_of_copy, versions
from hpgr.on_ray.searcher import Clock
from hpgr.on_ray.session import session
from hpgr.on_ray.tracking import check_tracking, record_comparison
from hpgr.on_ray.trials import Place, index_of, places
from hpgr.report.compare import CompareData, board, render_compare
from hpgr.report.learnt import Shown, section_learnt
from hpgr.report.noise import section_noise
from hpgr.search.matrix import Cell, Matrix, Plan, Values, to_yaml
from hpgr.training.two_stage import INDEXES, stage_key

BOARD_EVERY_SECONDS, REDRAW_EVERY_SECONDS = 60.0, 2.0
CLOCK = "clock.json"


@dataclass(frozen=True)
class CompareRequest:
    """What the job was asked; to go on, the plan is the folder's own, or one that changes it."""

    run: str
    plan: Plan
    resume: bool


def compare(request: CompareRequest, say: Say) -> tuple[dict[str, Any], CompareData]:
    """Run, or go on with, a comparison; returns compare.json and what its report shows.

    Raises:
        HpgrError: the cluster can never run a cell, no row could be trained, or another job works on the folder.
    """
    with held(Folder(absolute(request.run)), "jobs/compare.py", say):
        return _compare(request, say)


def _compare(request: CompareRequest, say: Say) -> tuple[dict[str, Any], CompareData]:
    check_tracking(request.plan.base)
    plan, folder = open_comparison(request)
    tell_of_copy(folder, say)
    check_log(plan.base.data)
    with session(say):
        plan = replace(plan, base=settle(plan.base, here(), say, "cell"))
        job = _Comparison(plan, folder, say)
        with job.watched():
            job.tune()
            job.train()
            job.study()
        return job.conclude()


def open_comparison(request: CompareRequest) -> tuple[Plan, Folder]:
    """The comparison's plan and folder; the folder gets the plan written.

    Raises:
        ArtifactError: the folder holds a comparison and `resume` was not asked, or the reverse, or something else.
        ConfigError: a resumed comparison would start from another configuration.
    """
    folder, plan = Folder(absolute(request.run)), request.plan
    if folder.exists("run.json"):
        stored = folder.read_json("run.json")
        check_format(stored, f"run folder {folder.uri}")
        if stored.get("kind") != "comparison":
            raise ArtifactError(f"{folder.uri} holds a run of another job, not a comparison; give another --run")
        if not request.resume:
            raise ArtifactError(f"{folder.uri} already holds a comparison; add --resume to go on with it, or give "
                                "another --run")  # fmt: skip
        _refuse_change(validate(stored["config"]), plan.base)
    elif request.resume:
        raise ArtifactError(f"--resume: there is no comparison in {folder.uri}; leave --resume out to start one")
    folder.write("matrix.yaml", to_yaml(_with_base(plan)).encode())
    folder.write("config.yaml", config_yaml(plan.base).encode())
    identity = {"format": FORMAT, "kind": "comparison", "config": dump(plan.base)}
    folder.write_json("run.json", identity | {"versions": versions()})
    return plan, folder


def _with_base(plan: Plan) -> Matrix:
    """The matrix as it stands beside its config.yaml in the run folder."""
    return plan.matrix.model_copy(update={"base": "config.yaml"})


def _refuse_change(old: Config, new: Config) -> None:
    changed = changed_sections(old, new)
    if changed:
        raise ConfigError(f"--resume goes on from the comparison's own base, but {', '.join(changed)} differ(s); leave "
                          "--set out (rows, seeds and budget may change), or start anew")  # fmt: skip


@dataclass
class Row:
    """A row of the matrix as far as it has come."""

    name: str
    tried: list[Cell]
    chosen: Values | None = None
    """Values that tuning chose; None: not yet, or nothing that it tried could be trained."""
    cells: list[Cell] = field(default_factory=list)
    """A cell a seed."""


class _Comparison:
    """The job's state: rows and their cells."""

    def __init__(self, plan: Plan, folder: Folder, say: Say) -> None:
        self.plan, self.folder, self.say = plan, folder, say
        before = folder.read_json(CLOCK)["seconds"] if folder.exists(CLOCK) else 0.0
        self.clock, self._shown, self._noted = Clock(before), 0.0, time.monotonic()
        self._screen: Live | None = None
        self.execute = RayExecute(say)
        self.prepared, self.place = self.open_log(plan.base)
        keep_log(folder, self.prepared)
        self.most = places(plan.base, "cell", plan.matrix.concurrency)
        self.cells = Cells(folder, self.most, say, self._show)
        self.rows = [Row(name, plan.tuned(name)) for name in plan.matrix.rows]
        self.curves: dict[str, list[tuple[Any, list[Cell]]]] = {}
        self._planned: dict[str, Cell] = {}
        self.noise: dict[str, Any] | None = None
        self.names = names_of(plan.matrix.learnt, plan.base) if plan.matrix.learnt else None
        self.shown: Shown | None = None
        self.left_out: dict[str, str] = {}

    def open_log(self, config: Config) -> tuple[Prepared, Place]:
        """The prepared log of a configuration, and where its cells find what they share."""
        prepared = prepared_log(config, self.execute, self.say)
        own = self.folder.sub("index").sub(prepared.manifest["fingerprint"])
        place = Place(prepared.folder.uri, self.folder.sub("stage1").uri, own.uri)
        for name in INDEXES:
            build_index(prepared, config, index_of(config, place), name, self.execute)
        return prepared, place

    def work(self, cell: Cell, test: bool) -> Work:
        """A cell of the comparison's own log."""
        key = stage_key(cell.config, self.prepared, "stage1") if cell.config.stage1.enabled else ""
        return Work(cell, key, self.place, test)

    def do(self, works: Sequence[Work]) -> None:
        """Train cells to their end."""
        self._planned |= {w.cell.key: w.cell for w in works}
        self.cells.train(works)

    def tune(self) -> None:
        """Let every row try its settings with the first seed; the test split stays unread."""
        several = [row for row in self.rows if len(row.tried) > 1]
        if several:
            count = sum(len(row.tried) for row in several)
            self.say(f"compare: tuning {len(several)} rows, {count} cells, up to {self.most} at once")
            self.do([self.work(cell, False) for row in several for cell in row.tried])
        for row in self.rows:
            row.chosen = self._chosen(row)
            if row.chosen is not None:
                row.cells = [self.plan.cell(row.name, seed, row.chosen) for seed in self.plan.matrix.seeds]

    def _chosen(self, row: Row) -> Values | None:
        if len(row.tried) == 1:
            return row.tried[0].values
        known = [(auc, cell) for cell in row.tried if (auc := self._validation(cell)) is not None]
        return max(known, key=lambda pair: pair[0])[1].values if known else None

    def _validation(self, cell: Cell) -> float | None:
        done = self.cells.record(cell)
        return done["validation"]["auc"] if done and done["state"] == "finished" else None

    def train(self) -> None:
        """Every row with every seed, and the points of the curves; rows are tested, curves are not."""
        works = [self.work(cell, True) for row in self.rows for cell in row.cells]
        subject = self.plan.matrix.sensitivity
        chosen = next((row.chosen for row in self.rows if subject and row.name == subject.row), None)
        if chosen is not None:
            self.curves = self.plan.curves(chosen)
        works += [self.work(c, False) for points in self.curves.values() for _, cells in points for c in cells]
        seeds = len(self.plan.matrix.seeds)
        self.say(f"compare: {len(self.rows)} rows with {seeds} seeds, {len({w.cell.key for w in works})} cells in all")
        self.do(works)

    def study(self) -> None:
        """Measure attention, and show what was learnt, where the matrix asks for it and its rows could be trained.

        What fails is left out: the comparison itself is finished, and is told without it.
        """
        for name, part in (("noise", self._measure_noise), ("learnt", self._show_learnt)):
            try:
                part()
            except (HpgrError, RayError) as error:
                self.left_out[name] = cause(error)
                self.say(f"{name}: left out of the report, --resume tries it again: {self.left_out[name]}")

    def _measure_noise(self) -> None:
        wanted, chosen = self.plan.matrix.noise, {row.name: row.chosen for row in self.rows if row.chosen is not None}
        if wanted and {wanted.sparse, wanted.dense} <= chosen.keys():
            noise = NoiseStudy(self.plan, self.folder, self.cells, self.open_log, self.do, self.say)
            self.noise = noise.run(chosen, lambda cell: self.work(cell, True))

    def _show_learnt(self) -> None:
        learnt = self.plan.matrix.learnt
        row = next((row for row in self.rows if learnt and row.name == learnt.row and self.tested(row)), None)
        if learnt and self.names and row:
            cell = next(cell for cell in row.cells if cell.seed in self.tested(row))
            self.say(f"learnt: item vectors, neighbours and attention of {cell.label}")
            self.shown = learn(learnt, self.names, self.cells.run(self.work(cell, True)))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Keeps one screen of progress in view for the block, and the clock in the folder."""
        try:
            if sys.stdout.isatty():
                with Live(auto_refresh=False, transient=True) as self._screen:
                    yield
            else:
                yield
        finally:
            self._screen = None
            self._note_time()

    def _note_time(self) -> None:
        """What a killed comparison has taken counts, too."""
        self._noted = time.monotonic()
        self.folder.write_json(CLOCK, {"seconds": self.clock()})

    def _show(self) -> None:
        every = REDRAW_EVERY_SECONDS if self._screen else BOARD_EVERY_SECONDS
        now = time.monotonic()
        if now - self._shown < every:
            return
        first, self._shown = not self._shown, now
        if now - self._noted >= BOARD_EVERY_SECONDS:
            self._note_time()
        done = [d for c in self._planned.values() if (d := self.cells.record(c))]
        counts = f"{len(done)} of {len(self._planned)} cells known"
        text = board(self.plan.matrix.name, self.clock(), counts, self.cells.running())
        if self._screen:
            self._screen.update(Text(text), refresh=True)
        elif not first:
            print(text, flush=True)

    def conclude(self) -> tuple[dict[str, Any], CompareData]:
        """Write compare.json and the report.

        Raises:
            TrainingError: no row has a tested cell.
        """
        models = [self._model(row) for row in self.rows]
        if not any(m["test"] for m in models):
            errors = [f["error"] for m in models for f in m["failed"]]
            raise TrainingError(f"no row could be trained and tested; the first failed with: {(errors or ['-'])[0]}")
        tables = self._tables()
        result = {
            "name": self.plan.matrix.name,
            "seeds": self.plan.matrix.seeds,
            "baseline": self.plan.matrix.baselines,
            "models": models,
            "differences": self._differences(tables),
            "sensitivity": self._sensitivity(),
            "simple": self._simple() | {name: auc(scored.score, scored.label) for name, scored in tables.items()},
            "tables": list(tables),
            "noise": self.noise,
            "learnt": self.shown.plain() if self.shown else None,
            "left_out": self.left_out,
            **self._account(),
            "versions": versions(),
            "files": {"report": f"{self.folder.uri}/report.html", "run": self.folder.uri},
        }
        matrix = to_yaml(_with_base(self.plan))
        more = [section_noise(self.noise)] if self.noise else []
        more += [section_learnt(self.shown)] if self.shown else []
        data = CompareData(self.plan.matrix.name, self.folder.uri, result, matrix, config_yaml(self.plan.base), more)
        self.folder.write("report.html", render_compare(data).encode())
        self.folder.write_json("compare.json", result)
        record_comparison(self.plan.base, self.folder, result, self.say)
        return result, data

    def tested(self, row: Row) -> dict[int, Done]:
        """Records of a row's tested cells by seed."""
        found = {cell.seed: self.cells.record(cell) for cell in row.cells}
        return {seed: done for seed, done in found.items() if done and done["state"] == "finished" and done["tested"]}

    def _model(self, row: Row) -> dict[str, Any]:
        done = self.tested(row)
        every = {cell.key: cell for cell in (*row.tried, *row.cells)}
        records = {key: self.cells.record(cell) for key, cell in every.items()}
        failed = [{"cell": every[key].label, "seed": every[key].seed, "error": d["error"]}
                  for key, d in records.items() if d and d["state"] == "failed"]  # fmt: skip
        tried = [{"values": cell.values, "auc": self._validation(cell)} for cell in row.tried] if row.tried[1:] else []
        compared = {cell.key for cell in row.cells}
        beside = [self.cells.record(cell) for cell in row.tried if cell.key not in compared]
        stages = {
            f"{s}_seconds": _mean([d["seconds"].get(s, 0.0) for d in done.values()]) for s in ("stage1", "stage2")
        }
        return {
            "model": row.name,
            "settings": self.plan.matrix.rows[row.name],
            "tuned": {"values": row.chosen, "tried": tried},
            "test": _figures([d["test"] for d in done.values()]),
            "validation": _figures([d["validation"] for d in done.values()]),
            "next_item": _figures([d["next_item"] for d in done.values() if d["next_item"]]),
            "seeds": list(done),
            "seconds": sum(stages.values()),
            "cost": {
                **stages,
                "tuning_seconds": sum(sum(d["seconds"].values()) for d in beside if d and "seconds" in d),
                "seconds_a_million": _mean([d["scoring_a_million"] for d in done.values()]),
                "keys": _mean([d["keys"] for d in done.values()]),
            },
            "parameters": next((d["parameters"] for d in done.values()), None),
            "cells": {str(cell.seed): self.cells.home(cell).uri for cell in row.cells if cell.seed in done},
            "failed": failed,
        }

    def _tables(self) -> dict[str, ClickScores]:
        """Test scores of the scorers without a model, by name."""
        out = {}
        for features in self.plan.matrix.tables:
            buckets = range(self.prepared.buckets)
            known: dict[str, Any] = {"prepared": self.prepared, "features": features}
            counts = list(self.execute("table: count", partial(count_clicks, **known), buckets))
            rates = sum(counts[1:], counts[0]).rates()
            parts = self.execute("table: score", partial(score_test, **known, rates=rates), buckets)
            out[f"table of {', '.join([*features, 'engaged before'])}"] = ClickScores.merge(
                [ClickScores(*p) for p in parts]
            )
        return out

    def _differences(self, tables: dict[str, ClickScores]) -> list[dict[str, Any]]:
        """Of every row to each baseline and each table, which is the same for all seeds."""
        matrix, scores = self.plan.matrix, {}
        for row in self.rows:
            tested = self.tested(row)
            scores[row.name] = {c.seed: self._scores(c) for c in row.cells if c.seed in tested}
        scores |= {name: dict.fromkeys(matrix.seeds, scored) for name, scored in tables.items()}
        found = resample(scores, matrix.bootstrap.draws, matrix.bootstrap.seed)
        out = []
        for baseline in (*matrix.baselines, *tables):
            for row in self.rows:
                for metric in METRICS:
                    gap = found.difference(row.name, baseline, metric) if row.name != baseline else None
                    if gap is not None:
                        out.append({"model": row.name, "baseline": baseline, "metric": metric, **gap})
        return out

    def _scores(self, cell: Cell) -> ClickScores:
        columns = ["score", "label", "user_hash", "request"]
        table = self.cells.home(cell).read_parquet("stage2/test_scores.parquet", columns)
        score, label, user, request = (table.column(name).to_numpy() for name in columns)
        keep = label >= 0
        return ClickScores(score[keep], label[keep], user[keep], request[keep])

    def _sensitivity(self) -> list[dict[str, Any]]:
        subject, out = self.plan.matrix.sensitivity, []
        own = {cell.key for row in self.rows if subject and row.name == subject.row for cell in row.cells}
        for path, points in self.curves.items():
            told = []
            for value, cells in points:
                known = [auc for cell in cells if (auc := self._validation(cell)) is not None]
                told.append({"value": value, "own": cells[0].key in own, "auc": spread_of(known)})
            out.append({"row": subject.row if subject else "", "path": path, "points": told})
        return out

    def _simple(self) -> dict[str, float]:
        """AUC of scorers without a model, of the first row's windows."""
        found = [d["baselines"] for row in self.rows for d in self.tested(row).values()]
        return {name: area for name, area in found[0].items() if area is not None} if found else {}

    def _account(self) -> dict[str, Any]:
        records = [d for c in self._planned.values() if (d := self.cells.record(c))]
        shared = self.folder.sub("stage1")
        stage1 = [
            shared.read_json(f"{k}/done.json")["seconds"] for k in shared.entries() if shared.exists(f"{k}/done.json")
        ]
        states = [d["state"] for d in records]
        return {
            "cells": {state: states.count(state) for state in ("finished", "failed")},
            "stage1_computed": len(stage1),
            "seconds": self.clock(),
            "training_seconds": sum(stage1) + sum(d["seconds"]["stage2"] for d in records if "seconds" in d),
        }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _figures(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Spread over seeds of every figure that all of them have."""
    names = [name for name in (parts[0] if parts else {}) if all(p.get(name) is not None for p in parts)]
    return {name: spread_of([float(p[name]) for p in parts]) for name in names}
