"""Logistic regression on position, popularity and context: what a table of counts knows; the floor of a comparison."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from hpgr.config import Config
from hpgr.model.base import ClickModel, Past, visible_matches
from hpgr.model.embedding import Features, MatchFeatures, Sizes
from hpgr.model.inputs import Inputs
from hpgr.model.noise import Noise
from hpgr.model.timing import time_before, time_bucket


class LogisticClick(ClickModel):
    """A weight for each value of a candidate's features, for its age after the last event, for the log of how often
    its item was engaged with and shown in training time and, with `match_features`, for how often, when and how the
    user engaged with it. Nothing is learnt of single items or users."""

    popularity: Tensor

    def __init__(self, config: Config, sizes: Sizes) -> None:
        super().__init__(config)
        self.sizes, self.first_item = sizes, sizes.first_item
        self.match = MatchFeatures(1, config.model.time_buckets, sizes.actions) if config.model.match_features else None
        self.features = Features(sizes, 1)
        self.gap = nn.Embedding(config.model.time_buckets + 1, 1)
        self.popular = nn.Linear(2, 1)
        for table in (self.gap.weight, *self.features.tables.parameters()):
            nn.init.zeros_(table)
        nn.init.constant_(self.popular.bias, math.log(sizes.base_rate / (1 - sizes.base_rate)))
        self.register_buffer("popularity", torch.zeros(sizes.items, 2))

    def know_items(self, items: pa.Table) -> None:
        """Logs of counts, standardised over the catalogue; unknown items have those of a count of nought."""
        counts = np.stack([items.column(name).to_numpy() for name in ("count", "shown")], 1).astype(np.float64)
        logs = np.log1p(np.concatenate([np.zeros((self.first_item, 2)), counts]))
        known = logs[self.first_item :]
        spread = known.std(0) if len(known) else np.zeros(2)
        scale = np.where(spread > 1e-6, spread, 1.0)  # counts that are alike tell nothing of unknown items
        standard = (logs - known.mean(0)) / scale if len(known) else logs
        self.popularity.copy_(torch.from_numpy(standard).float())

    def past(self, x: Inputs, noise: Noise | None) -> Past:
        return Past([])

    def read(self, past: Past, x: Inputs, noise: Noise | None = None, shares: list[Tensor] | None = None) -> Tensor:
        """As in `ClickModel`; it has no attention shares to show."""
        assert shares is None, "attention shares are shown for hstu and hpgr"
        logit = self.popular(self.popularity[x.c_item]) + self._gap(x)
        logit = logit + self.features(x.c_cat, x.c_num, self.sizes.t_cat, self.sizes.t_own)
        if self.match is not None:
            logit = logit + self.match(x.c_time, visible_matches(x))
        return logit[..., 0].float()

    def _gap(self, x: Inputs) -> Tensor:
        bucket = 1 + time_bucket(x.c_time - time_before(x.h_time, x.c_visible), self.config.time_buckets)
        return self.gap(bucket * (x.c_visible > 0))

    def kept_keys(self, x: Inputs) -> Tensor:
        """None: the past is read by exact match alone."""
        return torch.zeros_like(x.c_visible)
