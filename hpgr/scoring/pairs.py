"""Probabilities of (timeline, candidate) pairs: each history is encoded once, and read by all of its candidates.

Which events a candidate may see, and the window of history that serves it, are those of `impression_windows`, so a
score equals evaluation's and depends on nothing but the user's past, the candidate (in `num` also its list) and its
moment.

Legend: P pairs, W windows of history, R rows of a micro-batch, M its padded candidates, N padded history, K anchors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch

from hpgr.config import Stream
from hpgr.data.batches import Assembler
from hpgr.data.windows import Windows, serving_windows
from hpgr.model.base import ClickModel, Past
from hpgr.model.inputs import LANES, Inputs, pad, unpad, with_candidates
from hpgr.schema import Array, Floats, Ints, offsets_of, ranges

HISTORY_TOKENS = 4096
"""Padded history events that are encoded at once."""
CELLS = 1 << 18
"""Most (candidate, history event) places of a micro-batch: its attention fits in a core's cache, and in memory."""
PIECE = 512
"""Most candidates of a row; a longer list goes into several rows over the same encoded history."""


@dataclass(frozen=True)
class Pairs:
    """P candidates of timelines, encoded.

    `row` is the timeline, `time` in microseconds, `visible` the timeline's events strictly before it; `cat` [P, F]
    and `num` [P, G] are the candidates' features.
    """

    row: Ints
    item: Array
    time: Ints
    visible: Ints
    cat: Array
    num: Array

    def __post_init__(self) -> None:
        assert len({len(getattr(self, f.name)) for f in fields(self)}) == 1, "columns differ in length"

    def __len__(self) -> int:
        return len(self.row)

    def take(self, index: Ints) -> Pairs:
        return Pairs(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


@dataclass(frozen=True)
class Anchors:
    """The past events behind scores, as flat arrays of all pairs' anchors; `lengths` [P] says how many each has.

    `item` is an index, `time` in microseconds; `weight` is an event's part in the attention's average (its Gaussian
    weight over the divisor), `share` its part in the attention by size, mean over heads and layers.
    """

    lengths: Ints
    item: Ints
    time: Ints
    weight: Floats
    share: Floats


@dataclass(frozen=True)
class Scorer:
    """Scores pairs with a click model.

    Args:
        model: in evaluation mode, on `device`.
        stream: windows as the run was trained with.
        history_tokens, cells: see HISTORY_TOKENS and CELLS; they change speed and memory, not scores.
    """

    model: ClickModel
    stream: Stream
    device: torch.device
    history_tokens: int = HISTORY_TOKENS
    cells: int = CELLS

    def score(self, assembler: Assembler, pairs: Pairs) -> Floats:
        """Probability of a click for each pair: [P]."""
        out = np.full(len(pairs), np.nan, np.float32)
        with torch.no_grad():
            for index, past, x in self._micro_batches(assembler, pairs):
                out[index] = unpad(torch.sigmoid(self.model.read(past, x)), x.c_real)
        return out

    def explain(self, assembler: Assembler, pairs: Pairs) -> tuple[Floats, Anchors]:
        """Scores, and the anchors that PGSA chose for each pair, nearest first."""
        out = np.full(len(pairs), np.nan, np.float32)
        parts, places = [], []
        with torch.no_grad():
            for index, past, x in self._micro_batches(assembler, pairs):
                shares: list[torch.Tensor] = []
                out[index] = unpad(torch.sigmoid(self.model.read(past, x, shares=shares)), x.c_real)
                parts.append(self._anchors(past, x, torch.stack(shares).mean(0)))
                places.append(index)
        return out, _in_order(parts, np.concatenate(places) if places else np.zeros(0, np.int64))

    def _anchors(self, past: Past, x: Inputs, shares: torch.Tensor) -> Anchors:
        anchors, real = self.model.anchors(past, x)
        weights = self.model.candidate_weights(x, past)
        weights = weights / (1 + weights.sum(-1, keepdim=True))
        real = real[x.c_real]
        rows = torch.arange(len(anchors), device=anchors.device)[:, None, None]
        columns = [
            values[x.c_real][real].cpu().numpy()
            for values in (x.h_item[rows, anchors], x.h_time[rows, anchors], weights.gather(-1, anchors),
                           shares.gather(-1, anchors))
        ]  # fmt: skip
        return Anchors(real.sum(-1).cpu().numpy(), *columns)

    def _micro_batches(self, assembler: Assembler, pairs: Pairs) -> Iterator[tuple[Ints, Past, Inputs]]:
        """Pairs (their indices), encoded histories and inputs, row by row in step; every pair once."""
        windows, order, bounds = serving_windows(assembler.timelines, self.stream, pairs.row, pairs.visible)
        for chosen in _history_batches(windows, self.history_tokens):
            x = pad(assembler.batch(windows.take(chosen), targets=False), self.device)
            past = self.model.encode(x)
            start = windows.start[chosen]
            for row, first, size in _pieces(bounds[chosen], np.diff(bounds)[chosen], x.h_item.shape[1], self.cells):
                index = order[ranges(first, size)]
                columns = {
                    "c_item": pairs.item[index],
                    "c_time": pairs.time[index],
                    "c_visible": pairs.visible[index] - np.repeat(start[row], size),
                    "c_cat": pairs.cat[index],
                    "c_num": pairs.num[index],
                }
                rows = torch.from_numpy(row).to(self.device)
                yield index, past.rows(rows), with_candidates(x, row, size, columns)


def _history_batches(windows: Windows, tokens: int) -> Iterator[Ints]:
    """Windows of like length together, within the token budget; at least one a batch."""
    length = windows.stop - windows.start
    order = np.lexsort((windows.key.view(np.uint64), length))
    padded = -(-np.maximum(length[order], 1) // LANES) * LANES
    start = 0
    while start < len(order):
        reach = min(len(order), start + max(1, tokens // int(padded[start])))
        fits = padded[start:reach] * np.arange(1, reach - start + 1) <= tokens
        size = max(1, int(fits.sum()))
        yield order[start : start + size]
        start += size


def _pieces(first: Ints, size: Ints, events: int, cells: int) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Rows of micro-batches: which history, where its pairs begin in order, and how many.

    Lists are cut into pieces, pieces of like size share a micro-batch of at most `cells` places.
    """
    most = min(PIECE, max(1, cells // events))
    count = -(-size // most)
    row = np.repeat(np.arange(len(size)), count)
    number = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    start = first[row] + number * most
    length = np.minimum(size[row] - number * most, most)
    order = np.argsort(length, kind="stable")
    at = 0
    while at < len(order):
        padded = np.maximum.accumulate(length[order[at : at + cells // events + 1]])
        rows = max(1, int((padded * np.arange(1, len(padded) + 1) * events <= cells).sum()))
        chosen = order[at : at + rows]
        yield row[chosen], start[chosen], length[chosen]
        at += rows


def _in_order(parts: list[Anchors], places: Ints) -> Anchors:
    """Anchors of micro-batches put into the pairs' order."""

    def joined(name: str) -> Array:
        return np.concatenate([getattr(p, name) for p in parts]) if parts else np.zeros(0, np.int64)

    lengths, back = joined("lengths"), np.argsort(places)
    flat = ranges(offsets_of(lengths)[:-1][back], lengths[back])
    return Anchors(lengths[back], *(joined(name)[flat] for name in ("item", "time", "weight", "share")))
