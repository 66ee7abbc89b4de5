"""How a decode's key tiles are shared out, known on the device only; the queries of a tile; its mask.

All tiles of all sequences stand in one row: sequence by sequence, in it KV head by KV head, in that the tiles of rows (usually one), and
of these the key tiles. Each thread block takes an equal stretch of that row. A unit (sequence, KV head, tile of rows) whose keys lie in
several stretches has a part from each of their blocks. So sequences of any lengths fill the device, and the host knows nothing about them.
"""

import tilelang.language as T

# Of a warpgroup, and of a tile
ROWS = 64
# Where a block is: its next key tile in the row of all, how many it has yet to do; sequence, unit of it, tile of that unit; of the
# sequence its length, first tile and number of tiles; the tiles of a block
NEXT, LEFT, SEQUENCE, UNIT, OFFSET, LENGTH, LOW, TILES, SHARE = range(9)
FIELDS = 9

# reach: S_q and the left side of the window, the keys before the end that the first query may see. A sequence has one tile at least, then
# masked, so that its rows are written.
PRELUDE = f"""
namespace gqa {{
template <int block_N>
__device__ __forceinline__ void enter(int* at, const int* lengths, int n, int capacity, int reach) {{
  const int length = min(max(lengths[n], 0), capacity), low = max(length - reach, 0) / block_N;
  at[{SEQUENCE}] = n, at[{LENGTH}] = length, at[{LOW}] = low;
  at[{TILES}] = max((length + block_N - 1) / block_N - low, 1);
}}
// By one whole warp: where a block begins
template <int block_N>
__device__ __forceinline__ void begin(
    int* at, const int* lengths, int sequences, int capacity, int reach, int units, int fewest, int block, int blocks) {{
  const int lane = threadIdx.x % 32;
  int sum = 0;
  for (int n = lane; n < sequences; n += 32) enter<block_N>(at, lengths, n, capacity, reach), sum += at[{TILES}];
  for (int bits = 16; bits; bits /= 2) sum += __shfl_xor_sync(~0u, sum, bits);
  const int total = sum * units, share = max((total + blocks - 1) / blocks, fewest), next = min(block * share, total);
  at[{SHARE}] = share, at[{NEXT}] = next, at[{LEFT}] = min(share, total - next);
  if (at[{LEFT}] == 0) return;
  int before = 0;
  for (int first = 0;; first += 32) {{
    int mine = 0;
    if (first + lane < sequences) enter<block_N>(at, lengths, first + lane, capacity, reach), mine = at[{TILES}];
    int upto = mine;
    for (int distance = 1; distance < 32; distance *= 2) {{
      const int below = __shfl_up_sync(~0u, upto, distance);
      if (lane >= distance) upto += below;
    }}
    const unsigned behind = __ballot_sync(~0u, (before + upto) * units > next);
    const int found = behind ? __popc((behind & -behind) - 1) : 31;
    if (!behind) {{
      before += __shfl_sync(~0u, upto, 31);
      continue;
    }}
    before += __shfl_sync(~0u, upto - mine, found);
    enter<block_N>(at, lengths, first + found, capacity, reach);
    at[{UNIT}] = (next - before * units) / at[{TILES}];
    at[{OFFSET}] = (next - before * units) % at[{TILES}];
    return;
  }}
}}
// How many tiles a block does of the unit that it is at; 0 at its end
__device__ __forceinline__ int stretch(const int* at) {{ return min(at[{LEFT}], at[{TILES}] - at[{OFFSET}]); }}
// Behind such a stretch, which ends the unit or the block
template <int block_N>
__device__ __forceinline__ void advance(int* at, const int* lengths, int capacity, int reach, int units) {{
  const int done = stretch(at);
  at[{NEXT}] += done, at[{LEFT}] -= done, at[{OFFSET}] = 0;
  if (at[{LEFT}] == 0 || ++at[{UNIT}] < units) return;
  at[{UNIT}] = 0;
  enter<block_N>(at, lengths, at[{SEQUENCE}] + 1, capacity, reach);
}}
// The first and the last block that have a part of the unit
__device__ __forceinline__ int first_block(const int* at) {{ return (at[{NEXT}] - at[{OFFSET}]) / at[{SHARE}]; }}
__device__ __forceinline__ int last_block(const int* at) {{ return (at[{NEXT}] - at[{OFFSET}] + at[{TILES}] - 1) / at[{SHARE}]; }}

// The page with a key; where there is none `pages`, which TMA reads as zeros, like everything outside its tensor
__device__ __forceinline__ int page_of(const int* table, int n, int max_pages, int pages, int key, int S_page, int length) {{
  if (key >= length) return pages;
  const int page = table[(int64_t)n * max_pages + key / S_page];
  return page >= 0 && page < pages ? page : pages;
}}
// By a warpgroup: 64 packed rows of q, zeros behind `rows`, as a product reads them: panels of 64 columns, 16-byte pieces swizzled
template <int D>
__device__ __forceinline__ void load_queries(
    void* shared, const void* q, int64_t stride_b, int64_t stride_s, int64_t stride_h, int n, int head, int thread, int row0, int rows,
    int G) {{
  constexpr int pieces = D / 8;
  const char* from = (const char*)q + (n * stride_b + head * G * stride_h) * 2;
  #pragma unroll 4
  for (int at = thread; at < {ROWS} * pieces; at += 128) {{
    const int i = at / pieces, piece = at % pieces, row = row0 + i;
    uint4 value = make_uint4(0, 0, 0, 0);
    if (i < rows) value = *(const uint4*)(from + (row / G * stride_s + row % G * stride_h) * 2 + piece * 16);
    *(uint4*)((char*)shared + ((piece / 8 * {ROWS} + i) * 8 + (piece % 8 ^ i % 8)) * 16) = value;
  }}
}}
}}
"""


@T.macro
def mask(frags, block_N, key0, S_q, length, left, right):
    """S = -inf where packed row i does not see key key0 + j. frags.position: the query's index; other limits as in tile.mask."""
    lane_col = (T.get_thread_binding() % 4) * 2
    for i in T.Parallel(ROWS):
        frags.limit[i] = T.min(length, frags.position[i] + length - S_q + right + 1) - key0 - lane_col
        frags.floor[i] = frags.position[i] + length - S_q - left - key0 - lane_col
    for i, j in T.Parallel(ROWS, block_N):
        seen = T.And(j - lane_col < frags.limit[i], j - lane_col >= frags.floor[i])
        frags.S[i, j] = T.if_then_else(seen, frags.S[i, j], -T.infinity("float32"))


@T.macro
def mask_pages(frags, block_N, box, absent):
    """S = -inf for the keys of absent pages: bit x of `absent` stands for keys x box to (x + 1) box of the tile."""
    for i, j in T.Parallel(ROWS, block_N):
        frags.S[i, j] = T.if_then_else(((absent >> (j // box)) & 1) == 0, frags.S[i, j], -T.infinity("float32"))
