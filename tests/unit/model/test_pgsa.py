"""Anchors and Gaussian weights equal plain loops; sparse attention over everything equals dense attention."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_model import SIZES, inputs, random_batch, shaken, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hpgr.model.attention import attend
from hpgr.model.pgsa import gaussian_weights, select_anchors, sortable, visible_mask
from hpgr.model.registry import click_model


def reference_anchors(relevance: list[float], visible: int, top_k: int) -> list[int]:
    """Positions of the best visible events, best first; of equal ones the later first."""
    order = sorted(range(visible), key=lambda j: (relevance[j], j), reverse=True)
    return order[:top_k]


def reference_weights(anchors: list[int], visible: int, n: int, sigma: float) -> list[float]:
    out = []
    for j in range(n):
        best = 0.0
        for p in anchors:
            if j == p:
                best = 1.0
            elif sigma > 0 and abs(j - p) <= math.ceil(3 * sigma):
                best = max(best, math.exp(-((j - p) ** 2) / (2 * sigma**2)))
        out.append(best if j < visible else 0.0)
    return out


def anchors_of(positions: Tensor, real: Tensor) -> list[int]:
    return positions[real].tolist()


def one_dimensional(relevance: list[float]) -> tuple[Tensor, Tensor]:
    """A query and keys whose dot products are these numbers."""
    return torch.ones(1, 1, 1), torch.tensor(relevance)[None, :, None]


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    """Integer vectors (exact dot products, many ties), any number visible, any K."""
    b, q, n, d = (draw(st.integers(1, m)) for m in (3, 4, 14, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    query = torch.randint(-2, 3, (b, q, d), generator=generator).float()
    key = torch.randint(-2, 3, (b, n, d), generator=generator).float()
    visible = torch.randint(0, n + 1, (b, q), generator=generator)
    return query, key, visible, draw(st.integers(1, n + 3))


@settings(max_examples=60)
@given(choices())
def test_anchors_equal_the_loop(drawn: tuple[Tensor, Tensor, Tensor, int]) -> None:
    query, key, visible, top_k = drawn
    positions, real = select_anchors(query, key, visible, top_k)
    for b in range(len(query)):
        for q in range(query.shape[1]):
            relevance = [sum(x * y for x, y in zip(query[b, q].tolist(), k.tolist(), strict=True)) for k in key[b]]
            expected = reference_anchors(relevance, int(visible[b, q]), top_k)
            assert anchors_of(positions[b, q], real[b, q]) == expected


@pytest.mark.parametrize(
    ("relevance", "visible", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0], 4, [3, 2]),
        ([1.0, 1.0, 1.0, 1.0], 2, [1, 0]),
        ([5.0, 1.0, 1.0, 9.0], 3, [0, 2]),
        ([-3.0, -1.0, -2.0, 0.0], 3, [1, 2]),
        ([-1.0, 0.0, -0.0, 0.0], 4, [3, 2]),
        ([0.0, -0.0, -1.0, -1.0], 4, [1, 0]),
        ([-1e-45, 1e-45, 0.0, -0.0], 4, [1, 3]),
        ([1.0, float("-inf"), 2.0, 3.0], 2, [0, 1]),
        ([1.0, 2.0, 3.0, 4.0], 1, [0]),
        ([1.0, 2.0, 3.0, 4.0], 0, []),
    ],
)
def test_anchors_by_hand(relevance: list[float], visible: int, expected: list[int]) -> None:
    """Two anchors at most; the last entries are nearest the query."""
    order = sortable(torch.tensor(relevance)[None, None], torch.tensor([[visible]]))[0, 0]
    assert sorted(range(visible), key=lambda j: int(order[j]), reverse=True)[:2] == expected
    positions, real = select_anchors(*one_dimensional(relevance), torch.tensor([[visible]]), 2)
    assert anchors_of(positions, real) == expected


@pytest.mark.parametrize("width", [8, 16, 64])
def test_the_same_item_is_the_same_relevance_wherever_it_stands(width: int) -> None:
    """A matrix product may round a column by its place; a repeated item must still tie, and recency decide."""
    generator = torch.Generator().manual_seed(width)
    table = F.normalize(torch.randn(7, width, generator=generator), dim=-1)
    for rows, n in ((32, 5), (3, 13), (2, 50)):
        item = torch.randint(0, 7, (rows, n), generator=generator)
        visible = torch.full((rows, n), n)
        positions, real = select_anchors(table[item], table[item], visible, 3)
        for b in range(rows):
            for q in range(n):
                got = anchors_of(positions[b, q], real[b, q])
                same = torch.nonzero(item[b] == item[b, q]).flatten().tolist()[::-1]
                assert got[: len(same)] == same[:3]


def test_no_gradient_flows_through_the_choice() -> None:
    query, key = torch.randn(1, 2, 4, requires_grad=True), torch.randn(1, 5, 4, requires_grad=True)
    visible = torch.full((1, 2), 5)
    positions, real = select_anchors(query, key, visible, 2)
    assert not gaussian_weights(positions, real, visible, 5, 1.0).requires_grad


@settings(max_examples=60)
@given(choices(), st.sampled_from([0.0, 0.2, 0.34, 1.0, 1.7, 5.0, 40.0]))
def test_weights_equal_the_formula(drawn: tuple[Tensor, Tensor, Tensor, int], sigma: float) -> None:
    query, key, visible, top_k = drawn
    n = key.shape[1]
    positions, real = select_anchors(query, key, visible, top_k)
    weights = gaussian_weights(positions, real, visible, n, sigma)
    assert weights.shape == (*visible.shape, n)
    for b in range(len(query)):
        for q in range(query.shape[1]):
            expected = reference_weights(anchors_of(positions[b, q], real[b, q]), int(visible[b, q]), n, sigma)
            torch.testing.assert_close(weights[b, q], torch.tensor(expected), rtol=1e-6, atol=1e-8)
            zero = torch.tensor(expected) == 0
            assert torch.equal(weights[b, q] == 0, zero)


def weights_around(anchors: list[int], n: int, sigma: float, visible: int | None = None) -> list[float]:
    seen = torch.tensor([[n if visible is None else visible]])
    places = torch.tensor([[anchors]])
    return gaussian_weights(places, torch.ones_like(places, dtype=torch.bool), seen, n, sigma)[0, 0].tolist()


def test_the_radius_is_three_sigma_rounded_up() -> None:
    """sigma .5: r = 2, so the third event from the anchor gets nothing although exp is not zero there."""
    got = weights_around([5], 11, 0.5)
    assert got == pytest.approx([0, 0, 0, math.exp(-8), math.exp(-2), 1, math.exp(-2), math.exp(-8), 0, 0, 0])


def test_sigma_zero_keeps_the_anchors_alone() -> None:
    assert weights_around([0, 3], 5, 0.0) == [1, 0, 0, 1, 0]


def test_overlapping_gaussians_take_the_larger() -> None:
    assert weights_around([1, 3], 5, 1.0) == pytest.approx(
        [math.exp(-0.5), 1, math.exp(-0.5), 1, math.exp(-0.5)], rel=1e-6
    )


def test_an_anchor_lends_no_weight_to_what_is_not_visible() -> None:
    assert weights_around([2], 6, 3.0, visible=3)[3:] == [0, 0, 0]


def test_dense_weights_are_the_strict_past() -> None:
    assert visible_mask(torch.tensor([[0, 2, 3]]), 3).tolist() == [
        [[False, False, False], [True, True, False], [True, True, True]]
    ]


@settings(max_examples=25)
@given(
    st.integers(1, 3),
    st.integers(2, 12),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.7, 3.0]),
    st.integers(0, 999),
    st.sampled_from([{"pgsa": {"summaries": 0}, "asvd": {"factors": 0}, "sem": {"user_vector": False}}, {}]),
)
def test_sparse_with_all_events_equals_dense(
    rows: int, events: int, targets: int, sigma: float, seed: int, beside: dict
) -> None:
    """K >= N: every visible event is an anchor; scores and all gradients are those of dense attention.

    Summaries, Asymmetric-SVD and the user's vector read the vectors that choose anchors, which a dense model without
    summaries does not have.
    """
    batch = random_batch(rows, events, targets, seed)
    results = []
    for enabled in (True, False):
        pgsa = {"anchors": "live", "top_k": events + seed % 3, "sigma": sigma, "enabled": enabled}
        torch.manual_seed(0)
        model = click_model(tiny(model={**beside, "pgsa": {**beside.get("pgsa", {}), **pgsa}}), SIZES)
        shaken(model)
        output = model(inputs(batch))
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((output.scores, gradients))
    (sparse, sparse_gradients), (dense, dense_gradients) = results
    torch.testing.assert_close(sparse, dense, rtol=1e-6, atol=1e-6)
    assert sparse_gradients.keys() == dense_gradients.keys()
    for name, gradient in dense_gradients.items():
        torch.testing.assert_close(sparse_gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_sparse_with_few_anchors_differs_from_dense() -> None:
    """The control: K matters below N."""
    batch = random_batch(3, 12, 5)
    scores = []
    for pgsa in ({"top_k": 1, "sigma": 0.0}, {"enabled": False}):
        torch.manual_seed(0)
        model = shaken(click_model(tiny(model={"pgsa": {"anchors": "live", **pgsa}}), SIZES))
        scores.append(model(inputs(batch)).scores)
    assert (scores[0] != scores[1]).any()


def test_a_key_of_weight_zero_contributes_exactly_nothing() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v, own_k, own_v = (
        random(2, 2, 3, 4),
        random(2, 2, 6, 4),
        random(2, 2, 6, 4),
        random(2, 2, 3, 4),
        random(2, 2, 3, 4),
    )
    bias, self_bias = random(2, 2, 3, 6), random(2)
    weights = torch.rand(2, 3, 6, generator=generator)
    weights[..., [1, 4]] = 0
    before = attend(q, k, v, (own_k, own_v), bias, self_bias, weights)
    k[:, :, [1, 4]], v[:, :, [1, 4]], bias[..., [1, 4]] = 1e6, -1e9, 77.0
    assert torch.equal(attend(q, k, v, (own_k, own_v), bias, self_bias, weights), before)
    v[:, :, 0] += 1
    assert not torch.equal(attend(q, k, v, (own_k, own_v), bias, self_bias, weights), before)
