"""out, lse, dq, dk, dv against float64 by the closeness rule, in outputs that start as NaN."""

import pytest
import torch
from cases import ALL

import gqa_autograd
from gqa_autograd import testing
from gqa_autograd.testing import Case

pytestmark = pytest.mark.gpu


def check(case, ours, plain, exact, *args) -> None:
    testing.assert_no_worse(ours.out, plain.out, exact.out, "out", softcap=case.softcap > 0)
    testing.assert_gradients(case, ours, plain, exact, testing.vanishing(case, *args))


@pytest.mark.parametrize("case", ALL, ids=str)
def test_forward(case):
    q, k, v, do = testing.make(case, "cuda")
    with testing.poisoned(), torch.no_grad():
        out, lse = gqa_autograd.attention_with_lse(q, k, v, **case.options)
        without_lse = gqa_autograd.attention(q, k, v, **case.options)
    assert torch.equal(out, without_lse)
    plain, exact = testing.plain(case, q, k, v, do), testing.exact(case, q, k, v, do)
    testing.assert_no_worse(out, plain.out, exact.out, "out", softcap=case.softcap > 0)
    testing.assert_lse(lse, exact.lse)


@pytest.mark.parametrize(("case", "with_dlse"), [(case, n % 2 == 1) for n, case in enumerate(ALL)], ids=str)
def test_gradients(case, with_dlse):
    """Every configuration at every length around the tiles; test_gradients.py has every pair of settings."""
    q, k, v, do = testing.make(case, "cuda", seed=1)
    dlse = torch.randn(q.shape[0], q.shape[2], q.shape[1], device="cuda") if with_dlse else None
    with testing.poisoned():
        ours = testing.ours(case, q, k, v, do, dlse)
    check(case, ours, testing.plain(case, q, k, v, do, dlse), testing.exact(case, q, k, v, do, dlse), q, k, v, do, dlse)


@pytest.mark.parametrize("case", [Case(1, 321, 321, 8, 2, D, causal=True) for D in (64, 128)], ids=str)
def test_logits_near_minus_120(case):
    """pytorch#196678: lse far below -88.7 gave NaN in dq."""
    q, k, v, do = testing.make(case, "cuda")
    with torch.no_grad():
        q.copy_(-q.abs() * 5)
        k.copy_(k.abs() * 5)
    ours = testing.ours(case, q, k, v, do)
    assert ours.lse.min() < -120
    check(case, ours, testing.plain(case, q, k, v, do), testing.exact(case, q, k, v, do), q, k, v, do)


@pytest.mark.parametrize("D", [64, 128, 256])
def test_ones_in_v_give_one(D):
    """FA#2151: probabilities must sum to 1, without bias."""
    case = Case(1, 777, 777, 4, 2, D, causal=True)
    q, k, v, _ = testing.make(case, "cuda")
    with torch.no_grad():
        out = gqa_autograd.attention(q, k, torch.ones_like(v), causal=True).float()
    assert (out - 1).abs().max() <= 2**-7
    assert (out.double().mean() - 1).abs() <= 2**-11


@pytest.mark.parametrize("layout", ["expanded", "permuted"])
def test_gradient_with_odd_strides(layout):
    """FA#355, fla#1138: `do` with stride 0 from sum(), or permuted."""
    case = Case(2, 150, 210, 6, 2, 128, causal=True)
    q, k, v, do = testing.make(case, "cuda")
    do = torch.ones((), dtype=do.dtype, device="cuda").expand_as(do) if layout == "expanded" else do.mT.contiguous().mT
    ours = testing.ours(case, q, k, v, do)
    check(case, ours, testing.plain(case, q, k, v, do), testing.exact(case, q, k, v, do), q, k, v, do)


def test_rows_without_keys_are_exactly_zero():
    """S_q > S_kv: FA#443, FA#1778."""
    case = Case(2, 300, 70, 4, 2, 128, causal=True)
    q, k, v, do = testing.make(case, "cuda")
    with testing.poisoned():
        ours = testing.ours(case, q, k, v, do, torch.full((2, 4, 300), 3.0, device="cuda"))
    blind = slice(0, 300 - 70)
    assert ours.out[:, blind].eq(0).all()
    assert ours.dq[:, blind].eq(0).all()
    assert ours.lse[:, :, blind].eq(-torch.inf).all()


def test_offsets_past_two_to_the_31():
    """FA#1500, tilelang#2560: the last batch rows of a tensor with more than 2^31 elements."""
    case = Case(4200, 128, 128, 32, 4, 128, causal=True)
    tail = Case(2, 128, 128, 32, 4, 128, causal=True)
    q, k, v = (torch.zeros(case.B, 128, H, 128, dtype=case.dtype, device="cuda") for H in (32, 4, 4))
    assert q.numel() > 2**31
    q_, k_, v_, do_ = testing.make(tail, "cuda")
    do = torch.zeros_like(q)
    with torch.no_grad():
        for whole, part in ((q, q_), (k, k_), (v, v_), (do, do_)):
            whole[-2:] = part
    for t in (q, k, v):
        t.requires_grad_()
    ours = testing.ours(case, q, k, v, do)
    ours = testing.Result(*(t[-2:] for t in ours))
    check(tail, ours, testing.plain(tail, q_, k_, v_, do_), testing.exact(tail, q_, k_, v_, do_), q_, k_, v_, do_)
