"""Anchors from sessions chosen first: the reference equals a plain loop, the fast form the reference, nothing leaks."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from helpers_model import SIZES, inputs, random_batch, shaken, tiny, widened
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gather import vectors
from torch import Tensor
from torch.nn import functional as F

from hpgr.errors import ConfigError
from hpgr.model import select, select_sessions
from hpgr.model.base import ClickModel
from hpgr.model.pgsa import Sessions, cap_weights, gaussian_weights, in_near_sessions, select_anchors
from hpgr.model.registry import click_model
from hpgr.model.select import most_slots, recent_first, select_anchors_in_tiles, select_keys, select_weights


class Drawn(NamedTuple):
    query: Tensor
    key: Tensor
    visible: Tensor
    top_k: int
    sessions: Sessions


@st.composite
def choices(draw: st.DrawFn, most: int = 90) -> Drawn:
    """Vectors, sessions of one event up to the whole history, padding numbered 0 as in batches, any
    number visible (none too), any K and any number of sessions."""
    query, key, generator = draw(vectors(most))
    (b, q), n = query.shape[:2], key.shape[1]
    number = (torch.rand(b, n, generator=generator) < draw(st.sampled_from([0.0, 0.1, 0.4, 1.0]))).long()
    number = number.index_fill(1, torch.tensor([0]), 0).cumsum(1)
    real = torch.randint(1, n + 1, (b, 1), generator=generator)
    number = number.where(torch.arange(n) < real, 0)
    visible = (torch.rand(b, q, generator=generator) * (real + 1)).long()
    if draw(st.booleans()):  # the history stream: each event its own query
        query, visible = key, torch.arange(n).where(torch.arange(n) < real, 0)
    return Drawn(
        query, key, visible, draw(st.integers(1, 6) | st.just(n + 2)), Sessions(number, draw(st.integers(1, 5)))
    )


def near_by_loop(relevance: list[float], number: list[int], visible: int, past: int) -> set[int]:
    """Visible events of the last session and of the `past` nearest before it, from one query's relevances."""
    if not visible:
        return set()
    means = {}
    for session in set(number[:visible]) - {number[visible - 1]}:
        own = [r for r, s in zip(relevance[:visible], number, strict=False) if s == session]
        means[session] = sum(own) / len(own)
    near = sorted(means, key=lambda s: (means[s], s), reverse=True)[:past]
    return {j for j in range(visible) if number[j] in {*near, number[visible - 1]}}


def places(anchors: tuple[Tensor, Tensor]) -> Tensor:
    """Positions of real anchors in order."""
    return torch.where(anchors[1], anchors[0], -1).sort(-1).values


