"""What the operator that writes to a cache accepts: `checks` for it. The same rules on real and on fake tensors."""

from torch import Tensor

from . import checks
from .checks import _name, _readable, _size


def cache_append(
    function: str, k_cache: Tensor, v_cache: Tensor, k_new: Tensor, v_new: Tensor, cache_seqlens: Tensor, page_table: Tensor | None
) -> None:
    """k_cache [B, S_max, H_kv, D], or with page_table [P, S_page, H_kv, D]; k_new [B, S_new, H_kv, D]; likewise v with D_v; one dtype, one
    device; stride 1 along D in the caches; cache_seqlens int32 [B]; page_table int32 [B, entries].

    Values are looked at where that is free, on a CPU, as in `checks.attention_varlen`: on CUDA the kernel drops a token without a place."""
    _tensors(function, k_cache, v_cache, k_new, v_new)
    B, S_new, H_kv, D = k_new.shape
    D_v = v_new.shape[3]
    whole = k_cache.shape[:2]
    _shape(function, "v_new", v_new, (B, S_new, H_kv, D_v))
    _shape(function, "k_cache", k_cache, (*whole, H_kv, D))
    _shape(function, "v_cache", v_cache, (*whole, H_kv, D_v))
    _integers(function, "cache_seqlens", cache_seqlens, 1, "[B]", k_cache)
    _shape(function, "cache_seqlens", cache_seqlens, (B,))
    if page_table is None:
        B_cache = whole[0]
        _size(B_cache == B, lambda: f"{function}: k_cache must have the batch size of k_new, got B={B_cache} for k_cache, B={B} for k_new")
    else:
        _integers(function, "page_table", page_table, 2, "[B, entries]", k_cache)
        _shape(function, "page_table", page_table, (B, page_table.shape[1]))
    if _readable(cache_seqlens) and (page_table is None or _readable(page_table)):
        _values(function, cache_seqlens.tolist(), S_new, whole, None if page_table is None else page_table.tolist())


def _tensors(function: str, k_cache: Tensor, v_cache: Tensor, k_new: Tensor, v_new: Tensor) -> None:
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache), ("k_new", k_new), ("v_new", v_new)):
        if t.dim() != 4:
            layout = "[B, S_new, H_kv, D]" if name.endswith("new") else "[B, S_max, H_kv, D], or pages [P, S_page, H_kv, D]"
            raise ValueError(f"{function}: {name} must have 4 dimensions {layout}, got shape {tuple(t.shape)}")
        if t.device != k_cache.device:
            raise ValueError(f"{function}: {name} must be on the device of k_cache, got {t.device}, k_cache on {k_cache.device}")
        if t.dtype is not k_cache.dtype:
            raise TypeError(f"{function}: {name} must have the dtype of k_cache, got {_name(t.dtype)}, k_cache {_name(k_cache.dtype)}")
    kinds = checks.CUDA_DTYPES if k_cache.is_cuda else checks.CPU_DTYPES
    if k_cache.dtype not in kinds:
        raise TypeError(f"{function}: k_cache must be {', '.join(map(_name, kinds))}, got {_name(k_cache.dtype)}")
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        _inner_stride(function, name, t)


def _inner_stride(function: str, name: str, t: Tensor) -> None:
    """In place: a cache can't be copied to lie otherwise."""
    stride = t.stride(3)
    _size(stride == 1, lambda: f"{function}: {name} must have stride 1 along D, got {stride}")


def _shape(function: str, name: str, t: Tensor, shape: tuple) -> None:
    for got, want in zip(t.shape, shape, strict=True):
        _size(got == want, lambda: f"{function}: {name} must have shape {tuple(shape)} as k_new and v_new have it, got {tuple(t.shape)}")


def _integers(function: str, name: str, t: Tensor, dims: int, layout: str, k_cache: Tensor) -> None:
    if t.dim() != dims:
        raise ValueError(f"{function}: {name} must be {layout}, got shape {tuple(t.shape)}")
    if t.device != k_cache.device:
        raise ValueError(f"{function}: {name} must be on the device of k_cache, got {t.device}, k_cache on {k_cache.device}")
    if t.dtype.is_floating_point or _name(t.dtype) != "int32":
        raise TypeError(f"{function}: {name} must be int32, got {_name(t.dtype)}")


def _values(function: str, lengths: list[int], S_new: int, whole: tuple, tables: list[list[int]] | None) -> None:
    """Page -1 is no page, and so no mistake: tokens of a place in the batch that is not in use go nowhere."""
    blocks, rows = whole
    for b, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"{function}: cache_seqlens must be at least 0, got {length} for sequence {b}")
        if tables is None:
            if length + S_new > rows:
                raise ValueError(f"{function}: the cache must have room, got {length} + {S_new} tokens for {rows} rows of sequence {b}")
            continue
        # Pages that are needed; a sequence without any is not in use
        table = tables[b]
        if all(page == -1 for page in table):
            continue
        if length + S_new > len(table) * rows:
            got = f"got {length} + {S_new} tokens for {len(table)} pages of {rows} rows"
            raise ValueError(f"{function}: the page table must have room, {got} of sequence {b}")
        for page in table[length // max(rows, 1) : -(-(length + S_new) // max(rows, 1))] if S_new else []:
            if not -1 <= page < blocks:
                raise ValueError(f"{function}: page_table must have pages below {blocks}, or -1 for none, got {page} for sequence {b}")
