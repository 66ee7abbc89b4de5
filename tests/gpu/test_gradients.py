"""dq, dk and dv of dense attention against float64: every pair of settings, unwritten results as NaN, no bias, block by block as a ring."""

import pytest
import torch
from gradient_cases import COVERING, stored
from tools import poisoned_workspace

import gqa_autograd
from gqa_autograd import testing
from gqa_autograd.kernels import config
from gqa_autograd.testing import Case

pytestmark = pytest.mark.gpu
OPS = torch.ops.gqa_autograd
SIZES = pytest.mark.parametrize("sizes", config.D_BACKWARD, ids=str)


def check(case: Case, q, k, v, do, dlse=None) -> testing.Result:
    """The gradients by the closeness rule, with NaN in what they are written to and in the memory that a workspace may be made of."""
    poisoned_workspace(q.device)
    with testing.poisoned():
        ours = testing.ours(case, q, k, v, do, dlse)
    plain, exact = testing.plain(case, q, k, v, do, dlse), testing.exact(case, q, k, v, do, dlse)
    testing.assert_gradients(case, ours, plain, exact, testing.vanishing(case, q, k, v, do, dlse))
    return ours


def of_size(sizes: tuple[int, int], *shape: int, **options) -> Case:
    D, D_v = sizes
    return Case(*shape, D, D_v=D_v if D_v != D else None, **options)


