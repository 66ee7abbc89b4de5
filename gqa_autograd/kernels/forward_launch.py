"""From a call to the forward kernel: which one, with what run-time numbers, on tensors that TMA can read."""

import functools
from collections.abc import Callable

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
    """What the compiled kernel calls in the end: TileLang's own wrappers around it take 3 µs and check what `plan` has settled."""
    return compiled(cfg, dtype, return_lse).adapter.get_exportable_executable()["main"]


# Writes out [B, S_q, H_q, D_v] and, unless None, lse [B, H_q, S_q], from q, k and v
Launch = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], None]


def plan(cfg: Forward, q: Tensor, k: Tensor, v: Tensor, return_lse: bool, scale: float, window: tuple[int, int], softcap: float) -> Launch:
    """The launch for all tensors of the shapes, strides, dtype, device and alignment that these have. It keeps none of these."""
    device.require_hopper("attention", q.device)
    B, S_q, H_q, D = q.shape
    S_kv, H_kv, D_v = v.shape[1:]
    if B * S_q * H_q * D_v == 0:
        return _nothing
    if S_kv == 0:
        return _no_keys
    # The row maximum is taken before the scale, which must therefore be positive; negating q is exact
    sign = 1.0 if scale > 0 else -1.0 if scale < 0 else 0.0
    blocks = min(-(-S_q // cfg.block_M) * H_q * B, device.multiprocessors(q.device))
    # Query heads whose K and V together take about half of the L2 cache
    section = max(1, min(B * H_kv, device.l2_bytes(q.device) // (4 * S_kv * (D + D_v)))) * (H_q // H_kv)
    # An open side reaches farther than any key; so far is enough for the widest of the others, too
    far = S_q + S_kv
    left, right = (far if side < 0 else min(side, far) for side in window) if cfg.mask == "window" else (far, far)
    numbers = (abs(scale) or 1.0, softcap, left, right, blocks, section)
    return _launch(executable(cfg, q.dtype, return_lse), q.device.index, _reader(q, k, v, sign), numbers)


def _launch(run: Callable, index: int, read: Callable | None, numbers: tuple) -> Launch:
    scale, softcap, left, right, blocks, section = numbers

    def launch(q, k, v, out, lse):
        if not device.is_current(index):
            with torch.cuda.device(index):
                return launch(q, k, v, out, lse)
        if read is not None:
            q, k, v = read(q, k, v)
        run(q, k, v, out, out if lse is None else lse, scale, softcap, left, right, blocks, section, device.slot(index))

    return launch


def _reader(q: Tensor, k: Tensor, v: Tensor, sign: float) -> Callable | None:
    """Makes of such q, k and v what the kernel can read; None where it reads them as they lie."""
    if sign == 1.0 and all(map(device.readable, (q, k, v))):
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
