"""The page, summary and board of a comparison show what compare.json says, escape it, fit, and say what is missing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import matplotlib
import numpy as np
import pytest
from helpers_page import Page

from hpgr.report import compare_plots, learnt, noise
from hpgr.report.compare import CompareData, board, compare_summary, render_compare, spread, verdict
from hpgr.report.learnt import Attention, ItemMap, Near, Shown, section_learnt
from hpgr.report.noise import section_noise


def over_seeds(*values: float) -> dict[str, Any]:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "sd": sd, "values": list(values)}


def model(name: str, *aucs: float, **more: Any) -> dict[str, Any]:
    test = {"auc": over_seeds(*aucs), "gauc": over_seeds(0.6, 0.62), "log_loss": over_seeds(0.5, 0.52)} if aucs else {}
    tried = [{"values": {}, "auc": 0.7}, {"values": {"model.layers": 1}, "auc": 0.71}]
    return {
        "model": name,
        "tuned": {"values": {"model.layers": 1}, "tried": tried},
        "test": test,
        "seconds": 90.0,
        "cost": {"stage1_seconds": 60.0, "stage2_seconds": 30.0, "tuning_seconds": 45.0, "keys": 31.5,
                 "seconds_a_million": 12.0},
        "parameters": 123456,
        "failed": [],
        **more,
    }  # fmt: skip


def gap(name: str, mean: float, low: float | None, high: float | None, metric: str = "auc") -> dict[str, Any]:
    return {"model": name, "baseline": "plain", "metric": metric, "mean": mean, "sd": 0.001, "low": low, "high": high,
            "relative": mean / 0.7, "relative_low": 0.001, "relative_high": 0.02, "users": 943, "seeds": 2,
            "draws": 2000}  # fmt: skip


def full(**more: Any) -> CompareData:
    result = {
        "seeds": [0, 1],
        "baseline": ["plain"],
        "models": [
            model("full", 0.72, 0.74),
            model("plain", 0.70, 0.71),
            model("broken", failed=[{"cell": "broken seed 0", "seed": 0, "error": "loss is nan"}]),
        ],
        "differences": [gap("full", 0.025, 0.01, 0.04), gap("full", -0.02, -0.03, -0.01, "log_loss")],
        "sensitivity": [
            {"row": "full", "path": "model.pgsa.top_k", "points": [
                {"value": 4, "own": False, "auc": over_seeds(0.70, 0.72)},
                {"value": 32, "own": True, "auc": over_seeds(0.73, 0.75)},
                {"value": 64, "own": False, "auc": {"mean": None, "sd": None, "values": []}}]},
        ],
        "simple": {"item popularity": 0.55},
        "cells": {"finished": 8, "failed": 2},
        "seconds": 754.0,
        "training_seconds": 900.0,
        "versions": {"torch": "2.13"},
    }  # fmt: skip
    return CompareData("a comparison", "runs/c", result | more, "rows: {}\n", "name: base\n")


NOISE = {
    "sparse": "full",
    "dense": "plain",
    "seeds": 2,
    "failed": [],
    "planted": [
        {"noise": level, "sparse": over_seeds(0.3, 0.32), "dense": over_seeds(0.6, 0.62),
         "uniform": over_seeds(0.8, 0.8), "cut": over_seeds(0.5, 0.48),
         "bins": [{"from": 4, "n": 9, "sparse": 0.3, "dense": 0.6, "uniform": 0.8}]}
        for level in (0.2, 0.6)
    ],
    "overlap": {"k": 8, "candidates": 4321, "overlap": over_seeds(0.4, 0.42), "mass": over_seeds(0.5, 0.52),
                "chance": over_seeds(0.2, 0.2),
                "bins": [{"from": 16, "n": 5, "overlap": 0.4, "mass": 0.5, "chance": 0.2}]},
}  # fmt: skip


def shown(**more: Any) -> Shown:
    rng = np.random.default_rng(0)
    items = ItemMap(
        "umap", rng.normal(size=(30, 2)), [("", "war", "noir")[i % 3] for i in range(30)], np.arange(30) + 1
    )
    near = [Near("Heat", "noir", ["Ronin", "Alien"], ["noir", "war"], [0.91, 0.8])]
    reading = Attention("u1", ["a", "b", "c"], [-50.0, -1.0, 0.0], [0, 1, 1], ["x", "y"], [True, False], [0.8, 0.1],
                        np.array([[0.5, 0.5, 0], [0, 0, 1.0]], np.float32), np.eye(3, dtype=bool)[:2])  # fmt: skip
    return replace(Shown("full", 3, 1, items, near, reading), **more)


def words(data: CompareData) -> str:
    return " ".join(Page(render_compare(data)).words.split())


def test_page_is_self_contained_and_its_contents_lead_somewhere() -> None:
    data = replace(full(), more=[section_noise(NOISE), section_learnt(shown())])
    html = render_compare(data)
    page = Page(html)
    assert not {"script", "link", "iframe"} & set(page.tags)
    assert [link[1:] for link in page.links if link.startswith("#")] == page.ids
    assert len(page.ids) == 8
    assert page.ids[-3:] == ["noise", "learnt", "run"]
    drawings = [link for link in page.links if not link.startswith("#")]
    assert len(drawings) == 8
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    assert html == render_compare(data)


def test_figures_of_the_comparison_are_on_the_page() -> None:
    text = words(full())
    for part in (
        "runs/c · 3 rows, seeds 0, 1",
        "Best row full test AUC 0.7300 ± 0.0141",
        "Clearly ahead 1 of 1",
        "Cells trained 8 2 failed",
        "Time 12 min 34 s 15 min 00 s of training",
        "full 0.7300 ± 0.0141 0.6100 ± 0.0141 0.5100 ± 0.0141 +0.0250 [+0.0100, +0.0400] 2",
        "item popularity (no model) 0.5500 - - - -",
        "broken, broken seed 0, failed: loss is nan",
        "95 % intervals of 2,000 draws of 943 users",
        "full plain AUC +0.0250 ± 0.0010 [+0.0100, +0.0400] +3.57 % [+0.10 %, +2.00 %] better 2",
        "full plain Log loss -0.0200 ± 0.0010 [-0.0300, -0.0100]",
        "full its own 0.7000 full model.layers=1 0.7100 chosen",
        "model.pgsa.top_k 4 0.7100 ± 0.0141 2 model.pgsa.top_k 32 0.7400 ± 0.0141 2 as compared",
        "full 123,456 1 min 00 s 30.0 s 1 min 30 s 45.0 s 31.5 12.0 s",
        "rows: {}",
        "name: base",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("low", "high", "metric", "said"),
    [
        (0.01, 0.02, "auc", "better"),
        (-0.02, -0.01, "auc", "worse"),
        (-0.01, 0.01, "auc", "no clear difference"),
        (0.0, 0.01, "auc", "no clear difference"),
        (-0.02, -0.01, "log_loss", "better"),
        (0.01, 0.02, "log_loss", "worse"),
        (None, None, "auc", "no clear difference"),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(
    low: float | None, high: float | None, metric: str, said: str
) -> None:
    assert verdict(gap("full", 0.0 if low is None else (low + high) / 2, low, high, metric)) == said


def test_a_verdict_needs_seeds_that_agree() -> None:
    """sd .001: of two seeds the mean must be 12.71 standard errors from zero, .0090; of three 4.303, .0025."""
    assert (
        verdict(gap("full", 0.0089, 0.002, 0.02))
        == verdict(gap("full", -0.0089, -0.02, -0.002))
        == verdict(gap("full", 0.0024, 0.002, 0.006) | {"seeds": 3})
        == "no clear difference"
    )
    assert verdict(gap("full", 0.0091, 0.002, 0.02)) == "better"
    assert verdict(gap("full", 0.0026, 0.002, 0.006) | {"seeds": 3}) == "better"
    assert verdict(gap("full", 0.0007, 0.0002, 0.006) | {"seeds": 100}) == "better"
    assert verdict(gap("full", 0.004, 0.002, 0.006) | {"sd": None, "seeds": 1}) == "better"


def test_seeds_differ_by_chance_as_often_as_said() -> None:
    """Differences of nothing but chance: 5 % of the verdicts, not the 18 % of two standard errors of three seeds."""
    rng, seeds = np.random.default_rng(0), 3
    drawn = rng.normal(size=(2000, seeds))
    gaps = [gap("full", float(d.mean()), 1e-9, 9.0) | {"sd": float(d.std(ddof=1)), "seeds": seeds} for d in drawn]
    assert sum(verdict(g) != "no clear difference" for g in gaps) / len(gaps) == pytest.approx(0.05, abs=0.015)


def test_few_users_tell_nothing() -> None:
    assert verdict(gap("full", 0.02, 0.01, 0.03) | {"users": 19}) == "no clear difference"
    assert verdict(gap("full", 0.02, 0.01, 0.03) | {"users": 20}) == "better"


def test_one_seed_has_no_spread() -> None:
    assert "full plain AUC +0.0250 [" in words(full(differences=[gap("full", 0.025, 0.01, 0.04) | {"sd": None}]))
    assert spread({"mean": 0.5, "sd": None, "values": [0.5]}) == "0.5000"
    assert spread({"mean": None, "sd": None, "values": []}) == "-"


def test_a_comparison_of_failures_says_so() -> None:
    broken = model("broken", failed=[{"cell": "broken seed 0", "seed": 0, "error": "loss is nan"}])
    text = words(full(models=[broken], differences=[], sensitivity=[], simple={}))
    for part in ("No row has been tested", "no two tested rows", "the matrix asks for none", "No row has finished"):
        assert part in text
    assert "nan" not in text.lower().replace("loss is nan", "")
    assert "no row has an AUC: none was tested" in compare_summary(full(models=[broken]), [])


def test_a_study_that_was_left_out_is_told() -> None:
    data = full(left_out={"noise": "RayError: a worker died"})
    assert "noise was left out: RayError: a worker died" in words(data)
    assert "noise: RayError: a worker died" in compare_summary(data, [])


def test_a_point_of_a_curve_that_failed_is_told_and_the_others_are_drawn() -> None:
    points = [
        {"value": value, "own": value == 32, "auc": over_seeds(*aucs) if aucs else {"mean": None, "values": []}}
        for value, aucs in ((4, (0.7, 0.72)), (32, ()), (64, (0.73,)))
    ]
    data = full(sensitivity=[{"row": "full", "path": "model.pgsa.top_k", "points": points}])
    assert "4 0.7100 ± 0.0141 2 model.pgsa.top_k 32 failed 0 as compared model.pgsa.top_k 64 0.7300 1" in words(data)
    assert len(Page(render_compare(data)).links) == len(Page(render_compare(full())).links)


def test_rows_without_tuning_say_so() -> None:
    alone = model("full", 0.7, 0.71, tuned={"values": {}, "tried": []})
    assert "Rows were compared as they stand" in words(full(models=[alone]))


def test_text_from_outside_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    bad = model(evil, 0.7, 0.71, failed=[{"cell": evil, "seed": 0, "error": evil}])
    near = [Near(evil, evil, [evil], [evil], [0.5])]
    data = replace(full(models=[bad]), name=evil, more=[section_learnt(shown(near=near))])
    html = render_compare(data)
    assert "<script" not in html.lower()
    assert html.count("&lt;script&gt;") > 5


def test_the_press_note_is_judged_by_the_cut() -> None:
    """Levels of planted noise, each with the cut of two seeds."""

    def told(*cuts: tuple[float, float]) -> str:
        levels = [{"noise": i / 10, "cut": over_seeds(*pair)} for i, pair in enumerate(cuts)]
        planted = [{**NOISE["planted"][0], **level} for level in levels]
        return words(replace(full(), more=[section_noise({**NOISE, "planted": planted})]))

    assert "by 10% to 50%, the least and the most of these logs, means over seeds" in told((0.1, 0.1), (0.5, 0.5))
    assert "with every seed on 1 of 2 logs (planted noise 10%) alone" in told((0.1, 0.1), (0.5, 0.5))
    assert "with every seed on 0 of 2 logs alone" in told((0.1, 0.1), (0.35, 0.5))
    assert "it reaches the 40 % of the press note on every log with every seed" in told((0.4, 0.5), (0.5, 0.5))
    assert "it does not reach the 40 % of the press note on any log" in told((-0.05, 0.1), (0.39, 0.3))
    assert "0.425 ± 0.106 1 of 2" in told((0.35, 0.5))
    lost = {"noise": 0.9, "cut": {"mean": None, "sd": None, "values": []}, "bins": []}
    half = {**NOISE["planted"][0], "cut": over_seeds(0.5)}
    for planted, of in (([NOISE["planted"][0], lost], "1 of 2"), ([half], "0 of 1")):
        study = {**NOISE, "planted": planted, "failed": ["90% planted, full seed 0: loss is nan"]}
        text = words(replace(full(), more=[section_noise(study)]))
        assert f"with every seed on {of} logs" in text
        assert "Failed: 90% planted, full seed 0: loss is nan" in text
    none = {**NOISE, "planted": [], "overlap": {**NOISE["overlap"], "candidates": 0}}
    assert "every event is an anchor" in section_noise(none).blocks[0].text
    assert "could not be measured" in section_noise({"sparse": "a", "dense": "b"}).blocks[0].text


def test_what_it_has_learnt_is_told() -> None:
    assert shown().same_kind == 0.5
    assert shown().plain()["neighbours"] == [
        {"item": "Heat", "kind": "noir", "near": ["Ronin", "Alien"], "cosine": [0.91, 0.8]}
    ]
    text = words(replace(full(), more=[section_learnt(shown())]))
    for part in ("30 items that training saw, by umap", "Ronin [noir] 0.91; Alien [war] 0.80", "50% of these", "(u1)"):
        assert part in text
    unknown = replace(shown().items, kinds=[""] * 30)
    bare = [Near("Heat", "", ["Ronin"], [""], [0.9])]
    text = words(replace(full(), more=[section_learnt(shown(items=unknown, near=bare, attention=None))]))
    for part in ("in one colour", "Ronin 0.90", "No user has a history"):
        assert part in text
    assert "of their item's kind" not in text


@pytest.mark.parametrize("make", [compare_plots.standings, compare_plots.cost])
def test_plots_leave_matplotlib_as_it_was(make: Callable[..., str]) -> None:
    before = dict(matplotlib.rcParams)
    assert make(["a"], [[0.5]] if make is compare_plots.standings else [1.0], [0.0]).startswith("data:image/svg+xml")
    assert dict(matplotlib.rcParams) == before
    assert learnt.as_svg is noise.as_svg


def test_summary_and_board_fit_a_screen() -> None:
    many = [model("row " + "x" * 60 + str(i), 0.7 + i / 1000, 0.71) for i in range(40)]
    commands = ["python jobs/compare.py " + " ".join(f"--set a.b{i}=c" for i in range(20))] * 4
    for data in (full(), full(models=many)):
        lines = compare_summary(data, commands).splitlines()
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 100
    running = [("cell " + "y" * 80, "stage1 epoch 3", None, 65.0)] * 40
    lines = board("n" * 90, 7500.0, "3 of 90 cells known", running).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    assert "no cell is running" in board("n", 1.0, "", [])
    assert "full" in compare_summary(full(), []).splitlines()[0]
    assert "+0.0250 [+0.0100, +0.0400] to plain" in compare_summary(full(), [])
