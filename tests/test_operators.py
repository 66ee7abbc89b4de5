"""The operators in eager: registration, gradients, transforms, checkpointing, and which body runs when."""

import dataclasses
import math

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gqa_autograd import SAVE_OPS, attention, attention_with_lse, ops, testing
from gqa_autograd.testing import Case

# All sizes of a case are distinct: torch.compile would take equal ones for one symbol (pitfall 10)
SMALL = Case(2, 5, 7, 6, 3, 8, causal=True, dtype=torch.float32)
TINY = Case(1, 3, 4, 2, 1, 5, causal=True, dtype=torch.float64)
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
SETTINGS = {"scale_none": (torch.float32, -1, 0, None, 0.0, False), "scale_float": (torch.float64, 4, 1, 0.3, 15.0, True)}
FORWARDS = [ops.attention_fwd, ops.attention_fwd_lse]


def inputs(case, requires_grad=True, seed=0):
    q, k, v, do = testing.make(case, seed=seed)
    return *(t.requires_grad_(requires_grad) for t in (q, k, v)), do


def overlap(a, b):
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


# --- registration ---
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("op", FORWARDS, ids=str)
def test_opcheck_forward(op, layout, requires_grad, settings):
    """Pitfalls 3 and 6: a wrong lse dtype in the fake, an operator without an Autograd kernel."""
    dtype, *settings = SETTINGS[settings]
    q, k, v, _ = inputs(dataclasses.replace(SMALL, layout=layout, dtype=dtype), requires_grad)
    opcheck(op, (q, k, v, *settings), test_utils=CHECKS)


@pytest.mark.parametrize("op", FORWARDS, ids=str)
def test_opcheck_forward_bfloat16(op):
    """The lse of 16-bit inputs is float32, in the fake too; gradients in bfloat16 are compared elsewhere."""
    q, k, v, _ = inputs(dataclasses.replace(SMALL, dtype=torch.bfloat16), False)
    opcheck(op, (q, k, v, *SETTINGS["scale_none"][1:]), test_utils=CHECKS)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("with_dlse", [True, False])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_opcheck_backward(layout, with_dlse, requires_grad, settings):
    dtype, *settings = SETTINGS[settings]
    q, k, v, do = inputs(dataclasses.replace(SMALL, layout=layout, dtype=dtype), False)
    out, lse = ops.attention_fwd_lse(q, k, v, *settings)
    for t in (q, k, v):
        t.requires_grad_(requires_grad)
    args = (do, q, k, v, out, lse, torch.randn_like(lse) if with_dlse else None, *settings)
    # The last two differentiate the operator where an input requires a gradient, and that is refused
    opcheck(ops.attention_bwd, args, test_utils=CHECKS[:3] if requires_grad else CHECKS)


@pytest.mark.parametrize("name", ["attention_fwd", "attention_fwd_lse", "attention_bwd"])
def test_schema_order_and_purity(name):
    """Tensors, then ints, then the rest: DTensor's cache key starts at the first int. Nothing is mutated (pitfall 12) or keyword-only."""
    schema = getattr(ops, name)._schema
    kinds = [str(a.type) for a in schema.arguments]
    rank = {"Tensor": 0, "Optional[Tensor]": 0, "int": 1}
    ranks = [rank.get(kind, 2) for kind in kinds]
    assert ranks == sorted(ranks)
    assert not schema.is_mutable
    assert not any(a.kwarg_only for a in schema.arguments)


@pytest.mark.parametrize("case", [SMALL, dataclasses.replace(SMALL, layout="bhsd"), Case(1, 2, 1, 3, 3, 4, dtype=torch.float32)], ids=str)
def test_outputs_alias_nothing(case):
    """Pitfall 7; contiguous whatever the strides of q. One key and G = 1 are where a definition could hand back v or do itself."""
    q, k, v, do = inputs(case, False)
    out, lse = ops.attention_fwd_lse(q, k, v)
    results = [out, lse, ops.attention_fwd(q, k, v), *ops.attention_bwd(do, q, k, v, out, lse, None)]
    for n, t in enumerate(results):
        assert t.is_contiguous()
        assert not any(overlap(t, other) for other in (q, k, v, do, *results[:n]))


# --- gradients ---
GRADCHECK = {
    "causal": TINY,
    "full": dataclasses.replace(TINY, causal=False),
    "blind_rows": dataclasses.replace(TINY, S_q=4, S_kv=2),
    "blind_rows_by_window": dataclasses.replace(TINY, S_q=4, S_kv=2, causal=False, window=(0, 0)),
    "window": dataclasses.replace(TINY, S_q=5, S_kv=6, causal=False, window=(1, 2)),
    "softcap": dataclasses.replace(TINY, softcap=1.3),
    "negative_scale": dataclasses.replace(TINY, scale=-0.7),
    "zero_scale": dataclasses.replace(TINY, scale=0.0),
    "value_size": dataclasses.replace(TINY, D_v=6),
    "permuted": dataclasses.replace(TINY, B=2, layout="bhsd"),
}


