"""Packed attention equals attention within each sequence, for every backend."""

import inspect
import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import varlen
from torch.nn.utils.rnn import pad_sequence

from vjepa.nn import attention as module
from vjepa.nn.attention import Backend, Segments, attention, choose, refusal
from vjepa_data.settings import BadInput

CPU = torch.device("cpu")
RUNS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), min_size=1, max_size=5)


def available() -> list[tuple[Backend, torch.device, torch.dtype]]:
    """Return the backends that work on this machine, with a device and a type for each."""
    cases: list[tuple[Backend, torch.device, torch.dtype]] = []
    cases.append(("sdpa", CPU, torch.float32))
    if torch.cuda.is_available():
        cuda = torch.device("cuda")
        cases.append(("sdpa", cuda, torch.float32))
        cases.append(("sdpa", cuda, torch.bfloat16))
        others: tuple[Backend, ...] = ("varlen", "xformers")
        for backend in others:
            if refusal(backend, cuda, torch.bfloat16, head_widths=(32,)) is None:
                cases.append((backend, cuda, torch.bfloat16))
    return cases


def by_hand(q: Tensor, k: Tensor, v: Tensor, runs: list[tuple[int, int]]) -> Tensor:
    """Compute attention of each sequence alone, from the formula."""
    lengths = [length for count, length in runs for _ in range(count)]
    outputs = []
    for a, b, c in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        scores = torch.einsum("qhd,khd->hqk", a, b) / a.shape[-1] ** 0.5
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), c))
    return torch.cat(outputs)


def padded(q: Tensor, k: Tensor, v: Tensor, runs: list[tuple[int, int]]) -> Tensor:
    """Compute attention over sequences padded to the longest, with padding masked out."""
    lengths = [length for count, length in runs for _ in range(count)]
    filled = (pad_sequence(list(x.split(lengths)), batch_first=True).transpose(1, 2) for x in (q, k, v))
    is_token = torch.arange(max(lengths), device=q.device) < torch.tensor(lengths, device=q.device)[:, None]
    out = F.scaled_dot_product_attention(*filled, attn_mask=is_token[:, None, None])
    return out.transpose(1, 2)[is_token]


