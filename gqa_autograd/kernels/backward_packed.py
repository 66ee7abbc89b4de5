"""What the kernels before and after a packed backward know of cu_seqlens: which tokens a tile of the workspace holds, and the table of key
blocks that the main kernel works through (backward_tiles.py)."""

from . import backward_tiles as tiles
from .forward_tiles import PACKED as OFFSETS

# Sequences that begin in the same stretch of so many tokens of k are listed together: two rounds of thread blocks. A longer list would take
# key blocks of one sequence so far from each other that its Q, dO and dQ leave the L2 cache between them
GROUP = 32768
# Costs of a key block fall into classes of half an octave. A group has a counter for each, and one for all
CLASSES = 64


def spare_rows(tokens: int) -> int:
    """Rows of the table behind the key blocks, which hold the counters; tokens: of k."""
    return -(-(tokens // GROUP + 1) * (CLASSES + 1) // tiles.ROW)


# sequence_of, by whole warps: the sequence that owns tile p of a head; `sequences` stands for the tokens behind the last one.
# list_key_blocks, by a whole thread block: the table, group after group, in a group those that most queries see first, and those of one
# sequence in their order: a thread lists them, and their costs never rise. Counters first count, then say where the next one goes.
PRELUDE = (
    OFFSETS
    + f"""
namespace gqa {{
__device__ __forceinline__ int first_tile(const int* cu, int n, int rows, int block_M) {{ return offset(cu, n, rows) / block_M + n; }}
__device__ __forceinline__ int tokens_of(const int* cu, int n, int sequences, int rows) {{
  return n < sequences ? length(cu, n, rows) : rows - offset(cu, n, rows);
}}
__device__ __forceinline__ int sequence_of(const int* cu, int sequences, int rows, int block_M, int p) {{
  int low = 0, count = sequences + 1;
  while (count > 1) {{
    const int step = (count + 31) / 32, at = threadIdx.x % 32 * step;
    const bool fits = at < count && first_tile(cu, low + at, rows, block_M) <= p;
    const int last = max(__popc(__ballot_sync(~0u, fits)) - 1, 0) * step;
    low += last;
    count = min(step, count - last);
  }}
  return low;
}}
__device__ __forceinline__ int cost_class(int n0, int S_q, int S_kv, int right, int block_M) {{
  const int first = max((n0 + S_q - S_kv - right) / block_M, 0), cost = max((S_q + block_M - 1) / block_M - first, 0);
  if (cost == 0) return 0;
  const int log = 31 - __clz(cost);
  return 1 + log * 2 + (log < 1 ? 0 : cost >> (log - 1)) % 2;
}}
__device__ __forceinline__ void open_groups(volatile int* starts, int groups) {{
  for (int g = threadIdx.x; g < groups; g += blockDim.x) {{
    volatile int* of_group = starts + g * {CLASSES + 1};
    int all = 0;
#pragma unroll 8
    for (int c = 0; c < {CLASSES}; ++c) all += of_group[c];
    of_group[{CLASSES}] = all;
  }}
  __syncthreads();
  for (int g = threadIdx.x; g < groups; g += blockDim.x) {{
    int before = 0;
    for (int other = 0; other < g; ++other) before += starts[other * {CLASSES + 1} + {CLASSES}];
#pragma unroll 8
    for (int c = {CLASSES} - 1; c >= 0; --c) {{
      volatile int* start = starts + g * {CLASSES + 1} + c;
      const int count = *start;
      *start = before;
      before += count;
    }}
  }}
}}
__device__ __forceinline__ void list_key_blocks(
    int* table, const int* cu_q, const int* cu_k, int sequences, int rows_q, int rows_kv, int right, int block_M, int block_N, int rows) {{
  const int threads = blockDim.x, groups = rows_kv / {GROUP} + 1, counters = groups * {CLASSES + 1};
  const int entries = rows - (counters + {tiles.ROW - 1}) / {tiles.ROW};
  volatile int* starts = table + entries * {tiles.ROW};
  for (int c = threadIdx.x; c < counters; c += threads) starts[c] = 0;
  __syncthreads();
  for (int pass = 0; pass < 2; ++pass) {{
    for (int n = threadIdx.x; n < sequences; n += threads) {{
      const int S_q = length(cu_q, n, rows_q), S_kv = length(cu_k, n, rows_kv);
      volatile int* of_group = starts + offset(cu_k, n, rows_kv) / {GROUP} * {CLASSES + 1};
      for (int block = 0; block * block_N < S_kv; ++block) {{
        const int at = atomicAdd((int*)&of_group[cost_class(block * block_N, S_q, S_kv, right, block_M)], 1);
        if (pass == 0 || at >= entries) continue;
        int* row = table + at * {tiles.ROW};
        row[{tiles.ROW_Q_START}] = offset(cu_q, n, rows_q);
        row[{tiles.ROW_S_Q}] = S_q;
        row[{tiles.ROW_KV_START}] = offset(cu_k, n, rows_kv);
        row[{tiles.ROW_S_KV}] = S_kv;
        row[{tiles.ROW_KEY_BLOCK}] = block;
        row[{tiles.ROW_TILE}] = first_tile(cu_q, n, rows_q, block_M);
      }}
    }}
    __syncthreads();
    if (pass == 0) open_groups(starts, groups);
    __syncthreads();
  }}
  int total = 0;
  for (int g = 0; g < groups; ++g) total += starts[g * {CLASSES + 1} + {CLASSES}];
  total = min(total, entries);
  const int behind = offset(cu_k, sequences, rows_kv);
  for (int at = total + threadIdx.x; at < entries; at += threads) {{
    int* row = table + at * {tiles.ROW};
    const int begin = min((int64_t)rows_kv, behind + (int64_t)(at - total) * block_N);
    row[{tiles.ROW_Q_START}] = row[{tiles.ROW_S_Q}] = row[{tiles.ROW_KEY_BLOCK}] = row[{tiles.ROW_TILE}] = 0;
    row[{tiles.ROW_KV_START}] = begin;
    row[{tiles.ROW_S_KV}] = min(rows_kv - begin, block_N);
  }}
}}
}}
"""
)