@pytest.mark.parametrize("one", COVERING.values(), ids=COVERING)
def test_closeness(one):
    """FA#443, FA#1778: S_q below and above S_kv; FA#1137, FA#889: lse's gradient; FA#355, fla#1138: `do` expanded and permuted."""
    case = one.case
    q, k, v, do = testing.make(case, "cuda", seed=1)
    dlse = torch.randn(case.B, case.H_q, case.S_q, device=q.device) if one.dlse else None
    check(case, q, k, v, stored(do, one.do), dlse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@SIZES
def test_errors_have_no_direction(sizes, dtype):
    """The mean of the error within 5 of its standard deviations, and of the error away from zero too: a result that is cut off and not
    rounded, a lost term of a sum or a wrong constant shows there first. Tensor cores cut off what they add up, 2^-24 a step at most."""
    case = of_size(sizes, 1, 2048, 2048, 8, 2, causal=True, dtype=dtype)
    args = testing.make(case, "cuda", seed=2)
    ours, exact = testing.ours(case, *args), testing.exact(case, *args)
    steps = case.S_q * case.H_q // case.H_kv // 16
    for name in ("dq", "dk", "dv"):
        truth = getattr(exact, name)
        error = getattr(ours, name).double() - truth
        noise = 5 * error.square().mean().sqrt() / error.numel() ** 0.5
        assert error.mean().abs() <= noise, f"{name}: mean error {error.mean():.2e}, noise {noise:.2e}"
        outward = (error * truth.sign()).mean()
        assert outward.abs() <= noise + steps * 2**-24 * truth.abs().mean(), f"{name}: {outward:.2e} away from zero, noise {noise:.2e}"


@SIZES
@pytest.mark.parametrize(("S_q", "S_kv"), [(300, 70), (129, 1), (64, 0), (0, 64)])
def test_what_sees_nothing_gets_zero(S_q, S_kv, sizes):
    """FA#443, FA#1778: dq of queries without keys and dk, dv of keys without queries are 0 to the bit, whatever lse's gradient holds."""
    case = of_size(sizes, 2, S_q, S_kv, 4, 2, causal=True)
    q, k, v, do = testing.make(case, "cuda")
    dlse = torch.full((2, 4, S_q), 3.0, device=q.device)
    with testing.poisoned():
        ours = testing.ours(case, q, k, v, do, dlse)
    assert not ours.dq[:, : max(0, S_q - S_kv)].any()
    assert not ours.out[:, : max(0, S_q - S_kv)].any()
    if S_q == 0:
        assert not ours.dk.any()
        assert not ours.dv.any()
    # Of the last 20 queries the keys before their window are seen by nobody
    case = of_size(sizes, 2, 20, 300, 4, 2, window=(50, 0))
    args = testing.make(case, "cuda")
    with testing.poisoned():
        ours = testing.ours(case, *args)
    assert not ours.dk[:, : 300 - 20 - 50].any()
    assert not ours.dv[:, : 300 - 20 - 50].any()
    assert ours.dv[:, 300 - 20 - 50 :].any(3).all()


@SIZES
@pytest.mark.parametrize("causal", [True, False])
def test_a_ring_of_key_blocks(causal, sizes):
    """attention_bwd with the out and lse of the whole: dq summed over blocks of keys, dk and dv side by side. A causal block that ends r
    keys before the last one is a window with right side r."""
    case = of_size(sizes, 2, 260, 390, 4, 2, causal=causal)
    q, k, v, do = testing.make(case, "cuda")
    plain, exact = testing.plain(case, q, k, v, do), testing.exact(case, q, k, v, do)
    with torch.no_grad():
        out, lse = gqa_autograd.attention_with_lse(q, k, v, **case.options)
        blocks = []
        for a, b in ((0, 128), (128, 200), (200, 390)):
            right = case.S_kv - b if causal else -1
            blocks.append(OPS.attention_bwd(do, q, k[:, a:b], v[:, a:b], out, lse, None, -1, right))
    dq = sum(block[0].float() for block in blocks).to(q.dtype)
    whole = testing.Result(out, lse, dq, *(torch.cat([block[n] for block in blocks], 1) for n in (1, 2)))
    testing.assert_gradients(case, whole, plain, exact, {})


@SIZES
def test_a_causal_ring_of_square_blocks(sizes):
    """As ranks do it: blocks below the diagonal are full, those on it causal, those above never meet."""
    case = of_size(sizes, 1, 384, 384, 4, 2, causal=True)
    q, k, v, do = testing.make(case, "cuda")
    plain, exact = testing.plain(case, q, k, v, do), testing.exact(case, q, k, v, do)
    dq, dk, dv = (torch.zeros(t.shape, device=q.device) for t in (q, k, v))
    with torch.no_grad():
        out, lse = gqa_autograd.attention_with_lse(q, k, v, causal=True)
        parts = [slice(n, n + 128) for n in (0, 128, 256)]
        for i, mine in enumerate(parts):
            for j, theirs in enumerate(parts[: i + 1]):
                rows = do[:, mine], q[:, mine], k[:, theirs], v[:, theirs], out[:, mine], lse[:, :, mine], None
                found = OPS.attention_bwd(*rows, -1, 0 if i == j else -1)
                for whole, where, part in zip((dq, dk, dv), (mine, theirs, theirs), found, strict=True):
                    whole[:, where] += part
    summed = testing.Result(out, lse, *(t.to(q.dtype) for t in (dq, dk, dv)))
    testing.assert_gradients(case, summed, plain, exact, {})


def test_offsets_past_two_to_the_31():
    """FA#1500, tilelang#2560: at the far end of rows of 2^31 elements in all. The workspace of dq is as long."""
    case, tail = (Case(B, 128, 128, 32, 4, 128, window=(60, 0), softcap=20.0) for B in (4200, 2))
    args = testing.make(tail, "cuda")
    whole = []
    for t in args:
        big = torch.zeros(case.B, *t.shape[1:], dtype=t.dtype, device=t.device)
        big[-2:] = t.detach()
        whole.append(big)
    assert whole[0].numel() > 2**31
    ours = testing.ours(case, *(t.requires_grad_() for t in whole[:3]), whole[3])
    ours = testing.Result(*(t[-2:] for t in ours))
    testing.assert_gradients(tail, ours, testing.plain(tail, *args), testing.exact(tail, *args), {})
