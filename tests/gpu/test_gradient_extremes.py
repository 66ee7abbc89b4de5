"""Gradients where the numbers are large, far from zero, or those of a trained model."""

from pathlib import Path

import pytest
import torch

from gqa_autograd import testing, testing_varlen
from gqa_autograd.kernels import config
from gqa_autograd.testing import Case, Result
from gqa_autograd.testing_varlen import PackedCase

pytestmark = pytest.mark.gpu
SIZES = pytest.mark.parametrize("sizes", config.D_BACKWARD, ids=str)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
FORMS = {"dense": (321, 321), "small": (2000, 100), "packed": ((100, 1, 220), (100, 30, 290))}
TRAINED = Path(__file__).parent / "data" / "trained_lm.pt"


def of(form: str, sizes: tuple[int, int], **options):
    """The case, its module and its tensors."""
    (D, D_v), options = sizes, {"causal": True, **options}
    options["D_v"] = D_v if D_v != D else None
    if form == "packed":
        case = PackedCase(*FORMS[form], 8, 2, D, **options)
        return case, testing_varlen, testing_varlen.make(case, "cuda")
    case = Case(1, *FORMS[form], 8, 2, D, **options)
    return case, testing, testing.make(case, "cuda")


def judge(case, module, args) -> Result:
    with testing.poisoned():
        ours = module.ours(case, *args)
    plain, exact = module.plain(case, *args), module.exact(case, *args)
    if module is testing:
        testing.assert_gradients(case, ours, plain, exact, testing.vanishing(case, *args))
    else:
        testing_varlen.assert_gradients(case, ours, plain, exact, args)
    return ours


@SIZES
@pytest.mark.parametrize("form", FORMS)
def test_lse_near_minus_120(form, sizes):
    """pytorch#196678: lse far below -88.7 gave NaN in dq; most so where a tile of queries is half empty, S_q % 128 = 64 or so."""
    case, module, (q, k, v, *rest) = of(form, sizes)
    with torch.no_grad():
        q.copy_(-q.abs() - 3.5)
        k.copy_(k.abs() + 3.5)
        logit = sizes[0] ** -0.5 * (q[..., 0, :].float() @ k[..., 0, :].float().mT).mean().abs()
        q.mul_((120 / logit).to(q.dtype))
    ours = judge(case, module, (q, k, v, *rest))
    seen = ours.lse[ours.lse.isfinite()]
    assert -200 < seen.min() < -100


@DTYPES
@SIZES
@pytest.mark.parametrize("form", FORMS)
def test_inputs_scaled_by_30(form, sizes, dtype):
    """Logits in the thousands: a key has all the weight, and where it has, dz is a difference of two equal sums. Nothing overflows.

    Plain PyTorch is no measure there: its P is 1 and its error 0, or in float16 it overflows. But out is rounded to eps before it comes to
    delta, which leaves an error of eps |do|·|out| in dz. dq takes it times |k|; in dk those of up to G S_q rows meet, as their root."""
    case, module, (q, k, v, *rest) = of(form, sizes, dtype=dtype)
    with torch.no_grad():
        for t in (q, k, v):
            t.mul_(30)
    ours, exact = module.ours(case, q, k, v, *rest), module.exact(case, q, k, v, *rest)
    eps, scale = torch.finfo(dtype).eps, sizes[0] ** -0.5
    dz = eps * (rest[0].double().abs() * exact.out.nan_to_num().abs()).sum(-1).max()
    rows = q.numel() / sizes[0] / k.shape[-2]
    for name, limit in {"dq": dz * k.abs().max(), "dk": dz * q.abs().max() * rows**0.5, "dv": 0}.items():
        gradient, truth = getattr(ours, name).double(), getattr(exact, name)
        assert gradient.isfinite().all(), name
        error, limit = (gradient - truth).abs().max(), scale * limit + 4 * eps * truth.abs().max()
        assert error <= limit, f"{name}: {error:.3e} > {limit:.3e}"


@DTYPES
def test_activations_of_a_trained_model(dtype):
    """TE#3216: wrong dq on real activations only. data/capture.py says how these were made."""
    q, k, v, do = (torch.load(TRAINED, weights_only=True)[name].to(dtype) for name in ("q", "k", "v", "do"))
    B, S, H_q, D = q.shape
    case = Case(B, S, S, H_q, k.shape[2], D, causal=True, dtype=dtype)
    device = testing.make(Case(1, 1, 1, 1, 1, 64), "cuda")[0].device
    args = [t.to(device) for t in (q, k, v, do)]
    judge(case, testing, [*(t.requires_grad_() for t in args[:3]), args[3]])
    # Packed, as it would be trained: documents of 200 and 56 tokens in each row
    packed = PackedCase((200, S - 200) * B, (200, S - 200) * B, H_q, k.shape[2], D, causal=True, dtype=dtype)
    tokens = [t.detach().flatten(0, 1) for t in args]
    offsets = [testing_varlen.offsets(packed.lengths_q, device)] * 2
    judge(packed, testing_varlen, [*(t.requires_grad_() for t in tokens[:3]), tokens[3], *offsets])
