"""Plots of a search: plain numbers in, one self-contained SVG out, as in `plots`.

n counts trials. A setting is an `Axis`: where each trial stands on it, be it a number or a category.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from matplotlib.tri import Triangulation

from hpgr.metrics import Reals
from hpgr.report.page import number
from hpgr.report.plots import BLUE, GREY, INK, ORANGE, PALE, SHORT, WIDTH, as_svg

FAINT = "#9dbbdf"
STATES = {"finished": BLUE, "pruned": FAINT, "failed": "#c0392b", "running": "#3c8d54", "repeated": GREY}
COLORS = "YlGnBu"
UNITS = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
SURFACE_POINTS = 6
"""Fewer different points say too little about what lies between them."""


@dataclass(frozen=True)
class Axis:
    """A setting: each trial's position [n] on it, None where it was not drawn.

    A category has `names` for its positions 0, 1, ...; a number has bounds (None: unknown), both > 0 where `log`.
    """

    label: str
    at: Sequence[float | None]
    log: bool = False
    names: Sequence[str] = ()
    low: float | None = None
    high: float | None = None

    def scaled(self) -> Reals:
        """Positions [n] in the units of the paper, NaN where not drawn."""
        at = np.array([np.nan if v is None else v for v in self.at], dtype=np.float64)
        return np.log10(at) if self.log else at

    def spread(self) -> Reals:
        """As `scaled`, with trials of one category a little apart, so that all are seen."""
        apart = (np.arange(len(self.at)) * 0.618034 % 1 - 0.5) * 0.3
        return self.scaled() + (apart if self.names else 0.0)

    def ends(self) -> tuple[float, float]:
        """Where the axis begins and ends, in the units of the paper; it reaches to trials beyond its bounds."""
        if self.names:
            return -0.5, len(self.names) - 0.5
        known = [v for v in (self.low, self.high, *self.at) if v is not None] or [1.0]
        low, high = (math.log10(f(known)) if self.log else f(known) for f in (min, max))
        apart = 0.0 if high > low else 0.05 * abs(low) or 0.5
        return low - apart, high + apart


@dataclass(frozen=True)
class Outcomes:
    """AUC [n] of trials in order, which of them finished [n] (the others were pruned), and the best one's index."""

    number: Sequence[int]
    auc: Sequence[float]
    finished: Sequence[bool]
    best: int | None


@dataclass(frozen=True)
class Line:
    """A learning curve: AUC [k] after epochs [k] of stage 2; role: best, default, finished or "" (drawn pale)."""

    epoch: Sequence[float]
    auc: Sequence[float]
    role: str


@dataclass(frozen=True)
class Bar:
    """When a trial ran, in seconds since the search began."""

    number: int
    start: float
    stop: float
    state: str


NUMBER = FuncFormatter(lambda value, _: number(value))


@as_svg
def history(outcomes: Outcomes, default: float | None) -> Figure:
    """AUC of each trial in order, the best finished one so far as a line, the default's as a dashed one."""
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    axis = figure.subplots()
    numbers, areas, finished = _arrays(outcomes)
    if default is not None:
        axis.axhline(default, color=GREY, linestyle="--", linewidth=1.2, label=f"default {default:.4f}")
    if finished.any():
        so_far = np.maximum.accumulate(areas[finished])
        axis.step(numbers[finished], so_far, where="post", color=ORANGE, label="best so far")
    _dots(axis, numbers, outcomes)
    apart = 0.5 + 0.03 * float(np.ptp(numbers))
    axis.set(xlabel="trial", ylabel="validation AUC", xlim=(numbers.min() - apart, numbers.max() + apart))
    axis.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
    axis.margins(y=0.1)
    figure.legend(loc="outside upper left", ncols=5)
    return figure


def _arrays(outcomes: Outcomes) -> tuple[Any, Any, Any]:
    return np.array(outcomes.number), np.array(outcomes.auc), np.array(outcomes.finished, dtype=bool)


