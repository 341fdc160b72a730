"""Stage 1 of HPGR: session-based masked item modelling (paper, stage 1), and what was done with the items [D]."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpgr.config import Config
from hpgr.model.base import ItemModel
from hpgr.model.embedding import Sizes
from hpgr.model.inputs import Inputs
from hpgr.model.noise import Noise, number_sites
from hpgr.model.sem import Sem
from hpgr.schema import NO_ACTION, OOV_ACTION


class MaskedItemModel(ItemModel):
    """Predict each hidden item from its masked surroundings, and, told the item, what the user did with it.

    The second question [D] makes vectors of what is liked together, not only of what comes together; where items come
    in a site's order, as films to be rated do, that is the difference between a neighbour and a page number.
    """

    def __init__(self, config: Config, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.sem = Sem(config.model)
        self.gate = nn.Parameter(torch.zeros(config.model.width))
        self.action_weight = config.stage1.action_weight if sizes.actions > OOV_ACTION + 2 else 0.0
        if self.action_weight:
            self.action_head = ActionHead(config.model.width, sizes.actions)
        number_sites(self)

    def encode(self, x: Inputs, noise: Noise | None = None) -> Tensor:
        encoded, context = self.sem(self.events.history(x, noise), x, noise)
        return self.head(encoded + torch.tanh(self.gate) * context)

    def asked(self, x: Inputs) -> Tensor:
        return x.h_masked

    def beside(self, state: Tensor, item: Tensor, action: Tensor) -> Tensor | float:
        if not self.action_weight:
            return 0.0
        logits = self.action_head(state, self.events.item(item))
        return self.action_weight * F.cross_entropy(logits.float(), action, ignore_index=NO_ACTION, reduction="sum")


class ActionHead(nn.Module):
    """Logits of actions from a place's state and the vector of the item that is there."""

    def __init__(self, width: int, actions: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(3 * width, width), nn.GELU(), nn.Linear(width, actions))

    def forward(self, state: Tensor, item: Tensor) -> Tensor:
        """[T, D], [T, D] -> [T, actions]."""
        item = self.norm(item)
        out: Tensor = self.mlp(torch.cat([state, item, state * item], -1))
        return out
