"""From a call to the backward's kernels: which ones, with what run-time numbers, on tensors that TMA can read.

Workspace: dQ in float32, two float32 and, a query block, one int32 for each row of q, with S_q rounded up to block_M; of a split call also
dK and dV of each part in float32."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import backward, backward_combine, backward_packed, backward_prepost, backward_tiles, backward_wide, config, device
from .backward_prepost import LINE
from .build import Program, kernel
from .config import Backward


class Programs(NamedTuple):
    """The kernels of a call, in the order in which they run; `combine` after a split one only."""

    preprocess: Program
    main: Program
    postprocess: Program
    combine: Program


def programs(cfg: Backward, dtype: torch.dtype, has_dlse: bool) -> Programs:
    """The kernels of a configuration."""
    name, packed = str(dtype).removeprefix("torch."), cfg.form == "packed"
    return Programs(
        Program("attention_bwd_preprocess", backward_prepost.build_preprocess, (name, has_dlse, packed, cfg.D_v, cfg.block_M, cfg.block_N)),
        Program("attention_bwd", (backward_wide if cfg.D > 128 else backward).build, (name, *cfg)),
        Program("attention_bwd_postprocess", backward_prepost.build_postprocess, (name, packed, cfg.D, cfg.block_M)),
        Program("attention_bwd_combine", backward_combine.build, (name, cfg.D, cfg.D_v)),
    )


@functools.cache
def compiled(cfg: Backward, dtype: torch.dtype, has_dlse: bool) -> tuple:
    """They, built at their first use."""
    found = programs(cfg, dtype, has_dlse)
    return tuple(kernel(program) for program in (found if cfg.form == "split" else found[:3]))


class Call(NamedTuple):
    """What a backward is asked for; dense tensors as `ops` has them, packed ones with a batch of one before their tokens."""

    do: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    dlse: Tensor | None
    scale: float
    window: tuple[int, int]
    softcap: float
    deterministic: bool


# KV heads, of whatever batch, that go longest-first together: as many as have so many keys, about two rounds of thread blocks, and at most
# _WIDTH. So few of all tiles of Q, dO and dQ are at work at a time, and the L2 cache holds them. Packed, a head has the keys of a group of
# sequences. Above D 128 (True), where a block has 64 keys, the blocks of too few heads would wait for each other's sums. Measured for dense
# calls (docs/design/0006)
_WIDTH = 16
_KEYS = {False: 32768, True: 65536}
_FEWEST = {False: 1, True: 4}
# Above D 128 the heads of a group go one after the other from so many queries on: all at once would be too much for the L2 cache. In a
# fixed order blocks then wait longer for each other. Measured
_LONG = {False: 4096, True: 32768}
# How many key blocks' sums a block waits for at most before it adds its own to dQ: the first, which sets it, or all before it
_PATIENCE = {False: 1, True: 2**31 - 1}


def launch(cfg: Backward, call: Call, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Writes dq, dk and dv of a dense call."""
    _check("attention_bwd", call)
    if _without_work(dq, dk, dv):
        return
    H_kv, S_kv = call.k.shape[2], call.k.shape[1]
    head_tiles = _ceil(call.q.shape[1], cfg.block_M)
    key_blocks = _ceil(S_kv, cfg.block_N)
    parts = config.backward_parts(cfg, *call.q.shape[:3], S_kv, H_kv, call.window, device.multiprocessors(call.q.device))
    if parts != (1, 1):
        cfg = config.split_backward(cfg)
    with device.current(call.q.device):
        _run(cfg, call, dq, dk, dv, head_tiles, key_blocks, parts, ())


