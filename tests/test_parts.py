"""Into how many parts the keys of a call, and the steps of its backward, are split."""

import itertools

import pytest

from gqa_autograd.kernels import config

FULL, CAUSAL = (-1, -1), (-1, 0)
TILES = [tile for tile in config.FORWARD.values() if tile.form == "dense"]
S_Q = (1, 128, 129, 512, 4096)
S_KV = (1, 511, 513, 1023, 1024, 5000, 10**6)
HEADS = (1, 3, 64, 200)
MULTIPROCESSORS = (1, 78, 132)
WINDOWS = {"full": (FULL,), "causal": (CAUSAL,), "window": ((0, 0), (300, 0), (200, 1000), (4096, 4096), (-1, 5), (5, -1), (10**12, 0))}
# The least number of key blocks in a part: fewer do not pay for the merging
SMALLEST = 4


def seen(tile: config.Forward, S_kv: int, window: tuple[int, int]) -> int:
    """Keys that a tile of queries can see at most."""
    left, right = window
    return S_kv if left < 0 or right < 0 else min(S_kv, left + right + tile.block_M)


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.D}-{tile.D_v}-{tile.mask}-{tile.softcap}")
def test_as_many_parts_as_two_bounds_allow(tile):
    """Not more tiles than multiprocessors, not less than four key blocks in a part; one more part would break one of these."""
    split = 0
    for S_q, S_kv, H_q, window, multiprocessors in itertools.product(S_Q, S_KV, HEADS, WINDOWS[tile.mask], MULTIPROCESSORS):
        parts = config.parts(tile, S_q, S_kv, H_q, window, multiprocessors)
        assert parts >= 1
        if S_kv < 2 * S_q:
            assert parts == 1
            continue
        tiles, keys = -(-S_q // tile.block_M) * H_q, seen(tile, S_kv, window)

        def fits(n, tiles=tiles, keys=keys, multiprocessors=multiprocessors):
            return n * tiles <= multiprocessors and n * SMALLEST * tile.block_N <= keys

        assert parts == 1 or fits(parts)
        assert not fits(parts + 1)
        split += parts > 1
    assert split > 0


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.D}-{tile.D_v}-{tile.mask}-{tile.softcap}")
def test_square_calls_are_never_split(tile):
    """Training, where the batch may fill the device alone."""
    for S, H_q, window in itertools.product((*S_Q, *S_KV), HEADS, WINDOWS[tile.mask]):
        assert config.parts(tile, S, S, H_q, window, 132) == 1


def test_by_hand():
    """The numbers of a token and of a chunk on an H200."""
    tile = config.FORWARD[128, 128, "causal", False, "dense"]
    assert tile.block_N == 128
    for (S_q, S_kv, H_q), parts in {
        (1, 8192, 8): 16,
        (1, 8192, 64): 2,
        (1, 131072, 1): 132,
        (1, 1023, 8): 1,
        (1, 1024, 8): 2,
        (128, 8192, 32): 4,
        (129, 8192, 32): 2,
        (4096, 131072, 32): 1,
    }.items():
        assert config.parts(tile, S_q, S_kv, H_q, CAUSAL, 132) == parts


def test_a_window_is_counted():
    """A window of 4096 keys gives as many parts in a long cache as in one that it just covers; an open side sees all."""
    tile = config.FORWARD[128, 128, "window", False, "dense"]
    whole = config.parts(tile, 1, 4096 + tile.block_M, 1, (4095, 1), 132)
    assert whole == (4096 + tile.block_M) // (SMALLEST * tile.block_N)
    assert config.parts(tile, 1, 10**6, 1, (4095, 1), 132) == whole
    assert config.parts(tile, 1, 10**6, 1, (-1, 5), 132) == config.parts(tile, 1, 10**6, 1, (5, -1), 132) == 132
    assert config.parts(tile, 1, 10**6, 1, (10, 0), 132) == 1


def test_a_call_without_queries_has_an_answer():
    tile = config.FORWARD[128, 128, "causal", False, "dense"]
    assert config.parts(tile, 0, 4096, 8, (-1, 0), 132) >= 1


