"""Decoding on a CPU: closeness to float64, pages against a dense cache, operators, compile. What is refused is in test_checks_decode.py."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from gqa_autograd import attention_decode, attention_decode_with_lse, attention_with_lse, flops, ops_decode, testing, testing_decode
from gqa_autograd.testing_decode import CASES, DecodeCase

F32, F64 = torch.float32, torch.float64
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic")
OPERATORS = [ops_decode.attention_decode_fwd, ops_decode.attention_decode_fwd_lse]
# Sizes are distinct (pitfall 10)
DENSE = DecodeCase(5, (40, 0, 3), 6, 2, 8, S_max=49, dtype=F32)
PAGED = DecodeCase(5, (40, 0, 3), 6, 2, 8, S_page=16, S_max=60, dtype=F32)
PERMUTED, FUSED = dataclasses.replace(DENSE, layout="bhsd"), dataclasses.replace(PAGED, layout="fused")
RATIOS = (1, 2, 3, 5, 6, 7, 8, 12, 16, 71)


def run(given, **changed):
    return attention_decode_with_lse(*given.arguments, **{**given.options, **changed})


# --- values ---
@pytest.mark.parametrize("case", CASES, ids=str)
def test_closeness(case):
    """Behind the last key the cache is NaN, and behind the last page the table names none."""
    given = testing_decode.make(case)
    with testing.poisoned():
        out, lse = run(given)
        assert torch.equal(attention_decode(*given.arguments, **given.options), out)
    testing_decode.check(given, out, lse)


@pytest.mark.parametrize("S_q", [1, 2, 3, 4, 7, 16, 63, 64])
@pytest.mark.parametrize("G", RATIOS)
def test_every_ratio(G, S_q):
    """Each sequence is `attention` of its own keys, in float64 to its last bits."""
    case = DecodeCase(S_q, (33, 0, 70, S_q), 2 * G, 2, 16, S_max=81, dtype=F64)
    given = testing_decode.make(case)
    out, lse = run(given)
    for n, length in enumerate(case.lengths):
        keys, values = given.k_cache[n : n + 1, :length], given.v_cache[n : n + 1, :length]
        wanted, wanted_lse = attention_with_lse(given.q[n : n + 1], keys, values, causal=True)
        torch.testing.assert_close(out[n], wanted[0])
        torch.testing.assert_close(lse[n], wanted_lse[0])


@pytest.mark.parametrize("S_page", [16, 32, 64, 128, 256])
def test_pages_are_a_dense_cache(S_page):
    case = DecodeCase(3, (300, 0, 17, 256), 6, 2, 16, S_page, dtype=F64)
    given = testing_decode.make(case)
    dense = [torch.full((4, 300, 2, 16), math.nan, dtype=F64) for _ in "kv"]
    for n, length in enumerate(case.lengths):
        for cache, pages in zip(dense, (given.k_cache, given.v_cache), strict=True):
            cache[n, :length] = testing_decode._keys(given, pages, n, length)
    for got, want in zip(run(given), attention_decode_with_lse(given.q, *dense, given.cache_seqlens), strict=True):
        assert torch.equal(got, want)


def test_queries_before_the_first_key_see_nothing():
    given = testing_decode.make(DecodeCase(5, (0, 2, 5), 4, 2, 8, S_max=7, dtype=F32))
    out, lse = run(given)
    for n, blind in enumerate((5, 3, 0)):
        assert bool((out[n, :blind] == 0).all())
        assert bool((lse[n, :, :blind] == -math.inf).all())
        assert bool(lse[n, :, blind:].isfinite().all())


@pytest.mark.parametrize("case", [DENSE, PAGED], ids=str)
def test_empty(case):
    """No sequence, no query, no query head, a cache that holds nothing."""
    given = testing_decode.make(case)
    for q in (given.q[:, :0], given.q[:, :, :0]):
        out, lse = run(given._replace(q=q))
        assert out.shape == q.shape
        assert lse.numel() == 0
    nothing = given._replace(k_cache=given.k_cache[:, :0], v_cache=given.v_cache[:, :0], cache_seqlens=torch.zeros(3, dtype=torch.int32))
    if case.S_page:
        nothing = nothing._replace(k_cache=given.k_cache, v_cache=given.v_cache, page_table=given.page_table[:, :0])
    out, lse = run(nothing)
    assert bool((out == 0).all())
    assert bool((lse == -math.inf).all())
    whole = given.k_cache[:0], given.v_cache[:0]
    caches = (given.k_cache, given.v_cache) if case.S_page else whole
    table = given.page_table[:0] if case.S_page else None
    assert attention_decode(given.q[:0], *caches, given.cache_seqlens[:0], page_table=table).shape == (0, 5, 6, 8)


def test_masked_pages_of_the_definition():
    """What a kernel does with pages that are not there, where the operator on a CPU refuses: their keys are as if they were cut out."""
    given = testing_decode.make(DecodeCase(1, (64,), 4, 2, 8, S_page=16, dtype=F64))
    given.page_table[0, 1] = -7
    out, lse = testing_decode.exact(given)
    left = [torch.cat([t[given.page_table[0, n].item()] for n in (0, 2, 3)])[None] for t in (given.k_cache, given.v_cache)]
    for got, want in zip((out, lse), attention_with_lse(given.q, *left), strict=True):
        torch.testing.assert_close(got, want)


# --- operators ---
@pytest.mark.parametrize("case", [DENSE, PAGED, PERMUTED, FUSED], ids=str)
@pytest.mark.parametrize("settings", [(-1, 0, None, 0.0), (4, 1, 0.3, 15.0)])
@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator, settings, case):
    given = testing_decode.make(case)
    opcheck(operator, (*given.arguments, given.page_table, *settings), test_utils=CHECKS)


@pytest.mark.parametrize("case", [PERMUTED, FUSED], ids=str)
def test_the_strides_of_q_do_not_leak(case):
    """out is contiguous, in eager and as the fake says it."""
    given = testing_decode.make(case)
    assert not given.q.is_contiguous()
    assert run(given)[0].is_contiguous()
    assert attention_decode(
        *(t.to("meta") for t in given.arguments), page_table=None if case.S_page is None else given.page_table.to("meta")
    ).is_contiguous()


def test_which_body_runs():
    given = testing_decode.make(PAGED)
    with testing.recorded() as bodies:
        attention_decode(*given.arguments, **given.options)
        run(given)
    assert bodies == ["attention_decode_fwd", "attention_decode_fwd_lse"]


def test_autocast_casts_the_query_and_never_the_cache():
    given = testing_decode.make(dataclasses.replace(DENSE, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.float16):
        out = attention_decode(given.q.float(), *given.arguments[1:])
    assert torch.equal(out, attention_decode(*given.arguments))


def test_flops():
    given = testing_decode.make(dataclasses.replace(DENSE, window=(9, -1)))
    with FlopCounterMode(display=False) as counter:
        run(given)
    seen = sum(1 for L, i, j in itertools.product((40, 0, 3), range(5), range(40)) if j < L and L - 5 + i - 9 <= j <= L - 5 + i)
    assert counter.get_total_flops() == 4 * 6 * 8 * seen
    # Where nobody may ask for the lengths, the caches count as full
    assert flops.decode_pairs(5, 49, given.cache_seqlens.to("meta"), -1, 0) == 3 * flops.visible_pairs(5, 49, -1, 0)


# --- compile ---
@pytest.mark.parametrize("case", [DENSE, PAGED], ids=str)
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_fullgraph(backend, case):
    """One graph whatever the lengths hold; another number of sequences and another capacity need one more."""
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(attention_decode_with_lse, backend=counter, fullgraph=True)
    given = testing_decode.make(case)
    for lengths in ((40, 0, 3), (1, 0, 2), (0, 0, 0)):
        changed = given._replace(cache_seqlens=torch.tensor(lengths, dtype=torch.int32))
        for got, want in zip(compiled(*changed.arguments, **changed.options), run(changed), strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 1
    for B, S_max in ((4, 100), (7, 150), (11, 200)):
        other = testing_decode.make(dataclasses.replace(case, lengths=(30,) * B, S_max=S_max))
        for got, want in zip(compiled(*other.arguments, **other.options), run(other), strict=True):
            torch.testing.assert_close(got, want)
    assert counter.frame_count == 2


def test_lengths_that_change_in_place_are_seen():
    given = testing_decode.make(DecodeCase(1, (40, 40), 6, 2, 8, dtype=F32))
    compiled = torch.compile(attention_decode, backend="aot_eager", fullgraph=True)
    for length in (40, 7, 0, 39):
        given.cache_seqlens.fill_(length)
        torch.testing.assert_close(compiled(*given.arguments), attention_decode(*given.arguments))


def test_export():
    class Step(torch.nn.Module):
        def forward(self, *args):
            return attention_decode(*args[:4], page_table=args[4])

    given = testing_decode.make(PAGED)
    program = torch.export.export(Step(), (*given.arguments, given.page_table)).run_decompositions()
    names = [str(node.target) for node in program.graph.nodes if "gqa_autograd" in str(node.target)]
    assert names == ["gqa_autograd.attention_decode_fwd.default"]
    assert torch.equal(program.module()(*given.arguments, given.page_table), attention_decode(*given.arguments, **given.options))
