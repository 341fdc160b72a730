"""Plots of a comparison: plain numbers in, one self-contained SVG out, as in `plots`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hpgr.report.plots import BLUE, GREY, INK, ORANGE, PALE, WIDTH, as_svg

COLUMNS = 3
"""Panels beside one another."""


@dataclass(frozen=True)
class Interval:
    """A difference with its interval: of what to what."""

    name: str
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Sensitivity:
    """Validation AUC over one setting: names of its values [n], AUC by seed of each [n][seeds; none if it failed], and
    which is the row's own value, if one is."""

    title: str
    values: Sequence[str]
    aucs: Sequence[Sequence[float]]
    own: int | None


@as_svg
def standings(names: Sequence[str], aucs: Sequence[Sequence[float]], marked: Sequence[int]) -> Figure:
    """Test AUC of each row: a dot a seed, a bar at their mean; some rows marked."""
    figure = Figure(figsize=(WIDTH, 0.9 + 0.34 * len(names)), layout="constrained")
    axis = figure.subplots()
    for place, values in enumerate(aucs):
        y, color = len(names) - 1 - place, ORANGE if place in marked else BLUE
        axis.scatter(values, np.full(len(values), y), s=26, color=color, alpha=0.6, linewidths=0, zorder=3)
        mean = float(np.mean(values))
        axis.plot([mean, mean], [y - 0.3, y + 0.3], color=color, linewidth=2.4)
        axis.annotate(f"{mean:.4f}", (mean, y), (0, 10), textcoords="offset points", ha="center", fontsize=8)
    axis.set_yticks(np.arange(len(names))[::-1], names)
    axis.set(xlabel="test AUC: a dot a seed, a bar at the mean", ylim=(-0.6, len(names) - 0.2))
    axis.margins(x=0.08)
    axis.grid(visible=False, axis="y")
    return figure


@as_svg
def intervals(parts: Sequence[Interval], label: str) -> Figure:
    """Differences with their intervals, coloured where they leave zero out."""
    figure = Figure(figsize=(WIDTH, 0.9 + 0.34 * len(parts)), layout="constrained")
    axis = figure.subplots()
    axis.axvline(0, color=INK, linewidth=1)
    for place, part in enumerate(reversed(parts)):
        color = GREY if part.low <= 0 <= part.high else BLUE if part.low > 0 else ORANGE
        axis.plot([part.low, part.high], [place, place], color=color, linewidth=2.4, solid_capstyle="butt")
        axis.scatter([part.mean], [place], s=40, color=color, zorder=3)
        axis.annotate(
            f"{part.mean:+.4f}", (part.mean, place), (0, 7), textcoords="offset points", ha="center", fontsize=8
        )
    axis.set_yticks(range(len(parts)), [p.name for p in reversed(parts)])
    axis.set(xlabel=label, ylim=(-0.6, len(parts) - 0.2))
    axis.margins(x=0.08)
    axis.grid(visible=False, axis="y")
    return figure


def panels(count: int, height: float) -> tuple[Figure, list[Any]]:
    """A figure of `count` panels in rows of at most COLUMNS."""
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, list(axes[:count])


@as_svg
def sensitivity(curves: Sequence[Sensitivity]) -> Figure:
    """A panel a setting: mean over seeds, a band of one standard deviation, a dot a seed, the own value marked."""
    figure, axes = panels(len(curves), 2.6)
    for axis, curve in zip(axes, curves, strict=True):
        x = np.arange(len(curve.values))
        mean = np.array([np.mean(v) if v else np.nan for v in curve.aucs])
        sd = np.array([np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in curve.aucs])
        axis.fill_between(x, mean - sd, mean + sd, color=PALE, alpha=0.7, linewidth=0)
        axis.plot(x, mean, color=BLUE, marker="o", markersize=3.5)
        for place, values in enumerate(curve.aucs):
            axis.scatter(np.full(len(values), place), values, s=9, color=GREY, linewidths=0, zorder=3)
        if curve.own is not None:
            axis.scatter([curve.own], [mean[curve.own]], s=52, color=ORANGE, zorder=4, label="as compared")
        axis.set_xticks(x, curve.values)
        axis.set_title(curve.title)
        axis.set_ylabel("validation AUC")
        axis.margins(x=0.08, y=0.12)
    if any(curve.own is not None for curve in curves):
        axes[0].legend(loc="best")
    return figure


@as_svg
def cost(names: Sequence[str], stage1: Sequence[float], stage2: Sequence[float]) -> Figure:
    """Mean training time of a cell of each row, both stages."""
    figure = Figure(figsize=(WIDTH, 0.9 + 0.3 * len(names)), layout="constrained")
    axis, y = figure.subplots(), np.arange(len(names))[::-1]
    axis.barh(y, stage1, color=PALE, edgecolor=BLUE, linewidth=0.6, height=0.6, label="stage 1")
    axis.barh(y, stage2, left=stage1, color=BLUE, height=0.6, label="stage 2")
    axis.set_yticks(y, names)
    axis.set_xlabel("seconds of training, mean over seeds")
    axis.legend(loc="best")
    axis.grid(visible=False, axis="y")
    return figure
