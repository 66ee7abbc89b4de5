"""Into how many parts the keys of a call are split."""

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
