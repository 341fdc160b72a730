"""Fused kernels equal the forms they replace: by Triton's interpreter on a CPU, as they are on a GPU."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_model import SIZES, log_config, make_run, random_batch, shaken, tiny, worker
from test_gather import drawn_attention
from torch import Tensor
from torch.nn import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)
with pytest.MonkeyPatch.context() as patch:
    if DEVICE == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")  # read where kernels are defined
    from hpgr.model import fused, fused_select
    from hpgr.on_ray.benchmarks.attention_parts import attention_alone
    from hpgr.on_ray.benchmarks.dense_kernel import DenseKernel

from hpgr.config import validate
from hpgr.errors import ConfigError
from hpgr.model.gather import Links, attend_kept
from hpgr.model.hstu import HstuEncoder, RelativeBias
from hpgr.model.inputs import pad
from hpgr.model.pgsa import select_anchors
from hpgr.model.registry import click_model
from hpgr.model.relation import FUSED_FROM, Pairs, Queries, check_triton, fuses, relate_kept
from hpgr.model.select import FUSED_EVENTS, Kept, select_keys
from hpgr.on_ray.benchmarks import attention
from hpgr.training.two_stage import tell_of_triton, train

SHAPES = pytest.mark.parametrize(
    ("b", "h", "q", "n", "e"),
    [(1, 1, 1, 1, 1), (2, 3, 5, 9, 5), (1, 2, 3, 80, 16), (3, 1, 7, 40, 8)],
    ids=["one of all", "odd sizes", "more slots than a block", "many queries a key"],
)


AGES = 5
CLOSE = {"rtol": 1e-4, "atol": 1e-4} if DEVICE == "cpu" else {"rtol": 1e-2, "atol": 1e-1}
"""For the dense kernel: on a GPU its products are in TF32, and its sigmoids rough."""


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, fused_form: bool) -> list[Tensor]:
    """Attention over drawn kept keys: slots in use or not, queries without any, keys that no query keeps.

    The result, and gradients of queries, keys, values and all biases.
    """
    b, h, q, n, _ = shape
    drawn, kept = drawn_attention(*shape, seed=n)  # type: ignore[misc]
    kept = Kept(kept.index.to(DEVICE), kept.weight.float().to(DEVICE))
    queries, k, v, k_self, v_self = (t.detach().to(DEVICE, dtype).requires_grad_() for t in drawn[:5])
    torch.manual_seed(0)
    bias = RelativeBias(h, n, AGES).to(DEVICE)
    for table in bias.parameters():
        torch.nn.init.normal_(table)
    slots = (b, q, kept.index.shape[2])
    distance, age, same = (torch.randint(0, most, slots).to(DEVICE) for most in (n + 1, AGES, 2))
    pairs = Pairs(distance, age.int(), same.bool(), (h, n + 1, AGES))
    links, attention = Links(kept.index, kept.weight, n, h, pairs.code), (queries, k, v, (k_self, v_self))
    if fused_form:
        out = fused.attend_fused(*attention, bias, links)
    else:
        out = attend_kept(*attention, bias(pairs), bias.own, links)
    factor = torch.linspace(-1, 2, out.numel(), device=DEVICE).view(out.shape)
    return [out, *torch.autograd.grad((out * factor).sum(), [queries, k, v, k_self, v_self, *bias.parameters()])]


@SHAPES
def test_values_and_all_gradients_are_those_of_the_gather_form(b: int, h: int, q: int, n: int, e: int) -> None:
    ours, theirs = (values_and_gradients((b, h, q, n, e), torch.float32, form) for form in (True, False))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_halves_go_in_and_sums_are_whole() -> None:
    """bf16 as autocast has it: the error is that of the inputs' rounding, not of sums in bf16."""
    shape = (1, 2, 6, 400, 16)
    ours = values_and_gradients(shape, torch.bfloat16, True)
    whole = values_and_gradients(shape, torch.float32, False)
    assert ours[0].dtype == torch.float32
    for mine, other in zip(ours[:4], whole[:4], strict=True):
        assert float((mine.float() - other).detach().norm() / other.detach().norm()) < 0.01


