"""Asymmetric-SVD inside HPGR [D]: what the user did beyond what is usual for the items, compared with the candidate.

Shapes: B rows, M candidates, N history events, F factors, A actions.
"""

from __future__ import annotations

import math

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpgr.config import Asvd
from hpgr.model.embedding import Sizes, own_events
from hpgr.model.inputs import Inputs
from hpgr.model.noise import Dropout, Noise

TABLES = ("asvd.past.weight", "asvd.met.own.weight", "asvd.candidate.weight", "asvd.bias.weight")
"""Names of its tables of items in a click model."""
PRIOR = 5.0
"""Impressions at the base rate that stand beside an item's own, or an action's, in what is usual of it."""
HABIT = 10.0
"""Most that habit starts at: far above a low base rate, where a few clicks put a user, the slope promises too much."""
STD, GAIN, BY_VECTOR = 0.01, 5.0, 0.1
"""Spread of the tables' factors at the start, what those count, so that they learn faster than the rest of the model at
its rate, and spread of the maps of item vectors."""


class AsymmetricSvd(nn.Module):
    """A logit beside the encoder's: Asymmetric-SVD (Koren 2008, section 4) over the visible past [D].

    Each event j of the history is worth r_j = value(action_j) - usual(item_j): how much better the user took the item
    than its training click rate lets expect. With item factors p, q and y, and n visible events of other items than i,

        logit = bias_i + habit * sum_j r_j / (n + PRIOR) + p_i . sum_j (r_j q_j + y_j) / sqrt(n + 1):

    q says what liking an item tells of others, y what having met it does, however it was taken. There is y only where
    actions tell more than the label, as ratings do: who rates an item has chosen it, while what is shown and clicked or
    not the site chose, and y learns its lists by heart.

    It starts near the best scorer without a model, the click rates of item and user, as from nought a log of few steps
    would not get there. Biases start at the log-odds of the items' training click rates over those of the base rate,
    drawn to it as far as items differ by chance alone, and further where validation says that they promise too much
    (they have seen the impressions to learn from, as any learnt bias has); habit at half the slope of the log-odds, as
    the encoder learns of users' habits too, and no further than HABIT. Where histories leave out what was not clicked,
    they do not tell how much a user clicks, and habit starts at nought.

    The r_j of the very item are left out: what is usual of it was counted over training impressions, the one to learn
    from among them, and would tell its label. The match features tell how the user took the item before.

    PGSA asks which past events are like the candidate and drops the rest; here all of them count, each a little, at a
    cost linear in N. Factors are an item's own, learnt from clicks, plus a learnt map of the vector that chooses its
    anchors, where the model has such: stage 1's vectors say which items come together, the maps what liking one says
    of another. An item's own factors are many for its few impressions: dropout of the products of p_i with the sum is
    what keeps them from learning those by heart.
    """

    usual: Tensor

    def __init__(self, config: Asvd, sizes: Sizes, vectors: int) -> None:
        """`vectors` is the width of the item vectors that `forward` gets; 0 is without them."""
        super().__init__()
        self.sizes = sizes
        self.past = nn.Embedding(sizes.items, config.factors)
        self.candidate = nn.Embedding(sizes.items, config.factors)
        self.bias = nn.Embedding(sizes.items, 1)
        maps = [nn.Linear(vectors, config.factors, bias=False) for _ in range(2 if vectors else 0)]
        for each in maps:
            nn.init.normal_(each.weight, std=BY_VECTOR)
        self.maps = nn.ModuleList(maps)
        for table in (self.past, self.candidate):
            nn.init.normal_(table.weight, std=STD)
        self.met = Met(config, sizes, vectors) if sizes.graded else None
        nn.init.zeros_(self.bias.weight)
        self.value = nn.Parameter(torch.from_numpy(sizes.action_rates(PRIOR)))
        slope = 1 / (sizes.base_rate * (1 - sizes.base_rate))
        self.habit = nn.Parameter(torch.tensor(min(slope / 2, HABIT) if sizes.misses_known else 0.0))
        self.dropout = Dropout(config.dropout)
        self.register_buffer("usual", torch.full((sizes.items,), sizes.base_rate))

    def know_items(self, items: pa.Table) -> None:
        """Click rates of the catalogue in training, those of rarely shown items near the base rate: what is usual, and
        where biases start."""
        base, prior = self.sizes.base_rate, self.sizes.item_prior
        self.usual.copy_(torch.from_numpy(self.sizes.item_rates(items, PRIOR)))
        if math.isfinite(prior):
            start = torch.from_numpy(self.sizes.item_rates(items, prior)).logit() - math.log(base / (1 - base))
            with torch.no_grad():
                self.bias.weight.copy_(start[:, None])

    def forward(self, x: Inputs, vectors: tuple[Tensor, Tensor] | None, noise: Noise | None) -> Tensor:
        """Logits to add to the candidates': [B, M]. `vectors` are the candidates' and the history's, [B, M, D] and
        [B, N, D]."""
        own, itself = GAIN * self.candidate(x.c_item), GAIN * self.past(x.c_item)
        past = GAIN * self.past(x.h_item)
        if vectors is not None:
            of_candidate, of_event = self.maps
            own, itself = own + of_candidate(vectors[0]), itself + of_event(vectors[0])
            past = past + of_event(vectors[1])
        beyond = self.value[x.h_action] - self.usual[x.h_item]
        events = beyond[..., None] * F.pad(past, (1, 0), value=1.0)
        done = _actions_on_itself(x, len(self.value))
        times = done.sum(-1)
        same = ((done * self.value).sum(-1) - times * self.usual[x.c_item])[..., None]
        seen = _summed(events, x.c_visible) - same * F.pad(itself, (1, 0), value=1.0)
        n, habit, taste = (x.c_visible - times)[..., None], seen[..., :1], seen[..., 1:]
        likeness = self.dropout(own * taste, noise, stream=1).sum(-1, keepdim=True)
        if self.met is not None:
            likeness = likeness + self.met(own, x, None if vectors is None else vectors[1], noise)
        out = self.bias(x.c_item) + self.habit * habit / (n + PRIOR) + likeness / (n + 1).sqrt()
        return out[..., 0].float()


