"""Packed sequences under torch.func: grad, vjp, and vmap, which lays the mapped packings end to end."""

import dataclasses

import pytest
import torch

from gqa_autograd import attention_varlen, attention_varlen_with_lse, ops_varlen, testing, testing_varlen
from gqa_autograd.testing_varlen import PackedCase

# Sizes are distinct (pitfall 10); one sequence has no query, one no key, one more queries than keys
SMALL = PackedCase((5, 0, 2, 9), (7, 3, 0, 6), 6, 3, 8, causal=True, dtype=torch.float32, D_v=10)
TAILS = dataclasses.replace(SMALL, tail_q=4, tail_kv=2)


def inputs(case=SMALL, requires_grad=True):
    q, k, v, do, *offsets = testing_varlen.make(case)
    return *(t.requires_grad_(requires_grad) for t in (q, k, v)), do, *offsets


def test_func_grad_and_vjp():
    q, k, v, do, *offsets = inputs()
    want = torch.autograd.grad(attention_varlen(q, k, v, *offsets, causal=True), (q, k, v), do)
    q, k, v = (t.detach() for t in (q, k, v))
    got = torch.func.grad(lambda *a: (attention_varlen(*a, *offsets, causal=True) * do).sum(), argnums=(0, 1, 2))(q, k, v)
    (_, lse), pull = torch.func.vjp(lambda *a: attention_varlen_with_lse(*a, *offsets, causal=True), q, k, v)
    for a, b, c in zip(got, pull((do, torch.zeros_like(lse))), want, strict=True):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)


OTHER = dataclasses.replace(TAILS, lengths_q=(1, 8, 3, 5), lengths_kv=(2, 9, 1, 5), tail_q=3, tail_kv=1)


@pytest.mark.parametrize("in_dims", [(0, None, None, None, None), (0, 0, 0, None, None), (1, None, 2, 0, 1), (None, 3, None, None, 0)])
def test_vmap(in_dims):
    """One call for the whole map: packings end to end. NaN in the tail of one reaches no other, and gradients of tails stay 0."""
    case = TAILS
    q, k, v, _, *offsets = testing_varlen.spoil(case, inputs(case, False))
    others = [2 * q, -k, 3 * v, *(testing_varlen.offsets(lengths) for lengths in (OTHER.lengths_q, OTHER.lengths_kv))]
    pairs = list(zip((q, k, v, *offsets), others, in_dims, strict=True))
    # Where the offsets are mapped, all that is not covered by both is cut off before it is compared
    mapped = [t if d is None else torch.stack([t, other], d) for t, other, d in pairs]
    for t in mapped[:3]:
        t.requires_grad_()
    with testing.recorded() as bodies:
        out = torch.vmap(lambda *a: attention_varlen(*a, causal=True), in_dims)(*mapped)
    assert len(bodies) == 1, "the mapped dimension belongs among the sequences"
    each = [[t if d is None else t.select(d, n) for t, d in zip(mapped, in_dims, strict=True)] for n in range(2)]
    want = [attention_varlen(*a, causal=True) for a in each]
    ends = [int(a[3][-1]) for a in each]
    for n in range(2):
        torch.testing.assert_close(out[n, : ends[n]], want[n][: ends[n]], equal_nan=True)
    results = []
    for outs in (out, want):
        loss = sum(o[:end].nan_to_num(0).square().sum() for o, end in zip(outs, ends, strict=True))
        results.append(torch.autograd.grad(loss, mapped[:3]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_vmap_of_grad():
    q, k, v, _, *offsets = inputs(requires_grad=False)
    qs = torch.stack([q, 2 * q, -q])

    def loss(q):
        out, lse = attention_varlen_with_lse(q, k, v, *offsets)
        return out.square().sum() + lse.nan_to_num(0, neginf=0).sum()

    dq = torch.vmap(torch.func.grad(loss))(qs)
    for n in range(3):
        torch.testing.assert_close(dq[n], torch.func.grad(loss)(qs[n]))


def test_vmap_of_the_raw_operators():
    q, k, v, do, *offsets = inputs(requires_grad=False)
    qs, dos = torch.stack([q, -q], 1), torch.stack([do, 3 * do], 2)
    out, lse = torch.vmap(lambda q: ops_varlen.attention_varlen_fwd_lse(q, k, v, *offsets), 1)(qs)
    for n in range(2):
        want = ops_varlen.attention_varlen_fwd_lse(qs[:, n], k, v, *offsets)
        torch.testing.assert_close((out[n], lse[n]), want)
    got = torch.vmap(
        lambda do, q, out, lse: ops_varlen.attention_varlen_bwd(do, q, k, v, out, lse, lse.clamp(-1, 1), *offsets), (2, 1, 0, 0)
    )(dos, qs, out, lse)
    for n in range(2):
        want = ops_varlen.attention_varlen_bwd(dos[:, :, n], qs[:, n], k, v, out[n], lse[n], lse[n].clamp(-1, 1), *offsets)
        torch.testing.assert_close(tuple(t[n] for t in got), want)
