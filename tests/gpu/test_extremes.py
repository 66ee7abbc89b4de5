"""Forwards on large numbers, on values that must come back as they are, and at offsets that 32 bits don't hold."""

import pytest
import torch
from tools import forward

import gqa_autograd
from gqa_autograd import testing, testing_varlen
from gqa_autograd.kernels import config
from gqa_autograd.testing import Case
from gqa_autograd.testing_varlen import PackedCase

pytestmark = pytest.mark.gpu
SIZES = pytest.mark.parametrize("sizes", config.D_FORWARD, ids=str)
# Dense, few queries with many keys, and packed; of the last the lengths
FORMS = {"dense": (321, 321), "small": (64, 2000), "packed": ((100, 1, 220), (100, 30, 290))}


def inputs(form: str, sizes: tuple[int, int], **options):
    """(q, k, v, do as [1, S, H, D] or packed), and a function of q, k and v to (out, lse), the truth of both and plain's out."""
    lengths, (D, D_v) = FORMS[form], sizes
    options = {"causal": True, **options, "D_v": D_v if D_v != D else None}
    if form != "packed":
        case = Case(1, *lengths, 8, 2, D, **options)
        args = [t.detach() for t in testing.make(case, "cuda")]

        def judged(q, k, v, do):
            ours = gqa_autograd.attention_with_lse(q, k, v, **case.options)
            return ours, testing.plain(case, q, k, v, do), testing.exact(case, q, k, v, do)

        return args, judged
    packed = PackedCase(*lengths, 8, 2, D, **options)
    args = [t.detach() for t in testing_varlen.make(packed, "cuda")]

    def judged_packed(q, k, v, do):
        ours = forward(packed, q, k, v, do, *args[4:])[:2]
        return ours, *(f(packed, q, k, v, do, *args[4:]) for f in (testing_varlen.plain, testing_varlen.exact))

    return args[:4], judged_packed


@SIZES
@pytest.mark.parametrize("form", FORMS)
def test_logits_near_minus_120(form, sizes):
    """pytorch#196678."""
    (q, k, v, do), judged = inputs(form, sizes)
    # Every logit at about -120, some farther
    q, k = -q.abs() - 3.5, k.abs() + 3.5
    q = q * (120 / (sizes[0] ** -0.5 * (q[..., 0, :].float() @ k[..., 0, :].float().mT).mean().abs())).to(q.dtype)
    (out, lse), plain, exact = judged(q, k, v, do)
    assert -200 < lse.min() < -100
    testing.assert_no_worse(out, plain.out, exact.out, "out")
    testing.assert_lse(lse, exact.lse)


@SIZES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_inputs_scaled_by_30(form, dtype, sizes):
    """Logits in the thousands: a key or two have all the weight, so out is a rounding or two away. In float16 plain overflows."""
    (q, k, v, do), judged = inputs(form, sizes, dtype=dtype)
    (out, lse), _, exact = judged(q * 30, k * 30, v * 30, do)
    assert exact.lse.max() > 1000
    testing.assert_lse(lse, exact.lse)
    assert (out.double() - exact.out).abs().max() <= torch.finfo(dtype).eps * exact.out.abs().max()


@SIZES
@pytest.mark.parametrize("mask", [{"causal": True}, {"causal": False}, {"causal": False, "window": (90, 30)}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_ones_in_v_give_one(form, mask, sizes):
    """FA#2151, FA#2721: probabilities sum to 1, without bias."""
    (q, k, v, do), judged = inputs(form, sizes, **mask)
    (out, _), _, exact = judged(q, k, torch.ones_like(v), do)
    # 0 where no key is seen
    error = out.double() - exact.out.round()
    assert error.abs().max() <= 2**-7
    assert error.mean().abs() <= 2**-11


def big_views(S: int, shapes: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """Views [1, S, H, D] of one buffer of NaN; S rows are more than 2^31 elements long, the later views begin beyond 2^31 too."""
    row = 2**31 // S + 2**15
    row += -row % 64
    buffer = torch.full((S * row,), torch.nan, dtype=torch.bfloat16, device="cuda")
    views, start = {}, 0
    for name, (H, D) in shapes.items():
        views[name] = buffer.as_strided((1, S, H, D), (S * row, row, D, 1), start)
        start += H * D
    assert buffer.numel() > 2**31
    return views


@pytest.mark.parametrize("form", ["dense", "small", "packed"])
def test_views_into_one_big_buffer(form):
    """FA#1500, tilelang#2560: strides of rows that take the last of them past 2^31 elements; between the rows lies NaN."""
    S_q, S_kv = {"dense": (600, 600), "small": (100, 600), "packed": (600, 600)}[form]
    case = Case(1, S_q, S_kv, 8, 2, 128, causal=True)
    q, k, v, do = (t.detach() for t in testing.make(case, "cuda"))
    views = big_views(S_kv, {"q": (8, 128), "k": (2, 128), "v": (2, 128)})
    # The last rows, so that q too lies at the far end
    big = [views["q"][:, -S_q:], views["k"], views["v"]]
    for view, t in zip(big, (q, k, v), strict=True):
        view.copy_(t)
        assert view.storage_offset() + view.stride(1) * (view.shape[1] - 1) > 2**31
    if form == "packed":
        packed = PackedCase((250, 350), (250, 350), 8, 2, 128, causal=True)
        offsets = [testing_varlen.offsets(packed.lengths_q, "cuda")] * 2
        flat = [t[0] for t in (q, k, v, do)]
        ours = forward(packed, *(t[0] for t in big), flat[3], *offsets)
        plain, exact = (f(packed, *flat, *offsets) for f in (testing_varlen.plain, testing_varlen.exact))
        return testing_varlen.assert_no_worse(packed, ours, plain, exact, names=("out",))
    out, lse = gqa_autograd.attention_with_lse(*big, **case.options)
    plain, exact = testing.plain(case, q, k, v, do), testing.exact(case, q, k, v, do)
    testing.assert_no_worse(out, plain.out, exact.out, "out")
    testing.assert_lse(lse, exact.lse)


def test_a_pack_of_more_than_two_to_the_31():
    """q and out of 530,000 tokens with 32 heads; the last two documents are compared, the others lie before them."""
    lengths = (*(2650,) * 199, 2200, 450)
    case = PackedCase(lengths, lengths, 32, 4, 128, causal=True)
    tail = PackedCase(lengths[-2:], lengths[-2:], 32, 4, 128, causal=True)
    q_, k_, v_, do, *cu_tail = testing_varlen.make(tail, "cuda")
    T, t = sum(lengths), sum(lengths[-2:])
    q, k, v = (torch.full((T, H, 128), 0.1, dtype=torch.bfloat16, device="cuda") for H in (32, 4, 4))
    assert q.numel() > 2**31
    for whole, part in ((q, q_), (k, k_), (v, v_)):
        whole[-t:] = part.detach()
    with testing.poisoned(), torch.no_grad():
        out, lse = gqa_autograd.attention_varlen_with_lse(q, k, v, *[testing_varlen.offsets(lengths, "cuda")] * 2, **case.options)
    assert bool((out[:-t].float() - 0.1).abs().max() <= 2**-10)
    args = (q_, k_, v_, do, *cu_tail)
    ours = testing.Result(out[-t:], lse[:, -t:], *(torch.zeros_like(x) for x in (q_, k_, v_)))
    plain, exact = testing_varlen.plain(tail, *args), testing_varlen.exact(tail, *args)
    testing_varlen.assert_no_worse(tail, ours, plain, exact, names=("out",))