# --- backward ---
BACKWARDS = [tile for tile in config.BACKWARD.values() if tile.form == "dense"]
B = (1, 2, 5)
GROUPS = ((1, 1), (8, 1), (6, 2), (16, 16), (32, 8), (96, 1))


def backward_parts(tile: config.Backward, B: int, S: int, H_q: int, H_kv: int, S_kv: int | None = None, window=CAUSAL) -> tuple[int, int]:
    return config.backward_parts(tile, B, S, H_q, S if S_kv is None else S_kv, H_kv, window, 132)


def test_parts_of_a_backward_by_hand():
    """On an H200. The first has blocks enough, the last of these groups has one head and few queries."""
    tile = config.BACKWARD[128, 128, "causal", False, "dense"]
    for call, parts in {
        (4, 512, 32, 8): (1, 1),
        (1, 2048, 32, 8): (2, 1),
        (1, 4096, 8, 1): (8, 1),
        (1, 8192, 32, 8): (1, 1),
        (1, 2048, 16, 16): (1, 1),
    }.items():
        assert backward_parts(tile, *call) == parts, call


def test_queries_are_split_where_a_group_has_too_few_heads():
    tile = config.BACKWARD[128, 128, "full", False, "dense"]
    heads, queries = backward_parts(tile, 1, 8192, 2, 1, S_kv=128, window=FULL)
    assert heads == 2
    assert queries > 1


@pytest.mark.parametrize("tile", BACKWARDS, ids=lambda tile: f"{tile.D}-{tile.D_v}-{tile.mask}-{tile.softcap}")
def test_parts_of_a_backward_are_never_empty_by_their_number(tile):
    """Heads in parts of at least one, queries in parts of at least a block; powers of two where the queries allow; 32 at most."""
    split = set()
    for b, S_q, S_kv, (H_q, H_kv), window, multiprocessors in itertools.product(
        B, (1, 65, 512, 4096), (1, 511, 5000), GROUPS, WINDOWS[tile.mask], MULTIPROCESSORS
    ):
        heads, queries = config.backward_parts(tile, b, S_q, H_q, S_kv, H_kv, window, multiprocessors)
        assert 1 <= heads <= H_q // H_kv
        assert 1 <= queries <= -(-S_q // tile.block_M)
        assert heads * queries <= 32
        assert heads & (heads - 1) == 0
        if b * H_kv * -(-S_kv // tile.block_N) > 4 * multiprocessors:
            assert (heads, queries) == (1, 1)
        split.add((heads > 1, queries > 1))
    assert {(False, False), (True, False)} <= split
    assert any(queries for _, queries in split)


@pytest.mark.parametrize("sizes", config.D_BACKWARD, ids=str)
def test_a_window_limits_the_parts_of_a_backward(sizes):
    """Where few queries see a key block, parts would have nothing to do; open sides see all of them."""
    window, full = (config.BACKWARD[(*sizes, mask, False, "dense")] for mask in ("window", "full"))
    assert backward_parts(window, 1, 8192, 1, 1, S_kv=512, window=(10, 0)) == (1, 1)
    open_side = backward_parts(window, 1, 8192, 1, 1, S_kv=512, window=(10**12, -1))
    assert open_side == backward_parts(full, 1, 8192, 1, 1, S_kv=512, window=FULL) != (1, 1)


@pytest.mark.parametrize("tile", BACKWARDS, ids=lambda tile: f"{tile.D}-{tile.D_v}-{tile.mask}-{tile.softcap}")
@pytest.mark.parametrize("sizes", [(0, 100, 100), (1, 0, 100), (1, 100, 0), (1, 0, 0)], ids=str)
def test_an_empty_backward_has_an_answer(tile, sizes):
    b, S_q, S_kv = sizes
    for H_q, H_kv in GROUPS:
        assert config.backward_parts(tile, b, S_q, H_q, S_kv, H_kv, WINDOWS[tile.mask][0], 132) >= (1, 1)


def test_more_rows_in_a_batch_need_fewer_parts():
    """Of the backward the batch is an argument: what fills the device alone is not split, since parts cost memory and time."""
    tile = config.BACKWARD[128, 128, "causal", False, "dense"]
    found = [heads * queries for heads, queries in (backward_parts(tile, b, 1024, 8, 1) for b in (1, 2, 4, 8, 16, 64))]
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1] == 1
