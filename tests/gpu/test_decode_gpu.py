"""Decoding on the GPU: closeness, isolation, equal bits, streams, graphs whose lengths change in place, tables that lie, host time.

Outputs start as NaN, and so does every row of the cache that is no key."""

import dataclasses
import itertools
import math

import pytest
import torch
from tools import kernels_of, no_synchronisation, same_bits

import gqa_autograd
from gqa_autograd import attention_decode, attention_decode_with_lse, plans, testing, testing_decode
from gqa_autograd.kernels import config
from gqa_autograd.testing_decode import CASES, DecodeCase

pytestmark = pytest.mark.gpu
BF16, F16 = torch.bfloat16, torch.float16
RATIOS = (1, 2, 3, 5, 6, 7, 8, 12, 16, 71)
QUERIES = (1, 2, 3, 4, 7, 16, 63, 64)
PAGES = (None, 16, 32, 64, 128, 256)
MASKS = ({}, {"causal": False}, {"window": (300, -1)}, {"causal": False, "window": (40, 2)})


def _matrix():
    """Every ratio with every number of queries and with every size of page; head sizes, dtypes, masks and lengths go round."""
    pages = itertools.cycle((PAGES, PAGES[1:], PAGES[::-1]))
    lengths = itertools.cycle(((1, 17, 127), (128, 0, 129), (2048, 5, 300), (700,), (64, 63, 65, 2), (1, 4000)))
    rest = itertools.cycle(itertools.product((128, 64, 256), (BF16, F16), (0.0, 30.0), MASKS))
    for n, (G, S_q) in enumerate(itertools.product(RATIOS, QUERIES)):
        D, dtype, softcap, mask = next(rest)
        H_kv = 1 if G > 12 else 2
        layout = ("bshd", "bhsd", "fused")[n % 3]
        yield DecodeCase(S_q, next(lengths), G * H_kv, H_kv, D, next(pages)[n % 5], softcap=softcap, dtype=dtype, layout=layout, **mask)


MATRIX = tuple(_matrix())
LONG = (
    DecodeCase(1, (65536, 65536), 96, 8, 128),
    DecodeCase(1, (65536, 1), 96, 8, 128, S_page=16),
    DecodeCase(4, (30000, 0, 12345), 64, 8, 128, S_page=64),
    DecodeCase(8, (131072,), 8, 1, 128),
    DecodeCase(1, (9000,) * 100, 8, 8, 64),
    DecodeCase(1, tuple(37 * n % 4001 for n in range(257)), 32, 8, 128, S_page=256),
    DecodeCase(64, (5000, 3000), 12, 1, 128),
    DecodeCase(2, (40000,), 32, 2, 256, dtype=F16),
    DecodeCase(1, (50000, 50000), 12, 2, 128, window=(4095, -1)),
)


def run(given, **changed):
    return attention_decode_with_lse(*given.arguments, **{**given.options, **changed})


@pytest.mark.parametrize("case", [*CASES, *MATRIX, *LONG], ids=str)
def test_closeness(case):
    given = testing_decode.make(case, "cuda")
    with testing.poisoned():
        out, lse = run(given)
        without_lse = attention_decode(*given.arguments, **given.options)
    assert same_bits(out, without_lse)
    testing_decode.check(given, out, lse)