@pytest.mark.parametrize("expected", [by_hand, padded])
@pytest.mark.parametrize(("backend", "device", "dtype"), available())
@settings(max_examples=30, deadline=None)
@given(runs=RUNS)
def test_packed_attention_equals_one_call_per_sequence(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    expected: Callable[[Tensor, Tensor, Tensor, list[tuple[int, int]]], Tensor],
    runs: list[tuple[int, int]],
) -> None:
    segments = Segments.of(runs, backend=backend, device=device)
    tokens = sum(count * length for count, length in runs)
    drawn = torch.randn(4, tokens, 2, 32, generator=torch.Generator().manual_seed(0)).to(device)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    results = []
    for compute, cast in ((attention, dtype), (expected, torch.float32)):
        q, k, v = (x.to(dtype).to(cast).requires_grad_() for x in drawn[:3])
        out = attention(q, k, v, segments) if compute is attention else expected(q, k, v, runs)
        results.append([out, *torch.autograd.grad(out, (q, k, v), drawn[3].to(cast))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=tolerance)


def test_neighbours_of_equal_length_are_one_run() -> None:
    assert Segments.of([(2, 3), (1, 3), (1, 4), (2, 3)], device=CPU).runs == ((3, 3), (1, 4), (2, 3))


def test_varlen_gets_the_start_of_each_sequence() -> None:
    starts = Segments.of([(2, 3), (1, 4)], backend="varlen", device=CPU).starts
    assert starts is not None
    assert starts.dtype == torch.int32
    assert starts.tolist() == [0, 3, 6, 10]


def test_varlen_is_called_with_the_right_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels need a GPU. A stand-in with torch's signature computes its documented formula."""
    signature = inspect.signature(varlen.varlen_attn)

    def by_starts(*given: object, **named: object) -> Tensor:
        asked = signature.bind(*given, **named).arguments
        starts = asked["cu_seq_q"]
        assert starts is asked["cu_seq_k"]
        assert asked["max_q"] == asked["max_k"] == max(starts.diff().tolist())
        runs = [(1, length) for length in starts.diff().tolist()]
        return by_hand(asked["query"], asked["key"], asked["value"], runs)

    monkeypatch.setattr(varlen, "varlen_attn", by_starts)
    assert module._disagreement("varlen", CPU, torch.float32, 80) < 1e-5


def test_varlen_accepts_our_tensors() -> None:
    """The real operator and its registered derivative run on fake tensors, forward and backward."""
    with FakeTensorMode():
        segments = Segments.of([(2, 24), (1, 17)], backend="varlen", device=CPU)
        qkv = torch.randn(65, 3, 2, 88, dtype=torch.bfloat16, requires_grad=True)
        q, k, v = qkv.unbind(1)
        out = attention(q, k, v, segments)
        assert (out.shape, out.dtype) == ((65, 2, 88), torch.bfloat16)
        out.sum().backward()
        assert qkv.grad is not None
        assert qkv.grad.shape == qkv.shape


def test_xformers_is_called_with_the_right_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels need a GPU. A stand-in uses its own checks and mask with its documented formula."""
    fmha = pytest.importorskip("xformers.ops.fmha")

    def by_mask(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any) -> Tensor:
        fmha.common.Inputs(query, key, value, attn_bias).validate_inputs()
        tokens = query.shape[1]
        bias = attn_bias.materialize((1, query.shape[2], tokens, tokens), dtype=query.dtype)
        q, k, v = (x.transpose(1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
        return ((q @ k.transpose(-2, -1) + bias).softmax(-1) @ v).transpose(1, 2).contiguous()

    monkeypatch.setattr(fmha, "memory_efficient_attention", by_mask)
    assert module._disagreement("xformers", CPU, torch.float32, 80) < 1e-5


@pytest.mark.parametrize("width", [32, 48, 64, 80, 88])
def test_xformers_rejects_only_the_cpu(width: int) -> None:
    fmha = pytest.importorskip("xformers.ops.fmha")
    segments = Segments.of([(2, 24), (1, 17)], backend="xformers", device=CPU)
    qkv = torch.randn(65, 3, 2, width, dtype=torch.bfloat16)
    asked = fmha.common.Inputs(*(x[None] for x in qkv.unbind(1)), segments.blocks)
    for operator in (fmha.flash.FwOp, fmha.flash.BwOp, fmha.cutlass.FwOp, fmha.cutlass.BwOp):
        for reason in operator.not_supported_reasons(asked):
            assert re.match("device=cpu|bf16 is only supported on A100|operator wasn't built", reason), reason


def test_auto_logs_why_it_falls_back_to_sdpa(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="vjepa.nn.attention"):
        assert choose("auto", CPU, torch.float32) == "sdpa"
    assert "attention: sdpa, on cpu (for varlen: it needs a CUDA device, got cpu; for xformers: " in caplog.text


@settings(max_examples=30, deadline=None)
@given(runs=RUNS, seed=st.integers(0, 99))
def test_with_times_attention_is_causal(runs: list[tuple[int, int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(count * length for count, length in runs)
    q, k, v = torch.randn(3, tokens, 2, 8, generator=generator)
    times = torch.randint(0, 4, (tokens,), generator=generator)
    out = attention(q, k, v, Segments.of(runs, device=CPU, times=times))
    lengths = [length for count, length in runs for _ in range(count)]
    for own in torch.arange(tokens).split(lengths):
        for query in own:
            seen = own[times[own] <= times[query]]
            scores = torch.einsum("hd,khd->hk", q[query], k[seen]) / 8**0.5
            expected = torch.einsum("hk,khd->hd", scores.softmax(-1), v[seen])
            torch.testing.assert_close(out[query], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["varlen", "xformers"])
def test_backends_without_causal_masks_are_rejected(backend: Backend) -> None:
    with pytest.raises(BadInput, match=rf"parallel.attention \({backend}\).*model.causal is set; try auto"):
        choose(backend, CPU, torch.bfloat16, causal=True)
    assert choose("auto", CPU, torch.bfloat16, causal=True) == "sdpa"


@pytest.mark.parametrize("backend", ["varlen", "xformers"])
def test_an_unusable_explicit_backend_is_an_error(backend: Backend) -> None:
    with pytest.raises(BadInput, match=rf"parallel.attention \({backend}\).*needs a CUDA device.*try auto"):
        choose(backend, CPU, torch.bfloat16)


@pytest.mark.parametrize("kind", [ImportError, AssertionError])
def test_a_broken_installation_is_rejected(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a simulated CUDA device, varlen has no kernel and xformers cannot be imported."""

    def broken() -> None:
        raise kind("built for another torch\nand more")

    monkeypatch.setattr(module, "_load_xformers", broken)
    monkeypatch.setattr(torch.Tensor, "to", _stay_on_cpu(torch.Tensor.to))
    cuda = torch.device("cuda")
    assert refusal("xformers", cuda, torch.bfloat16, head_widths=(32,)) == f"{kind.__name__}: built for another torch"
    reason = refusal("varlen", cuda, torch.bfloat16, head_widths=(32,))
    assert reason is not None
    assert "Error" in reason


def _stay_on_cpu(real):
    def to(self: Tensor, *args: object, **options: object) -> Tensor:
        return real(self, *(a for a in args if isinstance(a, torch.dtype)))

    return to


def test_a_backend_with_wrong_results_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    right = module._sdpa
    calls = []

    def wrong(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
        calls.append(segments)
        return right(q, k, v, segments) * (1.5 if len(calls) == 1 else 1.0)

    monkeypatch.setattr(module, "_sdpa", wrong)
    reason = refusal("sdpa", CPU, torch.float32, head_widths=(32,))
    assert reason is not None
    assert "differs from sdpa" in reason
