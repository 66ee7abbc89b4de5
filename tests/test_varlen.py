"""Packed sequences: the definition against dense attention and float64."""

import pytest
import torch

from gqa_autograd import attention_with_lse, testing, testing_varlen
from gqa_autograd.testing_varlen import PACKED


@pytest.mark.parametrize("case", PACKED, ids=str)
@pytest.mark.parametrize("with_dlse", [False, True], ids=["", "dlse"])
def test_closeness(case, with_dlse):
    """Each sequence by the closeness rule, tails untouched, their gradients 0."""
    args = testing_varlen.spoil(case, testing_varlen.make(case))
    dlse = torch.randn(case.H_q, args[0].shape[0]) if with_dlse else None
    with testing.poisoned():
        ours = testing_varlen.ours(case, *args, dlse)
    plain, exact = testing_varlen.plain(case, *args, dlse), testing_varlen.exact(case, *args, dlse)
    testing_varlen.assert_no_worse(case, ours, plain, exact)
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
            assert torch.equal(got, dense[0])
