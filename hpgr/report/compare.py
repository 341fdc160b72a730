"""The report of a comparison: one HTML page, a summary that fits a terminal, and a live board.

The page is drawn from compare.json; each `_section_...` function turns one part of it into a section and says in words
what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpgr.metrics import FEWEST_USERS
from hpgr.report import compare_plots as plots
from hpgr.report.page import (
    CLICK_METRICS,
    COLUMNS,
    LINES,
    NONE,
    Block,
    Card,
    Code,
    Drawing,
    Json,
    Section,
    Table,
    Text,
    clip,
    duration,
    entry,
    part,
    real,
    render_page,
    screen,
    setting,
    show,
)

BOARD = "{:<38}  {:<16}  {:>6}  {:>11}"
STANDING = "{:<26}AUC {:<17}  {}"
LOWER_IS_BETTER = ("log_loss",)
STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantiles of Student's t at .975 by degrees of freedom, from 1, of two seeds; more than ten take the last."""
Running = tuple[str, str, float | None, float]
"""A cell at work: its label, what it does, best validation AUC so far, seconds."""


@dataclass(frozen=True)
class CompareData:
    """All a report of a comparison shows.

    result: compare.json, as `hpgr.on_ray.compare` writes it. more: sections of other parts, such as noise.
    """

    name: str
    run: str
    result: Json
    matrix_yaml: str = ""
    base_yaml: str = ""
    more: Sequence[Section] = field(default_factory=tuple)

    @property
    def models(self) -> Sequence[Json]:
        """Rows of the matrix, in its order."""
        return list(self.result.get("models", ()))

    @property
    def compared(self) -> list[Json]:
        """Rows that have a test AUC, the best first."""
        known = [m for m in self.models if real(part(m, "test", "auc").get("mean")) is not None]
        return sorted(known, key=lambda m: -m["test"]["auc"]["mean"])

    def differences(self, metric: str) -> list[Json]:
        """Differences of a metric to the baselines, in the matrix's order."""
        return [d for d in self.result.get("differences", ()) if d["metric"] == metric]


def render_compare(data: CompareData) -> str:
    """One HTML page with inline style and plots, equal for equal data; loads nothing from elsewhere."""
    seeds, rows = data.result.get("seeds", ()), len(data.models)
    where = f"{data.run} · {rows} rows, seeds {', '.join(map(str, seeds))}"
    sections = [make(data) for make in SECTIONS]
    return render_page(data.name, where, _cards(data), [*sections[:-1], *data.more, sections[-1]], "comparison")


def spread(figure: Json, digits: int = 4) -> str:
    """`0.7893 ± 0.0031`: mean and standard deviation over seeds."""
    mean, sd = real(figure.get("mean")), real(figure.get("sd"))
    return NONE if mean is None else show(mean, digits) if sd is None else f"{mean:.{digits}f} ± {sd:.{digits}f}"


def between(difference: Json) -> str:
    """`[+0.0041, +0.0120]`: the interval."""
    low, high = real(difference.get("low")), real(difference.get("high"))
    return NONE if low is None or high is None else f"[{low:+.4f}, {high:+.4f}]"


def verdict(difference: Json) -> str:
    """better, worse, or no clear difference: by the interval, which knows users, and by the seeds, whose mean must
    differ from zero by a t-test at 5 %. One seed says nothing of others: then users alone decide."""
    low, high = real(difference.get("low")), real(difference.get("high"))
    mean, sd, seeds = real(difference.get("mean")), real(difference.get("sd")), difference["seeds"]
    few = difference["users"] < FEWEST_USERS
    if low is None or high is None or low <= 0 <= high or few or mean is None:
        return "no clear difference"
    if sd is not None and abs(mean) < STUDENT[min(seeds - 2, len(STUDENT) - 1)] * sd / math.sqrt(seeds):
        return "no clear difference"
    return "better" if (low > 0) != (difference["metric"] in LOWER_IS_BETTER) else "worse"


def _cards(data: CompareData) -> list[Card]:
    compared, gaps = data.compared, data.differences("auc")
    best = compared[0] if compared else {}
    ahead = sum(verdict(d) == "better" for d in gaps)
    asked = "alone: one seed" if any(d["seeds"] == 1 for d in gaps) else "and by seeds"
    cells, account = part(data.result, "cells"), data.result
    return [
        Card("Best row", str(best.get("model", NONE)), f"test AUC {spread(part(best, 'test', 'auc'))}"),
        Card("Clearly ahead", f"{ahead} of {len(gaps)}", f"differences to baselines, by users {asked}"),
        Card("Cells trained", show(cells.get("finished")), f"{show(cells.get('failed'))} failed"),
        Card("Time", duration(account.get("seconds")), f"{duration(account.get('training_seconds'))} of training"),
    ]


