"""The operators gqa_autograd::attention_varlen_fwd, attention_varlen_fwd_lse and attention_varlen_bwd: `ops` for packed sequences.

Sequence n has the queries from cu_seqlens_q[n] to cu_seqlens_q[n + 1] and the keys from cu_seqlens_k[n] to cu_seqlens_k[n + 1]. Tokens
beyond the last offset belong to none: their rows of out and lse are left as they were allocated, their gradients are 0.
"""

import functools

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake, register_vmap

from . import checks, flops, meta, ops
from .ops import LIBRARY, SETTINGS, Settings, backward_launch, formula, forward_launch, kernel_config, run, scale_of
from .reference import varlen as reference

_INPUTS = "Tensor q, Tensor k, Tensor v"
_OFFSETS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k"
_SCHEMAS = {
    "attention_varlen_fwd": f"({_INPUTS}, {_OFFSETS}, {SETTINGS}) -> Tensor",
    "attention_varlen_fwd_lse": f"({_INPUTS}, {_OFFSETS}, {SETTINGS}) -> (Tensor, Tensor)",
    "attention_varlen_bwd": f"(Tensor do, {_INPUTS}, Tensor out, Tensor lse, Tensor? dlse, {_OFFSETS}, {SETTINGS})"
    " -> (Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
attention_varlen_fwd = torch.ops.gqa_autograd.attention_varlen_fwd.default
attention_varlen_fwd_lse = torch.ops.gqa_autograd.attention_varlen_fwd_lse.default
attention_varlen_bwd = torch.ops.gqa_autograd.attention_varlen_bwd.default

# The public tuple: all forwards
SAVE_OPS = (*ops.SAVE_OPS, attention_varlen_fwd, attention_varlen_fwd_lse)


def _checked(function: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, settings: tuple) -> Settings:
    checked = Settings(*settings)
    checks.attention_varlen(function, q, k, v, cu_seqlens_q, cu_seqlens_k, checked.scale, checked.softcap)
    checks.sides(function, checked.window_left, checked.window_right)
    return checked


def _checked_bwd(do, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, settings: tuple) -> Settings:
    checked = _checked("attention_varlen_bwd", q, k, v, cu_seqlens_q, cu_seqlens_k, settings)
    checks.attention_bwd("attention_varlen_bwd", do, q, v, out, lse, dlse)
    return checked


def _cuda_forward(q: Tensor, v: Tensor, s: Settings):
    """The tile a CUDA call uses; NotImplementedError, also while tracing, if no kernel computes it."""
    return kernel_config().forward("attention_varlen", q.shape[2], v.shape[2], s.window_left, s.window_right, s.softcap, packed=True)


def _cuda_backward(function: str, q: Tensor, v: Tensor, s: Settings):
    return kernel_config().backward(function, q.shape[2], v.shape[2], s.window_left, s.window_right, s.softcap, packed=True)


def tiles(q: Tensor, v: Tensor, s: Settings, backward: bool) -> tuple:
    """As ops.tiles: called before a forward that will be differentiated, it refuses there what the backward can't do."""
    if q.device.type != "cuda":
        return None, None
    return _cuda_forward(q, v, s), _cuda_backward("attention_varlen", q, v, s) if backward else None


# --- bodies: on a CPU, on CUDA, and the fake of each operator ---
def _fwd_cpu(q, k, v, cu_seqlens_q, cu_seqlens_k, *settings):
    s = _checked("attention_varlen", q, k, v, cu_seqlens_q, cu_seqlens_k, settings)
    out = meta.attention_varlen_fwd(q, k, v)
    reference.attention_varlen_fwd(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), out, None, *formula(q, s))
    return out


def _fwd_cuda(q, k, v, cu_seqlens_q, cu_seqlens_k, *settings):
    s = _checked("attention_varlen", q, k, v, cu_seqlens_q, cu_seqlens_k, settings)
    tile = _cuda_forward(q, v, s)
    out = meta.attention_varlen_fwd(q, k, v)
    sides = (s.window_left, s.window_right)
    forward_launch().launch_varlen(tile, q, k, v, cu_seqlens_q, cu_seqlens_k, out, None, scale_of(q, s), sides, s.softcap)
    return out


def _fwd_fake(q, k, v, cu_seqlens_q, cu_seqlens_k, *settings):
    s = _checked("attention_varlen", q, k, v, cu_seqlens_q, cu_seqlens_k, settings)
    tiles(q, v, s, backward=False)
    return meta.attention_varlen_fwd(q, k, v)


def _fwd_lse_cpu(q, k, v, cu_seqlens_q, cu_seqlens_k, *settings):
    s = _checked("attention_varlen", q, k, v, cu_seqlens_q, cu_seqlens_k, settings)
    out, lse = meta.attention_varlen_fwd_lse(q, k, v)
    reference.attention_varlen_fwd(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), out, lse, *formula(q, s))
    return out, lse


