"""The section of a comparison about attention: mass on events that do not matter, and what anchors have in common with
dense attention. Drawn from `noise` of compare.json."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from hpgr.report.compare import spread
from hpgr.report.compare_plots import panels
from hpgr.report.page import Block, Drawing, Json, Section, Table, Text, clip, part, real, show
from hpgr.report.plots import BLUE, GREY, ORANGE, WIDTH, as_svg

CLAIM = 0.40
"""What the press note says of HPGR: "cuts noise by 40 %"."""


def section_noise(noise: Json) -> Section:
    """Both parts, as far as they were measured."""
    blocks: list[Block] = [Text(f"Failed: {clip(text, 300)}", "warn") for text in noise.get("failed", ())]
    planted = [p for p in noise.get("planted", ()) if part(p, "cut").get("values")]
    if planted:
        blocks += _planted(noise, planted)
    overlap = part(noise, "overlap")
    if overlap:
        blocks += _overlap(noise, overlap)
    return Section("noise", "Attention and noise", blocks or [Text("Attention could not be measured.")])


def _planted(noise: Json, planted: Sequence[Json]) -> list[Block]:
    sparse, dense = noise["sparse"], noise["dense"]
    text = (
        "On generated logs it is known what matters: an engagement counts towards a click if it is of the candidate's "
        "category and not noise. Shown is the share of attention to the history that goes to all other events, on the "
        "validation impressions that have an event that matters."
    )
    head = ["planted noise", f"{dense} (dense)", f"{sparse} (sparse)", "all events alike", "cut by sparse",
            "seeds that reach 40 %"]  # fmt: skip
    rows = [
        [
            f"{p['noise']:.0%}",
            *(spread(p[k]) for k in ("dense", "sparse", "uniform")),
            spread(part(p, "cut"), 3),
            f"{sum(_reached(p))} of {noise['seeds']}",
        ]
        for p in planted
    ]
    cuts = [real(part(p, "cut").get("mean")) or 0.0 for p in planted]
    verdict = (
        f"Against dense attention {sparse} cuts the mass on irrelevant events by {min(cuts):.0%} to {max(cuts):.0%}, "
        f"the least and the most of these logs, means over seeds: {_judged(noise)}."
    )
    caption = "Each line a mean over seeds and candidates, by the number of events that a candidate sees."
    return [
        Text(text),
        Drawing("Attention on irrelevant events", mass_figure(planted, (dense, sparse)), caption),
        Table("", head, rows),
        Text(verdict),
    ]


def _reached(level: Json) -> list[bool]:
    """Whether the cut of each seed is the press note's."""
    return [cut >= CLAIM for cut in part(level, "cut").get("values", ())]


def _judged(noise: Json) -> str:
    """The press note holds where every seed of every level bears it out, and none failed: one favourable log is no
    proof."""
    planted, wanted = noise["planted"], noise["seeds"]
    seeds = [_reached(p) for p in planted]
    if not any(map(any, seeds)):
        return "it does not reach the 40 % of the press note on any log with any seed"
    held = [f"{p['noise']:.0%}" for p, reached in zip(planted, seeds, strict=True) if sum(reached) == wanted]
    if len(held) == len(planted):
        return "it reaches the 40 % of the press note on every log with every seed"
    where = f" (planted noise {', '.join(held)})" if held else ""
    return f"it reaches the 40 % of the press note with every seed on {len(held)} of {len(planted)} logs{where} alone"


def _overlap(noise: Json, overlap: Json) -> list[Block]:
    k = overlap["k"]
    text = (
        f"On the log itself: how many of the {k} anchors of {noise['sparse']} are among the {k} events that "
        f"{noise['dense']} attends to most, and how much of its attention they hold; {show(overlap['candidates'])} "
        f"validation impressions with more than {k} visible events."
    )
    rows = [
        ["anchors among the most attended", spread(overlap["overlap"])],
        ["attention of the dense model on anchors", spread(overlap["mass"])],
        ["either, of random events", spread(overlap["chance"])],
    ]
    if not overlap["candidates"]:
        return [Text(f"No validation impression has more than {k} visible events: every event is an anchor.")]
    return [
        Text(text),
        Drawing("Anchors and dense attention", overlap_figure(overlap["bins"]), "By events that a candidate sees."),
        Table("", ["", "mean over seeds"], rows),
    ]


@as_svg
def mass_figure(planted: Sequence[Json], names: tuple[str, str]) -> Figure:
    """A panel a level of planted noise: irrelevant mass over history length; last, the cut over planted noise."""
    figure, axes = panels(len(planted) + 1, 2.6)
    styles = (("dense", names[0], ORANGE, "-"), ("sparse", names[1], BLUE, "-"), ("uniform", "all alike", GREY, "--"))
    for axis, level in zip(axes, planted, strict=False):
        for key, name, color, line in styles:
            at, values = [b["from"] for b in level["bins"]], [b[key] for b in level["bins"]]
            axis.plot(at, values, color=color, linestyle=line, marker=".", label=name)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set(title=f"{level['noise']:.0%} noise planted", xlabel="events seen, from", ylabel="irrelevant mass")
        axis.set_ylim(0, 1)
    axes[0].legend(loc="best")
    at, cuts = [p["noise"] for p in planted], [part(p, "cut") for p in planted]
    for level, cut in zip(at, cuts, strict=True):
        axes[-1].scatter([level] * len(cut["values"]), cut["values"], s=10, color=GREY, linewidths=0, zorder=3)
    axes[-1].plot(at, [c["mean"] for c in cuts], color=BLUE, marker="o", markersize=4, label="cut, mean of seeds")
    axes[-1].axhline(CLAIM, color=ORANGE, linestyle="--", linewidth=1, label="press note, 40 %")
    axes[-1].axhline(0, color=GREY, linewidth=0.8)
    axes[-1].set(title="Irrelevant mass cut", xlabel="planted noise", ylabel="1 - sparse / dense")
    axes[-1].legend(loc="best")
    return figure


@as_svg
def overlap_figure(bins: Sequence[Json]) -> Figure:
    """Overlap and mass over history length, beside those of random events."""
    figure = Figure(figsize=(WIDTH * 0.6, 2.7), layout="constrained")
    axis, at = figure.subplots(), [b["from"] for b in bins]
    axis.plot(at, [b["overlap"] for b in bins], color=BLUE, marker="o", markersize=4, label="among the most attended")
    axis.plot(at, [b["mass"] for b in bins], color=ORANGE, marker="o", markersize=4, label="attention on anchors")
    axis.plot(at, [b["chance"] for b in bins], color=GREY, linestyle="--", label="random events")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set(xlabel="events seen, from", ylabel="share", ylim=(0, 1.02))
    axis.legend(loc="best")
    return figure
