"""Packed sequences in eager: closeness, isolation, gradients, and which body runs when.

Transforms of torch.func are in test_varlen_func.py, compile and export in test_varlen_compile.py."""

import dataclasses
import math

import pytest
import torch
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from gqa_autograd import SAVE_OPS, attention_varlen, attention_varlen_with_lse, attention_with_lse, ops_varlen, testing, testing_varlen
from gqa_autograd.testing_varlen import PACKED, PackedCase

F32, F64 = torch.float32, torch.float64
# Sizes are distinct (pitfall 10); one sequence has no query, one no key, one more queries than keys
SMALL = PackedCase((5, 0, 2, 9), (7, 3, 0, 6), 6, 3, 8, causal=True, dtype=F32, D_v=10)
TAILS = dataclasses.replace(SMALL, tail_q=4, tail_kv=2)
TINY = PackedCase((3, 0, 2, 1), (2, 1, 4, 0), 2, 1, 5, causal=True, dtype=F64, tail_q=1, tail_kv=2)
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
SETTINGS = {"scale_none": (F32, -1, 0, None, 0.0, False), "scale_float": (F64, 4, 1, 0.3, 15.0, True)}
FORWARDS = [ops_varlen.attention_varlen_fwd, ops_varlen.attention_varlen_fwd_lse]
SEVERAL = [case for case in PACKED if len(case.lengths_q) > 1 and sum(case.lengths_q)]


def inputs(case=SMALL, requires_grad=True, seed=0):
    q, k, v, do, *offsets = testing_varlen.make(case, seed=seed)
    return *(t.requires_grad_(requires_grad) for t in (q, k, v)), do, *offsets


def without_do(case=SMALL, requires_grad=True):
    q, k, v, _, *offsets = inputs(case, requires_grad)
    return q, k, v, *offsets


def same_bits(a, b):
    assert torch.equal(a, b), f"{(a != b).sum()} of {a.numel()} elements differ"


# --- values ---
@pytest.mark.parametrize("case", PACKED, ids=str)
@pytest.mark.parametrize("with_dlse", [False, True], ids=["", "dlse"])
def test_closeness(case, with_dlse):
    """Each sequence by the closeness rule; tails hold NaN, are left untouched, and their gradients are 0."""
    args = testing_varlen.spoil(case, testing_varlen.make(case))
    dlse = None
    if with_dlse:
        dlse = torch.randn(case.H_q, args[0].shape[0])
        dlse[:, sum(case.lengths_q) :] = math.nan
    with testing.poisoned():
        ours = testing_varlen.ours(case, *args, dlse)
    plain, exact = testing_varlen.plain(case, *args, dlse), testing_varlen.exact(case, *args, dlse)
    testing_varlen.assert_no_worse(case, ours, plain, exact)
    testing_varlen.assert_untouched(case, ours)


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_closeness_beside_nan(case):
    """The forward alone, with one sequence and the tails spoiled: what a kernel without a backward is held to."""
    for spoiled in range(len(case.lengths_q)):
        args = testing_varlen.spoil(case, testing_varlen.make(case), (spoiled,))
        with testing.poisoned():
            ours = testing_varlen.forward(case, *args)
        plain, exact = testing_varlen.plain(case, *args), testing_varlen.exact(case, *args)
        testing_varlen.assert_no_worse(case, ours, plain, exact, names=("out",), without=(spoiled,))
        testing_varlen.assert_untouched(case, ours)


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_same_as_dense(case):
    """Each sequence has the bits that dense attention gives it alone."""
    q, k, v, do, *_ = args = testing_varlen.make(case)
    ours = testing_varlen.ours(case, *args)
    for n, (mine, theirs) in enumerate(case.slices):
        alone = [t[None, s].detach().requires_grad_() for t, s in ((q, mine), (k, theirs), (v, theirs))]
        out, lse = attention_with_lse(*alone, **case.options)
        want = (out, lse, *torch.autograd.grad(out, alone, do[None, mine]))
        for got, dense in zip(testing_varlen.sequence(case, ours, n), want, strict=True):
            same_bits(got, dense[0])


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_nan_stays_in_its_sequence(case):
    """One sequence, and all tails, hold NaN: the others keep their bits, in the gradients too."""
    args = testing_varlen.make(case)
    clean = testing_varlen.ours(case, *args)
    for spoiled in range(len(case.lengths_q)):
        ours = testing_varlen.ours(case, *testing_varlen.spoil(case, args, (spoiled,)))
        for n in set(range(len(case.lengths_q))) - {spoiled}:
            for got, want in zip(testing_varlen.sequence(case, ours, n), testing_varlen.sequence(case, clean, n), strict=True):
                same_bits(got, want)


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_alone_as_in_company(case):
    """Batch invariance: a packing of one sequence and the same sequence among others, forward and backward."""
    q, k, v, do, *_ = args = testing_varlen.make(case)
    ours = testing_varlen.ours(case, *args)
    for n, (mine, theirs) in enumerate(case.slices):
        alone = dataclasses.replace(case, lengths_q=case.lengths_q[n : n + 1], lengths_kv=case.lengths_kv[n : n + 1], tail_q=0, tail_kv=0)
        tensors = [t[s].detach().requires_grad_() for t, s in ((q, mine), (k, theirs), (v, theirs))]
        offsets = (testing_varlen.offsets(lengths) for lengths in (alone.lengths_q, alone.lengths_kv))
        for got, want in zip(testing_varlen.ours(alone, *tensors, do[mine], *offsets), testing_varlen.sequence(case, ours, n), strict=True):
            same_bits(got, want)


