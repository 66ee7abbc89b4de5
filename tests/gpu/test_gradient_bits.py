"""With deterministic=True gradients repeat bit for bit, a thousand times, with other work beside them; without it dk and dv do."""

import warnings

import pytest
import torch
from tools import same_bits

import gqa_autograd
from gqa_autograd import testing, testing_varlen
from gqa_autograd.kernels import config
from gqa_autograd.testing import Case
from gqa_autograd.testing_varlen import PackedCase

pytestmark = pytest.mark.gpu
RUNS = 1000
_CAUSAL = {
    f"{D}x{D_v}": Case(2, 1000, 1000, 8, 2, D, causal=True, D_v=D_v if D_v != D else None, dtype=dtype)
    for (D, D_v), dtype in zip(config.D_BACKWARD, (torch.bfloat16, torch.float16) * 3, strict=True)
}
REPEATED = {
    **_CAUSAL,
    "full": Case(1, 700, 1300, 8, 2, 128),
    "window": Case(2, 1000, 1000, 8, 2, 128, window=(300, 20)),
    "softcap": Case(2, 1000, 1000, 8, 2, 64, causal=True, softcap=15.0),
    # Fewer tiles of keys than multiprocessors: their queries are split
    "small": Case(1, 4000, 128, 8, 1, 128),
    "small_causal": Case(1, 1024, 1024, 4, 1, 128, causal=True),
    "packed": PackedCase((900, 1, 300, 0, 2000, 77), (900, 40, 300, 9, 2000, 700), 16, 4, 128, causal=True),
    "packed_small": PackedCase((1500, 30), (130, 7), 4, 1, 64, window=(200, 10)),
}


def calls(case: Case | PackedCase, **more):
    """The call as a function without arguments: dq, dk and dv, with a gradient of lse; deterministic=True if nothing else is asked for."""
    more = more or {"deterministic": True}
    if isinstance(case, PackedCase):
        q, k, v, do, *cu_seqlens = testing_varlen.make(case, "cuda")
        out, lse = gqa_autograd.attention_varlen_with_lse(q, k, v, *cu_seqlens, **case.options, **more)
    else:
        q, k, v, do = testing.make(case, "cuda")
        out, lse = gqa_autograd.attention_with_lse(q, k, v, **case.options, **more)
    dlse = torch.randn(lse.shape, device=lse.device, generator=torch.Generator(lse.device).manual_seed(5))
    return lambda: torch.autograd.grad((out, lse), (q, k, v), (do, dlse), retain_graph=True)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", REPEATED)
def test_a_thousand_runs_are_bit_equal(name, deterministic):
    """FA#2158, FA#2510. Products on a second stream take multiprocessors away, more and fewer from run to run, so that thread blocks meet
    in other orders. Without deterministic=True dk and dv alone."""
    run = calls(REPEATED[name], deterministic=deterministic)
    promised = slice(0 if deterministic else 1, 3)
    first = run()
    aside, streams = [torch.randn(n, n, device=first[0].device) for n in (300, 900, 2500)], [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    # Nobody waits for a run, so that they follow each other closely, as in use
    differs = torch.zeros((), dtype=torch.int64, device=first[0].device)
    for n in range(RUNS):
        with torch.cuda.stream(streams[n % 2]):
            aside[n % 3] @ aside[n % 3]
        for a, b in zip(run()[promised], first[promised], strict=True):
            differs += (a.view(torch.uint8) != b.view(torch.uint8)).any()
    assert int(differs) == 0, f"{int(differs)} of {len(first[promised]) * RUNS} gradients differ from the first run's"
    assert all(bool(t.isfinite().all()) for t in first)


@pytest.mark.parametrize("name", REPEATED)
def test_the_global_switch_is_the_argument(name):
    """The same bits; and dk and dv have them without either."""
    case = REPEATED[name]
    expected = calls(case, deterministic=True)()
    torch.use_deterministic_algorithms(True)
    again = calls(case, deterministic=None)()
    torch.use_deterministic_algorithms(False)
    assert all(same_bits(a, b) for a, b in zip(again, expected, strict=True))
    assert all(same_bits(a, b) for a, b in zip(calls(case, deterministic=None)()[1:], expected[1:], strict=True))


@pytest.mark.parametrize("name", ["small", "packed"])
def test_the_mode_that_warns_is_told(name):
    """Of what is not deterministic, and of nothing that is."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.warns(UserWarning, match="the order of dq's sums is not fixed"):
        calls(REPEATED[name], deterministic=None)()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calls(REPEATED[name], deterministic=True)()


def test_runs_on_several_streams_do_not_meet():
    """Counters and workspaces are those of one call."""
    run = {name: calls(REPEATED[name]) for name in ("128x128", "small", "packed")}
    expected = {name: call() for name, call in run.items()}
    streams = [torch.cuda.Stream() for _ in range(6)]
    torch.cuda.synchronize()
    found = []
    for n in range(60):
        # A backward runs on the stream of its forward: each has its own
        with torch.cuda.stream(streams[n % 6]):
            name = list(run)[n % 3]
            found.append((name, calls(REPEATED[name])()))
    torch.cuda.synchronize()
    for name, gradients in found:
        assert all(same_bits(a, b) for a, b in zip(gradients, expected[name], strict=True)), name