def launch_varlen(cfg: Backward, call: Call, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Writes dq, dk and dv of packed sequences; 0 for tokens behind the last of them. Lengths stay on the device."""
    _check("attention_varlen_bwd", call)
    if _without_work(dq, dk, dv):
        return
    sequences = cu_seqlens_q.shape[0] - 1
    head_tiles = call.q.shape[1] // cfg.block_M + sequences + 1
    key_blocks = call.k.shape[1] // cfg.block_N + sequences + 1
    with device.current(call.q.device):
        _run(cfg, call, dq, dk, dv, head_tiles, key_blocks, (1, 1), (cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()))


def _run(
    cfg: Backward,
    call: Call,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    head_tiles: int,
    key_blocks: int,
    parts: tuple[int, int],
    offsets: tuple[Tensor, ...],
) -> None:
    q, k, v, do = (device.rows(t) for t in (call.q, call.k, call.v, call.do))
    out, lse, rows = (device.whole(t) for t in (call.out, call.lse, do))
    dlse = lse if call.dlse is None else device.whole(call.dlse)
    space = _workspace(cfg, q, k.shape[1], head_tiles, key_blocks)
    left, right = config.sides(cfg.mask, call.window, q.shape[1] + k.shape[1])
    preprocess, main, postprocess, *combine = compiled(cfg, q.dtype, call.dlse is not None)
    sums = _partial(dk, dv, parts[0] * parts[1]) if combine else (dk, dv)
    if offsets:
        preprocess(out, rows, lse, dlse, *offsets, space.lse2, space.delta, space.turns, space.table, k.shape[1], right, head_tiles)
    else:
        preprocess(out, rows, lse, dlse, space.lse2, space.delta, space.turns)
    sequences = max(offsets[0].shape[0] - 1, 1) if offsets else 1
    together = _together(cfg, q, k, sequences, call.deterministic)
    order = head_tiles, key_blocks, *parts, *together, _PATIENCE[call.deterministic]
    main(q, k, v, do, space.lse2, space.delta, space.dq, space.turns, space.table, *sums, call.scale, call.softcap, left, right, *order)
    if offsets:
        postprocess(space.dq, space.turns, offsets[0], dq, call.scale, head_tiles)
    else:
        postprocess(space.dq, space.turns, dq, call.scale)
    if combine:
        combine[0](*(t.view(parts[0] * parts[1], -1, t.shape[3]) for t in sums), *(t.view(-1, t.shape[3]) for t in (dk, dv)))


def _together(cfg: Backward, q: Tensor, k: Tensor, sequences: int, deterministic: bool) -> tuple[int, int]:
    """How many KV heads go longest-first together, and how many query heads of each; sequences: in a row of k."""
    columns, wide = k.shape[0] * k.shape[2], cfg.D > 128
    keys = min(k.shape[1], backward_packed.GROUP) if cfg.form == "packed" else k.shape[1]
    width = max(min(_WIDTH, _KEYS[wide] // keys), _FEWEST[wide] // sequences, 1)
    return min(width, columns), 1 if wide and q.shape[1] >= _LONG[deterministic] else q.shape[2]


class _Workspace(NamedTuple):
    lse2: Tensor
    delta: Tensor
    dq: Tensor
    turns: Tensor
    table: Tensor


def _workspace(cfg: Backward, q: Tensor, tokens: int, head_tiles: int, key_blocks: int) -> _Workspace:
    """lse2 and delta [tiles, block_M] and dq [tiles, lines, LINE] in float32; turns [1 + tiles] and the table of key blocks in int32."""
    tiles = q.shape[0] * q.shape[2] * head_tiles
    lse2, delta = (q.new_empty((tiles, cfg.block_M), dtype=torch.float32) for _ in range(2))
    dq = q.new_empty((tiles, cfg.block_M * cfg.D // LINE, LINE), dtype=torch.float32)
    rows = key_blocks + backward_packed.spare_rows(tokens) if cfg.form == "packed" else 1
    table = q.new_empty((rows, backward_tiles.ROW), dtype=torch.int32)
    return _Workspace(lse2, delta, dq, q.new_empty(1 + tiles, dtype=torch.int32), table)


def _partial(dk: Tensor, dv: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Each part's own dK and dV in float32."""
    sizes = ((parts * t.shape[0], *t.shape[1:]) for t in (dk, dv))
    dk_parts, dv_parts = (dk.new_empty(size, dtype=torch.float32) for size in sizes)
    return dk_parts, dv_parts


def _check(function: str, call: Call) -> None:
    device.require_hopper(function, call.q.device)
    if not call.deterministic:
        device.warn_if_deterministic(function)


def _without_work(dq: Tensor, dk: Tensor, dv: Tensor) -> bool:
    """A call without queries or without keys: every gradient is 0."""
    if dq.numel() == 0 or dk.numel() == 0 or dv.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return True
    return False


def _ceil(length: int, block: int) -> int:
    return -(-length // block)
