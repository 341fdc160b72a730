"""Events and candidates as vectors: item + action + side features + time, in one space for both stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from hpgr.config import Model
from hpgr.model.inputs import Inputs, tiles
from hpgr.model.noise import Dropout, Noise
from hpgr.model.pgsa import visible_mask
from hpgr.model.timing import time_before, time_bucket
from hpgr.schema import LIST_PREFIX, MASK, NO_ACTION, PAD, Array

MATCH_COUNTS, MATCH_PLACES = 6, 8


@dataclass(frozen=True)
class Sizes:
    """What a model must know of the prepared log: table sizes, and features by stream in column order.

    `categories` maps a categorical feature to its number of indices; `first_item` is where the catalogue begins
    in the item table of `items` rows; `actions` counts action indices; `base_rate` is the training click rate, and
    `train_actions` counts training impressions by label and, of that, by what was done with them (action index);
    `item_prior` is the `prior` of `item_rates` by which these may be believed, infinite: not at all.
    """

    items: int
    first_item: int
    actions: int
    categories: dict[str, int]
    h_cat: tuple[str, ...]
    h_num: tuple[str, ...]
    t_cat: tuple[str, ...]
    t_num: tuple[str, ...]
    base_rate: float
    train_actions: tuple[tuple[int, ...], ...]
    item_prior: float

    @property
    def t_own(self) -> tuple[str, ...]:
        """Candidates' numbers without those of their lists, which come last."""
        return tuple(name for name in self.t_num if not name.startswith(LIST_PREFIX))

    @property
    def graded(self) -> bool:
        """Whether what was done with a training impression tells more than its label, as ratings do.

        Of one label there are two actions, each of one in a hundred of its impressions: a stray row makes no model.
        """
        return any(sum(n > sum(of) / 100 for a, n in enumerate(of) if a != NO_ACTION) > 1 for of in self.train_actions)

    @property
    def misses_known(self) -> bool:
        """Whether histories hold the training impressions of either label, nine in ten at least: only then do they tell
        how much a user clicks, and not what alone."""
        return all(10 * of[NO_ACTION] <= sum(of) > 0 for of in self.train_actions)

    @property
    def chosen(self) -> bool:
        """Whether histories hold what users chose, such as what they rated or clicked, and not all that a site showed
        them: how one of the latter goes on tells the site's lists more than taste [D]."""
        return self.graded or not self.misses_known

    def item_rates(self, items: pa.Table, prior: float) -> Array:
        """Training click rate by item index [items], `prior` impressions at the base rate beside an item's own.

        `items` is the vocabulary's table, with `shown` and `clicked`; what is not of the catalogue has the base rate.
        """
        clicked, shown = (items.column(name).to_numpy().astype(np.float64) for name in ("clicked", "shown"))
        known = (clicked + prior * self.base_rate) / (shown + prior)
        return np.concatenate([np.full(self.first_item, self.base_rate), known])

    def action_rates(self, prior: float) -> Array:
        """Training click rate by action [actions], likewise; an impression without an action tells nothing of one."""
        known = np.array(self.train_actions, np.float32)
        known[:, NO_ACTION] = 0
        return (known[1] + prior * self.base_rate) / (known.sum(0) + prior)


class Features(nn.Module):
    """Sum of a token's side features; tables are shared by the streams that show the same feature."""

    def __init__(self, sizes: Sizes, width: int) -> None:
        super().__init__()
        shown = set(sizes.h_cat) | set(sizes.t_cat)
        self.tables = nn.ModuleDict(
            {_key(n): nn.Embedding(s, width) for n, s in sizes.categories.items() if n in shown}
        )
        numeric = dict.fromkeys([*sizes.h_num, *sizes.t_own])
        self.slopes = nn.ParameterDict({_key(n): nn.Parameter(torch.randn(width) * 0.02) for n in numeric})
        self.missing = nn.ParameterDict({_key(n): nn.Parameter(torch.zeros(width)) for n in numeric})

    def forward(
        self, cat: Tensor, num: Tensor, cat_names: tuple[str, ...], num_names: tuple[str, ...]
    ) -> Tensor | float:
        """[B, T, F] categorical indices and [B, T, G] standardised numbers (NaN = missing) -> [B, T, D]."""
        out: Tensor | float = 0.0
        for i, name in enumerate(cat_names):
            out = out + self.tables[_key(name)](cat[..., i])
        for i, name in enumerate(num_names):
            gone = num[..., i, None].isnan()
            out = out + torch.where(
                gone, self.missing[_key(name)], num[..., i, None].nan_to_num() * self.slopes[_key(name)]
            )
        return out


