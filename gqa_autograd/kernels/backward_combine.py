"""Adds up the parts of a split backward's dK and dV, in order and in float32, so the bits never change."""

import tilelang
import tilelang.language as T

from . import tile

ROWS = 32


@tilelang.jit(pass_configs=tile.FAST_MATH, target=tile.TARGET)
def build(dtype, D, D_v):
    parts, rows = (T.dynamic(name) for name in ("parts", "rows"))

    @T.macro
    def add_up(Parts, out, first, columns):
        total = T.alloc_fragment([ROWS, columns], "float32")
        T.fill(total, 0)
        for p in T.serial(parts):
            for i, j in T.Parallel(ROWS, columns):
                if first + i < rows:
                    total[i, j] += Parts[p, first + i, j]
        for i, j in T.Parallel(ROWS, columns):
            if first + i < rows:
                out[first + i, j] = T.cast(total[i, j], dtype)

    @T.prim_func
    def attention_bwd_combine(
        dK_parts: T.Tensor([parts, rows, D], "float32"),
        dV_parts: T.Tensor([parts, rows, D_v], "float32"),
        dK: T.Tensor([rows, D], dtype),
        dV: T.Tensor([rows, D_v], dtype),
    ):
        with T.Kernel(T.ceildiv(rows, ROWS), 2, threads=256) as (block, which):
            if which == 0:
                add_up(dK_parts, dK, block * ROWS, D)
            else:
                add_up(dV_parts, dV, block * ROWS, D_v)

    return attention_bwd_combine
