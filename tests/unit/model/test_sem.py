"""The Session Enhancement Module's masks and summaries equal loops, in both forms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers_model import inputs, random_batch, rows_of, shaken, tiny, widened
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hpgr.model.inputs import Inputs
from hpgr.model.sem import (
    SESSION_POSITIONS,
    Sem,
    SessionBlocks,
    attend_where,
    inter_mask,
    intra_mask,
    places_in_session,
    rotated,
)


def jagged(seed: int = 0, rows: int = 4, events: int = 9) -> Inputs:
    """Rows of different lengths, padded."""
    batch = random_batch(rows, events, 2, seed)
    lengths = np.maximum(1, events - np.arange(rows) * 2)
    keep = (np.arange(events) < lengths[:, None]).ravel()
    cut = {name: getattr(batch, name)[keep] for name in vars(batch) if name.startswith("h_") and name != "h_lengths"}
    return inputs(replace(batch, h_lengths=lengths, **cut))


def one_session(events: int) -> Inputs:
    """A row whose events are of one session."""
    return replace(x := jagged(0, 1, events), h_session=torch.zeros_like(x.h_session))


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 10))
def test_intra_mask_equals_the_loop(seed: int, rows: int, events: int) -> None:
    x = jagged(seed, rows, events)
    for causal in (False, True):
        mask = intra_mask(x, torch.full((rows,), causal))
        for b in range(rows):
            for i in range(events):
                for j in range(events):
                    session = x.h_real[b, j] and x.h_session[b, i] == x.h_session[b, j]
                    seen = session and (not causal or x.h_time[b, j] < x.h_time[b, i])
                    if x.h_real[b, i]:
                        assert mask[b, i, j] == (i == j or seen)
                    elif j != i:
                        assert not (causal and mask[b, i, j])


def test_rows_of_a_batch_choose_their_form_alone() -> None:
    x = jagged()
    mixed = intra_mask(x, x.causal)
    for form in (False, True):
        rows = x.causal == form
        assert torch.equal(mixed[rows], intra_mask(x, torch.full((4,), form))[rows])


def test_inter_mask_by_hand() -> None:
    real = torch.tensor([[True, True, False], [True, True, True]])
    mask = inter_mask(real, torch.tensor([False, True]))
    assert mask.int().tolist() == [
        [[1, 1, 0], [1, 1, 0], [1, 1, 1]],  # both sides: real sessions, and an unreal one itself
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],  # causal: up to itself
    ]


def test_places_in_session() -> None:
    session = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 2, 2, 0, 0]])
    assert places_in_session(session).tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 0, 1]]
    assert places_in_session(torch.zeros(1, 100, dtype=torch.long)).max() == SESSION_POSITIONS - 1


@pytest.mark.parametrize("lanes", [1, 2, 8, 9])
def test_products_of_turned_vectors_know_how_far_apart_they_are_and_nothing_else_of_places(lanes: int) -> None:
    q, k = torch.randn(2, lanes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    products = rotated(q.expand(40, lanes)) @ rotated(k.expand(40, lanes)).T
    for apart in (-7, 0, 3):
        same = products.diagonal(apart)
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=1e-5, atol=1e-5)
    assert abs(products[0, 0] - q @ k) < 1e-6
    assert (products[0].std() > 1e-3) == (lanes > 1)


def test_rotary_positions_order_late_events_of_a_long_session(sem: Sem) -> None:
    """Beyond the table of places: where one of many equal events stands changes what the last is told."""
    n = 2 * SESSION_POSITIONS
    x, mark = one_session(n), torch.randn(8, generator=torch.Generator().manual_seed(3))
    told = []
    for place in (n - 2, n - 9):
        tokens = torch.zeros(1, n, 8)
        tokens[0, place] = mark
        told.append(sem(tokens, x, None, torch.zeros(1, dtype=torch.bool))[0][0, n - 1])
    assert ((told[0] - told[1]).abs().max() > 1e-4) == sem.rotary


@pytest.fixture(params=[False, True], ids=["places", "rotary"])
def sem(request: pytest.FixtureRequest) -> Sem:
    torch.manual_seed(0)
    built = shaken(Sem(tiny(model={"sem": {"intra_layers": 2, "inter_layers": 2, "rotary": request.param}}).model))
    assert isinstance(built, Sem)
    return built


def looped(sem: Sem, tokens: torch.Tensor, x: Inputs, row: int, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The module for one row with a list per session, no padding and no batch: (encoding, context)."""
    n = int(x.h_real[row].sum())
    session = x.h_session[row, :n].tolist()
    numbers = sorted(set(session))
    encoded = torch.zeros(n, tokens.shape[-1])
    for s in numbers:
        inside = [i for i in range(n) if session[i] == s]
        part = tokens[row, inside] + sem.position.weight[: len(inside)]
        time = x.h_time[row, inside]
        allowed = torch.ones(len(inside), len(inside), dtype=torch.bool)
        if causal:
            allowed = (time[None, :] < time[:, None]) | torch.eye(len(inside), dtype=torch.bool)
        for block in sem.intra:
            part = block(part[None], attend_where(allowed[None], sem.rotary), None, 0)[0]
        encoded[inside] = part
    summary = torch.stack([encoded[[i for i in range(n) if session[i] == s]].mean(0) for s in numbers])
    allowed = torch.ones(len(numbers), len(numbers), dtype=torch.bool)
    for block in sem.inter:
        mix = attend_where((allowed.tril() if causal else allowed)[None], sem.rotary)
        summary = block(summary[None], mix, None, 0)[0]
    summary = sem.back(sem.norm(summary))
    if causal:  # an event is told of the sessions before its own
        summary = F.pad(summary, (0, 0, 1, 0))[:-1]
    return encoded, summary[[numbers.index(s) for s in session]]


