"""Decoding: `attention` of each sequence's queries over the keys that its cache holds. Lengths and pages are lists.

A length is clamped to what the cache can hold, and the keys of a page that the pool does not have are masked, as a kernel does it, which
cannot refuse. Nothing behind a sequence's last key is read, nor what is in no page of it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import attention


@attention._as_written
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Sequence[int],
    pages: Sequence[Sequence[int]] | None,
    out: Tensor,
    lse: Tensor | None,
    *formula,
) -> None:
    """Writes out [B, S_q, H_q, D] and, unless None, lse [B, H_q, S_q]. formula: as in `attention`."""
    for n, length in enumerate(lengths):
        most = k_cache.shape[1] * (1 if pages is None else len(pages[n]))
        length = min(max(length, 0), most)
        if pages is None:
            k, v, known = k_cache[n, :length], v_cache[n, :length], None
        else:
            k, v, known = _gathered(k_cache, v_cache, pages[n], length)
        out_n, lse_n = _attend(q[n : n + 1], k[None], v[None], known, *formula)
        out[n] = out_n[0]
        if lse is not None:
            lse[n] = lse_n[0]


def _gathered(k_pages: Tensor, v_pages: Tensor, pages: Sequence[int], length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The keys and values of a sequence, and which of them there are; 0 stands for those of a page that is not in the pool."""
    P, S_page = k_pages.shape[:2]
    used = torch.tensor(pages[: -(-length // S_page)], dtype=torch.long, device=k_pages.device)
    there = (used >= 0) & (used < P)
    known = there.repeat_interleave(S_page)[:length]
    if P == 0:
        return *(t.new_zeros((length, *t.shape[2:])) for t in (k_pages, v_pages)), known  # type: ignore[return-value]
    k, v = (t[used.where(there, 0)].flatten(0, 1)[:length] for t in (k_pages, v_pages))
    if not bool(known.all()):
        k, v = (t.masked_fill(~known[:, None, None], 0) for t in (k, v))
    return k, v, known


def _attend(q: Tensor, k: Tensor, v: Tensor, known: Tensor | None, window_left: int, window_right: int, scale: float, softcap: float):
    """attention.attention_fwd_lse with keys that nobody sees."""
    if known is None or bool(known.all()):
        return attention.attention_fwd_lse(q, k, v, window_left, window_right, scale, softcap)
    _, S_q, H_q, _ = q.shape
    z, seen = attention._logits(q, k, window_left, window_right, scale, softcap)
    z = z.masked_fill(~(known if seen is None else seen & known), -math.inf)
    lse = torch.logsumexp(z, dim=-1, keepdim=True)
    p = torch.exp(z - lse.masked_fill(lse == -math.inf, 0))
    out = attention._heads(p @ attention._rows(v, k.shape[2], p.dtype), S_q, H_q)
    return out.to(q.dtype), lse.reshape(1, H_q, S_q)
