"""The operators gqa_autograd::attention_fwd, attention_fwd_lse and attention_bwd: schema, body per device, derivative, registrations.

The body on a CPU is the definition in `reference`; on CUDA it is a TileLang kernel. Neither stands in for the other. Why two forward
operators of fixed arity, why the checks stand in here, and why not custom_op: docs/design/0001-operators.md.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake, register_vmap

from . import checks, flops, meta, plans
from .reference import attention as reference


class Settings(NamedTuple):
    """What follows the tensors in every schema. Ints come first: DTensor's sharding cache keys on the arguments from the first int on."""

    window_left: int = -1
    window_right: int = -1
    scale: float | None = None
    softcap: float = 0.0
    deterministic: bool = False


LIBRARY = Library("gqa_autograd", "DEF")
SETTINGS = "int window_left=-1, int window_right=-1, float? scale=None, float softcap=0.0, bool deterministic=False"
_FWD = f"(Tensor q, Tensor k, Tensor v, {SETTINGS})"
_BWD = f"(Tensor do, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, {SETTINGS})"
_SCHEMAS = {
    "attention_fwd": f"{_FWD} -> Tensor",
    "attention_fwd_lse": f"{_FWD} -> (Tensor, Tensor)",
    "attention_bwd": f"{_BWD} -> (Tensor, Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
attention_fwd = torch.ops.gqa_autograd.attention_fwd.default
attention_fwd_lse = torch.ops.gqa_autograd.attention_fwd_lse.default
attention_bwd = torch.ops.gqa_autograd.attention_bwd.default

# For selective checkpoint policies of torch.utils.checkpoint: keep these results, recompute the rest
SAVE_OPS = (attention_fwd, attention_fwd_lse)


def _body(operator, device: str):
    """Registers a function as the body of an operator on a device."""

    def register(function):
        LIBRARY.impl(operator, function, device)
        return function

    return register


def _fake(operator):
    return lambda function: register_fake(operator, function, lib=LIBRARY)


def run(operator, *args):
    """The operator where no gradient is to be recorded. In eager it then skips its Autograd kernel, which is 20 µs of Python."""
    if torch.compiler.is_compiling():
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def scale_of(q: Tensor, s: Settings) -> float:
    return q.shape[-1] ** -0.5 if s.scale is None else s.scale


def formula(q: Tensor, s: Settings) -> tuple[int, int, float, float]:
    """The settings as the definitions in `reference` take them."""
    return s.window_left, s.window_right, scale_of(q, s), s.softcap


def _checked(q: Tensor, k: Tensor, v: Tensor, settings: tuple) -> Settings:
    checked = Settings(*settings)
    checks.attention("attention", q, k, v, checked.scale, checked.softcap)
    checks.sides("attention", checked.window_left, checked.window_right)
    return checked


def _checked_bwd(do, q, k, v, out, lse, dlse, settings: tuple) -> Settings:
    checked = Settings(*settings)
    checks.attention("attention_bwd", q, k, v, checked.scale, checked.softcap)
    checks.sides("attention_bwd", checked.window_left, checked.window_right)
    checks.attention_bwd("attention_bwd", do, q, v, out, lse, dlse)
    return checked


@functools.cache
def kernel_config():
    from .kernels import config

    return config


@functools.cache
def forward_launch():
    from .kernels import forward_launch as launch

    return launch


@functools.cache
def backward_launch():
    from .kernels import backward_launch as launch

    return launch


def _forward_tile(q: Tensor, v: Tensor, s: Settings):
    """The tile a CUDA call uses; NotImplementedError, also while tracing, if no kernel computes it."""
    return kernel_config().forward("attention", q.shape[3], v.shape[3], s.window_left, s.window_right, s.softcap)


def _backward_tile(function: str, q: Tensor, v: Tensor, s: Settings):
    return kernel_config().backward(function, q.shape[3], v.shape[3], s.window_left, s.window_right, s.softcap)


def tiles(q: Tensor, v: Tensor, s: Settings, backward: bool) -> tuple:
    """The tiles of the forward and of the backward to come, None where the definition computes. Called before a forward that will be
    differentiated, it refuses there and not in the backward what the backward can't do."""
    if q.device.type != "cuda":
        return None, None
    return _forward_tile(q, v, s), _backward_tile("attention", q, v, s) if backward else None


def _cuda_forward(q: Tensor, k: Tensor, v: Tensor, settings: tuple, with_lse: bool) -> Any:
    """The body of both forward operators on CUDA: planned once for each kind of call, then only run."""
    s = Settings(*settings)
    addresses = q.data_ptr() | k.data_ptr() | v.data_ptr()
    kind = plans.kind(q, k, v, addresses, s.window_left, s.window_right, s.scale, s.softcap, with_lse)
    run = plans.get(kind)
    if run is None:
        run = _plan(q, k, v, s, with_lse)
        plans.remember(kind, run)
    return run(q, k, v)


def _plan(q: Tensor, k: Tensor, v: Tensor, s: Settings, with_lse: bool) -> plans.Plan:
    _checked(q, k, v, s)
    tile = _forward_tile(q, v, s)
    launch = forward_launch().plan(tile, q, k, v, with_lse, scale_of(q, s), (s.window_left, s.window_right), s.softcap)

    def run(q, k, v):
        out = meta.attention_fwd(q, k, v)
        launch(q, k, v, out, None)
        return out

    def run_with_lse(q, k, v):
        out, lse = meta.attention_fwd_lse(q, k, v)
        launch(q, k, v, out, lse)
        return out, lse

    return run_with_lse if with_lse else run


# --- forward without LSE: nobody will ask for a gradient ---
@_body(attention_fwd, "CPU")
def _(q, k, v, *settings):
    s = _checked(q, k, v, settings)
    return meta.attention_fwd(q, k, v).copy_(reference.attention_fwd_lse(q, k, v, *formula(q, s))[0])


@_body(attention_fwd, "CUDA")
def _(q, k, v, *settings):
    return _cuda_forward(q, k, v, settings, with_lse=False)


@_fake(attention_fwd)
def _(q, k, v, *settings):
    s = _checked(q, k, v, settings)
    tiles(q, v, s, backward=False)
    return meta.attention_fwd(q, k, v)


# --- forward with LSE: a backward will come, or the caller wants it ---
@_body(attention_fwd_lse, "CPU")
def _(q, k, v, *settings):
    s = _checked(q, k, v, settings)
    out, lse = meta.attention_fwd_lse(q, k, v)
    for output, value in zip((out, lse), reference.attention_fwd_lse(q, k, v, *formula(q, s)), strict=True):
        output.copy_(value)
    return out, lse


@_body(attention_fwd_lse, "CUDA")
def _(q, k, v, *settings):
    return _cuda_forward(q, k, v, settings, with_lse=True)


@_fake(attention_fwd_lse)
def _(q, k, v, *settings):
    s = _checked(q, k, v, settings)
    tiles(q, v, s, backward=False)
    return meta.attention_fwd_lse(q, k, v)


# --- backward: out and lse may be those of a longer attention, so that a ring can call it block by block ---
@_body(attention_bwd, "CPU")
def _(do, q, k, v, out, lse, dlse, *settings):
    s = _checked_bwd(do, q, k, v, out, lse, dlse, settings)
    dq, dk, dv = meta.attention_bwd(q, k, v)
    for output, value in zip(
        (dq, dk, dv),
        reference.attention_bwd(do, q, k, v, out, lse, dlse, *formula(q, s)),
        strict=True,
    ):
        output.copy_(value)
    return dq, dk, dv


@_body(attention_bwd, "CUDA")
def _cuda_backward(do, q, k, v, out, lse, dlse, *settings):
    s = _checked_bwd(do, q, k, v, out, lse, dlse, settings)
    tile = _backward_tile("attention_bwd", q, v, s)
    gradients = meta.attention_bwd(q, k, v)
    launch = backward_launch()
    call = launch.Call(do, q, k, v, out, lse, dlse, scale_of(q, s), (s.window_left, s.window_right), s.softcap, s.deterministic)
    launch.launch(tile, call, *gradients)
    return gradients


@_fake(attention_bwd)
def _(do, q, k, v, out, lse, dlse, *settings):
    s = _checked_bwd(do, q, k, v, out, lse, dlse, settings)
    if q.device.type == "cuda":
        _backward_tile("attention_bwd", q, v, s)
    return meta.attention_bwd(q, k, v)


# --- the derivative ---
class Attention(torch.autograd.Function):
    """The one definition of the derivative, in the form that torch.func needs. Under torch.compile its `setup_context` and `backward` run
    as registered on the operators, because a traced Function would bypass AOTAutograd's cache; other calls take EagerAttention."""

    @staticmethod
    def forward(q, k, v, *settings):
        return attention_fwd_lse(q, k, v, *settings)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, *ctx.settings = inputs
        ctx.save_for_backward(q, k, v, *output)
        # An lse that nobody used leaves dlse None: no zeros are made, no extra work is launched
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        no_gradient = (None,) * len(ctx.settings)
        if do is None and dlse is None:
            return None, None, None, *no_gradient
        if do is None:
            do = torch.zeros_like(out)
        # With create_graph, as torch.func always has it, the gradient itself meets autograd and functorch: they need a Function
        gradient = AttentionGradient.apply if torch.is_grad_enabled() else functools.partial(run, attention_bwd)
        return *gradient(do, q, k, v, out, lse, dlse, *ctx.settings), *no_gradient

    @staticmethod
    def vmap(info, in_dims, *args):
        return _fold_into_batch(Attention.apply)(info, in_dims, *args)


class EagerAttention(torch.autograd.Function):
    """Attention for calls that no functorch transform sees: a forward with ctx spares a call 30 µs of signature binding."""

    @staticmethod
    def forward(ctx, q, k, v, *settings):
        s = Settings(*settings)
        body = plans.planned(q, k, v, False, s.scale, s.softcap, (s.window_left, s.window_right), s.deterministic, True)
        outputs = body(q, k, v) if body else run(attention_fwd_lse, q, k, v, *settings)
        Attention.setup_context(ctx, (q, k, v, *settings), outputs)
        return outputs

    backward = Attention.backward


class AttentionGradient(torch.autograd.Function):
    """attention_bwd as functorch can see it; it has no derivative of its own."""

    @staticmethod
    def forward(*args):
        return attention_bwd(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("attention_bwd: double backward through attention is not supported")

    @staticmethod
    def vmap(info, in_dims, *args):
        return _fold_into_batch(AttentionGradient.apply)(info, in_dims, *args)


def _setup_without_lse(ctx, inputs, output):
    q, k, v, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v)


def _backward_without_lse(ctx, do):
    """A raw call of attention_fwd, or a graph exported without gradients, is differentiated by running the forward again."""
    q, k, v = ctx.saved_tensors
    out, lse = attention_fwd_lse(q, k, v, *ctx.settings)
    return *attention_bwd(do, q, k, v, out, lse, None, *ctx.settings), *(None,) * len(ctx.settings)


# --- registrations ---
def _fold_into_batch(function):
    """The vmap rule: fold the mapped dimension into the batch, call once, unfold."""

    def rule(info, in_dims, *args):
        def fold(t, dim):
            if not isinstance(t, Tensor):
                return t
            t = t.unsqueeze(0).expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            return t.flatten(0, 1)

        def unfold(t):
            return t.unflatten(0, (info.batch_size, t.shape[0] // info.batch_size))

        out = function(*(fold(t, dim) for t, dim in zip(args, in_dims, strict=True)))
        return (unfold(out), 0) if isinstance(out, Tensor) else (tuple(map(unfold, out)), (0,) * len(out))

    return rule


for _operator, _backward, _setup in (
    (attention_fwd, _backward_without_lse, _setup_without_lse),
    (attention_fwd_lse, Attention.backward, Attention.setup_context),
    (attention_bwd, AttentionGradient.backward, None),
):
    register_autograd(_operator, _backward, setup_context=_setup, lib=LIBRARY)
    register_vmap(_operator, _fold_into_batch(_operator), lib=LIBRARY)
flops.register([torch.ops.gqa_autograd.attention_fwd, torch.ops.gqa_autograd.attention_fwd_lse], [torch.ops.gqa_autograd.attention_bwd])
