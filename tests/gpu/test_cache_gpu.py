"""Caches on a card: what the kernel writes and leaves alone, graphs, compile, memory, and that the host waits for nothing."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from cache_cases import ADVERSARIAL, ORDERLY, appended, make
from tools import no_synchronisation, same_bits
from torch._dynamo.utils import counters

from gqa_autograd import KVCache, PagedKVCache, testing
from gqa_autograd.nn import GQAttention
from gqa_autograd.ops_cache import cache_append_
from gqa_autograd.reference import cache as reference

pytestmark = pytest.mark.gpu
E, H_Q, H_KV, D = 256, 8, 2, 64
BF16 = {"dtype": torch.bfloat16, "device": "cuda"}


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


# --- the kernel ---
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*ORDERLY, *ADVERSARIAL], ids=str)
def test_append(case, dtype):
    tensors = make(case, dtype, "cuda")
    want = appended(case, tensors)
    cache_append_(*tensors)
    assert all(same_bits(got, wanted) for got, wanted in zip(tensors, want, strict=False))


@pytest.mark.parametrize("seed", range(20))
def test_random_tables_and_lengths(seed):
    """Each page in one place at most, the other entries anything; nothing outside the pools is touched either."""
    draw = torch.Generator().manual_seed(seed)
    B, S_new, P, S_page, entries = 5, 1 + seed * 7 % 40, 23, 16, 4
    strips = [torch.full((P * S_page * H_KV * D + 2 * 4096,), torch.nan, **BF16) for _ in "kv"]
    pools = [t[4096:-4096].view(P, S_page, H_KV, D) for t in strips]
    table = torch.randperm(P, generator=draw)[: B * entries].view(B, entries).int()
    wild = torch.randint(-(2**31), 2**31, (B, entries), generator=draw).int()
    table = torch.where(torch.rand(B, entries, generator=draw) < 0.3, wild, table)
    lengths = torch.randint(-2, entries * S_page + 3, (B,), generator=draw).int()
    lengths[seed % B] = (2**31 - 1, -(2**31), -1, entries * S_page)[seed % 4]
    new = [torch.randn(B, S_new, H_KV, D, generator=draw).bfloat16() for _ in "kv"]
    want = [pool.cpu() for pool in pools]
    reference.append(*want, *new, lengths, table)
    cache_append_(*pools, *(t.cuda() for t in new), lengths.cuda(), table.cuda())
    assert all(same_bits(pool.cpu(), wanted) for pool, wanted in zip(pools, want, strict=True))
    assert all(t[:4096].isnan().all() and t[-4096:].isnan().all() for t in strips)


def test_beyond_2_to_the_31_elements():
    B, S_max = 3, 2**20
    k_cache, v_cache = (torch.zeros(B, S_max, 8, 128, **BF16) for _ in "kv")
    assert k_cache.numel() > 2**31
    k, v = (torch.randn(B, 5, 8, 128, **BF16) for _ in "kv")
    lengths = torch.tensor([0, S_max - 5, S_max - 3], dtype=torch.int32, device="cuda")
    cache_append_(k_cache, v_cache, k, v, lengths)
    for cache, new in ((k_cache, k), (v_cache, v)):
        assert torch.equal(cache[0, :5], new[0])
        assert torch.equal(cache[1, -5:], new[1])
        assert torch.equal(cache[2, -3:], new[2, :3])
        assert int(cache.count_nonzero()) == int(new.count_nonzero()) - int(new[2, 3:].count_nonzero())


# --- layers ---
def layer(**options) -> GQAttention:
    return GQAttention(E, H_Q, H_KV, head_dim=D, rope=1e4, qk_norm=True, **options, **BF16)


def paged(batch: int, length: int) -> PagedKVCache:
    cache = PagedKVCache(batch * -(-length // 16), 16, H_KV, D, batch=batch, **BF16)
    for b in range(batch):
        cache.add([b], room=length - 1)
    for t in (*cache.k, *cache.v):
        t.fill_(torch.nan)
    return cache


def dense(batch: int, length: int) -> KVCache:
    return KVCache(batch, length, H_KV, D, **BF16)


@pytest.mark.parametrize("kind", [dense, paged])
@pytest.mark.parametrize("options", [{}, {"window": 50}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("lengths", [(200, 1, 1, 7), (64, 64, 33, 1), (1, 1, 1)], ids=str)
def test_parts_are_as_exact_as_one_forward(lengths, options, kind):
    module = layer(**options)
    x = torch.randn(2, sum(lengths), E, **BF16)
    cache = kind(2, sum(lengths))
    ours = torch.cat([module(part, kv_cache=cache) for part in x.split(lengths, dim=1)], dim=1)
    exact = copy.deepcopy(module).double().cpu()(x.double().cpu())
    testing.assert_no_worse(ours.cpu(), module(x).cpu(), exact, "y")


@pytest.mark.parametrize("kind", [dense, paged])
def test_a_captured_step_replays_as_it_runs(kind):
    """Other tokens and, in between, other lengths, all in place; the cache stays where it is and no memory is added."""
    module, (mine, theirs) = layer(), (kind(3, 400) for _ in range(2))
    prompt, tokens = torch.randn(3, 150, E, **BF16), torch.randn(3, 40, E, **BF16)
    for cache in (mine, theirs):
        for b, length in enumerate((150, 3, 70)):
            module(prompt[b : b + 1, :length], kv_cache=cache.row(b))
    x = tokens[:, :1].clone()
    want = [module(tokens[:, i : i + 1], kv_cache=theirs) for i in range(40)]
    assert same_bits(module(x, kv_cache=mine), want[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x, kv_cache=mine)
    addresses = [t.data_ptr() for t in (*mine.k, *mine.v, mine.lengths)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for i in range(1, 40):
        x.copy_(tokens[:, i : i + 1])
        graph.replay()
        assert same_bits(y, want[i])
    assert torch.cuda.max_memory_allocated() - before < 2**20
    assert [t.data_ptr() for t in (*mine.k, *mine.v, mine.lengths)] == addresses
    assert mine.lengths.tolist() == theirs.lengths.tolist() == [190, 43, 110]
    assert all(same_bits(a, b) for a, b in zip((*mine.k, *mine.v), (*theirs.k, *theirs.v), strict=True))


def test_replays_beyond_the_room_touch_nobody():
    module, cache = layer(), paged(2, 16)
    x = torch.randn(2, 1, E, **BF16)
    module(x, kv_cache=cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module(x, kv_cache=cache)
    for _ in range(15):
        graph.replay()
    before = [t.clone() for t in (*cache.k, *cache.v)]
    for _ in range(10):
        graph.replay()
    torch.cuda.synchronize()
    assert all(same_bits(t, old) for t, old in zip((*cache.k, *cache.v), before, strict=True))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("kind", [dense, paged])
def test_compiled_step_clones_no_cache(kind, mode):
    """Peak memory and addresses; and what the compiler captures itself, it does not skip because caches are written to."""
    module, (mine, theirs) = layer(), (kind(2, 2**17) for _ in range(2))
    size = mine.k[0].numel() * 2
    step = torch.compile(module, fullgraph=True, mode=mode)
    addresses = [t.data_ptr() for t in (*mine.k, *mine.v, mine.lengths)]
    counters.clear()
    for i in range(8):
        x = torch.randn(2, 1, E, **BF16)
        if i == 4:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(step(x, kv_cache=mine).clone(), module(x, kv_cache=theirs), rtol=0.02, atol=0.02)
    assert torch.cuda.max_memory_allocated() - before < size // 8
    assert [t.data_ptr() for t in (*mine.k, *mine.v, mine.lengths)] == addresses
    assert mine.lengths.tolist() == [8, 8]
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_the_host_waits_for_nothing():
    """Steps, and the bookkeeping of pages between them."""
    module, x = layer(), torch.randn(3, 1, E, **BF16)
    cache, rows = PagedKVCache(40, 16, H_KV, D, batch=3, **BF16), KVCache(3, 60, H_KV, D, **BF16)
    lengths = torch.tensor([1, 0, 1], dtype=torch.int32, device="cuda")
    prompt = torch.randn(1, 33, E, **BF16)

    def loop():
        first, _ = cache.add(range(40), room=3)
        module(prompt, kv_cache=cache.row(first))
        cache.share(first)
        second, cached = cache.add([*range(33), 7])
        assert cached == 32
        for n in range(5):
            cache.grow(first, 64 + 16 * n)
            module(x, kv_cache=cache)
            module(x, kv_cache=rows)
        rows.crop(lengths)
        rows.reset()
        cache.free(first)
        cache.free(second)

    loop()
    cache.pool = type(cache.pool)(40, 16)
    torch.cuda.synchronize()
    with no_synchronisation():
        loop()


# --- the example ---
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generation_by_replays_gives_the_tokens_of_calls(temperature):
    """The same compiled step, captured or called. Drawn tokens differ, but do change from replay to replay."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from lm.generation import Generator, copy_bandwidth
    from lm.model import LanguageModel, Shape

    model = LanguageModel(Shape(layers=2, dim=256, heads=4, kv_heads=2, context=512, qk_norm=True), 256).cuda()
    for weight in model.parameters():
        weight.normal_(std=0.2)
    model = model.bfloat16().eval()
    prompts = [[1, 2, 3], [*range(100)], [9] * 64]
    rows = []
    for captured in (True, False):
        generator = Generator(model, 160, 3, temperature, 0.9, compiled=True)
        generator._captured = not captured
        generator.prefill(prompts)
        rows.append([list(row) for row in zip(*generator.stream(60), strict=True)])
        assert generator.cache.lengths.tolist() == [62, 159, 123]
    if temperature == 0:
        assert rows[0] == rows[1]
    else:
        assert all(len(set(row)) > 10 for row in rows[0])
    assert copy_bandwidth(torch.device("cuda")) > 1e12
