"""What the attention kernels share: target, CUDA prelude, and macros on a warpgroup's tile of logits.

Fragments are [rows, block_N]: 64 rows a warpgroup, four neighbouring lanes share a row (the wgmma accumulator layout).
"""

import tilelang
import tilelang.language as T

TARGET = {"kind": "cuda", "arch": "sm_90a"}
FAST_MATH = {tilelang.PassConfigKey.TL_ENABLE_FAST_MATH: True}
# Warp-specialised kernels place every barrier themselves
OWN_BARRIERS = {**FAST_MATH, tilelang.PassConfigKey.TL_DISABLE_THREAD_STORAGE_SYNC: True}
FULL_ROW = T.GemmWarpPolicy.FullRow

LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453

# uniform: tells the compiler that a value is the same in the whole warp, so that it may live in a uniform register.
# keep_order: ptxas hoists the wait for the PV product above the exponentials, which then hide nothing. This barrier arrival, never taken
#   because a row sum of at most 2^16 terms below 1 stays far under 1e38, depends on the row sum and so keeps the wait behind it.
# note_growth, any_growth: has a row of this warp a new maximum? If none has, every factor is exactly 1 and O needs no rescaling.
# quad_sum: the sum over the four lanes of a row, taken once a tile; inside the loop AllReduce<SumOp, 4> is made the identity.
PRELUDE = r"""
#include <tl_templates/cuda/reduce.h>
namespace gqa {
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }
__device__ __forceinline__ void keep_order(float row_sum) {
  asm volatile("{\n.reg .pred p;\nsetp.gt.f32 p, %0, 0f7E967699;\n@p bar.arrive 15, 256;\n}\n" :: "f"(row_sum) : "memory");
}
__device__ __forceinline__ void note_growth(int* grown, float rescale) { *grown |= rescale != 1.f; }
__device__ __forceinline__ int any_growth(int grown) { return __any_sync(~0u, grown); }
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
}
namespace tl {
template <int Scale, int Offset, class Barrier> struct AllReduce<SumOp, 4, Scale, Offset, Barrier> {
  template <typename X> static __device__ __forceinline__ X run(X x, X* = nullptr) { return x; }
};
}
"""


def _seen(frags, i, j, kind):
    """An expression, and not a variable, which would come between the compare and its use."""
    within = j < frags.limit[i]
    return T.And(within, j >= frags.floor[i]) if kind == "window" else within


@T.macro
def mask(frags, rows, block_N, kind, row0, col0, S_q, S_kv, left, right):
    """S = -inf where query row0 + i does not see key col0 + j; kind: "full", "causal" or "window".

    One limit a row, less the lane's own column offset: then j is a constant of each register and an element costs one compare."""
    lane_col = (T.get_thread_binding() % 4) * 2
    for i in T.Parallel(rows):
        if kind == "full":
            frags.limit[i] = S_kv - col0 - lane_col
        elif kind == "causal":
            frags.limit[i] = T.min(S_kv, row0 + i + S_kv - S_q + 1) - col0 - lane_col
        else:
            frags.limit[i] = T.min(S_kv, row0 + i + S_kv - S_q + right + 1) - col0 - lane_col
            frags.floor[i] = row0 + i + S_kv - S_q - left - col0 - lane_col
    for i, j in T.Parallel(rows, block_N):
        frags.S[i, j] = T.if_then_else(_seen(frags, i, j - lane_col, kind), frags.S[i, j], -T.infinity("float32"))


@T.macro
def mask_transposed(frags, rows, block_M, kind, key0, row0, S_q, S_kv, left, right):
    """P = 0 where query row0 + j does not see key key0 + i, for a tile whose rows are keys. Limits as in `mask`.

    Queries behind S_q need no mask: their LSE is +inf."""
    lane_col = (T.get_thread_binding() % 4) * 2
    for i in T.Parallel(rows):
        first = 0 if kind == "full" else key0 + i + S_q - S_kv - right - row0
        frags.low[i] = T.if_then_else(key0 + i < S_kv, first, row0 + block_M) - lane_col
        if kind == "window":
            frags.high[i] = key0 + i + S_q - S_kv + left - row0 - lane_col
    for i, j in T.Parallel(rows, block_M):
        # Select after exp2: a condition around it would become a branch per element
        frags.P[i, j] = T.if_then_else(_seeing(frags, i, j - lane_col, kind), frags.P[i, j], 0.0)


def _seeing(frags, i, j, kind):
    behind = j >= frags.low[i]
    return T.And(behind, j <= frags.high[i]) if kind == "window" else behind


@T.macro
def softcap(frags, rows, block_N, inner):
    """S = tanh(scale / cap S), logits in units of the cap; inner = 2 log2(e) scale / cap.

    tanh x = 1 - 2 / (1 + exp 2x) is right to 1e-7. The instruction tanh.approx is to 2^-11 only, and LSE must be to 1e-5."""
    for i, j in T.Parallel(rows, block_N):
        frags.S[i, j] = 1.0 - 2.0 / (1.0 + T.exp2(frags.S[i, j] * inner))


def _finite(row_max, masked):
    """The maximum to subtract. A row that has seen no key has -inf; 0 stands in for it, so that exp2(-inf) = 0, not NaN."""
    return T.if_then_else(row_max == -T.infinity("float32"), 0.0, row_max) if masked else row_max


@T.macro
def online_softmax(frags, rows, block_N, scale_log2, first, masked):
    """S becomes exp2(scale_log2 (S - row_max)); row_max and row_sum go on; rescale is what sums so far must be multiplied with.

    arXiv:1805.02867 algorithm 3."""
    if not first:
        T.copy(frags.row_max, frags.old_max)
    T.reduce_max(frags.S, frags.row_max, dim=1, clear=False)
    if not first:
        for i in T.Parallel(rows):
            frags.rescale[i] = T.exp2((frags.old_max[i] - _finite(frags.row_max[i], masked)) * scale_log2)
    for i, j in T.Parallel(rows, block_N):
        frags.S[i, j] = T.exp2(frags.S[i, j] * scale_log2 - _finite(frags.row_max[i], masked) * scale_log2)
    T.reduce_sum(frags.S, frags.part_sum, dim=1)
    for i in T.Parallel(rows):
        if first:
            frags.row_sum[i] = frags.part_sum[i]
        else:
            frags.row_sum[i] = frags.row_sum[i] * frags.rescale[i] + frags.part_sum[i]


@T.macro
def rescale_output(frags, rows, D, skip):
    """O *= rescale; with `skip` left out by a warp none of whose rows has a new maximum: the same bits, and late in a row few do."""
    if skip:
        grown = T.alloc_local([1], "int32")
        grown[0] = 0
        for i in T.Parallel(rows):
            T.call_extern("handle", "gqa::note_growth", T.address_of(grown[0]), frags.rescale[i])
        if T.call_extern("int32", "gqa::any_growth", grown[0]) != 0:
            for i, j in T.Parallel(rows, D):
                frags.O[i, j] *= frags.rescale[i]
    else:
        for i, j in T.Parallel(rows, D):
            frags.O[i, j] *= frags.rescale[i]