@pytest.mark.parametrize("G", RATIOS)
@pytest.mark.parametrize("S_q", [1, 5, 64])
def test_packed_equals_unpacked(G, S_q):
    """Against our own `attention`, which has a tile for each query head."""
    given = testing_decode.make(DecodeCase(S_q, (1000, 1000), 2 * G, 2, 128), "cuda")
    out, lse = run(given)
    with torch.no_grad():
        unpacked, unpacked_lse = gqa_autograd.attention_with_lse(given.q, given.k_cache, given.v_cache, causal=True)
    torch.testing.assert_close(out, unpacked, rtol=2**-6, atol=2**-8)
    torch.testing.assert_close(lse, unpacked_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("S_page", PAGES[1:])
def test_pages_are_a_dense_cache(S_page):
    """Bit for bit: a tile has the same keys wherever they lie."""
    case = DecodeCase(3, (3000, 0, 17, 256, 1999), 12, 2, 128, S_page)
    given = testing_decode.make(case, "cuda")
    dense = [torch.full((5, max(case.lengths), 2, 128), math.nan, dtype=BF16, device="cuda") for _ in "kv"]
    for n, length in enumerate(case.lengths):
        for cache, pages in zip(dense, (given.k_cache, given.v_cache), strict=True):
            cache[n, :length] = testing_decode._keys(given, pages, n, length)
    for got, want in zip(run(given), attention_decode_with_lse(given.q, *dense, given.cache_seqlens), strict=True):
        assert same_bits(got, want)


def test_ones_in_v_give_one():
    given = testing_decode.make(DecodeCase(1, (5000, 77), 96, 8, 128), "cuda")
    out = attention_decode(given.q, given.k_cache, torch.ones_like(given.v_cache), given.cache_seqlens).float()
    assert (out - 1).abs().max() <= 2**-7
    assert (out.double().mean() - 1).abs() <= 2**-11


def test_nothing_to_see():
    given = testing_decode.make(DecodeCase(3, (0, 0), 12, 2, 128, S_max=100), "cuda")
    empty = given._replace(k_cache=given.k_cache[:, :0], v_cache=given.v_cache[:, :0])
    for some in (given, empty):
        with testing.poisoned():
            out, lse = run(some)
        assert out.eq(0).all()
        assert lse.eq(-math.inf).all()
    assert run(given._replace(q=given.q[:, :0]))[0].shape == (2, 0, 12, 128)


def test_offsets_past_two_to_the_31():
    """A pool of more than 2^31 elements, whose last pages are used."""
    P = 2**31 // (256 * 8 * 128) + 9
    k, v = (torch.empty(P, 256, 8, 128, dtype=BF16, device="cuda") for _ in "kv")
    small = testing_decode.make(DecodeCase(2, (700, 300), 64, 8, 128, S_page=256), "cuda")
    shift = P - small.k_cache.shape[0]
    k[shift:], v[shift:] = small.k_cache, small.v_cache
    big = small._replace(k_cache=k, v_cache=v, page_table=small.page_table.clamp(0, 8) + shift)
    for got, want in zip(run(big), run(small), strict=True):
        assert same_bits(got, want)


# --- what only the device can see ---
FAR = 2**31 - 1
NONSENSE = {
    "lengths_beyond": ([FAR, 500, 257], None),
    "lengths_negative": ([-1, -FAR - 1, 100], None),
    "pages": ([200, 256, 100], [[-1, 0, 99, 1], [FAR, 2, -FAR - 1, 3], [5, 5, 5, 5]]),
    "no_page": ([256, 10, 0], [[-1] * 4, [6] * 4, [-1] * 4]),
}


@pytest.mark.parametrize(("lengths", "pages"), NONSENSE.values(), ids=NONSENSE)
@pytest.mark.parametrize("S_page", [16, 32, 64, 128])
def test_lengths_and_pages_are_not_trusted(lengths, pages, S_page):
    """onnxruntime#32391, FA#1773: clamped and masked as the definition does it, and never read. Also run under compute-sanitizer."""
    given = testing_decode.make(DecodeCase(2, (4 * S_page,) * 3, 6, 2, 128, S_page, window=(150, -1)), "cuda")
    table = torch.tensor(pages or [[0, 1, 2, 3]] * 3, dtype=torch.int32, device="cuda")
    # The pool ends after six pages; behind it lie NaN
    pools = [torch.cat((t[:6].nan_to_num(), torch.full_like(t[:6], math.nan)))[:6] for t in (given.k_cache, given.v_cache)]
    given = given._replace(k_cache=pools[0], v_cache=pools[1], page_table=table)
    given = given._replace(cache_seqlens=torch.tensor(lengths, dtype=torch.int32, device="cuda"))
    with testing.poisoned():
        out, lse = run(given)
    wanted, wanted_lse = testing_decode.exact(given)
    assert (out - wanted).abs().max() < 2e-2
    testing.assert_lse(lse, wanted_lse)


def test_long_lengths_of_a_dense_cache_are_clamped():
    given = testing_decode.make(DecodeCase(1, (300, 300), 12, 2, 128), "cuda")
    wanted = run(given)
    for got, want in zip(run(given._replace(cache_seqlens=given.cache_seqlens + 10**9)), wanted, strict=True):
        assert same_bits(got, want)


# --- bits, streams, graphs ---
@pytest.mark.parametrize("case", [LONG[0], LONG[2], LONG[5], CASES[4], CASES[-1]], ids=str)
def test_runs_are_bit_equal(case):
    """A thousand, without waiting between them; who comes last to merge differs from run to run."""
    given = testing_decode.make(case, "cuda")
    first = run(given)
    differs = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        for a, b in zip(run(given), first, strict=True):
            differs += (a.view(torch.uint8) != b.view(torch.uint8)).any()
    assert int(differs) == 0


def test_streams_do_not_share_counters():
    given = testing_decode.make(LONG[2], "cuda")
    wanted = run(given)
    streams = [torch.cuda.Stream() for _ in range(6)]
    torch.cuda.synchronize()
    results = []
    for n in range(120):
        with torch.cuda.stream(streams[n % 6]):
            results.append(run(given))
    torch.cuda.synchronize()
    assert all(same_bits(a, b) for result in results for a, b in zip(result, wanted, strict=True))


def captured(given):
    run(given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(given)
    return graph, results


@pytest.mark.parametrize("S_page", [None, 16, 128])
def test_a_graph_stays_right_when_lengths_and_pages_change_in_place(S_page):
    """vllm#20301: nothing about the lengths is decided at capture."""
    case = DecodeCase(2, (4000,) * 6, 12, 2, 128, S_page)
    given = testing_decode.make(case, "cuda")
    graph, results = captured(given)
    for lengths in ((4000,) * 6, (1, 0, 2, 3, 64, 65), (4000, 0, 0, 0, 0, 0), (0,) * 6, (17, 3999, 128, 1000, 2, 2500), (4000,) * 6):
        changed = testing_decode.make(dataclasses.replace(case, lengths=lengths, S_max=4000), "cuda", seed=sum(lengths))
        for mine, theirs in zip((given.q, given.cache_seqlens), (changed.q, changed.cache_seqlens), strict=True):
            mine.copy_(theirs)
        for mine, theirs in ((given.k_cache, changed.k_cache), (given.v_cache, changed.v_cache)):
            mine[: len(theirs)] = theirs
        if S_page:
            given.page_table.copy_(changed.page_table)
        for t in results:
            t.fill_(math.nan)
        graph.replay()
        testing_decode.check(changed, *results)


def test_graphs_replayed_side_by_side():
    """Each captured launch has counters of its own."""
    given = [testing_decode.make(dataclasses.replace(LONG[2], lengths=(30000 - 500 * n, 0, 12345)), "cuda") for n in range(4)]
    wanted = [run(g) for g in given]
    graphs = [captured(g) for g in given]
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(30):
        for stream, (graph, _) in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for (_, results), want in zip(graphs, wanted, strict=True):
        assert all(same_bits(a, b) for a, b in zip(results, want, strict=True))


# --- launches ---
def test_one_kernel_and_no_waiting():
    given = testing_decode.make(LONG[0], "cuda")
    run(given)
    with no_synchronisation():
        run(given)
    (name,) = kernels_of(lambda: run(given))
    assert "attention_decode" in name


def test_one_build_per_configuration():
    from gqa_autograd.kernels import build

    run(testing_decode.make(DecodeCase(1, (100,), 4, 1, 128), "cuda"))
    before = build.built()
    for n in range(30):
        case = DecodeCase(1 + n, (5 + 11 * n, n), 1 + n, 1, 128, causal=n % 2 == 0, window=(n, -1) if n % 3 else (-1, -1))
        run(testing_decode.make(case, "cuda"))
    assert build.built() == before


def test_an_equal_call_runs_its_plan():
    given = testing_decode.make(CASES[4], "cuda")
    plans._plans.clear()
    wanted = run(given)
    assert len(plans._plans) == 1
    assert all(same_bits(a, b) for a, b in zip(run(given), wanted, strict=True))
    assert len(plans._plans) == 1


@pytest.mark.parametrize("case", [CASES[6], CASES[2]], ids=str)
def test_compiled(case):
    given = testing_decode.make(case, "cuda")
    compiled = torch.compile(attention_decode_with_lse, fullgraph=True)
    for got, want in zip(compiled(*given.arguments, **given.options), run(given), strict=True):
        assert same_bits(got, want)


def test_compiled_with_cuda_graphs():
    given = testing_decode.make(DecodeCase(1, (2000, 100), 12, 2, 128), "cuda")
    compiled = torch.compile(attention_decode, mode="reduce-overhead", fullgraph=True)
    for length in (2000, 2000, 1000, 5, 0, 2000):
        given.cache_seqlens.fill_(length)
        # Keys of the second sequence behind its 100 are NaN
        given.cache_seqlens[1].clamp_(max=100)
        torch.compiler.cudagraph_mark_step_begin()
        assert same_bits(compiled(*given.arguments).clone(), attention_decode(*given.arguments))


def test_a_cache_is_not_copied():
    """Views of a larger buffer and a permuted cache are read in place, and what could not be is refused."""
    buffer = torch.randn(2, 2, 500, 2, 2, 128, dtype=BF16, device="cuda")
    k, v = buffer[0, :, :, 0], buffer[0, :, :, 1]
    q = torch.randn(2, 1, 12, 128, dtype=BF16, device="cuda")
    lengths = torch.tensor((500, 333), dtype=torch.int32, device="cuda")
    want = attention_decode(q, k.contiguous(), v.contiguous(), lengths)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert same_bits(attention_decode(q, k, v, lengths), want)
    tile = config.decode("", 128, None, 0.0)
    workspace = 2 * 132 * tile.blocks_per_sm * 6 * (128 + 4) * 4
    assert torch.cuda.max_memory_allocated() - before <= workspace + 2**16
    with pytest.raises(ValueError, match="attention_decode: v_cache on CUDA must begin at a multiple of 16 bytes"):
        attention_decode(q, k, torch.randn(2 * 500 * 2 * 128 + 1, dtype=BF16, device="cuda")[1:].view(2, 500, 2, 128), lengths)
