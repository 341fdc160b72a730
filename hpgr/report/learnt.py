"""The section of a comparison about what a model has learnt: a map of items, neighbours, one user's attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from hpgr.metrics import Reals
from hpgr.report.page import NONE, Block, Drawing, Section, Table, Text, clip
from hpgr.report.plots import BLUE, GREY, INK, ORANGE, PALE, WIDTH, as_svg
from hpgr.schema import Array, Floats, Ints

COLOURED = 20
"""Most kinds that get a colour of their own, the most frequent; the others are grey."""


@dataclass(frozen=True)
class ItemMap:
    """Items [n] on a plane: how they were laid out, where, their kinds ("" unknown) and how often each was seen."""

    projection: str
    place: Reals
    kinds: Sequence[str]
    seen: Ints


@dataclass(frozen=True)
class Near:
    """An item and its nearest others, nearest first."""

    title: str
    kind: str
    titles: Sequence[str]
    kinds: Sequence[str]
    cosines: Sequence[float]


@dataclass(frozen=True)
class Attention:
    """How candidates [m] of one user read the history [n]."""

    user: str
    events: Sequence[str]
    hours: Sequence[float]
    """Since the last event, so not above 0."""
    sessions: Sequence[int]
    candidates: Sequence[str]
    clicked: Sequence[bool]
    scores: Sequence[float]
    shares: Floats
    """[m, n], 1 in sum over events."""
    anchors: Array
    """[m, n] booleans."""


@dataclass(frozen=True)
class Shown:
    """All that the section shows of a row: of which seed, and after which stage its item vectors are."""

    row: str
    seed: int
    stage: int
    items: ItemMap
    near: Sequence[Near]
    attention: Attention | None

    @property
    def same_kind(self) -> float | None:
        """Share of the listed neighbours that are of their item's kind; None where no kinds are known."""
        same = [kind == n.kind for n in self.near if n.kind for kind in n.kinds]
        return sum(same) / len(same) if same else None

    def plain(self) -> dict[str, Any]:
        """What compare.json keeps of it."""
        near = [
            {"item": n.title, "kind": n.kind, "near": list(n.titles), "cosine": [round(c, 4) for c in n.cosines]}
            for n in self.near
        ]
        return {"row": self.row, "projection": self.items.projection, "same_kind": self.same_kind, "neighbours": near}


def section_learnt(shown: Shown) -> Section:
    """Map, neighbours, and one user's attention."""
    items = shown.items
    kinds = "coloured by kind" if any(items.kinds) else "in one colour, for nothing is known of their kinds"
    caption = (
        f"{len(items.seen):,} items that training saw, by {items.projection} of their vectors, {kinds}; "
        "larger: seen more often."
    )
    rows = [[clip(n.title, 40), n.kind or NONE, _listed(n)] for n in shown.near]
    blocks: list[Block] = [
        Text(f"Of row {shown.row}, seed {shown.seed}."),
        Drawing(f"Items after stage {shown.stage}", item_map(items), caption),
        Table("Neighbours of frequent items", ["item", "kind", "nearest, with cosine"], rows),
    ]
    if shown.same_kind is not None:
        blocks.append(Text(f"{shown.same_kind:.0%} of these neighbours are of their item's kind."))
    if shown.attention is None:
        blocks.append(Text("No user has a history that is long enough, and short enough, to be drawn."))
        return Section("learnt", "What it has learnt", blocks)
    caption = (
        "A column an event, bands are sessions, a row a candidate shown at the end. Area: share of the candidate's "
        "attention to the history, mean over heads and layers; ringed: its anchors."
    )
    title = f"One user's sessions ({clip(shown.attention.user, 24)})"
    return Section("learnt", "What it has learnt", [*blocks, Drawing(title, attention(shown.attention), caption)])


def _listed(n: Near) -> str:
    parts = zip(n.titles, n.kinds, n.cosines, strict=True)
    return "; ".join(f"{clip(title, 30)}{f' [{kind}]' if kind else ''} {cosine:.2f}" for title, kind, cosine in parts)


@as_svg
def item_map(items: ItemMap) -> Figure:
    """Items as dots, the most frequent kinds in colours of their own."""
    figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
    axis = figure.subplots()
    size = 4 + 60 * np.sqrt(items.seen / max(int(items.seen.max(initial=1)), 1))
    of_item = np.array(items.kinds, dtype=object)
    count = Counter(kind for kind in items.kinds if kind)
    kinds = sorted(count, key=lambda kind: (-count[kind], kind))
    others = ~np.isin(of_item, kinds[:COLOURED])
    x, y = items.place.T
    axis.scatter(x[others], y[others], s=size[others], color=GREY if kinds else BLUE, alpha=0.45, linewidths=0)
    for number, kind in enumerate(kinds[:COLOURED]):
        own, tint = of_item == kind, colormaps["tab20"](number)
        axis.scatter(x[own], y[own], s=size[own], label=clip(kind, 18), color=tint, alpha=0.75, linewidths=0)
    axis.set(xticks=[], yticks=[])
    axis.grid(visible=False)
    if kinds:
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return figure


@as_svg
def attention(a: Attention) -> Figure:
    """Bubbles of attention over a user's events, sessions as bands, anchors ringed."""
    n, m = len(a.events), len(a.candidates)
    figure = Figure(figsize=(WIDTH, 2.3 + 0.42 * m), layout="constrained")
    axis, rows = figure.subplots(), m - 1 - np.arange(m)
    starts = [0, *(i for i in range(1, n) if a.sessions[i] != a.sessions[i - 1]), n]
    for number, (first, stop) in enumerate(pairwise(starts)):
        if number % 2 == 0:
            axis.axvspan(first - 0.5, stop - 0.5, color=PALE, alpha=0.45, linewidth=0)
        axis.annotate(f"{-a.hours[first] / 24:.1f} d", (first - 0.4, m - 0.45), fontsize=7, color=GREY)
    x, y = np.meshgrid(np.arange(n), rows)
    area = 420 * a.shares / max(float(a.shares.max(initial=0.0)), 1e-9)
    colors = np.repeat(np.where(np.array(a.clicked), ORANGE, BLUE), n)
    axis.scatter(x.ravel(), y.ravel(), s=area.ravel(), c=colors.tolist(), alpha=0.7, linewidths=0)
    ringed = a.anchors.astype(bool)
    axis.scatter(x[ringed], y[ringed], s=46, facecolors="none", edgecolors=INK, linewidths=0.9)
    labels = [
        f"{clip(name, 22)}  {score:.2f}{' *' if hit else ''}"
        for name, score, hit in zip(a.candidates, a.scores, a.clicked, strict=True)
    ]
    axis.set_yticks(rows, labels)
    axis.set_xticks(range(n), [clip(e, 16) for e in a.events], rotation=90, fontsize=6.5)
    axis.set(xlim=(-0.5, n - 0.5), ylim=(-0.6, m - 0.1), ylabel="candidate, score, * clicked")
    axis.grid(visible=False)
    return figure