@pytest.fixture(params=["one tile", "many tiles"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many tiles":
        for module, name in ((select, "TILE"), (select, "TILE_WHOLE"), (select_sessions, "TILE")):
            monkeypatch.setattr(module, name, 64)
        monkeypatch.setattr(select_sessions, "GATHERED", 400)


@settings(max_examples=60)
@given(choices(most=20), st.integers(0, 2**31))
def test_the_reference_equals_the_loop(drawn: Drawn, seed: int) -> None:
    """Of integer vectors, whose relevances and sums are exact."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randint(-2, 3, (*drawn.key.shape[:2], 2), generator=generator).float()
    query = torch.randint(-2, 3, (*drawn.query.shape[:2], 2), generator=generator).float()
    near = in_near_sessions(query, key, drawn.visible, drawn.sessions)
    positions, real = select_anchors(query, key, *drawn[2:])
    for b in range(len(query)):
        number = drawn.sessions.number[b].tolist()
        for q in range(query.shape[1]):
            relevance, visible = (key[b] @ query[b, q]).tolist(), int(drawn.visible[b, q])
            expected = near_by_loop(relevance, number, visible, drawn.sessions.past)
            assert set(torch.nonzero(near[b, q, :visible]).flatten().tolist()) == expected
            best = sorted(expected, key=lambda j: (relevance[j], j), reverse=True)[: drawn.top_k]
            assert positions[b, q][real[b, q]].tolist() == best


@pytest.mark.usefixtures("tile")
def test_the_fast_anchors_are_the_references() -> None:
    @settings(max_examples=120)
    @given(choices())
    def check(drawn: Drawn) -> None:
        assert torch.equal(places(select_anchors_in_tiles(*drawn)), places(select_anchors(*drawn)))

    check()


@pytest.mark.usefixtures("tile")
def test_kept_keys_and_weights_are_the_references() -> None:
    @settings(max_examples=80)
    @given(choices(), st.sampled_from([0.0, 0.7, 3.0, 40.0]), st.sampled_from([None, 1, 5, 500]))
    def check(drawn: Drawn, sigma: float, cap: int | None) -> None:
        query, key, visible, top_k, sessions = drawn
        n = key.shape[1]
        weights = cap_weights(gaussian_weights(*select_anchors(*drawn), visible, n, sigma), cap)
        kept = select_keys(query, key, visible, top_k, sigma, cap, sessions=sessions)
        whole = torch.zeros_like(weights).scatter_add_(-1, kept.index, kept.weight)
        assert torch.equal(whole, weights)
        assert int(kept.count().max()) <= most_slots(n, top_k, sigma, cap)
        found, anchors = select_weights(query, key, visible, top_k, sigma, cap, sessions)
        assert torch.equal(found, weights)
        assert torch.equal(places(recent_first(anchors)), places(select_anchors(*drawn)))

    check()


def test_a_long_history_of_sessions_of_very_different_lengths() -> None:
    """Nearly half the events in one session, a hundred sessions of one, and what lies between."""
    generator = torch.Generator().manual_seed(0)
    key = F.normalize(torch.randn(60, 16, generator=generator), dim=-1)[
        torch.randint(0, 60, (1, 2000), generator=generator)
    ]
    lengths = torch.tensor([7, 900, *[1] * 100, *[20] * 49, 13])
    number = torch.arange(len(lengths)).repeat_interleave(lengths)[None]
    for visible in (torch.arange(2000)[None], torch.randint(0, 2001, (1, 2000), generator=generator)):
        drawn = Drawn(key, key, visible, 8, Sessions(number, 3))
        assert torch.equal(places(select_anchors_in_tiles(*drawn)), places(select_anchors(*drawn)))


@pytest.mark.parametrize("choose", [select_anchors, select_anchors_in_tiles])
@pytest.mark.parametrize(
    ("visible", "past", "expected"),
    [
        (7, 1, [2, 3, 6]),  # of the second session, whose mean is the largest, and of the half that is seen of the last
        (7, 2, [0, 2, 3]),  # now of the first too: it holds the largest, but its mean is only the second
        (6, 1, [2, 3, 5]),  # the third is the last seen; of its equal events the later
        (2, 1, [0, 1]),  # nothing before the last seen
        (0, 1, []),
    ],
)
def test_by_hand(choose: Any, visible: int, past: int, expected: list[int]) -> None:
    """Three anchors at most; past sessions have means 1, 2 and 0."""
    relevance = torch.tensor([9.0, -7.0, 2.0, 2.0, 0.0, 0.0, 1.0, 5.0])
    number = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3]])
    key, query = relevance[None, :, None], torch.ones(1, 1, 1)
    positions, real = choose(query, key, torch.tensor([[visible]]), 3, Sessions(number, past))
    assert sorted(positions[real].tolist()) == expected


@pytest.mark.parametrize("choose", [select_anchors, select_anchors_in_tiles])
def test_of_equal_sessions_the_more_recent(choose: Any) -> None:
    """Of the same events in another order, and as float32 sums them in that order, not exactly equal."""
    vectors = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    key = vectors[torch.tensor([0, 1, 2, 2, 0, 1, 1, 2, 0, 0])][None]
    number = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2, 3]])
    positions, real = choose(vectors[None, :1], key, torch.tensor([[10]]), 20, Sessions(number, 1))
    assert sorted(positions[real].tolist()) == [6, 7, 8, 9]


def test_as_many_sessions_as_there_are_is_no_choice() -> None:
    @settings(max_examples=40)
    @given(choices())
    def check(drawn: Drawn) -> None:
        everywhere = drawn._replace(sessions=Sessions(drawn.sessions.number, drawn.key.shape[1]))
        assert torch.equal(places(select_anchors(*everywhere)), places(select_anchors(*drawn[:4])))

    check()


@pytest.mark.parametrize("choose", [select_anchors, select_anchors_in_tiles])
def test_what_is_not_past_does_not_reach_the_choice(choose: Any) -> None:
    """Other items, sessions that end there or go on, more events and fewer, at or after a query's second."""

    @settings(max_examples=80)
    @given(choices(), st.integers(0, 99), st.booleans(), st.integers(0, 9))
    def check(drawn: Drawn, which: int, goes_on: bool, more: int) -> None:
        query, key, visible, top_k, (number, past) = drawn
        seen = int(visible[0, which % visible.shape[1]])
        later = max(1, key.shape[1] - seen + more)
        vectors = torch.randn(1, later, key.shape[2], generator=torch.Generator().manual_seed(which)) * 9
        open_session = int(number[0, seen - 1]) if seen else 0
        following = open_session + int(not goes_on) + torch.arange(later)[None] // 3
        found = []
        for keys, numbers in (
            (key[:1], number[:1]),
            (torch.cat([key[:1, :seen], vectors], 1), torch.cat([number[:1, :seen], following], 1)),
        ):
            past_events = torch.full((1, query.shape[1]), seen)
            positions, real = choose(query[:1], keys, past_events, top_k, Sessions(numbers, past))
            found.append([sorted(positions[0, q][real[0, q]].tolist()) for q in range(query.shape[1])])
        assert found[0] == found[1]

    check()


@pytest.mark.parametrize("choose", [select_anchors, select_anchors_in_tiles])
def test_a_past_session_reaches_the_choice_by_all_its_events(choose: Any) -> None:
    """The control: a wholly past session's last event decides whether its first is an anchor."""
    number, found = torch.tensor([[0, 0, 1, 1, 2]]), []
    for last in (3.0, -3.0):
        key = torch.tensor([2.0, last, 1.0, 1.0, 0.0])[None, :, None]
        positions, real = choose(torch.ones(1, 1, 1), key, torch.tensor([[5]]), 5, Sessions(number, 1))
        found.append(sorted(positions[real].tolist()))
    assert found == [[0, 1, 4], [2, 3, 4]]


def built(**pgsa: Any) -> ClickModel:
    torch.manual_seed(0)
    model = shaken(click_model(tiny(model={"pgsa": {"anchors": "live", **pgsa}}), SIZES))
    assert isinstance(model, ClickModel)
    return model


@settings(max_examples=25)
@given(
    st.integers(1, 3), st.integers(2, 40), st.integers(1, 5), st.integers(1, 3), st.sampled_from([None, 2, 5]),
    st.sampled_from([{}, {"scope": "candidate"}, {"enabled": False}, {"sigma": 0.0, "top_k": 1}]), st.integers(0, 999),
)  # fmt: skip
def test_the_model_is_the_same_however_attention_is_computed(
    rows: int, events: int, targets: int, sessions: int, cap: int | None, over: dict[str, Any], seed: int
) -> None:
    """Scores and gradients, kept keys, weights and anchors; rows with padding."""
    x, results = widened(inputs(random_batch(rows, events, targets, seed)), 5, 0), []
    for impl in ("reference", "gather", "auto"):
        model = built(impl=impl, sessions=sessions, max_keys=cap, **over)
        output = model(x)
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        past = model.encode(x)
        weights = model.candidate_weights(x, past)
        assert torch.equal(model.kept_keys(x), (weights > 0).sum(-1))
        results.append({"scores": output.scores.detach(), "weights": weights} | gradients)
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("over", [{}, {"enabled": False}, {"scope": "candidate"}, {"max_keys": 2}])
@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_the_model_reads_the_setting(over: dict[str, Any], impl: str) -> None:
    """Attention and summaries each, and as many sessions as there are is as none."""
    x = inputs(random_batch(3, 24, 5))
    with torch.no_grad():
        none, one, many = (built(impl=impl, sessions=s, **over)(x).scores for s in (None, 1, 24))
    assert (one != none).any()
    torch.testing.assert_close(many, none, rtol=1e-6, atol=1e-6)


def test_reported_anchors_are_of_the_chosen_sessions() -> None:
    x, model = inputs(random_batch(3, 24, 5)), built(sessions=1, sigma=0.0, summaries=0)
    past = model.encode(x)
    place, real = model.anchors(past, x)
    weights = model.candidate_weights(x, past)
    shown = torch.zeros(*weights.shape[:2], 25).scatter_(-1, torch.where(real, place, 24), 1.0)
    assert torch.equal(shown[..., :24], (weights > 0).float())


def test_no_sessions_at_all_are_refused() -> None:
    with pytest.raises(ConfigError, match="sessions"):
        tiny(model={"pgsa": {"sessions": 0}})
