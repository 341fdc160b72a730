"""Summaries of what the user did with a candidate's anchors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers_model import SIZES, inputs, random_batch, shaken, tiny

from hpgr.model.preference import PreferenceFeatures, nearest
from hpgr.model.registry import click_model
from hpgr.model.select import select_keys


def features(count: int = 3) -> PreferenceFeatures:
    torch.manual_seed(0)
    out = PreferenceFeatures(count, SIZES.actions, 8)
    torch.nn.init.normal_(out.action)
    return out


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_summaries_equal_the_loop(impl: str) -> None:
    """Over the K most relevant past events, softmax by sharpness, in plain Python; no past is nothing."""
    x, made = inputs(random_batch(3, 12, 6, seed=1)), features()
    x.c_visible[0, 0] = 0
    vectors = torch.nn.functional.normalize(torch.randn(SIZES.items, 8), dim=-1)
    query, key, rows = vectors[x.c_item], vectors[x.h_item], torch.arange(3)[:, None, None]
    place, real = nearest(query, key, x.c_visible, 4, impl)
    got = made((query @ key.transpose(1, 2)).gather(-1, place), x.h_action[rows, place], real)
    pasts = set()
    for b in range(3):
        for m in range(6):
            past = range(int(x.c_visible[b, m]))
            pasts.add(min(len(past), 5))
            near = sorted(past, key=lambda j: (float(query[b, m] @ key[b, j]), j), reverse=True)[:4]
            expected = torch.zeros(8)
            for t in range(3):
                sharpness = math.exp(float(made.log_sharpness[t].detach()))
                powers = [math.exp(sharpness * float(query[b, m] @ key[b, j])) for j in near]
                for j, power in zip(near, powers, strict=True):
                    expected += power / sum(powers) * made.action[t, x.h_action[b, j]].detach()
            torch.testing.assert_close(got[b, m].detach(), expected, rtol=1e-4, atol=1e-5)
    assert {0, 5} < pasts


def test_they_start_at_nothing_and_learn() -> None:
    x, made = inputs(random_batch(2, 8, 3)), PreferenceFeatures(4, SIZES.actions, 8)
    action, real = x.h_action[:, None, :5].expand(-1, 3, -1), torch.ones(2, 3, 5, dtype=torch.bool)
    out = made(torch.rand(2, 3, 5), action, real)
    assert not out.any()
    out.sum().backward()
    assert made.action.grad is not None
    assert made.action.grad.any()
    assert made.log_sharpness.detach().exp()[[0, -1]].tolist() == pytest.approx([2.0, 32.0])


def scores(**pgsa: Any) -> torch.Tensor:
    torch.manual_seed(0)
    model = shaken(click_model(tiny(model={"pgsa": {"anchors": "live", **pgsa}}), SIZES))
    with torch.no_grad():
        out: torch.Tensor = model(inputs(random_batch(3, 12, 5))).scores
    return out


def test_summaries_belong_to_hpgr_with_or_without_sparse_attention() -> None:
    for enabled in (True, False):
        assert (scores(enabled=enabled) != scores(enabled=enabled, summaries=0)).any()
    names = [name for name, _ in click_model(tiny(model={"name": "hstu"}), SIZES).named_parameters()]
    assert not any("preference" in name for name in names)


def test_forms_agree() -> None:
    torch.testing.assert_close(scores(impl="reference"), scores(impl="gather"), rtol=1e-4, atol=1e-5)


def test_a_candidates_summaries_do_not_depend_on_what_others_see() -> None:
    """To the last bit: the fast choice of anchors has no order of its own."""
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(2, 4, 8, generator=generator), torch.randn(2, 200, 8, generator=generator)
    action, made, got = torch.randint(1, SIZES.actions, (2, 200), generator=generator), features(), []
    for others in (50, 200):
        visible = torch.full((2, 4), others)
        visible[0, 0] = 50
        place, real = nearest(query, key, visible, 32, "auto")
        got.append(
            made((query @ key.transpose(1, 2)).gather(-1, place), action[torch.arange(2)[:, None, None], place], real)[
                0, 0
            ]
        )
    assert torch.equal(*got)


@pytest.mark.parametrize(
    ("top_k", "sigma", "max_keys"), [(4, 0.0, None), (4, 1.0, 4), (32, 40.0, None), (3, 1000.0, 70)]
)
def test_kept_keys_begin_with_the_anchors(top_k: int, sigma: float, max_keys: int | None) -> None:
    """So candidates need not choose twice: the same places in the same order, and as many real ones."""
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(20, 8, generator=generator)
    query, key = (table[torch.randint(0, 20, (2, n), generator=generator)] for n in (9, 80))
    visible = torch.randint(0, 81, (2, 9), generator=generator)
    visible[0, 0] = 0
    ours = select_keys(query, key, visible, top_k, sigma, max_keys).anchors(top_k)
    theirs = nearest(query, key, visible, top_k, "reference")
    assert torch.equal(ours[1], theirs[1])
    assert torch.equal(ours[0].where(ours[1], -1), theirs[0].where(theirs[1], -1))


@pytest.mark.parametrize("pgsa", [{"max_keys": 2}, {"max_keys": 3}, {"scope": "candidate", "sigma": 0.0}])
def test_capped_or_not_summaries_are_of_all_anchors(pgsa: dict[str, Any]) -> None:
    torch.testing.assert_close(scores(impl="reference", **pgsa), scores(impl="gather", **pgsa), rtol=1e-4, atol=1e-5)
