"""The main job: prepare, index, train both stages, test, report. What the run folder has is not done again."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch

import hpgr
from hpgr.artifacts import ASIDE, FORMAT, Folder, absolute, check_format
from hpgr.config import Config, dump, override, to_yaml, validate
from hpgr.data.preparation import Execute, Prepared, check_log, generated_log, prepare
from hpgr.data.sessions import EDGES, session_statistics
from hpgr.data.stream import build_index
from hpgr.errors import ArtifactError, ConfigError
from hpgr.locks import held
from hpgr.metrics import auc
from hpgr.on_ray.cluster import here, settle, wait_for
from hpgr.on_ray.journal import journal
from hpgr.on_ray.parallel import RayExecute
from hpgr.on_ray.session import session
from hpgr.on_ray.tracking import check_tracking, record_run
from hpgr.on_ray.train import Log, run_training
from hpgr.report.run import ReportData, render_report
from hpgr.schema import SECOND, Timelines
from hpgr.sizing import Ask, refuse_impossible, training_ask
from hpgr.training.two_stage import INDEXES, Run

Say = Callable[[str], None]
FREE_ON_RESUME = ("resources", "checkpoints", "tracking")
"""Sections that may differ when a run goes on: they are not what is trained, but where and how it is kept."""
FIRST_FILES = ("config.yaml", "run.json", "log.jsonl")
"""What a run's folder holds before its log is prepared."""


@dataclass(frozen=True)
class Request:
    """What a job was asked: the run folder, and the configuration."""

    run: str
    config: Config
    resume: bool


def open_run(request: Request) -> tuple[Config, Folder]:
    """The run's configuration and folder; a new folder gets its configuration written, and so does one whose run ended
    before its log was prepared: nothing is lost, and a column's name was mistyped, say.

    Raises:
        ArtifactError: the folder holds a run and `resume` was not asked, or the reverse, or another version's run.
        ConfigError: a resumed run would change its settings.
    """
    folder = Folder(absolute(request.run))
    stored = folder.read_json("run.json") if folder.exists("run.json") else None
    if stored is not None:
        check_format(stored, f"run folder {folder.uri}")
        if "kind" in stored:
            raise ArtifactError(f"{folder.uri} holds a {stored['kind']}, not a run; give another --run")
    if stored is None or (not request.resume and _holds_nothing(folder)):
        if request.resume:
            raise nothing_in(folder, "run")
        folder.write("config.yaml", to_yaml(request.config).encode())
        folder.write_json("run.json", {"format": FORMAT, "config": dump(request.config), "versions": versions()})
        return request.config, folder
    if not request.resume:
        raise ArtifactError(f"{folder.uri} already holds a run; add --resume to go on with it, or give another --run")
    changed = changed_sections(validate(stored["config"]), request.config)
    if changed:
        raise ConfigError(f"--resume goes on with the run's own settings, but {', '.join(changed)} differ(s) from "
                          f"{folder.uri}/config.yaml; leave --config out and --set {', '.join(FREE_ON_RESUME)} alone, "
                          "or start another run")  # fmt: skip
    return request.config, folder


def stored_config(run: str, overrides: Sequence[str], what: str = "run") -> Config:
    """The configuration of a run, or a search, that goes on, changed by overrides.

    Raises:
        ArtifactError: there is none in the folder.
        ConfigError: an override is at fault.
    """
    folder = Folder(absolute(run))
    if not folder.exists("run.json"):
        raise nothing_in(folder, what)
    stored = folder.read_json("run.json")
    check_format(stored, f"run folder {folder.uri}")
    return validate(stored["config"], [fault for text in overrides if (fault := override(stored["config"], text))])


def nothing_in(folder: Folder, what: str) -> ArtifactError:
    """The error of `--resume` where there is nothing to go on with."""
    return ArtifactError(f"--resume: there is no {what} in {folder.uri}; leave --resume out to start one there")


def _holds_nothing(folder: Folder) -> bool:
    """Whether a run ended before its log was prepared."""
    return all(name in FIRST_FILES or name.startswith("lock-") or name.endswith(ASIDE) for name in folder.entries())


def changed_sections(old: Config, new: Config) -> list[str]:
    """Sections that keep a job with the settings `new` from going on with one of `old`."""
    before = dump(old)
    return [k for k, v in dump(new).items() if v != before[k] and k not in FREE_ON_RESUME]


