"""The best of a catalogue in chunks is the best of the whole catalogue."""

from __future__ import annotations

import pytest
import torch
from helpers_model import SIZES, inputs, random_batch, shaken, tiny

from hpgr.model.masked_item import MaskedItemModel
from hpgr.scoring.retrieval import NONE, best_items, item_vectors


@pytest.fixture(scope="module")
def model() -> MaskedItemModel:
    torch.manual_seed(0)
    built = shaken(MaskedItemModel(tiny(), SIZES))
    assert isinstance(built, MaskedItemModel)
    return built


@pytest.fixture
def states() -> torch.Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(2)).round()


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("tied", [False, True])
def test_chunks_and_ties(model: MaskedItemModel, states: torch.Tensor, chunk: int, tied: bool) -> None:
    """Of equal logits the lower index is better, in whichever chunk they are."""
    states = states * 0 if tied else states
    with torch.no_grad():
        bias = model.item_bias.clone()
        model.item_bias.copy_(bias.sign() if tied else bias)
        got = best_items(model, states, None, 6, chunk)
        logits = model.catalogue_logits(states)
        model.item_bias.copy_(bias)
    expected = torch.argsort(-logits, dim=1, stable=True)[:, :6] + SIZES.first_item
    assert torch.equal(got, expected)


@pytest.mark.parametrize("chunk", [3, 100])
def test_past_items_are_left_out_and_a_short_catalogue_ends(
    model: MaskedItemModel, states: torch.Tensor, chunk: int
) -> None:
    x = inputs(random_batch(3, 12, 5, seed=4))
    with torch.no_grad():
        got = best_items(model, states, x, 25, chunk)
    for row in range(3):
        past, kept = set(x.c_item[row].tolist()), [i for i in got[row].tolist() if i != NONE]
        assert not past & set(kept)
        assert len(kept) == SIZES.items - SIZES.first_item - len({i for i in past if i >= SIZES.first_item})
        assert got[row].tolist()[len(kept) :] == [NONE] * (25 - len(kept))


def test_item_vectors_end_with_the_bias(model: MaskedItemModel, states: torch.Tensor) -> None:
    logits = torch.cat([states, torch.ones(3, 1)], 1) @ torch.from_numpy(item_vectors(model)).T
    with torch.no_grad():
        torch.testing.assert_close(logits, model.catalogue_logits(states))
