"""How dK and dV leave: by TMA, and what TMA can't do for the end of a packed sequence and for the parts of a split call."""

import tilelang.language as T

from .backward_tiles import BATCH, KEY_BLOCK, KV_HEAD, KV_START, PART, S_KV

# Of a warpgroup
ROWS = 64

# put: a fragment as a plain array, in the order of a thread's registers. store_rows: the first `rows` of a warpgroup's 64, from there
PRELUDE = """
namespace gqa {
__device__ __forceinline__ void put(float* values, int index, float value) { values[index] = value; }
template <int columns, typename X>
__device__ __forceinline__ void store_rows(X* out, int64_t stride, const float* values, int thread, int rows) {
  const int lane = thread % 32, row = thread / 32 * 16 + lane / 4;
  #pragma unroll
  for (int half = 0; half < 2; ++half)
    if (row + half * 8 < rows)
      #pragma unroll
      for (int group = 0; group < columns / 8; ++group)
        #pragma unroll
        for (int i = 0; i < 2; ++i)
          out[(row + half * 8) * stride + group * 8 + lane % 4 * 2 + i] = X(values[group * 4 + half * 2 + i]);
}
}
"""


@T.macro
def store_rows(values, columns, out, batch, row, head, column, stride, rows):
    """The first `rows` rows of a fragment [64, columns] -> out[batch, row:, head, column:]."""
    plain = T.alloc_local([columns // 2], "float32")
    for i, j in T.Parallel(ROWS, columns):
        T.call_extern("handle", "gqa::put", T.address_of(plain[0]), j // 8 * 4 + i % 16 // 8 * 2 + j % 2, values[i, j])
    T.call_extern(
        "handle",
        f"gqa::store_rows<{columns}>",
        T.address_of(out[batch, row, head, column]),
        stride,
        T.address_of(plain[0]),
        *(T.get_thread_binding() % 128, rows),
    )


@T.macro
def store_staged(w, block_N, batch, key, head, frags, smem, dK, dV, barrier, threads):
    """Both by TMA, from the buffers of K and V, which are read no more."""
    T.sync_threads(barrier, threads)
    T.copy(frags.dV, smem.V[w * ROWS : (w + 1) * ROWS, :])
    T.copy(frags.dK, smem.K[w * ROWS : (w + 1) * ROWS, :])
    T.fence_proxy_async()
    T.sync_threads(barrier, threads)
    if w == 0:
        if T.shuffle_elect(128):
            T.tma_copy(smem.V, dV[batch, key : key + block_N, head, :])
            T.tma_copy(smem.K, dK[batch, key : key + block_N, head, :])
            T.tma_store_wait(0)


@T.macro
def store(form, w, block_N, at, call, frags, smem, dK, dV, strides, sizes, barrier, threads):
    """This warpgroup's 64 keys. `strides` of a row and `sizes` of a head of dK and dV, in elements."""
    first = at[KEY_BLOCK] * block_N
    own = first + w * ROWS
    if form == "split":
        batch = at[PART] * call.B + at[BATCH]
        store_rows(frags.dK, sizes[0], dK, batch, own, at[KV_HEAD], 0, strides[0], call.rows_kv - own)
        store_rows(frags.dV, sizes[1], dV, batch, own, at[KV_HEAD], 0, strides[1], call.rows_kv - own)
    elif form == "packed":
        if first + block_N <= at[S_KV]:
            store_staged(w, block_N, 0, at[KV_START] + first, at[KV_HEAD], frags, smem, dK, dV, barrier, threads)
        else:
            store_rows(frags.dK, sizes[0], dK, 0, at[KV_START] + own, at[KV_HEAD], 0, strides[0], at[S_KV] - own)
            store_rows(frags.dV, sizes[1], dV, 0, at[KV_START] + own, at[KV_HEAD], 0, strides[1], at[S_KV] - own)
    else:
        store_staged(w, block_N, at[BATCH], first, at[KV_HEAD], frags, smem, dK, dV, barrier, threads)