def test_queries_without_keys():
    """0 and -inf, whatever a gradient does to them; keys without queries have gradient 0."""
    q, k, v, do, *offsets = inputs(SMALL)
    out, lse = attention_varlen_with_lse(q, k, v, *offsets, causal=True)
    blind = [5, 6, 7, 8, 9]  # sequence 2 has no key; of the 9 queries of the last, the first 3 see none of its 6
    assert not out[blind].any()
    assert torch.equal(lse == -math.inf, torch.zeros(6, 16, dtype=torch.bool).index_fill(1, torch.tensor(blind), True))
    dlse = torch.randn_like(lse).index_fill(1, torch.tensor(blind), math.nan)
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (do, dlse))
    assert not dq[blind].any()
    assert not dk[7:10].any()
    assert not dv[7:10].any()
    assert all(t.isfinite().all() for t in (dq, dk, dv))


@pytest.mark.parametrize("size", ["H_q", "D_v", "T_q", "T_kv", "all"])
def test_empty(size):
    change = {"T_q": {"lengths_q": (0, 0)}, "T_kv": {"lengths_kv": (0, 0)}, "all": {"lengths_q": (), "lengths_kv": ()}}
    case = dataclasses.replace(PackedCase((3, 5), (4, 6), 6, 3, 8, dtype=F32, D_v=9), **change.get(size, {size: 0}))
    q, k, v, do, *offsets = inputs(case)
    with testing.poisoned():
        out, lse = attention_varlen_with_lse(q, k, v, *offsets)
        grads = torch.autograd.grad(out, (q, k, v), do)
    assert out.shape == do.shape
    assert lse.shape == (case.H_q, q.shape[0])
    assert not out.any()
    for t, grad in zip((q, k, v), grads, strict=True):
        assert grad.shape == t.shape
        assert not grad.any()


# --- registration ---
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("layout", ["thd", "htd"])
@pytest.mark.parametrize("op", FORWARDS, ids=str)
def test_opcheck_forward(op, layout, requires_grad, settings):
    dtype, *settings = SETTINGS[settings]
    opcheck(op, (*without_do(dataclasses.replace(SMALL, layout=layout, dtype=dtype), requires_grad), *settings), test_utils=CHECKS)


