"""The same bits from run to run, a thousand times, and for a row of a batch whatever else is in it."""

import pytest
import torch
from tools import forward, same_bits

import gqa_autograd
from gqa_autograd import testing, testing_varlen
from gqa_autograd.testing import Case
from gqa_autograd.testing_varlen import PackedCase

pytestmark = pytest.mark.gpu
RUNS = 1000
# Fewer tiles than multiprocessors: few queries, long and short rows of keys
SMALL = [
    Case(3, S_q, S_kv, H_q, H_kv, D, **mask)
    for S_q, S_kv in ((64, 64), (1, 700), (64, 1000), (256, 8192), (300, 2100), (512, 1024))
    for H_q, H_kv, D in ((8, 1, 128), (4, 2, 64))
    for mask in ({"causal": True}, {}, {"window": (700, 0)})
] + [Case(3, 64, 3000, 4, 1, 256, causal=True, softcap=20.0), Case(3, 100, 2000, 6, 3, 192, D_v=128)]
REPEATED = {
    "causal": Case(2, 1500, 1500, 16, 4, 128, causal=True),
    "full": Case(1, 1000, 1300, 16, 4, 64),
    "window": Case(2, 1500, 1500, 16, 4, 128, window=(300, 20)),
    "softcap": Case(2, 1500, 1500, 16, 4, 128, causal=True, softcap=15.0),
    "small_causal": Case(1, 256, 8192, 8, 1, 128, causal=True),
    "small_full": Case(1, 64, 4000, 8, 1, 64),
    "small_square": Case(1, 256, 256, 8, 1, 128, causal=True),
    "packed": PackedCase((900, 1, 300, 0, 2000, 77), (900, 40, 300, 9, 2000, 700), 16, 4, 128, causal=True),
    "packed_window": PackedCase((900, 1, 300, 0, 2000, 77), (900, 40, 300, 9, 2000, 700), 16, 4, 64, window=(200, 10)),
}


def calls(case):
    """The call as a function without arguments: out and lse."""
    if isinstance(case, PackedCase):
        args = testing_varlen.make(case, "cuda")
        return lambda: forward(case, *args)[:2]
    q, k, v, _ = (t.detach() for t in testing.make(case, "cuda"))
    return lambda: gqa_autograd.attention_with_lse(q, k, v, **case.options)


@pytest.mark.parametrize("name", REPEATED)
def test_a_thousand_runs_are_bit_equal(name):
    run = calls(REPEATED[name])
    first = run()
    # Nobody waits for a run, so that they follow each other closely, as in use
    differs = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(RUNS):
        for a, b in zip(run(), first, strict=True):
            differs += (a.view(torch.uint8) != b.view(torch.uint8)).any()
    assert int(differs) == 0, f"{int(differs)} of {2 * RUNS} results differ from the first run's"
    assert all(bool(t.isfinite().all()) for t in first)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_a_row_of_a_small_grid_has_the_same_bits_alone_and_in_company(case):
    """vllm#51902: how keys are split must not depend on the batch. And it is right: alone and in company could be wrong alike."""
    q, k, v, do = (t.detach() for t in testing.make(case, "cuda"))
    with testing.poisoned():
        together = gqa_autograd.attention_with_lse(q, k, v, **case.options)
        for b in range(case.B):
            alone = gqa_autograd.attention_with_lse(q[b : b + 1], k[b : b + 1], v[b : b + 1], **case.options)
            assert all(same_bits(t[b : b + 1], a) for t, a in zip(together, alone, strict=True)), f"row {b}"
        without_lse = gqa_autograd.attention(q, k, v, **case.options)
    assert same_bits(without_lse, together[0])
    plain, exact = testing.plain(case, q, k, v, do), testing.exact(case, q, k, v, do)
    testing.assert_no_worse(together[0], plain.out, exact.out, "out", softcap=case.softcap > 0)
    testing.assert_lse(together[1], exact.lse)