def _fwd_lse_cuda(q, k, v, cu_seqlens_q, cu_seqlens_k, *settings):
    s = _checked("attention_varlen", q, k, v, cu_seqlens_q, cu_seqlens_k, settings)
    tile = _cuda_forward(q, v, s)
    out, lse = meta.attention_varlen_fwd_lse(q, k, v)
    sides = (s.window_left, s.window_right)
    forward_launch().launch_varlen(tile, q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, scale_of(q, s), sides, s.softcap)
    return out, lse


def _fwd_lse_fake(q, k, v, cu_seqlens_q, cu_seqlens_k, *settings):
    s = _checked("attention_varlen", q, k, v, cu_seqlens_q, cu_seqlens_k, settings)
    tiles(q, v, s, backward=False)
    return meta.attention_varlen_fwd_lse(q, k, v)


def _bwd_cpu(do, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, *settings):
    s = _checked_bwd(do, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, settings)
    gradients = meta.attention_varlen_bwd(q, k, v)
    offsets = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    reference.attention_varlen_bwd(do, q, k, v, out, lse, dlse, *offsets, gradients, *formula(q, s))
    return gradients


def _bwd_cuda(do, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, *settings):
    s = _checked_bwd(do, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, settings)
    tile = _cuda_backward("attention_varlen_bwd", q, v, s)
    gradients = meta.attention_varlen_bwd(q, k, v)
    launch = backward_launch()
    do, q, k, v, out, lse, dlse = (None if t is None else t.unsqueeze(0) for t in (do, q, k, v, out, lse, dlse))
    call = launch.Call(do, q, k, v, out, lse, dlse, scale_of(q, s), (s.window_left, s.window_right), s.softcap, s.deterministic)
    launch.launch_varlen(tile, call, cu_seqlens_q, cu_seqlens_k, *(t.unsqueeze(0) for t in gradients))
    return gradients


def _bwd_fake(do, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, *settings):
    s = _checked_bwd(do, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, settings)
    if q.device.type == "cuda":
        _cuda_backward("attention_varlen_bwd", q, v, s)
    return meta.attention_varlen_bwd(q, k, v)


# --- the derivative ---
class AttentionVarlen(torch.autograd.Function):
    """As ops.Attention: the one definition of the derivative, in the form that torch.func needs."""

    @staticmethod
    def forward(q, k, v, cu_seqlens_q, cu_seqlens_k, *settings):
        return attention_varlen_fwd_lse(q, k, v, cu_seqlens_q, cu_seqlens_k, *settings)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.settings = inputs
        ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k, *output)
        # An lse that nobody used leaves dlse None: no zeros are made, no extra work is launched
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse = ctx.saved_tensors
        no_gradient = (None,) * (2 + len(ctx.settings))
        if do is None and dlse is None:
            return None, None, None, *no_gradient
        if do is None:
            do = torch.zeros_like(out)
        # With create_graph, as torch.func always has it, the gradient itself meets autograd and functorch: they need a Function
        gradient = AttentionVarlenGradient.apply if torch.is_grad_enabled() else functools.partial(run, attention_varlen_bwd)
        return *gradient(do, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, *ctx.settings), *no_gradient

    @staticmethod
    def vmap(info, in_dims, *args):
        return _fold_into_sequences(AttentionVarlen.apply, _FORWARD_ROLES, _FORWARD_RESULTS)(info, in_dims, *args)


class EagerAttentionVarlen(torch.autograd.Function):
    """AttentionVarlen for calls that no functorch transform sees: a forward with ctx spares a call the signature binding."""

    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, *settings):
        outputs = run(attention_varlen_fwd_lse, q, k, v, cu_seqlens_q, cu_seqlens_k, *settings)
        AttentionVarlen.setup_context(ctx, (q, k, v, cu_seqlens_q, cu_seqlens_k, *settings), outputs)
        return outputs

    backward = AttentionVarlen.backward


class AttentionVarlenGradient(torch.autograd.Function):
    """attention_varlen_bwd as functorch can see it; it has no derivative of its own."""

    @staticmethod
    def forward(*args):
        return attention_varlen_bwd(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("attention_varlen_bwd: double backward through attention is not supported")

    @staticmethod
    def vmap(info, in_dims, *args):
        return _fold_into_sequences(AttentionVarlenGradient.apply, _BACKWARD_ROLES, _BACKWARD_RESULTS)(info, in_dims, *args)


def _setup_without_lse(ctx, inputs, output):
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k)


