"""Pointwise attention and its bias equal naive loops."""

from __future__ import annotations

import math

import pytest
import torch
from helpers_model import inputs, random_batch, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpgr.model import hstu
from hpgr.model.attention import attend, attention_shares
from hpgr.model.hstu import RelativeBias
from hpgr.model.pgsa import visible_mask
from hpgr.model.relation import Queries, keep, relate, relate_kept
from hpgr.model.timing import time_bucket


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def naive(
    q: Tensor, k: Tensor, v: Tensor, own: tuple[Tensor, Tensor], bias: Tensor, self_bias: Tensor, g: Tensor
) -> Tensor:
    out = torch.zeros_like(q)
    rows, heads, queries, width = q.shape
    for b in range(rows):
        for h in range(heads):
            for i in range(queries):
                total, divisor = torch.zeros(width), 0.0
                for j in range(k.shape[2]):
                    logit = float(q[b, h, i] @ k[b, h, j]) / math.sqrt(width) + float(bias[b, h, i, j])
                    total += float(g[b, i, j]) * silu(logit) * v[b, h, j]
                    divisor += float(g[b, i, j])
                logit = float(q[b, h, i] @ own[0][b, h, i]) / math.sqrt(width) + float(self_bias[h])
                out[b, h, i] = (total + silu(logit) * own[1][b, h, i]) / (divisor + 1)
    return out


@settings(max_examples=30)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.integers(0, 9999)
)
def test_attend_equals_the_loop(rows: int, heads: int, queries: int, keys: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, own = (
        random(rows, heads, queries, width),
        (random(rows, heads, queries, width), random(rows, heads, queries, width)),
    )
    k, v = random(rows, heads, keys, width), random(rows, heads, keys, width)
    bias, self_bias = random(rows, heads, queries, keys), random(heads)
    g = torch.rand(rows, queries, keys, generator=generator).round(decimals=1) * (random(rows, queries, keys) > 0)
    expected = naive(q, k, v, own, bias, self_bias, g)
    torch.testing.assert_close(attend(q, k, v, own, bias, self_bias, g), expected, rtol=1e-4, atol=1e-5)


def test_a_query_without_visible_events_sees_itself_alone() -> None:
    q, k, v = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    got = attend(q, k, v, (q, v[:, :, :1]), torch.zeros(1, 1, 1, 3), torch.zeros(1), torch.zeros(1, 1, 3))
    expected = silu(float((q * q).sum()) / 2) * v[:, :, :1]
    torch.testing.assert_close(got, expected)


def test_attend_needs_no_softmax_and_many_keys_do_not_grow_the_sum() -> None:
    """Equal keys and values: the mean does not depend on how many there are, but for the query itself."""
    q = torch.ones(1, 1, 1, 4)
    for n in (1, 10, 1000):
        same = q.expand(1, 1, n, 4)
        got = attend(q, same, same, (q, q), torch.zeros(1, 1, 1, n), torch.zeros(1), torch.ones(1, 1, n))
        torch.testing.assert_close(got, torch.full_like(q, silu(2.0)))


def test_relations_equal_the_loop() -> None:
    config, window = tiny().model, 16
    x = inputs(random_batch(2, 8, 3, seed=2))
    weights = visible_mask(x.c_visible, 8)
    r = relate(x, x.c_item, x.c_time, x.c_visible, weights, config, window)
    for b in range(2):
        for m in range(3):
            for j in range(8):
                assert r.pairs.distance[b, m, j] == min(max(int(x.c_visible[b, m]) - j, 0), window)
                assert r.pairs.same[b, m, j] == (x.c_item[b, m] == x.h_item[b, j])
                delta = x.c_time[b, m] - x.h_time[b, j]
                assert r.pairs.age[b, m, j] == time_bucket(delta, config.time_buckets)
                assert r.weights[b, m, j] == float(x.h_time[b, j] < x.c_time[b, m])


def test_bias_equals_the_loop() -> None:
    config, window = tiny().model, 5
    x = inputs(random_batch(2, 8, 3, seed=2))
    r = relate(x, x.c_item, x.c_time, x.c_visible, visible_mask(x.c_visible, 8), config, window)
    bias = RelativeBias(2, window, config.time_buckets)
    torch.nn.init.normal_(bias.match)
    with torch.no_grad():
        got = bias(r.pairs)
    for b in range(2):
        for h in range(2):
            for m in range(3):
                for j in range(8):
                    expected = bias.position[h, r.pairs.distance[b, m, j]] + bias.time[h, r.pairs.age[b, m, j]]
                    expected = expected + bias.match[h] * r.pairs.same[b, m, j]
                    assert float(got[b, h, m, j]) == pytest.approx(float(expected.detach()), abs=1e-6)


@pytest.mark.parametrize("kept", [False, True], ids=["whole maps", "kept keys"])
def test_biases_looked_up_as_sums_are_the_same(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, so that scores cannot depend on how many pairs a batch has; gradients to rounding."""
    config, window = tiny().model, 5
    x = inputs(random_batch(3, 8, 4, seed=2))
    queries = Queries(x.c_item, x.c_time, x.c_visible)
    if kept:
        vectors = torch.randn(3, 4, 6), torch.randn(3, 8, 6)
        r = relate_kept(x, queries, keep(*vectors, x.c_visible, config.pgsa, x.h_session), config, window)
    else:
        r = relate(x, *queries, visible_mask(x.c_visible, 8), config, window)
    bias = RelativeBias(config.heads, window, config.time_buckets)
    torch.nn.init.normal_(bias.match)
    found = {}
    for least in (0.0, float("inf")):
        monkeypatch.setattr(hstu, "SUMS_PAY", least)
        out = bias(r.pairs)
        found[least] = out.detach(), torch.autograd.grad((out * torch.arange(out.numel()).view(out.shape)).sum(),
                                                         [bias.position, bias.time, bias.match])  # fmt: skip
        assert ("code" in vars(r.pairs)) is (least == 0)
        vars(r.pairs).pop("code", None)
    (sums, of_sums), (apart, of_apart) = found.values()
    assert torch.equal(sums, apart)
    for got, expected in zip(of_sums, of_apart, strict=True):
        torch.testing.assert_close(got, expected)


def test_shares_are_the_sizes_of_what_attention_sums() -> None:
    """Against one key at a time through `attend`, whose divisor cancels; the query's own share is the rest."""
    generator = torch.Generator().manual_seed(5)
    q, k, own, bias = (torch.randn(1, 2, n, 3, generator=generator) for n in (4, 6, 4, 4))
    bias, self_bias = torch.randn(1, 2, 4, 6, generator=generator), bias[0, :, 0, 0]
    g = torch.rand(1, 4, 6, generator=generator) * (torch.rand(1, 4, 6, generator=generator) > 0.4)
    shares = attention_shares(q, k, own, bias, self_bias, g)
    ones, nothing = torch.ones(1, 2, 6, 1), torch.zeros(1, 2, 4, 1)
    one = [ones * (torch.arange(6) == j)[:, None] for j in range(6)]
    parts = [attend(q, k, v, (own, nothing), bias, self_bias, g)[..., 0] for v in one]
    self_part = attend(q, k, ones * 0, (own, nothing + 1), bias, self_bias, g)
    sizes = torch.stack(parts, -1).abs()
    torch.testing.assert_close(shares, sizes / (sizes.sum(-1, keepdim=True) + self_part.abs()))
    assert (shares[:, :, g[0] == 0] == 0).all()
    assert (shares.sum(-1) < 1).all()