def _dots(axis: Any, x: Any, outcomes: Outcomes) -> None:
    """Finished trials full, pruned ones hollow, the best one ringed; x [n], NaN is left out."""
    _, areas, finished = _arrays(outcomes)
    for chosen, face, edge, label in ((~finished, "white", FAINT, "pruned"), (finished, BLUE, "white", "finished")):
        if chosen.any():
            axis.scatter(x[chosen], areas[chosen], s=26, color=face, edgecolor=edge, zorder=3, label=label)
    if outcomes.best is not None:
        i = outcomes.best
        axis.scatter(x[i], areas[i], s=80, color="none", edgecolor=ORANGE, linewidth=1.8, zorder=4, label="best")


@as_svg
def learning_curves(lines: Sequence[Line]) -> Figure:
    """Validation AUC by epoch of stage 2; trials that did not finish are pale."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axis = figure.subplots()
    looks: dict[str, tuple[dict[str, Any], str]] = {
        "": ({"color": PALE, "linewidth": 1.2}, "not finished"),
        "finished": ({"color": BLUE, "linewidth": 1.0, "alpha": 0.55}, "finished"),
        "default": ({"color": INK, "linewidth": 1.6, "linestyle": "--"}, "default"),
        "best": ({"color": ORANGE, "linewidth": 2.2}, "best"),
    }
    for role, (look, label) in looks.items():
        for i, line in enumerate(line for line in lines if line.role == role):
            axis.plot(line.epoch, line.auc, marker=".", markersize=4, label=None if i else label, **look)
    axis.set(xlabel="epoch of stage 2", ylabel="validation AUC")
    axis.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    figure.legend(loc="outside upper left", ncols=4)
    return figure


@as_svg
def importance(names: Sequence[str], shares: Sequence[float]) -> Figure:
    """A bar a setting, in the order given from top to bottom."""
    figure = Figure(figsize=(WIDTH, 0.7 + 0.26 * len(names)), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(range(len(names)), shares, color=BLUE, alpha=0.85, height=0.62)
    axis.bar_label(bars, [f"{s:.0%}" for s in shares], padding=4, fontsize=8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.12 * max(max(shares), 0.01))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axis.grid(visible=False, axis="y")
    return figure


@as_svg
def slices(axes: Sequence[Axis], outcomes: Outcomes) -> Figure:
    """AUC over each setting, one small panel a setting."""
    columns = min(len(axes), 4)
    rows = -(-len(axes) // columns)
    figure = Figure(figsize=(WIDTH, 2.2 * rows + 0.1), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    for panel, setting in zip(panels, axes, strict=False):
        _dots(panel, setting.spread(), outcomes)
        panel.set_title(setting.label, fontsize=9)
        _ticks(panel.xaxis, setting, 4)
        panel.set_xlim(_padded(setting))
        panel.margins(y=0.1)
    for panel in panels[len(axes) :]:
        panel.set_visible(False)
    for panel in panels[::columns]:
        panel.set_ylabel("validation AUC")
    return figure


def _padded(setting: Axis) -> tuple[float, float]:
    low, high = setting.ends()
    return low - 0.04 * (high - low), high + 0.04 * (high - low)


def _ticks(axis: Any, setting: Axis, most: int) -> None:
    """Name categories, or about `most` numbers, on an axis in the units of the paper."""
    axis.set_tick_params(labelsize=7.5)
    if setting.names:
        axis.set_ticks(range(len(setting.names)), setting.names)
        crowded = sum(len(name) + 1.5 for name in setting.names) > 34 and axis.axis_name == "x"
        axis.set_tick_params(labelrotation=60 if crowded else 0)
    elif setting.log:
        low, high = setting.ends()
        wide = high - low > 1.9
        powers = LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=most).tick_values(10**low, 10**high)
        shown = [p for p in powers if low - 1e-9 <= math.log10(p) <= high + 1e-9]
        axis.set_ticks([math.log10(p) for p in shown], [number(p) for p in shown])
    else:
        whole = all(float(v).is_integer() for v in (*setting.at, *setting.ends()) if v is not None)
        axis.set_major_locator(MaxNLocator(most, integer=whole))
        axis.set_major_formatter(NUMBER)


@as_svg
def contours(axes: Sequence[Axis], auc: Sequence[float], best: int | None) -> Figure:
    """AUC [n] over each pair of two or three settings: filled contours where the trials span a surface, else dots."""
    pairs = [(i, j) for i in range(len(axes)) for j in range(i + 1, len(axes))]
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    panels = figure.subplots(1, len(pairs), squeeze=False)[0]
    areas, norm = np.array(auc), _norm(auc)
    for panel, (i, j) in zip(panels, pairs, strict=True):
        _pair(panel, axes[i], axes[j], areas, norm)
        if best is not None:
            at = axes[i].scaled()[best], axes[j].scaled()[best]
            panel.scatter(*at, s=90, color="none", edgecolor=ORANGE, linewidth=1.8, zorder=4)
    colors = matplotlib.cm.ScalarMappable(norm, COLORS)
    figure.colorbar(colors, ax=list(panels), label="validation AUC", extend="min", format="%.4f", pad=0.02)
    return figure


def _norm(auc: Sequence[float]) -> Any:
    """Colours of AUC [n]: the lowest tenth shares one, so that a few bad trials do not make all others look alike."""
    low = float(np.quantile(auc, 0.1))
    return matplotlib.colors.Normalize(low, max(*auc, low + 1e-3))


def _pair(panel: Any, x: Axis, y: Axis, auc: Any, norm: Any) -> None:
    """One panel; trials at the same point count as one of their mean AUC."""
    points = np.stack([x.scaled(), y.scaled()], axis=1)
    known = np.isfinite(points).all(axis=1)
    points, which, times = np.unique(points[known], axis=0, return_inverse=True, return_counts=True)
    areas = np.bincount(which.ravel(), auc[known], len(points)) / times
    if spans_a_surface(points) and np.ptp(areas) > 0:
        mesh = Triangulation(*points.T, Triangulation(*_unit(points).T).triangles)
        levels = np.linspace(norm.vmin, norm.vmax, 9)
        panel.tricontourf(mesh, areas, levels=levels, cmap=COLORS, norm=norm, extend="both", alpha=0.85)
    panel.scatter(*points.T, c=areas, cmap=COLORS, norm=norm, s=30, edgecolor=INK, linewidth=0.6, zorder=3)
    panel.set(xlabel=x.label, ylabel=y.label, xlim=_padded(x), ylim=_padded(y))
    _ticks(panel.xaxis, x, 5)
    _ticks(panel.yaxis, y, 5)


def spans_a_surface(points: Reals) -> bool:
    """Whether different points [n, 2] are enough, and not on one line, to be joined to triangles."""
    return len(points) >= SURFACE_POINTS and bool(np.linalg.matrix_rank(points - points.mean(axis=0)) == 2)


def _unit(points: Reals) -> Reals:
    """Points [n, 2] stretched to the unit square: neighbours on the paper, not in the settings' own units."""
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - low) / np.maximum(high - low, 1e-12)


