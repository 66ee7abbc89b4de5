"""What nn.GQAttention accepts, and its messages."""

import math

import torch
from torch import Tensor

from .cache import CacheLayer, KVCache, PagedKVCache
from .checks_decode import MAX_QUERIES


def integer(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"GQAttention: {name} must be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"GQAttention: {name} must be at least 1, got {value}")
    return value


def number(name: str, value: object, *, above: float = -math.inf, least: float = -math.inf) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"GQAttention: {name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"GQAttention: {name} must be finite, got {value}")
    if value <= above:
        raise ValueError(f"GQAttention: {name} must be above {above}, got {value}")
    if value < least:
        raise ValueError(f"GQAttention: {name} must be at least {least}, got {value}")
    return float(value)


def split(embed_dim: int, num_heads: int) -> int:
    if embed_dim % num_heads:
        raise ValueError(
            "GQAttention: embed_dim must be a multiple of num_heads where head_dim is not given, "
            f"got embed_dim={embed_dim}, num_heads={num_heads}"
        )
    return embed_dim // num_heads


def eps(qk_norm: bool | float | None) -> float | None:
    if qk_norm is None or qk_norm is False:
        return None
    return 1e-6 if qk_norm is True else number("qk_norm", qk_norm, above=0)


def input(x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | Tensor | None, E: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"GQAttention: x must be a torch.Tensor, got {type(x).__name__}")
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError(f"GQAttention: max_seqlen must be None without cu_seqlens, got {type(max_seqlen).__name__}")
        if x.dim() != 3 or x.shape[2] != E:
            raise ValueError(f"GQAttention: x must be [B, S, E] with E={E}, or [T, E] with cu_seqlens, got shape {tuple(x.shape)}")
        return
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"GQAttention: cu_seqlens must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype is not torch.int32:
        raise TypeError(f"GQAttention: cu_seqlens must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"GQAttention: cu_seqlens must be [N + 1], got shape {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != x.device:
        raise ValueError(f"GQAttention: cu_seqlens must be on the device of x, got {cu_seqlens.device}, x on {x.device}")
    if x.dim() != 2 or x.shape[1] != E:
        raise ValueError(f"GQAttention: x must be [T, E] with cu_seqlens and E={E}, got shape {tuple(x.shape)}")


def positions(x: Tensor, positions: Tensor) -> None:
    if not isinstance(positions, Tensor):
        raise TypeError(f"GQAttention: positions must be a torch.Tensor, got {type(positions).__name__}")
    if positions.is_floating_point() or positions.is_complex() or positions.dtype is torch.bool:
        raise TypeError(f"GQAttention: positions must be integers, got {positions.dtype}")
    B, S, _ = x.shape
    if positions.dim() not in (1, 2) or positions.shape[-1] != S or (positions.dim() == 2 and positions.shape[0] not in (1, B)):
        raise ValueError(f"GQAttention: positions must be [S] or [B, S] with B={B}, S={S}, got shape {tuple(positions.shape)}")


def position_embeddings(x: Tensor, position_embeddings: tuple[Tensor, Tensor], D: int) -> tuple[Tensor, Tensor]:
    if not isinstance(position_embeddings, (tuple, list)) or len(position_embeddings) != 2:
        raise TypeError(f"GQAttention: position_embeddings must be a pair (cos, sin), got {type(position_embeddings).__name__}")
    B, S, _ = x.shape
    for name, t in zip(("cos", "sin"), position_embeddings, strict=True):
        if not isinstance(t, Tensor):
            raise TypeError(f"GQAttention: position_embeddings {name} must be a torch.Tensor, got {type(t).__name__}")
        if t.dim() != 3 or t.shape[0] not in (1, B) or t.shape[1] != S or t.shape[2] != D:
            raise ValueError(
                f"GQAttention: position_embeddings {name} must be [1, S, D] or [B, S, D] with B={B}, S={S}, D={D}, "
                f"got shape {tuple(t.shape)}"
            )
    cos, sin = position_embeddings
    return cos, sin


def kv_cache(x: Tensor, cache: object, cu_seqlens: Tensor | None, causal: bool, D: int, D_v: int) -> CacheLayer | None:
    """The layer of a cache that a call appends to; None without one."""
    if cache is None:
        return None
    if isinstance(cache, (KVCache, PagedKVCache)):
        if cache.layers != 1:
            raise ValueError(f"GQAttention: kv_cache must be one layer, cache.layer(i), got a {type(cache).__name__} of {cache.layers}")
        cache = cache.layer()
    if not isinstance(cache, CacheLayer):
        raise TypeError(f"GQAttention: kv_cache must be a KVCache, a PagedKVCache or a layer of one, got {type(cache).__name__}")
    if cu_seqlens is not None:
        raise NotImplementedError(
            "GQAttention: kv_cache takes no packed x, got cu_seqlens; prefill each prompt by cache.row(b), or pad them"
        )
    if not causal:
        raise NotImplementedError("GQAttention: kv_cache needs causal=True, got causal=False: later tokens would change what was computed")
    if D_v != D:
        raise NotImplementedError(f"GQAttention: kv_cache needs one size of heads, got head_dim={D}, v_head_dim={D_v}")
    S = x.shape[1]
    if S > MAX_QUERIES and not cache.empty:
        raise NotImplementedError(
            f"GQAttention: x must have at most {MAX_QUERIES} tokens where kv_cache may have some already, got S={S}; "
            f"feed the prompt in parts of {MAX_QUERIES}, or all of it at once after cache.reset()"
        )
    if S > MAX_QUERIES:
        cache.assert_empty()
    return cache


def no_gradient(*heads: Tensor) -> None:
    """A cache has none to pass on."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in heads):
        raise RuntimeError("GQAttention: kv_cache is for inference, call it under torch.no_grad() or torch.inference_mode()")
