"""Dropout's rate and independence, and that a row's mask depends on the row and the step alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers_model import SIZES, inputs, random_batch, rows_of, shaken, tiny, widened
from torch import nn

from hpgr.model.din import DinClick
from hpgr.model.hpgr import HpgrClick, HstuClick
from hpgr.model.masked_item import MaskedItemModel
from hpgr.model.mtgr import MtgrClick
from hpgr.model.next_item import NextItemModel
from hpgr.model.noise import Dropout, Noise, number_sites
from hpgr.model.registry import click_model

T, C = 32, 16
KEYS = np.random.default_rng(0).integers(-(2**62), 2**62, 64)


def mask(keys: np.ndarray = KEYS, seed: int = 5, site: int = 0, p: float = 0.3, t: int = T) -> torch.Tensor:
    """Kept places: [B, T, C] booleans."""
    return Noise(seed, keys, T * C).drop(torch.ones(len(keys), t, C), p, site) != 0


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1])


@pytest.mark.parametrize("p", [0.1, 0.3, 0.8])
def test_the_rate_is_p_and_the_mean_stays(p: float) -> None:
    dropped = Noise(1, KEYS, T * C).drop(torch.ones(64, T, C), p, 0)
    places = dropped.numel()
    spread = 5 * (p * (1 - p) / places) ** 0.5
    assert float((dropped == 0).double().mean()) == pytest.approx(p, abs=spread)
    assert float(dropped.double().mean()) == pytest.approx(1, abs=spread / (1 - p))
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)], rel=1e-4)
    per_row = (dropped == 0).double().mean((1, 2))
    assert (per_row - p).abs().max() < 6 * (p * (1 - p) / (T * C)) ** 0.5


@pytest.mark.parametrize("p", [1e-7, 1 - 1e-7])
def test_rates_next_to_none_and_to_all_are_rounded_to_what_can_be_drawn(p: float) -> None:
    dropped = Noise(1, KEYS, T * C).drop(torch.ones(64, T, C), p, 0)
    assert dropped.isfinite().all()
    assert float((dropped == 0).double().mean()) == pytest.approx(p, abs=1e-3)


def test_no_rate_no_change() -> None:
    x = torch.randn(64, T, C)
    assert Noise(1, KEYS, T * C).drop(x, 0.0, 0) is x


def test_rows_differ_and_are_uncorrelated() -> None:
    kept = mask().flatten(1)
    assert len({tuple(row.tolist()) for row in kept}) == len(KEYS)
    table = torch.corrcoef(kept.double()).fill_diagonal_(0)
    assert table.abs().max() < 6 / (T * C) ** 0.5


@pytest.mark.parametrize("other", [{"seed": 6}, {"site": 1}, {"site": 2}])
def test_steps_and_sites_are_uncorrelated(other: dict[str, int]) -> None:
    assert abs(correlation(mask(), mask(**other))) < 5 / (64 * T * C) ** 0.5


def test_the_same_step_and_site_give_the_same_mask() -> None:
    assert torch.equal(mask(), mask())


def test_a_rows_mask_does_not_depend_on_its_batch() -> None:
    whole = mask()
    assert torch.equal(mask(KEYS[7:8])[0], whole[7])
    assert torch.equal(mask(KEYS[::-1].copy()).flip(0), whole)
    assert torch.equal(mask(KEYS[1::2]), whole[1::2])


@pytest.mark.parametrize("t", [1, 5, 31])
def test_a_rows_mask_does_not_depend_on_padding(t: int) -> None:
    """A worker's batch is padded to its own longest row: a shorter batch has the beginning of the same mask."""
    assert torch.equal(mask(t=t), mask()[:, :t])


def test_no_pool_is_too_small() -> None:
    """Rows larger than the usual pool get a larger one."""
    keys, places = KEYS[:2], 1 << 20
    dropped = Noise(1, keys, places).drop(torch.ones(2, places // 16, 16), 0.5, 3)
    assert float((dropped == 0).double().mean()) == pytest.approx(0.5, abs=0.01)


def test_a_row_larger_than_announced_is_refused() -> None:
    """Else it would read past the pool, once in many steps."""
    with pytest.raises(AssertionError, match="places"):
        Noise(1, KEYS, T * C).drop(torch.ones(64, T + 1, C), 0.5, 0)


def test_every_site_of_a_model_has_its_own_number() -> None:
    model = click_model(tiny(), SIZES)
    sites = [m.site for m in model.modules() if isinstance(m, Dropout)]
    assert len(sites) > 4
    assert sorted(sites) == list(range(len(sites)))


def test_streams_of_a_site_have_masks_of_their_own() -> None:
    site = Dropout(0.5)
    number_sites(nn.Sequential(site))
    x, noise = torch.ones(64, T, C), Noise(5, KEYS, T * C)
    assert abs(correlation(site(x, noise, 0) != 0, site(x, noise, 1) != 0)) < 5 / (64 * T * C) ** 0.5


def test_dropout_is_still_in_eval_mode_and_without_noise() -> None:
    site, x = Dropout(0.5), torch.ones(64, T, C)
    noise = Noise(5, KEYS, T * C)
    assert site(x, None) is x
    assert (site(x, noise) == 0).any()
    assert site.eval()(x, noise) is x


@pytest.mark.parametrize("kind", [HpgrClick, HstuClick, MtgrClick, DinClick, MaskedItemModel, NextItemModel])
def test_a_rows_noisy_loss_does_not_depend_on_its_batch(kind: Any) -> None:
    """Through the whole model: the sum of rows' losses alone is the batch's, and padding changes nothing."""
    config = tiny(model={"dropout": 0.3, "sem": {"dropout": 0.3}})
    torch.manual_seed(0)
    model = shaken(kind(config, SIZES)).train()
    batch = random_batch(4, 12, 5)
    batch.h_masked[::3] = True
    places = (config.stream.window + 1) * max(config.model.width, config.model.asvd.factors)

    def loss(x: object, keys: np.ndarray) -> float:
        with torch.no_grad():
            return float(model(x, Noise(11, keys, places)).loss)

    together = loss(inputs(batch), batch.row_key)
    alone = [rows_of(batch, np.array([row])) for row in range(4)]
    assert sum(loss(inputs(b), b.row_key) for b in alone) == pytest.approx(together, rel=1e-5)
    assert loss(widened(inputs(batch), 3, 2), batch.row_key) == pytest.approx(together, rel=1e-5)
    with torch.no_grad():
        still = float(model(inputs(batch), None).loss)
    assert still != pytest.approx(together, rel=1e-3)


@pytest.mark.parametrize("kind", ["hpgr", "hstu", "mtgr", "din", MaskedItemModel, NextItemModel])
def test_no_two_places_of_a_model_share_their_masks(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both streams go through the same modules; masks that are alike would hide from both the same."""
    config = tiny(model={"dropout": 0.1, "sem": {"dropout": 0.1}} | ({"name": kind} if isinstance(kind, str) else {}))
    built = click_model(config, SIZES) if isinstance(kind, str) else kind(config, SIZES)
    sites: list[int] = []
    drop = Noise.drop
    monkeypatch.setattr(Noise, "drop", lambda self, x, p, site: sites.append(site) or drop(self, x, p, site))
    x = inputs(random_batch())
    built.train()(x, Noise(1, x.key, 1 << 12))
    assert len(sites) == len(set(sites)) > 2
