"""Jagged batches -> padded tensors."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from hpgr.schema import NO_ACTION, NO_LABEL, Array, Batch, Ints, offsets_of


@dataclass(frozen=True)
class Inputs:
    """A padded batch. History tensors are [B, N] (features [B, N, F]), candidate tensors [B, M].

    `c_label` and `c_action` are what a loss asks for; no model may read them into a score.
    """

    key: Ints
    causal: Tensor
    h_real: Tensor
    h_item: Tensor
    h_time: Tensor
    h_action: Tensor
    h_visible: Tensor
    h_session: Tensor
    h_masked: Tensor
    h_cat: Tensor
    h_num: Tensor
    c_real: Tensor
    c_item: Tensor
    c_time: Tensor
    c_visible: Tensor
    c_label: Tensor
    c_action: Tensor
    c_cat: Tensor
    c_num: Tensor


LANES = 16
MAP = 1 << 20
"""Most places of a map of queries and history events that is looked at once and let go."""


def round_up(size: int, lanes: int = LANES) -> int:
    """The next multiple of `lanes`, at least one: a longer neighbour then adds only whole blocks of zeros to a row's
    sums, which leaves their order, and so their bits, as they were."""
    return max(1, -(-size // lanes)) * lanes


def pad(batch: Batch, device: torch.device | str = "cpu", lanes: int = LANES) -> Inputs:
    """Pad a batch with zeros to its longest history and its longest candidate list, both rounded up to `lanes`."""
    i, f, b = np.int64, np.float32, np.bool_
    history = _padded(batch.h_lengths, device, lanes, {
        "h_real": (np.ones(len(batch.h_item), b), b), "h_item": (batch.h_item, i), "h_time": (batch.h_time, i),
        "h_action": (batch.h_action, i), "h_visible": (batch.h_visible, i), "h_session": (batch.h_session, i),
        "h_masked": (batch.h_masked, b), "h_cat": (batch.h_cat, i), "h_num": (batch.h_num, f),
    })  # fmt: skip
    candidates = _padded(batch.t_lengths, device, lanes, {
        "c_real": (np.ones(len(batch.t_item), b), b), "c_item": (batch.t_item, i), "c_time": (batch.t_time, i),
        "c_visible": (batch.t_visible, i), "c_label": (batch.t_label, i), "c_action": (batch.t_action, i),
        "c_cat": (batch.t_cat, i), "c_num": (batch.t_num, f),
    })  # fmt: skip
    causal = torch.from_numpy(np.asarray(batch.causal, bool)).to(device)
    return Inputs(key=batch.row_key, causal=causal, **history, **candidates)


def _padded(
    lengths: Ints, device: torch.device | str, lanes: int, columns: dict[str, tuple[Array, type]]
) -> dict[str, Tensor]:
    width = round_up(int(lengths.max(initial=1)), lanes)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(rows)) - np.repeat(offsets_of(lengths)[:-1], lengths)
    out = {}
    for name, (values, kind) in columns.items():
        padded = np.zeros((len(lengths), width, *values.shape[1:]), kind)
        padded[rows, place] = values
        out[name] = torch.from_numpy(padded).to(device, non_blocking=True)
    return out


def tiles(rows: int, queries: int, events: int) -> list[slice]:
    """Slices of the queries, such that a map [B, T, N] of a slice is small; an exported program takes them at once."""
    if torch.compiler.is_exporting():
        return [slice(None)]
    size = max(1, MAP // max(1, rows * events))
    return [slice(first, first + size) for first in range(0, max(1, queries), size)]


def with_candidates(x: Inputs, rows: Ints, lengths: Ints, columns: dict[str, Array]) -> Inputs:
    """Rows `rows` of a batch's histories, each with candidates of its own instead of the batch's.

    Args:
        rows: [R] rows of `x`, repeated or not.
        lengths: [R] candidates of each.
        columns: flat c_item, c_time, c_visible [I], c_cat [I, F] and c_num [I, G]; labels and actions are absent.
    """
    device = x.h_item.device
    index = torch.from_numpy(rows).to(device)
    history = {f.name: getattr(x, f.name)[index] for f in fields(x) if f.name.startswith("h_")}
    kinds = {"c_num": np.float32, "c_real": np.bool_}
    n = len(columns["c_item"])
    unknown = {"c_label": np.full(n, NO_LABEL), "c_action": np.full(n, NO_ACTION)}
    every = columns | unknown | {"c_real": np.ones(n, bool)}
    candidates = _padded(lengths, device, 1, {k: (v, kinds.get(k, np.int64)) for k, v in every.items()})
    return Inputs(key=x.key[rows], causal=x.causal[index], **history, **candidates)


def unpad(values: Tensor, real: Tensor) -> Array:
    """Values of the real places in row order, as NumPy: [B, M] -> [I]."""
    return np.asarray(values.detach()[real].float().cpu().numpy())
