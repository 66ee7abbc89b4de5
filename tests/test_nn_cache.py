"""GQAttention with a cache: prefill and then single tokens give what one full forward gives; what it refuses; compiled."""

import re

import pytest
import torch
import torch._dynamo.testing
from nn_cases import H_KV, SIZES, D, E, randomize
from torch._inductor.utils import run_and_get_code

from gqa_autograd import KVCache, PagedKVCache
from gqa_autograd.nn import GQAttention

EXACT = {"rtol": 0, "atol": 1e-10}
OPTIONS = {
    "plain": {},
    "rope": {"rope": 500.0, "qk_norm": True},
    "window": {"rope": 500.0, "window": 4},
    "softcap": {"rope": 500.0, "softcap": 1.5, "scale": 0.7},
    "one-head": {"rope": 500.0, "num_kv_heads": 1, "bias": True},
}
# Of each part how many tokens: prefill beyond what decoding takes, odd lengths, parts in the middle
PARTS = {"long": (71, 1, 1, 5), "short": (13, 1, 1, 1), "parts": (64, 7, 64, 1), "tokens": (1,) * 6, "two": (64, 1)}


def make(options: str) -> GQAttention:
    return randomize(GQAttention(**{**SIZES, **OPTIONS[options]}, dtype=torch.float64))


def dense(module: GQAttention, batch: int, length: int) -> KVCache:
    return KVCache(batch, length, module.num_kv_heads, D, dtype=torch.float64)


