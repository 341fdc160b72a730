"""What all models share: outputs, the next-item head of stage 1, and the click model's interface of stage 2."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpgr.config import Config
from hpgr.model.answers import ActionAnswers, click_head
from hpgr.model.asvd import AsymmetricSvd
from hpgr.model.embedding import EventEncoder, Matches, MatchFeatures, Sizes, own_events
from hpgr.model.inputs import Inputs
from hpgr.model.lists import ListFeatures
from hpgr.model.noise import Noise
from hpgr.model.pgsa import visible_mask

ITEM_TABLE = "events.item.weight"
INHERITED = ("events.", "sem.", "encoder.")
"""Parameters that stage 2 takes over from stage 1, where both have them."""
CLICKED_AGAIN = 0.3
"""Weight of asking a second time whether there was a click (`stage2.action_weight` auto): at 1 the encoder spends on it
what it could add to Asymmetric-SVD, so AUC falls where that knows more than the encoder does [D]."""


class Output(NamedTuple):
    """Sum of losses, how many items (stage 1) or clicks (stage 2) it asks, and the scores (stage 2: [B, M] logits;
    stage 1: empty). Questions asked beside those add to the sum alone."""

    loss: Tensor
    terms: Tensor
    scores: Tensor


class Negatives(NamedTuple):
    """Items drawn for the sampled softmax and the log-probability of drawing each catalogue item (logQ)."""

    items: Tensor
    log_q: Tensor


class ItemModel(nn.Module):
    """Stage 1: what a place in a history says about its item, by a softmax tied to the item table."""

    def __init__(self, config: Config, sizes: Sizes) -> None:
        super().__init__()
        width = config.model.width
        self.first_item = sizes.first_item
        self.events = EventEncoder(config.model, sizes)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.item_bias = nn.Parameter(torch.zeros(sizes.items))

    def encode(self, x: Inputs, noise: Noise | None = None) -> Tensor:
        """What each event's place says about its item, the event itself unseen: [B, N, D]."""
        raise AssertionError("a kind of ItemModel says how")

    def asked(self, x: Inputs) -> Tensor:
        """Events whose item is to be predicted: [B, N] booleans."""
        raise AssertionError("a kind of ItemModel says which")

    def forward(self, x: Inputs, noise: Noise | None = None, negatives: Negatives | None = None) -> Output:
        """Cross-entropy summed over asked events whose item is in the catalogue; full softmax without `negatives`."""
        asked = self.asked(x) & x.h_real & (x.h_item >= self.first_item)
        state, target = self.encode(x, noise)[asked], x.h_item[asked]
        if negatives is None:
            logits = self.catalogue_logits(state)
            loss = F.cross_entropy(logits.float(), target - self.first_item, reduction="sum")
        else:
            loss = self._sampled_loss(state, target, negatives)
        return Output(loss + self.beside(state, target, x.h_action[asked]), asked.sum(), state.new_zeros(0))

    def beside(self, state: Tensor, item: Tensor, action: Tensor) -> Tensor | float:
        """What else is asked of the asked events: a sum of losses to add. [T, D], [T], [T]."""
        return 0.0

    def catalogue_logits(self, state: Tensor) -> Tensor:
        """[T, D] -> [T, V of the catalogue]."""
        table = self.events.item.weight[self.first_item :]
        return state @ table.T + self.item_bias[self.first_item :]

    def _sampled_loss(self, state: Tensor, target: Tensor, negatives: Negatives) -> Tensor:
        """Sampled softmax with logQ correction (Bengio & Senecal 2008); a positive is never its own negative.

        The positive is always there, so it has no correction. The n draws stand for all other items, each with
        weight 1 / (n q), so that their sum is expected to be the full softmax's.
        """
        item, bias = self.events.item, self.item_bias  # by rows, so that its gradient may be of those alone
        times_drawn = negatives.log_q[negatives.items - self.first_item] + math.log(len(negatives.items))
        positive = (state * item(target)).sum(-1) + bias[target]
        others = state @ item(negatives.items).T + bias[negatives.items] - times_drawn
        others = others.masked_fill(negatives.items == target[:, None], float("-inf"))
        logits = torch.cat([positive[:, None], others], 1).float()
        return F.cross_entropy(logits, torch.zeros_like(target), reduction="sum")


