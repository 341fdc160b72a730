"""Where attention goes: its mass on events that do not matter, and whether PGSA's anchors are dense attention's choice.

A candidate's shares are those of `ClickModel.read`, mean over heads and layers; its own share is left out, so that the
mass on its history is 1. Sums are kept by history length, so parts of the data add up.

Shapes: B rows, M candidates, N history events, I candidates that count, L bins of history length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hpgr.config import Synthetic
from hpgr.data.preparation import Prepared
from hpgr.data.stream import Step
from hpgr.data.synthetic import planted
from hpgr.model.base import ClickModel
from hpgr.model.inputs import Inputs, pad, unpad
from hpgr.model.pgsa import visible_mask
from hpgr.schema import SECOND, Array, Batch, Ints

EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Bins of history length begin here; the last is open."""
NOISE, UNKNOWN = -1, -2
"""Category of an event that is noise, and of an item that the log knows no category of."""
Sums = dict[str, list[float]]
"""Sum of each quantity over the candidates of each bin [L]; `n` counts them."""


@dataclass(frozen=True)
class Truth:
    """What matters in the generated log: an event matters to a candidate of its category, unless it is noise."""

    category: Ints
    """[V] by item index."""
    noise: Ints
    """Sorted keys of engagements that are noise (see `_event_key`)."""

    @classmethod
    def of(cls, settings: Synthetic, prepared: Prepared) -> Truth:
        """The truth of a generated log, in terms of its prepared form."""
        items, events = planted(settings)
        known = dict(zip(items.column("item_id").to_pylist(), items.column("category").to_pylist(), strict=True))
        vocabulary = prepared.manifest["vocabulary"]
        names = prepared.folder.read_parquet("vocabulary.parquet", ["value"]).column("value").to_pylist()
        category = np.full(vocabulary["size"], UNKNOWN, np.int64)
        category[vocabulary["size"] - vocabulary["items"] :] = [known.get(name, UNKNOWN) for name in names]
        chosen = events.filter(events.column("is_noise"))
        time = chosen.column("timestamp").to_numpy() * SECOND
        return cls(category, np.sort(_event_key(chosen.column("user_id").combine_chunks(), time)))

    def matters(self, x: Inputs, batch: Batch) -> tuple[Tensor, Tensor]:
        """Which visible events matter to each candidate [B, M, N], and of which candidates that is known [B, M]."""
        n = x.h_item.shape[1]
        flat = self.category[batch.h_item]
        user = batch.user.take(pa.array(np.repeat(np.arange(len(batch)), batch.h_lengths)))
        noise = np.isin(_event_key(user, batch.h_time), self.noise)
        event = torch.full(x.h_item.shape, NOISE, dtype=torch.int64)
        event[x.h_real.cpu()] = torch.from_numpy(np.where(noise, NOISE, flat))
        candidate = torch.from_numpy(self.category)[x.c_item.cpu()]
        same = candidate[..., None] == event[:, None, :]
        return same & visible_mask(x.c_visible.cpu(), n), candidate >= 0


def _event_key(user: pa.Array, time: Array) -> Ints:
    """One number of a generated user's moment: users are u000123, times whole seconds."""
    number = np.array([name[1:] for name in user.to_pylist()], np.int64)
    return number * (1 << 36) + np.asarray(time, np.int64) // SECOND


def shares(model: ClickModel, x: Inputs) -> Tensor:
    """Share of each visible event in each candidate's attention to its history: [B, M, N], 1 in sum (0 without any)."""
    layers: list[Tensor] = []
    with torch.no_grad():
        model.read(model.encode(x), x, shares=layers)
    mean = torch.stack(layers).mean(0).cpu().double()
    return mean / mean.sum(-1, keepdim=True).clamp(min=1e-12)


def irrelevant_mass(
    models: Mapping[str, ClickModel], steps: Iterable[Step], truth: Truth, device: torch.device
) -> Sums:
    """Mass of attention on events that do not matter, of each model, and `uniform`: what attention to all alike has.

    Only candidates with an event that matters count: without one, all mass is on others whatever the model does.
    """
    parts = []
    for step in steps:
        if not step.real:
            continue
        x = pad(step.batch, device)
        matters, known = truth.matters(x, step.batch)
        counts = known & x.c_real.cpu() & matters.any(-1)
        visible = x.c_visible.cpu()
        columns = {name: 1 - (shares(model, x) * matters).sum(-1) for name, model in models.items()}
        columns["uniform"] = 1 - matters.sum(-1) / visible.clamp(min=1)
        parts.append({"past": visible} | columns | {"_": counts})
    return _summed(parts)


def anchor_overlap(sparse: ClickModel, dense: ClickModel, steps: Iterable[Step], device: torch.device) -> Sums:
    """How much of PGSA's choice dense attention shares: `overlap`, the part of the K anchors among the K events that
    the dense model attends to most; `mass`, the dense model's attention on the anchors; `chance`, both of K random
    events. Only candidates with more than K visible events count: others have no choice."""
    parts = []
    for step in steps:
        if not step.real:
            continue
        x = pad(step.batch, device)
        with torch.no_grad():
            place, real = (t.cpu() for t in sparse.anchors(sparse.encode(x), x))
        k, n = sparse.config.pgsa.top_k, x.h_item.shape[1]
        visible, attention = x.c_visible.cpu(), shares(dense, x)
        chosen = torch.zeros(*visible.shape, n + 1, dtype=torch.bool).scatter_(-1, torch.where(real, place, n), True)
        chosen = chosen[..., :n]
        top = attention.masked_fill(~visible_mask(visible, n), -1.0).topk(min(k, n), -1).indices
        columns = {
            "overlap": chosen.gather(-1, top).sum(-1) / k,
            "mass": (attention * chosen).sum(-1),
            "chance": k / visible.clamp(min=1),
        }
        parts.append({"past": visible} | columns | {"_": x.c_real.cpu() & (visible > k)})
    return _summed(parts)


def _summed(parts: Iterable[Mapping[str, Tensor]]) -> Sums:
    """Sums by history length (`past`) over the candidates that count (`_`)."""
    total: dict[str, Any] = {}
    for part in parts:
        place = np.searchsorted(EDGES, unpad(part["past"], part["_"]), "right") - 1
        values = {name: unpad(v, part["_"]) for name, v in part.items() if name not in ("past", "_")}
        for name, value in ({"n": np.ones(len(place))} | values).items():
            total[name] = total.get(name, 0.0) + np.bincount(place, value, len(EDGES))
    return {name: sums.tolist() for name, sums in total.items()}
