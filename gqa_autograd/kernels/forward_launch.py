"""From a call to the forward kernel: which one, with what run-time numbers, on tensors that TMA can read."""

import functools
from collections.abc import Callable
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
    """The kernel of a configuration, built at its first use."""
    return kernel(program(cfg, dtype, return_lse))


@functools.cache
def executable(cfg: Forward, dtype: torch.dtype, return_lse: bool) -> Callable:
    """What the compiled kernel calls in the end: TileLang's own wrappers around it take 3 µs and check what `plan` has settled."""
    return compiled(cfg, dtype, return_lse).adapter.get_exportable_executable()["main"]


@functools.cache
def compiled_merging(D_v: int, dtype: torch.dtype, return_lse: bool):
    """What merges the parts of a split one, built at its first use."""
    return kernel(combine_program(D_v, dtype, return_lse))


@functools.cache
def combine_executable(D_v: int, dtype: torch.dtype, return_lse: bool) -> Callable:
    return compiled_merging(D_v, dtype, return_lse).adapter.get_exportable_executable()["main"]


# Writes out [B, S_q, H_q, D_v] and, unless None, lse [B, H_q, S_q], from q, k and v
Launch = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], None]


class _Numbers(NamedTuple):
    """Run-time arguments of the kernel, in its order; the tile counter's slot comes before the last."""

    scale: float
    softcap: float
    left: int
    right: int
    blocks: int
    section: int
    parts: int


def plan(cfg: Forward, q: Tensor, k: Tensor, v: Tensor, return_lse: bool, scale: float, window: tuple[int, int], softcap: float) -> Launch:
    """The launch for all tensors of the shapes, strides, dtype, device and alignment that these have. It keeps none of these."""
    device.require_hopper("attention", q.device)
    B, S_q, H_q, _ = q.shape
    S_kv, H_kv, D_v = v.shape[1:]
    if B * S_q * H_q * D_v == 0:
        return _nothing
    if S_kv == 0:
        return _no_keys
    multiprocessors = device.multiprocessors(q.device)
    parts = config.parts(cfg, S_q, S_kv, H_q, window, multiprocessors)
    tiles = -(-S_q // cfg.block_M) * H_q * B * parts
    section = _section(cfg, q.device, B * H_kv, S_kv) * (H_q // H_kv)
    numbers = _Numbers(abs(scale) or 1.0, softcap, *_sides(cfg, window, S_q + S_kv), min(tiles, multiprocessors), section, parts)
    read = _reader((q, k, v), scale)
    if parts == 1:
        return _launch(executable(cfg, q.dtype, return_lse), q.device.index, read, numbers)
    merge = combine_executable(D_v, q.dtype, return_lse)
    return _launch_split(executable(config.split(cfg), q.dtype, True), merge, q.device.index, read, numbers)


def _launch(run: Callable, index: int, read: Callable | None, numbers: _Numbers) -> Launch:
    scale, softcap, left, right, blocks, section, parts = numbers

    def launch(q, k, v, out, lse):
        if not device.is_current(index):
            with torch.cuda.device(index):
                return launch(q, k, v, out, lse)
        if read is not None:
            q, k, v = read(q, k, v)
        run(q, k, v, out, out if lse is None else lse, scale, softcap, left, right, blocks, section, device.slot(index), parts)

    return launch


def _workspace(out: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Each part's own out and lse in float32, 4 (D_v + 1) bytes a row and part."""
    B, S_q, H_q, D_v = out.shape
    return out.new_empty((parts * B, S_q, H_q, D_v), dtype=torch.float32), out.new_empty((parts * B, S_q, H_q), dtype=torch.float32)


def _launch_split(run: Callable, merge: Callable, index: int, read: Callable | None, numbers: _Numbers) -> Launch:
    """Each part in a workspace, then all merged."""
    parts = numbers.parts
    attend = _launch(run, index, read, numbers)

    def launch(q, k, v, out, lse):
        B, S_q, H_q, D_v = out.shape
        rows = B * S_q * H_q
        part_out, part_lse = _workspace(out, parts)
        attend(q, k, v, part_out, part_lse)
        whole = out.view(rows, D_v)
        with device.current(out.device):
            merge(part_out.view(parts, rows, D_v), part_lse.view(parts, rows), whole, whole if lse is None else lse)

    return launch


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
    T_q, H_q, _ = q.shape
    T_kv, H_kv, _ = k.shape
    sequences = cu_seqlens_q.shape[0] - 1
    if out.numel() == 0 or sequences == 0:
        return
    # TMA cannot describe a tensor without rows; one row, which no query sees, stands in
    k, v = (t if T_kv > 0 else t.new_zeros((1, *t.shape[1:])) for t in (k, v))
    # Each sequence can end in a tile of its own
    tiles = (T_q // cfg.block_M + sequences) * H_q
    section = _section(cfg, q.device, H_kv, max(T_kv, 1)) * (H_q // H_kv)
    blocks = min(tiles, device.multiprocessors(q.device))
    numbers = _Numbers(abs(scale) or 1.0, softcap, *_sides(cfg, window, T_q + T_kv), blocks, section, 1)
    q, k, v = (t.unsqueeze(0) for t in (q, k, v))
    read = _reader((q, k, v), scale)
    offsets = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()

    def run(q, k, v, out, lse, *rest):
        executable(cfg, out.dtype, lse is not out)(q, k, v, out, lse, *offsets, *rest)

    _launch(run, q.device.index, read, numbers)(q, k, v, out.unsqueeze(0), None if lse is None else lse.unsqueeze(0))


def _section(cfg: Forward, where: torch.device, heads: int, S_kv: int) -> int:
    """KV heads whose K and V together take about half of the L2 cache."""
    return max(1, min(heads, device.l2_bytes(where) // (4 * S_kv * (cfg.D + cfg.D_v))))


def _sides(cfg: Forward, window: tuple[int, int], far: int) -> tuple[int, int]:
    """An open side reaches farther than any key; `far` is enough for the widest of the others, too."""
    left, right = (far if side < 0 else min(side, far) for side in window) if cfg.mask == "window" else (far, far)
    return left, right


def _reader(tensors: tuple[Tensor, Tensor, Tensor], scale: float) -> Callable | None:
    """Makes of such q, k and v what the kernel can read; None where it reads them as they lie."""
    # The row maximum is taken before the scale, which must therefore be positive; negating q is exact
    sign = 1.0 if scale > 0 else -1.0 if scale < 0 else 0.0
    if sign == 1.0 and all(map(device.readable, tensors)):
        return None

    def read(q, k, v):
        return device.rows(q if sign == 1.0 else q * sign), device.rows(k), device.rows(v)

    return read


def _nothing(q, k, v, out, lse) -> None:
    pass


def _no_keys(q, k, v, out, lse) -> None:
    out.zero_()
    if lse is not None:
        lse.fill_(-torch.inf)
