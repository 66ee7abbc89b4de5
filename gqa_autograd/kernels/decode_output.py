"""How a decode's results leave: whole ones to out and lse, a part of a unit's keys to the workspace; the last part to come merges them.

    lse = ln sum_p exp lse_p,  out = sum_p exp(lse_p - lse) out_p      in the order of the blocks, so the bits never change

A part is [rows, D + 4] in float32: a row of out and, behind it, its lse in units of log 2. Of a block there are two at most: of the unit
that it ends (even slot) and of the one that it begins (odd slot). Who comes last is known from a counter, which it sets back.
"""

# Floats behind the columns of a row: its lse, and what keeps rows 16-byte aligned
TAIL = 4

# Values are a thread's registers of a product, in their order; row_lse those of its two rows, i and i + 8.
# Loads of parts pass by the L1 cache, whose lines another block's merge may have filled before the part was written.
PRELUDE = f"""
namespace gqa {{
__device__ __forceinline__ void put(float* values, int index, float value) {{ values[index] = value; }}
__device__ __forceinline__ int64_t out_row(int n, int head, int row, int S_q, int H_q, int G) {{
  return ((int64_t)n * S_q + row / G) * H_q + head * G + row % G;
}}
__device__ __forceinline__ int64_t lse_row(int n, int head, int row, int S_q, int H_q, int G) {{
  return ((int64_t)n * H_q + head * G + row % G) * S_q + row / G;
}}
template <class T>
__device__ __forceinline__ void store_pair(T* to, float first, float second) {{
  alignas(4) T pair[2] = {{T(first), T(second)}};
  *(uint*)to = *(const uint*)pair;
}}
template <int D, class T>
__device__ __forceinline__ void store_whole(
    T* out, float* lse, const float* values, const float* row_lse, int thread, int row0, int rows, int n, int head, int S_q, int H_q,
    int G, int with_lse) {{
  const int lane = thread % 32, top = thread / 32 * 16 + lane / 4;
  #pragma unroll
  for (int half = 0; half < 2; ++half) {{
    const int i = top + half * 8;
    if (i >= rows) continue;
    T* to = out + out_row(n, head, row0 + i, S_q, H_q, G) * D + lane % 4 * 2;
    #pragma unroll
    for (int group = 0; group < D / 8; ++group)
      store_pair(to + group * 8, values[group * 4 + half * 2], values[group * 4 + half * 2 + 1]);
    if (with_lse && lane % 4 == 0) lse[lse_row(n, head, row0 + i, S_q, H_q, G)] = row_lse[half] * 0.6931471805599453f;
  }}
}}
// Where a block's part of the unit that block `first` begins lies
template <int D>
__device__ __forceinline__ int64_t part_offset(int most_rows, int first, int block) {{
  return (int64_t)(2 * block + (block == first)) * most_rows * (D + {TAIL});
}}
template <int D>
__device__ __forceinline__ void store_part(
    float* parts, int most_rows, int first, int block, const float* values, const float* row_lse, int thread, int rows) {{
  float* part = parts + part_offset<D>(most_rows, first, block);
  const int lane = thread % 32, top = thread / 32 * 16 + lane / 4;
  #pragma unroll
  for (int half = 0; half < 2; ++half) {{
    const int i = top + half * 8;
    if (i >= rows) continue;
    float* to = part + i * (D + {TAIL});
    #pragma unroll
    for (int group = 0; group < D / 8; ++group)
      *(float2*)(to + group * 8 + lane % 4 * 2) = make_float2(values[group * 4 + half * 2], values[group * 4 + half * 2 + 1]);
    if (lane % 4 == 0) to[D] = row_lse[half];
  }}
  __threadfence();
}}
// By one thread, when the block's part is written: is it the last of `parts`?
__device__ __forceinline__ void note_last(int* last, int* counters, int first, int parts) {{
  __threadfence();
  *last = atomicAdd(counters + first, 1) == parts - 1;
  if (*last) counters[first] = 0;
  __threadfence();
}}
__device__ __forceinline__ void load_part(float (&to)[2], const float* from) {{
  const float2 x = __ldcg((const float2*)from);
  to[0] = x.x, to[1] = x.y;
}}
template <int N>
__device__ __forceinline__ void load_part(float (&to)[N], const float* from) {{
  #pragma unroll
  for (int k = 0; k < N; k += 4) {{
    const float4 x = __ldcg((const float4*)(from + k));
    to[k] = x.x, to[k + 1] = x.y, to[k + 2] = x.z, to[k + 3] = x.w;
  }}
}}
// By a warpgroup: a warp takes every fourth row, a lane D / 32 columns of it
template <int D, class T>
__device__ __forceinline__ void merge(
    T* out, float* lse, const float* parts, int most_rows, int first, int last, int thread, int row0, int rows, int n, int head, int S_q,
    int H_q, int G, int with_lse) {{
  constexpr int columns = D / 32;
  const int lane = thread % 32;
  #pragma unroll 1
  for (int i = thread / 32; i < rows; i += 4) {{
    const float* row = parts + i * (D + {TAIL});
    float sum[columns] = {{}}, total = 0, top = 0;
    #pragma unroll 1
    for (int begin = first; begin <= last; begin += 32) {{
      const int mine = begin + lane, there = min(32, last - begin + 1);
      const float own = mine <= last ? __ldcg(row + part_offset<D>(most_rows, first, mine) + D) : -INFINITY;
      float highest = own;
      for (int bits = 16; bits; bits /= 2) highest = max(highest, __shfl_xor_sync(~0u, highest, bits));
      // A top of 0 stands for rows without keys, too: their weights are exp2(-inf) = 0
      const float before = begin == first ? highest : top;
      top = max(before, highest);
      const float base = top == -INFINITY ? 0.f : top, rescale = exp2f(before - base), weight = exp2f(own - base);
      total *= rescale;
      #pragma unroll
      for (int k = 0; k < columns; ++k) sum[k] *= rescale;
      #pragma unroll 8
      for (int p = 0; p < there; ++p) {{
        const float share = __shfl_sync(~0u, weight, p);
        float values[columns];
        load_part(values, row + part_offset<D>(most_rows, first, begin + p) + lane * columns);
        total += share;
        #pragma unroll
        for (int k = 0; k < columns; ++k) sum[k] += share * values[k];
      }}
    }}
    const float inverse = total > 0 ? 1 / total : 0.f;
    T* to = out + out_row(n, head, row0 + i, S_q, H_q, G) * D + lane * columns;
    #pragma unroll
    for (int k = 0; k < columns; k += 2) store_pair(to + k, sum[k] * inverse, sum[k + 1] * inverse);
    if (with_lse && lane == 0)
      lse[lse_row(n, head, row0 + i, S_q, H_q, G)] = total > 0 ? (top + log2f(total)) * 0.6931471805599453f : -INFINITY;
  }}
}}
}}
"""
