"""What a trained cell has learnt, as arrays to draw: item vectors on a plane, neighbours, one user's attention.

Shapes: V catalogue items, D width, N history events of a user, M candidates of a user.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from hpgr.data.stream import Step
from hpgr.metrics import Reals
from hpgr.model.base import ClickModel, Past
from hpgr.model.inputs import Inputs, pad
from hpgr.schema import Array, Floats, Ints
from hpgr.scoring.attention import shares
from hpgr.training import checkpoint
from hpgr.training.two_stage import Run

EVENTS = (12, 40)
"""Fewest and most history events of a user who is drawn."""
CANDIDATES = 6
"""Most candidates of one user that are drawn."""
LOOKED_AT = 24
"""Batches in which a user to draw is looked for."""
NEIGHBOURS = 15
"""Of an item, that umap keeps near it; its default."""


def item_vectors(run: Run) -> Floats:
    """Unit vectors of the catalogue's items after stage 1 (of a run without one, after stage 2): [V, D]."""
    folder = run.stage_folder("stage1" if run.config.stage1.enabled else "stage2")
    weights = checkpoint.from_bytes(folder.read(folder.read_json("done.json")["best_file"]))
    table = weights["events.item.weight"][run.sizes().first_item :].float()
    return torch.nn.functional.normalize(table, dim=-1).cpu().numpy()


def layout(vectors: Floats, projection: str, seed: int) -> tuple[Reals, str]:
    """Items on a plane [V, 2], and how: umap (McInnes et al. 2018; cosine) or pca; `auto` takes what is installed, and
    so few items that each would be near all others are laid out by pca."""
    if len(vectors) <= NEIGHBOURS:
        projection = "pca"
    if projection == "auto":
        projection = "umap" if importlib.util.find_spec("umap") else "pca"
    if projection == "umap":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import umap

            reducer = umap.UMAP(n_neighbors=NEIGHBOURS, metric="cosine", random_state=seed, n_jobs=1)
            return np.asarray(reducer.fit_transform(vectors), np.float64), "umap"
    left, size, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    plane = (left[:, :2] * size[:2]).astype(np.float64)
    return np.pad(plane, ((0, 0), (0, 2 - plane.shape[1]))), "pca"


def neighbours(vectors: Floats, items: Ints, count: int) -> tuple[Ints, Floats]:
    """The nearest others of some items by cosine, nearest first: places and cosines, [n, count] each."""
    near = vectors[items] @ vectors.T
    near[np.arange(len(items)), items] = -np.inf
    order = np.argsort(-near, axis=1, kind="stable")[:, : min(count, len(vectors) - 1)]
    return order, np.take_along_axis(near, order, 1)


class Reading(NamedTuple):
    """How candidates of one user read the history: items by index, times in microseconds."""

    user: str
    h_item: Ints
    h_time: Ints
    h_session: Ints
    c_item: Ints
    c_label: Ints
    c_score: Floats
    shares: Floats
    """[M, N] of the attention to the history, 1 in sum."""
    anchors: Array
    """[M, N] booleans."""


def reading(model: ClickModel, steps: Iterable[Step], device: torch.device) -> Reading | None:
    """Of the first users whose history is short enough to be drawn, the one of most sessions: the candidates of the
    last moment that has a click. None if there is no such user."""
    best: tuple[int, Step, int] | None = None
    for step in islice(steps, LOOKED_AT):
        if not step.real:
            continue
        x = pad(step.batch)
        length, clicked = x.h_real.sum(1), x.c_real & (x.c_label == 1) & (x.c_visible >= EVENTS[0])
        fits = (length >= EVENTS[0]) & (length <= EVENTS[1]) & clicked.any(1)
        for row in torch.nonzero(fits)[:, 0].tolist():
            sessions = int(x.h_session[row][x.h_real[row]].max()) + 1
            if best is None or sessions > best[0]:
                best = (sessions, step, row)
    return _read(model, best[1], best[2], device) if best else None


def _read(model: ClickModel, step: Step, row: int, device: torch.device) -> Reading:
    x = pad(step.batch, device)
    with torch.no_grad():
        past = model.encode(x)
        score = torch.sigmoid(model.read(past, x))[row].cpu()
    time, label, usable = x.c_time[row].cpu(), x.c_label[row].cpu(), x.c_real[row].cpu()
    moment = time[usable & (label == 1)].max()
    chosen = torch.nonzero(usable & (time == moment))[:, 0]
    chosen = chosen[torch.argsort(label[chosen], descending=True, stable=True)][:CANDIDATES]
    n = int(x.c_visible[row, chosen[0]])
    return Reading(
        user=str(step.batch.user[row]),
        h_item=x.h_item[row, :n].cpu().numpy(),
        h_time=x.h_time[row, :n].cpu().numpy(),
        h_session=x.h_session[row, :n].cpu().numpy(),
        c_item=x.c_item[row].cpu()[chosen].numpy(),
        c_label=label[chosen].numpy(),
        c_score=score[chosen].numpy(),
        shares=shares(model, x)[row][chosen, :n].float().numpy(),
        anchors=_anchors(model, past, x)[row][chosen, :n],
    )


def _anchors(model: ClickModel, past: Past, x: Inputs) -> Array:
    """Which events are a candidate's anchors, [B, M, N]; none for dense attention."""
    found = np.zeros((*x.c_item.shape, x.h_item.shape[1]), bool)
    if past.vectors is not None:
        place, real = (t.cpu().numpy() for t in model.anchors(past, x))
        row, candidate, slot = np.nonzero(real)
        found[row, candidate, place[row, candidate, slot]] = True
    return found