@pytest.mark.parametrize("op", FORWARDS, ids=str)
def test_opcheck_forward_bfloat16(op):
    """The lse of 16-bit inputs is float32, in the fake too."""
    opcheck(op, without_do(dataclasses.replace(SMALL, dtype=torch.bfloat16), False), test_utils=CHECKS)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("with_dlse", [True, False])
@pytest.mark.parametrize("layout", ["thd", "htd"])
def test_opcheck_backward(layout, with_dlse, requires_grad, settings):
    dtype, *settings = SETTINGS[settings]
    q, k, v, do, *offsets = inputs(dataclasses.replace(SMALL, layout=layout, dtype=dtype), False)
    out, lse = ops_varlen.attention_varlen_fwd_lse(q, k, v, *offsets, *settings)
    for t in (q, k, v):
        t.requires_grad_(requires_grad)
    args = (do, q, k, v, out, lse, torch.randn_like(lse) if with_dlse else None, *offsets, *settings)
    # The last two differentiate the operator where an input requires a gradient, and that is refused
    opcheck(ops_varlen.attention_varlen_bwd, args, test_utils=CHECKS[:3] if requires_grad else CHECKS)


@pytest.mark.parametrize("name", ["attention_varlen_fwd", "attention_varlen_fwd_lse", "attention_varlen_bwd"])
def test_schema_order_and_purity(name):
    """Tensors, then ints, then the rest; the settings are those of dense attention, in their order."""
    schema = getattr(ops_varlen, name)._schema
    rank = {"Tensor": 0, "Optional[Tensor]": 0, "int": 1}
    ranks = [rank.get(str(a.type), 2) for a in schema.arguments]
    assert ranks == sorted(ranks)
    assert not schema.is_mutable
    assert not any(a.kwarg_only for a in schema.arguments)
    dense = getattr(torch.ops.gqa_autograd, name.replace("_varlen", "")).default._schema
    assert [(a.name, a.default_value) for a in schema.arguments[-5:]] == [(a.name, a.default_value) for a in dense.arguments[-5:]]


@pytest.mark.parametrize("case", [TAILS, dataclasses.replace(TAILS, layout="htd"), PackedCase((1,), (1,), 3, 3, 4, dtype=F32)], ids=str)
def test_outputs_alias_nothing(case):
    q, k, v, do, *offsets = inputs(case, False)
    out, lse = ops_varlen.attention_varlen_fwd_lse(q, k, v, *offsets)
    results = [out, lse, ops_varlen.attention_varlen_fwd(q, k, v, *offsets)]
    results += ops_varlen.attention_varlen_bwd(do, q, k, v, out, lse, None, *offsets)
    for n, t in enumerate(results):
        assert t.is_contiguous()
        for other in (q, k, v, do, *results[:n]):
            assert t.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


def test_inputs_are_not_written():
    args = without_do(TAILS, False)
    before = [t.clone() for t in args]
    attention_varlen_with_lse(*args)
    for a, b in zip(args, before, strict=True):
        same_bits(a, b)


# --- gradients ---
GRADCHECK = {
    "causal": TINY,
    "full": dataclasses.replace(TINY, causal=False),
    "window": dataclasses.replace(TINY, causal=False, window=(1, 2)),
    "softcap": dataclasses.replace(TINY, softcap=1.3),
    "negative_scale": dataclasses.replace(TINY, scale=-0.7),
    "value_size": dataclasses.replace(TINY, D_v=6),
    "permuted": dataclasses.replace(TINY, layout="htd"),
}


