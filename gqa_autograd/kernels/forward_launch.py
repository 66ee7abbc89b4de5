"""From a call to the forward kernel: which one, with what run-time numbers, on tensors that TMA can read."""

import functools

import torch
from torch import Tensor

from . import device, forward
from .build import Program, kernel
from .config import Forward


def program(cfg: Forward, dtype: torch.dtype, return_lse: bool) -> Program:
    """The kernel of a configuration."""
    return Program("attention_fwd", forward.build, (str(dtype).removeprefix("torch."), return_lse, *cfg))


@functools.cache
def compiled(cfg: Forward, dtype: torch.dtype, return_lse: bool):
    """The same, built at its first use."""
    return kernel(program(cfg, dtype, return_lse))


@functools.cache
def executable(cfg: Forward, dtype: torch.dtype, return_lse: bool):
    """What the compiled kernel calls in the end: TileLang's own wrapper around it takes 3 µs and checks what `launch` has settled."""
    return compiled(cfg, dtype, return_lse).adapter.get_exportable_executable()


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
        out.zero_()
        if lse is not None:
            lse.fill_(-torch.inf)
        return
    if scale <= 0:
        # The row maximum is taken before the scale, which must therefore be positive; negating q is exact
        q, scale = q * (-1.0 if scale < 0 else 0.0), -scale or 1.0
    blocks = min(-(-S_q // cfg.block_M) * H_q * B, device.multiprocessors(q.device))
    # Query heads whose K and V together take about half of the L2 cache
    section = max(1, min(B * H_kv, device.l2_bytes(q.device) // (4 * S_kv * (D + v.shape[3])))) * (H_q // H_kv)
    # An open side reaches farther than any key; so far is enough for the widest of the others, too
    far = S_q + S_kv
    left, right = (far if side < 0 else min(side, far) for side in window) if cfg.mask == "window" else (far, far)
    run = executable(cfg, q.dtype, lse is not None)
    with device.current(q.device):
        q, k, v = device.rows(q), device.rows(k), device.rows(v)
        run(q, k, v, out, out if lse is None else lse, scale, softcap, left, right, blocks, section, device.slot(q.device))
