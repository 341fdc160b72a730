"""The report renders whatever it is given, escapes it, loads nothing, and says what is missing."""

from __future__ import annotations

import base64
import itertools
import re
from dataclasses import replace
from functools import cache

import matplotlib
import numpy as np
import pyarrow as pa
import pytest
from helpers_page import Page

from hpgr.report.run import ReportData, render_report, summary_text

DAY = 86_400_000_000


def scores(n: int = 400, clicked: bool | None = None) -> pa.Table:
    rng = np.random.default_rng(0)
    score = rng.random(n)
    label = rng.random(n) < score if clicked is None else np.full(n, clicked)
    return pa.table(
        {
            "score": score,
            "label": label.astype(np.int8),
            "past": rng.integers(0, 50, n),
            "popularity": rng.integers(0, 9, n) ** 3,
            "user_hash": rng.integers(0, 40, n).astype(np.uint64),
        }
    )


def curves(stage: int) -> list[dict]:
    metric = {1: "ndcg@10", 2: "auc"}[stage]
    return [
        {
            "stage": stage,
            "step": i,
            "epoch": i // 10,
            "train_loss": 1 / (i + 1),
            "lr": 1e-3,
            "validation": {metric: 0.5 + i / 500} if i % 10 == 9 else None,
        }
        for i in range(100)
    ]


def full() -> ReportData:
    ranks = {f"{m}@{k}{s}": 0.25 for m in ("hr", "ndcg") for k in (1, 5, 10, 20) for s in ("", "_unseen")}
    clicks = {
        "auc": 0.7321,
        "gauc": 0.7012,
        "log_loss": 0.45,
        "calibration": 1.02,
        "n": 400,
        "positives": 190,
    }
    histogram = {"edges": [0, 1, 2, 4, 8], "counts": [5, 9, 3, 1]}
    split = {"rows": 400, "positives": 100, "from": DAY, "to": 2 * DAY}
    return ReportData(
        name="a run",
        run="runs/a-run",
        metrics={
            "data": {
                "rows_in": 1000,
                "kept": 990,
                "quarantined": 7,
                "duplicates": 3,
                "users": 40,
                "items": 60,
            },
            "stage1": {"test": {**ranks, "n": 40, "n_unseen": 30, "mrr": 0.1, "mrr_unseen": 0.05}},
            "stage2": {"validation": clicks, "test": clicks},
            "baselines": {"popularity": 0.6543, "oracle": 0.8123, "random": None},
            "seconds": {"prepare": 3.21, "stage 2": 200.0, "total": 7500},
            "seed": 3,
            "versions": {"hpgr": "0.1.0"},
        },
        curves=curves(1) + curves(2),
        scores=scores(),
        account={
            "quarantined": {"item is null": 2, "time is null": 5},
            "splits": {"train": split, "test": split},
            "vocabulary": {"items": 58},
        },
        sessions={"gap_minutes": 30.0, "events_per_session": histogram, "history_per_user": histogram},
        config_yaml="name: a run\nseed: 3\n",
    )


def light() -> ReportData:
    """Everything but the parts that are slow to draw."""
    return replace(full(), scores=None, curves=(), sessions={})


@cache
def full_page() -> str:
    return render_report(full())


def test_page_is_self_contained_and_its_contents_lead_somewhere():
    page = Page(full_page())
    assert not {"script", "link", "iframe"} & set(page.tags)
    anchors = [link[1:] for link in page.links if link.startswith("#")]
    assert anchors == page.ids
    assert len(anchors) == page.tags.count("section") == 8
    others = [link for link in page.links if not link.startswith("#")]
    assert others
    assert all(link.startswith("data:image/svg+xml;base64,") for link in others)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", full_page())


def test_figures_of_the_run_are_on_the_page():
    words = " ".join(Page(full_page()).words.split())
    for text in (
        "0.7321",  # headline
        "+0.0778 to popularity 0.6543",  # best baseline a real system could use, not the oracle
        "Every input row is accounted for: 1,000 rows in, 990 kept + 7 quarantined + 3 duplicates",
        "time is null 5 0.50% item is null 2 0.20%",  # most frequent first
        "train 400 100 25.00% 1970-01-02 00:00:00 1970-01-03 00:00:00",
        "all 40 0.2500",
        "prepare 3.2 s stage 2 3 min 20 s total 2 h 05 min",
        "more than 30 minutes away",
        "runs/a-run · seed 3 · hpgr 0.1.0",
    ):
        assert text in words


def test_rows_that_do_not_add_up_are_called_out():
    data = full()
    broken = {**data.metrics, "data": {**data.metrics["data"], "kept": 980}}
    assert "does not add up, +10 rows are unexplained" in render_report(replace(light(), metrics=broken))


def test_text_from_outside_is_escaped():
    evil = [f"<script>alert({i})</script>" for i in range(11)]
    data = ReportData(
        name=evil[0],
        run=evil[1],
        metrics={
            **full().metrics,
            "baselines": {evil[2]: 0.6},
            "versions": {evil[3]: evil[4]},
            "data": {evil[5]: 1},
        },
        account={"quarantined": {evil[6]: 1}, "splits": {evil[7]: {"from": evil[8]}}, "other": {evil[9]: 1}},
        config_yaml=evil[10],
    )
    html = render_report(data)
    assert [i for i in range(11) if f"&lt;script&gt;alert({i})&lt;/script&gt;" not in html] == []
    assert "<script" not in html.lower()
    Page(html)


