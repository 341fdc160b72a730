"""Answers made from encoded candidates: whether there is a click, and what else is done with the item [D].

Shapes: B rows, M candidates, D width, A actions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpgr.model.embedding import Sizes
from hpgr.model.inputs import Inputs
from hpgr.schema import NO_ACTION, NO_LABEL


def click_head(width: int, base_rate: float) -> nn.Sequential:
    """Logit of a click from a candidate's encoding; it starts at the base rate."""
    click = nn.Linear(width, 1)
    nn.init.constant_(click.bias, math.log(base_rate / (1 - base_rate)))
    return head(width, click)


def head(width: int, last: nn.Linear) -> nn.Sequential:
    """Encodings [..., D] -> logits [..., outputs of `last`]."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), last)


class ActionAnswers(nn.Module):
    """What a user does with a candidate, such as how many stars he gives it, and what that tells of a click.

    Actions that come with a click alone and those that come without give its log-odds. That is a second answer, of the
    encoder alone, while the click's own leans on what is added to it (`model.asvd`, `model.sem.user_vector`). Each is
    learnt as if there were no other, so they err apart and their mean errs less [D]; learnt as one sum they would not.
    Where actions tell no more than the label, the two actions are to click and not to.

    Answers start at the actions' rates in training.
    """

    clicked: Tensor
    missed: Tensor
    share: Tensor

    def __init__(self, width: int, sizes: Sizes) -> None:
        super().__init__()
        self.graded, counts = sizes.graded, torch.tensor(sizes.train_actions)
        labels = counts.sum(1).clamp(min=1).diag()
        missed, clicked = known = counts.index_fill(1, torch.tensor(NO_ACTION), 0) if self.graded else labels
        last, rates = nn.Linear(width, known.shape[1]), known.sum(0) + 1
        with torch.no_grad():
            last.bias.copy_((rates / rates.sum()).log())
        self.head = head(width, last)
        self.register_buffer("clicked", clicked > missed, persistent=False)
        self.register_buffer("missed", missed > clicked, persistent=False)
        self.register_buffer("share", torch.tensor(0.0))
        self.tell = sizes.misses_known or not self.graded
        """Whether they tell of clicks: where histories leave out what was not clicked, its ratings are never asked."""

    def forward(self, encoded: Tensor) -> Tensor:
        """Logits of actions: [B, M, D] -> [B, M, A]."""
        out: Tensor = self.head(encoded).float()
        return out

    def loss(self, encoded: Tensor, x: Inputs) -> Tensor:
        """Cross-entropy summed over labelled candidates of which it is known what was done with them."""
        known = x.c_real & (x.c_label >= 0)
        if self.graded:
            known = known & (x.c_action != NO_ACTION)
        done = torch.where(known, x.c_action if self.graded else x.c_label, NO_LABEL)
        return F.cross_entropy(self(encoded).flatten(0, 1), done.flatten(), ignore_index=NO_LABEL, reduction="sum")

    def mixed(self, logits: Tensor, encoded: Tensor) -> Tensor:
        """Logits of a click [B, M], moved by `share` to what the actions tell."""
        if not self.tell:
            return logits
        actions = self(encoded)
        least = torch.finfo(actions.dtype).min
        clicked, missed = (actions.masked_fill(~kind, least).logsumexp(-1) for kind in (self.clicked, self.missed))
        return torch.lerp(logits, clicked - missed, self.share)
