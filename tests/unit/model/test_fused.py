"""Fused kernels equal the forms they replace: by Triton's interpreter on a CPU, as they are on a GPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers_model import SIZES, log_config, make_run, random_batch, shaken, tiny, worker
from test_gather import drawn_attention
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if find_spec("triton") is None:
    pytest.skip("the package triton is not installed", allow_module_level=True)
with pytest.MonkeyPatch.context() as patch:
    if DEVICE == "cpu":
        patch.setenv("TRITON_INTERPRET", "1")  # read where kernels are defined
    from hpgr.model import fused

from hpgr.errors import ConfigError
from hpgr.model.gather import Links, attend_kept
from hpgr.model.hstu import RelativeBias
from hpgr.model.inputs import pad
from hpgr.model.registry import click_model
from hpgr.model.relation import Pairs
from hpgr.model.select import Kept
from hpgr.training.two_stage import train

SHAPES = pytest.mark.parametrize(
    ("b", "h", "q", "n", "e"),
    [(1, 1, 1, 1, 1), (2, 3, 5, 9, 5), (1, 2, 3, 80, 16), (3, 1, 7, 40, 8)],
    ids=["one of all", "odd sizes", "more slots than a block", "many queries a key"],
)


AGES = 5


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


def outcome(impl: str, **pgsa: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores and gradients of the click model."""
    torch.manual_seed(0)
    model = shaken(click_model(tiny(stream={"window": 9}, model={"pgsa": {"impl": impl, **pgsa}}), SIZES)).to(DEVICE)
    output = model(pad(random_batch(3, 14, 4, seed=2), DEVICE))
    output.loss.backward()
    return output.scores, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("pgsa", [{}, {"sigma": 2.0, "max_keys": 5}, {"scope": "candidate", "anchors": "live"}])
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
    with pytest.raises(ConfigError, match=r"impl triton: got a model on cpu .* use model\.pgsa\.impl=auto"):
        train(run, worker())
    assert not run.folder.sub("stage1").entries()
