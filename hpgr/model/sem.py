"""The Session Enhancement Module: an intra-session Transformer, then an inter-session one (paper, stage 1).

Both exist in two forms with the same weights: bidirectional, and causal, in which an event sees its own
session strictly before its own second, itself, and the summaries of earlier sessions [D].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpgr.config import Model
from hpgr.model.inputs import Inputs, round_up
from hpgr.model.noise import Dropout, Noise

SESSION_POSITIONS = 64
LONGEST_WAVE = 10_000.0


class Block(nn.Module):
    """Pre-norm Transformer block."""

    def __init__(self, width: int, heads: int, dropout: float, rotary: bool) -> None:
        super().__init__()
        self.heads, self.rotary = heads, rotary
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop1, self.drop2 = Dropout(dropout), Dropout(dropout)

    def forward(self, x: Tensor, allowed: Tensor, noise: Noise | None, stream: int) -> Tensor:
        """[B, T, D] under a mask [B, T, T] of allowed keys; every query must be allowed one."""
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        if self.rotary:
            q, k = rotated(q), rotated(k)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None])
        x = x + self.drop1(self.out(mixed.transpose(1, 2).flatten(2)), noise, stream)
        return x + self.drop2(self.mlp(self.norm2(x)), noise, stream)


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
        self.position = nn.Embedding(SESSION_POSITIONS, width)
        nn.init.normal_(self.position.weight, std=0.02)
        self.intra, self.inter = (
            nn.ModuleList(Block(width, config.heads, sem.dropout, sem.rotary) for _ in range(layers))
            for layers in (sem.intra_layers, sem.inter_layers)
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
        allowed = intra_mask(x, causal)
        for block in self.intra:
            encoded = block(encoded, allowed, noise, 0)
        return encoded, self._context(encoded, x, causal, noise)

    def _context(self, encoded: Tensor, x: Inputs, causal: Tensor, noise: Noise | None) -> Tensor:
        n = most_sessions(x)
        member = (x.h_session[:, None, :] == torch.arange(n, device=encoded.device)[:, None]) & x.h_real[:, None, :]
        member_BSN = member.to(encoded.dtype)
        size = member_BSN.sum(-1, keepdim=True)
        summary = member_BSN @ encoded / size.clamp(min=1)
        allowed = inter_mask(size[..., 0] > 0, causal)
        for block in self.inter:
            summary = block(summary, allowed, noise, 1)
        summary = self.back(self.norm(summary))
        shifted = F.pad(summary, (0, 0, 1, 0))[:, :-1]
        summary = torch.where(causal[:, None, None], shifted, summary)
        return member_BSN.transpose(1, 2) @ summary


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
    """Keys an event may see inside its session: [B, N, N]; always itself."""
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
