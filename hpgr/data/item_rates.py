"""How far the click rates of items in training are to be believed: models may start near them [D].

A prior is a number of impressions at the base rate that stand beside an item's own. Legend: V catalogue, P priors.
"""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa

from hpgr.schema import VALIDATION, Array, Timelines

WEAKER = (1.0, 4.0, 16.0, 64.0, math.inf)
"""By how much more than training calls for rates may be drawn to the base rate."""


def item_prior(items: pa.Table, base_rate: float) -> float:
    """The prior that items' rates call for: the beta-binomial's, by moments (Kleinman 1973), one impression at least.

    It is infinite where they differ by no more than chance. `items` is the vocabulary's table [V].
    """
    clicked, shown = _impressions(items)
    clicked, shown = clicked[shown > 0], shown[shown > 0]
    more = shown.sum() - len(shown)
    if not more:
        return math.inf
    chance = base_rate * (1 - base_rate)
    beyond = ((clicked - shown * base_rate) ** 2 / shown).sum() / chance - len(shown)
    alike = beyond / more  # correlation of an item's impressions
    return math.inf if alike <= 0 else max(1.0, float(1 / alike - 1))


def rate_losses(timelines: Timelines, items: pa.Table, first_item: int, base_rate: float, priors: Array) -> Array:
    """Log loss of the validation impressions by their items' training click rates, summed for each prior: [P].

    Rates of training can promise what does not come again: where users come back to items, an item's rate is of the few
    who met it, and others come after them. What is of no item in the catalogue plays no part.
    """
    used = (timelines.t_split == VALIDATION) & (timelines.t_label >= 0) & (timelines.t_item >= first_item)
    clicked, shown = (of[timelines.t_item[used] - first_item, None] for of in _impressions(items))
    rate = base_rate + (clicked - shown * base_rate) / (shown + priors)
    chance = np.where(timelines.t_label[used, None] == 1, rate, 1 - rate)
    return np.asarray(-np.log(chance).sum(0))


def _impressions(items: pa.Table) -> tuple[Array, Array]:
    """Training clicks and impressions of each item [V]."""
    clicked, shown = (items.column(name).to_numpy().astype(np.float64) for name in ("clicked", "shown"))
    return clicked, shown
