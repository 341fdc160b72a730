"""PGSA over kept keys equals the reference: the choice exactly, values and all gradients to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers_model import SIZES, inputs, random_batch, shaken, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from hpgr.config import Model, validate
from hpgr.model import select
from hpgr.model.attention import attend
from hpgr.model.gather import Links, attend_kept, gather_pays
from hpgr.model.hstu import HstuEncoder
from hpgr.model.inputs import Inputs
from hpgr.model.pgsa import cap_weights, gaussian_weights, select_anchors
from hpgr.model.registry import click_model
from hpgr.model.relation import Queries, relate_sparsely
from hpgr.model.select import Kept, most_slots, recent_first, select_anchors_in_tiles, select_keys, select_weights

SIGMAS = st.sampled_from([0.0, 0.05, 0.2, 0.7, 1.0, 3.0, 40.0])
CAPS = st.sampled_from([None, 1, 2, 5, 64, 500])


@st.composite
def vectors(draw: st.DrawFn, most: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """Query and key vectors with many ties or repeated items, and a generator for what else is drawn."""
    b, q, n = draw(st.integers(1, 3)), draw(st.integers(1, 20)), draw(st.integers(1, most))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        table = torch.randint(-2, 3, (30, 2), generator=generator).float()
    else:
        table = F.normalize(torch.randn(30, 16, generator=generator), dim=-1)
    key = table[torch.randint(0, draw(st.integers(1, 30)), (b, n), generator=generator)]
    return table[torch.randint(0, 30, (b, q), generator=generator)], key, generator


@st.composite
def choices(draw: st.DrawFn, most: int = 90) -> tuple[Tensor, Tensor, Tensor, int]:
    """Vectors, any number visible (none too), any K."""
    query, key, generator = draw(vectors(most))
    (b, q), n = query.shape[:2], key.shape[1]
    visible = torch.randint(0, n + 1, (b, q), generator=generator)
    if draw(st.booleans()):  # the history stream: each event its own query
        query, visible = key, torch.arange(n).expand(b, n)
    return query, key, visible, draw(st.integers(1, 6) | st.just(n + 2))


@pytest.fixture(params=[select.TILE, 64], ids=["one tile", "many tiles"])
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TILE", "TILE_WHOLE"):
        monkeypatch.setattr(select, name, request.param)


def places(anchors: tuple[Tensor, Tensor]) -> Tensor:
    """Positions of real anchors in order."""
    return torch.where(anchors[1], anchors[0], -1).sort(-1).values


@pytest.mark.usefixtures("tile")
def test_the_anchors_are_the_references() -> None:
    @settings(max_examples=60)
    @given(choices())
    def check(drawn: tuple[Tensor, Tensor, Tensor, int]) -> None:
        assert torch.equal(places(select_anchors_in_tiles(*drawn)), places(select_anchors(*drawn)))

    check()


@pytest.mark.usefixtures("tile")
def test_kept_keys_and_weights_are_the_references() -> None:
    @settings(max_examples=80)
    @given(choices(), SIGMAS, CAPS)
    def check(drawn: tuple[Tensor, Tensor, Tensor, int], sigma: float, cap: int | None) -> None:
        visible, top_k, n = drawn[2], drawn[3], drawn[1].shape[1]
        weights = cap_weights(gaussian_weights(*select_anchors(*drawn), visible, n, sigma), cap)
        kept = select_keys(*drawn, sigma, cap)
        assert torch.equal(whole(kept, n), weights)
        found, anchors = select_weights(*drawn, sigma, cap)
        assert torch.equal(found, weights)
        assert torch.equal(places(recent_first(anchors)), places(select_anchors(*drawn)))
        assert torch.equal(kept.count(), (weights > 0).sum(-1))
        assert int(kept.count().max()) <= kept.index.shape[-1] == most_slots(n, top_k, sigma, cap)
        assert (kept.weight.diff(dim=-1) <= 0).all()

    check()


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_find_the_anchors_of_a_long_history(causal: bool) -> None:
    """Items repeat thousands of events apart; of the repeats the most recent are chosen."""
    generator = torch.Generator().manual_seed(0)
    table = F.normalize(torch.randn(50, 16, generator=generator), dim=-1)
    item = torch.randint(0, 50, (2, 1003), generator=generator)
    key, n = table[item], 1003
    visible = torch.arange(n).expand(2, n) if causal else torch.randint(0, n + 1, (2, n), generator=generator)
    assert n > 2 * select.BLOCK * 8
    (a, real), (b, found) = (f(key, key, visible, 8) for f in (select_anchors_in_tiles, select_anchors))
    assert torch.equal(torch.where(real, a, -1).sort(-1).values, torch.where(found, b, -1).sort(-1).values)
    same = torch.nonzero(item[0, : int(visible[0, -1])] == item[0, -1]).flatten()[-8:]
    assert set(same.tolist()) <= set(a[0, -1].tolist())


def test_wide_gaussians_over_a_long_history() -> None:
    """Distances that a byte does not hold."""
    generator = torch.Generator().manual_seed(0)
    key = F.normalize(torch.randn(2, 700, 16, generator=generator), dim=-1)
    visible = torch.randint(0, 701, (2, 700), generator=generator)
    weights = gaussian_weights(*select_anchors(key, key, visible, 2), visible, 700, 100.0)
    for cap in (None, 150):
        assert torch.equal(select_weights(key, key, visible, 2, 100.0, cap)[0], cap_weights(weights, cap))


def test_the_cap_by_hand() -> None:
    weights = torch.tensor([[[0.5, 1.0, 0.5, 0.0, 0.25, 0.5, 1.0]]])
    assert cap_weights(weights, 3).tolist() == [[[0, 1, 0, 0, 0, 0.5, 1]]]
    assert cap_weights(weights, 1).tolist() == [[[0, 0, 0, 0, 0, 0, 1]]]
    assert torch.equal(cap_weights(weights, None), weights)


def test_the_worst_case_is_reached() -> None:
    """Anchors far apart: K (2 ceil(3 sigma) + 1) keys without a cap."""
    item = torch.zeros(1, 60, dtype=torch.int64)
    item[0, 10::20] = 1
    vectors = F.one_hot(item, 2).float()
    query, visible = vectors[:, [10]], torch.tensor([[60]])
    for sigma, cap, expected in ((1.0, None, 3 * 7), (2.0, None, 3 * 13), (2.0, 8, 8), (0.0, None, 3)):
        assert int(select_keys(query, vectors, visible, 3, sigma, cap).count()) == expected


def whole(kept: Kept, n: int) -> Tensor:
    """Kept keys' weights over the whole history: [B, Q, N]."""
    return kept.weight.new_zeros(*kept.weight.shape[:2], n).scatter_add_(-1, kept.index, kept.weight)


