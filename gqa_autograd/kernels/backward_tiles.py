"""Where a thread block of the backward works, and in which order blocks add to dQ: for dense, packed and split calls.

A thread block owns block_N keys of one KV head, a key block, and passes by the query blocks that see them, the last ones first: each with
all heads of the group or, for long sequences, all with one head after the other. Key blocks go to thread blocks by ticket, the first of a
sequence first, which under a causal mask are seen most. The first to add to a tile of dQ sets it, so nobody clears the workspace; the
others wait for it or, in a deterministic call, for all before them. So nobody waits for a block that has not started, and since all go the
same way through the queries, hardly anybody waits (docs/design/0006). Dense: sequences are batches. Packed: the preprocessing kernel leaves
a table of the key blocks. Split: several blocks share the heads of a key block's group, or its queries, and what they have of dK and dV is
added up afterwards.

The workspace's unit is the query block of one head, a tile. Packed, sequence n begins at tile cu_seqlens_q[n] / block_M + n of each head:
so no two sequences share a tile, and a head has rows / block_M + sequences + 1 of them.
"""

from types import SimpleNamespace

import tilelang.language as T

# What a thread block leaves for its threads in shared memory. TILE: the workspace's tile of the sequence's first queries in head 0;
# HEAD: the first of its query heads; INNER: so many at once; END: behind its last query block; ROUND: steps until the next heads
BATCH, KV_HEAD, KEY_BLOCK, PART, TILE, HEAD, INNER, END, ROUND, STEPS, Q_START, S_Q, KV_START, S_KV = range(14)
FIELDS = 14
# A row of the table of a packed call's key blocks, longest first. The rows left over share the keys of no sequence, which no query sees
ROW_Q_START, ROW_S_Q, ROW_KV_START, ROW_S_KV, ROW_KEY_BLOCK, ROW_TILE = range(6)
ROW = 6

# ticket: the order in which thread blocks start. await_turn and end_turn stand around an addition to a tile of dQ: those before it are
# seen, then it is done and seen. TMA writes through another proxy, hence the fences. `<` and not `!=`: offsets that are no offsets may
# give a tile to two sequences, whose sums are then worthless, but end.
PRELUDE = r"""
namespace gqa {
__device__ __forceinline__ int ticket(int* next) { return atomicAdd(next, 1); }
__device__ __forceinline__ void await_turn(const int* turn, int rank) {
  int now;
  do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
  while (now < rank);
  asm volatile("fence.proxy.async;" ::: "memory");
}
__device__ __forceinline__ void end_turn(int* turn) {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" :: "l"(turn) : "memory");
}
}
"""


def schedule(form, mask, block_M, block_N, call) -> SimpleNamespace:
    """The macros of a form ("dense", "packed" or "split"). `call` has the sizes and run-time arguments of the kernel."""
    packed = form == "packed"

    def lengths(at):
        return (at[S_Q], at[S_KV]) if packed else (call.rows_q, call.rows_kv)

    @T.macro
    def column(at, order, key_blocks):
        """KV head, key block and part of a ticket. In a group of `width` KV heads, of whatever batch, the key block is the slow index."""
        blocks = T.alloc_var("int32")
        base = T.alloc_var("int32")
        rest = T.alloc_var("int32")
        width = T.alloc_var("int32")
        parts = T.alloc_var("int32")
        parts = call.head_parts * call.query_parts
        blocks = key_blocks * parts
        base = T.truncdiv(order, call.width * blocks) * call.width
        rest = order - base * blocks
        width = T.min(call.width, call.columns - base)
        at[KEY_BLOCK] = T.truncdiv(rest, width * parts)
        at[PART] = T.truncmod(T.truncdiv(rest, width), parts)
        at[BATCH] = T.truncdiv(base + T.truncmod(rest, width), call.H_kv)
        at[KV_HEAD] = T.truncmod(base + T.truncmod(rest, width), call.H_kv)

    @T.macro
    def sequence(at, table):
        """The sequence: a batch, or what the table says. at[KEY_BLOCK] was the table's row."""
        if packed:
            row = T.alloc_var("int32")
            row = at[KEY_BLOCK]
            at[Q_START] = table[row, ROW_Q_START]
            at[S_Q] = table[row, ROW_S_Q]
            at[KV_START] = table[row, ROW_KV_START]
            at[S_KV] = table[row, ROW_S_KV]
            at[KEY_BLOCK] = table[row, ROW_KEY_BLOCK]
            at[TILE] = table[row, ROW_TILE]
        else:
            at[TILE] = at[BATCH] * call.H_q * call.head_tiles

    @T.macro
    def steps(at):
        """Which query blocks see the keys, and this part's share of them and of the heads. Cuts are the same for all key blocks, so that
        those who wait for each other start together."""
        S_q, S_kv = lengths(at)
        n0 = at[KEY_BLOCK] * block_N
        blocks = T.alloc_var("int32")
        first = T.alloc_var("int32")
        end = T.alloc_var("int32")
        group = T.alloc_var("int32")
        part = T.alloc_var("int32")
        blocks = T.ceildiv(S_q, block_M)
        first = T.max(T.floordiv(n0 + S_q - S_kv - call.right, block_M), 0) if mask != "full" else 0
        end = blocks
        if mask == "window":
            end = T.min(end, T.max(T.floordiv(n0 + block_N - 1 + S_q - S_kv + call.left, block_M) + 1, 0))
        group = T.truncdiv(call.H_q, call.H_kv)
        at[HEAD] = at[KV_HEAD] * group
        if form == "split":
            part = T.truncdiv(at[PART], call.head_parts)
            first = T.max(first, T.truncdiv(blocks * part, call.query_parts))
            end = T.min(end, T.truncdiv(blocks * (part + 1), call.query_parts))
            part = T.truncmod(at[PART], call.head_parts)
            at[HEAD] = at[HEAD] + T.truncdiv(group * part, call.head_parts)
            group = T.truncdiv(group * (part + 1), call.head_parts) - T.truncdiv(group * part, call.head_parts)
        at[END] = end
        at[INNER] = T.min(call.inner, group)
        at[ROUND] = T.max(end - first, 0) * at[INNER]
        at[STEPS] = T.max(end - first, 0) * group

    @T.macro
    def settle(at, order, table):
        """By one thread: where the thread block of ticket `order` works."""
        column(at, order, call.key_blocks)
        sequence(at, table)
        steps(at)

    def rank(at, m):
        """How many key blocks add to query block m before this one."""
        if mask != "window":
            return at[KEY_BLOCK]
        S_q, S_kv = lengths(at)
        return at[KEY_BLOCK] - T.max(T.floordiv(m * block_M + S_kv - S_q - call.left, block_N), 0)

    def step(at, u):
        """(query head, query block) of step u."""
        inside = T.truncmod(u, at[ROUND])
        head = at[HEAD] + T.truncdiv(u, at[ROUND]) * at[INNER] + T.truncmod(inside, at[INNER])
        return head, at[END] - 1 - T.truncdiv(inside, at[INNER])

    def tile(at, head, m):
        """Of query block m of a query head in the workspace."""
        return at[TILE] + head * call.head_tiles + m

    return SimpleNamespace(settle=settle, lengths=lengths, rank=rank, step=step, tile=tile)