def two_stage(request: Request, say: Say) -> tuple[dict[str, Any], str]:
    """Run, or go on with, the whole job; returns metrics.json and the run folder.

    Raises:
        ArtifactError: another job works on the folder.
    """
    folder = Folder(absolute(request.run))
    if request.resume and folder.exists("metrics.json"):  # asked before the claim: it may be a read-only archive
        open_run(request)
        return _finished(folder, say)
    with held(folder, "jobs/two_stage.py", say):
        return _two_stage(request, say)


def _finished(folder: Folder, say: Say) -> tuple[dict[str, Any], str]:
    say(f"{folder.uri}: this run has finished; nothing to do")
    return folder.read_json("metrics.json"), folder.uri


def _two_stage(request: Request, say: Say) -> tuple[dict[str, Any], str]:
    start = time.monotonic()
    config, folder = open_run(request)
    check_tracking(config)
    if folder.exists("metrics.json"):
        return _finished(folder, say)
    tell_of_copy(folder, say)
    check_log(config.data)
    with journal(folder, say) as say, session(say):
        execute = RayExecute(say)
        ready = time.monotonic()
        config = settle(config, here(), say)
        if config.resources.count:
            refuse_impossible(here(), training_ask(config.resources, here()))
        run = Run(config, folder, prepared_log(config, execute, say))
        keep_log(folder, run.prepared)
        _log_rows(run)
        for name in INDEXES:
            build_index(run.prepared, config, run.index_folder, name, execute)
        statistics = _session_statistics(run, execute)
        prepared_at = time.monotonic()
        figures = run_training(run, say)
    curves = figures.pop("curves")
    figures.setdefault("baselines", {}).update(_oracle(run))
    seconds = {"ray": ready - start, "prepare": prepared_at - ready, **figures.pop("seconds")}
    seconds["total"] = time.monotonic() - start
    metrics = _metrics(run, figures, seconds)
    folder.write_json("curves.json", curves)
    folder.write("report.html", _report(run, metrics, curves, statistics).encode())
    folder.write_json("metrics.json", metrics)
    record_run(config, folder, metrics, curves, say)
    return metrics, folder.uri


def tell_of_copy(folder: Folder, say: Say) -> None:
    """Tell if a job that was submitted to a cluster writes where its working directory is, which Ray deletes."""
    if "/runtime_resources/" in folder.uri:
        say(f"note: {folder.uri} is in the job's copy of its working directory and goes with it; give --run another")


def _log_rows(run: Run) -> None:
    """Counts of the log's rows, to where the run's other figures go."""
    account = run.prepared.manifest["account"]
    counts = {"rows_in": account["rows_in"]}
    counts |= {f"rows_{name}": account[name] for name in ("kept", "quarantined", "duplicates")}
    log = Log(run.folder, True)
    log("data", counts, 0)
    log.close()


def prepare_only(config: Config, say: Say) -> Prepared:
    """The preparation alone, as `jobs/prepare.py` runs it."""
    check_log(config.data)
    with session(say):
        return prepared_log(config, RayExecute(say), say)


def prepared_log(config: Config, execute: Execute, say: Say) -> Prepared:
    """The prepared log of a configuration, with its account told."""
    wait_for(Ask("data task", "start a node with a CPU", 1, 1.0), config.resources.wait_minutes, say)
    start = time.monotonic()
    prepared = prepare(config, execute, say)
    account, took = prepared.manifest["account"], time.monotonic() - start
    rows = account["rows_in"]
    rate = f"; {took:.1f} s, {rows / took:,.0f} rows/s" if took > 1 else ""
    parts = " + ".join(f"{account[name]:,} {name}" for name in ("kept", "quarantined", "duplicates"))
    say(f"prepare: {rows:,} rows = {parts}{rate}")
    return prepared


def keep_log(folder: Folder, prepared: Prepared) -> None:
    """Keep in a job's folder what its models need of the log, and go on with the log that it began with alone: its
    windows, checkpoints and figures are of that one, and a row may be training in one and test in another.

    Raises:
        ArtifactError: the job began with another log.
    """
    kept = folder.sub("prepared")
    if kept.exists("manifest.json"):
        began, now = (m["fingerprint"] for m in (kept.read_json("manifest.json"), prepared.manifest))
        if began != now:
            raise ArtifactError(f"{folder.uri} began with another log: got {now}, expected {began} of data.prepared. "
                                "Files of data.path were added, changed or copied (their times count); bring them back "
                                "as they were, or start anew in another --run folder")  # fmt: skip
    prepared.keep(kept)