def test_equal_data_give_equal_pages_and_leave_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    assert full_page() == render_report(full())
    assert dict(matplotlib.rcParams) == before
    for picture in re.findall(r"base64,([A-Za-z0-9+/=]+)", full_page()):
        assert b"<dc:date>" not in base64.b64decode(picture)


def test_nothing_at_all_is_said_in_words():
    words = Page(render_report(ReportData(name="empty", run="runs/empty"))).words
    for text in (
        "Stage 2 was not evaluated",
        "no scored test impressions to draw",
        "no scored test impressions to slice",
        "Stage 1 was disabled or not evaluated",
        "Stage 1 has no learning curve",
        "Stage 2 has no learning curve",
        "kept no data account",
        "kept no session statistics",
        "were not recorded",
    ):
        assert text in words


PARTS = ("metrics", "account", "config_yaml")


@pytest.mark.parametrize("part", PARTS)
def test_each_part_may_be_missing(part):
    Page(render_report(replace(light(), **{part: getattr(ReportData("", ""), part)})))


@pytest.mark.parametrize("key", ["data", "stage1", "stage2", "baselines", "seconds", "seed", "versions"])
@pytest.mark.parametrize("value", [None, {}])
def test_each_metric_may_be_missing(key, value):
    Page(render_report(replace(light(), metrics={**full().metrics, key: value})))


@pytest.mark.parametrize("clicked", [False, True])
def test_one_class_is_said_in_words(clicked):
    undefined = {"auc": None, "gauc": None, "log_loss": 0.3, "calibration": None, "n": 400, "positives": 0}
    metrics = {**full().metrics, "stage2": {"test": undefined}}
    words = Page(render_report(replace(light(), scores=scores(clicked=clicked), metrics=metrics))).words
    assert f"All 400 test impressions were {'clicked' if clicked else 'not clicked'}" in words
    assert "one class only" in words
    assert "model has no test AUC" in words


def odd_tables() -> dict[str, pa.Table]:
    ok = scores(60)
    return {
        "no rows": ok.slice(0, 0),
        "one row": ok.slice(0, 1),
        "constant": ok.set_column(0, "score", pa.array(np.full(60, 0.5))),
        "chunked": pa.concat_tables([ok.slice(0, 20), ok.slice(20)]),
        "no slices": ok.select(["score", "label"]),
        "not finite": ok.set_column(0, "score", pa.array(np.where(np.arange(60) < 5, np.nan, 0.3))),
        "unlabelled": ok.set_column(1, "label", pa.array(np.full(60, -1, np.int8))),
        "nulls": ok.set_column(1, "label", pa.array([None, 0, 1] * 20, pa.int8())),
        "float32": ok.set_column(0, "score", ok["score"].cast(pa.float32())),
    }


@pytest.mark.parametrize("name", odd_tables())
def test_odd_scores_do_not_break_the_page(name):
    Page(render_report(replace(light(), scores=odd_tables()[name])))


@pytest.mark.parametrize(
    "logged",
    [
        [{"stage": 2, "step": 1, "train_loss": 0.5}],
        [{"stage": 2, "step": 1, "train_loss": float("nan"), "validation": {"auc": None}, "lr": None}],
        [{"stage": "stage2", "step": 1, "train_loss": 0.5, "validation": {"auc": 0.5}, "lr": 0.0}],
        [{}],
    ],
)
def test_odd_curves_do_not_break_the_page(logged):
    Page(render_report(replace(light(), curves=logged)))


def test_histogram_with_wrong_edges_is_left_out():
    sessions = {"events_per_session": {"edges": [0, 1], "counts": [1, 2]}}
    assert "kept no session statistics" in render_report(replace(light(), sessions=sessions))


COMMANDS = ["python -m jobs.two_stage " + " ".join(f"--set a.b{i}=c" for i in range(20)), "less runs/a-run/x"]


def test_summary_fits_a_screen():
    text = summary_text(full().metrics, "runs/a-run", COMMANDS)
    lines = text.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    for part in ("rows in 1,000", "ndcg@10 0.2500", "AUC 0.7321", "popularity 0.6543", "total 2 h 05 min"):
        assert part in text
    assert "runs/a-run/report.html" in text
    pasted = text.split("next:\n")[1].replace("\\\n", " ")
    assert [line.split() for line in pasted.splitlines()] == [c.split() for c in COMMANDS]


def test_summary_of_much_is_cut_and_of_nothing_says_so():
    many = {f"a long name of a figure {i}": 0.5 for i in range(60)}
    metrics = {"data": many, "baselines": many, "seconds": many}
    lines = summary_text(metrics, "r" * 40, [c for c, _ in itertools.product(COMMANDS, range(9))]).splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100
    empty = summary_text({}, "runs/x", [])
    assert "no account" in empty
    assert "not evaluated" in empty
    assert "next" not in empty


def test_summary_keeps_a_path_whole_and_names_given_files():
    path = "s3://bucket/" + "x" * 120
    text = summary_text({"files": {"checkpoint": "elsewhere/model"}}, path, [])
    assert f"{path}/report.html" in text
    assert "elsewhere/model" in text
