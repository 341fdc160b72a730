"""`hstu_form: research` is the layer of HSTU's published research code, given the same weights.

The reference below states that layer anew, from the paper's equations 2 to 4 and the research code's conventions: one
projection for U, V, Q and K without bias, SiLU on all of it, norms without gains (eps 1e-6), SiLU(Q K' + bias) / N over
the lower triangle, the norm of the sum times U, a linear layer, the residual.
"""

from __future__ import annotations

import torch
from helpers_model import tiny
from torch import Tensor
from torch.nn import functional as F

from hpgr.model.hstu import HstuLayer
from hpgr.model.pgsa import visible_mask
from hpgr.model.relation import Pairs, Relation

B, N, D, H = 3, 16, 8, 2


def published(layer: HstuLayer, x: Tensor, bias: Tensor) -> Tensor:
    """One layer over [B, N, D] with a relative bias [B, H, N, N] (the query's own place on the diagonal)."""
    normed = F.layer_norm(x, (D,), eps=1e-6)
    u, v, q, k = F.silu(normed @ layer.project.weight.T).split(D, dim=-1)
    q, k, v = (t.view(B, N, H, D // H) for t in (q, k, v))
    activation = F.silu(torch.einsum("bnhd,bmhd->bhnm", q, k) + bias) / N
    activation = activation * torch.tril(torch.ones(N, N))
    mixed = torch.einsum("bhnm,bmhd->bnhd", activation, v).reshape(B, N, D)
    return F.linear(u * F.layer_norm(mixed, (D,), eps=1e-6), layer.out.weight, layer.out.bias) + x


def test_a_layer_equals_the_published_mathematics() -> None:
    torch.manual_seed(0)
    config = tiny(model={"name": "hstu", "hstu_form": "research", "silu_on": "u"}).model
    layer = HstuLayer(config, N).eval()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(B, N, D)
    place = torch.arange(N)
    before = place.expand(B, N)
    distance = (before[..., None] - place).clamp(0, N)
    age = torch.randint(0, config.time_buckets, (B, N, N))
    same = torch.rand(B, N, N) < 0.2
    bounds = (config.heads, N + 1, config.time_buckets)
    relation = Relation(Pairs(distance, age, same, bounds), visible_mask(before, N).float())
    with torch.no_grad():
        own = layer.uvqk(x)
        ours = layer.update(x, own, (own[3], own[1]), relation, None, 0)
        bias = layer.bias(relation.pairs)
        eye = torch.eye(N, dtype=torch.bool)
        bias = torch.where(eye, layer.bias.own[:, None, None], bias)
        theirs = published(layer, x, bias)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours - x).abs().max() > 0.1, "the layer does something"


def test_the_platforms_form_is_another_one() -> None:
    """The control: with the platform's scale and divisor the same weights give something else."""
    torch.manual_seed(0)
    research = HstuLayer(tiny(model={"hstu_form": "research"}).model, N)
    platform = HstuLayer(tiny(model={"silu_on": "uvqk"}).model, N)
    platform.load_state_dict(research.state_dict(), strict=False)
    torch.nn.init.zeros_(platform.project.bias)
    x, before = torch.randn(B, N, D), torch.arange(N).expand(B, N)
    nothing = torch.zeros(B, N, N, dtype=torch.long)
    bounds = (research.heads, N + 1, research.bias.time.shape[1])
    relation = Relation(Pairs(nothing, nothing, nothing.bool(), bounds), visible_mask(before, N).float())
    with torch.no_grad():
        outs = []
        for layer in (research, platform):
            own = layer.uvqk(x)
            outs.append(layer.update(x, own, (own[3], own[1]), relation, None, 0))
    assert (outs[0] - outs[1]).abs().max() > 1e-3
