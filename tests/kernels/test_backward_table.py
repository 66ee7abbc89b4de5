"""The table of key blocks that the kernel before a packed backward leaves for the main one: complete, and in an order that ends."""

import itertools

import pytest
import torch

pytest.importorskip("tilelang", reason="no tilelang here: the kernels were not emulated")
from emulation import Machine, emulated

from gqa_autograd.kernels import backward_launch, backward_packed, config
from gqa_autograd.kernels import backward_tiles as tiles

TILE = config.BACKWARD[64, 64, "causal", False, "packed"]
TAIL = 300


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def listed(lengths_q: list[int], lengths_k: list[int], right: int = 0) -> torch.Tensor:
    """The table's rows of key blocks; the keys themselves are no argument of this kernel, so there may be many."""
    rows, tokens = sum(lengths_q), sum(lengths_k) + TAIL
    out = torch.zeros(1, rows, 1, TILE.D_v, dtype=torch.bfloat16)
    lse = torch.zeros(1, 1, rows)
    head_tiles, key_blocks = rows // TILE.block_M + len(lengths_q) + 1, tokens // TILE.block_N + len(lengths_k) + 1
    with emulated(Machine("lazy")):
        space = backward_launch._workspace(TILE, out, tokens, head_tiles, key_blocks)
        preprocess = backward_launch.compiled(TILE, out.dtype, False)[0]
        written = space.lse2, space.delta, space.turns, space.table
        preprocess(out, out, lse, lse, offsets(lengths_q), offsets(lengths_k), *written, tokens, right, head_tiles)
    return space.table[:key_blocks]


def cost(row: list[int], right: int) -> int:
    """Query blocks that see the key block."""
    n0 = row[tiles.ROW_KEY_BLOCK] * TILE.block_N
    first = max((n0 + row[tiles.ROW_S_Q] - row[tiles.ROW_S_KV] - right) // TILE.block_M, 0)
    return max(-(-row[tiles.ROW_S_Q] // TILE.block_M) - first, 0)


# By tokens of k in all: one group; three, of which the middle one is empty; many short sequences in all three
SHAPES = {
    "one": ([130, 700, 0, 65], [400, 900, 77, 0]),
    "three": ([1, 300, 64, 700], [900, 66_000, 1300, 500]),
    "short": ([40] * 150, [(97 * n) % 1000 for n in range(150)]),
}


@pytest.mark.parametrize("right", [0, 200])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_key_block_is_listed_once_in_an_order_that_ends(shape, right):
    lengths_q, lengths_k = SHAPES[shape]
    table = listed(lengths_q, lengths_k, right).tolist()
    count = sum(-(-length // TILE.block_N) for length in lengths_k)
    starts = [offsets(lengths).tolist() for lengths in (lengths_q, lengths_k)]
    wanted = {}
    for n, (S_q, S_kv) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        for block in range(-(-S_kv // TILE.block_N)):
            wanted[starts[1][n], block] = [starts[0][n], S_q, starts[1][n], S_kv, block, starts[0][n] // TILE.block_M + n]
    rows = table[:count]
    assert sorted(rows) == sorted(wanted.values())
    for row, following in itertools.pairwise(rows):
        groups = [r[tiles.ROW_KV_START] // backward_packed.GROUP for r in (row, following)]
        assert groups[0] <= groups[1]
        # Within half an octave
        assert groups[0] < groups[1] or cost(row, right) * 1.5 >= cost(following, right)
    # Whoever waits for a block of its sequence stands behind it
    places = [(row[tiles.ROW_KV_START], row[tiles.ROW_KEY_BLOCK]) for row in rows]
    assert all(places.index(place) > places.index((place[0], place[1] - 1)) for place in places if place[1])
    # The rest has the tail's keys, each once, and no queries
    rest = [row for row in table[count:] if row[tiles.ROW_S_KV]]
    assert all(row[tiles.ROW_S_Q] == 0 for row in table[count:])
    assert sum(row[tiles.ROW_S_KV] for row in rest) == TAIL
    assert [row[tiles.ROW_KV_START] for row in rest] == [sum(lengths_k) + n * TILE.block_N for n in range(len(rest))]


def test_the_shapes_are_what_they_are_called():
    groups = {name: {start // backward_packed.GROUP for start in offsets(k)[:-1].tolist()} for name, (_, k) in SHAPES.items()}
    assert groups == {"one": {0}, "three": {0, 2}, "short": {0, 1, 2}}


def test_rows_for_the_counters():
    """A counter for each class of each group that could begin, and one for all of a group."""
    for tokens, groups in ((0, 1), (32767, 1), (32768, 2), (10**6, 31)):
        assert backward_packed.spare_rows(tokens) * tiles.ROW >= groups * (backward_packed.CLASSES + 1)
        assert (backward_packed.spare_rows(tokens) - 1) * tiles.ROW < groups * (backward_packed.CLASSES + 1)
