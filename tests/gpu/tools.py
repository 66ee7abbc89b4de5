"""What several files of GPU tests need."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import gqa_autograd
from gqa_autograd import meta
from gqa_autograd.testing import Result
from gqa_autograd.testing_varlen import PackedCase


def kernels_of(function: Callable[[], object]) -> list[str]:
    """The names of our kernels that ran, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if "attention" in event.name]


@torch.no_grad()
def forward(case: PackedCase, q: Tensor, k: Tensor, v: Tensor, do: Tensor, *cu_seqlens: Tensor, **more) -> Result:
    """out and lse of a packing, as testing_varlen's functions take them; the gradients are zeros."""
    out, lse = gqa_autograd.attention_varlen_with_lse(q, k, v, *cu_seqlens, **case.options, **more)
    return Result(out, lse, *(torch.zeros_like(t) for t in (q, k, v)))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also where both hold the same NaN, as a poisoned row that nobody wrote does."""
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def poisoned_workspace(device: torch.device) -> None:
    """NaN in memory that the next allocations are likely to be made of, from both pools of torch's allocator: a sum that starts from what
    it finds there is seen."""
    held = [torch.full((elements,), torch.nan, device=device) for elements in (2**26, *(2**17,) * 16, *(2**10,) * 16)]
    del held


@contextlib.contextmanager
def fenced(monkeypatch, elements: int = 2**16) -> Iterator[list[Tensor]]:
    """out, lse and gradients of packed calls lie between two strips of NaN, which are listed: a write beyond an end is seen there."""
    strips: list[Tensor] = []

    def between(t: Tensor) -> Tensor:
        whole = t.new_full((t.numel() + 2 * elements,), torch.nan)
        strips.extend((whole[:elements], whole[-elements:]))
        return whole[elements:-elements].view(t.shape)

    with monkeypatch.context() as patch:
        for name in ("attention_varlen_fwd_lse", "attention_varlen_bwd"):
            original = getattr(meta, name)
            patch.setattr(meta, name, lambda *args, original=original: tuple(map(between, original(*args))))
        yield strips
