"""Plots of the report: plain numbers in, one self-contained SVG out (a data URI, equal for equal input).

Figures are drawn with the object interface of matplotlib, so nothing global is left behind.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hpgr.metrics import Bin, Reals

Interval = tuple[float, float] | None
"""From and to; None: not known."""
BLUE, ORANGE, GREY, PALE, INK = "#2563a8", "#d9771e", "#8a94a3", "#dbe6f3", "#27313f"
WIDTH = 9.6
"""Inches of a figure that spans the page."""
STYLE = {
    "svg.hashsalt": "hpgr",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#b6bec9",
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e8ecf1",
    "grid.linewidth": 0.8,
    "xtick.color": "#5b6675",
    "ytick.color": "#5b6675",
    "text.color": INK,
    "text.parse_math": False,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
P = ParamSpec("P")


@dataclass(frozen=True)
class Curve:
    """Values [n] of one quantity over optimiser steps [n]."""

    step: Sequence[float]
    value: Sequence[float]


@dataclass(frozen=True)
class Histogram:
    """Counts [n] between edges [n + 1]."""

    title: str
    label: str
    edges: Sequence[float]
    counts: Sequence[float]


def as_svg(draw: Callable[P, Figure]) -> Callable[P, str]:
    """Draw in the report's style and return `data:image/svg+xml;base64,...`."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> str:
        out = io.BytesIO()
        with matplotlib.rc_context(STYLE):
            draw(*args, **kwargs).savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()

    return drawn


def short(value: float) -> str:
    """Axis label of a number: 950, 1.2k, 40k, 3M, 0.25."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


SHORT = FuncFormatter(lambda value, _: short(value))


@as_svg
def learning_curves(loss: Curve, validation: Curve, metric: str, rate: Curve) -> Figure:
    """Training loss, validation metric with its best point, and learning rate (left out when empty)."""
    panels = 3 if rate.step else 2
    figure = Figure(figsize=(WIDTH, 2.7), layout="constrained")
    axes = figure.subplots(1, panels, sharex=True, width_ratios=(3, 3, 2)[:panels])
    _loss(axes[0], loss)
    _validation(axes[1], validation, metric)
    if rate.step:
        axes[2].plot(rate.step, rate.value, color=GREY)
        axes[2].set_title("Learning rate")
        axes[2].yaxis.set_major_formatter(SHORT)
    for axis in axes:
        axis.set_xlabel("optimiser step")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.xaxis.set_major_formatter(SHORT)
    return figure


def _loss(axis: Any, loss: Curve) -> None:
    """Long curves are shown pale with a running mean over 1/25 of their length."""
    width = max(len(loss.value) // 25, 1)
    if width > 2:
        axis.plot(loss.step, loss.value, color="#b9cde6", linewidth=1, label="logged")
        smooth = np.convolve(loss.value, np.full(width, 1 / width), "valid")
        axis.plot(loss.step[width - 1 :], smooth, color=BLUE, label=f"mean of {width}")
        axis.legend(loc="upper right")
    else:
        axis.plot(loss.step, loss.value, color=BLUE, marker="." if len(loss.step) < 30 else None)
    axis.set_title("Training loss")


def _validation(axis: Any, validation: Curve, metric: str) -> None:
    axis.set_title(f"Validation {metric}")
    if not validation.step:
        axis.text(0.5, 0.5, "not validated", ha="center", va="center", transform=axis.transAxes, color=GREY)
        return
    best = int(np.argmax(validation.value))
    axis.plot(validation.step, validation.value, color=ORANGE, marker="o", markersize=3.5)
    label = f"best {validation.value[best]:.4f} at step {validation.step[best]:,.0f}"
    axis.plot([validation.step[best]], [validation.value[best]], "o", color=ORANGE, markersize=8, label=label)
    axis.legend(loc="lower right")
    axis.margins(y=0.12)


@as_svg
def click_quality(roc: tuple[Reals, Reals] | None, area: float | None, bins: Sequence[Bin]) -> Figure:
    """ROC beside reliability by score bins with 95 % intervals, and the scores' density below it."""
    figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
    grid = figure.add_gridspec(4, 2)
    left, right = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[:3, 1])
    left.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="chance")
    if roc is not None:
        left.fill_between(roc[0], roc[1], color=PALE, alpha=0.6, linewidth=0)
        left.plot(roc[0], roc[1], color=BLUE, label=f"model, AUC {area:.4f}")
    left.set(title="ROC", xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1.01))
    left.legend(loc="lower right")
    _reliability(right, bins)
    below = figure.add_subplot(grid[3, 1], sharex=right)
    widths = [max(b.high - b.low, 1e-4) for b in bins]
    density = [b.n / w for b, w in zip(bins, widths, strict=True)]
    below.bar([b.low for b in bins], density, width=widths, align="edge", color=PALE, edgecolor=BLUE, linewidth=0.6)
    below.set(xlabel="predicted probability", ylabel="density", yticks=[])
    return figure


