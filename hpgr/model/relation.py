"""How queries relate to the history, the same in every layer: what they see of it, and what the relative bias reads.

Shapes: B rows, Q queries (history events or candidates), N history events, D width, S slots for kept keys.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from shutil import which
from typing import NamedTuple

import torch
from torch import Tensor

from hpgr.config import Model, Pgsa
from hpgr.errors import ConfigError
from hpgr.model.gather import Links, gather_pays
from hpgr.model.inputs import Inputs
from hpgr.model.pgsa import Sessions, cap_weights, gaussian_weights, select_anchors
from hpgr.model.select import FUSED_EVENTS, Kept, most_slots, recent_first, select_keys, select_weights
from hpgr.model.timing import time_bucket

FUSED_FROM = 200
"""Events of a padded history from which `auto` takes Triton's kernels on a GPU: there a training step took 14 ms on an
H100, with whole maps 22. Shorter ones are not measured."""


class Queries(NamedTuple):
    """Item, time and number of strictly past events of each query: [B, Q]."""

    item: Tensor
    time: Tensor
    visible: Tensor


@dataclass(frozen=True)
class Pairs:
    """What the relative bias reads of queries and events, whatever the weights. All [B, Q, N]; of kept keys [B, Q, S].

    `distance` counts events back from the last visible one (1); `age` is a time bucket; `same` marks events with
    the query's item. `bounds` are heads, distances and ages that there may be.
    """

    distance: Tensor
    age: Tensor
    same: Tensor
    bounds: tuple[int, int, int]

    @cached_property
    def code(self) -> Tensor:
        """The three as one number, a place in a table [distances, ages, 2]: [B, Q, N] int32."""
        return (self.distance * self.bounds[2]).add_(self.age).mul_(2).add_(self.same).to(torch.int32)

    @cached_property
    def code_of_heads(self) -> Tensor:
        """Places in a table [heads, distances, ages, 2], flat: [B, H, Q, N] int32."""
        heads, distances, ages = self.bounds
        head = torch.arange(heads, device=self.code.device, dtype=torch.int32) * (distances * ages * 2)
        return self.code[:, None] + head[:, None, None]


@dataclass(frozen=True)
class Relation:
    """How queries relate to the history, the same in every layer.

    `weights` are attention weights [B, Q, N], 0 where the query must not look, or the kept keys. `anchors` are those
    they were made of, the most recent first, where choosing left them: positions and which are real, [B, Q, K] each.
    Links with a code need no `pairs`.
    """

    pairs: Pairs | None
    weights: Tensor | Links
    anchors: tuple[Tensor, Tensor] | None = None


def relate(
    x: Inputs, item: Tensor, time: Tensor, visible: Tensor, weights: Tensor, config: Model, window: int
) -> Relation:
    """Relation of queries ([B, Q] item, time, visible) to the history.

    Events of one second are at the same distance from a query however they are ordered among themselves only if
    the query is later than all of them; the distance is counted from what is visible, so ties tell nothing.
    """
    place = torch.arange(x.h_item.shape[1], device=item.device, dtype=torch.int32)
    distance = (visible[..., None].to(torch.int32) - place).clamp_(0, window)
    age = time_bucket(time[..., None] - x.h_time[:, None, :], config.time_buckets)
    same = item[..., None] == x.h_item[:, None, :]
    return Relation(Pairs(distance, age, same, _bounds(config, window)), weights.to(torch.float32))


def relate_kept(x: Inputs, queries: Queries, kept: Kept, config: Model, window: int, fused: bool = False) -> Relation:
    """`relate` for kept keys alone, with their code if Triton's kernels are to attend."""
    n, pgsa = x.h_item.shape[1], config.pgsa
    capped = pgsa.max_keys is not None and pgsa.max_keys < pgsa.top_k
    anchors = None if capped else kept.anchors(pgsa.top_k)
    if fused:
        from hpgr.model.fused import code_pairs  # needs triton

        code = code_pairs(kept.index, queries, x.h_item, x.h_time, window, config.time_buckets)
        return Relation(None, Links(kept.index, kept.weight, n, config.heads, code), anchors)
    rows = torch.arange(len(kept.index), device=kept.index.device)[:, None, None]
    distance = (queries.visible[..., None] - kept.index).clamp(0, window)
    age = time_bucket(queries.time[..., None] - x.h_time[rows, kept.index], config.time_buckets)
    same = queries.item[..., None] == x.h_item[rows, kept.index]
    pairs = Pairs(distance, age, same, _bounds(config, window))
    return Relation(pairs, Links(kept.index, kept.weight, n, config.heads), anchors)