def versions() -> dict[str, str]:
    """Versions that results may depend on."""
    return {"hpgr": hpgr.__version__, "python": platform.python_version(), "torch": torch.__version__,
            "ray": ray.__version__, "pyarrow": pa.__version__, "numpy": np.__version__}  # fmt: skip


def _statistics_of(bucket: int, prepared: Prepared, gap_minutes: float) -> dict[str, list[int]]:
    return session_statistics(Timelines.from_table(prepared.timelines(bucket)), gap_minutes)


def _session_statistics(run: Run, execute: Execute) -> dict[str, Any]:
    gap = run.config.stream.session_gap_minutes
    parts = list(
        execute(
            "sessions",
            partial(_statistics_of, prepared=run.prepared, gap_minutes=gap),
            range(run.prepared.buckets),
        )
    )
    sums = {name: np.sum([p[name] for p in parts], axis=0) for name in parts[0]}
    histograms: dict[str, Any] = {}
    for name, counts in sums.items():
        used = int(np.flatnonzero(counts)[-1]) + 1 if counts.any() else 1
        histograms[name] = {"edges": EDGES[: used + 1], "counts": counts[:used].tolist()}
    return {"gap_minutes": gap, **histograms}


def _oracle(run: Run) -> dict[str, float]:
    """AUC of the true click probabilities on the test impressions of the generated log."""
    if run.config.data.path is not None or not run.config.stage2.enabled:
        return {}
    truth_folder = generated_log(run.config.data).sub("truth")
    filesystem, path = truth_folder.path()
    truth = pa.concat_tables(pq.read_table(f"{path}/{name}", filesystem=filesystem) for name in truth_folder.entries())
    truth = truth.set_column(
        truth.column_names.index("timestamp"), "time", pc.multiply(truth.column("timestamp"), SECOND)
    )
    scores = run.folder.read_parquet("stage2/test_scores.parquet", ["user", "item_id", "time", "label"])
    joined = scores.join(truth, ["user", "item_id", "time"], ["user_id", "item_id", "time"], join_type="inner")
    value = auc(joined.column("probability").to_numpy(), joined.column("label").to_numpy())
    return {} if value is None else {"oracle": value}


def _metrics(run: Run, figures: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    account, vocabulary = run.prepared.manifest["account"], run.prepared.manifest["vocabulary"]
    facts = {name: account[name] for name in ("rows_in", "kept", "quarantined", "duplicates", "users")}
    last = "stage2" if run.config.stage2.enabled else "stage1"
    best = f"{last}/{figures[last]['best_file']}"
    return {
        "name": run.config.name,
        "data": facts | {"items": vocabulary["items"]},
        **figures,
        "seconds": {k: round(v, 2) for k, v in seconds.items()},
        "seed": run.config.seed,
        "versions": versions(),
        "files": {"report": f"{run.folder.uri}/report.html", "checkpoint": f"{run.folder.uri}/{best}"},
    }


def _report(run: Run, metrics: dict[str, Any], curves: list[dict[str, Any]], statistics: dict[str, Any]) -> str:
    manifest = run.prepared.manifest
    account, vocabulary = manifest["account"], manifest["vocabulary"]
    splits = {n: {"rows": s["impressions"], "positives": s["positives"]} for n, s in account["splits"].items()}
    sizes = {"items": vocabulary["items"], **{k: v - 2 for k, v in vocabulary["categories"].items()}}
    counts = {name: account[name] for name in ("users", "timelines", "history_events", "unused")}
    return render_report(
        ReportData(
            name=run.config.name,
            run=run.folder.uri,
            metrics=metrics,
            curves=curves,
            scores=run.folder.read_parquet("stage2/test_scores.parquet") if run.config.stage2.enabled else None,
            account={"quarantined": account["reasons"], "splits": splits, "vocabulary": sizes, "log": counts},
            sessions=statistics,
            config_yaml=to_yaml(run.config),
        )
    )