@pytest.mark.parametrize("case", GRADCHECK.values(), ids=GRADCHECK.keys())
def test_gradcheck(case):
    """out, lse and both, over all tokens of q, k and v: those of the tails have gradient 0."""
    q, k, v, *offsets = without_do(case)
    T_q = sum(case.lengths_q)

    def call(*a):
        out, lse = attention_varlen_with_lse(*a, *offsets, **case.options)
        return out[:T_q], lse[:, :T_q]

    seen = torch.isfinite(call(q, k, v)[1])
    assert torch.autograd.gradcheck(lambda *a: attention_varlen(*a, *offsets, **case.options)[:T_q], (q, k, v))
    assert torch.autograd.gradcheck(lambda *a: call(*a)[1][seen], (q, k, v))
    assert torch.autograd.gradcheck(lambda *a: call(*a)[0].sum((1, 2)) * call(*a)[1].masked_fill(~seen, 0).sum(0), (q, k, v))


@pytest.mark.parametrize("op", FORWARDS, ids=str)
def test_gradcheck_raw_operator(op):
    """A raw call of attention_varlen_fwd is differentiated too, by running the forward again in the backward."""
    # Every query sees a key: lse = -inf has no finite difference
    q, k, v, *offsets = without_do(dataclasses.replace(TINY, lengths_q=(2, 0, 3), lengths_kv=(3, 1, 3), tail_q=0))
    assert torch.autograd.gradcheck(lambda *a: op(*a, *offsets, 1, 0, 0.4, 2.0), (q, k, v))
    name = op._schema.name.split("::")[1]
    with testing.recorded() as bodies:
        out = op(q, k, v, *offsets)
        (out if name == "attention_varlen_fwd" else out[0]).sum().backward()
    assert bodies == [name, *["attention_varlen_fwd_lse"] * (name == "attention_varlen_fwd"), "attention_varlen_bwd"]


def test_only_lse_is_used():
    """lse carries its own gradient, also when out has none."""
    case = dataclasses.replace(SMALL, causal=False, lengths_kv=(7, 3, 1, 6))
    q, k, v, *offsets = without_do(case)
    attention_varlen_with_lse(q, k, v, *offsets)[1].sum().backward()
    want = torch.autograd.grad(
        sum(attention_with_lse(q[None, a], k[None, b], v[None, b])[1].sum() for a, b in case.slices), (q, k, v), allow_unused=True
    )
    torch.testing.assert_close((q.grad, k.grad), want[:2])
    assert not v.grad.any()


@pytest.mark.parametrize("kind", ["sum", "expanded", "permuted", "strided"])
def test_gradient_of_out_in_any_layout(kind):
    q, k, v, do, *offsets = inputs()
    do = {
        "sum": lambda: torch.ones(()).expand(do.shape),
        "expanded": lambda: do[:, :, :1].expand(do.shape),
        "permuted": lambda: do.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "strided": lambda: do.repeat_interleave(2, -1)[..., ::2],
    }[kind]()
    assert not do.is_contiguous()
    with testing.poisoned():
        want = torch.autograd.grad(attention_varlen(q, k, v, *offsets), (q, k, v), do.contiguous())
        got = torch.autograd.grad(attention_varlen(q, k, v, *offsets), (q, k, v), do)
    for a, b in zip(got, want, strict=True):
        same_bits(a, b)


