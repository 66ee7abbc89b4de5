"""Which configurations have a kernel, and their tiles: plain data, readable without tilelang. Tuned on an H200; no autotuning at run time.

One kernel per configuration: dtype, D, mask, form, with LSE or without. Lengths, heads, strides and scale are run-time values, and no
tile depends on a length or on the batch, so a row of a batch has the same bits alone and in company."""

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple


class Forward(NamedTuple):
    """Tile of the forward kernel: block_M queries, 64 for each of 2 or 3 consumer warpgroups, by block_N keys in rings of `stages`.
    mask: "full", "causal" or "window", whose sides are run-time values. form: "dense", "packed" or "split" (forward.py).
    own_staging: the output leaves from shared memory of its own; without, from Q's, whose next load then waits for the store.
    skip_rescale: leave the output as it is where no maximum moved: the same bits, faster; at D 256 it would spill registers.
    early_wait: the wait for a product with V stands before the second of a thread's two row sums, whose rest then runs behind it."""

    D: int
    D_v: int
    mask: str
    softcap: bool
    form: str
    block_M: int
    block_N: int
    stages: int
    own_staging: bool
    skip_rescale: bool
    early_wait: bool


class Backward(NamedTuple):
    """Tile of the backward kernel: block_N keys stay, block_M queries pass through rings of `stages` buffers. Mask and form as above."""

    D: int
    D_v: int
    mask: str
    softcap: bool
    form: str
    block_M: int
    block_N: int
    stages: int


class Decode(NamedTuple):
    """Tile of the decode kernel: 64 rows (query and head of the group) by block_N keys, which come in boxes of `box`, through rings of
    k_stages and v_stages buffers; blocks_per_sm of them share a multiprocessor. form: "dense", "paged", or "small" for pages below `box` of
    "paged" (decode.py). Masks are run-time values. skip_rescale as above."""

    D: int
    softcap: bool
    form: str
    block_N: int
    box: int
    k_stages: int
    v_stages: int
    blocks_per_sm: int
    skip_rescale: bool


# (D, D_v): (block_M, block_N) for causal, full and window; with a softcap, which needs registers, for any mask; for a window with a
# softcap; own_staging, skip_rescale, early_wait
_FORWARD = {
    (64, 64): ((192, 128), (192, 128), (128, 128), (128, 128), (128, 128), True, False, True),
    (96, 96): ((128, 128), (128, 128), (128, 128), (128, 128), (128, 128), True, True, False),
    (128, 128): ((128, 128), (128, 160), (128, 128), (128, 128), (128, 128), True, True, False),
    (192, 128): ((128, 112), (128, 112), (128, 112), (128, 112), (128, 112), True, True, False),
    (192, 192): ((128, 112), (128, 112), (128, 112), (128, 96), (128, 80), False, False, False),
    (256, 256): ((128, 80), (128, 80), (128, 64), (128, 64), (128, 32), False, False, False),
}
MASKS = ("causal", "full", "window")
FORMS = ("dense", "packed", "split")


def _forwards(D: int, D_v: int) -> Iterator[Forward]:
    causal, full, window, capped, both, *rest = _FORWARD[D, D_v]
    sizes = {"causal": (causal, capped), "full": (full, capped), "window": (window, both)}
    for mask, softcap, form in itertools.product(MASKS, (False, True), FORMS):
        yield Forward(D, D_v, mask, softcap, form, *sizes[mask][softcap], 2, *rest)


