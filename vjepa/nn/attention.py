"""Attention over packed sequences, with three backends behind a common function.

The sequences of a step (every clip under every mask) are concatenated in a tensor `[S H d]` without padding.
`Segments` describes which tokens attend to each other: runs of sequences of equal length.

    runs ((2, 3), (1, 4))      | a a a | b b b | c c c c |      S = 10

A token attends to all tokens of its own sequence or, with `times`, to tokens of its own time and earlier, and with
`oldest` to none before that time.

- `sdpa`: a call of torch's scaled_dot_product_attention for each run. It works everywhere. Masks with exact counts make
  few runs, so the other two have little to gain.
- `varlen`: torch's variable-length attention, in a single call. Needs CUDA and half precision. Has no `times`.
- `xformers`: `memory_efficient_attention` under a `BlockDiagonalMask`, in a single call. Needs CUDA. Has no `times`.

Letters: S tokens of all sequences, H heads, d channels of a head.
"""

import functools
import importlib
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa.compat import CPU_ATTENTION
from vjepa.nn.shapes import Bool, Float, Int
from vjepa_data.errors import BadInput

log = logging.getLogger(__name__)

Backend = Literal["sdpa", "varlen", "xformers"]

Run = tuple[int | torch.SymInt, int]
"""Number of sequences, which a tracer such as `torch.export` may leave open, and tokens in each."""


@dataclass(frozen=True)
class Segments:
    """The sequences of a packed tensor, prepared for a backend."""

    runs: tuple[Run, ...]
    """(sequences, tokens in each) of neighbours of equal length. Empty for `varlen`, whose other fields suffice:
    torch.compile would recompile a block for every number of runs."""

    backend: Backend = "sdpa"
    """Backend for more than one run. A single run is an ordinary batch and always uses sdpa."""

    starts: Int[Tensor, " starts"] | None = field(default=None, repr=False)
    """First token of each sequence, then S, as int32 on the device. Only for `varlen`."""

    longest: int = 0
    """Tokens of the longest sequence. Only for `varlen`: a compiled block then serves any mixture."""

    blocks: Any = field(default=None, repr=False)
    """The runs as a `BlockDiagonalMask`, on the device. Only for `xformers`."""

    masks: tuple[Bool[Tensor, "_sequences 1 _length _length"], ...] | None = field(default=None, repr=False)
    """Attention mask [.. query key] of each run, None for the full sequence. Only for `sdpa`."""

    @classmethod
    def of(
        cls,
        runs: Sequence[Run],
        *,
        backend: Backend = "sdpa",
        device: torch.device,
        times: Int[Tensor, " S"] | None = None,
        oldest: Int[Tensor, " S"] | None = None,
    ) -> "Segments":
        """Join neighbours of equal length and prepare the backend's tensors.

        Args:
            runs: (sequences, tokens in each), in the order of the packed tensor.
            backend: result of `choose`.
            device: device of the packed tensor.
            times: time of each token. A token then attends to its own time and earlier times only.
            oldest: the earliest time that each token attends to. By default without a limit.
        """
        joined: list[Run] = []
        for count, length in runs:
            if joined and joined[-1][1] == length:
                joined[-1] = (joined[-1][0] + count, length)
            else:
                joined.append((count, length))
        starts, longest, blocks = None, 0, None
        if backend != "sdpa" and len(joined) > 1:  # before 2.13 a list as long as the batch stops `torch.export`
            lengths = [length for count, length in joined for _ in range(count)]
            if backend == "varlen":
                longest, ends = max(lengths), itertools.accumulate(lengths)
                starts = torch.tensor([0, *ends], dtype=torch.int32).to(device, non_blocking=True)
            else:
                blocks = _load_xformers().attn_bias.BlockDiagonalMask.from_seqlens(lengths, device=device)
        masks = None
        if times is not None:
            assert backend == "sdpa", "`choose` returns sdpa for causal models"
            keys = _by_run(times, joined)
            masks = tuple((each[:, :, None] >= each[:, None, :])[:, None] for each in keys)
            if oldest is not None:
                limits = zip(masks, keys, _by_run(oldest, joined), strict=True)
                masks = tuple(mask & (key[:, None, :] >= limit[:, :, None])[:, None] for mask, key, limit in limits)
        return Segments(() if starts is not None else tuple(joined), backend, starts, longest, blocks, masks)


