"""From a call to the forward kernel: which one, with what run-time numbers, on tensors that TMA can read."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import config, device, forward, forward_combine
from .build import Program, kernel
from .config import Forward


def program(cfg: Forward, dtype: torch.dtype, return_lse: bool) -> Program:
    """The kernel of a configuration."""
    return Program("attention_fwd", forward.build, (_name(dtype), return_lse, *cfg))


def combine_program(D_v: int, dtype: torch.dtype, return_lse: bool) -> Program:
    """What merges the parts of a split one."""
    return Program("attention_fwd_combine", forward_combine.build, (_name(dtype), return_lse, D_v))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def compiled(cfg: Forward, dtype: torch.dtype, return_lse: bool):
    """The same, built at its first use."""
    return kernel(program(cfg, dtype, return_lse))


@functools.cache
def executable(cfg: Forward, dtype: torch.dtype, return_lse: bool):
    """What the compiled kernel calls in the end: TileLang's own wrapper around it takes 3 µs and checks what `launch` has settled."""
    return compiled(cfg, dtype, return_lse).adapter.get_exportable_executable()


@functools.cache
def combine_executable(D_v: int, dtype: torch.dtype, return_lse: bool):
    return kernel(combine_program(D_v, dtype, return_lse)).adapter.get_exportable_executable()


def launch(
    cfg: Forward,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    scale: float,
    window: tuple[int, int],
    softcap: float,
) -> None:
    """Writes out [B, S_q, H_q, D_v] and, unless None, lse [B, H_q, S_q]."""
    device.require_hopper("attention", q.device)
    B, S_q, H_q, D = q.shape
    S_kv, H_kv = k.shape[1:3]
    if out.numel() == 0:
        return
    if S_kv == 0:
        _nothing_seen(out, lse)
        return
    multiprocessors = device.multiprocessors(q.device)
    tiles = -(-S_q // cfg.block_M) * H_q
    parts = config.parts(cfg, S_q, S_kv, H_q, window, multiprocessors)
    common = _Common(cfg, scale, window, softcap, S_q + S_kv, _section(q.device, B * H_kv, S_kv, D + v.shape[3]) * (H_q // H_kv))
    with device.current(q.device):
        q, k, v = device.rows(q), device.rows(k), device.rows(v)
        if parts == 1:
            _run(common, q, k, v, out, lse, (), min(tiles * B, multiprocessors))
            return
        split = config.FORWARD[cfg.D, cfg.D_v, cfg.mask, cfg.softcap, "split"]
        part_out = out.new_empty((parts * B, S_q, H_q, cfg.D_v), dtype=torch.float32)
        part_lse = out.new_empty((parts * B, S_q, H_q), dtype=torch.float32)
        _run(common._replace(cfg=split), q, k, v, part_out, part_lse, (), min(tiles * B * parts, multiprocessors), parts)
        rows = B * S_q * H_q
        combined = out.view(rows, cfg.D_v)
        run = combine_executable(cfg.D_v, out.dtype, lse is not None)
        run(part_out.view(parts, rows, cfg.D_v), part_lse.view(parts, rows), combined, combined if lse is None else lse)


def launch_varlen(
    cfg: Forward,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    out: Tensor,
    lse: Tensor | None,
    scale: float,
    window: tuple[int, int],
    softcap: float,
) -> None:
    """Writes out [T_q, H_q, D_v] and, unless None, lse [H_q, T_q], of the tokens that belong to a sequence. Lengths stay on the device."""
    device.require_hopper("attention_varlen", q.device)
    T_q, H_q, D = q.shape
    T_kv, H_kv = k.shape[:2]
    sequences = cu_seqlens_q.shape[0] - 1
    if out.numel() == 0 or sequences == 0:
        return
    # TMA cannot describe a tensor without rows; one row, which no query sees, stands in
    k, v = (t if T_kv > 0 else t.new_zeros((1, *t.shape[1:])) for t in (k, v))
    # Each sequence can end in a tile of its own
    tiles = (T_q // cfg.block_M + sequences) * H_q
    common = _Common(cfg, scale, window, softcap, T_q + T_kv, _section(q.device, H_kv, max(T_kv, 1), D + v.shape[2]) * (H_q // H_kv))
    with device.current(q.device):
        q, k, v = (device.rows(t.unsqueeze(0)) for t in (q, k, v))
        offsets = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        blocks = min(tiles, device.multiprocessors(q.device))
        _run(common, q, k, v, out.unsqueeze(0), None if lse is None else lse.unsqueeze(0), offsets, blocks)


class _Common(NamedTuple):
    """What a call says beside its tensors."""

    cfg: Forward
    scale: float
    window: tuple[int, int]
    softcap: float
    # An open side reaches farther than any key; so far is enough for the widest of the others, too
    far: int
    section: int


def _section(where: torch.device, heads: int, S_kv: int, width: int) -> int:
    """KV heads whose K and V together take about half of the L2 cache."""
    return max(1, min(heads, device.l2_bytes(where) // (4 * S_kv * width)))


def _nothing_seen(out: Tensor, lse: Tensor | None) -> None:
    out.zero_()
    if lse is not None:
        lse.fill_(-torch.inf)


def _run(common: _Common, q, k, v, out, lse, offsets: tuple, blocks: int, parts: int = 1) -> None:
    cfg, scale = common.cfg, common.scale
    if scale <= 0:
        # The row maximum is taken before the scale, which must therefore be positive; negating q is exact
        q, scale = q * (-1.0 if scale < 0 else 0.0), -scale or 1.0
    left, right = (common.far if side < 0 else min(side, common.far) for side in common.window) if cfg.mask == "window" else (0, 0)
    run = executable(cfg, q.dtype, lse is not None)
    cu_q, cu_k = offsets or (out, out)
    slot = device.slot(q.device)
    run(q, k, v, out, out if lse is None else lse, cu_q, cu_k, scale, common.softcap, left, right, blocks, common.section, slot, parts)