FORWARD = {(D, D_v, t.mask, t.softcap, t.form): t for D, D_v in _FORWARD for t in _forwards(D, D_v)}
# (D, D_v): (block_M, block_N); with a softcap or packed, which need registers
_BACKWARD = {
    (64, 64): ((128, 128), (64, 128)),
    (96, 96): ((64, 128), (64, 128)),
    (128, 128): ((64, 128), (64, 128)),
    (192, 128): ((64, 64), (64, 64)),
    (192, 192): ((64, 64), (64, 64)),
    (256, 256): ((64, 64), (64, 64)),
}
BACKWARD = {
    (*sizes, mask, softcap, form): Backward(*sizes, mask, softcap, form, *blocks[softcap or form == "packed"], 2)
    for sizes, blocks in _BACKWARD.items()
    for mask, softcap, form in itertools.product(MASKS, (False, True), FORMS)
}
# D: block_N, k_stages, v_stages, blocks_per_sm, skip_rescale. Of 228 KB a multiprocessor: 104 KB a block at D 64, 96 at 128, 224 at 256
_DECODE: dict[int, tuple[int, int, int, int, bool]] = {64: (128, 3, 3, 2, True), 128: (64, 3, 2, 2, True), 256: (64, 3, 3, 1, True)}
DECODE_FORMS = ("dense", "paged", "small")
# Keys of a box: a page has one at least
_BOX = {"dense": 64, "paged": 64, "small": 16}
DECODE = {
    (D, softcap, form): Decode(D, softcap, form, tile[0], _BOX[form], *tile[1:])
    for D, tile in _DECODE.items()
    for softcap, form in itertools.product((False, True), DECODE_FORMS)
}
D_DECODE = tuple(_DECODE)
D_FORWARD = tuple(sorted({(D, D_v) for D, D_v, *_ in FORWARD}))
D_BACKWARD = tuple(sorted({(D, D_v) for D, D_v, *_ in BACKWARD}))


_KINDS = {(-1, -1): "full", (-1, 0): "causal"}


def mask(window_left: int, window_right: int) -> str:
    """The kind of mask that a window is: causal is the right side 0 and no left side."""
    return _KINDS.get((window_left, window_right), "window")


def forward(function: str, D: int, D_v: int, window_left: int, window_right: int, softcap: float, packed: bool = False) -> Forward:
    """The tile of a forward; NotImplementedError names what there is."""
    # While tracing a size may be symbolic; a kernel's head sizes are constants of the graph
    tile = FORWARD.get((int(D), int(D_v), mask(window_left, window_right), softcap > 0, "packed" if packed else "dense"))
    if tile is None:
        raise NotImplementedError(f"{function}: (D, D_v) on CUDA must be one of {D_FORWARD}, got {(int(D), int(D_v))}")
    return tile


def split(tile: Forward) -> Forward:
    """The tile of a dense call whose keys are split into parts."""
    return FORWARD[tile.D, tile.D_v, tile.mask, tile.softcap, "split"]


# A part of a split tile has at least so many key blocks: less would not pay for the merging
_SMALLEST_PART = 4