@as_svg
def parallel(axes: Sequence[Axis], auc: Sequence[float], best: int | None) -> Figure:
    """A line a trial through all its settings to its AUC [n]; a setting that was not drawn interrupts it."""
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    panel = figure.subplots()
    every, norm, colors = [*axes, Axis("AUC", auc)], _norm(auc), matplotlib.colormaps[COLORS]
    heights = np.stack([(s.spread() - s.ends()[0]) / (s.ends()[1] - s.ends()[0]) for s in every], axis=1)
    for i in np.argsort(auc, kind="stable"):
        color, width = (ORANGE, 2.4) if i == best else (colors(0.25 + 0.75 * norm(auc[i], clip=True)), 1.1)
        panel.plot(heights[i], color=color, linewidth=width, marker=".", markersize=4)
    for x, setting in enumerate(every):
        _upright(panel, x, setting)
    panel.set_xticks(range(len(every)), [s.label for s in every], fontsize=8)
    panel.set(yticks=[], xlim=(-0.15, len(every) - 0.45), ylim=(-0.06, 1.06))
    panel.spines[:].set_visible(False)
    panel.grid(visible=False)
    return figure


def _upright(panel: Any, x: int, setting: Axis) -> None:
    """One vertical axis with the names of its categories, or of its two ends."""
    panel.axvline(x, color="#b6bec9", linewidth=1, zorder=1)
    low, high = setting.ends()
    named: list[tuple[float, str]] = list(enumerate(setting.names))
    if not named:
        named = [(v, number(10**v if setting.log else v)) for v in (low, high)]
    for at, name in named:
        box = {"facecolor": "white", "alpha": 0.9, "edgecolor": "none", "pad": 0.6}
        panel.text(x + 0.05, (at - low) / (high - low), name, fontsize=7, va="center", bbox=box, zorder=6)


