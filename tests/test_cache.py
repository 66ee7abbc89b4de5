"""KVCache and PagedKVCache by themselves: what the host knows, refuses and shares."""

import random
import re

import pytest
import torch

from gqa_autograd import KVCache, PagedKVCache
from gqa_autograd.pages import PagePool
from gqa_autograd.reference import cache as reference

H_KV, D = 2, 4


def new(B, S):
    return torch.randn(2, B, S, H_KV, D).unbind(0)


# --- dense ---
def test_append_returns_the_lengths_with_the_new_tokens():
    cache = KVCache(2, 9, H_KV, D)
    k, v = new(2, 5)
    ends = cache.layer().append(k, v)
    assert (ends.tolist(), cache.lengths.tolist(), ends.dtype) == ([5, 5], [5, 5], torch.int32)
    # A copy: the next append must not change what an attention was handed
    cache.layer().append(*new(2, 1))
    assert ends.tolist() == [5, 5]
    torch.testing.assert_close((cache.k[0][:, :5], cache.v[0][:, :5]), (k, v))


def test_only_the_last_layer_moves_on():
    cache = KVCache(2, 9, H_KV, D, layers=3)
    for i in range(3):
        assert cache.lengths.tolist() == [0, 0]
        assert cache.layer(i).append(*new(2, 4)).tolist() == [4, 4]
    assert cache.lengths.tolist() == [4, 4]


def test_row_is_a_view():
    cache = KVCache(3, 9, H_KV, D, layers=2)
    k, v = new(1, 4)
    row = cache.row(1)
    for i in range(2):
        row.layer(i).append(k, v)
    assert cache.lengths.tolist() == [0, 4, 0]
    torch.testing.assert_close(cache.k[1][1:2, :4], k)
    assert not cache.v[0][[0, 2]].any()
    assert [cache.row(b).layer().empty for b in range(3)] == [True, False, True]
    row.reset()
    assert cache.layer().empty
    with pytest.raises(IndexError, match="KVCache: row must be from 0 to 2, got 3"):
        cache.row(3)
    # A row of a row is the same one
    cache.row(2).row(0).layer().append(k, v)
    assert cache.row(2).layer().empty  # layers=2: only the last one moves on
    cache.row(2).row(0).layer(1).append(k, v)
    assert cache.lengths.tolist() == [0, 0, 4]


@pytest.mark.parametrize("lengths", [3, torch.tensor([3, 7], dtype=torch.int32)], ids=["int", "tensor"])
def test_crop(lengths):
    cache = KVCache(2, 9, H_KV, D)
    cache.layer().append(*new(2, 5))
    cache.crop(lengths)
    assert cache.lengths.tolist() == ([3, 3] if isinstance(lengths, int) else [3, 5])
    cache.layer().append(*new(2, 4))
    cache.crop(torch.tensor([-5, 2], dtype=torch.int32))
    assert cache.lengths.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (-1, ValueError, "lengths must be at least 0, got -1"),
        (True, TypeError, "lengths must be an int or a tensor, got True"),
        (torch.tensor([1, 2]), TypeError, "lengths must be int32, got int64"),
        (torch.tensor([1], dtype=torch.int32), ValueError, "lengths must be [2] on cpu, got shape (1,) on cpu"),
    ],
    ids=str,
)
def test_crop_refuses(lengths, error, message):
    with pytest.raises(error, match="^KVCache: " + re.escape(message)):
        KVCache(2, 9, H_KV, D).crop(lengths)


def contents(cache):
    return [t.clone() for t in (*cache.k, *cache.v, cache.lengths)]


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda: new(2, 10), ValueError, "KVCache: sequence 0 must have room for the new tokens, got 0 + 10 tokens for 9 rows"),
        (lambda: new(3, 1), ValueError, "cache_append_: cache_seqlens must have shape (3,)"),
        (lambda: [t.double() for t in new(2, 1)], TypeError, "cache_append_: k_new must have the dtype of k_cache, got float64"),
        (lambda: [t[..., :2] for t in new(2, 1)], ValueError, "cache_append_: k_cache must have shape (2, 9, 2, 2)"),
        (lambda: [t.requires_grad_() for t in new(2, 1)], RuntimeError, "cache_append_: k_new must not require a gradient"),
    ],
    ids=["room", "batch", "dtype", "head", "gradient"],
)
def test_append_refuses_before_anything_is_written(made, error, message):
    cache = KVCache(2, 9, H_KV, D)
    before = contents(cache)
    with pytest.raises(error, match="^" + re.escape(message)):
        cache.layer().append(*made())
    torch.testing.assert_close(contents(cache), before, rtol=0, atol=0)
    assert cache.layer().empty


