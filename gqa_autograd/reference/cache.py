"""Where new tokens go in a cache: token i of sequence b to row cache_seqlens[b] + i of its own, dense or through its pages.

A token without a place is dropped, and no other row is touched: those of a negative length, a row beyond the capacity, a page that is
none."""

import torch
from torch import Tensor


def places(cache_seqlens: Tensor, S_new: int, blocks: int, rows: int, page_table: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(block, row, has it a place?), each [B, S_new], of a cache [blocks, rows, H_kv, D]: blocks are sequences, or pages with a table."""
    # arange makes it int64: a length near 2^31 must not wrap around to a row
    row = cache_seqlens[:, None] + torch.arange(S_new, device=cache_seqlens.device)
    counted = cache_seqlens[:, None] >= 0
    if page_table is None:
        block = torch.arange(row.shape[0], device=row.device)[:, None].expand_as(row)
        return block, row, counted & (row < rows)
    entries = page_table.shape[1]
    inside = counted & (row < entries * rows)
    page = page_table.new_full(row.shape, -1)
    if entries > 0 and rows > 0:
        page = page_table.gather(1, torch.where(inside, row, 0) // rows)
    return page.long(), row % max(rows, 1), inside & (page >= 0) & (page < blocks)


def append(k_cache: Tensor, v_cache: Tensor, k_new: Tensor, v_new: Tensor, cache_seqlens: Tensor, page_table: Tensor | None) -> None:
    """Writes k_new and v_new [B, S_new, H_kv, D] to their places. Of two tokens with one place, any may stay."""
    block, row, placed = places(cache_seqlens, k_new.shape[1], k_cache.shape[0], k_cache.shape[1], page_table)
    block, row = block[placed], row[placed]
    for cache, new in ((k_cache, k_new), (v_cache, v_new)):
        cache[block, row] = new[placed]
