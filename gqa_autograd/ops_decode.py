"""The operators gqa_autograd::attention_decode_fwd and attention_decode_fwd_lse: a few new tokens over a dense or a paged cache.

They have no derivative: a cache is what was computed before, without gradients."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from . import checks_decode, flops, meta, plans
from .ops import LIBRARY, formula, kernel_config
from .reference import decode as reference


class Settings(NamedTuple):
    """What follows the tensors in both schemas."""

    window_left: int = -1
    window_right: int = -1
    scale: float | None = None
    softcap: float = 0.0


_INPUTS = "Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? page_table=None"
_SETTINGS = "int window_left=-1, int window_right=-1, float? scale=None, float softcap=0.0"
for _name, _result in (("attention_decode_fwd", "Tensor"), ("attention_decode_fwd_lse", "(Tensor, Tensor)")):
    LIBRARY.define(f"{_name}({_INPUTS}, {_SETTINGS}) -> {_result}", tags=torch.Tag.pt2_compliant_tag)
attention_decode_fwd = torch.ops.gqa_autograd.attention_decode_fwd.default
attention_decode_fwd_lse = torch.ops.gqa_autograd.attention_decode_fwd_lse.default


@functools.cache
def _launch():
    from .kernels import decode_launch

    return decode_launch


def checked(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, page_table: Tensor | None, settings: tuple) -> Settings:
    s = Settings(*settings)
    window = s.window_left, s.window_right
    checks_decode.attention_decode("attention_decode", q, k_cache, v_cache, cache_seqlens, page_table, window, s.scale, s.softcap)
    return s


def tile(q: Tensor, k_cache: Tensor, page_table: Tensor | None, s: Settings):
    """The tile a CUDA call uses, None where the definition computes; NotImplementedError, also while tracing, if no kernel computes it."""
    if q.device.type != "cuda":
        return None
    S_page = None if page_table is None else int(k_cache.shape[1])
    return kernel_config().decode("attention_decode", q.shape[3], S_page, s.softcap)


# --- bodies: on a CPU, on CUDA, and the fake of each operator ---
def _cpu(q, k_cache, v_cache, cache_seqlens, page_table, settings, out, lse) -> None:
    pages = None if page_table is None else page_table.tolist()
    reference.attention_decode(q, k_cache, v_cache, cache_seqlens.tolist(), pages, out, lse, *formula(q, settings))


def _fwd_cpu(q, k_cache, v_cache, cache_seqlens, page_table=None, *settings):
    s = checked(q, k_cache, v_cache, cache_seqlens, page_table, settings)
    out = meta.attention_decode_fwd(q)
    _cpu(q, k_cache, v_cache, cache_seqlens, page_table, s, out, None)
    return out


def _fwd_lse_cpu(q, k_cache, v_cache, cache_seqlens, page_table=None, *settings):
    s = checked(q, k_cache, v_cache, cache_seqlens, page_table, settings)
    out, lse = meta.attention_decode_fwd_lse(q)
    _cpu(q, k_cache, v_cache, cache_seqlens, page_table, s, out, lse)
    return out, lse


def _cuda(q, k_cache, v_cache, cache_seqlens, page_table, settings: tuple, with_lse: bool) -> Any:
    """Planned once for each kind of call, then only run."""
    s = Settings(*settings)
    kind = _kind(q, k_cache, v_cache, cache_seqlens, page_table, s, with_lse)
    run = plans.get(kind)
    if run is None:
        run = _plan(q, k_cache, v_cache, cache_seqlens, page_table, s, with_lse)
        plans.remember(kind, run)
    return run(q, k_cache, v_cache, cache_seqlens, page_table)


def _fwd_cuda(q, k_cache, v_cache, cache_seqlens, page_table=None, *settings):
    return _cuda(q, k_cache, v_cache, cache_seqlens, page_table, settings, False)


def _fwd_lse_cuda(q, k_cache, v_cache, cache_seqlens, page_table=None, *settings):
    return _cuda(q, k_cache, v_cache, cache_seqlens, page_table, settings, True)


def _fwd_fake(q, k_cache, v_cache, cache_seqlens, page_table=None, *settings):
    s = checked(q, k_cache, v_cache, cache_seqlens, page_table, settings)
    tile(q, k_cache, page_table, s)
    return meta.attention_decode_fwd(q)


def _fwd_lse_fake(q, k_cache, v_cache, cache_seqlens, page_table=None, *settings):
    s = checked(q, k_cache, v_cache, cache_seqlens, page_table, settings)
    tile(q, k_cache, page_table, s)
    return meta.attention_decode_fwd_lse(q)


# --- plans ---
def _kind(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, table: Tensor | None, s: Settings, with_lse: bool) -> tuple:
    """All that a plan depends on, as plans.kind."""
    tensors = (q, k, v, lengths) if table is None else (q, k, v, lengths, table)
    facts = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
    return "decode", facts, (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15, s, with_lse


def _plan(q, k_cache, v_cache, cache_seqlens, page_table, s: Settings, with_lse: bool) -> Any:
    checked(q, k_cache, v_cache, cache_seqlens, page_table, s)
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks_decode.aligned("attention_decode", name, t)
    chosen = tile(q, k_cache, page_table, s)
    left, right, scale, softcap = formula(q, s)  # type: ignore[arg-type]
    launch = _launch().plan(chosen, q, k_cache, v_cache, page_table, scale, (left, right), softcap)

    def run(q, k_cache, v_cache, cache_seqlens, page_table):
        out = meta.attention_decode_fwd(q)
        launch(q, k_cache, v_cache, cache_seqlens, page_table, out, None)
        return out

    def run_with_lse(q, k_cache, v_cache, cache_seqlens, page_table):
        out, lse = meta.attention_decode_fwd_lse(q)
        launch(q, k_cache, v_cache, cache_seqlens, page_table, out, lse)
        return out, lse

    return run_with_lse if with_lse else run


def planned(q, k, v, lengths, table, causal, scale, softcap, window, with_lse: bool) -> Any:
    """As plans.planned: the plan for a call in eager, if an equal one ran before and nothing watches the operator; None is always right."""
    if torch.compiler.is_compiling() or not plans.any_plan():
        return None
    tensors = (q, k, v, lengths) if table is None else (q, k, v, lengths, table)
    if any(type(t) is not Tensor for t in tensors) or plans.watched():
        return None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return None
    if not (plans.numbers(window, scale, softcap) and plans.plain(*tensors)):
        return None
    return plans.get(_kind(q, k, v, lengths, table, Settings(window[0], 0 if causal else window[1], scale, softcap), with_lse))


# --- registrations ---
def _no_backward(ctx, *gradients):
    checks_decode.no_gradient("attention_decode")


for _operator, _bodies in (
    (attention_decode_fwd, (_fwd_cpu, _fwd_cuda, _fwd_fake)),
    (attention_decode_fwd_lse, (_fwd_lse_cpu, _fwd_lse_cuda, _fwd_lse_fake)),
):
    LIBRARY.impl(_operator, _bodies[0], "CPU")
    LIBRARY.impl(_operator, _bodies[1], "CUDA")
    register_fake(_operator, _bodies[2], lib=LIBRARY)
    register_autograd(_operator, _no_backward, lib=LIBRARY)
flops.register_decode([torch.ops.gqa_autograd.attention_decode_fwd, torch.ops.gqa_autograd.attention_decode_fwd_lse])