@pytest.mark.parametrize("case", GRADCHECK.values(), ids=GRADCHECK.keys())
def test_gradcheck(case):
    q, k, v, _ = inputs(case)
    assert torch.autograd.gradcheck(lambda *a: attention(*a, **case.options), (q, k, v))
    seen = torch.isfinite(attention_with_lse(q, k, v, **case.options)[1])
    assert torch.autograd.gradcheck(lambda *a: attention_with_lse(*a, **case.options)[1][seen], (q, k, v))

    def both(*a):
        out, lse = attention_with_lse(*a, **case.options)
        return out.sum((1, 3)) * lse.masked_fill(~seen, 0).sum(2)

    assert torch.autograd.gradcheck(both, (q, k, v))


@pytest.mark.parametrize("name", ["attention_fwd", "attention_fwd_lse"])
def test_gradcheck_raw_operator(name):
    """A raw call of attention_fwd is differentiated too, by running the forward again in the backward."""
    q, k, v, _ = inputs(TINY)
    assert torch.autograd.gradcheck(lambda *a: getattr(ops, name)(*a, 1, 0, 0.4, 2.0), (q, k, v))
    with testing.recorded() as bodies:
        out = getattr(ops, name)(q, k, v)
        (out if name == "attention_fwd" else out[0]).sum().backward()
    assert bodies == [name, *["attention_fwd_lse"] * (name == "attention_fwd"), "attention_bwd"]


@pytest.mark.parametrize("spoil", [math.nan, math.inf, 3.0])
def test_gradient_of_a_blind_lse_is_ignored(spoil):
    """Nothing flows through lse = -inf, whatever arrives there."""
    case = dataclasses.replace(SMALL, S_q=9)
    q, k, v, do = inputs(case, False)
    out, lse = ops.attention_fwd_lse(q, k, v, -1, 0)
    blind = lse == -math.inf
    assert blind.any()
    dlse = torch.randn_like(lse)
    got = ops.attention_bwd(do, q, k, v, out, lse, dlse.masked_fill(blind, spoil), -1, 0)
    want = ops.attention_bwd(do, q, k, v, out, lse, dlse.masked_fill(blind, 0), -1, 0)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    assert not got[0][:, :2].any()


def test_external_lse_of_minus_infinity_silences_its_row():
    """In a ring lse is that of the whole: where it is -inf the row has no gradient, even if no mask hides this block."""
    q, k, v, do = inputs(SMALL, False)
    out, lse = ops.attention_fwd_lse(q, k, v)
    lse[:, :, 1] = -math.inf
    kept = [0, 2, 3, 4]
    dq, dk, dv = ops.attention_bwd(do, q, k, v, out, lse, None)
    others = ops.attention_bwd(*(t[:, kept] for t in (do, q)), k, v, out[:, kept], lse[:, :, kept], None)
    assert not dq[:, 1].any()
    for a, b in zip((dq[:, kept], dk, dv), others, strict=True):
        torch.testing.assert_close(a, b)


def test_only_lse_is_used():
    """FA#1137, FA#889: lse carries its own gradient, also when out has none."""
    q, k, v, _ = inputs(TINY)
    attention_with_lse(q, k, v)[1].sum().backward()
    p = torch.softmax(torch.einsum("bihd,bjd->bhij", q, k[:, :, 0]) * TINY.D**-0.5, -1)
    torch.testing.assert_close(q.grad, torch.einsum("bhij,bjd->bihd", p, k[:, :, 0]) * TINY.D**-0.5)
    assert not v.grad.any()


