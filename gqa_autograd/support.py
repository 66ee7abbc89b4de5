"""What runs where: `supported` lists it, `explain` says it of one call, `warmup` builds it ahead."""

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, functional, ops


class Support(NamedTuple):
    """One row of `supported()`. Head sizes are pairs (D, D_v); None stands for any. Of what the forward has, `backward` names the part that
    gradients have too."""

    device: str
    dtypes: tuple[torch.dtype, ...]
    D_forward: tuple[tuple[int, int], ...] | None
    D_backward: tuple[tuple[int, int], ...] | None
    forward: tuple[str, ...]
    backward: tuple[str, ...]
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
FEATURES = ("causal", "window", "softcap", "deterministic")


def supported() -> tuple[Support, ...]:
    """What `attention` computes, a row for each kind of device; everything else raises NotImplementedError or TypeError there.

    Lengths, head counts with H_q a multiple of H_kv, strides and finite scales are free on every device.

    Returns: a tuple of `Support`, readable without a GPU and without tilelang.
    Raises: nothing.
    """
    from .kernels import config

    return (
        Support("cpu", checks.CPU_DTYPES, None, None, FEATURES, FEATURES, REFERENCE),
        Support("cuda (sm_90)", checks.CUDA_DTYPES, config.D_FORWARD, config.D_BACKWARD, FEATURES, ("causal",), KERNEL),
    )


def explain(q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **options) -> Explanation:
    """Says what `attention(q, k, v, **options)` would run, and runs nothing.

    Args:
        q, k, v, options: as for `attention`; grad mode and requires_grad count as they do there.
        return_lse: explain `attention_with_lse` instead.
    Returns: Explanation, whose str() is one readable line.
    Raises: what the call would raise, with the same message.
    """
    q, k, v, settings = functional.settle("attention", q, k, v, **options)
    checks.attention("attention", q, k, v, settings.scale, settings.softcap)
    backward = functional.needs_grad(q, k, v)
    operators = ["attention_fwd_lse" if backward or return_lse else "attention_fwd"] + ["attention_bwd"] * backward
    tiles = ops.tiles(q, v, settings, backward)
    return Explanation(tuple(operators), REFERENCE if tiles == (None, None) else KERNEL, *tiles)


def warmup(
    D: int | Iterable[int] = 128,
    dtype: torch.dtype | Iterable[torch.dtype] = torch.bfloat16,
    *,
    D_v: int | None = None,
    causal: bool | None = None,
    window: bool = False,
    softcap: bool = False,
    backward: bool = True,
    device: torch.device | str | int | None = None,
) -> int:
    """Builds the kernels that these configurations need, so that no later call compiles: before a time measurement, a CUDA graph
    capture, or in one process before the ranks of a job start.

    Args:
        D: head size or sizes. dtype: float16, bfloat16 or both. D_v: the head size of v, that of q and k when None.
        causal: None for both masks. window: the kernels for a sliding window instead. softcap: those with a softcap.
        backward: also what training needs.
        device: a CUDA device: each kernel is launched there once, which a graph capture needs. None only builds; no GPU is needed.
    Returns: how many kernels this process has by now. They stay in TileLang's disk cache, TILELANG_CACHE_DIR.
    Raises: NotImplementedError for a configuration without a kernel; TypeError for a dtype; ImportError without tilelang.
    """
    from .kernels import build

    sizes = (D,) if isinstance(D, int) else tuple(D)
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else tuple(dtype)
    # Any window has the same kernel: one key to the left is as good as any
    masks: list[dict[str, Any]] = (
        [{"window": (1, 0)}] if window else [{"causal": c} for c in ((True, False) if causal is None else (causal,))]
    )
    wanted = [
        _Wanted((size, size if D_v is None else D_v), kind, {**mask, "softcap": 1.0 if softcap else 0.0}, backward)
        for size, kind, mask in itertools.product(sizes, dtypes, masks)
    ]
    for configuration in wanted:
        _tiles(configuration)
    for configuration in wanted:
        _build(configuration)
        if device is not None:
            _launch(configuration, torch.device(device))
    return build.built()


class _Wanted(NamedTuple):
    """What `warmup` is to build: sizes (D, D_v), dtype, the options of `attention`, and whether gradients are wanted."""

    sizes: tuple[int, int]
    dtype: torch.dtype
    options: dict[str, Any]
    backward: bool


def _tiles(wanted: _Wanted) -> tuple:
    """The tiles of the forward and, or None, of the backward; raises where there is none."""
    from .kernels import config

    if wanted.dtype not in checks.CUDA_DTYPES:
        raise TypeError(f"warmup: dtype must be float16 or bfloat16, got {str(wanted.dtype).removeprefix('torch.')}")
    left, right = checks.window("warmup", wanted.options.get("causal", False), wanted.options.get("window", (-1, -1)))
    arguments = ("warmup", *wanted.sizes, left, right, wanted.options["softcap"])
    return config.forward(*arguments), config.backward(*arguments, False) if wanted.backward else None


def _build(wanted: _Wanted) -> None:
    from .kernels import backward as backward_kernels
    from .kernels import forward_launch as forward_kernels

    forward, backward = _tiles(wanted)
    for return_lse in (False, True):
        forward_kernels.compiled(forward, wanted.dtype, return_lse)
    if backward is not None:
        backward_kernels.compiled(backward, wanted.dtype, False)


def _launch(wanted: _Wanted, device: torch.device) -> None:
    D, D_v = wanted.sizes
    q, k, v = (torch.zeros(1, 1, 1, size, dtype=wanted.dtype, device=device, requires_grad=wanted.backward) for size in (D, D, D_v))
    with torch.no_grad():
        functional.attention(q, k, v, **wanted.options)
        functional.attention_with_lse(q, k, v, **wanted.options)
    if wanted.backward:
        functional.attention(q, k, v, **wanted.options).sum().backward()