def paged(module: GQAttention, batch: int, length: int) -> PagedKVCache:
    """All places in use, the pages of the sequences in turn."""
    pages = -(-length // 16)
    cache = PagedKVCache(batch * pages + 3, 16, module.num_kv_heads, D, batch=batch, dtype=torch.float64)
    for b in range(batch):
        cache.add([b])
    for n in range(pages):
        for b in reversed(range(batch)):
            cache.grow(b, 16 * n + 1)
    # Whatever stands behind the tokens must not matter
    for t in (*cache.k, *cache.v):
        t.fill_(torch.nan)
    return cache


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("kind", [dense, paged])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("options", OPTIONS)
def test_parts_equal_one_forward(options, parts, kind):
    module, lengths = make(options), PARTS[parts]
    x = torch.randn(2, sum(lengths), E, dtype=torch.float64)
    cache = kind(module, 2, sum(lengths))
    y, lse = zip(*(module(part, kv_cache=cache, return_lse=True) for part in x.split(lengths, dim=1)), strict=True)
    want, want_lse = module(x, return_lse=True)
    torch.testing.assert_close(torch.cat(y, dim=1), want, **EXACT)
    torch.testing.assert_close(torch.cat(lse, dim=2), want_lse, **EXACT)
    assert cache.lengths.tolist() == [sum(lengths)] * 2


@pytest.mark.parametrize(("kind", "how"), [(dense, "padded"), (dense, "rows"), (paged, "rows")])
@pytest.mark.parametrize("options", OPTIONS)
def test_sequences_of_different_lengths(options, kind, how):
    """Prompts padded on the right and cropped, or fed by themselves; then tokens for all of them, of which each has other positions."""
    module, lengths = make(options), (3, 70, 17)
    prompts = [torch.randn(1, length, E, dtype=torch.float64) for length in lengths]
    tokens = torch.randn(3, 4, E, dtype=torch.float64)
    cache = kind(module, 3, 75)
    if how == "rows":
        for b, prompt in enumerate(prompts):
            module(prompt, kv_cache=cache.row(b))
    else:
        rows = [torch.nn.functional.pad(prompt, (0, 0, 0, 70 - prompt.shape[1]), value=9.0) for prompt in prompts]
        module(torch.cat(rows), kv_cache=cache)
        cache.crop(torch.tensor(lengths, dtype=torch.int32))
    y = torch.cat([module(token, kv_cache=cache) for token in tokens.split((1, 2, 1), dim=1)], dim=1)
    for b, prompt in enumerate(prompts):
        want = module(torch.cat((prompt, tokens[b : b + 1]), dim=1))[:, lengths[b] :]
        torch.testing.assert_close(y[b : b + 1], want, **EXACT)


def test_layers_share_lengths():
    modules = [make("rope") for _ in range(3)]
    cache = KVCache(2, 9, H_KV, D, layers=3, dtype=torch.float64)
    x = torch.randn(2, 9, E, dtype=torch.float64)

    def run(x, use):
        for i, module in enumerate(modules):
            x = x + module(x, kv_cache=cache.layer(i) if use else None)
        return x

    got = torch.cat([run(part, True) for part in x.split((5, 1, 3), dim=1)], dim=1)
    torch.testing.assert_close(got, run(x, False), **EXACT)
    assert cache.lengths.tolist() == [9, 9]


def test_a_shared_prefix_is_not_computed_again():
    module = make("rope")
    vocabulary = torch.randn(50, E, dtype=torch.float64)
    cache = PagedKVCache(9, 16, H_KV, D, batch=2, dtype=torch.float64)
    prompt = torch.randint(50, (40,)).tolist()
    first, _ = cache.add(prompt)
    module(vocabulary[prompt][None], kv_cache=cache.row(first))
    cache.share(first)
    other = [*prompt[:35], 7, 8, 9, 10, 11, 12]
    second, cached = cache.add(other)
    assert cached == 32
    y = module(vocabulary[other[cached:]][None], kv_cache=cache.row(second))
    torch.testing.assert_close(y, module(vocabulary[other][None])[:, cached:], **EXACT)


def test_a_place_that_is_not_in_use():
    module = make("rope")
    cache = PagedKVCache(4, 16, H_KV, D, batch=3, dtype=torch.float64)
    for tokens in ([1], [2], [3]):
        cache.add(tokens, room=3)
    cache.free(1)
    before = [t.clone() for t in (*cache.k, *cache.v)]
    x = torch.randn(3, 2, E, dtype=torch.float64)
    y = module(x, kv_cache=cache)
    assert cache.lengths.tolist() == [2, 0, 2]
    torch.testing.assert_close(y[[0, 2]], module(x[[0, 2]]), **EXACT)
    assert not y[1].any()
    # The page of the sequence that is gone, and the one that never had any
    for t, old in zip((*cache.k, *cache.v), before, strict=True):
        changed = (t != old).flatten(1).any(1)
        assert changed.tolist() == [True, False, True, False]


def test_positions_of_the_caller_come_first():
    module = make("rope")
    x = torch.randn(2, 6, E, dtype=torch.float64)
    cache = dense(module, 2, 6)
    stretched = 3 * torch.arange(6)
    parts = [module(x[:, :4], kv_cache=cache, positions=stretched[:4]), module(x[:, 4:], kv_cache=cache, positions=stretched[4:])]
    torch.testing.assert_close(torch.cat(parts, dim=1), module(x, positions=stretched), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype):
    module = randomize(GQAttention(**SIZES, rope=500.0))
    cache = KVCache(2, 6, H_KV, D, dtype=dtype)
    x = torch.randn(2, 6, E)
    with torch.autocast("cpu", dtype):
        y = torch.cat([module(part, kv_cache=cache) for part in x.split((5, 1), dim=1)], dim=1)
        want = module(x)
    assert y.dtype is dtype
    torch.testing.assert_close(y, want, rtol=0.05, atol=0.05)


# --- refusals ---
CU = torch.tensor([0, 4], dtype=torch.int32)
LAYERS = KVCache(1, 8, H_KV, D, layers=2)


def used(S):
    cache = KVCache(1, 99, H_KV, D)
    cache.layer().append(*torch.zeros(2, 1, S, H_KV, D))
    return cache


@pytest.mark.parametrize(
    ("options", "S", "cache", "call", "error", "message"),
    [
        ({}, 4, lambda: LAYERS, {}, ValueError, "kv_cache must be one layer, cache.layer(i), got a KVCache of 2"),
        ({}, 4, lambda: [LAYERS], {}, TypeError, "kv_cache must be a KVCache, a PagedKVCache or a layer of one, got list"),
        ({"causal": False}, 4, lambda: used(0), {}, NotImplementedError, "kv_cache needs causal=True, got causal=False"),
        ({"v_head_dim": 8}, 4, lambda: used(0), {}, NotImplementedError, "got head_dim=16, v_head_dim=8"),
        ({}, 65, lambda: used(1), {}, NotImplementedError, "x must have at most 64 tokens where kv_cache may have some already, got S=65"),
    ],
)
def test_refused(options, S, cache, call, error, message):
    with pytest.raises(error, match="^GQAttention: .*" + re.escape(message)):
        GQAttention(**SIZES, **options)(torch.randn(1, S, E), kv_cache=cache(), **call)


def test_packed_sequences_are_refused():
    with pytest.raises(NotImplementedError, match="kv_cache takes no packed x, got cu_seqlens"):
        GQAttention(**SIZES)(torch.randn(4, E), cu_seqlens=CU, kv_cache=used(0))


def test_a_gradient_is_refused_before_anything_is_written():
    module, cache = GQAttention(**SIZES), KVCache(1, 8, H_KV, D)
    with torch.enable_grad(), pytest.raises(RuntimeError, match=r"GQAttention: kv_cache is for inference, call it under torch\.no_grad"):
        module(torch.randn(1, 4, E), kv_cache=cache)
    assert not cache.k[0].any()
    assert cache.lengths.tolist() == [0]


# --- compiled ---
def test_compiled_step_copies_no_cache():
    """One graph for all steps, no clone of the cache in it, and the cache stays where it is. Without rope, Inductor has little to build."""
    module = make("plain")
    cache, other = dense(module, 3, 400), dense(module, 3, 400)
    x = torch.randn(3, 9, E, dtype=torch.float64)
    for one in (cache, other):
        module(x[:, :5], kv_cache=one)
        one.crop(torch.tensor([5, 2, 4], dtype=torch.int32))
    addresses = [t.data_ptr() for t in (*cache.k, *cache.v, cache.lengths)]
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    step = torch.compile(module, backend=counter, fullgraph=True)
    y, (code,) = run_and_get_code(step, x[:, 5:6], kv_cache=cache)
    y = torch.cat([y, *(step(token, kv_cache=cache) for token in x[:, 6:].split(1, dim=1))], dim=1)
    want = torch.cat([module(token, kv_cache=other) for token in x[:, 5:].split(1, dim=1)], dim=1)
    torch.testing.assert_close(y, want, **EXACT)
    assert counter.frame_count == 1
    assert [t.data_ptr() for t in (*cache.k, *cache.v, cache.lengths)] == addresses
    torch.testing.assert_close((cache.k, cache.v, cache.lengths), (other.k, other.v, other.lengths), **EXACT)
    assert code.count("torch.ops.gqa_autograd.cache_append_.default(") == 1
    # All that is allocated together is small beside one of the two caches
    made = [torch.Size(map(int, shape.split(","))).numel() for shape in re.findall(r"= empty_strided_\w+\(\(([\d, ]*\d)", code)]
    assert made
    assert sum(made) < cache.k[0].numel() // 4


def test_compiled_prefill_then_steps():
    """The prefill of an empty cache takes the attention of the prompt alone, and tells the host that it is empty no more."""
    module = make("rope")
    cache = PagedKVCache(20, 16, H_KV, D, batch=2, dtype=torch.float64)
    x = torch.randn(2, 73, E, dtype=torch.float64)
    for b in range(2):
        cache.add([b], room=80)
    step = torch.compile(module, backend="aot_eager", fullgraph=True)
    y = [step(part, kv_cache=cache) for part in x.split((70, 1, 1, 1), dim=1)]
    torch.testing.assert_close(torch.cat(y, dim=1), module(x), **EXACT)
    assert not cache.layer().empty
    with pytest.raises(NotImplementedError, match="at most 64 tokens where kv_cache may have some"):
        module(x, kv_cache=cache)
    cache.reset()
    assert cache.layer().empty


@pytest.mark.parametrize("compiled", [False, True])
def test_tokens_that_the_host_has_not_seen_are_noticed(compiled):
    """As a replayed graph appends them after a reset: a long prompt would not see them."""
    module, cache = make("rope"), KVCache(2, 90, H_KV, D, dtype=torch.float64)
    cache.lengths[1] = 3
    call = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    assert cache.layer().empty
    with torch.no_grad(), pytest.raises(RuntimeError, match="kv_cache has tokens that the host does not know of"):
        call(torch.randn(2, 70, E, dtype=torch.float64), kv_cache=cache)
    assert not any(t.any() for t in (*cache.k, *cache.v))
    assert cache.lengths.tolist() == [0, 3]


def test_adding_and_growing_does_not_recompile():
    module = make("rope")
    cache = PagedKVCache(20, 16, H_KV, D, batch=3, dtype=torch.float64)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(module, backend=counter, fullgraph=True)
    for n in range(3):
        cache.add([n])
        step(torch.randn(3, 1, E, dtype=torch.float64), kv_cache=cache)
        cache.grow(0, 16 * n + 5)
    cache.free(1)
    step(torch.randn(3, 1, E, dtype=torch.float64), kv_cache=cache)
    assert cache.lengths.tolist() == [4, 0, 2]
    assert counter.frame_count == 1


def test_inference_mode():
    module, cache = make("rope"), KVCache(1, 8, H_KV, D, dtype=torch.float64)
    x = torch.randn(1, 3, E, dtype=torch.float64)
    with torch.inference_mode():
        y = torch.cat([module(part, kv_cache=cache) for part in x.split(1, dim=1)], dim=1)
    torch.testing.assert_close(y, module(x), **EXACT)
