"""Merges the parts of a split forward: lse = ln sum_p exp lse_p, out = sum_p exp(lse_p - lse) out_p. A row that no part saw gives 0, -inf.

One pass: a block takes ROWS rows (query and head) and adds up their parts in order, in float32, so the bits never change. A thread for
each column: a quarter of them holds a row."""

import tilelang
import tilelang.language as T

from . import tile

ROWS = 16


@tilelang.jit(pass_configs=tile.FAST_MATH, target=tile.TARGET)
def build(dtype, return_lse, D_v):
    rows, parts, B, S_q, H_q = (T.dynamic(name) for name in ("rows", "parts", "B", "S_q", "H_q"))

    @T.prim_func
    def attention_fwd_combine(
        Parts: T.Tensor([parts, rows, D_v], "float32"),
        Part_lse: T.Tensor([parts, rows], "float32"),
        O: T.Tensor([rows, D_v], dtype),
        # Without LSE the output is passed again in its place
        LSE: T.Tensor([B, H_q, S_q], "float32") if return_lse else T.Tensor([rows, D_v], dtype),
    ):
        with T.Kernel(T.ceildiv(rows, ROWS), threads=D_v) as block:
            out = T.alloc_fragment([ROWS, D_v], "float32")
            top = T.alloc_fragment([ROWS], "float32")
            total = T.alloc_fragment([ROWS], "float32")
            weight = T.alloc_fragment([ROWS], "float32")
            first = block * ROWS
            T.fill(top, -T.infinity("float32"))
            for p in T.serial(parts):
                for i in T.Parallel(ROWS):
                    if first + i < rows:
                        top[i] = T.max(top[i], Part_lse[p, first + i])
            for i in T.Parallel(ROWS):
                # So that a part without keys weighs exp(-inf - 0) = 0, and not NaN
                top[i] = T.if_then_else(top[i] == -T.infinity("float32"), 0.0, top[i])
            T.fill(total, 0)
            T.fill(out, 0)
            for p in T.unroll(parts, unroll_factor=4):
                for i in T.Parallel(ROWS):
                    if first + i < rows:
                        weight[i] = T.exp2((Part_lse[p, first + i] - top[i]) * tile.LOG2E)
                        total[i] = total[i] + weight[i]
                for i, j in T.Parallel(ROWS, D_v):
                    if first + i < rows:
                        out[i, j] += weight[i] * Parts[p, first + i, j]
            for i, j in T.Parallel(ROWS, D_v):
                if first + i < rows:
                    O[first + i, j] = T.if_then_else(total[i] > 0.0, out[i, j] / total[i], 0.0)
            if return_lse:
                for i in T.Parallel(ROWS):
                    if first + i < rows:
                        row = first + i
                        batch, query, head = T.truncdiv(row, S_q * H_q), T.truncmod(T.truncdiv(row, H_q), S_q), T.truncmod(row, H_q)
                        LSE[batch, head, query] = T.if_then_else(
                            total[i] > 0.0, top[i] + T.log2(total[i]) * tile.LN2, -T.infinity("float32")
                        )

    return attention_fwd_combine