def test_what_the_host_has_appended_counts():
    """The device is not asked: a row that got more tokens than the others runs out first."""
    cache = KVCache(2, 9, H_KV, D)
    cache.layer().append(*new(2, 5))
    cache.row(1).layer().append(*new(1, 3))
    # As on a GPU, where the host can't see them
    cache.lengths.zero_()
    with pytest.raises(ValueError, match="sequence 1 must have room for the new tokens, got 8 \\+ 2 tokens for 9 rows"):
        cache.layer().append(*new(2, 2))
    cache.crop(7)
    cache.layer().append(*new(2, 2))
    cache.reset()
    cache.layer().append(*new(2, 9))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch": 0}, ValueError, "batch must be at least 1, got 0"),
        ({"max_length": 2.0}, TypeError, "max_length must be an int, got 2.0"),
        ({"layers": True}, TypeError, "layers must be an int, got True"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a floating-point type, got int8"),
    ],
    ids=str,
)
def test_constructor_refuses(change, error, message):
    with pytest.raises(error, match=re.escape(message)):
        KVCache(**{"batch": 2, "max_length": 9, "num_kv_heads": H_KV, "head_dim": D} | change)


# --- paged ---
def pages(num_pages=6, batch=3, **options):
    return PagedKVCache(num_pages, 16, H_KV, D, batch=batch, **options)


def fill(cache, sequence, tokens, cached=0):
    """Each token's key is its number."""
    values = torch.tensor(tokens[cached:], dtype=torch.float32).view(1, -1, 1, 1).expand(1, -1, H_KV, D)
    cache.row(sequence).layer().append(values, -values)


