"""Which tile of the forward comes next, and where it lies: for dense, packed and split calls.

A tile is `block_M` queries of one query head. Heads go in sections whose K and V fit the L2 cache; in a section the last queries of a
sequence, which see most keys, come first. The producer places a tile and leaves in shared memory where it lies.
"""

from types import SimpleNamespace

import tilelang.language as T

from . import device

# Where a tile lies: first query, head and batch; first key block and how many (0: there is no further tile). Packed, also the first row
# and the length of its sequence in q and in k; split, also which part of its keys
ROW0, HEAD, BATCH, LOW, COUNT, Q_START, S_Q, KV_START, S_KV = range(9)
PART = 5
FIELDS = {"dense": 5, "packed": 9, "split": 6}


class Place:
    """Where the tile lies that a role is at: read from shared memory at each use, which costs less than registers that live all the time.
    Of the two slots one is of the tile at hand, one of the next."""

    def __init__(self, packet, turn):
        self.packet, self.turn = packet, turn

    def __getitem__(self, field):
        return self.packet[self.turn % 2, field]


# The tile counter lives in the module's own zero-initialised memory, one pair a slot; the last block to finish sets it back. So there is
# no memset, and no allocation that a graph's memory pool could hand to somebody else. Slot -1 takes the tiles in a fixed order instead,
# forwards and backwards in turn: a captured launch does, since two replays could meet in one slot.
COUNTER = f"""
namespace gqa {{
__device__ int tiles_taken[{device.SLOTS}], blocks_done[{device.SLOTS}];
__device__ __forceinline__ int next_tile(int slot, int turn, int blocks) {{
  if (slot < 0) return turn % 2 ? (turn + 1) * blocks - 1 - (int)blockIdx.x : turn * blocks + (int)blockIdx.x;
  return atomicAdd(&tiles_taken[slot], 1) + blocks;
}}
__device__ __forceinline__ void last_block_resets(int slot, int blocks) {{
  if (slot >= 0 && atomicAdd(&blocks_done[slot], 1) == blocks - 1) tiles_taken[slot] = blocks_done[slot] = 0;
}}
}}
"""

# A packed call knows its lengths on the device only, so every block counts the tiles itself: table[g] is how many tiles of one head lie
# before group g, a group being as many neighbouring sequences as let GROUPS of them hold all. Up to GROUPS sequences a group is one.
GROUPS = 128
PACKED = f"""
namespace gqa {{
// Whatever cu_seqlens holds, no row outside the tensor is read or written
__device__ __forceinline__ int offset(const int* cu, int n, int rows) {{ return min(max(cu[n], 0), rows); }}
__device__ __forceinline__ int length(const int* cu, int n, int rows) {{ return max(offset(cu, n + 1, rows) - offset(cu, n, rows), 0); }}
__device__ __forceinline__ int tiles_of(const int* cu, int n, int rows, int block_M) {{
  return (length(cu, n, rows) + block_M - 1) / block_M;
}}
// By one whole warp
__device__ __forceinline__ void count_tiles(int* table, const int* cu, int sequences, int rows, int block_M) {{
  const int lane = threadIdx.x % 32, step = (sequences + {GROUPS} - 1) / {GROUPS};
  int before = 0;
  if (lane == 0) table[0] = 0;
  for (int first = 0; first * step < sequences; first += 32) {{
    const int begin = (first + lane) * step, end = min(begin + step, sequences);
    int sum = 0;
    for (int n = begin; n < end; ++n) sum += tiles_of(cu, n, rows, block_M);
    for (int distance = 1; distance < 32; distance *= 2) {{
      const int below = __shfl_up_sync(~0u, sum, distance);
      if (lane >= distance) sum += below;
    }}
    table[first + lane + 1] = before + sum;
    before += __shfl_sync(~0u, sum, 31);
  }}
  __syncwarp();
}}
__device__ __forceinline__ int groups_of(int sequences) {{
  const int step = (sequences + {GROUPS} - 1) / {GROUPS};
  return (sequences + step - 1) / step;
}}
// Tile `order` of a head
__device__ __forceinline__ void find_tile(
    int* packet, const int* table, const int* cu_q, const int* cu_k, int sequences, int rows_q, int rows_kv, int block_M, int order) {{
  const int groups = groups_of(sequences);
  int group = 0;
  for (int jump = {GROUPS} / 2; jump > 0; jump /= 2)
    if (group + jump < groups && table[group + jump] <= order) group += jump;
  order -= table[group];
  int n = group * ((sequences + {GROUPS} - 1) / {GROUPS});
  for (int tiles; order >= (tiles = tiles_of(cu_q, n, rows_q, block_M)); ++n) order -= tiles;
  packet[{ROW0}] = (tiles_of(cu_q, n, rows_q, block_M) - 1 - order) * block_M;
  packet[{Q_START}] = offset(cu_q, n, rows_q);
  packet[{S_Q}] = length(cu_q, n, rows_q);
  packet[{KV_START}] = offset(cu_k, n, rows_kv);
  packet[{S_KV}] = length(cu_k, n, rows_kv);
}}
}}
"""


