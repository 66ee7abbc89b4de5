"""The public functions of decoding: settle the defaults, call the operator. They have no gradient."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import checks, checks_decode, functional, ops, ops_decode


# softcap is 0 and not 0.0 by default, as in `attention`
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    page_table: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float = 0,
    window: tuple[int, int] = (-1, -1),
) -> Tensor:
    """`attention` of a few new tokens over a cache: for each sequence b, whose cache holds L = cache_seqlens[b] keys,

        out[b] = attention(q[b], k_cache[b, :L], v_cache[b, :L]),  query i sees keys L - S_q + i - left <= j <= L - S_q + i + right

    L counts the keys of the S_q new tokens too: append them first, then call this. L may be 0 or less than S_q; a query that sees no key
    gives out = 0. All query heads of a KV head share one pass over the cache, so it is read once whatever the ratio of heads.

    Args:
        q: [B, S_q, H_q, D], S_q at most 64. float16 or bfloat16, on a CPU also float32 and float64.
        k_cache, v_cache: dense, [B, S_max, H_kv, D]; or with a page table the pool [P, S_page, H_kv, D], S_page 16, 32, 64, 128 or 256.
            H_q must be a multiple of H_kv. On CUDA stride 1 along D, the other strides and the base multiples of 16 bytes: a cache is
            never copied. Behind a sequence's last key the cache may hold anything, NaN included.
        cache_seqlens: [B], int32, on the device of q: the valid keys of each sequence, the new ones included.
        page_table: [B, max_pages], int32: the keys from n S_page on of sequence b lie in page page_table[b, n]. Entries behind the last key
            may hold anything.
        causal, scale, softcap, window: as for `attention`, but causal by default.
    Returns:
        [B, S_q, H_q, D] in q.dtype, without a gradient; the same bits from call to call for the same lengths. Under autocast q is cast to
        the dtype of the cache; the cache never is.
        Lengths and pages are looked at where that is free, on a CPU. On CUDA the host would have to wait for them: there a length is
        clamped to what the cache can hold, and the keys of a page that the pool does not have are masked and never read. So a captured
        CUDA graph stays right when they change in place.
    Raises:
        ValueError for a shape, a number or a value, TypeError for a dtype, NotImplementedError on CUDA for what no kernel computes,
        RuntimeError for a tensor that requires a gradient while grad mode is on.
    Source: arXiv:2307.08691 algorithm 1; docs/maths/attention.md.
    """
    given = (q, k_cache, v_cache, cache_seqlens, page_table, causal, scale, softcap, window)
    if run := ops_decode.planned(*given, False):
        return run(q, k_cache, v_cache, cache_seqlens, page_table)
    return ops.run(ops_decode.attention_decode_fwd, *settle("attention_decode", *given))


def attention_decode_with_lse(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    page_table: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    softcap: float = 0,
    window: tuple[int, int] = (-1, -1),
) -> tuple[Tensor, Tensor]:
    """(out, lse): out as `attention_decode`, lse[b, h, i] = ln sum_j exp z_ij over the keys that query i sees; -inf where it sees none.

    Args: as `attention_decode`.
    Returns: out [B, S_q, H_q, D] in q.dtype; lse [B, H_q, S_q], float32 (float64 for float64 inputs), natural logarithm, scale and softcap
        included. Neither has a gradient; `merge_states` joins them with the attention over other keys.
    Raises: as `attention_decode`.
    Source: arXiv:2307.08691 algorithm 1; docs/maths/attention.md.
    """
    given = (q, k_cache, v_cache, cache_seqlens, page_table, causal, scale, softcap, window)
    if run := ops_decode.planned(*given, True):
        return run(q, k_cache, v_cache, cache_seqlens, page_table)
    return ops.run(ops_decode.attention_decode_fwd_lse, *settle("attention_decode", *given))


def settle(function, q, k_cache, v_cache, cache_seqlens, page_table=None, causal=True, scale=None, softcap=0, window=(-1, -1)) -> tuple:
    """The arguments of the operators."""
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    checks.tensors(function, **tensors, cache_seqlens=cache_seqlens, **({} if page_table is None else {"page_table": page_table}))
    if functional.needs_grad(q, k_cache, v_cache):
        checks_decode.no_gradient(function)
    if forward_ad._current_level >= 0:
        checks.no_tangents(function, **tensors)
    left, right = checks.window(function, causal, window)
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and q.is_floating_point():
        q = q.to(k_cache.dtype)
    return q, k_cache, v_cache, cache_seqlens, page_table, left, right, scale, softcap