def _reliability(axis: Any, bins: Sequence[Bin]) -> None:
    """Observed click rate over the mean prediction of each bin, both axes from 0 to what the data need."""
    x, y = [b.predicted for b in bins], np.array([b.observed for b in bins])
    low, high = np.array([b.interval for b in bins]).T
    top = min(1.05 * max(float(high.max()), *x), 1.02)
    axis.plot([0, top], [0, top], color=GREY, linestyle="--", linewidth=1, label="perfect")
    axis.errorbar(x, y, (y - low, high - y), color=BLUE, fmt="o-", markersize=4, elinewidth=1, label="observed, 95 %")
    axis.set(
        title=f"Calibration in {len(bins)} score bins",
        ylabel="observed click rate",
        xlim=(0, top),
        ylim=(0, top),
    )
    axis.tick_params(labelbottom=False)
    axis.legend(loc="upper left")


@as_svg
def auc_by_bin(
    bins: Sequence[Bin], names: Sequence[str], label: str, overall: float | None, intervals: Sequence[Interval]
) -> Figure:
    """AUC of each bin with its 95 % interval above the bins' impressions; a bin of one class shows no AUC."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    known = [i for i, b in enumerate(bins) if b.auc is not None]
    if overall is not None:
        top.axhline(overall, color=GREY, linestyle="--", linewidth=1, label=f"all impressions {overall:.4f}")
    if known:
        top.scatter(known, [bins[i].auc for i in known], s=36, color=BLUE, zorder=3, label="AUC, 95 %")
        for i in known:
            top.plot([i, i], intervals[i] or (np.nan, np.nan), color=BLUE, linewidth=1.2)
    if known or overall is not None:
        top.legend(loc="upper left", ncols=2, bbox_to_anchor=(0, 1.2))
    top.set_ylabel("AUC")
    top.margins(y=0.15)
    below.bar(range(len(bins)), [b.n for b in bins], color=PALE, edgecolor=BLUE, linewidth=0.6, width=0.6)
    below.set_xticks(range(len(bins)), names)
    below.set(xlabel=label, ylabel="rows")
    below.yaxis.set_major_formatter(SHORT)
    below.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    below.grid(visible=False, axis="x")
    return figure


@as_svg
def histograms(parts: Sequence[Histogram]) -> Figure:
    """Bars of equal width side by side; ticks name the edges, which need not be evenly spaced."""
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    for axis, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        bars = len(part.counts)
        axis.bar(range(bars), part.counts, width=0.92, align="edge", color=BLUE, alpha=0.85)
        ticks = range(0, bars + 1, max(1, -(-bars // 6)))
        axis.set_xticks(list(ticks), [short(part.edges[i]) for i in ticks])
        axis.set_title(part.title)
        axis.set_xlabel(part.label)
        axis.yaxis.set_major_formatter(SHORT)
        axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.grid(visible=False, axis="x")
    return figure


@as_svg
def comparison(names: Sequence[str], areas: Sequence[float], ours: int, interval: Interval) -> Figure:
    """AUC of each scorer as a dot, ours coloured and with its 95 % interval; best on top."""
    figure = Figure(figsize=(WIDTH, 0.9 + 0.34 * len(names)), layout="constrained")
    axis = figure.subplots()
    rows = np.arange(len(names))[::-1]
    colors = [ORANGE if i == ours else BLUE for i in range(len(names))]
    axis.hlines(rows, 0.5, areas, color=PALE, linewidth=3)
    if interval:
        axis.hlines(rows[ours], *interval, color=ORANGE, linewidth=1.2)
    axis.scatter(areas, rows, s=48, color=colors, zorder=3)
    for row, area in zip(rows, areas, strict=True):
        axis.annotate(f"{area:.4f}", (area, row), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axis.axvline(0.5, color=GREY, linestyle="--", linewidth=1)
    axis.set_yticks(rows, names)
    axis.set_xlabel("test AUC (0.5 is chance; the line through the model is its 95 % interval over users)")
    axis.set_ylim(-0.6, len(names) - 0.25)
    axis.margins(x=0.06)
    axis.grid(visible=False, axis="y")
    return figure