@pytest.mark.parametrize("kind", ["sum", "expanded", "permuted", "strided"])
def test_gradient_of_out_in_any_layout(kind):
    """Pitfall 1, FA#355, fla#1138: do with strides 0 from .sum().backward(), or permuted."""
    q, k, v, do = inputs(SMALL)
    do = {
        "sum": lambda: torch.ones(()).expand(do.shape),
        "expanded": lambda: do[:, :1, :, :1].expand(do.shape),
        "permuted": lambda: do.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "strided": lambda: do.repeat_interleave(2, -1)[..., ::2],
    }[kind]()
    assert not do.is_contiguous()
    with testing.poisoned():
        want = torch.autograd.grad(attention(q, k, v, causal=True), (q, k, v), do.contiguous())
        got = torch.autograd.grad(attention(q, k, v, causal=True), (q, k, v), do)
        if kind == "sum":
            got = torch.autograd.grad(attention(q, k, v, causal=True).sum(), (q, k, v))
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("call", [attention, ops.attention_fwd, lambda *a: ops.attention_fwd_lse(*a)[0]], ids=["public", "fwd", "fwd_lse"])
def test_double_backward_is_refused(call):
    q, k, v, _ = inputs(SMALL)
    (dq,) = torch.autograd.grad(call(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_bwd: double backward through attention is not supported"):
        dq.sum().backward()


# --- forward-mode AD ---
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_forward_mode_is_refused(which, requires_grad):
    """Pitfall 8: torch would give zero tangents for a custom operator, in silence."""
    args = list(inputs(SMALL, requires_grad)[:3])
    message = f"attention: forward-mode AD .* got a tangent for {'qkv'[which]}"

    def of(t):
        return attention(*args[:which], t, *args[which + 1 :])

    t = args[which].detach()
    for call in (of, torch.vmap(of, in_dims=0)):
        x = t if call is of else t.expand(2, *t.shape)
        with pytest.raises(NotImplementedError, match=message):
            torch.func.jvp(call, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        of(forward_ad.make_dual(t, t))
    with pytest.raises(NotImplementedError):
        torch.func.hessian(lambda t: of(t).sum())(t)


def test_forward_mode_beside_attention():
    """A tangent that doesn't reach the arguments is nobody's mistake."""
    q, k, v, do = inputs(SMALL, False)
    _, tangent = torch.func.jvp(lambda x: attention(q, k, v) * x, (do,), (do,))
    torch.testing.assert_close(tangent, attention(q, k, v) * do)


# --- which body runs ---
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("mode", ["train", "only_q", "only_k", "only_v", "no_grad", "inference", "frozen"])
def test_lse_only_when_needed(mode, with_lse):
    args = inputs(SMALL, mode in ("train", "no_grad", "inference"))[:3]
    if mode.startswith("only"):
        args["qkv".index(mode[-1])].requires_grad_()
    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, torch.enable_grad)
    with context(), testing.recorded() as bodies, testing.poisoned():
        result = attention_with_lse(*args)[0] if with_lse else attention(*args)
    trained = mode == "train" or mode.startswith("only")
    assert result.requires_grad == trained
    assert bodies == ["attention_fwd_lse" if trained or with_lse else "attention_fwd"]


def test_unused_lse_costs_nothing(monkeypatch):
    """An lse that nobody used reaches the backward as None, not as zeros; one that was used arrives."""
    seen, original = [], ops.reference.attention_bwd
    monkeypatch.setattr(ops.reference, "attention_bwd", lambda *a: seen.append(a[6]) or original(*a))
    q, k, v, _ = inputs(SMALL)
    attention(q, k, v).sum().backward()
    assert seen == [None]
    attention_with_lse(q, k, v)[1].sum().backward()
    assert torch.equal(seen[1], torch.ones_like(seen[1]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant):
    def block(q, k, v):
        return attention(q * 1, k * 1, v * 1, causal=True)

    a, b = inputs(SMALL)[:3], inputs(SMALL)[:3]
    with testing.recorded() as bodies:
        checkpoint(block, *a, use_reentrant=reentrant).sum().backward()
    # The reentrant kind runs its first pass under no_grad, so that pass writes no LSE
    assert bodies == ["attention_fwd" if reentrant else "attention_fwd_lse", "attention_fwd_lse", "attention_bwd"]
    block(*b).sum().backward()
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.grad, y.grad)


def test_selective_checkpoint_keeps_the_forward():
    def block(q, k, v):
        return checkpoint(
            lambda *a: attention(*(t * 1 for t in a), causal=True),
            *(q, k, v),
            use_reentrant=False,
            context_fn=lambda: create_selective_checkpoint_contexts(list(SAVE_OPS)),
        )

    with testing.recorded() as bodies:
        block(*inputs(SMALL)[:3]).sum().backward()
    assert bodies == ["attention_fwd_lse", "attention_bwd"]


# --- torch.func ---
def test_func_grad_and_vjp():
    q, k, v, do = inputs(SMALL)
    want = torch.autograd.grad(attention(q, k, v, causal=True), (q, k, v), do)
    q, k, v = (t.detach() for t in (q, k, v))
    got = torch.func.grad(lambda *a: (attention(*a, causal=True) * do).sum(), argnums=(0, 1, 2))(q, k, v)
    (out, lse), pull = torch.func.vjp(lambda *a: attention_with_lse(*a, causal=True), q, k, v)
    pulled = pull((do, torch.zeros_like(lse)))
    for a, b, c in zip(got, pulled, want, strict=True):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)
    assert out.shape == do.shape


@pytest.mark.parametrize("in_dims", [(0, None, None), (0, 0, 0), (1, None, 2), (None, 3, 4)])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_vmap(in_dims, requires_grad):
    """One call for the whole map. A mapped tensor hides that it requires a gradient, so the forward may run again: slower, never wrong."""
    args = [t.detach() for t in inputs(SMALL)[:3]]
    mapped = [t if d is None else torch.stack([t, 2 * t, -t], d) for t, d in zip(args, in_dims, strict=True)]
    for t in mapped:
        t.requires_grad_(requires_grad)
    with testing.recorded() as bodies:
        out = torch.vmap(lambda *a: attention(*a, causal=True), in_dims)(*mapped)
    assert len(bodies) == 1, "the mapped dimension belongs in the batch"
    each = [[t if d is None else t.select(d, n) for t, d in zip(mapped, in_dims, strict=True)] for n in range(3)]
    want = torch.stack([attention(*a, causal=True) for a in each])
    torch.testing.assert_close(out, want)
    if requires_grad:
        for a, b in zip(*(torch.autograd.grad(o.square().sum(), mapped) for o in (out, want)), strict=True):
            torch.testing.assert_close(a, b)


def test_vmap_of_grad_and_nested_vmap():
    q, k, v, _ = inputs(SMALL, False)
    qs = torch.stack([q, 2 * q, -q])
    dq = torch.vmap(torch.func.grad(lambda q: attention(q, k, v).square().sum()))(qs)
    for n in range(3):
        torch.testing.assert_close(dq[n], torch.func.grad(lambda q: attention(q, k, v).square().sum())(qs[n]))
    ks = torch.stack([k, -k])
    grid = torch.vmap(lambda q: torch.vmap(lambda k: attention_with_lse(q, k, v)[1])(ks))(qs)
    torch.testing.assert_close(grid[2, 1], attention_with_lse(qs[2], ks[1], v)[1])


def test_vmap_of_the_raw_backward():
    q, k, v, do = inputs(SMALL, False)
    out, lse = ops.attention_fwd_lse(q, k, v)
    dos = torch.stack([do, 3 * do], 2)
    got = torch.vmap(lambda do: ops.attention_bwd(do, q, k, v, out, lse, None), 2)(dos)
    for a, b in zip(got, ops.attention_bwd(3 * do, q, k, v, out, lse, None), strict=True):
        torch.testing.assert_close(a[1], b)


# --- switches ---
@pytest.mark.parametrize("with_lse", [False, True])
def test_autocast(with_lse):
    """Pitfall 9: the inputs are cast, the lse and the gradients of float32 leaves stay float32, float64 is left alone."""
    q, k, v, _ = inputs(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attention_with_lse(q, k, v) if with_lse else (attention(q, k, v), None)
        assert attention(q.double(), k.double(), v.double()).dtype is torch.float64
    assert out.dtype is torch.bfloat16
    assert lse is None or lse.dtype is torch.float32
    out.sum().backward()
    assert q.grad.dtype is torch.float32
    assert torch.equal(out, attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))


class Arguments(torch.utils._python_dispatch.TorchDispatchMode):
    """Every call of ours that reaches the dispatcher, with its arguments by name."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gqa_autograd":
            names = [a.name for a in func._schema.arguments]
            defaults = {a.name: a.default_value for a in func._schema.arguments}
            self.calls.append({**defaults, **dict(zip(names, args, strict=False)), **(kwargs or {})})
        return func(*args, **(kwargs or {}))

    def __init__(self):
        super().__init__()
        self.calls = []


@pytest.mark.parametrize("requires_grad", [True, False])
def test_deterministic_follows_the_global_switch(requires_grad):
    q, k, v, _ = inputs(SMALL, requires_grad)
    with Arguments() as mode:
        attention(q, k, v)
        torch.use_deterministic_algorithms(True, warn_only=True)
        attention(q, k, v)
        torch.use_deterministic_algorithms(True)
        attention(q, k, v)
        attention(q, k, v, deterministic=False)
        torch.use_deterministic_algorithms(False)
        attention(q, k, v, deterministic=True)
    assert [call["deterministic"] for call in mode.calls] == [False, False, True, False, True]


def test_backward_inherits_the_settings():
    q, k, v, _ = inputs(SMALL)
    with Arguments() as mode:
        attention(q, k, v, window=(4, 1), scale=0.3, softcap=7.0, deterministic=True).sum().backward()
    for call in mode.calls:
        got = [call[name] for name in ("window_left", "window_right", "scale", "softcap", "deterministic")]
        assert got == [4, 1, 0.3, 7.0, True]
    assert len(mode.calls) == 2
