"""The definition against brute force, the CPU bodies by the closeness rule, merging and rings, and the measures of testing.py itself."""

import dataclasses
import itertools
import math

import pytest
import torch

from gqa_autograd import attention, attention_with_lse, merge_states, ops, testing
from gqa_autograd.reference import attention as reference
from gqa_autograd.testing import DENSE, Case

F64 = torch.float64
RESULTS = ("out", "dq", "dk", "dv")


def close(case, implementation, *args):
    """The closeness rule for everything that an implementation returns."""
    exact, plain = testing.exact(case, *args), testing.plain(case, *args)
    got = implementation(case, *args)
    for name in RESULTS:
        testing.assert_no_worse(getattr(got, name), getattr(plain, name), getattr(exact, name), name, softcap=case.softcap > 0)
    testing.assert_lse(got.lse, exact.lse)


# --- the definition ---
def brute_force(q, k, v, left, right, scale, softcap):
    """The docstring of reference/attention.py, one query and one key at a time."""
    (B, S_q, H_q, _), (S_kv, H_kv) = q.shape, k.shape[1:3]
    out, lse = torch.zeros(B, S_q, H_q, v.shape[3], dtype=F64), torch.full((B, H_q, S_q), -math.inf, dtype=F64)
    for b, i, h in ((b, i, h) for b in range(B) for i in range(S_q) for h in range(H_q)):
        at, group = i + S_kv - S_q, h // (H_q // H_kv)
        seen = [j for j in range(S_kv) if (left < 0 or j >= at - left) and (right < 0 or j <= at + right)]
        z = [scale * float(q[b, i, h] @ k[b, j, group]) for j in seen]
        z = [softcap * math.tanh(x / softcap) for x in z] if softcap else z
        if seen:
            lse[b, h, i] = math.log(sum(math.exp(x) for x in z))
            out[b, i, h] = sum(math.exp(x - lse[b, h, i]) * v[b, j, group] for x, j in zip(z, seen, strict=True))
    return out, lse


TINY = Case(2, 5, 7, 6, 3, 4, dtype=F64, D_v=8)
DEFINITION = [
    TINY,
    *(dataclasses.replace(TINY, causal=True, S_q=S_q, S_kv=S_kv) for S_q, S_kv in ((5, 7), (7, 5), (5, 5), (1, 9), (9, 1))),
    *(dataclasses.replace(TINY, window=window) for window in ((0, 0), (2, 1), (-1, 2), (3, -1), (40, 0))),
    dataclasses.replace(TINY, causal=True, window=(1, 3), S_q=9),
    *(dataclasses.replace(TINY, causal=True, scale=scale) for scale in (-0.7, 0.0, 3.0)),
    dataclasses.replace(TINY, causal=True, softcap=0.8, layout="bhsd"),
    dataclasses.replace(TINY, H_q=8, H_kv=1, S_q=3, S_kv=3, layout="fused"),
]