def _key(name: str) -> str:
    """Module names may not hold dots; no two names become one."""
    return "f_" + name.replace("_", "__").replace(".", "_d")


class EventEncoder(nn.Module):
    """Tokens of both streams. Stage 1 trains it, stage 2 inherits it.

    A masked event shows the MASK item and its time, and neither action nor features [D].
    """

    def __init__(self, config: Model, sizes: Sizes) -> None:
        super().__init__()
        self.sizes, self.buckets = sizes, config.time_buckets
        self.item = nn.Embedding(sizes.items, config.width, padding_idx=PAD)
        self.action = nn.Embedding(sizes.actions, config.width, padding_idx=NO_ACTION)
        self.gap = nn.Embedding(config.time_buckets + 1, config.width)
        self.features = Features(sizes, config.width)
        self.norm = nn.LayerNorm(config.width)
        self.dropout = Dropout(config.dropout)
        for table in self.modules():
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, std=0.02)
                if table.padding_idx is not None:
                    nn.init.zeros_(table.weight[table.padding_idx])

    def history(self, x: Inputs, noise: Noise | None) -> Tensor:
        """History tokens: [B, N, D]."""
        shown = ~x.h_masked[..., None]
        token = self.item(x.h_item.masked_fill(x.h_masked, MASK))
        token = token + self.action(x.h_action) * shown + self._gap(x.h_time, x, x.h_visible)
        extra = self.features(x.h_cat, x.h_num, self.sizes.h_cat, self.sizes.h_num)
        return self.dropout(self.norm(token + extra * shown), noise)

    def candidates(self, x: Inputs, noise: Noise | None, match: Tensor | float) -> Tensor:
        """Candidate tokens, never with action or label: [B, M, D]. `match` is added as it is."""
        token = self.item(x.c_item) + self._gap(x.c_time, x, x.c_visible) + match
        token = token + self.features(x.c_cat, x.c_num, self.sizes.t_cat, self.sizes.t_own)
        return self.dropout(self.norm(token), noise, stream=1)

    def _gap(self, time: Tensor, x: Inputs, visible: Tensor) -> Tensor:
        """Time since the last visible event; index 0 is "there is none"."""
        bucket = 1 + time_bucket(time - time_before(x.h_time, visible), self.buckets)
        return self.gap(bucket * (visible > 0))


def own_events(x: Inputs) -> Iterator[Tensor]:
    """Which visible events are of the candidates' own items: [B, T, N] booleans, a tile of candidates at a time."""
    rows, n = x.h_item.shape
    for tile in tiles(rows, x.c_item.shape[1], n):
        yield (x.c_item[:, tile, None] == x.h_item[:, None, :]) & visible_mask(x.c_visible[:, tile], n)


@dataclass(frozen=True)
class Matches:
    """Visible past events of exactly a candidate's item: how many, and of the last one (all 0 where there is none) its
    time, its action, and its place counted back from 1, the last event that the candidate sees. [B, M] each."""

    count: Tensor
    time: Tensor
    action: Tensor
    back: Tensor


class MatchFeatures(nn.Module):
    """How often the user engaged with a candidate, and when, how and how many events ago for the last time, in the
    visible past [D].

    Exact matches that attention would have to find by dot product; unknown items match by their hash bucket.
    """

    def __init__(self, width: int, buckets: int, actions: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.count = nn.Embedding(MATCH_COUNTS, width)
        self.age = nn.Embedding(buckets + 1, width)
        self.action = nn.Embedding(actions, width)
        self.back = nn.Embedding(MATCH_PLACES, width)
        for table in (self.count, self.age, self.action, self.back):
            nn.init.zeros_(table.weight)

    def forward(self, time: Tensor, of: Matches) -> Tensor:
        """Candidates' times and their matches: [B, M] each -> [B, M, D]."""
        age = (1 + time_bucket(time - of.time, self.buckets)) * (of.count > 0)
        count, back = _log_bucket(of.count, MATCH_COUNTS), _log_bucket(of.back, MATCH_PLACES)
        return self.count(count) + self.age(age) + self.action(of.action) + self.back(back)


def _log_bucket(n: Tensor, buckets: int) -> Tensor:
    """0, 1, then powers of two up to the last bucket: [...]."""
    return torch.log2(1 + n.float()).ceil().long().clamp(max=buckets - 1)