def end_block(mask, block_N, row_end, S_q, S_kv, right):
    """The key block behind the last that the queries before row_end see."""
    end = T.ceildiv(S_kv, block_N)
    if mask == "full":
        return end
    return T.min(end, T.ceildiv(T.min(row_end, S_q) + S_kv - S_q + (right if mask == "window" else 0), block_N))


def _key_blocks(mask, block_M, block_N, row0, S_q, S_kv, left, right):
    """(first, number): the key blocks that the tile at row0 sees; at least one, so that every load is waited for."""
    first = T.max(T.floordiv(row0 + S_kv - S_q - left, block_N), 0) if mask == "window" else 0
    return first, T.max(end_block(mask, block_N, row0 + block_M, S_q, S_kv, right) - first, 1)


def _part(first, number, part, parts, behind):
    """The key blocks of one part of a split tile. A part without any does the block behind the last, where every key is masked."""
    begin, end = T.truncdiv(number * part, parts), T.truncdiv(number * (part + 1), parts)
    return T.if_then_else(end > begin, first + begin, behind), T.max(end - begin, 1)


def schedule(form, mask, block_M, block_N, call) -> SimpleNamespace:
    """The macros of a form ("dense", "packed" or "split"). `call` has the sizes and run-time arguments of the kernel."""

    def of_a_head(table):
        """How many tiles a query head of one batch has."""
        if form == "packed":
            return table[T.call_extern("int32", "gqa::groups_of", call.sequences)]
        return T.ceildiv(call.rows_q, block_M) * (call.parts if form == "split" else 1)

    def total(table):
        return of_a_head(table) * call.H_q * call.B

    @T.macro
    def place(t, packet, slot, table):
        """Tile t -> packet[slot]."""
        tiles = T.alloc_var("int32")
        head = T.alloc_var("int32")
        rest = T.alloc_var("int32")
        width = T.alloc_var("int32")
        order = T.alloc_var("int32")
        tiles = of_a_head(table)
        head = T.truncdiv(t, tiles * call.section) * call.section
        rest = t - head * tiles
        width = T.max(T.min(call.section, call.H_q * call.B - head), 1)
        order = T.truncdiv(rest, width)
        head = head + T.truncmod(rest, width)
        packet[slot, BATCH] = T.truncdiv(head, call.H_q)
        packet[slot, HEAD] = T.truncmod(head, call.H_q)
        if form == "packed":
            buffers = (packet[slot, 0], table[0], call.cu_q[0], call.cu_k[0])
            sizes = (call.sequences, call.rows_q, call.rows_kv, block_M, order)
            T.call_extern("handle", "gqa::find_tile", *(T.address_of(first) for first in buffers), *sizes)
        elif form == "split":
            packet[slot, ROW0] = (tiles // call.parts - 1 - T.truncdiv(order, call.parts)) * block_M
        else:
            packet[slot, ROW0] = (tiles - 1 - order) * block_M
        S_q, S_kv = (packet[slot, S_Q], packet[slot, S_KV]) if form == "packed" else (call.rows_q, call.rows_kv)
        first, number = _key_blocks(mask, block_M, block_N, packet[slot, ROW0], S_q, S_kv, call.left, call.right)
        if form == "split":
            part = T.truncmod(order, call.parts)
            packet[slot, PART] = part
            begin, share = _part(first, number, part, call.parts, T.ceildiv(S_kv, block_N))
            packet[slot, LOW] = begin
            packet[slot, COUNT] = share
        else:
            packet[slot, LOW] = first
            packet[slot, COUNT] = number

    return SimpleNamespace(place=place, total=total)