def _backward_without_lse(ctx, do):
    """A raw call of attention_varlen_fwd, or a graph exported without gradients, is differentiated by running the forward again."""
    q, k, v, *offsets = ctx.saved_tensors
    out, lse = attention_varlen_fwd_lse(q, k, v, *offsets, *ctx.settings)
    gradients = attention_varlen_bwd(do, q, k, v, out, lse, None, *offsets, *ctx.settings)
    return *gradients, *(None,) * (2 + len(ctx.settings))


# --- vmap ---
# What each tensor is: tokens of queries or of keys, rows of lse [H, T], or offsets
_FORWARD_ROLES = ("queries", "keys", "keys", "offsets", "offsets")
_FORWARD_RESULTS = ("queries", "rows")
_BACKWARD_ROLES = ("queries", "queries", "keys", "keys", "queries", "rows", "rows", "offsets", "offsets")
_BACKWARD_RESULTS = ("queries", "keys", "keys")


def _fold_into_sequences(function, roles: tuple, results: tuple):
    """The vmap rule: lay the mapped packings end to end and call once. Tokens beyond the last offset of one become two sequences, one
    without keys and one without queries, so that they stay without effect."""

    def rule(info, in_dims, *args):
        B, n = info.batch_size, len(roles)
        *stacked, offsets_q, offsets_k = (_stack(t, dim, B) for t, dim in zip(args[:n], in_dims[:n], strict=True))
        T_q, T_kv = (stacked[roles.index(role)].shape[1] for role in ("queries", "keys"))
        folded = [_fold(t, role) for t, role in zip(stacked, roles, strict=False)]
        out = function(*folded, *_offsets_of_all(offsets_q, offsets_k, T_q, T_kv), *args[n:])
        dims = tuple(int(role == "rows") for role in results)
        unfolded = [
            t.unflatten(dim, (B, t.shape[dim] // B)) for t, dim in zip((out,) if isinstance(out, Tensor) else out, dims, strict=True)
        ]
        return (unfolded[0], 0) if isinstance(out, Tensor) else (tuple(unfolded), dims)

    return rule


def _stack(t, dim: int | None, B: int):
    """The mapped dimension first, and also where there was none."""
    if t is None:
        return None
    return t.expand(B, *t.shape) if dim is None else t.movedim(dim, 0)


def _fold(t, role: str):
    """[B, T, H, D] -> [B T, H, D], and rows [B, H, T] -> [H, B T]."""
    if t is None:
        return None
    return t.transpose(0, 1).flatten(1, 2) if role == "rows" else t.flatten(0, 1)


def _offsets_of_all(offsets_q: Tensor, offsets_k: Tensor, T_q: int, T_kv: int) -> tuple[Tensor, Tensor]:
    """The offsets [B, N + 1] of each packing as those of one, [B (N + 3)]; the last two sequences of a packing are what it left over:
    queries without keys, then keys without queries."""

    def shifted(offsets: Tensor, rest: list[Tensor], T: int) -> Tensor:
        first = torch.arange(offsets.shape[0], dtype=torch.int32, device=offsets.device).unsqueeze(1) * T
        return (torch.cat((offsets, *rest), 1) + first).flatten()

    end_q, end_k = (torch.full_like(offsets[:, :1], T) for offsets, T in ((offsets_q, T_q), (offsets_k, T_kv)))
    return shifted(offsets_q, [end_q, end_q], T_q), shifted(offsets_k, [offsets_k[:, -1:], end_k], T_kv)


# --- registrations ---
def _register(operator, bodies: tuple, backward, setup_context, roles: tuple, results: tuple) -> None:
    cpu, cuda, fake = bodies
    LIBRARY.impl(operator, cpu, "CPU")
    LIBRARY.impl(operator, cuda, "CUDA")
    register_fake(operator, fake, lib=LIBRARY)
    register_autograd(operator, backward, setup_context=setup_context, lib=LIBRARY)
    register_vmap(operator, _fold_into_sequences(operator, roles, results), lib=LIBRARY)


_register(
    attention_varlen_fwd, (_fwd_cpu, _fwd_cuda, _fwd_fake), _backward_without_lse, _setup_without_lse, _FORWARD_ROLES, _FORWARD_RESULTS[:1]
)
_register(
    attention_varlen_fwd_lse,
    (_fwd_lse_cpu, _fwd_lse_cuda, _fwd_lse_fake),
    AttentionVarlen.backward,
    AttentionVarlen.setup_context,
    _FORWARD_ROLES,
    _FORWARD_RESULTS,
)
_register(
    attention_varlen_bwd, (_bwd_cpu, _bwd_cuda, _bwd_fake), AttentionVarlenGradient.backward, None, _BACKWARD_ROLES, _BACKWARD_RESULTS
)
flops.register_varlen(
    [torch.ops.gqa_autograd.attention_varlen_fwd, torch.ops.gqa_autograd.attention_varlen_fwd_lse],
    [torch.ops.gqa_autograd.attention_varlen_bwd],
)