@dataclass(frozen=True)
class Past:
    """Encoded histories: what each layer shows of them to candidates (tensors whose first axis is B), the item vectors
    [B, N, D] that choose anchors (None: nothing is chosen), and the user's vector after each event, [B, N, D] (None: a
    model without it)."""

    shown: Iterable[tuple[Tensor, ...]]
    vectors: Tensor | None = None
    users: Tensor | None = None

    def rows(self, index: Tensor) -> Past:
        """These rows, repeated or not."""
        shown = [tuple(t[index] for t in layer) for layer in self.shown]
        vectors, users = (None if t is None else t[index] for t in (self.vectors, self.users))
        return Past(shown, vectors, users)


class ClickModel(nn.Module):
    """Stage 2 of every model: histories are encoded once, and any number of candidates read them.

    Evaluation and batch scoring go through `read`, and training through what `read` is made of, so a model has one
    scoring function.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.window = config.model, config.stream.window

    def inherit(self, stage1: dict[str, Tensor], seen: Tensor, shrinkage: float) -> None:
        """Take over stage 1's weights.

        A rare item's vector tells little but that stage 1 has seen it at all: of an item shown twice and clicked once,
        that the impression to learn from was the clicked one, which no later impression tells [D]. So vectors shrink
        to the mean vector, by how many events stage 1 saw.

        Args:
            stage1: its parameters by name.
            seen: [buckets + V] events of training histories by index, from the first out-of-vocabulary bucket on.
            shrinkage: events that the mean vector counts as; 0 takes vectors as they are.
        """
        own = self.state_dict()
        taken = {k: v for k, v in stage1.items() if k.startswith(INHERITED) and k in own}
        if ITEM_TABLE in taken and shrinkage:
            taken[ITEM_TABLE] = shrunk(taken[ITEM_TABLE], seen, shrinkage)
        self.load_state_dict(own | taken)

    def attend_by(self, impl: str) -> None:
        """From now on attend by another form of PGSA (`model.pgsa.impl`)."""
        pgsa = self.config.pgsa.model_copy(update={"impl": impl})
        self.config = self.config.model_copy(update={"pgsa": pgsa})

    def know_items(self, items: pa.Table) -> None:
        """Take in training-time statistics of the catalogue: the vocabulary's table, a row an item."""

    def forward(self, x: Inputs, noise: Noise | None = None) -> Output:
        """Binary cross-entropy summed over labelled candidates, and every candidate's logit [B, M]."""
        return click_output(self.read(self.past(x, noise), x, noise), x)

    def encode(self, x: Inputs) -> Past:
        """What any number of candidates read of the histories of a batch; its own candidates play no part."""
        past = self.past(x, None)
        return replace(past, shown=list(past.shown))

    def past(self, x: Inputs, noise: Noise | None) -> Past:
        """`encode` with dropout; layers may be made as they are read, so that both streams go through one before
        the next begins."""
        raise AssertionError("a kind of ClickModel says how")

    def read(self, past: Past, x: Inputs, noise: Noise | None = None, shares: list[Tensor] | None = None) -> Tensor:
        """Logits of the candidates of `x` over the encoded histories of its rows: [B, M].

        Of the histories themselves only items, times, actions and sessions are read again. A list given as `shares`
        gets each layer's attention shares, [B, M, N] (see `HstuLayer.shares`), of models that attend in layers.
        """
        raise AssertionError("a kind of ClickModel says how")

    def kept_keys(self, x: Inputs) -> Tensor:
        """How many past events each candidate attends to in a layer, itself left out: [B, M]."""
        return x.c_visible

    def candidate_weights(self, x: Inputs, past: Past) -> Tensor:
        """Attention weights of the candidates over encoded histories: [B, M, N]."""
        return visible_mask(x.c_visible, x.h_item.shape[1])

    def anchors(self, past: Past, x: Inputs) -> tuple[Tensor, Tensor]:
        """Positions of the candidates' anchors and whether each is real: [B, M, K] (see `select_anchors`)."""
        raise AssertionError("dense attention has no anchors")


def click_output(scores: Tensor, x: Inputs) -> Output:
    """Binary cross-entropy of the labelled candidates by their logits [B, M]."""
    labelled = x.c_real & (x.c_label >= 0)
    losses = F.binary_cross_entropy_with_logits(scores, x.c_label.clamp(min=0).float(), reduction="none")
    return Output((losses * labelled).sum(), labelled.sum(), scores)


