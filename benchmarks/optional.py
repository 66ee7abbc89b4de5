"""Peers that torch does not carry. Each makes a function of q, k, v in [B, S, H, D] for a case and names its version; NoRow says what it
can't compute. The imports stand inside: a peer that is not installed costs nothing and is reported by name."""

from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor

from gqa_autograd.testing import Case
from gqa_autograd.testing_varlen import offsets

from .packs import Pack

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
MODULES = {"fa3": "flash_attn_interface", "fa4": "flash_attn.cute", "flashinfer": "flashinfer", "fla": "fla"}


class NoRow(Exception):
    """The contestant does not compute this case."""


def version(*distributions: str) -> str:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """out, where some versions return out alone and others (out, lse)."""
    return result if isinstance(result, Tensor) else result[0]


def fa3(case: Case) -> tuple[Attend, str]:
    from flash_attn_interface import flash_attn_func

    options = {"softmax_scale": case.scale, "causal": case.causal, "window_size": case.window, "softcap": case.softcap}
    return lambda q, k, v: first(flash_attn_func(q, k, v, **options)), version("flash_attn_3", "flash-attn-3")


def fa3_packed(pack: Pack, device: torch.device) -> tuple[Attend, str]:
    from flash_attn_interface import flash_attn_varlen_func

    starts, longest = offsets(pack.lengths, device), max(pack.lengths)
    return (
        lambda q, k, v: first(flash_attn_varlen_func(q, k, v, starts, starts, longest, longest, causal=True)),
        version("flash_attn_3", "flash-attn-3"),
    )


def fa4(case: Case) -> tuple[Attend, str]:
    from flash_attn.cute import flash_attn_func

    window = tuple(None if side < 0 else side for side in case.window)
    options = {"softmax_scale": case.scale, "causal": case.causal, "window_size": window, "softcap": case.softcap}
    return lambda q, k, v: first(flash_attn_func(q, k, v, **options)), version("flash-attn-4", "flash-attn-cute")


def fa4_packed(pack: Pack, device: torch.device) -> tuple[Attend, str]:
    from flash_attn.cute import flash_attn_varlen_func

    starts = offsets(pack.lengths, device)
    options = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "causal": True}
    return lambda q, k, v: first(flash_attn_varlen_func(q, k, v, **options)), version("flash-attn-4", "flash-attn-cute")


def flashinfer(case: Case) -> tuple[Attend, str]:
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

    left, right = case.window
    if right != -1:
        raise NoRow("its window has a left side only")
    wrapper = BatchPrefillWithRaggedKVCacheWrapper(torch.empty(2**28, dtype=torch.uint8, device="cuda"), "NHD")
    starts = torch.arange(case.B + 1, dtype=torch.int32, device="cuda")
    heads = {"num_qo_heads": case.H_q, "num_kv_heads": case.H_kv, "head_dim_qk": case.D, "head_dim_vo": case.D_v or case.D}
    options = {"causal": case.causal, "window_left": left, "sm_scale": case.scale, "logits_soft_cap": case.softcap}
    # The plan is made once a shape, as a server makes it once a step: it is not part of the call
    wrapper.plan(starts * case.S_q, starts * case.S_kv, **heads, **options, q_data_type=case.dtype)
    packed = lambda t: t.flatten(0, 1)  # noqa: E731
    return lambda q, k, v: wrapper.run(packed(q), packed(k), packed(v)).unflatten(0, (case.B, case.S_q)), version("flashinfer-python")


def flashinfer_packed(pack: Pack, device: torch.device) -> tuple[Attend, str]:
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

    wrapper = BatchPrefillWithRaggedKVCacheWrapper(torch.empty(2**28, dtype=torch.uint8, device=device), "NHD")
    starts = offsets(pack.lengths, device)
    heads = {"num_qo_heads": pack.H_q, "num_kv_heads": pack.H_kv, "head_dim_qk": pack.D}
    wrapper.plan(starts, starts, **heads, causal=True, q_data_type=pack.dtype)
    return wrapper.run, version("flashinfer-python")


def fla(case: Case) -> tuple[Attend, str]:
    from fla.ops.attn import parallel_attn

    left, right = case.window
    if not case.causal or case.S_q != case.S_kv or case.softcap or right > 0:
        raise NoRow("it computes causal attention with S_q = S_kv, without softcap")
    # Its window counts the token itself
    window = None if left < 0 else left + 1
    return lambda q, k, v: parallel_attn(q, k, v, scale=case.scale, window_size=window), version("fla-core", "flash-linear-attention")
