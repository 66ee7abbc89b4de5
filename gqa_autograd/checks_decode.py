"""What `attention_decode` accepts, and every message that refuses. As `checks`: also on fake tensors, before any launch."""

from typing import NoReturn

from torch import Tensor

from .checks import CPU_DTYPES, CUDA_DTYPES, _integers, _name, _numbers, _readable, _size, sides

MAX_QUERIES = 64
PAGE_SIZES = (16, 32, 64, 128, 256)


def no_gradient(function: str) -> NoReturn:
    raise RuntimeError(
        f"{function}: q, k_cache and v_cache must not require a gradient while grad mode is on, since it has none; "
        "train with attention, or decode under torch.no_grad()"
    )


def attention_decode(
    function: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    page_table: Tensor | None,
    window: tuple[int, int],
    scale: float | None,
    softcap: float,
) -> None:
    """q [B, S_q, H_q, D]; caches [B, S_max, H_kv, D], or pages [P, S_page, H_kv, D] with page_table int32 [B, max_pages]; cache_seqlens
    int32 [B].

    Lengths and pages are looked at where that is free, on a CPU; on CUDA a kernel stays inside its tensors whatever they are."""
    _alike(function, q, k_cache, v_cache)
    _sizes(function, q, k_cache, v_cache)
    _numbers(function, scale, softcap)
    sides(function, *window)
    B, rows, S_page = q.shape[0], k_cache.shape[0], k_cache.shape[1]
    _integers(function, "cache_seqlens", "[B]", cache_seqlens, q, 1)
    N = cache_seqlens.shape[0]
    _size(N == B, lambda: f"{function}: cache_seqlens must have one length for each sequence of q, got {N} for B={B}")
    if page_table is None:
        _size(rows == B, lambda: f"{function}: k_cache without a page_table must have the batch size of q, got B={rows} and B={B}")
    else:
        _integers(function, "page_table", "[B, max_pages]", page_table, q, 2)
        N_table = page_table.shape[0]
        _size(N_table == B, lambda: f"{function}: page_table must have one row for each sequence of q, got {N_table} for B={B}")
        if int(S_page) not in PAGE_SIZES:
            raise ValueError(f"{function}: the page size, k_cache.shape[1], must be one of {PAGE_SIZES}, got {int(S_page)}")
    if q.device.type == "cuda":
        for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
            _in_place(function, name, t)
    if _readable(cache_seqlens) and (page_table is None or _readable(page_table)):
        _values(function, cache_seqlens.tolist(), S_page, rows, None if page_table is None else page_table.tolist())


def capacity(k_cache: Tensor, page_table: Tensor | None) -> int:
    """How many keys of a sequence the cache can hold."""
    return k_cache.shape[1] if page_table is None else k_cache.shape[1] * page_table.shape[1]


def _alike(function: str, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    for name, t, layout in (("q", q, "[B, S_q, H_q, D]"), ("k_cache", k_cache, _CACHE), ("v_cache", v_cache, _CACHE)):
        if t.dim() != 4:
            raise ValueError(f"{function}: {name} must have 4 dimensions {layout}, got shape {tuple(t.shape)}")
        if t.device != q.device:
            raise ValueError(f"{function}: {name} must be on the device of q, got {t.device}, q on {q.device}")
        if t.dtype is not q.dtype:
            raise TypeError(f"{function}: {name} must have the dtype of q, got {_name(t.dtype)}, q {_name(q.dtype)}")
    allowed = CUDA_DTYPES if q.device.type == "cuda" else CPU_DTYPES
    if q.dtype not in allowed:
        where, names = " on CUDA" if allowed is CUDA_DTYPES else "", [_name(dtype) for dtype in allowed]
        raise TypeError(f"{function}: q, k_cache and v_cache{where} must be {', '.join(names[:-1])} or {names[-1]}, got {_name(q.dtype)}")


_CACHE = "[B, S_max, H_kv, D], or pages [P, S_page, H_kv, D]"


def _sizes(function: str, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    S_q, H_q, D = q.shape[1:]
    H_kv, D_k = k_cache.shape[2:]
    _size(S_q <= MAX_QUERIES, lambda: f"{function}: S_q must be at most {MAX_QUERIES}, got S_q={S_q}; longer ones take attention")
    _size(D_k == D, lambda: f"{function}: k_cache must have the head size of q, got D={D_k} for k_cache, D={D} for q")
    for mine, theirs in zip(v_cache.shape, k_cache.shape, strict=True):
        _size(
            mine == theirs,
            lambda: f"{function}: v_cache must have the shape of k_cache, got {tuple(v_cache.shape)} and {tuple(k_cache.shape)}",
        )
    _size(H_kv > 0, lambda: f"{function}: H_kv must be at least 1, got H_kv={H_kv}")
    _size(D > 0, lambda: f"{function}: D must be at least 1, got D={D}")
    _size(H_q % H_kv == 0, lambda: f"{function}: H_q must be a multiple of H_kv, got H_q={H_q}, H_kv={H_kv}")


def _in_place(function: str, name: str, t: Tensor) -> None:
    """What TMA can read; a cache is too large to be copied at each call."""
    *outer, inner = t.stride()
    unit = 16 // t.element_size()
    ok = inner == 1
    for stride in outer:
        ok = ok and stride > 0 and stride % unit == 0
    if not ok:
        raise ValueError(
            f"{function}: {name} on CUDA must have stride 1 along D and other strides that are positive multiples of {unit}, "
            f"got strides {tuple(t.stride())}"
        )


def aligned(function: str, name: str, t: Tensor) -> None:
    """Asked of real tensors only: a fake one has no address."""
    if t.data_ptr() % 16:
        raise ValueError(f"{function}: {name} on CUDA must begin at a multiple of 16 bytes, got address {t.data_ptr():#x}")


def _values(function: str, lengths: list[int], S_page: int, rows: int, table: list[list[int]] | None) -> None:
    for n, length in enumerate(lengths):
        most = S_page if table is None else S_page * len(table[n])
        if not 0 <= length <= most:
            raise ValueError(f"{function}: cache_seqlens must be from 0 to {most}, what the cache can hold, got {length} for sequence {n}")
        for i in range(0 if table is None else -(-length // S_page)):
            if not 0 <= table[n][i] < rows:  # type: ignore[index]
                raise ValueError(f"{function}: page_table must name pages below {rows}, those of k_cache, got {table[n][i]} at [{n}, {i}]")  # type: ignore[index]
