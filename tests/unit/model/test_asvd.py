"""Asymmetric-SVD beside the encoder."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers_model import SIZES, inputs, random_batch, shaken, tiny

from hpgr.config import Asvd
from hpgr.model.asvd import GAIN, HABIT, PRIOR, TABLES, AsymmetricSvd
from hpgr.model.embedding import Sizes
from hpgr.model.noise import Noise, number_sites
from hpgr.model.registry import click_model
from hpgr.schema import NO_ACTION

CATALOGUE = SIZES.items - SIZES.first_item
CLICKS = replace(SIZES, train_actions=((0, 0, 50, 0, 0), (0, 0, 0, 70, 0)))


def made(vectors: int = 0, sizes: Sizes = SIZES) -> AsymmetricSvd:
    torch.manual_seed(0)
    out = shaken(AsymmetricSvd(Asvd(factors=5, dropout=0.5), sizes, vectors))
    out.know_items(pa.table({"clicked": [3] * CATALOGUE, "shown": range(3, 3 + CATALOGUE)}))
    return out


@pytest.mark.parametrize("sizes", [SIZES, CLICKS], ids=["ratings", "clicks"])
@pytest.mark.parametrize("width", [0, 8])
def test_it_equals_the_loop(width: int, sizes: Sizes) -> None:
    """Koren's sums over the visible past in plain Python; without a past the item's bias is left."""
    x, asvd, vectors = inputs(random_batch(3, 12, 6, seed=1)), made(width, sizes), torch.randn(SIZES.items, width)
    none = torch.zeros(SIZES.items, 5)
    x.c_visible[0, 0] = 0
    with torch.no_grad():
        own, taken = (
            GAIN * table.weight + (vectors @ asvd.maps[i].weight.T if width else 0)
            for i, table in enumerate((asvd.candidate, asvd.past))
        )
        met, known = none, asvd.met
        if known is not None:
            met = GAIN * known.own.weight + (0 if known.map is None else vectors @ known.map.weight.T)
        assert met.any() == sizes.graded
        got, past, itself = asvd(x, (vectors[x.c_item], vectors[x.h_item]) if width else None, None), set(), 0
        for b in range(3):
            for m in range(6):
                seen, item = int(x.c_visible[b, m]), x.c_item[b, m]
                habit, others = 0.0, [j for j in range(seen) if x.h_item[b, j] != item]
                taste = met[x.h_item[b, :seen]].sum(0)
                n = len(others)
                for j in others:
                    beyond = float(asvd.value[x.h_action[b, j]] - asvd.usual[x.h_item[b, j]])
                    habit, taste = habit + beyond, taste + beyond * taken[x.h_item[b, j]]
                expected = float(asvd.bias.weight[item]) + float(asvd.habit) * habit / (n + PRIOR)
                expected += float(own[item] @ taste) / math.sqrt(n + 1)
                assert float(got[b, m]) == pytest.approx(expected, abs=1e-4)
                past.add(seen)
                itself += seen - n
    assert {0, 12} < past
    assert itself > 3


def test_what_was_counted_of_an_item_does_not_reach_its_own_impressions() -> None:
    """Else the label to learn would: it was counted. What saw the item before as another one's past does change."""
    x, asvd, vectors = inputs(random_batch(4, 12, 8, seed=1)), made(8), torch.randn(SIZES.items, 8)
    compared = vectors[x.c_item], vectors[x.h_item]
    with torch.no_grad():
        before = asvd(x, compared, None)
        past = torch.arange(12) < x.c_visible[..., None]
        for item in range(SIZES.first_item, SIZES.items):
            asvd.usual[item] += 0.5
            moved = (asvd(x, compared, None) - before).abs() > 1e-4
            asvd.usual[item] -= 0.5
            seen = (past & (x.h_item == item)[:, None]).any(-1)
            assert not moved[x.c_item == item].any()
            assert torch.equal(moved, seen & (x.c_item != item))
        assert ((x.c_item[:, :, None] == x.h_item[:, None]) & past).any(-1).sum() > 3


