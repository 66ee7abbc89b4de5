"""How the forward's results leave: out by TMA, and what TMA can't do for packed sequences and for the parts of split ones."""

from types import SimpleNamespace

import tilelang.language as T

from . import tile
from .forward_tiles import BATCH, HEAD, PART, Q_START, S_Q

# Of a warpgroup
ROWS = 64
# Named barriers from here on guard each warpgroup's staging
STAGED = 4

# A sequence ends anywhere: rows behind its end belong to another one. Blocks of V and the staged output lie in panels, row by row; the
# swizzle moves 16-byte pieces within a row.
PACKED = """
namespace gqa {
// By all consumers: zeroes a block of V from row `begin` on
__device__ __forceinline__ void clear_rows(void* block, int thread, int threads, int begin, int rows, int panels, int bytes) {
  for (int panel = 0; panel < panels; ++panel)
    #pragma unroll 1
    for (int at = begin * bytes + thread * 16; at < rows * bytes; at += threads * 16)
      *(uint4*)((char*)block + panel * rows * bytes + at) = make_uint4(0, 0, 0, 0);
}
// By a warpgroup: stores the first `rows` of 64 staged rows
__device__ __forceinline__ void store_rows(
    void* out, int64_t stride, const void* staged, int thread, int rows, int panels, int bytes) {
  const int pieces = bytes / 16;
  #pragma unroll 1
  for (int at = thread; at < rows * panels * pieces; at += 128) {
    const int piece = at % pieces, panel = at / pieces % panels, row = at / (pieces * panels);
    const int swizzled = piece ^ (pieces == 8 ? row % 8 : row / 2 % 4);
    *(uint4*)((char*)out + row * stride * 2 + (panel * pieces + piece) * 16) =
        *(const uint4*)((const char*)staged + ((panel * 64 + row) * pieces + swizzled) * 16);
  }
}
}
"""

# By a warpgroup: stores the first `rows` of 64 rows from the registers of a product
SPLIT = """
namespace gqa {
__device__ __forceinline__ void put(float* values, int index, float value) { values[index] = value; }
template <int columns>
__device__ __forceinline__ void store_part(float* out, int64_t stride, const float* values, int thread, int rows) {
  const int lane = thread % 32, row = thread / 32 * 16 + lane / 4;
  #pragma unroll
  for (int half = 0; half < 2; ++half)
    if (row + half * 8 < rows)
      #pragma unroll
      for (int group = 0; group < columns / 8; ++group)
        *(float2*)(out + (row + half * 8) * stride + group * 8 + lane % 4 * 2) =
            make_float2(values[group * 4 + half * 2], values[group * 4 + half * 2 + 1]);
}
}
"""


def panels(D_v) -> tuple[int, int]:
    """(number, bytes of a row) of the panels that D_v columns lie in."""
    columns = 64 if D_v % 64 == 0 else 32
    return D_v // columns, 2 * columns


def outputs(form, D_v, own_staging, B, rows_q, stride) -> SimpleNamespace:
    """The macros of a form that store a warpgroup's 64 rows. `stride`: of a row of out, in elements."""
    packed, split = form == "packed", form == "split"

    @T.macro
    def store_rows(first, at, O_smem, O_out):
        rows = T.min(at[S_Q] - first, ROWS)
        thread = T.get_thread_binding() % 128
        T.call_extern(
            "handle",
            "gqa::store_rows",
            T.address_of(O_out[0, at[Q_START] + first, at[HEAD], 0]),
            stride,
            T.address_of(O_smem[0, 0]),
            *(thread, rows, *panels(D_v)),
        )

    @T.macro
    def store_staged(w, first, at, frags, O_smem, O_out, bars, lead):
        """Through shared memory; from there by TMA, which leaves out rows behind the tensor's end but not behind a sequence's."""
        if own_staging:
            if lead:
                T.tma_store_wait(0)
        T.sync_threads(STAGED + w, 128)
        T.copy(frags.O, O_smem)
        T.fence_proxy_async()
        T.sync_threads(STAGED + w, 128)
        query = first + (at[Q_START] if packed else 0)
        if packed:
            if first + ROWS <= at[S_Q]:
                if lead:
                    T.tma_copy(O_smem, O_out[at[BATCH], query : query + ROWS, at[HEAD], :])
            else:
                store_rows(first, at, O_smem, O_out)
                if not own_staging:
                    T.sync_threads(STAGED + w, 128)
        else:
            if lead:
                T.tma_copy(O_smem, O_out[at[BATCH], query : query + ROWS, at[HEAD], :])

    @T.macro
    def store(w, first, at, frags, O_smem, O_out, bars, lead):
        """The rows from `first` on. A part stays float32 and leaves from its registers."""
        if split:
            # A copy as a plain array, in the order of a thread's registers
            values = T.alloc_local([D_v // 2], "float32")
            for i, j in T.Parallel(ROWS, D_v):
                T.call_extern("handle", "gqa::put", T.address_of(values[0]), j // 8 * 4 + i % 16 // 8 * 2 + j % 2, frags.O[i, j])
            T.call_extern(
                "handle",
                f"gqa::store_part<{D_v}>",
                T.address_of(O_out[at[PART] * B + at[BATCH], first, at[HEAD], 0]),
                stride,
                T.address_of(values[0]),
                *(T.get_thread_binding() % 128, rows_q - first),
            )
        else:
            store_staged(w, first, at, frags, O_smem, O_out, bars, lead)
        if not own_staging:
            if lead:
                T.tma_store_wait(0)
                T.mbarrier_arrive(bars.q_empty)

    @T.macro
    def store_lse(first, at, frags, LSE, scale_log2):
        for i in T.Parallel(ROWS):
            frags.row_sum[i] = T.if_then_else(
                frags.row_sum[i] > 0.0, (T.log2(frags.row_sum[i]) + frags.row_max[i] * scale_log2) * tile.LN2, -T.infinity("float32")
            )
        for i in T.Parallel(ROWS):
            if first + i < (at[S_Q] if packed else rows_q):
                if split:
                    LSE[at[PART] * B + at[BATCH], first + i, at[HEAD]] = frags.row_sum[i]
                else:
                    LSE[at[BATCH], at[HEAD], first + i + (at[Q_START] if packed else 0)] = frags.row_sum[i]

    return SimpleNamespace(store=store, store_lse=store_lse)
