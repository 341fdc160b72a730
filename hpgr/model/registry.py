"""Models by the names that the configuration gives them."""

from __future__ import annotations

from collections.abc import Callable

from hpgr.config import Config
from hpgr.model.base import ClickModel, ItemModel, TokenClick
from hpgr.model.din import DinClick
from hpgr.model.embedding import Sizes
from hpgr.model.hpgr import HpgrClick, HstuClick
from hpgr.model.logistic import LogisticClick
from hpgr.model.masked_item import MaskedItemModel
from hpgr.model.mtgr import MtgrClick
from hpgr.model.next_item import NextItemModel

CLICK_MODELS: dict[str, Callable[[Config, Sizes], ClickModel]] = {
    "hpgr": HpgrClick,
    "hstu": HstuClick,
    "mtgr": MtgrClick,
    "din": DinClick,
    "logistic": LogisticClick,
}
ITEM_MODELS: dict[str, type[ItemModel]] = {"masked_item": MaskedItemModel, "next_item": NextItemModel}


def click_model(config: Config, sizes: Sizes) -> ClickModel:
    """Stage 2's model, by `model.name`."""
    model = CLICK_MODELS[config.model.name](config, sizes)
    if isinstance(model, TokenClick):
        model.ask_actions(config, sizes)
    return model


def item_model(config: Config, sizes: Sizes) -> ItemModel:
    """Stage 1's model, by `stage1.objective`."""
    return ITEM_MODELS[config.stage1.objective](config, sizes)
