"""What runs where: `supported` lists it, `explain` says it of one call, `warmup` builds it ahead."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, functional, ops


class Support(NamedTuple):
    """One row of `supported()`. A head size of None stands for any, D_v then for any too; else D_v is D."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    D_forward: tuple[int, ...] | None
    D_backward: tuple[int, ...] | None
    causal: bool
    window: bool
    softcap: bool
    deterministic_backward: bool
    body: str


class Explanation(NamedTuple):
    """What a call would run: the operators in order, who computes them, and on CUDA their tiles."""

    operators: tuple[str, ...]
    body: str
    forward_tile: tuple | None
    backward_tile: tuple | None

    def __str__(self) -> str:
        tiles = [f"{name} {tile}" for name, tile in (("forward", self.forward_tile), ("backward", self.backward_tile)) if tile]
        return "; ".join([f"{', then '.join(self.operators)}: {self.body}", *tiles])


REFERENCE = "the definition in plain PyTorch"
KERNEL = "TileLang kernels for sm_90a"


def supported() -> tuple[Support, ...]:
    """What `attention` computes, a row for each kind of device; everything else raises NotImplementedError or TypeError there.

    Lengths, head counts with H_q a multiple of H_kv, strides and finite scales are free on every device.

    Returns: a tuple of `Support`, readable without a GPU and without tilelang.
    Raises: nothing.
    """
    from .kernels import config

    return (
        Support("cpu", checks.CPU_DTYPES, None, None, True, True, True, True, REFERENCE),
        Support("cuda (sm_90)", checks.CUDA_DTYPES, config.D_FORWARD, config.D_BACKWARD, True, False, False, False, KERNEL),
    )


def explain(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **options) -> Explanation:
    """Says what `attention(q, k, v, **options)` would run, and runs nothing.

    Args:
        q, k, v, options: as for `attention`; grad mode and requires_grad count as they do there.
        return_lse: explain `attention_with_lse` instead.
    Returns: Explanation, whose str() is one readable line.
    Raises: what the call would raise, with the same message.
    """
    q, k, v, settings = functional.settle(q, k, v, **options)
    checks.attention("attention", q, k, v, settings.scale, settings.softcap)
    backward = functional.needs_grad(q, k, v)
    operators = ["attention_fwd_lse" if backward or return_lse else "attention_fwd"] + ["attention_bwd"] * backward
    tiles = ops.tiles(q, v, settings, backward)
    return Explanation(tuple(operators), REFERENCE if tiles == (None, None) else KERNEL, *tiles)


def warmup(
    D: int | Iterable[int] = 128,
    dtype: torch.dtype | Iterable[torch.dtype] = torch.bfloat16,
    *,
    causal: bool | None = None,
    backward: bool = True,
    device: torch.device | str | int | None = None,
) -> int:
    """Builds the kernels that these configurations need, so that no later call compiles: before a time measurement, a CUDA graph
    capture, or in one process before the ranks of a job start.

    Args:
        D: head size or sizes. dtype: float16, bfloat16 or both. causal: None for both masks. backward: also what training needs.
        device: a CUDA device: each kernel is launched there once, which a graph capture needs. None only builds; no GPU is needed.
    Returns: how many kernels this process has by now. They stay in TileLang's disk cache, TILELANG_CACHE_DIR.
    Raises: NotImplementedError for a configuration without a kernel; TypeError for a dtype; ImportError without tilelang.
    """
    from .kernels import build

    sizes = (D,) if isinstance(D, int) else tuple(D)
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
    masks = (True, False) if causal is None else (causal,)
    wanted = list(itertools.product(sizes, dtypes, masks))
    for configuration in wanted:
        _check(*configuration, backward)
    for configuration in wanted:
        _build(*configuration, backward)
        if device is not None:
            _launch(*configuration, backward, torch.device(device))
    return build.built()


def _check(D: int, dtype: torch.dtype, causal: bool, backward: bool) -> None:
    from .kernels import config

    if dtype not in checks.CUDA_DTYPES:
        raise TypeError(f"warmup: dtype must be float16 or bfloat16, got {str(dtype).removeprefix('torch.')}")
    config.forward("warmup", D, D, -1, 0 if causal else -1, 0.0)
    if backward:
        config.backward("warmup", D, D, -1, 0 if causal else -1, 0.0, False)


def _build(D: int, dtype: torch.dtype, causal: bool, backward: bool) -> None:
    from .kernels import backward as backward_kernels
    from .kernels import config
    from .kernels import forward as forward_kernels

    for return_lse in (False, True):
        forward_kernels.compiled(config.FORWARD[D, causal], dtype, return_lse)
    if backward:
        backward_kernels.compiled(config.BACKWARD[D, causal], dtype, False)


def _launch(D: int, dtype: torch.dtype, causal: bool, backward: bool, device: torch.device) -> None:
    q, k, v = (torch.zeros(1, 1, 1, D, dtype=dtype, device=device, requires_grad=backward) for _ in range(3))
    with torch.no_grad():
        functional.attention(q, k, v, causal=causal)
        functional.attention_with_lse(q, k, v, causal=causal)
    if backward:
        functional.attention(q, k, v, causal=causal).sum().backward()