def test_what_is_usual_is_the_training_click_rate_and_the_base_rate_of_unknown_items() -> None:
    usual = made().usual
    assert usual[: SIZES.first_item].tolist() == pytest.approx([SIZES.base_rate] * SIZES.first_item)
    last = (3 + PRIOR * SIZES.base_rate) / (CATALOGUE + 2 + PRIOR)
    assert float(usual[-1]) == pytest.approx(last)


@pytest.mark.parametrize(
    ("missed", "base", "start"),
    [((0, 0, 50, 0, 0), 0.3, 0.5 / (0.3 * 0.7)), ((0, 0, 50, 0, 0), 0.01, HABIT), ((50, 0, 0, 0, 0), 0.3, 0)],
    ids=["half the slope", "a low rate", "clicks alone"],
)
def test_habit_starts_where_histories_hold_misses(missed: tuple[int, ...], base: float, start: float) -> None:
    sizes = replace(SIZES, base_rate=base, train_actions=(missed, (0, 0, 0, 30, 40)))
    assert float(AsymmetricSvd(Asvd(), sizes, 0).habit.detach()) == pytest.approx(start)


@pytest.mark.parametrize("prior", [1.0, 6.0, math.inf])
def test_biases_start_at_the_items_click_rates(prior: float) -> None:
    """As far as those may be believed."""
    base, asvd = SIZES.base_rate, AsymmetricSvd(Asvd(), replace(SIZES, item_prior=prior), 0)
    clicked = np.array([2 * (i % 3) for i in range(CATALOGUE)])
    asvd.know_items(pa.table({"clicked": clicked, "shown": [4] * CATALOGUE}))
    start = (asvd.bias.weight.detach()[:, 0].double() + math.log(base / (1 - base))).sigmoid()
    expected = (clicked + prior * base) / (4 + prior) if math.isfinite(prior) else np.full(CATALOGUE, base)
    assert start.tolist() == pytest.approx([base] * SIZES.first_item + expected.tolist())


def test_an_action_is_worth_its_click_rate_at_the_start() -> None:
    asvd = AsymmetricSvd(Asvd(), SIZES, 0)
    for action in range(SIZES.actions):
        missed, clicked = (counts[action] if action != NO_ACTION else 0 for counts in SIZES.train_actions)
        rate = (clicked + PRIOR * SIZES.base_rate) / (missed + clicked + PRIOR)
        assert float(asvd.value[action].detach()) == pytest.approx(rate)


def test_dropout_takes_products_while_training() -> None:
    x, asvd = inputs(random_batch(3, 12, 6, seed=1)), made()
    number_sites(asvd)
    noises = [Noise(seed, x.key, 12 * 5) for seed in (1, 1, 2)]
    first, again, other = (asvd.train()(x, None, noise) for noise in noises)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.equal(asvd.eval()(x, None, noises[0]), asvd(x, None, None))


def test_its_tables_are_known_by_name() -> None:
    """Else they would be updated whole, and learn at the rate of all else."""
    named = click_model(tiny(), SIZES).named_parameters()
    assert {n for n, p in named if n.startswith("asvd") and p.shape[:1] == (SIZES.items,)} == set(TABLES)


def test_hpgr_has_it_on_every_log() -> None:
    """Of clicks alone too, whose items say whom they go with."""
    assert click_model(tiny(), replace(SIZES, train_actions=((9, 0, 3, 0, 0), (9, 0, 0, 0, 5)))).asvd is not None
    assert click_model(tiny(model={"asvd": {"factors": 0}}), SIZES).asvd is None


@pytest.mark.parametrize("name", ["hstu", "mtgr", "din"])
def test_baselines_have_it_when_asked(name: str) -> None:
    x = inputs(random_batch(2, 8, 3))
    with_it = shaken(click_model(tiny(model={"name": name, "asvd": {"baselines": True}}), SIZES))
    without = click_model(tiny(model={"name": name}), SIZES)
    assert not any(key.startswith("asvd") for key in without.state_dict())
    without.load_state_dict({k: v for k, v in with_it.state_dict().items() if not k.startswith("asvd")})
    with torch.no_grad():
        beside = with_it.asvd(x, None, None)
        assert beside.abs().min() > 0
        torch.testing.assert_close(with_it(x).scores, without.eval()(x).scores + beside)