@pytest.mark.parametrize("case", DEFINITION, ids=str)
def test_definition(case):
    """FA#443, FA#1778 (S_q below and above S_kv) among them: out and lse by brute force, gradients by autograd, all in float64."""
    q, k, v, do = testing.make(case)
    out, lse = reference.attention_fwd_lse(q, k, v, *case.formula)
    want_out, want_lse = brute_force(q.detach(), k.detach(), v.detach(), *case.formula)
    torch.testing.assert_close(out.detach(), want_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse.detach(), want_lse, rtol=1e-12, atol=1e-12)
    dlse = torch.randn_like(lse).detach()
    exact, plain = testing.exact(case, q, k, v, do, dlse), testing.plain(case, q, k, v, do, dlse)
    for name in ("lse", *RESULTS):
        torch.testing.assert_close(getattr(exact, name), getattr(plain, name), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_cpu_bodies(case):
    """16-bit inputs, no worse than plain PyTorch. Outputs start as NaN (tilelang#2461, FA#1936): every element is written."""
    with testing.poisoned():
        close(case, testing.ours, *testing.make(case))


@pytest.mark.parametrize("case", [DENSE[4], DENSE[9], DENSE[15], DENSE[19], DENSE[20]], ids=str)
def test_cpu_bodies_float32_and_lse_gradient(case):
    case = dataclasses.replace(case, dtype=torch.float32, D_v=48)
    args = testing.make(case)
    close(case, testing.ours, *args, torch.randn(case.B, case.H_q, case.S_q))


def test_case_matrix():
    """The cases are what their comment promises."""
    assert len({str(case) for case in DENSE}) == len(DENSE)
    assert {case.H_q // case.H_kv for case in DENSE} >= {1, 3, 4, 8}
    assert {case.D for case in DENSE} >= {64, 128, 256}
    assert {case.dtype for case in DENSE} == {torch.float16, torch.bfloat16}
    assert {case.layout for case in DENSE} == {"bshd", "bhsd", "fused"}
    assert any(case.causal and case.S_q > case.S_kv > 0 for case in DENSE)
    assert all(any(getattr(case, size) == n for case in DENSE) for size in ("S_q", "S_kv") for n in (0, 1))


# --- numbers that hurt ---
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_extreme_logits(causal, dtype):
    """pytorch#196678: logits near -120, lse below -88.7, S % 128 == 64; cuDNN gives NaN in dq there."""
    case = Case(1, 64, 192, 4, 2, 128, causal=causal, dtype=dtype, scale=1.0)
    q, k, v, do = testing.make(case)
    with torch.no_grad():
        q.mul_(0.02).add_(0.97)
        k.mul_(0.02).sub_(0.97)
    with testing.poisoned():
        close(case, testing.ours, q, k, v, do)
    lse = testing.exact(case, q, k, v, do).lse
    assert lse.max() < -100
    assert lse.min() > -130


@pytest.mark.parametrize("factor", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_ones_in_v(dtype, factor):
    """FA#2151, FA#2721: the weights of a query sum to 1, so v = 1 gives 1, to one rounding of the sum; 0 where no key is seen."""
    case = Case(2, 35, 29, 6, 2, 16, causal=True, dtype=dtype)
    q, k, v, _ = testing.make(case)
    out, lse = attention_with_lse(q * factor, k, torch.ones_like(v), causal=True)
    want = torch.isfinite(lse).transpose(1, 2).unsqueeze(3).expand_as(out).to(F64)
    # The sum of 29 weights is taken in float32 (float64), then rounded to the dtype of v: 16-bit types give exactly 1
    slack = 0.0 if out.element_size() == 2 else 29 * torch.finfo(dtype).eps * max(1.0, lse[lse.isfinite()].abs().max().item())
    assert (out.double() - want).abs().max() <= slack


@pytest.mark.parametrize("size", ["B", "S_q", "S_kv", "H_q", "D_v"])
@pytest.mark.parametrize("compiled", [False, True])
def test_empty(size, compiled):
    """FA#2562, tilelang#1697, pitfall 7: a size of zero gives empty or zero results, not an error."""
    case = dataclasses.replace(Case(2, 5, 7, 6, 3, 8, dtype=torch.float32), **{size: 0})
    q, k, v, do = testing.make(case)
    call = torch.compile(attention_with_lse, backend="aot_eager", fullgraph=True) if compiled else attention_with_lse
    with testing.poisoned():
        out, lse = call(q, k, v, causal=True)
        grads = torch.autograd.grad([out], (q, k, v), [do])
        assert attention(q.detach(), k, v.detach()).shape == out.shape
    assert out.shape == do.shape
    assert lse.shape == (case.B, case.H_q, case.S_q)
    assert not out.any()
    assert size != "S_kv" or torch.all(lse == -math.inf)
    for t, grad in zip((q, k, v), grads, strict=True):
        assert grad.shape == t.shape
        assert not grad.any()


# --- merging ---
def blocks(case, parts):
    """(first, last, left, right): keys [first, last) with the window that makes the block see what the whole sees."""
    edges = [case.S_kv * n // parts for n in range(parts + 1)]
    # Lengths are aligned at their ends, so a block that ends early is moved back by as much
    return [(a, b, (-1, case.S_kv - b if case.causal else -1)) for a, b in itertools.pairwise(edges)]


RINGS = [Case(2, 7, 11, 6, 3, 5, causal=causal, dtype=F64) for causal in (False, True)] + [Case(1, 11, 7, 4, 2, 5, causal=True, dtype=F64)]


@pytest.mark.parametrize("case", RINGS, ids=str)
def test_ring_merge_has_the_gradient_of_the_whole_FA_1137(case):
    """FA#1137, FA#889: three blocks of keys merged through their lse; without the gradient of lse dq and dk are wrong by half."""
    q, k, v, do = testing.make(case)
    dlse = torch.randn(case.B, case.H_q, case.S_q, dtype=F64)
    states = [attention_with_lse(q, k[:, a:b], v[:, a:b], window=window) for a, b, window in blocks(case, 3)]
    out, lse = merge_states(*merge_states(*states[0], *states[1]), *states[2])
    exact = testing.exact(case, q, k, v, do, dlse.masked_fill(lse == -math.inf, 0))
    torch.testing.assert_close(out.detach(), exact.out)
    torch.testing.assert_close(lse.detach(), exact.lse)
    for got, name in zip(torch.autograd.grad((out, lse), (q, k, v), (do, dlse)), ("dq", "dk", "dv"), strict=True):
        torch.testing.assert_close(got, getattr(exact, name), msg=name)


@pytest.mark.parametrize("case", RINGS, ids=str)
def test_ring_backward_block_by_block(case):
    """attention_bwd with the out and lse of the whole: dq of the blocks add up, dk and dv are those of the block."""
    q, k, v, do = testing.make(case)
    exact, dq = testing.exact(case, q, k, v, do), 0
    for a, b, window in blocks(case, 3):
        part, dk, dv = ops.attention_bwd(do, q, k[:, a:b], v[:, a:b], exact.out, exact.lse, None, *window)
        dq = dq + part
        torch.testing.assert_close(dk, exact.dk[:, a:b])
        torch.testing.assert_close(dv, exact.dv[:, a:b])
    torch.testing.assert_close(dq, exact.dq)


def test_merge_of_empty_parts():
    """Two parts that saw no key: torch's own merger gives NaN. Here 0, -inf, and gradients of 0; one empty part changes nothing."""
    out, lse = torch.randn(2, 5, 3, 4, dtype=F64), torch.randn(2, 3, 5, dtype=F64)
    nothing, minus = torch.zeros_like(out), torch.full_like(lse, -math.inf)
    for a, b in (((out, lse), (nothing, minus)), ((nothing, minus), (out, lse))):
        leaves = [t.clone().requires_grad_() for t in (*a, *b)]
        merged = merge_states(*leaves)
        torch.testing.assert_close(merged[0], out)
        torch.testing.assert_close(merged[1], lse)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad([t.sum() for t in merged], leaves))
    leaves = [t.clone().requires_grad_() for t in (nothing, minus, nothing, minus)]
    merged = merge_states(*leaves)
    assert torch.equal(merged[0], nothing)
    assert torch.equal(merged[1], minus)
    for grad in torch.autograd.grad([t.sum() for t in merged], leaves):
        assert not grad.any()


def test_merge_states_gradcheck_and_dtypes():
    out, lse = torch.randn(2, 3, 2, 2, dtype=F64), torch.randn(2, 2, 3, dtype=F64)
    leaves = [t.requires_grad_() for t in (out, lse, out.flip(0).detach(), 3 * lse.detach() - 200)]
    assert torch.autograd.gradcheck(merge_states, leaves)
    merged = merge_states(out.bfloat16(), lse.float(), out.bfloat16(), lse.float() + 1e4)
    assert merged[0].dtype is torch.bfloat16
    assert merged[1].dtype is torch.float32
    assert torch.equal(merged[1], lse.float() + 1e4)


# --- the measures themselves ---
def test_the_rule_can_fail():
    exact = torch.randn(400, dtype=F64)
    plain = exact.bfloat16()
    testing.assert_no_worse(plain, plain, exact, "x")
    one = torch.zeros_like(exact)
    one[3] = 0.3
    for wrong in (exact + one, exact * 1.02, exact + 0.01):
        with pytest.raises(AssertionError, match="x: m"):
            testing.assert_no_worse(wrong.bfloat16(), plain, exact, "x")
    for value in (math.nan, math.inf):
        with pytest.raises(AssertionError, match="x: 1 of 400 elements are not finite"):
            testing.assert_no_worse((exact + one * value).nan_to_num(0, 0, 0).index_fill(0, torch.tensor([3]), value), plain, exact, "x")
    with pytest.raises(AssertionError, match="x: shape"):
        testing.assert_no_worse(plain[:-1], plain, exact, "x")
    zero = torch.zeros_like(exact)
    testing.assert_no_worse(zero.bfloat16() + 1e-6, zero.bfloat16(), zero, "x")
    with pytest.raises(AssertionError, match="where the exact result is zero"):
        testing.assert_no_worse(zero.bfloat16() + 1e-4, zero.bfloat16(), zero, "x")


@pytest.mark.parametrize(("error", "softcap", "good"), [(1.9, 0, 1), (2.1, 0, 0), (2.1, 1, 1), (2.9, 1, 1), (3.1, 1, 0)])
def test_the_factor_of_the_rule(error, softcap, good):
    """2, and 3 with softcap, of plain's largest error; the mean stays below 1.5 of plain's."""
    exact, one = torch.zeros(100, dtype=F64), torch.zeros(100, dtype=F64)
    exact[0], one[0] = 1e-3, 1e-2
    plain = (exact + one + 0.5e-2).float()
    ours = (exact + error * plain.double().sub(exact).max() * (one > 0)).float()
    context = pytest.raises(AssertionError, match="max error") if not good else torch.no_grad()
    with context:
        testing.assert_no_worse(ours, plain, exact, "x", softcap=bool(softcap))
    with pytest.raises(AssertionError, match="mean error"):
        testing.assert_no_worse((exact + 0.9e-2).float(), plain, exact, "x")


@pytest.mark.parametrize(
    ("error", "softcap", "gradient", "good"), [(2.8e-4, 1, 1, 1), (3.4e-4, 1, 1, 0), (2.8e-4, 0, 1, 0), (2.8e-4, 1, 0, 0)]
)
def test_gradients_under_a_softcap_have_an_allowance(error, softcap, gradient, good):
    """3e-4, where there are both a softcap and a gradient; one element of 10,000, so that the mean has no part in it."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(10_000, dtype=F64, generator=generator) * 1e-3
    plain = (exact + 1e-6 * torch.randn(10_000, dtype=F64, generator=generator)).float()
    ours = plain.clone()
    ours[7] = exact[7] + error
    context = torch.no_grad() if good else pytest.raises(AssertionError, match="max error")
    with context:
        testing.assert_no_worse(ours, plain, exact, "x", softcap=bool(softcap), gradient=bool(gradient))


ONE_KEY = (
    Case(1, 799, 1, 12, 1, 256, scale=1.0),
    Case(2, 130, 1, 4, 2, 64, dtype=torch.float16),
    Case(1, 90, 70, 12, 1, 96, window=(0, 0), scale=-0.3),
    Case(1, 50, 60, 4, 2, 64, scale=0.0, softcap=15.0),
)


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("case", ONE_KEY, ids=str)
def test_gradients_that_vanish(case, expanded):
    """float32 sums pass, an error of 2^-9 in one of the two sums, which 16 bits would make, and any error under a scale of 0 do not."""
    q, k, v, do = testing.make(case)
    do = do[:1, :1, :1, :1].expand_as(do) if expanded else do
    rounding = testing.vanishing(case, q, k, v, do)
    plain, exact = testing.plain(case, q, k, v, do), testing.exact(case, q, k, v, do)
    ours = testing.ours(case, q, k, v, do)
    assert exact.dq.abs().max() < 1e-10 > exact.dk.abs().max()
    testing.assert_gradients(case, ours, plain, exact, rounding)
    out = exact.out * (1 + 2**-9)
    wrong = reference.attention_bwd(*(t.double() for t in (do, q, k, v)), out, exact.lse, None, *case.formula)
    if case.scale == 0:
        wrong = [torch.full_like(t, 1e-9) for t in (q, k)]
    for name, gradient in zip(("dq", "dk"), wrong, strict=False):
        with pytest.raises(AssertionError, match=f"{name} of it: max error .* where the exact result is zero"):
            testing.assert_gradients(case, ours._replace(**{name: gradient.to(q.dtype)}), plain, exact, rounding, " of it")


def test_gradients_that_do_not_vanish_have_no_other_rule():
    """Two keys; a gradient of lse; nothing to be summed."""
    assert testing.vanishing(ONE_KEY[0], *testing.make(ONE_KEY[0])).keys() == {"dq", "dk"}
    for case in (Case(1, 9, 2, 4, 2, 8), Case(1, 9, 4, 4, 2, 8, window=(0, 1)), Case(1, 0, 1, 4, 2, 8), Case(1, 3, 0, 4, 2, 8)):
        assert testing.vanishing(case, *testing.make(case)) == {}
    assert testing.vanishing(ONE_KEY[0], *testing.make(ONE_KEY[0]), torch.ones(1, 12, 799)) == {}
    assert testing.vanishing(ONE_KEY[3], *testing.make(ONE_KEY[3]), torch.ones(1, 4, 50)).keys() == {"dq", "dk"}


def test_the_lse_rule_can_fail():
    exact = torch.tensor([-200.0, -math.inf, 0.5, 300.0], dtype=F64)
    testing.assert_lse((exact * (1 + 0.9e-5)).float(), exact)
    for n, value in ((0, -200.01), (1, -1e30), (1, math.nan), (2, 0.50002), (2, -math.inf), (2, math.nan), (3, math.inf)):
        wrong = exact.clone()
        wrong[n] = value
        with pytest.raises(AssertionError, match="lse"):
            testing.assert_lse(wrong, exact)
    with pytest.raises(AssertionError, match="dtype"):
        testing.assert_lse(exact.half(), exact)


def test_exact_by_chunks(monkeypatch):
    """The same truth when the memory holds one head at a time."""
    case = dataclasses.replace(TINY, causal=True, H_q=8, H_kv=2)
    args = testing.make(case)
    whole = testing.exact(case, *args)
    monkeypatch.setattr(testing, "_CHUNK_BYTES", 1)
    for a, b in zip(testing.exact(case, *args), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_poison_and_record_reach_the_bodies(monkeypatch):
    """A body that leaves its output alone is seen; outside the context nothing is patched."""
    before = ops.meta.attention_fwd_lse
    monkeypatch.setattr(torch.Tensor, "copy_", lambda t, other: t)
    q, k, v, do = testing.make(dataclasses.replace(TINY, dtype=torch.float32))
    with testing.poisoned(), testing.recorded() as bodies:
        outputs = [ops.attention_fwd(q, k, v), *ops.attention_fwd_lse(q, k, v)]
        lse = torch.zeros(2, 6, 5)
        outputs += ops.attention_bwd(do, q, k, v, do, lse, None)
    assert all(t.isnan().all() for t in outputs)
    assert bodies == ["attention_fwd", "attention_fwd_lse", "attention_bwd"]
    assert ops.meta.attention_fwd_lse is before
