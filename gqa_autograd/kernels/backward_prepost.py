"""What runs before and after the backward's main kernel, and the layout in which that leaves dQ for the second of them."""

import tilelang
import tilelang.language as T

from . import tile

# dQ is summed in 8 x 8 blocks, 32 columns a row of 256: a warp's 64-bit stores to shared memory are then 256 contiguous bytes
LINE = 256


def dq_place(i, j, half):
    """Element (i, j) of a warpgroup's [block_M, half] part of dQ -> its line and column in the float32 workspace."""
    return i // 8 * (half // 32) + j // 32, j % 32 // 8 * 64 + i % 8 * 8 + j % 8


@tilelang.jit(pass_configs=tile.FAST_MATH, target=tile.TARGET)
def build_preprocess(D, dtype, has_dlse, block_M):
    """lse2 = LSE log2(e), +inf for padding and for queries without keys, so that their P is 0; delta = rowsum(dO O) - dLSE; dQ_sum = 0."""
    B, S_q, H_q, S_pad, lines = (T.dynamic(name, "int64") for name in ("B", "S_q", "H_q", "S_pad", "lines"))
    block_lines = block_M * D // LINE

    @T.prim_func
    def attention_bwd_preprocess(
        O: T.Tensor([B, S_q, H_q, D], dtype),
        dO: T.Tensor([B, S_q, H_q, D], dtype),
        LSE: T.Tensor([B, H_q, S_q], "float32"),
        dLSE: T.Tensor([B, H_q, S_q], "float32"),
        LSE2: T.Tensor([B, H_q, S_pad], "float32"),
        DELTA: T.Tensor([B, H_q, S_pad], "float32"),
        dQ_sum: T.Tensor([B, H_q, lines, LINE], "float32"),
    ):
        with T.Kernel(H_q, T.ceildiv(S_q, block_M), B, threads=256) as (h, m, b):
            o = T.alloc_fragment([block_M, D], dtype)
            do = T.alloc_fragment([block_M, D], dtype)
            product = T.alloc_fragment([block_M, D], "float32")
            delta = T.alloc_fragment([block_M], "float32")
            for i, j in T.Parallel(block_M, D):
                o[i, j] = T.if_then_else(m * block_M + i < S_q, O[b, m * block_M + i, h, j], T.cast(0, dtype))
            for i, j in T.Parallel(block_M, D):
                do[i, j] = T.if_then_else(m * block_M + i < S_q, dO[b, m * block_M + i, h, j], T.cast(0, dtype))
            for i, j in T.Parallel(block_lines, LINE):
                dQ_sum[b, h, m * block_lines + i, j] = 0.0
            for i, j in T.Parallel(block_M, D):
                product[i, j] = T.cast(o[i, j], "float32") * T.cast(do[i, j], "float32")
            T.reduce_sum(product, delta, dim=1)
            for i in T.Parallel(block_M):
                if m * block_M + i < S_q:
                    lse = LSE[b, h, m * block_M + i]
                    empty = lse == -T.infinity("float32")
                    LSE2[b, h, m * block_M + i] = T.if_then_else(empty, T.infinity("float32"), lse * tile.LOG2E)
                    if has_dlse:
                        DELTA[b, h, m * block_M + i] = delta[i] - T.if_then_else(empty, 0.0, dLSE[b, h, m * block_M + i])
                    else:
                        DELTA[b, h, m * block_M + i] = delta[i]
                else:
                    LSE2[b, h, m * block_M + i] = T.infinity("float32")
                    DELTA[b, h, m * block_M + i] = 0.0

    return attention_bwd_preprocess


@tilelang.jit(pass_configs=tile.FAST_MATH, target=tile.TARGET)
def build_postprocess(D, dtype, block_M):
    """dQ = scale dQ_sum, out of its 8 x 8 blocks and cast."""
    B, S_q, H_q, lines = (T.dynamic(name, "int64") for name in ("B", "S_q", "H_q", "lines"))
    half = D // 2
    half_lines = block_M * half // LINE

    @T.prim_func
    def attention_bwd_postprocess(
        dQ_sum: T.Tensor([B, H_q, lines, LINE], "float32"), dQ: T.Tensor([B, S_q, H_q, D], dtype), scale: T.float32
    ):
        with T.Kernel(H_q, T.ceildiv(S_q, block_M), B, threads=256) as (h, m, b):
            for i, j in T.Parallel(block_M, D):
                if m * block_M + i < S_q:
                    line, column = dq_place(i, j % half, half)
                    part = (m * 2 + j // half) * half_lines
                    dQ[b, m * block_M + i, h, j] = T.cast(dQ_sum[b, h, part + line, column] * scale, dtype)

    return attention_bwd_postprocess
