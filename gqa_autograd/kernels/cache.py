"""New keys and values into a cache: token i of sequence b to row cache_seqlens[b] + i, dense or through the page table.

A block copies ROWS tokens of one head, of K or of V. A token without a place, as `reference.cache` says, is not read and not written."""

import functools
from collections.abc import Callable

import tilelang
import tilelang.language as T
import torch
from torch import Tensor

from . import device, tile
from .build import Program, kernel

# Few, so that a single token for each sequence still makes a block for each head
ROWS, COLUMNS = 4, 64


@tilelang.jit(pass_configs=tile.FAST_MATH, target=tile.TARGET)
def build(dtype, paged):
    names = ("B", "S_new", "H_kv", "D", "D_v", "blocks", "rows", "entries")
    B, S_new, H_kv, D, D_v, blocks, rows, entries = (T.dynamic(name) for name in names)
    # int64: a cache may have more than 2^31 elements
    strides = {t: (*(T.dynamic(f"{t}_stride_{d}", "int64") for d in "bsh"), 1) for t in ("K", "V", "K_new", "V_new")}

    @T.macro
    def copy(Cache, New, Lengths, Table, b, h, token0, size):
        length = Lengths[b]
        for i in T.serial(ROWS):
            token = token0 + i
            # Compared like this, no sum can pass 2^31
            if token < S_new and length >= 0 and length <= entries * rows - 1 - token:
                row = length + token
                into = T.alloc_var("int32")
                into = Table[b, T.truncdiv(row, rows)] if paged else b
                if into >= 0 and into < blocks:
                    for first in T.serial(T.ceildiv(size, COLUMNS)):
                        for j in T.Parallel(COLUMNS):
                            if first * COLUMNS + j < size:
                                Cache[into, T.truncmod(row, rows), h, first * COLUMNS + j] = New[b, token, h, first * COLUMNS + j]

    @T.prim_func
    def cache_append(
        K: T.StridedTensor([blocks, rows, H_kv, D], strides["K"], dtype),
        V: T.StridedTensor([blocks, rows, H_kv, D_v], strides["V"], dtype),
        K_new: T.StridedTensor([B, S_new, H_kv, D], strides["K_new"], dtype),
        V_new: T.StridedTensor([B, S_new, H_kv, D_v], strides["V_new"], dtype),
        Lengths: T.Tensor([B], "int32"),
        # Without pages, the lengths again: entries is 1
        Table: T.Tensor([B, entries], "int32"),
    ):
        # All in the first dimension of the grid, since the others end at 65535
        with T.Kernel(T.ceildiv(S_new, ROWS) * B * H_kv, 2, threads=COLUMNS) as (block, which):
            h, b = T.truncmod(block, H_kv), T.truncmod(T.truncdiv(block, H_kv), B)
            token0 = T.truncdiv(block, H_kv * B) * ROWS
            if which == 0:
                copy(K, K_new, Lengths, Table, b, h, token0, D)
            else:
                copy(V, V_new, Lengths, Table, b, h, token0, D_v)

    return cache_append


def program(dtype: torch.dtype, paged: bool) -> Program:
    return Program("cache_append", build, (str(dtype).removeprefix("torch."), paged))


@functools.cache
def executable(dtype: torch.dtype, paged: bool) -> Callable:
    """What the compiled kernel calls in the end, as in `forward_launch`."""
    return kernel(program(dtype, paged)).adapter.get_exportable_executable()["main"]


def launch(k_cache: Tensor, v_cache: Tensor, k_new: Tensor, v_new: Tensor, cache_seqlens: Tensor, page_table: Tensor | None) -> None:
    """Writes the tokens that have a place. Allocates nothing but a copy of k_new or v_new that does not have stride 1 along D."""
    device.require_hopper("cache_append_", k_cache.device)
    tables = 1 if page_table is None else page_table.numel()
    if 0 in (k_new.numel() + v_new.numel(), k_cache.numel() + v_cache.numel(), tables):
        return
    k_new, v_new = (_rows(t) for t in (k_new, v_new))
    lengths = cache_seqlens.contiguous()
    table = lengths.unsqueeze(1) if page_table is None else page_table.contiguous()
    with device.current(k_cache.device):
        executable(k_cache.dtype, page_table is not None)(k_cache.detach(), v_cache.detach(), k_new, v_new, lengths, table)


def _rows(t: Tensor) -> Tensor:
    t = t.detach()
    return t if t.stride(3) == 1 else t.contiguous()
