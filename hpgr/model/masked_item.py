"""Stage 1 of HPGR: session-based masked item modelling (paper, stage 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpgr.config import Config
from hpgr.model.base import ItemModel
from hpgr.model.embedding import Sizes
from hpgr.model.inputs import Inputs
from hpgr.model.noise import Noise, number_sites
from hpgr.model.sem import Sem


class MaskedItemModel(ItemModel):
    """Predict each hidden item from its masked surroundings."""

    def __init__(self, config: Config, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.sem = Sem(config.model)
        self.gate = nn.Parameter(torch.zeros(config.model.width))
        number_sites(self)

    def encode(self, x: Inputs, noise: Noise | None = None) -> Tensor:
        encoded, context = self.sem(self.events.history(x, noise), x, noise)
        return self.head(encoded + torch.tanh(self.gate) * context)

    def asked(self, x: Inputs) -> Tensor:
        return x.h_masked
