"""What runs where: `supported` lists it, `explain` says it of one call, `warmup` builds it ahead."""

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, functional, functional_decode, ops, ops_decode, ops_varlen
from .support_decode import warm_decode


class Support(NamedTuple):
    """One row of `supported()`. Head sizes are pairs (D, D_v), of attention_decode D; None stands for any. Of what the forward has,
    `backward` names the part that gradients have too."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    D_forward: tuple[tuple[int, int], ...] | None
    D_backward: tuple[tuple[int, int], ...] | None
    D_decode: tuple[int, ...] | None
    forward: tuple[str, ...]
    backward: tuple[str, ...]
    body: str


class Explanation(NamedTuple):
    """What a call would run: the operators in order, who computes them, and on CUDA their tiles."""

    operators: tuple[str, ...]
    body: str
    forward_tile: tuple | None
    backward_tile: tuple | None

    def __str__(self) -> str:
        tiles = [f"{name} {tile}" for name, tile in (("forward", self.forward_tile), ("backward", self.backward_tile)) if tile]
        return "; ".join([f"{', then '.join(self.operators)}: {self.body}", *tiles])


REFERENCE = "the definition in plain PyTorch"
KERNEL = "TileLang kernels for sm_90a"
FEATURES = ("causal", "window", "softcap", "deterministic", "varlen")


def supported() -> tuple[Support, ...]:
    """What `attention`, by the feature "varlen" `attention_varlen`, and with D_decode `attention_decode` compute, a row for each kind of
    device; everything else raises NotImplementedError or TypeError there.

    Lengths, head counts with H_q a multiple of H_kv, strides and finite scales are free on every device.

    Returns: a tuple of `Support`, readable without a GPU and without tilelang.
    Raises: nothing.
    """
    from .kernels import config

    return (
        Support("cpu", checks.CPU_DTYPES, None, None, None, FEATURES, FEATURES, REFERENCE),
        Support("cuda (sm_90)", checks.CUDA_DTYPES, config.D_FORWARD, config.D_BACKWARD, config.D_DECODE, FEATURES, FEATURES, KERNEL),
    )


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    return_lse: bool = False,
    **options,
) -> Explanation:
    """Says what `attention(q, k, v, **options)` would run, and runs nothing.

    Args:
        q, k, v, options: as for `attention`; grad mode and requires_grad count as they do there.
        cu_seqlens_q, cu_seqlens_k: explain `attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)` instead.
        cache_seqlens: explain `attention_decode(q, k, v, cache_seqlens, **options)` instead; options may have a page_table.
        return_lse: explain `attention_with_lse`, or `attention_varlen_with_lse`, instead.
    Returns: Explanation, whose str() is one readable line. form="split" in a tile: the keys of a tile go to several blocks, since the
        queries alone would not fill the device; asked of tensors on a GPU, since it depends on its size.
    Raises: what the call would raise, with the same message.
    """
    if cache_seqlens is not None:
        return _explain_decode(q, k, v, cache_seqlens, return_lse, **options)
    if cu_seqlens_q is None and cu_seqlens_k is None:
        prefix = "attention"
        q, k, v, settings = functional.settle(prefix, q, k, v, **options)
        checks.attention(prefix, q, k, v, settings.scale, settings.softcap)
    else:
        prefix = "attention_varlen"
        q, k, v, settings = functional.settle_varlen(prefix, q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
        assert cu_seqlens_q is not None and cu_seqlens_k is not None  # noqa: PT018, or settle_varlen had refused
        checks.attention_varlen(prefix, q, k, v, cu_seqlens_q, cu_seqlens_k, settings.scale, settings.softcap)
    backward = functional.needs_grad(q, k, v)
    operators = ["fwd_lse" if backward or return_lse else "fwd"] + ["bwd"] * backward
    tiles = (ops if prefix == "attention" else ops_varlen).tiles(q, v, settings, backward)
    if prefix == "attention" and tiles[0] is not None and torch.cuda.is_available():
        tiles = _as_launched(tiles[0], tiles[1], q, k, settings)
    return Explanation(tuple(f"{prefix}_{name}" for name in operators), REFERENCE if tiles == (None, None) else KERNEL, *tiles)


def warmup(
    D: int | Iterable[int] = 128,
    dtype: torch.dtype | Iterable[torch.dtype] = torch.bfloat16,
    *,
    D_v: int | None = None,
    causal: bool | None = None,
    window: bool = False,
    softcap: bool = False,
    varlen: bool = False,
    decode: bool = False,
    backward: bool = True,
    device: torch.device | str | int | None = None,
) -> int:
    """Builds the kernels that these configurations need, so that no later call compiles: before a time measurement, a CUDA graph
    capture, or in one process before the ranks of a job start.

    Args:
        D: head size or sizes. dtype: float16, bfloat16 or both. D_v: the head size of v, that of q and k when None.
        causal: None for both masks. window: the kernels for a sliding window instead. softcap: those with a softcap.
        varlen: the kernels of `attention_varlen` instead. decode: those of `attention_decode`, for a dense cache and for pages of any size,
            which serve any mask and have no backward, and those that append to caches.
        backward: also what training needs.
        device: a CUDA device: each kernel is launched there once, which a graph capture needs. None only builds; no GPU is needed.
    Returns: how many kernels this process has by now. They stay in TileLang's disk cache, TILELANG_CACHE_DIR.
    Raises: NotImplementedError for a configuration without a kernel; TypeError for a dtype; ImportError without tilelang.
    """
    from .kernels import build

    sizes = (D,) if isinstance(D, int) else tuple(D)
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
    if decode:
        warm_decode(sizes, dtypes, softcap, device)
        return build.built()
    # Any window has the same kernel; this one is wide enough for its keys to be split
    masks: list[dict[str, Any]] = (
        [{"window": (_LONG, 0)}] if window else [{"causal": c} for c in ((True, False) if causal is None else (causal,))]
    )
    wanted = [
        _Wanted((size, size if D_v is None else D_v), kind, {**mask, "softcap": 1.0 if softcap else 0.0}, varlen, backward)
        for size, kind, mask in itertools.product(sizes, dtypes, masks)
    ]
    for configuration in wanted:
        _tiles(configuration)
    for configuration in wanted:
        _build(configuration)
        if device is not None:
            _launch(configuration, torch.device(device))
    return build.built()


def _explain_decode(q, k_cache, v_cache, cache_seqlens, return_lse, page_table=None, **options) -> Explanation:
    settled = functional_decode.settle("attention_decode", q, k_cache, v_cache, cache_seqlens, page_table, **options)
    q, s = settled[0], ops_decode.Settings(*settled[5:])
    ops_decode.checked(q, k_cache, v_cache, cache_seqlens, page_table, s)
    tile = ops_decode.tile(q, k_cache, page_table, s)
    name = "attention_decode_fwd_lse" if return_lse else "attention_decode_fwd"
    return Explanation((name,), REFERENCE if tile is None else KERNEL, tile, None)


def _as_launched(forward: Any, backward: Any, q: Tensor, k: Tensor, s: ops.Settings) -> tuple:
    """The tiles, or the split ones where a launch on the device of q takes these."""
    from .kernels import config, device

    (B, S_q, H_q), (S_kv, H_kv) = q.shape[:3], k.shape[1:3]
    window, multiprocessors = (s.window_left, s.window_right), device.multiprocessors(q.device)
    if config.parts(forward, S_q, S_kv, H_q, window, multiprocessors) > 1:
        forward = config.split(forward)
    if backward is not None and config.backward_parts(backward, B, S_q, H_q, S_kv, H_kv, window, multiprocessors) != (1, 1):
        backward = config.split_backward(backward)
    return forward, backward


# Keys enough for a call of one query to split them, whatever the tile
_LONG = 4096


class _Wanted(NamedTuple):
    """What `warmup` is to build: sizes (D, D_v), dtype, the options of `attention`, whether sequences are packed, whether gradients are
    wanted."""

    sizes: tuple[int, int]
    dtype: torch.dtype
    options: dict[str, Any]
    varlen: bool
    backward: bool


def _tiles(wanted: _Wanted) -> tuple:
    """The tiles of the forward and, or None, of the backward; raises where there is none."""
    from .kernels import config

    if wanted.dtype not in checks.CUDA_DTYPES:
        raise TypeError(f"warmup: dtype must be float16 or bfloat16, got {str(wanted.dtype).removeprefix('torch.')}")
    left, right = checks.window("warmup", wanted.options.get("causal", False), wanted.options.get("window", (-1, -1)))
    arguments = ("warmup", *wanted.sizes, left, right, wanted.options["softcap"])
    forward = config.forward(*arguments, packed=wanted.varlen)
    if not wanted.backward:
        return forward, None
    return forward, config.backward(*arguments, packed=wanted.varlen)


def _build(wanted: _Wanted) -> None:
    from .kernels import backward_launch as backward_kernels
    from .kernels import config
    from .kernels import forward_launch as forward_kernels

    forward, backward = _tiles(wanted)
    for return_lse in (False, True):
        forward_kernels.compiled(forward, wanted.dtype, return_lse)
        if not wanted.varlen:
            forward_kernels.compiled_merging(forward.D_v, wanted.dtype, return_lse)
    if not wanted.varlen:
        forward_kernels.compiled(config.split(forward), wanted.dtype, True)
    if backward is not None:
        backward_kernels.compiled(backward, wanted.dtype, False)
        if not wanted.varlen:
            backward_kernels.compiled(config.split_backward(backward), wanted.dtype, False)


def _launch(wanted: _Wanted, device: torch.device) -> None:
    D, D_v = wanted.sizes
    shape = (1, 1) if wanted.varlen else (1, 1, 1)
    q, k, v = (torch.zeros(*shape, size, dtype=wanted.dtype, device=device, requires_grad=wanted.backward) for size in (D, D, D_v))
    arguments: Any = (q, k, v)
    functions: Any = (functional.attention, functional.attention_with_lse)
    if wanted.varlen:
        arguments += (torch.tensor([0, 1], dtype=torch.int32, device=device),) * 2
        functions = (functional.attention_varlen, functional.attention_varlen_with_lse)
    with torch.no_grad():
        for function in functions:
            function(*arguments, **wanted.options)
            if not wanted.varlen:
                function(q, *(t.expand(1, _LONG, 1, -1).contiguous() for t in (k, v)), **wanted.options)
    if wanted.backward:
        functions[0](*arguments, **wanted.options).sum().backward()
        if not wanted.varlen:
            # So few KV heads that a group's heads are split
            q = torch.zeros(1, _LONG, 8, D, dtype=wanted.dtype, device=device, requires_grad=True)
            k, v = (torch.zeros(1, _LONG, 1, size, dtype=wanted.dtype, device=device, requires_grad=True) for size in (D, D_v))
            functions[0](q, k, v, **wanted.options).sum().backward()