def _by_run(values: Tensor, runs: Sequence[Run]) -> list[Int[Tensor, "_sequences _length"]]:
    parts = values.split([count * length for count, length in runs])
    return [part.unflatten(0, run) for part, run in zip(parts, runs, strict=True)]


def attention(
    q: Float[Tensor, "S H d"], k: Float[Tensor, "S H d"], v: Float[Tensor, "S H d"], segments: Segments
) -> Float[Tensor, "S H d"]:
    """Compute attention within each sequence.

    Args:
        q: queries.
        k: keys.
        v: values.
        segments: the sequences, and the backend.

    Returns:
        softmax(q k' / sqrt(d)) v within each sequence.
    """
    if len(segments.runs) == 1 or segments.backend == "sdpa":
        return _sdpa(q, k, v, segments)
    if segments.backend == "varlen":
        return _varlen(q, k, v, segments)
    return _xformers(q, k, v, segments)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    outputs, start = [], 0
    for number, (count, length) in enumerate(segments.runs):
        q_run, k_run, v_run = (
            x[start : start + count * length].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v)
        )  # [count H length d]
        mask = segments.masks[number] if segments.masks is not None else None
        if q.is_meta:  # fused, as on every device; torch's own choice for the meta device would be the unfused form
            run = CPU_ATTENTION(q_run, k_run, v_run, attn_mask=mask)[0]
        else:
            run = F.scaled_dot_product_attention(q_run, k_run, v_run, attn_mask=mask)
        outputs.append(run.transpose(1, 2).flatten(0, 1))
        start += count * length
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = segments.starts, segments.longest
    assert starts is not None, "Segments.of prepares the starts"
    out = varlen_attn(q, k, v, starts, starts, longest, longest)
    assert isinstance(out, Tensor)
    return out