@pytest.mark.skipif(DEVICE == "cpu", reason="can fail on a GPU alone: the interpreter runs programs in turn")
def test_gradients_are_the_same_bits_twice() -> None:
    """Biases' too, whose sums many programs share."""
    once, twice = (values_and_gradients((2, 2, 20, 40, 8), torch.float32, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def drawn_choice(b: int, q: int, n: int, d: int, items: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and histories of a few items, so that relevances tie; one query sees nothing and one everything."""
    generator = torch.Generator().manual_seed(n)
    table = F.normalize(torch.randn(items, d, generator=generator), dim=-1)
    query, key = (table[torch.randint(0, items, (b, size), generator=generator)] for size in (q, n))
    visible = torch.randint(0, n + 1, (b, q), generator=generator)
    visible[0, 0], visible[-1, -1] = 0, n
    return query.to(DEVICE), key.to(DEVICE), visible.to(DEVICE)


@pytest.mark.parametrize(
    ("shape", "top_k", "sigma", "cap"),
    [
        ((2, 7, 50, 5, 9), 3, 1.0, None),
        ((1, 30, 200, 16, 20), 8, 1.0, 20),
        ((2, 5, 33, 3, 4), 40, 0.0, None),
        ((1, 9, 300, 70, 100), 40, 2.0, 64),
        ((1, 6, 1000, 16, 3), 8, 0.5, 64),
        ((1, 6, 1000, 16, 500), 8, 0.5, 64),
        ((1, 1, 1, 4, 1), 1, 1.0, None),
    ],
    ids=[
        "small",
        "capped",
        "more anchors than events",
        "more dimensions than a tile",
        "hundreds tie",
        "more blocks than survive",
        "one of all",
    ],
)
def test_the_choice_is_the_plain_one(shape: Any, top_k: int, sigma: float, cap: int | None) -> None:
    drawn = drawn_choice(*shape)
    plain, chosen = (select_keys(*drawn, top_k, sigma, cap, fused=by_kernels) for by_kernels in (False, True))
    assert torch.equal(chosen.index, plain.index)
    assert torch.equal(chosen.weight, plain.weight)


def test_the_choice_goes_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = drawn_choice(1, 70, 40, 4, 12)
    whole = fused_select.choose_anchors(*drawn, 4)
    monkeypatch.setattr(fused_select, "SCREENED", 1)
    assert torch.equal(fused_select.choose_anchors(*drawn, 4), whole)


def test_near_relevances_are_told_apart_exactly() -> None:
    """Screening, in 16 bits, cannot; what survives it is ranked in float64."""
    angle = torch.linspace(0, 1e-3, 30, dtype=torch.float64)
    key = torch.stack([angle.cos(), angle.sin()], -1).float()[torch.randperm(30)].to(DEVICE)[None]
    query, visible = key.new_tensor([[[1.0, 0.0]]]), torch.tensor([[30]], device=DEVICE)
    chosen = fused_select.choose_anchors(query, key, visible, 14)[0, 0].sort().values
    assert torch.equal(chosen.long(), select_anchors(query, key, visible, 14)[0][0, 0].sort().values)


def test_what_cannot_be_ranked_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"got 10 events and top_k 600, .* at most 262144 and 496; use .*gather"):
        fused_select.choose_anchors(*drawn_choice(1, 2, 10, 4, 3), 600)


@pytest.mark.parametrize("count", [(0, 5), (4, 0)], ids=["no queries", "no history"])
def test_of_nothing_nothing_is_chosen(count: tuple[int, int]) -> None:
    query, key = (torch.zeros(2, size, 4, device=DEVICE) for size in count)
    kept = select_keys(query, key, torch.zeros(2, count[0], dtype=torch.int64, device=DEVICE), 3, 1.0, fused=True)
    assert not kept.count().any()
    assert kept.index.shape[:2] == (2, count[0])


def test_nothing_beyond_the_history_is_kept() -> None:
    query, key, visible = drawn_choice(1, 3, 20, 4, 5)
    kept = select_keys(query, key, visible + 99, 3, 1.0, fused=True)
    assert torch.equal(kept.index, select_keys(query, key, torch.full_like(visible, 20), 3, 1.0).index)


def test_auto_takes_the_kernels_where_they_run_and_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert fuses("auto", FUSED_FROM, gpu)
    assert fuses("auto", FUSED_EVENTS, gpu)
    assert fuses("triton", 1, gpu)
    for n, device in ((FUSED_FROM - 1, gpu), (FUSED_EVENTS + 1, gpu), (1000, torch.device("cpu"))):
        assert not fuses("auto", n, device)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", "")
    assert not fuses("auto", 1000, gpu), "no compiler"
    with pytest.raises(ConfigError, match="no C compiler"):
        check_triton(gpu)


@pytest.mark.parametrize("impl", ["auto", "gather", "reference"])
def test_a_run_whose_gpu_cannot_have_the_kernels_tells_what_it_goes_without(
    impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CC", "")
    monkeypatch.setenv("PATH", "")
    said: list[str] = []
    for device in ("cpu", "cuda"):
        tell_of_triton(impl, replace(worker(say=said.append), device=torch.device(device)))
    assert [("no C compiler" in line and "whole maps" in line) for line in said] == [True] * (impl == "auto")


def test_codes_are_those_of_pairs() -> None:
    config, x = tiny(stream={"window": 9}).model, pad(random_batch(3, 14, 4, seed=2), DEVICE)
    queries = Queries(x.c_item, x.c_time, x.c_visible)
    index = torch.randint(0, x.h_item.shape[1], (*x.c_item.shape, 7)).to(DEVICE)
    kept = Kept(index, torch.ones(index.shape, device=DEVICE))
    pairs = relate_kept(x, queries, kept, config, 9).pairs
    links = relate_kept(x, queries, kept, config, 9, fused=True).weights
    assert pairs is not None
    assert isinstance(links, Links)
    assert torch.equal(links.code, pairs.code)


def test_the_dense_kernel_of_the_benchmark_is_attention_without_a_bias() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 150, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    past = torch.ones(150, 150, device=DEVICE).tril(-1)
    plain = (F.silu(q @ k.transpose(2, 3) / 4) * past) @ v
    out: Tensor = DenseKernel.apply(q, k, v)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(out, plain, **CLOSE)
    grad = torch.randn_like(plain)
    for ours, theirs in zip(*(torch.autograd.grad(o, (q, k, v), grad) for o in (out, plain)), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_the_baseline_encoder_is_dense_hstu_without_a_bias() -> None:
    model = validate({"model": {"width": 32, "heads": 2, "layers": 2, "dropout": 0.0}}).model
    case = attention.Case(model, 70, 2, DEVICE, 1)
    torch.manual_seed(0)
    encoder, tokens = HstuEncoder(model, 70).to(DEVICE), torch.randn(2, 70, 32, device=DEVICE)
    for layer in encoder.layers:
        for table in (layer.bias.position, layer.bias.time):
            torch.nn.init.zeros_(table)
        torch.nn.init.normal_(layer.bias.own)
    x, table = case.inputs(), torch.randn(attention.ITEMS, 32, device=DEVICE)
    ours = attention.encoded_by_kernel(encoder, tokens, x)
    torch.testing.assert_close(ours, attention.encoded(encoder, tokens, case.relation(x, table, "dense")), **CLOSE)


def test_attention_alone_counts_what_is_done_once() -> None:
    parts = {"choice": {"forward": 3.0}, "relation": {"forward": 1.0}, "order": {"forward": 2.0}}
    layers = {"sparse": {"forward": 1.0, "backward": 2.0}, "dense_kernel": {"forward": 4.0, "backward": 8.0}}
    assert attention_alone(parts | layers, 2) == 24 / (6 + 6)


def outcome(impl: str, **pgsa: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores and gradients of the click model."""
    torch.manual_seed(0)
    model = shaken(click_model(tiny(stream={"window": 9}, model={"pgsa": {"impl": impl, **pgsa}}), SIZES)).to(DEVICE)
    output = model(pad(random_batch(2, 11, 3, seed=2), DEVICE, lanes=4))  # few places: the interpreter is slow
    output.loss.backward()
    return output.scores, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "pgsa", [{}, {"sigma": 2.0, "max_keys": 5}, {"scope": "candidate", "anchors": "live"}, {"sessions": 1, "top_k": 3}]
)
def test_the_model_is_the_references(pgsa: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = fused.attend_fused
    monkeypatch.setattr(fused, "attend_fused", lambda *a: calls.append(1) or plain(*a))
    scores, gradients = outcome("reference", **pgsa)
    assert not calls
    ours, our_gradients = outcome("triton", **pgsa)
    assert calls
    torch.testing.assert_close(ours, scores, rtol=1e-4, atol=1e-5)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.skipif(DEVICE == "cuda", reason="has a GPU")
def test_without_a_gpu_it_is_refused_before_stage_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    run = make_run(log_config(tmp_path, model={"pgsa": {"impl": "triton"}}), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"impl triton: got a model on cpu and no GPU, .* use model\.pgsa\.impl=auto"):
        train(run, worker())
    assert not run.folder.sub("stage1").entries()
