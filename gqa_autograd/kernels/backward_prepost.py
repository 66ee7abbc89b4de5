"""What runs before and after the backward's main kernel, and the layout in which that leaves dQ for the second of them."""

from typing import NamedTuple

import tilelang
import tilelang.language as T

from . import backward_packed, backward_tiles, tile

# dQ is summed in 8 x 8 blocks, 32 columns a row of 256: a warp's 64-bit stores to shared memory are then 256 contiguous bytes
LINE = 256


class Piece(NamedTuple):
    """A product for dQ: `rows` queries of a tile from `row` on, `columns` of D from `column` on."""

    row: int
    rows: int
    column: int
    columns: int


def dq_pieces(block_M: int, D: int) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """What each of two warpgroups has of a tile of dQ. A product has 64 rows, and begins in K where one of its panels does."""
    if block_M == 128:
        return (Piece(0, 64, 0, D),), (Piece(64, 64, 0, D),)
    if D > 128:
        panels = [Piece(0, 64, column, 64) for column in range(0, D, 64)]
        return tuple(panels[: len(panels) // 2]), tuple(panels[len(panels) // 2 :])
    if D % 64:
        thirds = [Piece(0, 64, column, 32) for column in range(0, D, 32)]
        return tuple(thirds[:2]), tuple(thirds[2:])
    if D == 64:
        return (Piece(0, 64, 0, 64),), ()
    left = (D + 64) // 128 * 64
    return (Piece(0, 64, 0, left),), (Piece(0, 64, left, D - left),)


def dq_place(piece: Piece, i, j, block_M: int, D: int):
    """Element (i, j) of a piece -> its line and column of the tile in the workspace."""
    line = (piece.row * D + piece.column * block_M) // LINE
    return line + i // 8 * (piece.columns // 32) + j // 32, j % 32 // 8 * 64 + i % 8 * 8 + j % 8


@tilelang.jit(pass_configs=tile.FAST_MATH, target=tile.TARGET)
def build_preprocess(dtype, has_dlse, packed, D_v, block_M, block_N):
    """lse2 = LSE log2(e), +inf for padding and for queries without keys, so that their P is 0; delta = rowsum(dO O) - dLSE; turns = 0."""
    names = ("B", "rows_q", "H_q", "tiles", "turns", "offsets", "entries")
    B, rows_q, H_q, tiles, turns, offsets, entries = (T.dynamic(name) for name in names)
    # Columns at a time: the lanes of a row, whose sums are added up, must be a power of two
    panel = D_v & -D_v

    @T.macro
    def clear_turns(TURN, place):
        """Of a tile and, by the first, the next ticket."""
        if T.get_thread_binding() == 0:
            TURN[place + 1] = 0
            if place == 0:
                TURN[0] = 0

    @T.macro
    def multiply(o, do, product, O, dO, b, h, row0, count, first):
        for i, j in T.Parallel(block_M, panel):
            o[i, j] = T.if_then_else(i < count, O[b, row0 + i, h, first + j], T.cast(0, dtype))
        for i, j in T.Parallel(block_M, panel):
            do[i, j] = T.if_then_else(i < count, dO[b, row0 + i, h, first + j], T.cast(0, dtype))
        for i, j in T.Parallel(block_M, panel):
            product[i, j] += T.cast(o[i, j], "float32") * T.cast(do[i, j], "float32")

    def multiply_panels(*arguments):
        for first in range(0, D_v, panel):
            multiply(*arguments, first)

    @T.macro
    def rows_of(O, dO, LSE, dLSE, LSE2, DELTA, b, h, place, row0, count):
        """The tile `place`: `count` queries from row0 on."""
        o = T.alloc_fragment([block_M, panel], dtype)
        do = T.alloc_fragment([block_M, panel], dtype)
        product = T.alloc_fragment([block_M, panel], "float32")
        delta = T.alloc_fragment([block_M], "float32")
        T.fill(product, 0)
        multiply_panels(o, do, product, O, dO, b, h, row0, count)
        T.reduce_sum(product, delta, dim=1)
        for i in T.Parallel(block_M):
            if i < count:
                lse = LSE[b, h, row0 + i]
                empty = lse == -T.infinity("float32")
                LSE2[place, i] = T.if_then_else(empty, T.infinity("float32"), lse * tile.LOG2E)
                if has_dlse:
                    DELTA[place, i] = delta[i] - T.if_then_else(empty, 0.0, dLSE[b, h, row0 + i])
                else:
                    DELTA[place, i] = delta[i]
            else:
                LSE2[place, i] = T.infinity("float32")
                DELTA[place, i] = 0.0

    if packed:

        @T.prim_func
        def attention_bwd_preprocess(
            O: T.Tensor([B, rows_q, H_q, D_v], dtype),
            dO: T.Tensor([B, rows_q, H_q, D_v], dtype),
            LSE: T.Tensor([B, H_q, rows_q], "float32"),
            dLSE: T.Tensor([B, H_q, rows_q], "float32"),
            cu_q: T.Tensor([offsets], "int32"),
            cu_k: T.Tensor([offsets], "int32"),
            LSE2: T.Tensor([tiles, block_M], "float32"),
            DELTA: T.Tensor([tiles, block_M], "float32"),
            TURN: T.Tensor([turns], "int32"),
            TABLE: T.Tensor([entries, backward_tiles.ROW], "int32"),
            rows_kv: T.int32,
            right: T.int32,
            head_tiles: T.int32,
        ):
            # One thread block more than tiles, and it comes first, since it takes longest
            with T.Kernel(H_q, head_tiles + 1, threads=256, prelude=backward_packed.PRELUDE) as (h, m):
                if m == 0:
                    if h == 0:
                        T.call_extern(
                            "handle",
                            "gqa::list_key_blocks",
                            *(T.address_of(first) for first in (TABLE[0, 0], cu_q[0], cu_k[0])),
                            *(offsets - 1, rows_q, rows_kv, right, block_M, block_N, entries),
                        )
                else:
                    place = h * head_tiles + m - 1
                    clear_turns(TURN, place)
                    n = T.call_extern("int32", "gqa::sequence_of", T.address_of(cu_q[0]), offsets - 1, rows_q, block_M, m - 1)
                    first = T.call_extern("int32", "gqa::first_tile", T.address_of(cu_q[0]), n, rows_q, block_M)
                    count = (
                        T.call_extern("int32", "gqa::tokens_of", T.address_of(cu_q[0]), n, offsets - 1, rows_q) - (m - 1 - first) * block_M
                    )
                    start = T.call_extern("int32", "gqa::offset", T.address_of(cu_q[0]), n, rows_q) + (m - 1 - first) * block_M
                    if n < offsets - 1 and first <= m - 1 and count > 0:
                        rows_of(O, dO, LSE, dLSE, LSE2, DELTA, 0, h, place, start, count)

    else:

        @T.prim_func
        def attention_bwd_preprocess(
            O: T.Tensor([B, rows_q, H_q, D_v], dtype),
            dO: T.Tensor([B, rows_q, H_q, D_v], dtype),
            LSE: T.Tensor([B, H_q, rows_q], "float32"),
            dLSE: T.Tensor([B, H_q, rows_q], "float32"),
            LSE2: T.Tensor([tiles, block_M], "float32"),
            DELTA: T.Tensor([tiles, block_M], "float32"),
            TURN: T.Tensor([turns], "int32"),
        ):
            with T.Kernel(H_q, T.ceildiv(rows_q, block_M), B, threads=256) as (h, m, b):
                place = (b * H_q + h) * T.ceildiv(rows_q, block_M) + m
                clear_turns(TURN, place)
                rows_of(O, dO, LSE, dLSE, LSE2, DELTA, b, h, place, m * block_M, rows_q - m * block_M)

    return attention_bwd_preprocess


@tilelang.jit(pass_configs=tile.FAST_MATH, target=tile.TARGET)
def build_postprocess(dtype, packed, D, block_M):
    """dQ = scale dQ_sum, out of its 8 x 8 blocks and cast; 0 where no key block has added."""
    B, rows_q, H_q, tiles, turns, offsets = (T.dynamic(name) for name in ("B", "rows_q", "H_q", "tiles", "turns", "offsets"))
    pieces = [piece for of_warpgroup in dq_pieces(block_M, D) for piece in of_warpgroup]

    @T.macro
    def convert_piece(piece, dQ_sum, dQ, scale, place, batch, head, row0, count):
        for i, j in T.Parallel(piece.rows, piece.columns):
            if piece.row + i < count:
                line, column = dq_place(piece, i, j, block_M, D)
                dQ[batch, row0 + piece.row + i, head, piece.column + j] = T.cast(dQ_sum[place, line, column] * scale, dtype)

    def convert_pieces(*arguments):
        for piece in pieces:
            convert_piece(piece, *arguments)

    @T.macro
    def convert(dQ_sum, TURN, dQ, scale, place, batch, head, row0, count):
        """`count` queries from row0 on, out of the tile `place`."""
        if TURN[place + 1] > 0:
            convert_pieces(dQ_sum, dQ, scale, place, batch, head, row0, count)
        else:
            for i, j in T.Parallel(block_M, D):
                if i < count:
                    dQ[batch, row0 + i, head, j] = T.cast(0, dtype)

    if packed:

        @T.prim_func
        def attention_bwd_postprocess(
            dQ_sum: T.Tensor([tiles, block_M * D // LINE, LINE], "float32"),
            TURN: T.Tensor([turns], "int32"),
            cu_q: T.Tensor([offsets], "int32"),
            dQ: T.Tensor([B, rows_q, H_q, D], dtype),
            scale: T.float32,
            head_tiles: T.int32,
        ):
            with T.Kernel(H_q, head_tiles, threads=256, prelude=backward_packed.PRELUDE) as (h, m):
                n = T.call_extern("int32", "gqa::sequence_of", T.address_of(cu_q[0]), offsets - 1, rows_q, block_M, m)
                first = T.call_extern("int32", "gqa::first_tile", T.address_of(cu_q[0]), n, rows_q, block_M)
                count = T.call_extern("int32", "gqa::tokens_of", T.address_of(cu_q[0]), n, offsets - 1, rows_q) - (m - first) * block_M
                start = T.call_extern("int32", "gqa::offset", T.address_of(cu_q[0]), n, rows_q) + (m - first) * block_M
                if first <= m and count > 0:
                    convert(dQ_sum, TURN, dQ, scale, h * head_tiles + m, 0, h, start, count)

    else:

        @T.prim_func
        def attention_bwd_postprocess(
            dQ_sum: T.Tensor([tiles, block_M * D // LINE, LINE], "float32"),
            TURN: T.Tensor([turns], "int32"),
            dQ: T.Tensor([B, rows_q, H_q, D], dtype),
            scale: T.float32,
        ):
            with T.Kernel(H_q, T.ceildiv(rows_q, block_M), B, threads=256) as (h, m, b):
                # Last first: the main kernel's last tiles may still be in the L2 cache
                last = (B - 1 - b) * H_q + H_q - 1 - h
                place = last * T.ceildiv(rows_q, block_M) + m
                convert(dQ_sum, TURN, dQ, scale, place, B - 1 - b, H_q - 1 - h, m * block_M, rows_q - m * block_M)

    return attention_bwd_postprocess
