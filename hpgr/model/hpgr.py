"""The click models of HSTU and HPGR: a two-stream HSTU encoder, for HPGR with the SEM before it and PGSA inside."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpgr.config import Config
from hpgr.model.base import ITEM_TABLE, Past, TokenClick
from hpgr.model.embedding import Sizes
from hpgr.model.hstu import HstuEncoder, KeyValue
from hpgr.model.inputs import Inputs
from hpgr.model.noise import Noise, number_sites
from hpgr.model.pgsa import select_anchors, visible_mask
from hpgr.model.preference import PreferenceFeatures, nearest, relevance_of
from hpgr.model.relation import Queries, Relation, fuses, keep, relate, relate_sparsely, sessions_of, sparse_weights
from hpgr.model.sem import Sem
from hpgr.model.user_vector import UserVector, matched


class HstuClick(TokenClick):
    """HSTU as a ranker: two dense streams, no session structure (arXiv 2402.17152)."""

    def __init__(self, config: Config, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.encoder = HstuEncoder(config.model, config.stream.window)
        number_sites(self)

    def past(self, x: Inputs, noise: Noise | None) -> Past:
        vectors = self.history_vectors(x)
        tokens, users = self.history(x, noise)
        return Past(self._shown(tokens, x, vectors, noise), vectors, users)

    def _shown(self, tokens: Tensor, x: Inputs, vectors: Tensor | None, noise: Noise | None) -> Iterator[KeyValue]:
        sparse = vectors if self.config.pgsa.scope == "all" else None
        relation = self._relation(x, Queries(x.h_item, x.h_time, x.h_visible), sparse, sparse, self.config.pgsa.impl)
        return self.encoder.encode(tokens, relation, noise)

    def encoded(self, past: Past, x: Inputs, noise: Noise | None, shares: list[Tensor] | None = None) -> Tensor:
        """As in `TokenClick`; shares are of all events, so where they are wanted the reference attends."""
        query = None if past.vectors is None else self.anchor_vectors(x.c_item)
        impl = self.config.pgsa.impl if shares is None else "reference"
        relation = self._relation(x, Queries(x.c_item, x.c_time, x.c_visible), query, past.vectors, impl)
        c = self.candidates(x, noise, self.summaries(past, x, relation.anchors))
        return self.encoder.read(c, past.shown, relation, noise, shares)

    def summaries(self, past: Past, x: Inputs, anchors: tuple[Tensor, Tensor] | None) -> Tensor | float:
        """What candidates carry beside their item: [B, M, D], or nothing. `anchors` as in `Relation`."""
        return 0.0

    def history(self, x: Inputs, noise: Noise | None) -> tuple[Tensor, Tensor | None]:
        """History tokens as they enter the encoder, and the user's vector after each if it is made: [B, N, D] each."""
        return self.events.history(x, noise), None

    def history_vectors(self, x: Inputs) -> Tensor | None:
        """Vectors of the histories' items that choose anchors, [B, N, D]; None for dense attention."""
        return None

    def anchor_vectors(self, item: Tensor) -> Tensor:
        """Vectors that choose anchors by dot product: [..., D]."""
        raise AssertionError("dense attention has no anchors")

    def _relation(self, x: Inputs, queries: Queries, query: Tensor | None, key: Tensor | None, impl: str) -> Relation:
        """How queries with these vectors relate to the history, chosen once and shared by all layers."""
        if query is None or key is None:
            weights = visible_mask(queries.visible, x.h_item.shape[1])
            return relate(x, *queries, weights, self.config, self.window)
        return relate_sparsely(x, queries, (query, key), self.config, self.window, impl)


