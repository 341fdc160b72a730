"""The Session Enhancement Module: an intra-session Transformer, then an inter-session one (paper, stage 1).

Both exist in two forms with the same weights: bidirectional, and causal, in which an event sees its own
session strictly before its own second, itself, and the summaries of earlier sessions [D].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpgr.config import Model
from hpgr.model.attention import recomputed
from hpgr.model.inputs import LANES, Inputs, round_up
from hpgr.model.noise import Dropout, Noise

SESSION_POSITIONS = 64
BLOCKS_FROM = 512
"""Events of a padded history from which sessions are attended to one by one: at 800, events of 20 a session, the module
takes half the time, at 4,096 a tenth, measured on one core; up to 400 it is even."""
LONGEST_WAVE = 10_000.0
Mix = Callable[[Tensor], Tensor]
"""Attention: queries, keys and values [B, T, 3, H, E] -> what each place takes of the others, [B, T, H E]."""


class Block(nn.Module):
    """Pre-norm Transformer block."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        width, dropout = config.width, config.sem.dropout
        self.heads, self.recompute = config.heads, False
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop1, self.drop2 = Dropout(dropout), Dropout(dropout)

    def forward(self, x: Tensor, mix: Mix, noise: Noise | None, stream: int) -> Tensor:
        """[B, T, D] -> [B, T, D]; `mix` knows who sees whom."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        x = x + self.drop1(self.out(recomputed(mix, self.recompute)(qkv)), noise, stream)
        return x + self.drop2(self.mlp(self.norm2(x)), noise, stream)


def attend_where(allowed: Tensor, rotary: bool) -> Mix:
    """Softmax attention under a mask [B, T, T] of allowed keys; every query must be allowed one."""

    def mix(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if rotary:
            q, k = rotated(q), rotated(k)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None])
        return mixed.transpose(1, 2).flatten(2)

    return mix


def rotated(x: Tensor) -> Tensor:
    """Queries or keys [..., T, E] turned by their places 0 to T - 1: their products then know how far apart they are.

    Rotary position embedding, arXiv 2104.09864: pairs of lanes turn, each at a speed of its own; an odd one stays.
    """
    half = x.shape[-1] // 2
    place = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)
    speed = torch.pow(LONGEST_WAVE, -torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = place[:, None] * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


class Sem(nn.Module):
    """Returns what a session adds to its events and what the other sessions add; the caller gates them."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        sem, width = config.sem, config.width
        self.rotary = sem.rotary
        self.position = nn.Embedding(SESSION_POSITIONS, width)
        nn.init.normal_(self.position.weight, std=0.02)
        self.intra, self.inter = (
            nn.ModuleList(Block(config) for _ in range(layers)) for layers in (sem.intra_layers, sem.inter_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.back = nn.Linear(width, width)

    def forward(
        self, tokens: Tensor, x: Inputs, noise: Noise | None, causal: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """History tokens [B, N, D] -> (intra-session encoding, inter-session context), both [B, N, D].

        `causal` [B] chooses the form row by row; None takes the batch's own.
        """
        causal = x.causal if causal is None else causal
        encoded = tokens + self.position(places_in_session(x.h_session))
        mix = self._within(x, causal)
        for block in self.intra:
            encoded = block(encoded, mix, noise, 0)
        return encoded, self._context(encoded, x, causal, noise)

    def _within(self, x: Inputs, causal: Tensor) -> Mix:
        """Attention inside sessions: of whole histories under a mask, or of each session alone where that is faster,
        which an exported program cannot know."""
        if torch.compiler.is_exporting() or x.h_item.shape[1] < BLOCKS_FROM:
            return attend_where(intra_mask(x, causal), self.rotary)
        return SessionBlocks.of(x, causal, self.rotary).mix

    def _context(self, encoded: Tensor, x: Inputs, causal: Tensor, noise: Noise | None) -> Tensor:
        rows, n = x.h_session.shape[0], most_sessions(x)
        place = (x.h_session + torch.arange(rows, device=encoded.device)[:, None] * n).flatten()
        real = x.h_real.flatten().to(encoded.dtype)
        size = real.new_zeros(rows * n).index_add(0, place, real)
        flat = encoded.flatten(0, 1)
        total = flat.new_zeros(rows * n, flat.shape[1]).index_add(0, place, flat * real[:, None])
        summary = (total / size.clamp(min=1)[:, None]).view(rows, n, -1)
        mix = attend_where(inter_mask(size.view(rows, n) > 0, causal), self.rotary)
        for block in self.inter:
            summary = block(summary, mix, noise, 1)
        summary = self.back(self.norm(summary))
        shifted = F.pad(summary, (0, 0, 1, 0))[:, :-1]
        summary = torch.where(causal[:, None, None], shifted, summary)
        return summary.flatten(0, 1).index_select(0, place).view_as(encoded) * x.h_real[..., None]


@dataclass(frozen=True)
class SessionBlocks:
    """The sessions of a batch, each a row of its own among those of like length, so that nothing is N x N [D].

    What a session's events see, and in which order it is summed, depends on that session alone.
    """

    index: list[Tensor]
    """Events of the sessions of a length, [S, L] places among all [B N]; beyond a session's end its first again."""
    allowed: list[Tensor]
    """Keys that they may see: [S, L, L]."""
    back: Tensor
    """Where each event went among all slots of all lengths, [B N]; padding to one slot more, which holds zeros."""
    rotary: bool

    @staticmethod
    def of(x: Inputs, causal: Tensor, rotary: bool) -> SessionBlocks:
        """Sessions of `x`; `causal` [B] as in `Sem`."""
        rows, n = x.h_session.shape
        device = x.h_session.device
        changed = F.pad(x.h_session[:, 1:] != x.h_session[:, :-1], (1, 0), value=True)
        first = (changed & x.h_real).flatten()
        start = first.nonzero()[:, 0]
        number = (first.cumsum(0) - 1)[x.h_real.flatten()]
        length = torch.bincount(number, minlength=len(start))
        unit = LANES << (torch.log2(length / LANES).floor().long() - 2).clamp(min=0)  # a quarter is padding at most
        side = (length + unit - 1) // unit * unit
        index, allowed, slots = [], [], 0
        back = torch.full((rows * n,), -1, device=device)
        for of_side in torch.unique(side).tolist():
            here = side == of_side
            begin, inside = start[here][:, None], torch.arange(of_side, device=device) < length[here][:, None]
            index.append(torch.where(inside, begin + torch.arange(of_side, device=device), begin))
            back[index[-1][inside]] = slots + inside.flatten().nonzero()[:, 0]
            slots += inside.numel()
            row = begin // n
            seen = x.h_visible.flatten()[index[-1]] + row * n - begin
            past = torch.arange(of_side, device=device) < seen[..., None]
            eye = torch.eye(of_side, dtype=torch.bool, device=device)
            allowed.append(inside[:, None, :] & (past | ~causal[row][..., None]) | eye)
        return SessionBlocks(index, allowed, torch.where(back < 0, slots, back), rotary)

    def mix(self, qkv: Tensor) -> Tensor:
        """Attention inside sessions, see `Mix`. Padding gets zeros."""
        flat = qkv.flatten(0, 1)
        parts = [
            attend_where(allowed, self.rotary)(
                flat.index_select(0, index.flatten()).view(*index.shape, *flat.shape[1:])
            )
            for index, allowed in zip(self.index, self.allowed, strict=True)
        ]
        nothing = flat.new_zeros(1, flat.shape[2] * flat.shape[3])
        mixed = torch.cat([*(part.flatten(0, 1) for part in parts), nothing])
        return mixed.index_select(0, self.back).view(*qkv.shape[:2], -1)


def most_sessions(x: Inputs) -> int:
    """S, at least the sessions of any row. An exported program may not look at values: it has a place an event."""
    return x.h_session.shape[1] if torch.compiler.is_exporting() else round_up(int(x.h_session.max()) + 1)


def places_in_session(session: Tensor) -> Tensor:
    """Place of each event in its session, counted from 0 and capped: [B, N]."""
    place = torch.arange(session.shape[1], device=session.device).expand_as(session)
    new = F.pad(session[:, 1:] != session[:, :-1], (1, 0), value=True)
    start = torch.where(new, place, 0).cummax(1).values
    return (place - start).clamp(max=SESSION_POSITIONS - 1)


def intra_mask(x: Inputs, causal: Tensor) -> Tensor:
    """Keys an event may see inside its session: [B, N, N]; always itself. The reference of `SessionBlocks`."""
    n = x.h_item.shape[1]
    place = torch.arange(n, device=x.h_item.device)
    same = (x.h_session[:, :, None] == x.h_session[:, None, :]) & x.h_real[:, None, :]
    past = place < x.h_visible[..., None]
    return same & (past | ~causal[:, None, None]) | torch.eye(n, dtype=torch.bool, device=place.device)


def inter_mask(real: Tensor, causal: Tensor) -> Tensor:
    """Sessions a session may see: all real ones, or those up to itself: [B, S] -> [B, S, S]."""
    n = real.shape[1]
    upto = torch.ones(n, n, dtype=torch.bool, device=real.device).tril()
    eye = torch.eye(n, dtype=torch.bool, device=real.device)
    return real[:, None, :] & (upto | ~causal[:, None, None]) | eye