def _bounds(config: Model, window: int) -> tuple[int, int, int]:
    return config.heads, window + 1, config.time_buckets


def relate_sparsely(
    x: Inputs, queries: Queries, vectors: tuple[Tensor, Tensor], config: Model, window: int, impl: str
) -> Relation:
    """Relation under PGSA, for queries and histories of these item vectors ([B, Q, D], [B, N, D]).

    `impl` as in the configuration. `auto` looks at the padded length of the history and at settings alone.
    """
    (query, key), n = vectors, x.h_item.shape[1]
    if impl == "reference":
        weights = sparse_weights(query, key, queries.visible, config.pgsa, x.h_session)
        return relate(x, *queries, weights, config, window)
    pgsa = config.pgsa
    slots = most_slots(n, pgsa.top_k, pgsa.sigma, pgsa.max_keys)
    fused = fuses(impl, n, key.device)
    if impl == "auto" and not fused and not gather_pays(n, slots, key.device):
        sessions = sessions_of(x.h_session, pgsa)
        weights, anchors = select_weights(query, key, queries.visible, pgsa.top_k, pgsa.sigma, pgsa.max_keys, sessions)
        return replace(relate(x, *queries, weights, config, window), anchors=recent_first(anchors))
    kept = keep(query, key, queries.visible, pgsa, x.h_session, fused)
    return relate_kept(x, queries, kept, config, window, fused)


def fuses(impl: str, n: int, device: torch.device) -> bool:
    """Whether Triton's kernels attend: asked for, or by `auto` on a GPU where they can and pay. They also choose keys,
    but for what `select_keys` says."""
    fits = FUSED_FROM <= n <= FUSED_EVENTS
    return impl == "triton" or (impl == "auto" and fits and device.type == "cuda" and not lacking(device))


def check_triton(device: torch.device) -> None:
    """Whether `pgsa.impl: triton` can run there. Raises ConfigError."""
    if missing := lacking(device):
        raise ConfigError(
            f"model.pgsa.impl triton: got a model on {device.type} and no {missing}, expected a CUDA GPU, triton "
            "(pip install -e '.[triton]') and a C compiler, which triton builds its launchers by; "
            "use model.pgsa.impl=auto here"
        )


def lacking(device: torch.device) -> str:
    """What Triton's kernels need and have not, or nothing."""
    if find_spec("triton") is None:
        return "package triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if device.type != "cuda":
        return "GPU"
    return "" if os.environ.get("CC") or which("gcc") or which("clang") else "C compiler"


def sessions_of(number: Tensor, pgsa: Pgsa) -> Sessions | None:
    """Where anchors come from, by the history's session numbers [B, N]; None: all visible events."""
    return None if pgsa.sessions is None else Sessions(number, pgsa.sessions)


def sparse_weights(query: Tensor, key: Tensor, visible: Tensor, pgsa: Pgsa, session: Tensor) -> Tensor:
    """PGSA's attention weights, by the reference: [B, Q, N]. `session` [B, N] numbers the history's sessions."""
    anchors, real = select_anchors(query, key, visible, pgsa.top_k, sessions_of(session, pgsa))
    return cap_weights(gaussian_weights(anchors, real, visible, key.shape[1], pgsa.sigma), pgsa.max_keys)


def keep(query: Tensor, key: Tensor, visible: Tensor, pgsa: Pgsa, session: Tensor, fused: bool = False) -> Kept:
    """The same in index form, the fast way: [B, Q, S]."""
    sessions = sessions_of(session, pgsa)
    return select_keys(query, key, visible, pgsa.top_k, pgsa.sigma, pgsa.max_keys, fused, sessions)