def held(cache, sequence):
    """The numbers in a sequence's pages."""
    length = int(cache.lengths[sequence])
    rows = cache.k[0][cache.page_table[sequence, : -(-length // 16)].long()].flatten(0, 1)
    return rows[:length, 0, 0].int().tolist()


def test_add_grow_free():
    cache = pages()
    first, cached = cache.add(range(20), room=5)
    assert (first, cached) == (0, 0)
    assert (cache.page_table[0] >= 0).tolist() == [True, True, False, False, False, False]
    fill(cache, first, range(20))
    second, _ = cache.add([7])
    assert second == 1
    fill(cache, second, [7])
    cache.grow(first, 32)
    assert cache.pool.available == 3
    cache.grow(first, 33)
    assert cache.pool.available == 2
    fill(cache, first, range(20, 48))
    assert held(cache, first) == [*range(48)]
    assert held(cache, second) == [7]
    cache.free(first)
    assert cache.lengths.tolist() == [0, 1, 0]
    assert (cache.page_table[0] == -1).all()
    assert cache.pool.available == 5
    assert cache.add([1])[0] == 0
    cache.reset()
    assert cache.pool.available == 6
    assert not cache.lengths.any()


def test_full_pages_of_a_prefix_are_shared():
    cache = pages(num_pages=5)
    prompt = [*range(100, 140)]
    first, _ = cache.add(prompt)
    fill(cache, first, prompt)
    # Not before it says that they are written
    assert cache.pool.match([*prompt, 1]) == []
    cache.share(first)
    second, cached = cache.add([*prompt[:33], 5])
    assert cached == 32
    fill(cache, second, [*prompt[:33], 5], cached)
    assert cache.page_table[second, :2].tolist() == cache.page_table[first, :2].tolist()
    assert [cache.pool.users(page) for page in cache.page_table[first, :3].tolist()] == [2, 2, 1]
    assert held(cache, second) == [*prompt[:33], 5]
    assert held(cache, first) == prompt
    cache.free(first)
    assert held(cache, second) == [*prompt[:33], 5]
    cache.free(second)
    assert cache.pool.available == 5
    # Known still, though nobody has them: one token is always left to compute
    third, cached = cache.add(prompt[:32])
    assert cached == 16
    fill(cache, third, prompt[:32], cached)
    assert held(cache, third) == prompt[:32]


def test_generated_tokens_can_be_shared():
    cache = pages()
    first, _ = cache.add([*range(10)], room=30)
    tokens = [*range(36)]
    fill(cache, first, tokens)
    cache.share(first, tokens)
    assert cache.add([*tokens, 9])[1] == 32


def test_the_same_tokens_elsewhere_are_not_the_same():
    """A page is known by what stands before it, too."""
    cache = pages(num_pages=9)
    prompt = [*([1] * 16), *([2] * 16), 3]
    first, _ = cache.add(prompt)
    fill(cache, first, prompt)
    cache.share(first)
    assert cache.add([*([2] * 16), 3])[1] == 0
    assert cache.add([*([1] * 16), *([9] * 16), 3])[1] == 16


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.add([]), ValueError, "add needs at least one token"),
        (lambda c: c.add([1], room=-1), ValueError, "room of at least 0, got 1 tokens, room -1"),
        (lambda c: c.add([1] * 50), RuntimeError, "a sequence has at most 3 pages, got 4 needed"),
        (lambda c: c.add([1] * 17), RuntimeError, "the pool is exhausted, got 2 pages needed, 1 left"),
        (lambda c: c.grow(0, 49), RuntimeError, "a sequence has at most 3 pages, got 4 needed"),
        (lambda c: c.grow(1, 1), KeyError, "grow needs a sequence that was added and not freed, got 1"),
        (lambda c: c.free(1), KeyError, "free needs a sequence that was added and not freed, got 1"),
        (lambda c: c.free(-2), KeyError, "free needs a sequence that was added and not freed, got -2"),
        (lambda c: c.row(7), KeyError, "row needs a sequence that was added and not freed, got 7"),
        (lambda c: c.share(0, [9]), ValueError, "share needs the 30 tokens of sequence 0"),
        (lambda c: c.share(0, [*range(40)]), ValueError, "in at most 32 rows, got 40 tokens"),
        (lambda c: c.layer().append(*new(2, 9)), ValueError, "sequence 0 must have room for the new tokens, got 30 + 9 tokens for 32 rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_paged_refuses_and_nothing_has_changed(call, error, message):
    cache = pages(num_pages=3, batch=2)
    cache.add([*range(30)])
    fill(cache, 0, [*range(30)])
    before = [*contents(cache), cache.page_table.clone()]
    with pytest.raises(error, match=re.escape(message)):
        call(cache)
    torch.testing.assert_close([*contents(cache), cache.page_table], before, rtol=0, atol=0)
    assert cache.pool.available == 1
    cache.add([1] * 16)


def test_no_place_in_the_batch():
    cache = pages(batch=1)
    cache.add([1])
    with pytest.raises(RuntimeError, match="all 1 places in the batch are in use"):
        cache.add([2])
    assert cache.pool.available == 5


def test_page_size():
    with pytest.raises(ValueError, match=r"PagedKVCache: page_size must be one of .*, got 8"):
        PagedKVCache(4, 8, H_KV, D, batch=1)


def test_an_append_beyond_the_pages_is_dropped_on_the_device():
    """What a compiled step does when the host forgot to grow: nobody else's rows are touched."""
    cache = pages()
    cache.add([1] * 15)
    cache.add([2])
    fill(cache, 0, [1] * 15)
    fill(cache, 1, [2])
    before = contents(cache)
    lengths = torch.tensor([16, 2**31 - 2, 0], dtype=torch.int32)
    reference.append(cache.k[0], cache.v[0], *new(3, 3), lengths, cache.page_table)
    torch.testing.assert_close(contents(cache), before, rtol=0, atol=0)


# --- the pool, against a plain account of it ---
def test_pool_keeps_account():
    """Random adds, shares and frees: no page has two contents, what is shared is what was asked for, and none is lost."""
    draw = random.Random(0)
    pool, size = PagePool(12, 4), 4
    content: dict[int, tuple] = {}
    alive: dict[int, tuple[list, list]] = {}
    hits = refusals = 0
    for n in range(3000):
        action = draw.random()
        if action < 0.5:
            tokens = [draw.randrange(2) for _ in range(draw.randrange(1, 20))]
            known = pool.match(tokens)
            for i, page in enumerate(known):
                assert content[page] == tuple(tokens[: (i + 1) * size])
            assert len(known) * size < len(tokens)
            pages = pool.take(known, -(-len(tokens) // size) - len(known))
            if pages is None:
                refusals += 1
                continue
            hits += len(known)
            others = [page for other, _ in alive.values() for page in other]
            for i, page in enumerate(pages[len(known) :], len(known)):
                assert page not in others
                content[page] = tuple(tokens[: (i + 1) * size])
            alive[n] = pages, tokens
        elif alive:
            key = draw.choice([*alive])
            if action < 0.7:
                pool.share(*alive[key])
            else:
                pool.release(alive.pop(key)[0])
        users = [sum(page in pages for pages, _ in alive.values()) for page in range(12)]
        assert [pool.users(page) for page in range(12)] == users
        assert pool.available == users.count(0)
    assert hits > 100
    assert refusals > 100