def drawn_attention(b: int, h: int, q: int, n: int, e: int, seed: int) -> tuple[list[Tensor], Kept]:
    """q, k, v, self k, self v, bias, self bias; and kept keys, of some queries none."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(b, h, q, e), (b, h, n, e), (b, h, n, e), (b, h, q, e), (b, h, q, e), (b, h, q, n), (h,)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    index = torch.rand(b, q, n, generator=generator).argsort(-1)[..., : max(1, n // 2)]
    weight = torch.rand(index.shape, generator=generator).double() * (
        torch.rand(index.shape, generator=generator) > 0.4
    )
    weight[torch.rand(b, q, generator=generator) < 0.3] = 0
    return tensors, Kept(torch.where(weight > 0, index, 0), weight)


@settings(max_examples=50)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 5), st.integers(0, 999)
)
def test_attention_over_kept_keys_equals_the_reference(b: int, h: int, q: int, n: int, e: int, seed: int) -> None:
    tensors, kept = drawn_attention(b, h, q, n, e, seed)
    links = Links(kept.index, kept.weight, n, h)
    results = []
    for fast in (True, False):
        queries, k, v, k_self, v_self, bias, own = tensors
        if fast:
            pairs = bias.gather(-1, kept.index[:, None].expand(-1, h, -1, -1))
            out = attend_kept(queries, k, v, (k_self, v_self), pairs, own, links)
        else:
            out = attend(queries, k, v, (k_self, v_self), bias, own, whole(kept, n))
        factor = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
        gradients = torch.autograd.grad((out * factor).sum(), tensors)
        results.append([out, *gradients])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def outcome(pgsa: dict[str, Any], x: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores and gradients of the click model."""
    torch.manual_seed(0)
    model = shaken(click_model(tiny(stream={"window": 9}, model={"pgsa": pgsa}), SIZES))
    output = model(x)
    output.loss.backward()
    return output.scores, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@settings(max_examples=25)