@as_svg
def pareto(
    cost: Sequence[float], auc: Sequence[float], front: Sequence[int], marks: Mapping[int, str], name: str
) -> Figure:
    """AUC [n] over the second objective's cost [n]; `front` holds indices of trials, `marks` names for some."""
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    axis = figure.subplots()
    costs, areas = np.array(cost), np.array(auc)
    axis.scatter(costs, areas, s=26, color=FAINT, edgecolor=BLUE, linewidth=0.6, label="finished")
    order = sorted(front, key=lambda i: (cost[i], auc[i]))
    if order:
        axis.step(costs[order], areas[order], "o-", where="post", color=ORANGE, markersize=6, label="front")
    for i, label in marks.items():
        axis.annotate(label, (costs[i], areas[i]), (6, -12), textcoords="offset points", fontsize=8)
    axis.set(xlabel=name, ylabel="validation AUC")
    axis.xaxis.set_major_formatter(SHORT)
    axis.margins(0.08, 0.12)
    figure.legend(loc="outside upper left", ncols=2)
    return figure


@as_svg
def timeline(bars: Sequence[Bar], nodes: Sequence[tuple[float, int]]) -> Figure:
    """When each trial ran, coloured by its state, above how many worker nodes there were (left out when unknown)."""
    end = max([b.stop for b in bars] + [at for at, _ in nodes])
    unit, size = next((u for u in UNITS if end >= 2 * u[1]), UNITS[-1])
    heights = [min(max(0.13 * len(bars), 0.9), 6.0), *([1.0] if nodes else [])]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.9), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _bars(panels[0], bars, end / 500, size)
    if nodes:
        at, alive = [at / size for at, _ in nodes], [n for _, n in nodes]
        panels[1].step([*at, end / size], [*alive, alive[-1]], where="post", color=INK, linewidth=1.4)
        panels[1].set(ylabel="worker nodes", ylim=(0, 1.15 * max(1, *alive)))
        panels[1].yaxis.set_major_locator(MaxNLocator(3, integer=True))
    panels[-1].set(xlabel=f"{unit} since the search began", xlim=(0, 1.01 * max(end, 1e-3) / size))
    figure.legend(loc="outside upper left", ncols=6)
    return figure


def _bars(axis: Any, bars: Sequence[Bar], least: float, size: float) -> None:
    """One bar a trial, first on top, `least` seconds long or more; `size` seconds are one unit of the axis."""
    for state in dict.fromkeys([*STATES, *(b.state for b in bars)]):
        ran = [b for b in bars if b.state == state]
        numbers, starts = [b.number for b in ran], [b.start / size for b in ran]
        widths = [max(b.stop - b.start, least) / size for b in ran]
        if ran:
            axis.barh(numbers, widths, 0.75, starts, color=STATES.get(state, GREY), label=state)
    rows = [b.number for b in bars]
    axis.set(ylabel="trial", ylim=(max(rows) + 0.7, min(rows) - 0.7))
    axis.yaxis.set_major_locator(MaxNLocator(10, integer=True))