@pytest.mark.parametrize("blocks_from", [1, 512], ids=["one by one", "under a mask"])
@pytest.mark.parametrize("causal", [False, True])
def test_sem_equals_a_loop_over_sessions(
    sem: Sem, causal: bool, blocks_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpgr.model.sem.BLOCKS_FROM", blocks_from)
    x = jagged(seed=4)
    tokens = torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        encoded, context = sem(tokens, x, None, torch.full((4,), causal))
        for row in range(4):
            n = int(x.h_real[row].sum())
            expected = looped(sem, tokens, x, row, causal)
            torch.testing.assert_close(encoded[row, :n], expected[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(context[row, :n], expected[1], rtol=1e-4, atol=1e-5)


def test_the_first_session_has_no_causal_context(sem: Sem) -> None:
    x = jagged(seed=4)
    _, context = sem(torch.randn(4, 9, 8), x, None, torch.ones(4, dtype=torch.bool))
    assert (context[x.h_session == 0] == 0).all()
    assert (context[(x.h_session > 0) & x.h_real] != 0).any(-1).all()


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 90), st.booleans())
def test_sessions_of_their_own_are_attended_to_as_under_a_mask(seed: int, rows: int, events: int, rotary: bool) -> None:
    """Values and gradients, for sessions of all lengths, ties and padding."""
    x = jagged(seed, rows, events)
    draw = torch.Generator().manual_seed(seed)
    mixes = attend_where(intra_mask(x, x.causal), rotary), SessionBlocks.of(x, x.causal, rotary).mix
    qkv = torch.randn(*x.h_item.shape, 3, 2, 4, generator=draw)
    weight = torch.randn(*x.h_item.shape, 8, generator=draw) * x.h_real[..., None]
    found = []
    for mix in mixes:
        given_qkv = qkv.clone().requires_grad_()
        mixed = mix(given_qkv)
        (mixed * weight).sum().backward()
        found.append((mixed[x.h_real], given_qkv.grad))
    for masked, alone in zip(*found, strict=True):
        torch.testing.assert_close(alone, masked, rtol=1e-4, atol=1e-5)


def test_what_a_session_says_does_not_depend_on_the_rest_of_its_batch_to_the_bit() -> None:
    x = jagged(3, 3, 70)
    qkv = torch.randn(*x.h_item.shape, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    together = SessionBlocks.of(x, x.causal, False).mix(qkv)
    for row in range(3):
        one = replace(x, **{name: getattr(x, name)[[row]] for name in ("h_session", "h_real", "h_visible", "h_item")})
        alone = SessionBlocks.of(one, x.causal[[row]], False).mix(qkv[[row]])
        assert torch.equal(alone[0], together[row])


def test_no_mask_of_short_sessions_is_as_large_as_a_map_of_a_history() -> None:
    """Of 4,096 events in sessions of 8: attention inside sessions holds 32 numbers an event, not 4,096."""
    n = 4096
    x = replace(one_session(n), h_session=(torch.arange(n) // 8)[None])
    blocks = SessionBlocks.of(x, x.causal, False)
    assert sum(allowed.numel() for allowed in blocks.allowed) == n // 8 * 16 * 16


@pytest.mark.parametrize("causal", [False, True])
def test_rows_do_not_influence_one_another(sem: Sem, causal: bool) -> None:
    batch = random_batch(4, 9, 2, seed=8)
    tokens = torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(1))
    form = torch.full((4,), causal)
    with torch.no_grad():
        together = sem(tokens, inputs(batch), None, form)
        for row in range(4):
            alone = inputs(rows_of(batch, np.array([row])))
            for all_rows, own in zip(together, sem(tokens[[row]], alone, None, form[:1]), strict=True):
                torch.testing.assert_close(own[0], all_rows[row], rtol=1e-5, atol=1e-5)
            padded = sem(F.pad(tokens[[row]], (0, 0, 0, 5)), widened(alone, 5, 0), None, form[:1])
            for all_rows, own in zip(together, padded, strict=True):
                torch.testing.assert_close(own[0, :9], all_rows[row], rtol=1e-5, atol=1e-5)