@given(
    st.integers(1, 3), st.integers(2, 24), st.integers(1, 5), st.sampled_from([0.0, 0.7, 2.0]), CAPS,
    st.sampled_from(["all", "candidate"]), st.sampled_from(["frozen", "live"]), st.integers(0, 999),
)  # fmt: skip
def test_the_model_is_the_same_however_attention_is_computed(
    rows: int, events: int, targets: int, sigma: float, cap: int | None, scope: str, anchors: str, seed: int
) -> None:
    """Both streams; histories longer and shorter than the window; events of one second."""
    x = inputs(random_batch(rows, events, targets, seed))
    pgsa = {"sigma": sigma, "max_keys": cap, "scope": scope, "anchors": anchors}
    scores, gradients = outcome(pgsa | {"impl": "reference"}, x)
    for impl in ("gather", "auto"):
        ours, our_gradients = outcome(pgsa | {"impl": impl}, x)
        torch.testing.assert_close(ours, scores, rtol=1e-5, atol=1e-5)
        assert our_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_auto_looks_at_padded_lengths_and_slots_alone() -> None:
    cpu = torch.device("cpu")
    assert not gather_pays(64, 8, cpu)
    assert not gather_pays(200, 64, cpu)
    assert gather_pays(256, 64, cpu)
    assert not gather_pays(1600, 416, cpu)
    assert gather_pays(1664, 416, cpu)
    assert not gather_pays(1024, 64, torch.device("meta"))


def encoded(model: Model, n: int, impl: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    item = torch.randint(0, 400, (1, n), generator=generator)
    time, visible = torch.arange(n)[None] * 60_000_000, torch.arange(n)[None]
    fields = dict.fromkeys(Inputs.__dataclass_fields__, item)
    x = Inputs(**fields | {"h_item": item, "h_time": time, "h_visible": visible})
    vectors = torch.randn(400, model.width, generator=generator)[item]
    torch.manual_seed(0)
    encoder, h = HstuEncoder(model, n), torch.randn(1, n, model.width, generator=generator)
    relation = relate_sparsely(x, Queries(item, time, visible), (vectors, vectors), model, n, impl)
    return encoder.read(h, list(encoder.encode(h, relation, None)), relation, None)


@pytest.mark.parametrize("impl", ["gather", "reference"])
def test_nothing_of_the_size_of_the_square_is_saved_for_gradients(impl: str) -> None:
    """Nor held by what the layers share; the reference is the control."""
    pgsa = {"top_k": 4, "sigma": 1.0, "max_keys": 8}
    model = validate({"model": {"width": 8, "heads": 2, "dropout": 0.0, "pgsa": pgsa}}).model
    n, largest = 512, 0

    def look(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda t: t):
        encoded(model, n, impl).sum().backward()
    assert (largest < n * 8 * 4 + 1) == (impl == "gather"), largest
    if impl == "reference":
        assert largest >= n * n


def test_gradients_are_the_same_bits_twice_and_on_any_number_of_threads() -> None:
    tensors, kept = drawn_attention(2, 2, 40, 60, 4, 0)
    links = Links(kept.index, kept.weight, 60, 2)
    bias = torch.zeros(2, 2, *kept.index.shape[1:], dtype=torch.float64)
    queries, k, v, k_self, v_self, _, own = tensors
    results = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        out = attend_kept(queries, k, v, (k_self, v_self), bias, own, links)
        results.append([out, *torch.autograd.grad((out**2).sum(), [queries, k, v, k_self, v_self, own])])
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