def test_double_backward_is_refused():
    q, k, v, *offsets = without_do()
    (dq,) = torch.autograd.grad(attention_varlen(q, k, v, *offsets).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_varlen_bwd: double backward through attention is not supported"):
        dq.sum().backward()


@pytest.mark.parametrize("which", [0, 1, 2])
def test_forward_mode_is_refused(which):
    """Torch would give zero tangents for a custom operator, in silence."""
    args = list(without_do(requires_grad=False))
    message = f"attention_varlen: forward-mode AD .* got a tangent for {'qkv'[which]}"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(lambda t: attention_varlen(*args[:which], t, *args[which + 1 :]), (args[which],), (args[which],))


# --- which body runs ---
@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("mode", ["train", "only_q", "only_k", "only_v", "no_grad", "inference", "frozen"])
def test_lse_only_when_needed(mode, with_lse):
    args = without_do(requires_grad=mode in ("train", "no_grad", "inference"))
    if mode.startswith("only"):
        args["qkv".index(mode[-1])].requires_grad_()
    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(mode, torch.enable_grad)
    with context(), testing.recorded() as bodies, testing.poisoned():
        result = attention_varlen_with_lse(*args)[0] if with_lse else attention_varlen(*args)
    trained = mode == "train" or mode.startswith("only")
    assert result.requires_grad == trained
    assert bodies == ["attention_varlen_fwd_lse" if trained or with_lse else "attention_varlen_fwd"]


def test_both_forwards_agree():
    for case in PACKED:
        args = without_do(case, False)
        with testing.poisoned():
            out, with_lse = attention_varlen(*args, **case.options), attention_varlen_with_lse(*args, **case.options)[0]
        torch.testing.assert_close(out, with_lse, rtol=0, atol=0, equal_nan=True)


def test_unused_lse_costs_nothing(monkeypatch):
    seen, original = [], ops_varlen.reference.attention_varlen_bwd
    monkeypatch.setattr(ops_varlen.reference, "attention_varlen_bwd", lambda *a: seen.append(a[6]) or original(*a))
    args = without_do()
    attention_varlen(*args).sum().backward()
    assert seen == [None]
    attention_varlen_with_lse(*args)[1].sum().backward()
    assert torch.equal(seen[1], torch.ones_like(seen[1]))


@pytest.mark.parametrize("selective", [False, True])
def test_checkpoint(selective):
    def block(q, k, v, *offsets):
        return attention_varlen(q * 1, k * 1, v * 1, *offsets, causal=True)

    options = {"context_fn": lambda: create_selective_checkpoint_contexts(list(SAVE_OPS))} if selective else {}
    a, b = without_do(), without_do()
    with testing.recorded() as bodies:
        checkpoint(block, *a, use_reentrant=False, **options).sum().backward()
    assert bodies == ["attention_varlen_fwd_lse"] * (1 if selective else 2) + ["attention_varlen_bwd"]
    block(*b).sum().backward()
    for x, y in zip(a[:3], b[:3], strict=True):
        same_bits(x.grad, y.grad)


def test_backward_inherits_the_settings(monkeypatch):
    seen, original = [], ops_varlen.reference.attention_varlen_bwd
    monkeypatch.setattr(ops_varlen.reference, "attention_varlen_bwd", lambda *a: seen.append(a[-4:]) or original(*a))
    attention_varlen(*without_do(), window=(4, 1), scale=0.3, softcap=7.0).sum().backward()
    assert seen == [(4, 1, 0.3, 7.0)]


# --- arguments ---
@pytest.mark.parametrize("hint", [17, 0, torch.tensor(9), torch.tensor([3], dtype=torch.int32), None], ids=str)
@pytest.mark.parametrize("side", ["max_seqlen_q", "max_seqlen_k"])
def test_max_seqlen_changes_nothing(side, hint):
    args = without_do(requires_grad=False)
    same_bits(attention_varlen(*args, **{side: hint}), attention_varlen(*args))
    for a, b in zip(attention_varlen_with_lse(*args, **{side: hint}), attention_varlen_with_lse(*args), strict=True):
        same_bits(a, b)


@pytest.mark.parametrize("with_lse", [False, True])
def test_autocast(with_lse):
    q, k, v, *offsets = without_do()
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attention_varlen_with_lse(q, k, v, *offsets) if with_lse else (attention_varlen(q, k, v, *offsets), None)
    assert out.dtype is torch.bfloat16
    assert lse is None or lse.dtype is F32
    out.sum().backward()
    assert q.grad.dtype is F32
    same_bits(out, attention_varlen(q.bfloat16(), k.bfloat16(), v.bfloat16(), *offsets))


def test_offsets_may_be_strided():
    q, k, v, *offsets = without_do(requires_grad=False)
    strided = (t.repeat_interleave(2)[::2] for t in offsets)
    same_bits(attention_varlen(q, k, v, *strided), attention_varlen(q, k, v, *offsets))