def shrunk(table: Tensor, seen: Tensor, shrinkage: float) -> Tensor:
    """(n e + c m) / (n + c) of the last rows, those with a count n, with their mean m by events: [items, D]."""
    first, n = len(table) - len(seen), seen.to(table.dtype)[:, None]
    own = table[first:]
    mean = (n * own).sum(0) / n.sum().clamp(min=1)
    return torch.cat([table[:first], (n * own + shrinkage * mean) / (n + shrinkage)])


class TokenClick(ClickModel):
    """A click model whose history and candidates are tokens of the shared event encoder."""

    action_weight: float

    def __init__(self, config: Config, sizes: Sizes) -> None:
        super().__init__(config)
        model = config.model
        self.events = EventEncoder(model, sizes)
        self.match = MatchFeatures(model.width, model.time_buckets, sizes.actions) if model.match_features else None
        own, every = len(sizes.t_own), len(sizes.t_num)
        self.lists = ListFeatures(own, every - own, model.width) if model.with_lists and every > own else None
        vectors = model.width if model.by_vectors else 0
        self.asvd = AsymmetricSvd(model.asvd, sizes, vectors) if model.with_asvd else None
        self.head = click_head(model.width, sizes.base_rate)
        self.answers: ActionAnswers | None = None

    def ask_actions(self, config: Config, sizes: Sizes) -> None:
        """Ask what was done with impressions in training, if it is to be asked here (see `forward`)."""
        asked = sizes.chosen and (config.model.name == "hpgr" or config.stage2.action_baselines)
        if not (asked and config.stage2.action_weight):
            return
        weight = config.stage2.action_weight
        self.action_weight = (1.0 if sizes.graded else CLICKED_AGAIN) if weight == "auto" else weight
        self.answers = ActionAnswers(config.model.width, sizes)

    def forward(self, x: Inputs, noise: Noise | None = None) -> Output:
        """As in `ClickModel`; while training also what the user did with each candidate, where that is known [D].

        The question about actions that stage 1 asks: a rating says more of an item than whether it is above a bound.
        Clicks are learnt by an answer of their own, so that it and that by actions err apart, and so they are asked
        twice where there are no ratings.
        """
        if self.answers is None or not self.training:
            return super().forward(x, noise)
        past = self.past(x, noise)
        encoded = self.encoded(past, x, noise)
        output = click_output(self.click(encoded, past, x, noise), x)
        return output._replace(loss=output.loss + self.action_weight * self.answers.loss(encoded, x))

    def read(self, past: Past, x: Inputs, noise: Noise | None = None, shares: list[Tensor] | None = None) -> Tensor:
        encoded = self.encoded(past, x, noise, shares)
        logits = self.click(encoded, past, x, noise)
        return logits if self.answers is None else self.answers.mixed(logits, encoded)

    def encoded(self, past: Past, x: Inputs, noise: Noise | None, shares: list[Tensor] | None = None) -> Tensor:
        """Candidates after all layers: [B, M, D]. Other arguments as of `read`."""
        raise AssertionError("a kind of TokenClick says how")

    def know_items(self, items: pa.Table) -> None:
        if self.asvd is not None:
            self.asvd.know_items(items)

    def click(self, encoded: Tensor, past: Past, x: Inputs, noise: Noise | None) -> Tensor:
        """Encoded candidates [B, M, D] -> logits of a click [B, M]."""
        logits = self.head(encoded)[..., 0].float()
        return logits if self.asvd is None else logits + self.asvd(x, self.compared(x), noise)

    def compared(self, x: Inputs) -> tuple[Tensor, Tensor] | None:
        """Vectors of the candidates' items and of the histories', [B, M, D] and [B, N, D], of models that compare
        items by them."""
        return None

    def candidates(self, x: Inputs, noise: Noise | None, more: Tensor | float = 0.0) -> Tensor:
        """Candidate tokens, with what the visible past says of exactly their item, what their list says, and `more`:
        [B, M, D]."""
        match = 0.0 if self.match is None else self.match(x.c_time, visible_matches(x))
        listed = 0.0 if self.lists is None else self.lists(x.c_num, noise)
        return self.events.candidates(x, noise, match + listed + more)


def visible_matches(x: Inputs) -> Matches:
    """The candidates' matches in the histories: [B, M]."""
    after = torch.arange(1, x.h_item.shape[1] + 1, device=x.h_item.device)
    found = [(same.sum(-1), (same * after).amax(-1)) for same in own_events(x)]
    count, last = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    some, place = count > 0, (last - 1).clamp(min=0)
    time, action = x.h_time.gather(1, place), x.h_action.gather(1, place)
    return Matches(count, time * some, action * some, (x.c_visible + 1 - last) * some)
