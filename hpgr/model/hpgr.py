"""The models of both stages: MaskedItemModel (stage 1) and ClickModel (stage 2)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpgr.config import Config
from hpgr.model.embedding import EventEncoder, MatchFeatures, Sizes
from hpgr.model.hstu import HstuEncoder, KeyValue
from hpgr.model.inputs import Inputs
from hpgr.model.noise import Noise, number_sites
from hpgr.model.pgsa import select_anchors, visible_mask
from hpgr.model.relation import Queries, Relation, keep, relate, relate_sparsely, sparse_weights
from hpgr.model.sem import Sem

INHERITED = ("events.", "sem.")
"""Parameters that stage 2 takes over from stage 1."""


class Output(NamedTuple):
    """Sum of losses, how many terms it has, and the scores (stage 2: [B, M] logits; stage 1: empty)."""

    loss: Tensor
    terms: Tensor
    scores: Tensor


class Negatives(NamedTuple):
    """Items drawn for the sampled softmax and the log-probability of drawing each catalogue item (logQ)."""

    items: Tensor
    log_q: Tensor


class MaskedItemModel(nn.Module):
    """Stage 1: predict each hidden item from its masked surroundings, by a softmax tied to the item table."""

    def __init__(self, config: Config, sizes: Sizes) -> None:
        super().__init__()
        self.first_item = sizes.first_item
        self.events = EventEncoder(config.model, sizes)
        self.sem = Sem(config.model)
        self.gate = nn.Parameter(torch.zeros(config.model.width))
        self.head = nn.Sequential(
            nn.Linear(config.model.width, config.model.width), nn.GELU(), nn.LayerNorm(config.model.width)
        )
        self.item_bias = nn.Parameter(torch.zeros(sizes.items))
        number_sites(self)

    def encode(self, x: Inputs, noise: Noise | None = None) -> Tensor:
        """What each event's place says about its item: [B, N, D]."""
        encoded, context = self.sem(self.events.history(x, noise), x, noise)
        return self.head(encoded + torch.tanh(self.gate) * context)

    def forward(self, x: Inputs, noise: Noise | None = None, negatives: Negatives | None = None) -> Output:
        """Cross-entropy summed over hidden events whose item is in the catalogue; full softmax without `negatives`."""
        hidden = x.h_masked & x.h_real & (x.h_item >= self.first_item)
        state, target = self.encode(x, noise)[hidden], x.h_item[hidden]
        if negatives is None:
            logits = self.catalogue_logits(state)
            loss = F.cross_entropy(logits.float(), target - self.first_item, reduction="sum")
        else:
            loss = self._sampled_loss(state, target, negatives)
        return Output(loss, hidden.sum(), state.new_zeros(0))

    def catalogue_logits(self, state: Tensor) -> Tensor:
        """[T, D] -> [T, V of the catalogue]."""
        table = self.events.item.weight[self.first_item :]
        return state @ table.T + self.item_bias[self.first_item :]

    def _sampled_loss(self, state: Tensor, target: Tensor, negatives: Negatives) -> Tensor:
        """Sampled softmax with logQ correction (Bengio & Senecal 2008); a positive is never its own negative.

        The positive is always there, so it has no correction. The n draws stand for all other items, each with
        weight 1 / (n q), so that their sum is expected to be the full softmax's.
        """
        table, bias = self.events.item.weight, self.item_bias
        times_drawn = negatives.log_q[negatives.items - self.first_item] + math.log(len(negatives.items))
        positive = (state * table[target]).sum(-1) + bias[target]
        others = state @ table[negatives.items].T + bias[negatives.items] - times_drawn
        others = others.masked_fill(negatives.items == target[:, None], float("-inf"))
        logits = torch.cat([positive[:, None], others], 1).float()
        return F.cross_entropy(logits, torch.zeros_like(target), reduction="sum")


@dataclass(frozen=True)
class Past:
    """Encoded histories: each layer's keys and values, [B, H, N, E] each, and item vectors [B, N, D] (None: dense)."""

    shown: Iterable[KeyValue]
    vectors: Tensor | None

    def rows(self, index: Tensor) -> Past:
        """These rows, repeated or not."""
        shown = [(k[index], v[index]) for k, v in self.shown]
        return Past(shown, None if self.vectors is None else self.vectors[index])


