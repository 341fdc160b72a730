"""The report of a hyper-parameter search: one HTML page, a summary that fits a terminal, and a live board.

Each `_section_...` function turns one part of `SearchData` into a section and says in words what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpgr.report import search_plots as plots
from hpgr.report.page import (
    CLICK_METRICS,
    COLUMNS,
    LINES,
    NONE,
    Block,
    Card,
    Code,
    Drawing,
    Section,
    Table,
    Text,
    clip,
    duration,
    entry,
    figures,
    real,
    render_page,
    screen,
    setting,
    show,
)
from hpgr.report.trials import Dimension, Scored, SearchData, TrialRow

AXES, PAIRED, LEADERS = 8, 3, 5
"""Most axes of the parallel coordinates, settings taken in pairs, and trials among the leaders."""
BOARD = "{:>5}  {:<15}  {:>6}  {:>11}  {}"


OPEN_QUESTIONS = ("model.pgsa.top_k", "stream.session_gap_minutes")
"""Settings that the paper gives no values for: their pair is always drawn where both vary."""


def render_search(data: SearchData) -> str:
    """One HTML page with inline style and plots, equal for equal data; loads nothing from elsewhere."""
    goals = f"validation AUC against {data.cost_name}" if data.cost_name else "validation AUC"
    where = f"{data.run} · {len(data.dimensions)} settings searched for {goals}"
    return render_page(data.name, where, _cards(data), [make(data) for make in SECTIONS], "search")


def _spent(seconds: float) -> str:
    return duration(seconds) if seconds else NONE


def _cards(data: SearchData) -> list[Card]:
    best, account = data.trial(data.best), data.account
    found = f"trial {data.best}, {data.gain()}" if best else "no trial has finished"
    tested = f"{show(data.test.get('n'))} test impressions" if data.test else "not tested"
    finished = sum(t.state == "finished" for t in data.trials)
    return [
        Card("Best validation AUC", show(best[1] if best else None), found),
        Card("Test AUC of the best", show(data.test.get("auc")), tested),
        Card("Trials finished", show(finished), data.counts("finished") or "no others"),
        Card("Stage 1 computed", show(account.get("stage1_computed")), _stage1_saved(account)),
    ]


def _stage1_saved(account: Mapping[str, Any]) -> str:
    return f"{show(account.get('stage1_reused'))} reused, {duration(account.get('stage1_seconds_saved'))} saved"


def _section_result(data: SearchData) -> Section:
    title, best = "Result", data.trial(data.best)
    if best is None:
        return Section("result", title, [Text("No trial has finished, so there is no best configuration.", "warn")])
    text = f"Trial {data.best} is best with a validation AUC of {best[1]:.4f}: {data.gain()}."
    blocks: list[Block] = [
        Text(text, "good" if data.best != data.default else ""),
        _best_against_default(data, best[0]),
        _leaders_table(data),
    ]
    if data.test:
        known = [k for k in (*CLICK_METRICS, "n", "positives") if k in data.test]
        head = [{"n": "impressions", "positives": "clicks"}.get(k, CLICK_METRICS.get(k, k)) for k in known]
        blocks.append(Table("The best on the test set", ["", *head], [["test", *(show(data.test[k]) for k in known)]]))
    honest = "the test AUC, computed once for it, does not." if data.test else "it has not been tested yet."
    caution = f"The validation AUC of the best of many trials flatters it, for it was chosen by that figure; {honest}"
    return Section("result", title, [*blocks, Text(caution)])


def _best_against_default(data: SearchData, best: TrialRow) -> Table:
    default = next((t for t in data.trials if t.number == data.default), None)
    rows = [
        [d.path, *(clip(t.value(d.path), 20) if t else NONE for t in (best, default)), clip(d.searched, 36)]
        for d in data.dimensions
    ]
    return Table("Best against default", ["setting", f"best (trial {data.best})", "default", "searched"], rows)


def _leaders_table(data: SearchData) -> Table:
    """The best trials, and the default if it is not among them."""
    ranked, default = data.leaders(), data.measure()
    rows = ranked[:LEADERS] + [pair for pair in ranked[LEADERS:] if pair[0].number == data.default]
    head = ["trial", "validation AUC", "over the default", *([data.cost_name] if data.cost_name else []), "training"]
    cells = [
        [
            data.numbered(t),
            show(auc),
            NONE if default is None or t.number == data.default else f"{auc - default[1]:+.4f}",
            *([_cost(t)] if data.cost_name else []),
            duration(t.seconds),
        ]
        for t, auc in rows
    ]
    return Table("Leading trials", head, cells, next((i for i, (t, _) in enumerate(rows) if t.number == data.best), -1))


def _cost(trial: TrialRow) -> str:
    value = real(trial.cost)
    return NONE if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def _outcomes(scored: Scored, best: int | None) -> plots.Outcomes:
    numbers = [t.number for t, _ in scored]
    index = numbers.index(best) if best in numbers else None
    return plots.Outcomes(numbers, [auc for _, auc in scored], [t.state == "finished" for t, _ in scored], index)


def _axis(data: SearchData, dimension: Dimension, scored: Scored) -> plots.Axis:
    """Where the trials stand on a dimension; choices that are numbers are put in order."""
    d, label = dimension, clip(data.labels()[dimension.path], 22)
    if d.kind == "category":
        choices = sorted(d.choices) if d.ordered else d.choices
        places = {(isinstance(c, bool), c): i for i, c in enumerate(choices)}  # True is not 1 here
        chosen = [t.values.get(d.path) for t, _ in scored]
        indices = [places.get((isinstance(v, bool), v)) for v in chosen]
        return plots.Axis(label, indices, names=[clip(setting(c), 12) for c in choices])
    at = [real(t.values.get(d.path)) for t, _ in scored]
    log = d.log and all(v > 0 for v in (d.low, d.high, *at) if v is not None)
    return plots.Axis(label, at, log, low=d.low, high=d.high)


def _section_history(data: SearchData) -> Section:
    title, scored = "Optimisation history", data.scored("finished", "pruned")
    if not scored:
        return Section("history", title, [Text("No trial has finished or was pruned: there is no AUC to draw.")])
    default = data.measure()
    src = plots.history(_outcomes(scored, data.best), default[1] if default else None)
    caption = "Best validation AUC of each trial. A pruned trial shows what it had reached when it was stopped."
    return Section("history", title, [Drawing("", src, caption)])


def _section_curves(data: SearchData) -> Section:
    special = {data.default: "default", data.best: "best"}
    lines = []
    for t in data.trials:
        known = [(epoch, auc) for epoch, auc in t.curve if real(auc) is not None]
        role = special.get(t.number, "finished") if t.state == "finished" else ""
        if known:
            lines.append(plots.Line([epoch for epoch, _ in known], [auc for _, auc in known], role))
    if not lines:
        return Section("curves", "Learning curves", [Text("No trial has been validated yet.")])
    caption = "Pale: pruned, failed or still running."
    return Section("curves", "Learning curves", [Drawing("", plots.learning_curves(lines), caption)])


def _section_importance(data: SearchData) -> Section:
    title, short = "Importance", data.labels()
    matter = [d.path for d in data.by_importance() if d.path in data.importance]
    if not matter:
        text = "Too few trials have finished, or all are equal: which settings matter cannot be told."
        return Section("importance", title, [Text(text)])
    src = plots.importance([clip(short[path], 36) for path in matter], [data.importance[path] for path in matter])
    caption = (
        "Estimated share of each setting in what makes a trial good; with few trials a rough guide. It speaks of what "
        "the sampler still varied: a setting that TPE soon kept at its best value looks as if it mattered little."
    )
    return Section("importance", title, [Drawing("", src, caption)])


def _section_slices(data: SearchData) -> Section:
    title, scored = "Setting by setting", data.scored("finished", "pruned")
    if not scored or not data.dimensions:
        return Section("slices", title, [Text("There is no AUC to draw over the settings.")])
    axes = [_axis(data, d, scored) for d in data.dimensions]
    caption = (
        "Each axis spans what was searched: a best trial at its edge asks for a wider range. "
        "Trials of one category stand a little apart. Hollow: pruned."
    )
    return Section("slices", title, [Drawing("", plots.slices(axes, _outcomes(scored, data.best)), caption)])


def _section_pairs(data: SearchData) -> Section:
    title, scored = "Pairs of settings", data.scored("finished")
    chosen = [d for d in data.by_importance() if d.ordered][:PAIRED]
    if len(chosen) < 2:
        return Section("pairs", title, [Text("Fewer than two of the settings are numbers: there is no pair to draw.")])
    if not scored:
        return Section("pairs", title, [Text("No trial has finished: there is no AUC to draw over pairs.")])
    outcomes = _outcomes(scored, data.best)
    groups, open_questions = [chosen], [d for d in data.dimensions if d.path in OPEN_QUESTIONS]
    if len(open_questions) == 2 and not {d.path for d in open_questions} <= {d.path for d in chosen}:
        groups.append(open_questions)
    drawn = [plots.contours([_axis(data, d, scored) for d in group], outcomes.auc, outcomes.best) for group in groups]
    caption = (
        "Finished trials, coloured by their AUC; between them it is interpolated where there are at least "
        f"{plots.SURFACE_POINTS} different points. The most important settings, where that is known; ringed: the best."
    )
    return Section("pairs", title, [Drawing("", src, caption if src is drawn[-1] else "") for src in drawn])


def _section_parallel(data: SearchData) -> Section:
    title, scored = "All settings together", data.scored("finished")
    if not scored or not data.dimensions:
        return Section("parallel", title, [Text("There are no finished trials to draw.")])
    chosen, outcomes = data.by_importance()[:AXES], _outcomes(scored, data.best)
    src = plots.parallel([_axis(data, d, scored) for d in chosen], outcomes.auc, outcomes.best)
    caption = "A line a finished trial, the darker the higher its AUC; orange: the best. "
    if len(chosen) < len(data.dimensions):
        caption += f"Shown are {AXES} of {len(data.dimensions)} settings, the most important where that is known. "
    return Section("parallel", title, [Drawing("", src, caption + "A line is interrupted where nothing was drawn.")])


def _section_pareto(data: SearchData) -> Section:
    title = "Pareto front"
    if not data.cost_name:
        return Section("pareto", title, [Text("The search had one objective, validation AUC: there is no front.")])
    known = [(t, auc, c) for t, auc in data.scored("finished") if (c := real(t.cost)) is not None]
    if not known:
        return Section("pareto", title, [Text(f"No finished trial has both an AUC and {data.cost_name}.")])
    numbers = [t.number for t, _, _ in known]
    front = sorted((i for i, n in enumerate(numbers) if n in set(data.pareto)), key=lambda i: known[i][2])
    special = {data.default: "default", data.best: "best"}
    marks = {i: special[n] for i, n in enumerate(numbers) if n in special}
    src = plots.pareto([c for _, _, c in known], [auc for _, auc, _ in known], front, marks, data.cost_name)
    caption = f"No trial has both a higher AUC and a lower cost ({data.cost_name}) than one on the front."
    rows = [[data.settings(t), str(t.number), show(auc), _cost(t)] for t, auc, _ in (known[i] for i in front)]
    table = Table("On the front", ["settings", "trial", "validation AUC", data.cost_name], rows)
    return Section("pareto", title, [Drawing("", src, caption), table])


def _section_account(data: SearchData) -> Section:
    rows = []
    for key, value in data.account.items():
        name = key.replace("_", " ").replace("stage1", "stage 1").replace("seconds", "time")
        rows.append([name, duration(value) if "seconds" in key else show(value, 2)])
    table: Block = Table("", ["", "spent"], rows)
    return Section("account", "Cost account", [table if rows else Text("This search kept no account of its cost.")])


def _section_timeline(data: SearchData) -> Section:
    # Of trials of an earlier version it is only known when they were given to Tune.
    began = [(t, t.started if t.ran is None and t.seconds else t.ran) for t in data.trials]
    known = [(t, at) for t, at in began if at is not None]
    if not known:
        return Section("timeline", "Timeline", [Text("No trial has started yet.")])
    nodes = [(at, alive) for at, alive, _ in data.nodes]
    times = [*(at for _, at in known), *(t.stopped for t, _ in known), *(at for at, _ in nodes)]
    now = max(v for v in times if v is not None)
    bars = [plots.Bar(t.number, at, now if t.stopped is None else t.stopped, t.state) for t, at in known]
    cluster = "The number of worker nodes was not recorded."
    if nodes:
        counts, cpus = [alive for _, alive in nodes], [c for _, _, c in data.nodes]
        cluster = f"Below: {min(counts)} to {max(counts)} worker nodes, {min(cpus):g} to {max(cpus):g} CPUs."
    caption = f"When each trial ran, by how it ended. {cluster}"
    return Section("timeline", "Timeline", [Drawing("", plots.timeline(bars, nodes), caption)])


def _section_trials(data: SearchData) -> Section:
    if not data.trials:
        return Section("trials", "Trials", [Text("No trial has been drawn yet.")])
    short, ordered = data.labels(), sorted(data.trials, key=lambda t: t.number)
    # In a table wider than the page the first column gives way: a mark needs no more room than it gets.
    head = ["", "trial", "state", "AUC", *([data.cost_name] if data.cost_name else []), "training"]
    head += [*(clip(short[d.path], 28) for d in data.dimensions), "stage 1", "computing it"]
    rows = [
        [
            "★" if t.number == data.best else "",
            data.numbered(t),
            t.doing,
            show(real(t.auc)),
            *([_cost(t)] if data.cost_name else []),
            _spent(t.seconds),
            *(clip(t.value(d.path), 24) for d in data.dimensions),
            t.stage1 or NONE,
            _spent(t.stage1_seconds),
        ]
        for t in ordered
    ]
    mark = next((i for i, t in enumerate(ordered) if t.number == data.best), -1)
    errors = [Code(f"Error of trial {t.number}: {clip(t.reason, 90)}", t.error) for t in ordered if t.error.strip()]
    return Section("trials", "Trials", [Table("", head, rows, mark), *errors])


def _section_run(data: SearchData) -> Section:
    parts = (("Space, complete", data.space_yaml), ("Starting configuration, complete", data.config_yaml))
    blocks = [Code(title, text) for title, text in parts if text]
    return Section("run", "Configuration", blocks or [Text("Space and configuration were not recorded.")])


SECTIONS: tuple[Callable[[SearchData], Section], ...] = (
    _section_result,
    _section_history,
    _section_curves,
    _section_importance,
    _section_slices,
    _section_pairs,
    _section_parallel,
    _section_pareto,
    _section_account,
    _section_timeline,
    _section_trials,
    _section_run,
)


def search_summary(data: SearchData, next_commands: Sequence[str]) -> str:
    """What a search found on one screen: at most 24 lines of at most 100 columns (a path to copy stays whole)."""
    best, account, short = data.trial(data.best), data.account, data.labels()
    found = f"trial {data.best}, validation AUC {best[1]:.4f}, {data.gain()}" if best else "no trial has finished"
    matter = [d.path for d in data.by_importance() if d.path in data.importance]
    shares = [f"{clip(short[path], 36)} {data.importance[path]:.0%}" for path in matter]
    errors = [f"trial {t.number}: {t.reason}" for t in data.trials if t.error.strip()]
    times = f"{duration(account.get('seconds'))}, {duration(account.get('training_seconds'))} of training"
    lines = [
        *entry("trials", data.counts() or "none"),
        *entry("best", found),
        *(entry("settings", data.settings(best[0]), 4) if best else []),
        *entry("test", figures(data.test, (*CLICK_METRICS, "n")) or "not tested", 2),
        *entry("importance", ", ".join(shares) or "too few trials to tell", 2),
        *(entry("front", f"trials {', '.join(map(str, data.pareto)) or NONE}", 2) if data.cost_name else []),
        *entry("stage 1", f"{show(account.get('stage1_computed'))} computed, {_stage1_saved(account)}"),
        *entry("time", f"{times}, {show(account.get('node_hours'), 2)} node hours"),
        *(entry("last error", clip(errors[-1], COLUMNS - 12)) if errors else []),
        *entry("report", f"{data.run}/report.html"),
    ]
    return screen(lines, next_commands)


def board(data: SearchData, elapsed: float) -> str:
    """The search as it goes, at most 24 lines of at most 100 columns: running trials, then the best finished ones.

    Args:
        elapsed: seconds since the search began.
    """
    best = data.trial(data.best)
    found = f"best {best[1]:.4f} (trial {data.best})" if best else "no best yet"
    lines = ["  ".join([clip(data.name, 20), duration(elapsed), found, data.counts("repeated")])]
    running = [t for t in data.trials if t.state == "running"]
    done = [t for t, _ in data.leaders()]
    room = LINES - 2
    running = running[: room - min(len(done), LEADERS)]
    shown = [*running, *done[: room - len(running)]]
    lines.append(BOARD.format("trial", "", "AUC", "training", "settings") if shown else "no trial runs or has finished")
    lines += [
        BOARD.format(t.number, clip(t.doing, 15), show(real(t.auc)), duration(t.seconds), data.settings(t))
        for t in shown
    ]
    return "\n".join(line if len(line) <= COLUMNS else f"{line[: COLUMNS - 1]}…" for line in lines)