class Met(nn.Module):
    """p_i . sum_j y_j: what the items that a user met tell of a candidate, however they were taken.

    Factors y are an item's own, plus a map of its vector. Products are dropped apart from those of tastes.
    """

    def __init__(self, config: Asvd, sizes: Sizes, vectors: int) -> None:
        super().__init__()
        self.own = nn.Embedding(sizes.items, config.factors)
        self.map = nn.Linear(vectors, config.factors, bias=False) if vectors else None
        self.dropout = Dropout(config.dropout)
        nn.init.normal_(self.own.weight, std=STD)
        if self.map is not None:
            nn.init.normal_(self.map.weight, std=BY_VECTOR)

    def forward(self, candidate: Tensor, x: Inputs, vectors: Tensor | None, noise: Noise | None) -> Tensor:
        """Factors p of the candidates, [B, M, F], and the history's vectors, [B, N, D] -> [B, M, 1]."""
        past = GAIN * self.own(x.h_item)
        if vectors is not None and self.map is not None:
            past = past + self.map(vectors)
        return self.dropout(candidate * _summed(past, x.c_visible), noise, stream=1).sum(-1, keepdim=True)


def _summed(events: Tensor, visible: Tensor) -> Tensor:
    """Sums over the events that candidates see: [B, N, C], [B, M] -> [B, M, C]."""
    upto = F.pad(events.cumsum(1), (0, 0, 1, 0))
    return upto[torch.arange(upto.shape[0], device=upto.device)[:, None], visible]


def _actions_on_itself(x: Inputs, actions: int) -> Tensor:
    """How often each action was done with the candidates' own items in the visible past: [B, M, A], float32."""
    kinds = F.one_hot(x.h_action, actions).float()
    with torch.autocast(kinds.device.type, enabled=False):  # bf16 counts to 256
        return torch.cat([same.float() @ kinds for same in own_events(x)], 1)
