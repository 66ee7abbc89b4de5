"""What runs before and after the backward's main kernel, and the layout in which that leaves dQ for the second of them."""

import tilelang
import tilelang.language as T

from . import backward_tiles, tile

# dQ is summed in 8 x 8 blocks, 32 columns a row of 256: a warp's 64-bit stores to shared memory are then 256 contiguous bytes
LINE = 256


def dq_parts(block_M: int, D: int) -> tuple:
    """((first row, rows), (first column, columns)) of each of two warpgroups' part of a tile of dQ: products have 64 rows."""
    if block_M == 128:
        return ((0, 64), (0, D)), ((64, 64), (0, D))
    left = (D + 64) // 128 * 64
    return ((0, 64), (0, left)), ((0, 64), (left, D - left))


def dq_place(i, j, columns):
    """Element (i, j) of such a part -> its line and column in the workspace, counted from the part's first line."""
    return i // 8 * (columns // 32) + j // 32, j % 32 // 8 * 64 + i % 8 * 8 + j % 8


def _dq_element(i, j, block_M, D):
    """Element (i, j) of a tile of dQ -> its line and column."""
    ((_, rows), (_, left)), ((_, _), (start, right)) = dq_parts(block_M, D)
    if start == 0:
        line, column = dq_place(i % rows, j, D)
        return i // rows * (rows * D // LINE) + line, column
    if left == right:
        line, column = dq_place(i, j % left, left)
        return j // left * (rows * left // LINE) + line, column
    (line_0, column_0), (line_1, column_1) = dq_place(i, j, left), dq_place(i, j - left, right)
    inside = j < left
    return T.if_then_else(inside, line_0, rows * left // LINE + line_1), T.if_then_else(inside, column_0, column_1)


@tilelang.jit(pass_configs=tile.FAST_MATH, target=tile.TARGET)
def build_preprocess(dtype, has_dlse, packed, D_v, block_M, block_N):
    """lse2 = LSE log2(e), +inf for padding and for queries without keys, so that their P is 0; delta = rowsum(dO O) - dLSE; turns = 0."""
    names = ("B", "rows_q", "H_q", "tiles", "turns", "offsets", "entries")
    B, rows_q, H_q, tiles, turns, offsets, entries = (T.dynamic(name) for name in names)

    @T.macro
    def rows_of(O, dO, LSE, dLSE, LSE2, DELTA, b, h, place, row0, count):
        """The tile `place`: `count` queries from row0 on."""
        o = T.alloc_fragment([block_M, D_v], dtype)
        do = T.alloc_fragment([block_M, D_v], dtype)
        product = T.alloc_fragment([block_M, D_v], "float32")
        delta = T.alloc_fragment([block_M], "float32")
        for i, j in T.Parallel(block_M, D_v):
            o[i, j] = T.if_then_else(i < count, O[b, row0 + i, h, j], T.cast(0, dtype))
        for i, j in T.Parallel(block_M, D_v):
            do[i, j] = T.if_then_else(i < count, dO[b, row0 + i, h, j], T.cast(0, dtype))
        for i, j in T.Parallel(block_M, D_v):
            product[i, j] = T.cast(o[i, j], "float32") * T.cast(do[i, j], "float32")
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
            if T.get_thread_binding() == 0:
                TURN[place + 1] = 0
                if place == 0:
                    TURN[0] = 0
            rows_of(O, dO, LSE, dLSE, LSE2, DELTA, b, h, place, m * block_M, rows_q - m * block_M)

    return attention_bwd_preprocess


@tilelang.jit(pass_configs=tile.FAST_MATH, target=tile.TARGET)
def build_postprocess(dtype, packed, D, block_M):
    """dQ = scale dQ_sum, out of its 8 x 8 blocks and cast; 0 where no key block has added."""
    B, rows_q, H_q, tiles, turns = (T.dynamic(name) for name in ("B", "rows_q", "H_q", "tiles", "turns"))

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
            summed = TURN[place + 1] > 0
            for i, j in T.Parallel(block_M, D):
                if m * block_M + i < rows_q:
                    line, column = _dq_element(i, j, block_M, D)
                    value = T.if_then_else(summed, dQ_sum[place, line, column], 0.0)
                    dQ[B - 1 - b, m * block_M + i, H_q - 1 - h, j] = T.cast(value * scale, dtype)

    return attention_bwd_postprocess