def _section_table(data: CompareData) -> Section:
    key, title, compared = "table", "Test set", data.compared
    if not compared:
        return Section(key, title, [Text("No row has been tested.")])
    shown = {k: n for k, n in CLICK_METRICS.items() if any(k in part(m, "test") for m in compared)}
    baselines = [*data.result.get("baseline", ()), *data.result.get("tables", ())]
    head = ["row", *shown.values(), *(f"AUC less {b}, 95 %" for b in baselines), "seeds"]
    rows = [
        [
            m["model"],
            *(spread(part(m, "test", k)) for k in shown),
            *(_against(data, m["model"], b) for b in baselines),
            str(len(m["test"]["auc"]["values"])),
        ]
        for m in compared
    ]
    rows += [
        [f"{name} (no model)", *(show(area) if k == "auc" else NONE for k in shown), *(NONE for _ in baselines), NONE]
        for name, area in part(data.result, "simple").items()
    ]
    text = (
        "Mean ± standard deviation over seeds, each tested once. Differences are paired: users are drawn with "
        "replacement, the same draw for both rows, and both AUCs are computed anew, averaged over seeds."
    )
    src = plots.standings(
        [m["model"] for m in compared],
        [m["test"]["auc"]["values"] for m in compared],
        [i for i, m in enumerate(compared) if m["model"] in baselines],
    )
    blocks: list[Block] = [Text(text), Table("", head, rows, 0), Drawing("", src, "Orange: baselines."), *_failed(data)]
    return Section(key, title, blocks)


def _against(data: CompareData, model: str, baseline: str) -> str:
    found = [d for d in data.differences("auc") if (d["model"], d["baseline"]) == (model, baseline)]
    return f"{found[0]['mean']:+.4f} {between(found[0])}" if found else NONE


def _failed(data: CompareData) -> list[Block]:
    errors = [(m["model"], f) for m in data.models for f in m.get("failed", ())]
    texts = [f"{model}, {f['cell']}, failed: {clip(f['error'], 300)}" for model, f in errors]
    texts += [f"{study} was left out: {clip(error, 300)}" for study, error in part(data.result, "left_out").items()]
    return [Text(text, "warn") for text in texts]


def _section_differences(data: CompareData) -> Section:
    key, title, gaps = "differences", "Differences", data.differences("auc")
    known = [d for d in gaps if real(d["low"]) is not None and real(d["high"]) is not None]
    if not known:
        return Section(key, title, [Text("There are no two tested rows to compare.")])
    bars = [plots.Interval(f"{d['model']} less {d['baseline']}", d["mean"], d["low"], d["high"]) for d in known]
    caption = (
        f"95 % intervals of {show(known[0]['draws'])} draws of {show(known[0]['users'])} users. Grey: zero is inside. "
        "They say how sure the difference is for other users, not for other seeds: ± is its spread over seeds."
    )
    head = ["row", "baseline", "metric", "difference", "95 % interval", "relative", "95 % interval", "", "seeds"]
    rows = [
        [
            *(d["model"], d["baseline"], CLICK_METRICS.get(d["metric"], d["metric"])),
            *(_difference(d), between(d), percent(d["relative"]), _relative(d), verdict(d), str(d["seeds"])),
        ]
        for d in data.result.get("differences", ())
    ]
    src = plots.intervals(bars, "difference of test AUC")
    return Section(key, title, [Drawing("", src, caption), Table("", head, rows)])


def _difference(difference: Json) -> str:
    """`+0.0041 ± 0.0012`: mean and standard deviation over seeds."""
    sd = real(difference.get("sd"))
    return f"{difference['mean']:+.4f}" + ("" if sd is None else f" ± {sd:.4f}")


def percent(value: Any) -> str:
    """A relative difference: `+1.50 %`."""
    return NONE if real(value) is None else f"{100 * value:+.2f} %"


def _relative(difference: Json) -> str:
    return f"[{percent(difference.get('relative_low'))}, {percent(difference.get('relative_high'))}]"


def _section_tuning(data: CompareData) -> Section:
    key, title = "tuning", "Tuning"
    tried = [m for m in data.models if len(m.get("tuned", {}).get("tried", ())) > 1]
    if not tried:
        return Section(key, title, [Text("Rows were compared as they stand: the matrix has no tuning.")])
    rows = []
    for m in tried:
        for attempt in m["tuned"]["tried"]:
            chosen = attempt["values"] == m["tuned"]["values"]
            auc = attempt.get("auc")
            rows.append([m["model"], _settings(attempt["values"]), show(real(auc)), "chosen" if chosen else ""])
    text = (
        "Every row tried its own settings and the same others, less what makes the row (or values of its own, where "
        "the matrix gives it such), with one seed; validation AUC chose. The test split was not read for it."
    )
    return Section(key, title, [Text(text), Table("", ["row", "settings", "validation AUC", ""], rows)])


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{path}={setting(value)}" for path, value in values.items()) or "its own"


