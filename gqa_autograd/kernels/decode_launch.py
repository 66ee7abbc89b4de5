"""From a decode call to its kernel: which one, with what run-time numbers and which counters."""

import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import config, decode, device
from .build import Program, kernel
from .config import Decode
from .decode_output import TAIL
from .decode_tiles import ROWS

# Launches in CUDA graphs that get counters of their own; further ones clear theirs in the graph
CAPTURED = 4096
# Longer caches would leave no room in 32 bits
_MOST_KEYS = 2**30


def program(cfg: Decode, dtype: torch.dtype) -> Program:
    """The kernel of a configuration."""
    return Program("attention_decode", decode.build, (str(dtype).removeprefix("torch."), *cfg))


@functools.cache
def compiled(cfg: Decode, dtype: torch.dtype):
    """The kernel of a configuration, built at its first use."""
    return kernel(program(cfg, dtype))


@functools.cache
def executable(cfg: Decode, dtype: torch.dtype) -> Callable:
    return compiled(cfg, dtype).adapter.get_exportable_executable()["main"]


# Writes out [B, S_q, H_q, D] and, unless None, lse [B, H_q, S_q], from q, both caches, their lengths and the page table, or None
Launch = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor | None], None]


def plan(
    cfg: Decode,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor | None,
    scale: float,
    window: tuple[int, int],
    softcap: float,
) -> Launch:
    """The launch for all tensors of the shapes, strides, dtype, device and alignment that these have. It keeps none of these."""
    device.require_hopper("attention_decode", q.device)
    B, S_q, H_q, _ = q.shape
    P, S_page, H_kv, _ = k_cache.shape
    capacity = min(S_page * (1 if page_table is None else page_table.shape[1]), _MOST_KEYS)
    if q.numel() == 0:
        return _nothing
    if P * capacity == 0:
        return _no_keys
    blocks, fewest = config.decode_blocks(cfg, B, S_q, H_q, H_kv, capacity, device.multiprocessors(q.device))
    rows = min(S_q * (H_q // H_kv), ROWS)
    left, right = (capacity + S_q if side < 0 else min(side, capacity + S_q) for side in window)
    numbers = (abs(scale) or 1.0, softcap, left, right, capacity, fewest)
    run, index = executable(cfg, q.dtype), q.device.index
    # The row maximum is taken before the scale, which must therefore be positive; negating q is exact
    sign = 1.0 if scale > 0 else -1.0 if scale < 0 else 0.0
    readable = device.readable(q)

    def launch(q, k_cache, v_cache, cache_seqlens, page_table, out, lse):
        if not device.is_current(index):
            with torch.cuda.device(index):
                return launch(q, k_cache, v_cache, cache_seqlens, page_table, out, lse)
        if sign != 1.0:
            q = device.rows(q * sign)
        elif not readable:
            q = device.rows(q)
        cache_seqlens = cache_seqlens.contiguous()
        table = cache_seqlens if page_table is None else page_table.contiguous()
        parts = _workspace(q, blocks, rows)
        written = (out, parts, 0) if lse is None else (out, lse, 1)
        counters = _counters(index, q, blocks)
        run(q, k_cache, v_cache, *written[:2], cache_seqlens, table, parts, counters, *numbers, written[2], blocks)

    return launch


def _workspace(q: Tensor, blocks: int, rows: int) -> Tensor:
    """Two parts for each thread block, in float32."""
    return q.new_empty((2 * blocks, rows, q.shape[3] + TAIL), dtype=torch.float32)


class _Arena(NamedTuple):
    """The counters of a device, 0 between launches: a row for each stream's launches, then one for each captured launch."""

    rows: tuple[Tensor, ...]
    captured: Iterator[int]


_arenas: dict[int, _Arena] = {}
_lock = threading.Lock()


def _arena(index: int) -> _Arena:
    """Made once, and waited for, so that no stream comes before it is cleared."""
    with _lock:
        if index not in _arenas:
            where = torch.device("cuda", index)
            most = device.multiprocessors(where) * max(cfg.blocks_per_sm for cfg in config.DECODE.values())
            rows = torch.zeros((device.SLOTS + CAPTURED, most), dtype=torch.int32, device=where)
            torch.cuda.synchronize(where)
            _arenas[index] = _Arena(rows.unbind(), itertools.count(device.SLOTS))
        return _arenas[index]


def _counters(index: int, q: Tensor, blocks: int) -> Tensor:
    """Counters that are 0, of which no launch that runs at the same time has one. Two replays of different graphs may run at the same time,
    two of one graph may not: so each captured launch keeps its own for ever."""
    slot, arena = device.slot(index), _arenas.get(index)
    if slot < 0:
        # During a capture an arena could not be made: its clearing would become a part of the graph
        if arena is not None and torch.cuda.is_current_stream_capturing():
            slot = next(arena.captured)
        if not 0 <= slot < device.SLOTS + CAPTURED:
            return torch.zeros(blocks, dtype=torch.int32, device=q.device)
    return (arena or _arena(index)).rows[slot]


def _nothing(q, k_cache, v_cache, cache_seqlens, page_table, out, lse) -> None:
    pass


def _no_keys(q, k_cache, v_cache, cache_seqlens, page_table, out, lse) -> None:
    out.zero_()
    if lse is not None:
        lse.fill_(-torch.inf)
