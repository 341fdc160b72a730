"""The flat HSTU as the field's standard retrieval model: predict each event's item from all events before it.

The objective of HSTU's own experiments on public logs (arXiv 2402.17152, section 4.1.1): left to right, softmax over
(sampled) items. Events of one second are in their stable order and, as in the published models, do inform one another
in training [D], and in evaluation where the split leaves one out (see `next_item_windows`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpgr.config import Config
from hpgr.model.base import ItemModel
from hpgr.model.embedding import Sizes
from hpgr.model.hstu import HstuEncoder
from hpgr.model.inputs import Inputs
from hpgr.model.noise import Noise, number_sites
from hpgr.model.pgsa import visible_mask
from hpgr.model.relation import relate


class NextItemModel(ItemModel):
    """Dense HSTU over the history, left to right; the state of a place is the encoding of the event before it."""

    def __init__(self, config: Config, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.config, self.window = config.model, config.stream.window
        self.encoder = HstuEncoder(config.model, config.stream.window)
        self.start = nn.Parameter(torch.zeros(config.model.width))
        number_sites(self)

    def encode(self, x: Inputs, noise: Noise | None = None) -> Tensor:
        before = torch.arange(x.h_item.shape[1], device=x.h_item.device).expand_as(x.h_item)
        weights = visible_mask(before, before.shape[1])
        relation = relate(x, x.h_item, x.h_time, before, weights, self.config, self.window)
        encoded = self.encoder.outputs(self.events.history(x, noise), relation, noise)
        first = self.start.expand(len(encoded), 1, -1)
        return self.head(torch.cat([first, encoded[:, :-1]], 1))

    def asked(self, x: Inputs) -> Tensor:
        return x.h_real