class HpgrClick(HstuClick):
    """HPGR's stage 2: HSTU with the SEM's tokens and preference-guided sparse attention (paper, stage 2)."""

    anchor_table: Tensor
    trust: Tensor

    def __init__(self, config: Config, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        model = config.model
        self.sem = Sem(model) if model.sem.in_stage2 else None
        if self.sem is not None:
            self.gate_intra = nn.Parameter(torch.zeros(model.width))
            self.gate_inter = nn.Parameter(torch.zeros(model.width))
        self.user = UserVector(model) if self.sem is not None and model.sem.user_vector and model.by_vectors else None
        count = model.pgsa.summaries
        self.preference = PreferenceFeatures(count, sizes.actions, model.width) if count else None
        frozen = model.by_vectors and model.pgsa.anchors == "frozen"
        self.register_buffer("anchor_table", torch.zeros(sizes.items if frozen else 0, model.width))
        self.register_buffer("trust", torch.ones(sizes.items if model.by_vectors else 0, 1))
        number_sites(self)

    def inherit(self, stage1: dict[str, Tensor], seen: Tensor, shrinkage: float) -> None:
        """Take over stage 1's weights, and its item table as the frozen anchor vectors.

        Anchor vectors are as long as their items are known, n / (n + shrinkage) [D]: what stage 1 saw once lies near
        the very events it was seen among, in training alone.
        """
        super().inherit(stage1, seen, shrinkage)
        if len(self.trust) and shrinkage:
            self.trust[-len(seen) :] = (seen / (seen + shrinkage))[:, None]
        if len(self.anchor_table):
            self.anchor_table.copy_(F.normalize(stage1[ITEM_TABLE], dim=-1) * self.trust)

    def history(self, x: Inputs, noise: Noise | None) -> tuple[Tensor, Tensor | None]:
        """As in `HstuClick`: tokens after the SEM in its causal form, both its branches gated from zero [D]."""
        tokens = self.events.history(x, noise)
        if self.sem is None:
            return tokens, None
        intra, context = self.sem(tokens, x, noise, torch.ones_like(x.causal))
        users = None if self.user is None else self.user(intra, context, noise)
        return tokens + torch.tanh(self.gate_intra) * (intra - tokens) + torch.tanh(self.gate_inter) * context, users

    def click(self, encoded: Tensor, past: Past, x: Inputs, noise: Noise | None) -> Tensor:
        logits = super().click(encoded, past, x, noise)
        if past.users is None:
            return logits
        return logits + matched(self.anchor_vectors(x.c_item), past.users, x.c_visible)

    def summaries(self, past: Past, x: Inputs, anchors: tuple[Tensor, Tensor] | None) -> Tensor | float:
        """What the user did with the candidates' anchors: [B, M, D]."""
        if self.preference is None:
            return 0.0
        query, pgsa = self.anchor_vectors(x.c_item), self.config.pgsa
        key = self.anchor_vectors(x.h_item) if past.vectors is None else past.vectors
        sessions = sessions_of(x.h_session, pgsa)
        place, real = anchors or nearest(query, key, x.c_visible, pgsa.top_k, pgsa.impl, sessions)
        relevance = relevance_of(query, key, place)
        rows = torch.arange(x.h_item.shape[0], device=x.h_item.device)[:, None, None]
        return self.preference(relevance, x.h_action[rows, place], real)

    def compared(self, x: Inputs) -> tuple[Tensor, Tensor] | None:
        return (self.anchor_vectors(x.c_item), self.anchor_vectors(x.h_item)) if self.config.by_vectors else None

    def history_vectors(self, x: Inputs) -> Tensor | None:
        return self.anchor_vectors(x.h_item) if self.config.sparse else None

    def anchor_vectors(self, item: Tensor) -> Tensor:
        if len(self.anchor_table):
            return self.anchor_table[item]
        return F.normalize(self.events.item.weight.detach()[item], dim=-1) * self.trust[item]

    def kept_keys(self, x: Inputs) -> Tensor:
        vectors = self.history_vectors(x)
        if vectors is None:
            return x.c_visible
        pgsa = self.config.pgsa
        fused = fuses(pgsa.impl, vectors.shape[1], vectors.device)
        return keep(self.anchor_vectors(x.c_item), vectors, x.c_visible, pgsa, x.h_session, fused).count()

    def candidate_weights(self, x: Inputs, past: Past) -> Tensor:
        if past.vectors is None:
            return super().candidate_weights(x, past)
        query, key = self.anchor_vectors(x.c_item), past.vectors
        return sparse_weights(query, key, x.c_visible, self.config.pgsa, x.h_session)

    def anchors(self, past: Past, x: Inputs) -> tuple[Tensor, Tensor]:
        assert past.vectors is not None, "dense attention has no anchors"
        query, pgsa = self.anchor_vectors(x.c_item), self.config.pgsa
        return select_anchors(query, past.vectors, x.c_visible, pgsa.top_k, sessions_of(x.h_session, pgsa))