def parts(tile: Forward, S_q: int, S_kv: int, H_q: int, window: tuple[int, int], multiprocessors: int) -> int:
    """Into how many parts the keys of a dense call are split, so that a few queries of few heads fill the device; 1 is not at all.

    The batch is no argument: a row has the same bits alone and in company. So that training, where only the batch may fill the device,
    is left alone, only a chunk of a longer sequence is split."""
    if S_kv < 2 * S_q:
        return 1
    seen = S_kv if min(window) < 0 else min(S_kv, sum(window) + tile.block_M)
    # explain also asks about a call without queries
    tiles = max(1, -(-S_q // tile.block_M) * H_q)
    return max(1, min(multiprocessors // tiles, seen // (_SMALLEST_PART * tile.block_N)))


def decode(function: str, D: int, S_page: int | None, softcap: float) -> Decode:
    """The tile of a decode call, whose cache has pages of S_page keys, or none; NotImplementedError names what there is."""
    form = "dense" if S_page is None else "paged" if S_page >= _BOX["paged"] else "small"
    tile = DECODE.get((int(D), softcap > 0, form))
    if tile is None:
        raise NotImplementedError(f"{function}: D on CUDA must be one of {D_DECODE}, got {int(D)}")
    return tile


# A thread block of a decode call does at least so many tiles: fewer would not pay for the merging
_FEWEST_TILES = 2
# They are counted in 32 bits
_MOST_TILES = 2**30


def decode_blocks(tile: Decode, B: int, S_q: int, H_q: int, H_kv: int, capacity: int, multiprocessors: int) -> tuple[int, int]:
    """(thread blocks, the fewest tiles of one), from what the cache can hold: the lengths are known on the device only."""
    units = B * H_kv * max(1, -(-S_q * (H_q // H_kv) // 64))
    most = units * max(1, -(-capacity // tile.block_N))
    if most >= _MOST_TILES:
        raise NotImplementedError(
            f"attention_decode: B H_kv S_q capacity on CUDA must be below {_MOST_TILES} tiles of 64 rows by {tile.block_N} keys, got {most}"
        )
    return max(1, min(multiprocessors * tile.blocks_per_sm, -(-most // _FEWEST_TILES))), _FEWEST_TILES


def sides(mask: str, window: tuple[int, int], far: int) -> tuple[int, int]:
    """An open side reaches farther than any key; `far` is enough for the widest of the others, too. The right one of causal is 0."""
    if mask == "causal":
        return far, 0
    left, right = (far if side < 0 else min(side, far) for side in window)
    return left, right


def backward(function: str, D: int, D_v: int, window_left: int, window_right: int, softcap: float, packed: bool = False) -> Backward:
    """The tile of a backward; NotImplementedError names what there is."""
    tile = BACKWARD.get((int(D), int(D_v), mask(window_left, window_right), softcap > 0, "packed" if packed else "dense"))
    if tile is None:
        raise NotImplementedError(
            f"{function}: (D, D_v) for gradients on CUDA must be one of {D_BACKWARD}, got {(int(D), int(D_v))}; "
            "the forward alone runs under torch.no_grad()"
        )
    return tile


def split_backward(tile: Backward) -> Backward:
    """The tile of a dense call whose steps are split into parts."""
    return BACKWARD[tile.D, tile.D_v, tile.mask, tile.softcap, "split"]


# What a thread block of the backward needs beside its steps, in steps; a step in seconds for each element of its five products; and bytes
# a second that the parts of a split call's dK and dV are written and read at: measured on an H200
_START, _STEP, _PARTS_RATE = 3, 4e-13, 2.5e12


@functools.lru_cache(1024)
def backward_parts(
    tile: Backward, B: int, S_q: int, H_q: int, S_kv: int, H_kv: int, window: tuple[int, int], multiprocessors: int
) -> tuple[int, int]:
    """Into how many parts the group's heads and the queries of a key block are split, so that few KV heads and short sequences fill the
    device; (1, 1) is not at all. The fewest whose estimated time is least: the longest block's or all blocks' share, and the parts' way to
    memory and back."""
    group, blocks, columns = H_q // H_kv, -(-S_kv // tile.block_N), B * H_kv
    if columns * blocks > 4 * multiprocessors:
        return 1, 1
    left, right = sides(tile.mask, window, S_q + S_kv)
    end = -(-S_q // tile.block_M)
    steps = []
    for n0 in range(0, S_kv, tile.block_N):
        first = max((n0 + S_q - S_kv - right) // tile.block_M, 0)
        steps.append(group * max(min(end, (n0 + tile.block_N - 1 + S_q - S_kv + left) // tile.block_M + 1) - first, 0))
    step = _STEP * tile.block_M * tile.block_N * (3 * tile.D + 2 * tile.D_v)
    merging = 16 * columns * S_kv * (tile.D + tile.D_v) / 2 / _PARTS_RATE

    def seconds(parts: int) -> float:
        longest = max(steps, default=0) / parts + _START
        share = columns * (sum(steps) + _START * parts * blocks) / multiprocessors
        return step * max(longest, share) + (5e-6 + merging * parts if parts > 1 else 0.0)

    best = min((1, 2, 4, 8, 16, 32), key=seconds)
    heads = max(n for n in range(1, min(best, group) + 1) if best % n == 0)
    return heads, min(best // heads, max(end, 1))