class ClickModel(nn.Module):
    """Stage 2: two-stream HSTU encoder with PGSA, and a click head."""

    anchor_table: Tensor

    def __init__(self, config: Config, sizes: Sizes) -> None:
        super().__init__()
        model = config.model
        self.config, self.window = model, config.stream.window
        self.events = EventEncoder(model, sizes)
        self.match = MatchFeatures(model) if model.match_features else None
        self.sem = Sem(model) if model.sem.in_stage2 else None
        if self.sem is not None:
            self.gate_intra = nn.Parameter(torch.zeros(model.width))
            self.gate_inter = nn.Parameter(torch.zeros(model.width))
        self.encoder = HstuEncoder(model, config.stream.window)
        click = nn.Linear(model.width, 1)
        nn.init.constant_(click.bias, math.log(sizes.base_rate / (1 - sizes.base_rate)))
        self.head = nn.Sequential(nn.LayerNorm(model.width), nn.Linear(model.width, model.width), nn.GELU(), click)
        frozen = model.pgsa.enabled and model.pgsa.anchors == "frozen"
        self.register_buffer("anchor_table", torch.zeros(sizes.items if frozen else 0, model.width))
        number_sites(self)

    def inherit(self, stage1: dict[str, Tensor]) -> None:
        """Take over stage 1's weights, and its item table as the frozen anchor vectors."""
        own = self.state_dict()
        taken = {k: v for k, v in stage1.items() if k.startswith(INHERITED) and k in own}
        self.load_state_dict(own | taken)
        if len(self.anchor_table):
            self.anchor_table.copy_(F.normalize(stage1["events.item.weight"], dim=-1))

    def forward(self, x: Inputs, noise: Noise | None = None) -> Output:
        """Binary cross-entropy summed over labelled candidates, and every candidate's logit [B, M]."""
        vectors = self.history_vectors(x)
        scores = self.read(Past(self._shown(x, vectors, noise), vectors), x, noise)
        labelled = x.c_real & (x.c_label >= 0)
        losses = F.binary_cross_entropy_with_logits(scores, x.c_label.clamp(min=0).float(), reduction="none")
        return Output((losses * labelled).sum(), labelled.sum(), scores)

    def encode(self, x: Inputs) -> Past:
        """What any number of candidates read of the histories of a batch; its own candidates play no part."""
        vectors = self.history_vectors(x)
        return Past(list(self._shown(x, vectors, None)), vectors)

    def _shown(self, x: Inputs, vectors: Tensor | None, noise: Noise | None) -> Iterator[KeyValue]:
        sparse = vectors if self.config.pgsa.scope == "all" else None
        relation = self._relation(x, Queries(x.h_item, x.h_time, x.h_visible), sparse, sparse, self.config.pgsa.impl)
        return self.encoder.encode(self.history(x, noise), relation, noise)

    def read(self, past: Past, x: Inputs, noise: Noise | None = None, shares: list[Tensor] | None = None) -> Tensor:
        """Logits of the candidates of `x` over the encoded histories of its rows: [B, M].

        Of the histories themselves only items and times are read again. `shares` as in `HstuEncoder.read`; they are
        shares of all events, so where they are wanted the reference attends.
        """
        n = x.h_item.shape[1]
        same = (x.c_item[..., None] == x.h_item[:, None, :]) & visible_mask(x.c_visible, n)
        c = self.events.candidates(x, noise, self.match(x, same) if self.match is not None else 0.0)
        query = None if past.vectors is None else self.anchor_vectors(x.c_item)
        impl = self.config.pgsa.impl if shares is None else "reference"
        relation = self._relation(x, Queries(x.c_item, x.c_time, x.c_visible), query, past.vectors, impl)
        return self.head(self.encoder.read(c, past.shown, relation, noise, shares))[..., 0].float()

    def history(self, x: Inputs, noise: Noise | None) -> Tensor:
        """History tokens after the SEM in its causal form, both branches gated from zero [D]: [B, N, D]."""
        tokens = self.events.history(x, noise)
        if self.sem is None:
            return tokens
        intra, context = self.sem(tokens, x, noise, torch.ones_like(x.causal))
        return tokens + torch.tanh(self.gate_intra) * (intra - tokens) + torch.tanh(self.gate_inter) * context

    def history_vectors(self, x: Inputs) -> Tensor | None:
        """Vectors of the histories' items that choose anchors, [B, N, D]; None for dense attention."""
        return self.anchor_vectors(x.h_item) if self.config.pgsa.enabled else None

    def candidate_weights(self, x: Inputs, vectors: Tensor | None) -> Tensor:
        """Attention weights of the candidates over histories of these vectors: [B, M, N]."""
        n = x.h_item.shape[1]
        if vectors is None:
            return visible_mask(x.c_visible, n)
        return sparse_weights(self.anchor_vectors(x.c_item), vectors, x.c_visible, self.config.pgsa)

    def anchors(self, past: Past, x: Inputs) -> tuple[Tensor, Tensor]:
        """Positions of the candidates' anchors and whether each is real: [B, M, K] (see `select_anchors`)."""
        assert past.vectors is not None, "dense attention has no anchors"
        return select_anchors(self.anchor_vectors(x.c_item), past.vectors, x.c_visible, self.config.pgsa.top_k)

    def kept_keys(self, x: Inputs, vectors: Tensor | None) -> Tensor:
        """How many events each candidate attends to in a layer, itself left out: [B, M]."""
        if vectors is None:
            return x.c_visible
        return keep(self.anchor_vectors(x.c_item), vectors, x.c_visible, self.config.pgsa).count()

    def _relation(self, x: Inputs, queries: Queries, query: Tensor | None, key: Tensor | None, impl: str) -> Relation:
        """How queries with these vectors relate to the history, chosen once and shared by all layers."""
        if query is None or key is None:
            weights = visible_mask(queries.visible, x.h_item.shape[1])
            return relate(x, *queries, weights, self.config, self.window)
        return relate_sparsely(x, queries, (query, key), self.config, self.window, impl)

    def anchor_vectors(self, item: Tensor) -> Tensor:
        """Unit vectors that choose anchors: [..., D]."""
        if len(self.anchor_table):
            return self.anchor_table[item]
        return F.normalize(self.events.item.weight.detach()[item], dim=-1)
