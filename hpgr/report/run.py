"""The report of a run: one self-contained HTML page, and a summary that fits a terminal.

Each `_section_...` function turns one part of `ReportData` into a section and says in words what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from hpgr.metrics import CUTOFFS, Bin, auc, auc_interval, quantile_bins, roc_points
from hpgr.report import plots
from hpgr.report.page import (
    CLICK_METRICS,
    NONE,
    Beside,
    Block,
    Card,
    Code,
    Drawing,
    Json,
    Section,
    Table,
    Text,
    duration,
    entry,
    figures,
    part,
    real,
    render_page,
    screen,
    share,
    show,
)
from hpgr.schema import Array

STAGE_METRIC = {"1": "ndcg@10", "2": "auc"}


@dataclass(frozen=True)
class ReportData:
    """All a report shows, as plain values; any part may be empty, and missing keys are left out of the page.

    metrics: the run's metrics.json: data {rows_in, kept, quarantined, duplicates, users, items},
        stage1 and stage2 {validation, test: figures of hpgr.metrics}, baselines {name: AUC},
        seconds {part: s}, seed, versions {package: version}.
    curves: one dict a logged step: stage (1, 2), step, epoch, train_loss, lr, validation (figures or None).
    scores: test impressions: score, label (0/1), past (history events before it), popularity (training-time
        count of the item), user_hash.
    account: quarantined {reason: rows}, splits {name: {rows, positives, from, to}}, vocabulary {name: size};
        times as text or whole microseconds UTC. Further dicts become tables of their own.
    sessions: gap_minutes and histograms {edges [n + 1], counts [n]} under events_per_session,
        sessions_per_user and history_per_user.
    """

    name: str
    run: str
    metrics: Json = field(default_factory=dict)
    curves: Sequence[Json] = ()
    scores: pa.Table | None = None
    account: Json = field(default_factory=dict)
    sessions: Json = field(default_factory=dict)
    config_yaml: str = ""


def render_report(data: ReportData) -> str:
    """One HTML page with inline style and plots, equal for equal data; loads nothing from elsewhere."""
    return render_page(data.name, _where(data), _cards(data), [make(data) for make in SECTIONS])


def _clicks(rows: Any, positives: Any) -> tuple[str, str, str]:
    """Cells: impressions, clicks, click rate."""
    return show(rows), show(positives), share(positives, rows)


def _time(value: Any) -> str:
    """Whole microseconds since 1970 as UTC; text as it is."""
    if isinstance(value, int):
        moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=value)
        return moment.strftime("%Y-%m-%d %H:%M:%S")
    return show(value)


def _where(data: ReportData) -> str:
    versions = [f"{name} {version}" for name, version in part(data.metrics, "versions").items()]
    seed = data.metrics.get("seed")
    return " · ".join([data.run, *([] if seed is None else [f"seed {seed}"]), *versions])


def _cards(data: ReportData) -> list[Card]:
    """Headline figures of the test set."""
    clicks, ranking = part(data.metrics, "stage2", "test"), part(data.metrics, "stage1", "test")
    rows = f"{show(clicks.get('n'))} test impressions"
    users = f"{show(clicks.get('users_in_gauc'))} users with both classes"
    cards = [
        Card("Test AUC", show(clicks.get("auc")), _against_baseline(data.metrics) or rows),
        Card("Test GAUC", show(clicks.get("gauc")), users),
        Card("Log loss", show(clicks.get("log_loss")), rows),
        Card("Calibration", show(clicks.get("calibration"), 3), "predicted / observed, 1 is right"),
    ]
    if ranking:
        hits = f"NDCG@10 {show(ranking.get('ndcg@10'))}, whole catalogue"
        cards.append(Card("Next item HR@10", show(ranking.get("hr@10")), hits))
    return cards


def _baselines(metrics: Json) -> dict[str, float]:
    """Baselines with a known AUC, best first."""
    known = {str(name): real(area) for name, area in part(metrics, "baselines").items()}
    return dict(sorted(((n, a) for n, a in known.items() if a is not None), key=lambda item: (-item[1], item[0])))


def _against_baseline(metrics: Json) -> str:
    """Gap to the best baseline that a real system could use (the oracle knows the generator's truth)."""
    ours = real(part(metrics, "stage2", "test").get("auc"))
    best = next(((n, a) for n, a in _baselines(metrics).items() if n != "oracle"), None)
    return "" if ours is None or best is None else f"{ours - best[1]:+.4f} to {best[0]} {best[1]:.4f}"


def _section_results(data: ReportData) -> Section:
    stage = part(data.metrics, "stage2")
    splits = {name: part(stage, name) for name in ("validation", "test") if part(stage, name)}
    if not splits:
        return Section("results", "Results", [Text("Stage 2 was not evaluated in this run.")])
    shown = {key: name for key, name in CLICK_METRICS.items() if any(key in s for s in splits.values())}
    head = ["split", "impressions", "clicks", "click rate", *shown.values()]
    rows = [
        [name, *_clicks(s.get("n"), s.get("positives")), *(show(s.get(key)) for key in shown)]
        for name, s in splits.items()
    ]
    blocks: list[Block] = [Table("", head, rows), *_baseline_blocks(data)]
    return Section("results", "Results", blocks)


def _baseline_blocks(data: ReportData) -> list[Block]:
    test, baselines = part(data.metrics, "stage2", "test"), _baselines(data.metrics)
    ours = real(test.get("auc"))
    if not baselines or ours is None:
        return [Text("There are no baselines to compare with, or the model has no test AUC.")]
    model = "this model"
    ranked = sorted({**baselines, model: ours}.items(), key=lambda item: (-item[1], item[0]))
    names, areas = [n for n, _ in ranked], [a for _, a in ranked]
    interval = _interval(_columns(data.scores))
    table = [[n, f"{a:.4f}", NONE if n == model else f"{ours - a:+.4f}"] for n, a in ranked]
    caption = "The model beside its baselines on the same test impressions."
    if "oracle" in baselines:
        caption += " The oracle scores with the generator's true probabilities: no model can beat it on average."
    return [
        Drawing("Against baselines", plots.comparison(names, areas, names.index(model), interval), caption),
        Table("", ["scorer", "test AUC", "model is ahead by"], table, names.index(model)),
    ]


def _columns(scores: pa.Table | None) -> dict[str, Array]:
    """Usable test impressions: score, label and, where present, user, past and popularity; {} without any."""
    if scores is None or not {"score", "label"} <= set(scores.column_names):
        return {}
    names = [n for n in ("score", "label", "user_hash", "past", "popularity") if n in scores.column_names]
    columns = {n: scores[n].to_numpy() for n in names}
    usable = np.isin(columns["label"], (0, 1)) & np.isfinite(columns["score"])
    return {n: column[usable] for n, column in columns.items()} if usable.any() else {}


def _section_clicks(data: ReportData) -> Section:
    title, columns = "Click probabilities", _columns(data.scores)
    if not columns:
        return Section("clicks", title, [Text("There are no scored test impressions to draw.")])
    score, label = columns["score"], columns["label"]
    area, bins = auc(score, label), quantile_bins(score, score, label, 15)
    blocks: list[Block] = []
    if area is None:
        every = "clicked" if label[0] else "not clicked"
        blocks.append(Text(f"All {len(label):,} test impressions were {every}: ROC and AUC are undefined.", "warn"))
    caption = (
        f"{len(label):,} test impressions. Right: click rate over mean prediction in bins of equal size, "
        "with Wilson intervals, as if no two impressions were of one user; under it the scores' density. "
        "Below the diagonal the model overestimates."
    )
    blocks.append(Drawing("", plots.click_quality(roc_points(score, label), area, bins), caption))
    return Section("clicks", title, blocks)


def _section_slices(data: ReportData) -> Section:
    title, columns = "By history and popularity", _columns(data.scores)
    wanted = {
        "past": ("history events before the impression", "AUC by history length"),
        "popularity": ("training-time count of the candidate item", "AUC by item popularity"),
    }
    blocks: list[Block] = []
    for key, (label, heading) in wanted.items():
        if key in columns:
            blocks += _slice_blocks(columns, key, label, heading)
    return Section("slices", title, blocks or [Text("There are no scored test impressions to slice.")])


def _slice_blocks(columns: Mapping[str, Array], key: str, label: str, heading: str) -> list[Block]:
    score, clicked = columns["score"], columns["label"]
    bins = quantile_bins(columns[key], score, clicked, 8)
    names = [_range(b) for b in bins]
    members = [(columns[key] >= b.low) & (columns[key] <= b.high) for b in bins]
    sure = [_interval({name: column[rows] for name, column in columns.items()}) for rows in members]
    rows = [
        [name, f"{b.n:,}", f"{b.positives:,}", f"{b.observed:.2%}", f"{b.predicted:.2%}", *_area(b, interval)]
        for name, b, interval in zip(names, bins, sure, strict=True)
    ]
    caption = "Bins of about equal size, equal values together; 95 % intervals over users."
    head = [label, "impressions", "clicks", "click rate", "mean score", "AUC", "95 % interval"]
    return [
        Drawing(heading, plots.auc_by_bin(bins, names, label, auc(score, clicked), sure), caption),
        Table("", head, rows),
    ]


def _range(b: Bin) -> str:
    return f"{b.low:,.0f}" if b.low == b.high else f"{b.low:,.0f} to {b.high:,.0f}"


def _area(b: Bin, interval: plots.Interval) -> tuple[str, str]:
    between = f"[{interval[0]:.4f}, {interval[1]:.4f}]" if interval else NONE
    return ("one class only", NONE) if b.auc is None else (show(b.auc), between)


def _interval(columns: Mapping[str, Array]) -> plots.Interval:
    """95 % interval of the AUC of test impressions, where their users are known."""
    if "user_hash" not in columns:
        return None
    return auc_interval(columns["score"], columns["label"], columns["user_hash"])


def _section_ranking(data: ReportData) -> Section:
    """Stage 1 as a next-item model."""
    key, title, stage = "ranking", "Stage 1: next item", part(data.metrics, "stage1")
    test = part(stage, "test") or part(stage, "validation")
    if not test:
        return Section(key, title, [Text("Stage 1 was disabled or not evaluated in this run.")])
    names = [f"{name}@{k}" for name in ("HR", "NDCG") for k in CUTOFFS] + ["MRR"]
    rows = [
        [who, show(test.get(f"n{suffix}")), *(show(test.get(n.lower() + suffix)) for n in names)]
        for who, suffix in (("all", ""), ("unseen", "_unseen"))
    ]
    split = "test" if part(stage, "test") else "validation"
    text = f"Rank of the {split} target in the whole catalogue; unseen: it is not in the user's history."
    return Section(key, title, [Text(text), Table("", ["targets", "n", *names], rows)])


def _section_learning(data: ReportData) -> Section:
    blocks: list[Block] = []
    for stage, metric in STAGE_METRIC.items():
        points = [p for p in data.curves if str(p.get("stage")).removeprefix("stage") == stage]
        loss = _curve((p.get("step"), p.get("train_loss")) for p in points)
        if not loss.step:
            blocks.append(Text(f"Stage {stage} has no learning curve: it was disabled or logged nothing."))
            continue
        validation = _curve((p.get("step"), part(p, "validation").get(metric)) for p in points)
        rate = _curve((p.get("step"), p.get("lr")) for p in points)
        caption = f"{int(loss.step[-1]):,} optimiser steps; best by validation {metric.upper()}."
        blocks.append(Drawing(f"Stage {stage}", plots.learning_curves(loss, validation, metric.upper(), rate), caption))
    return Section("learning", "Learning curves", blocks)


def _curve(pairs: Iterable[tuple[Any, Any]]) -> plots.Curve:
    """Pairs whose step and value are finite numbers, in step order."""
    numbers = ((real(step), real(value)) for step, value in pairs)
    known = sorted((s, v) for s, v in numbers if s is not None and v is not None)
    return plots.Curve([s for s, _ in known], [v for _, v in known])


def _section_data(data: ReportData) -> Section:
    account, facts = data.account, part(data.metrics, "data")
    if not account and not facts:
        return Section("data", "Data account", [Text("This run kept no data account.")])
    rows_in = facts.get("rows_in")
    rows = [[key.replace("_", " "), show(value), share(value, rows_in)] for key, value in _rows_of(facts)]
    sizes = [[key.replace("_", " "), show(facts[key])] for key in facts if key not in dict(_rows_of(facts))]
    tables = [Table("Input rows", ["", "rows", "share"], rows)] if rows else []
    reasons = sorted(part(account, "quarantined").items(), key=lambda item: (-(real(item[1]) or 0), item[0]))
    if reasons:
        cells = [[name, show(count), share(count, rows_in)] for name, count in reasons]
        tables.append(Table("Quarantined, by reason", ["reason", "rows", "share"], cells))
    if sizes:
        tables.append(Table("Kept", ["", "count"], sizes))
    tables += [
        Table(key.replace("_", " ").capitalize(), ["", "count"], [[k, show(v)] for k, v in counts.items()])
        for key, counts in account.items()
        if isinstance(counts, Mapping) and counts and key not in ("quarantined", "splits")
    ]
    return Section("data", "Data account", [*_balance(facts), Beside(tables), *_split_table(account)])


def _rows_of(facts: Json) -> list[tuple[str, Any]]:
    return [(k, facts[k]) for k in ("rows_in", "kept", "quarantined", "duplicates") if k in facts]


def _balance(facts: Json) -> list[Block]:
    """Every input row is kept, quarantined or a duplicate; says so, or warns."""
    parts = [real(value) for _, value in _rows_of(facts)]
    if len(parts) < 4 or None in parts:
        return []
    rows_in, *where = [int(p) for p in parts if p is not None]
    kept, quarantined, duplicates = where
    text = f"{rows_in:,} rows in, {kept:,} kept + {quarantined:,} quarantined + {duplicates:,} duplicates"
    if rows_in == sum(where):
        return [Text(f"Every input row is accounted for: {text}.", "good")]
    return [Text(f"The account does not add up, {rows_in - sum(where):+,} rows are unexplained: {text}.", "warn")]


def _split_table(account: Json) -> list[Block]:
    splits = {str(name): part(part(account, "splits"), name) for name in part(account, "splits")}
    if not splits:
        return []
    head = ["split", "impressions", "clicks", "click rate", "from (UTC)", "to (UTC)"]
    rows = [
        [name, *_clicks(s.get("rows"), s.get("positives")), _time(s.get("from")), _time(s.get("to"))]
        for name, s in splits.items()
    ]
    return [Table("Splits", head, rows)]


def _section_sessions(data: ReportData) -> Section:
    wanted = {
        "events_per_session": ("Events per session", "events"),
        "sessions_per_user": ("Sessions per user", "sessions"),
        "history_per_user": ("History per user", "events"),
    }
    parts = []
    for key, (title, label) in wanted.items():
        histogram = part(data.sessions, key)
        edges, counts = list(histogram.get("edges", ())), list(histogram.get("counts", ()))
        if counts and len(edges) == len(counts) + 1:
            parts.append(plots.Histogram(title, label, edges, counts))
    if not parts:
        return Section("sessions", "Sessions", [Text("This run kept no session statistics.")])
    gap = real(data.sessions.get("gap_minutes"))
    caption = "Counts per bin; a bin reaches from its left edge up to the next."
    if gap is not None:
        caption = f"A session ends where the next event is more than {gap:g} minutes away. {caption}"
    return Section("sessions", "Sessions", [Drawing("", plots.histograms(parts), caption)])


def _section_run(data: ReportData) -> Section:
    seconds, versions = part(data.metrics, "seconds"), part(data.metrics, "versions")
    tables = []
    if seconds:
        tables.append(Table("Time", ["part", "took"], [[k, duration(v)] for k, v in seconds.items()]))
    if versions:
        tables.append(Table("Versions", ["package", "version"], [[k, str(v)] for k, v in versions.items()]))
    blocks: list[Block] = [Beside(tables)] if tables else []
    if data.config_yaml:
        blocks.append(Code("Configuration, complete", data.config_yaml))
    return Section("run", "Run", blocks or [Text("Times, versions and configuration were not recorded.")])


SECTIONS: tuple[Callable[[ReportData], Section], ...] = (
    _section_results,
    _section_clicks,
    _section_slices,
    _section_ranking,
    _section_learning,
    _section_data,
    _section_sessions,
    _section_run,
)


def summary_text(metrics: Json, run: str, next_commands: Sequence[str]) -> str:
    """What a run did on one screen: at most 24 lines of at most 100 columns (a longer word, such as a path
    to copy, stays whole). `metrics` as in `ReportData`; `files` {report, checkpoint} may name paths.
    """
    facts, clicks = part(metrics, "data"), part(metrics, "stage2", "test")
    ranking, files = part(metrics, "stage1", "test"), part(metrics, "files")
    account = ", ".join(f"{key.replace('_', ' ')} {show(value)}" for key, value in facts.items())
    beside = ", ".join(f"{name} {area:.4f}" for name, area in _baselines(metrics).items())
    took = ", ".join(f"{name} {duration(value)}" for name, value in part(metrics, "seconds").items())
    lines = [
        *entry("data", account or "no account"),
        *entry("stage 1", figures(ranking, ("hr@10", "ndcg@10", "hr@10_unseen", "n")) or "disabled"),
        *entry("stage 2", figures(clicks, (*CLICK_METRICS, "n")) or "not evaluated"),
        *entry("baselines", f"AUC of {beside}" if beside else "none"),
        *entry("time", took or "not recorded"),
        *entry("report", str(files.get("report", f"{run}/report.html"))),
        *entry("checkpoint", str(files.get("checkpoint", f"{run}/checkpoint"))),
    ]
    return screen(lines, next_commands)