def _xformers(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    return _untraced_xformers()(q, k, v, segments)


@functools.cache
def _untraced_xformers() -> Callable[[Tensor, Tensor, Tensor, Segments], Tensor]:
    """Keep torch.compile out. Made on first use, since it imports the compiler, which takes as long as torch itself."""
    run: Any = torch.compiler.disable(_memory_efficient, reason="xformers picks its kernel in Python")
    return run


def _memory_efficient(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    return _load_xformers().memory_efficient_attention(q[None], k[None], v[None], attn_bias=segments.blocks)[0]


def _load_xformers() -> ModuleType:
    """Import xformers' attention on first use: each wheel supports a single torch and warns under any other."""
    return importlib.import_module("xformers.ops.fmha")


def choose(
    backend: Literal["auto"] | Backend,
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_widths: Sequence[int] = (64,),
    compiled: bool = False,
    causal: bool = False,
) -> Backend:
    """Choose the attention backend, after comparing it with sdpa forward and backward.

    `auto` takes the first of varlen, xformers, sdpa that works. The order is fixed, so that all ranks and all attempts
    of a run agree.

    Args:
        backend: backend of the settings.
        device: device of the model.
        dtype: type of activations.
        head_widths: channels of a head, in every stack that will use the backend.
        compiled: whether blocks are compiled as a whole.
        causal: whether tokens must not attend to later times.

    Raises:
        BadInput: the settings name a backend that does not work here. The text gives the reason.
    """
    if backend == "sdpa":
        return "sdpa"
    passed_over = []
    for name in ("varlen", "xformers") if backend == "auto" else (backend,):
        reason = refusal(name, device, dtype, head_widths=head_widths, compiled=compiled, causal=causal)
        if not reason:
            log.info("attention: %s agrees with sdpa, forward and backward, on %s in %s", name, device.type, dtype)
            return name
        if backend != "auto":
            raise BadInput(f"parallel.attention ({name}) does not work here: {reason}; try auto")
        passed_over.append(f"{name}: {reason}")
    log.info("attention: sdpa, on %s (for %s)", device.type, "; for ".join(passed_over))
    return "sdpa"


def refusal(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_widths: Sequence[int],
    compiled: bool = False,
    causal: bool = False,
) -> str | None:
    """Return the reason why a backend cannot be used here as a single line, or None if it can.

    Args:
        backend: name of the backend.
        device: device of the model.
        dtype: type of queries, keys and values.
        head_widths: channels of a head to try.
        compiled: whether blocks are compiled as a whole.
        causal: whether tokens must not attend to later times.
    """
    if backend != "sdpa" and causal:
        return "it cannot mask later times, and model.causal is set"
    if backend != "sdpa" and device.type != "cuda":
        return f"it needs a CUDA device, got {device.type}"
    if backend == "varlen" and dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bf16, got {str(dtype).removeprefix('torch.')}"
    if backend == "xformers" and compiled:
        return "it cannot be compiled, and parallel.compile is set"
    for width in head_widths:
        try:
            error = _disagreement(backend, device, dtype, width)
        except _REFUSALS as caught:
            return f"{type(caught).__name__}: {(str(caught).strip() or 'no message').splitlines()[0]}"
        if not error <= _TOLERANCE.get(dtype, 5e-2):
            return f"it differs from sdpa by {error:.2g} with heads of {width} channels"
    return None


def measure(
    backend: Backend,
    runs: Sequence[Run],
    *,
    heads: int,
    head_width: int,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int = 10,
) -> float:
    """Return the milliseconds of attention, forward and backward, on noise of a run's shapes: the least of `repeats`.

    Args:
        backend: a backend that works here, see `refusal`.
        runs: (sequences, tokens in each), as a step has them.
        heads, head_width: number of heads, and channels of each.
        device: device of the model.
        dtype: type of queries, keys and values.
        repeats: measurements, after three that are not counted.
    """
    segments = Segments.of(runs, backend=backend, device=device)
    tokens = sum(int(count) * length for count, length in runs)
    drawn = torch.randn(tokens, 3, heads, head_width, device=device, dtype=dtype)  # strides as in a block
    q, k, v = (x.detach().requires_grad_() for x in drawn.unbind(1))
    change, found = torch.randn_like(q), []
    for _ in range(3 + repeats):
        _wait(device)
        start = time.perf_counter()
        torch.autograd.grad(attention(q, k, v, segments), (q, k, v), change)
        _wait(device)
        found.append(1e3 * (time.perf_counter() - start))
    return min(found[3:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Raised by a package built for another torch, driver or GPU when it is imported, dispatched or launched.
_REFUSALS = (
    ImportError, AttributeError, AssertionError, NotImplementedError, RuntimeError, OSError, ValueError, TypeError,
)  # fmt: skip

# Largest accepted difference of outputs and gradients of order 1; 5e-2 for types that are not listed. Rounding to bf16
# gives up to 1.5e-2 (sdpa on a CPU, heads of 32 to 128 channels, 200 seeds each). Attention to one token of another
# sequence gives at least 0.4.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}


def _disagreement(backend: Backend, device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Return the largest difference from sdpa in fp32, of output and gradients, on three short sequences."""
    generator = torch.Generator().manual_seed(0)
    runs = [(2, 24), (1, 17)]
    packed, plain = (Segments.of(runs, device=device, backend=name) for name in (backend, "sdpa"))
    tokens = sum(count * length for count, length in runs)
    drawn = torch.randn(tokens, 3, 2, width, generator=generator).to(device, dtype)  # strides as in a block
    change = torch.randn(tokens, 2, width, generator=generator).to(device, dtype)
    results = []
    for segments, cast in ((packed, dtype), (plain, torch.float32)):
        q, k, v = (x.detach().to(cast).requires_grad_() for x in drawn.unbind(1))
        out = attention(q, k, v, segments)
        gradients = torch.autograd.grad(out, (q, k, v), change.to(cast))
        results.append(torch.stack([out, *gradients]).float())
    return (results[0] - results[1]).abs().max().item()
