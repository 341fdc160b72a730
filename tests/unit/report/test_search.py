"""The page, summary and board of a search show what the data say, escape it, fit, and say what is missing."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import matplotlib
import numpy as np
import pytest
from helpers_page import Page

from hpgr.report import search, search_plots
from hpgr.report.page import clip, number, setting
from hpgr.report.search import board, render_search, search_summary
from hpgr.report.trials import Dimension, SearchData, TrialRow

GAP = Dimension("stream.session_gap_minutes", "category", choices=(30, 5, 1440))
SCOPE = Dimension("model.pgsa.scope", "category", choices=("candidate", "all"))
DROPOUT = Dimension("model.dropout", "number", low=0.0, high=0.4)
LR = Dimension("stage2.optimiser.lr", "number", log=True, low=2e-4, high=5e-3)
DIMENSIONS = (GAP, SCOPE, DROPOUT, LR)


def trial(i: int, state: str = "finished", **changes: Any) -> TrialRow:
    """Trial i; its AUC is 0.7 + i / 1000."""
    values = {GAP.path: GAP.choices[i % 3], DROPOUT.path: i % 5 / 10, LR.path: 3e-4 * (1 + i % 7)}
    if i % 2:
        values[SCOPE.path] = SCOPE.choices[i % 4 // 2]
    auc = None if state == "failed" else 0.7 + i / 1000
    row = TrialRow(
        number=i,
        state=state,
        values=values,
        auc=auc,
        cost=None if auc is None else 100.0 * (i + 1),
        curve=[] if auc is None else [(1, auc - 0.01), (2, auc)],
        seconds=60.0 + i,
        stage1=f"{i % 3}abc",
        stage1_seconds=0.0 if i > 2 else 200.0,
        started=50.0 * i,
        stopped=None if state == "running" else 50.0 * i + 60,
        error="Traceback\n  in a file\nRuntimeError: out of memory" if state == "failed" else "",
        phase="stage2 epoch 1" if state == "running" else "",
    )
    return replace(row, **changes)


def full(**changes: Any) -> SearchData:
    """Twelve trials, 0 to 11: 6 pruned, 9 failed, 10 repeated, 11 running, the others finished; 8 is best."""
    states = {6: "pruned", 9: "failed", 10: "repeated", 11: "running"}
    data = SearchData(
        name="a search",
        run="runs/a-search",
        config_yaml="name: a run\n",
        space_yaml="name: a space\n",
        dimensions=DIMENSIONS,
        cost_name="",
        trials=[trial(i, states.get(i, "finished")) for i in range(12)],
        importance={LR.path: 0.61, GAP.path: 0.29, DROPOUT.path: 0.1},
        pareto=(),
        best=8,
        default=0,
        test={"auc": 0.6987, "gauc": 0.6543, "n": 4321, "positives": 987},
        account={
            "trials": 11,
            "trials_finished": 8,
            "stage1_computed": 3,
            "stage1_reused": 9,
            "stage1_seconds_saved": 1800.0,
            "seconds": 754.0,
            "training_seconds": 900.0,
            "node_hours": 1.234,
        },
        nodes=((0.0, 1, 2.0), (100.0, 3, 6.0)),
    )
    return replace(data, **changes)


def with_cost(**changes: Any) -> SearchData:
    return full(**{"cost_name": "keys a candidate", "pareto": (8, 0, 4), **changes})


def light(**changes: Any) -> SearchData:
    """One dimension and few trials: quick to draw."""
    few = {"dimensions": (DROPOUT,), "trials": full().trials[:3], "best": 2, "nodes": (), "importance": {}}
    return full(**{**few, **changes})


@cache
def full_page() -> str:
    return render_search(full())


def words(data: SearchData) -> str:
    return " ".join(Page(render_search(data)).words.split())


def test_page_is_self_contained_and_its_contents_lead_somewhere():
    page = Page(full_page())
    assert not {"script", "link", "iframe"} & set(page.tags)
    anchors = [link[1:] for link in page.links if link.startswith("#")]
    assert anchors == page.ids
    assert len(anchors) == page.tags.count("section") == 12
    others = [link for link in page.links if not link.startswith("#")]
    assert len(others) == 7
    assert all(link.startswith("data:image/svg+xml;base64,") for link in others)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", full_page())


def test_figures_of_the_search_are_on_the_page():
    text = " ".join(Page(full_page()).words.split())
    for part in (
        "runs/a-search · 4 settings searched for validation AUC",
        "Best validation AUC 0.7080 trial 8, +0.0080 over the default 0.7000",
        "Test AUC of the best 0.6987 4,321 test impressions",
        "Trials finished 8 1 running, 1 pruned, 1 failed, 1 repeated",
        "Stage 1 computed 3 9 reused, 30 min 00 s saved",
        "stream.session_gap_minutes 1440 30 30, 5, 1440",
        "model.dropout 0.3 0 0 to 0.4",
        "stage2.optimiser.lr 0.0006 0.0003 0.0002 to 0.005, log",
        "8 0.7080 +0.0080 1 min 08 s 7 0.7070 +0.0070",
        "0 (default) 0.7000 - 1 min 00 s",  # the default, though it is not among the leaders
        "test 0.6987 0.6543 4,321 987",
        "stage 1 time saved 30 min 00 s time 12 min 34 s training time 15 min 00 s node hours 1.23",
        "1 to 3 worker nodes, 2 to 6 CPUs",
        "9 failed - 1 min 09 s 30 candidate 0.4 0.0009 0abc -",
        "11 stage2 epoch 1 0.7110",
        "Error of trial 9: RuntimeError: out of memory Traceback in a file RuntimeError: out of memory",
        "name: a space",
        "name: a run",
    ):
        assert part in text


def test_the_best_row_is_marked():
    marked = re.findall(r'<tr class="mark">(.*?)</tr>', full_page())
    assert [re.findall("<td>(.*?)</td>", row)[:2] for row in marked] == [["8", "0.7080"], ["★", "8"]]


def test_a_front_lists_its_trials_from_cheap_to_dear():
    text = words(with_cost(dimensions=(DROPOUT, LR)))
    assert "searched for validation AUC against keys a candidate" in text
    front = text.split("On the front")[1].split("Cost account")[0]
    assert re.findall(r"(\d) (0\.7\d{3}) (\d+)", front) == [
        ("0", "0.7000", "100"),
        ("4", "0.7040", "500"),
        ("8", "0.7080", "900"),
    ]
    assert "lr=0.0006, dropout=0.3 8 0.7080 900" in front


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """What each plot is asked to draw, by its name; nothing is drawn."""
    calls: dict[str, tuple[Any, ...]] = {}

    def keep(name: str) -> Callable[..., str]:
        return lambda *args: str(calls.update({name: args}) or "data:,")

    for name in ("history", "learning_curves", "importance", "slices", "contours", "parallel", "pareto", "timeline"):
        monkeypatch.setattr(search_plots, name, keep(name))
    return calls


def test_plots_show_the_trials_that_they_should(drawn):
    render_search(with_cost())
    finished = [0, 1, 2, 3, 4, 5, 7, 8]
    outcomes, default = drawn["history"]
    assert outcomes.number == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert outcomes.auc == pytest.approx([0.7 + i / 1000 for i in range(9)])
    assert [n for n, done in zip(outcomes.number, outcomes.finished, strict=True) if done] == finished
    assert outcomes.number[outcomes.best] == 8
    assert default == 0.7
    roles = [line.role for line in drawn["learning_curves"][0]]
    assert roles == ["default", *["finished"] * 5, "", "finished", "best", "", ""]  # 9 failed before it was validated
    assert drawn["importance"] == (["lr", "session_gap_minutes", "dropout"], [0.61, 0.29, 0.1])
    axes, aucs, best = drawn["parallel"]
    assert [a.label for a in axes] == ["lr", "session_gap_minutes", "dropout", "scope"]
    assert aucs == pytest.approx([0.7 + i / 1000 for i in finished])
    assert best == 7
    cost, auc, front, marks, name = drawn["pareto"]
    assert cost == [100.0 * (i + 1) for i in finished]
    assert auc == aucs
    assert [finished[i] for i in front] == [0, 4, 8]
    assert {finished[i]: mark for i, mark in marks.items()} == {0: "default", 8: "best"}
    assert name == "keys a candidate"
    bars, nodes = drawn["timeline"]
    assert [(b.number, b.start, b.state) for b in bars] == [(t.number, 50.0 * t.number, t.state) for t in full().trials]
    assert [b.stop for b in bars][-2:] == [560.0, 560.0]  # a running trial reaches to the last moment known
    assert nodes == [(0.0, 1), (100.0, 3)]


def test_bars_begin_when_trials_had_a_process_not_when_they_were_asked_for(drawn):
    waited, lost = trial(1, ran=80.0), trial(2, "failed", seconds=0.0)
    render_search(light(trials=[trial(0, ran=0.0), waited, lost]))
    bars, _ = drawn["timeline"]
    assert [(b.number, b.start, b.stop) for b in bars] == [(0, 0.0, 60.0), (1, 80.0, 110.0)]


def test_importance_says_what_it_speaks_of():
    assert "It speaks of what the sampler still varied" in words(full())


def test_axes_hold_positions_of_numbers_and_categories(drawn):
    render_search(full())
    axes = {axis.label: axis for axis in drawn["slices"][0]}
    assert axes["session_gap_minutes"].names == ["5", "30", "1440"]  # choices of numbers are put in order
    assert axes["session_gap_minutes"].at == [1, 0, 2] * 3
    assert axes["scope"].names == ["candidate", "all"]
    assert axes["scope"].at == [None, 0, None, 1, None, 0, None, 1, None]
    assert axes["dropout"].at == [i % 5 / 10 for i in range(9)]
    assert axes["lr"].log
    assert [a.label for a in drawn["contours"][0]] == ["lr", "session_gap_minutes", "dropout"]


def test_anchors_over_session_gap_are_drawn_however_little_they_matter(monkeypatch):
    groups: list[list[str]] = []
    monkeypatch.setattr(search_plots, "contours", lambda axes, *_: groups.append([a.label for a in axes]) or "data:,")
    top_k = Dimension("model.pgsa.top_k", "category", choices=(8, 32))
    render_search(full())
    assert groups == [["lr", "session_gap_minutes", "dropout"]]
    more = {"dimensions": (top_k, *DIMENSIONS), "importance": {LR.path: 0.6, DROPOUT.path: 0.3, GAP.path: 0.1}}
    render_search(full(**more))
    assert groups[1:] == [["lr", "dropout", "session_gap_minutes"], ["top_k", "session_gap_minutes"]]


def test_a_choice_of_true_is_not_the_choice_of_one(drawn):
    odd = Dimension("a.odd", "category", choices=(1, True, None, "1"))
    rows = [trial(i, values={"a.odd": v}) for i, v in enumerate(("1", None, True, 1, 2))]
    render_search(full(dimensions=(odd,), trials=rows, best=4, importance={}))
    assert drawn["slices"][0][0].at == [3, 2, 1, 0, None]


def test_text_from_outside_is_escaped():
    evil = [f"<script>alert({i})</script>" for i in range(8)]
    scope = replace(SCOPE, path=f"model.{evil[0]}", choices=(evil[1], "all"))
    failed = trial(1, "failed", error=evil[2], values={scope.path: evil[1]}, stage1=evil[3])
    data = light(
        name=evil[4],
        run=evil[5],
        config_yaml=evil[6],
        space_yaml=evil[7],
        dimensions=(DROPOUT, scope),
        trials=[trial(0), failed],
        best=0,
    )
    html = render_search(data)
    assert [i for i in range(8) if f"&lt;script&gt;alert({i})&lt;/script&gt;" not in html] == []
    assert "<script" not in html.lower()
    Page(html)


def test_equal_data_give_equal_pages_and_leave_matplotlib_as_it_was():
    before = dict(matplotlib.rcParams)
    assert full_page() == render_search(full())
    assert dict(matplotlib.rcParams) == before


def test_a_search_without_trials_says_so():
    nothing = full(trials=(), importance={}, best=None, default=None, test={}, account={}, nodes=())
    text = words(replace(nothing, cost_name="keys", config_yaml="", space_yaml=""))
    for part in (
        "Best validation AUC - no trial has finished",
        "Test AUC of the best - not tested",
        "there is no best configuration",
        "No trial has finished or was pruned",
        "No trial has been validated",
        "which settings matter cannot be told",
        "no AUC to draw over the settings",
        "no AUC to draw over pairs",
        "no finished trials to draw",
        "No finished trial has both an AUC and keys",
        "kept no account of its cost",
        "No trial has started",
        "No trial has been drawn",
        "were not recorded",
    ):
        assert part in text
    assert "nan" not in text.lower()


def test_a_search_of_failures_shows_what_went_wrong():
    data = full(trials=[trial(i, "failed") for i in range(3)], importance={}, best=None, test={})
    text = words(data)
    assert "Trials finished 0 3 failed" in text
    assert text.count("Error of trial") == 3
    assert "no trial has finished" in text
    assert "trials      3 failed" in search_summary(data, [])
    assert "last error  trial 2: RuntimeError: out of memory" in search_summary(data, [])
    assert "no trial runs or has finished" in board(data, 5.0)


@pytest.mark.parametrize("state", ["finished", "pruned", "running", "waiting", "repeated", "unheard of"])
def test_a_search_of_one_trial_is_drawn(state):
    row = trial(0, state) if state != "waiting" else trial(0, state, auc=None, curve=[], started=None, stopped=None)
    best = 0 if state == "finished" else None
    data = with_cost(trials=[row], importance={}, best=best, pareto=(), test={}, dimensions=(DROPOUT, LR))
    text = words(data)
    assert ("the default is the best" in text) == (state == "finished")
    assert f"1 {state}" in search_summary(data, [])


def test_nothing_is_measured_against_a_default_that_did_not_finish():
    on_the_way = trial(0, "failed", auc=0.55, error="its process died")
    for suspended, told in ((True, "the default did not finish; --resume tries it again"), (False, "did not finish")):
        data = light(trials=[replace(on_the_way, suspended=suspended), trial(1), trial(2)])
        assert data.measure() is None
        assert data.gain().endswith(told)
        assert told in " ".join(search_summary(data, []).split())
        text = words(data)
        assert f"{told}." in text
        assert "over the default 0.5500" not in text
        assert "+0." not in text
    assert light().measure() == (trial(0), 0.7)


def test_default_without_an_auc_and_conditions_that_never_held():
    rows = [replace(t, values={DROPOUT.path: 0.1}) for t in (trial(0, "failed"), trial(1), trial(2))]
    data = light(trials=rows, dimensions=DIMENSIONS)
    text = words(data)
    assert "Trial 2 is best with a validation AUC of 0.7020: the default did not finish." in text
    assert "stage2.optimiser.lr - - 0.0002 to 0.005, log" in text


def test_one_number_has_no_pair():
    assert "Fewer than two of the settings are numbers" in words(light(dimensions=(DROPOUT, SCOPE)))


def test_unknown_numbers_are_left_out():
    rows = [trial(0, auc=float("nan"), curve=[(1, float("nan"))]), trial(1), trial(2)]
    text = words(light(trials=rows))
    assert "the default has no AUC" in text
    assert "nan" not in text.lower()


def test_points_on_a_line_span_no_surface():
    steps = np.arange(8.0)
    assert not search_plots.spans_a_surface(np.stack([steps, 3 * steps + 1], axis=1))
    assert not search_plots.spans_a_surface(np.stack([steps, np.full(8, 2.0)], axis=1))
    corners = np.array([[x, y] for x in (0.0, 1.0, 2.0) for y in (0.0, 1.0)])
    assert search_plots.spans_a_surface(corners)
    assert not search_plots.spans_a_surface(corners[:5])
    assert not search_plots.spans_a_surface(corners[:0])


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], [1.0] * 8),
        ([1.0] * 8, [1.0] * 8),
        ([None] * 8, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]),
        ([1.0, 10.0, 100.0, 1.0, 10.0, 100.0, 1.0, 1.0], [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 1.0, 1.0]),
    ],
)
@pytest.mark.parametrize("auc", [[0.7] * 8, [0.5, 0.71, 0.72, 0.73, 0.74, 0.74, 0.75, 0.76]])
def test_pairs_of_any_shape_are_drawn(x, y, auc):
    axes = [search_plots.Axis("x", x, log=True), search_plots.Axis("y", y, names=[str(i) for i in range(9)])]
    assert search_plots.contours(axes, auc, 7).startswith("data:image/svg+xml")


def test_an_axis_spans_what_was_searched_and_trials_beyond():
    assert search_plots.Axis("a", [1.0, None], low=0.0, high=4.0).ends() == (0.0, 4.0)
    assert search_plots.Axis("a", [5.0], low=0.0, high=4.0).ends() == (0.0, 5.0)
    assert search_plots.Axis("a", [10.0], log=True, low=1.0, high=1000.0).ends() == (0.0, 3.0)
    assert search_plots.Axis("a", [0.0, 1.0], names=("x", "y")).ends() == (-0.5, 1.5)
    low, high = search_plots.Axis("a", []).ends()
    assert low < high
    spread = search_plots.Axis("a", [1.0] * 20, names=("x", "y")).spread()
    assert np.abs(spread - 1).max() < 0.2
    assert len(set(spread)) == 20


def test_labels_are_as_short_as_they_can_be():
    paths = ("stage1.optimiser.lr", "stage2.optimiser.lr", "model.width", "a.dropout", "dropout")
    labels = full(dimensions=[Dimension(p, "number") for p in paths]).labels()
    assert list(labels.values()) == ["stage1.optimiser.lr", "stage2.optimiser.lr", "width", "a.dropout", "dropout"]


def test_values_read_as_they_would_in_yaml():
    assert [setting(v) for v in (True, False, None, 3, 4096, "all", 0.25)] == [
        *("true", "false", "null", "3", "4096", "all", "0.25")
    ]
    assert [number(v) for v in (3e-4, 3e-5, 0.1234567, 12345.0, 2.0, 0.0)] == [
        *("0.0003", "3e-5", "0.1235", "12345", "2", "0")
    ]
    assert [clip(t, 7) for t in ("short", "a long text", "two\nlines")] == ["short", "a l…ext", "two…nes"]


COMMANDS = ["python jobs/two_stage.py " + " ".join(f"--set a.b{i}=c" for i in range(20)), "less runs/a-search/x"]


def big() -> SearchData:
    """A hundred trials of every state, of twenty dimensions with long paths and long values."""
    paths = [f"section_{i}." + "very_" * 12 + "long.name" for i in range(20)]
    dimensions = [Dimension(p, "category", choices=("long " * 30, "b")) for p in paths]
    states = itertools.cycle((*["running"] * 4, "finished", "pruned", "failed", "waiting", "repeated", "unheard of"))
    rows = [
        trial(i, s, values=dict.fromkeys(paths, "long " * 30), error="E" * 300, phase="p" * 50)
        for i, s in zip(range(100), states, strict=False)
    ]
    importance = dict.fromkeys(paths, 0.05)
    return with_cost(name="n" * 90, dimensions=dimensions, trials=rows, importance=importance, pareto=range(0, 100, 2))


@pytest.mark.parametrize("make", [full, with_cost, light, big])
def test_summary_and_board_fit_a_screen(make):
    for text in (search_summary(make(), COMMANDS * 5), board(make(), 7500.0)):
        lines = text.splitlines()
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 100
        assert all(lines)


def test_summary_says_what_was_found_and_what_to_type():
    text = search_summary(with_cost(), COMMANDS)
    for part in (
        "trials      1 running, 8 finished, 1 pruned, 1 failed, 1 repeated",
        "best        trial 8, validation AUC 0.7080, +0.0080 over the default 0.7000",
        "settings    lr=0.0006, session_gap_minutes=1440, dropout=0.3",
        "test        AUC 0.6987, GAUC 0.6543, n 4,321",
        "importance  lr 61%, session_gap_minutes 29%, dropout 10%",
        "front       trials 8, 0, 4",
        "stage 1     3 computed, 9 reused, 30 min 00 s saved",
        "time        12 min 34 s, 15 min 00 s of training, 1.23 node hours",
        "last error  trial 9: RuntimeError: out of memory",
        "report      runs/a-search/report.html",
    ):
        assert part in text
    pasted = text.split("next:\n")[1].replace("\\\n", " ")
    assert [line.split() for line in pasted.splitlines()] == [c.split() for c in COMMANDS]


def test_board_shows_running_trials_then_the_best():
    header, _, *rows = board(full(), 7500.0).splitlines()
    assert header == "a search  2 h 05 min  best 0.7080 (trial 8)  1 running, 8 finished, 1 pruned, 1 failed"
    assert [int(row.split()[0]) for row in rows] == [11, 8, 7, 5, 4, 3, 2, 1, 0]
    assert rows[0].split()[1:5] == ["stage2", "epoch", "1", "0.7110"]
    assert rows[1].endswith("lr=0.0006, session_gap_minutes=1440, dropout=0.3")


def test_board_keeps_room_for_the_best_when_many_run():
    rows = [trial(i, "running" if i < 40 else "finished") for i in range(60)]
    _, _, *shown = board(full(trials=rows, best=59), 1.0).splitlines()
    numbers = [int(row.split()[0]) for row in shown]
    assert numbers == [*range(17), 59, 58, 57, 56, 55]
    assert search.LEADERS == 5
