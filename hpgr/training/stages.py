"""The two stages: item modelling (for HPGR, session-based and masked), and learning from clicks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hpgr.config import Config, Optimiser
from hpgr.data.stream import Source, StreamSpec
from hpgr.evaluation import click_scores, rank_next_items, score
from hpgr.model.asvd import TABLES as ASVD_TABLES
from hpgr.model.base import ITEM_TABLE, Negatives, TokenClick
from hpgr.model.embedding import Sizes
from hpgr.model.registry import click_model, item_model
from hpgr.schema import Array
from hpgr.training import distributed


class ItemStage:
    """Stage 1. Validated as a next-item model: NDCG@10 over the whole catalogue."""

    name, metric = "stage1", "ndcg@10"
    shown: tuple[str, ...] = ("hr@10", "ndcg@10")

    def __init__(self, config: Config, sizes: Sizes, counts: Array, stream: StreamSpec, validation: StreamSpec) -> None:
        stage = config.stage1
        self.epochs, self.min_steps = (20, 2000 * sizes.chosen) if stage.epochs == "auto" else (stage.epochs, 0)
        self.patience, self.validate_every = stage.patience or self.epochs, 0
        self.optimiser: Optimiser = stage.optimiser
        self.lr_shares: dict[str, float] = {}
        self.stream, self.validation = stream, validation
        self.filter_seen = config.evaluation.filter_seen
        self.model = item_model(config, sizes)
        self._first_item, self._seed, self._n = sizes.first_item, config.seed, stage.negatives
        sampled, q = len(counts) > stage.full_softmax_items, (counts + 1.0) / (counts + 1.0).sum()
        self.by_rows: tuple[str, ...] = (ITEM_TABLE,) if sampled else ()
        self._up_to = np.cumsum(q) / np.cumsum(q)[-1] if sampled else None
        self._log_q = torch.from_numpy(np.log(q)).float()

    def extras(self, step: int, device: torch.device) -> dict[str, Any]:
        """Negatives by training popularity, the same on all workers; nothing for a small catalogue."""
        if self._up_to is None:
            return {}
        drawn = self._up_to.searchsorted(np.random.default_rng([self._seed, step]).random(self._n), side="right")
        items = torch.from_numpy(drawn + self._first_item).to(device)
        self._log_q = self._log_q.to(device)
        return {"negatives": Negatives(items, self._log_q)}

    def validate(self, source: Source, device: torch.device) -> dict[str, float | int | None]:
        return self.ranks(source, self.validation, device)

    def ranks(self, source: Source, spec: StreamSpec, device: torch.device) -> dict[str, float | int | None]:
        """Next-item figures of a split, over all workers."""
        own = rank_next_items(self.model, source.evaluation(spec), device, self.filter_seen)
        first, *rest = distributed.gather(own)
        return sum(rest, first).compute()


class ClickStage:
    """Stage 2. Validated by AUC."""

    name, metric = "stage2", "auc"
    by_rows: tuple[str, ...] = (ITEM_TABLE, *ASVD_TABLES)
    shown: tuple[str, ...] = ("auc", "gauc", "log_loss")

    def __init__(self, config: Config, sizes: Sizes, stream: StreamSpec, validation: StreamSpec) -> None:
        stage = config.stage2
        self.epochs, self.min_steps, self.patience = stage.epochs, 0, stage.patience
        self.validate_every = stage.validate_every_steps
        self.optimiser, self.stream, self.validation = stage.optimiser, stream, validation
        self.lr_shares: dict[str, float] = dict.fromkeys(self.by_rows, stage.new_item_lr_share)
        self.shrinkage, self.item_lr_share = stage.shrinkage, stage.item_lr_share
        self.action_share = stage.action_share
        self.model = click_model(config, sizes)

    def inherit(self, stage1: dict[str, Tensor], seen: Tensor) -> None:
        """Begin from stage 1's parameters; `seen` as in `ClickModel.inherit`."""
        self.model.inherit(stage1, seen, self.shrinkage)
        self.lr_shares |= {ITEM_TABLE: self.item_lr_share}

    def extras(self, step: int, device: torch.device) -> dict[str, Any]:
        """Nothing: batches hold all that the click loss asks."""
        return {}

    def validate(self, source: Source, device: torch.device) -> dict[str, float | int | None]:
        """Figures of the validation split; of a model that answers twice, with and without its second answer,
        whichever is better, and so it is left."""
        answers = self.model.answers if isinstance(self.model, TokenClick) else None
        if answers is None or not answers.tell:
            return self._figures(source, device)
        found = {}
        for share in sorted({0.0, self.action_share}):
            answers.share.fill_(share)
            found[share] = self._figures(source, device)
        best = max(found, key=lambda share: found[share][self.metric] or 0.0)
        answers.share.fill_(best)
        return found[best] | {"action_share": best}

    def _figures(self, source: Source, device: torch.device) -> dict[str, float | int | None]:
        scored = score(self.model, source.evaluation(self.validation), device)
        own = scored.select(["score", "label", "user_hash", "request"])
        return click_scores(pa.concat_tables(distributed.gather(own))).compute()  # all refuse what one of them would