def _section_sensitivity(data: CompareData) -> Section:
    key, title, curves = "sensitivity", "Sensitivity", list(data.result.get("sensitivity", ()))
    drawn, rows = [], []
    for curve in curves:
        points = curve["points"]
        own = next((i for i, p in enumerate(points) if p["own"]), None)
        names, aucs = [setting(p["value"]) for p in points], [p["auc"]["values"] for p in points]
        rows += [
            [curve["path"], name, spread(p["auc"]) if known else "failed", str(len(known)), "as compared" * p["own"]]
            for name, known, p in zip(names, aucs, points, strict=True)
        ]
        if any(aucs):
            drawn.append(plots.Sensitivity(curve["path"], names, aucs, own))
    if not drawn:
        return Section(key, title, [Text("No curves: the matrix asks for none, or their row could not be trained.")])
    caption = (
        f"Validation AUC of {curves[0]['row']} over one setting, all others as it was compared. Grey: seeds; "
        "band: one standard deviation. The axis is in steps, not to scale; a gap is a value that failed."
    )
    table = Table("", ["setting", "value", "validation AUC", "seeds", ""], rows)
    return Section(key, title, [Drawing("", plots.sensitivity(drawn), caption), table])


def _section_cost(data: CompareData) -> Section:
    compared = data.compared
    if not compared:
        return Section("cost", "Cost", [Text("No row has finished.")])
    stages = [[part(m, "cost").get(f"{s}_seconds") or 0.0 for m in compared] for s in ("stage1", "stage2")]
    head = ["row", "parameters", "stage 1", "stage 2", "both", "tuning", "events a candidate", "a million candidates"]
    rows = [
        [
            m["model"],
            show(m.get("parameters")),
            *(duration(part(m, "cost").get(k)) for k in ("stage1_seconds", "stage2_seconds")),
            duration(m.get("seconds")),
            duration(part(m, "cost").get("tuning_seconds")),
            show(real(part(m, "cost").get("keys")), 1),
            duration(part(m, "cost").get("seconds_a_million")),
        ]
        for m in compared
    ]
    caption = (
        "Training time of a cell, mean over seeds, as if it had trained its stage 1 alone; cells that agree on a stage "
        "1 shared it, so the job took less. Cells ran beside one another: compare rows, not machines."
    )
    src = plots.cost([m["model"] for m in compared], *stages)
    return Section("cost", "Cost", [Drawing("", src, caption), Table("", head, rows)])


def _section_run(data: CompareData) -> Section:
    parts = (("Matrix, complete", data.matrix_yaml), ("Base configuration, complete", data.base_yaml))
    blocks: list[Block] = [Code(title, text) for title, text in parts if text]
    versions = part(data.result, "versions")
    if versions:
        blocks.insert(0, Table("", ["package", "version"], [[k, str(v)] for k, v in versions.items()]))
    return Section("run", "Configuration", blocks or [Text("Matrix and configuration were not recorded.")])


SECTIONS: tuple[Callable[[CompareData], Section], ...] = (
    _section_table,
    _section_differences,
    _section_tuning,
    _section_sensitivity,
    _section_cost,
    _section_run,
)


def compare_summary(data: CompareData, next_commands: Sequence[str]) -> str:
    """What a comparison found on one screen: at most 24 lines of at most 100 columns (a path to copy stays whole)."""
    lines = []
    for m in data.compared[: LINES - 10]:
        gaps = [d for d in data.differences("auc") if d["model"] == m["model"]]
        gap = f"{gaps[0]['mean']:+.4f} {between(gaps[0])} to {clip(gaps[0]['baseline'], 12)}" if gaps else ""
        lines.append(STANDING.format(clip(m["model"], 24), spread(m["test"]["auc"]), gap).rstrip())
    cells = part(data.result, "cells")
    times = f"{duration(data.result.get('seconds'))}, {duration(data.result.get('training_seconds'))} of training"
    errors = [f"{m['model']}: {f['error']}" for m in data.models for f in m.get("failed", ())]
    errors += [f"{study}: {error}" for study, error in part(data.result, "left_out").items()]
    lines += [
        *([] if lines else ["no row has an AUC: none was tested, or the test has not both clicks and others"]),
        *entry("cells", f"{show(cells.get('finished'))} finished, {show(cells.get('failed'))} failed"),
        *entry("time", times),
        *(entry("last error", clip(errors[-1], COLUMNS - 12)) if errors else []),
        *entry("figures", f"{data.run}/compare.json"),
        *entry("report", f"{data.run}/report.html"),
    ]
    return screen(lines, next_commands)


def board(name: str, elapsed: float, counts: str, running: Sequence[Running]) -> str:
    """The comparison as it goes, at most 24 lines of at most 100 columns."""
    lines = ["  ".join([clip(name, 24), duration(elapsed), counts])]
    lines.append(BOARD.format("cell", "", "AUC", "training") if running else "no cell is running")
    lines += [
        BOARD.format(clip(label, 38), clip(phase, 16), show(real(auc)), duration(seconds))
        for label, phase, auc, seconds in running[: LINES - 2]
    ]
    return "\n".join(line[:COLUMNS].rstrip() for line in lines)
