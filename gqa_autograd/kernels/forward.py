"""Dense GQA forward: S = scale Q K^T, or cap tanh(scale / cap Q K^T) with a softcap; O = softmax(S) V, LSE = ln sum exp S.

Online softmax, arXiv:1805.02867 algorithm 3; warp-specialised and persistent. A thread block has one producer warp, which loads Q, K and V
by TMA, and two consumer warpgroups of 64 queries each. They take turns at the tensor cores by two named barriers, so that the softmax of
one runs under the products of the other; the product with V of key block n - 1 is issued behind the product with K of block n and runs
under its softmax. A block takes tile after tile, longest first; the output leaves by TMA under the next tile's loads. Every tile does at
least one, then fully masked, key block: so each load is waited for, and a query without keys gets out = 0 and lse = -inf. Under a window a
tile does the key blocks from the first that its first query sees to the last of its last query; only those at the two edges are masked."""

from types import SimpleNamespace

import tilelang
import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from . import device, tile

ROWS = 64
CONSUMERS = 256
THREADS = 384
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240
# Named barriers: 1 and 2 order the warpgroups at the tensor cores, 3 and 4 guard each one's output staging
TURN, STAGED = 1, 3

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


@tilelang.jit(pass_configs=tile.OWN_BARRIERS, target=tile.TARGET)
def build(dtype, return_lse, D, D_v, mask, softcap, block_M, block_N, stages, own_staging, skip_rescale):
    B, S_q, S_kv, H_q, H_kv = (T.dynamic(name) for name in ("B", "S_q", "S_kv", "H_q", "H_kv"))
    # A stride can pass 2^31 elements; a length can't
    strides = {t: (*(T.dynamic(f"{t}_stride_{d}", "int64") for d in "bsh"), 1) for t in "QKVO"}

    def end_block(row0, right):
        """The key block after the last that the tile at row0 sees."""
        if mask == "full":
            return T.ceildiv(S_kv, block_N)
        last = T.min(row0 + block_M, S_q) + S_kv - S_q + (right if mask == "window" else 0)
        return T.min(T.ceildiv(S_kv, block_N), T.ceildiv(last, block_N))

    @T.macro
    def locate(t, section, left, right, row0: T.Ref, head: T.Ref, batch: T.Ref, low: T.Ref, count: T.Ref):
        """Tile t -> first query, query head, batch, number of key blocks. Heads go in sections whose K and V fit the L2 cache; in a
        section the last queries, which see most keys, come first."""
        blocks = T.alloc_var("int32")
        rest = T.alloc_var("int32")
        width = T.alloc_var("int32")
        blocks = T.ceildiv(S_q, block_M)
        head = T.truncdiv(t, blocks * section) * section
        rest = t - head * blocks
        width = T.max(T.min(section, H_q * B - head), 1)
        row0 = (blocks - 1 - T.truncdiv(rest, width)) * block_M
        head = head + T.truncmod(rest, width)
        batch = T.truncdiv(head, H_q)
        head = head - batch * H_q
        if mask == "window":
            low = T.max(T.floordiv(row0 + S_kv - S_q - left, block_N), 0)
            count = T.max(end_block(row0, right) - low, 1)
        else:
            count = T.max(end_block(row0, right), 1) if mask == "causal" else end_block(row0, right)

    def bottom(low):
        """The lowest key block of a tile."""
        return low if mask == "window" else 0

    @T.macro
    def load(tensor, batch, row, head, buffers, full, empty, ring):
        """Key block `ring` of this thread block's life, into the buffer it goes round to, once that is free."""
        stage = ring % stages
        T.mbarrier_wait_parity(empty[stage], ((ring // stages) % 2) ^ 1)
        T.tma_copy(tensor[batch, row : row + block_N, head, :], buffers[stage, :, :], barrier=full[stage])
        T.mbarrier_arrive(full[stage])

    @T.macro
    def producer(Q, K, V, Q_smem, K_smem, V_smem, tile_smem, bars, left, right, block, blocks, section, slot):
        t = T.alloc_var("int32", init=0)
        following = T.alloc_var("int32", init=0)
        turn = T.alloc_var("int32", init=0)
        done = T.alloc_var("int32", init=0)
        row0 = T.alloc_var("int32", init=0)
        head = T.alloc_var("int32", init=0)
        batch = T.alloc_var("int32", init=0)
        low = T.alloc_var("int32", init=0)
        count = T.alloc_var("int32", init=0)
        t = block
        while t < T.ceildiv(S_q, block_M) * H_q * B:
            locate(t, section, left, right, row0, head, batch, low, count)
            kv_head = T.truncdiv(head, T.truncdiv(H_q, H_kv))
            load(K, batch, (bottom(low) + count - 1) * block_N, kv_head, K_smem, bars.k_full, bars.k_empty, done)
            T.mbarrier_wait_parity(bars.q_empty, (turn % 2) ^ 1)
            T.tma_copy(Q[batch, row0 : row0 + ROWS, head, :], Q_smem[0], barrier=bars.q_full)
            T.tma_copy(Q[batch, row0 + ROWS : row0 + block_M, head, :], Q_smem[1], barrier=bars.q_full)
            T.mbarrier_arrive(bars.q_full)
            # Asked for now, needed at the end of the tile: the counter's latency hides under the loads
            following = T.call_extern("int32", "gqa::next_tile", slot, turn + 1, blocks)
            for n in T.unroll(1, count, unroll_factor=1):
                load(K, batch, (bottom(low) + count - 1 - n) * block_N, kv_head, K_smem, bars.k_full, bars.k_empty, done + n)
                load(V, batch, (bottom(low) + count - n) * block_N, kv_head, V_smem, bars.v_full, bars.v_empty, done + n - 1)
            done = done + count
            load(V, batch, bottom(low) * block_N, kv_head, V_smem, bars.v_full, bars.v_empty, done - 1)
            T.mbarrier_wait_parity(bars.tile_empty, (turn % 2) ^ 1)
            tile_smem[0] = following
            T.mbarrier_arrive(bars.tile_full)
            t = following
            turn = turn + 1
        T.call_extern("handle", "gqa::last_block_resets", slot, blocks)

    @T.macro
    def key_block(w, ring, n, Q_smem, K_smem, V_smem, bars, frags, lead, logits, row0, masked):
        """Logits of key block n and the product of the block before with V, issued together; then the softmax."""
        before = ring - 1
        T.mbarrier_wait_parity(bars.k_full[ring % stages], (ring // stages) % 2)
        T.sync_threads(TURN + w, CONSUMERS)
        T.wgmma_gemm(Q_smem, K_smem[ring % stages, :, :], frags.S, transpose_B=True, policy=tile.FULL_ROW, clear_accum=True)
        T.mbarrier_wait_parity(bars.v_full[before % stages], (before // stages) % 2)
        T.wgmma_gemm(frags.P, V_smem[before % stages, :, :], frags.O, policy=tile.FULL_ROW)
        T.named_barrier_arrive(TURN + 1 - w, CONSUMERS)
        T.wait_wgmma(1)
        if lead:
            T.mbarrier_arrive(bars.k_empty[ring % stages])
            if own_staging:
                if n == logits.low:
                    T.mbarrier_arrive(bars.q_empty)
        if softcap:
            tile.softcap(frags, ROWS, block_N, logits.inner)
        if masked:
            tile.mask(frags, ROWS, block_N, mask, row0, n * block_N, S_q, S_kv, logits.left, logits.right)
        tile.online_softmax(frags, ROWS, block_N, logits.scale_log2, False, masked)
        for i in T.Parallel(ROWS):
            T.call_extern("handle", "gqa::keep_order", frags.part_sum[i])
        T.wait_wgmma(0)
        if lead:
            T.mbarrier_arrive(bars.v_empty[before % stages])
        tile.rescale_output(frags, ROWS, D_v, skip_rescale)
        T.copy(frags.S, frags.P)

    @T.macro
    def consumer(w, Q_smem, K_smem, V_smem, O_smem, tile_smem, bars, O_out, LSE, scale, cap, left, right, block, section):
        T.set_max_nreg(CONSUMER_REGISTERS, 1)
        S = T.alloc_fragment([ROWS, block_N], "float32")
        P = T.alloc_fragment([ROWS, block_N], dtype)
        O = T.alloc_fragment([ROWS, D_v], "float32")
        row_max = T.alloc_fragment([ROWS], "float32")
        old_max = T.alloc_fragment([ROWS], "float32")
        rescale = T.alloc_fragment([ROWS], "float32")
        part_sum = T.alloc_fragment([ROWS], "float32")
        row_sum = T.alloc_fragment([ROWS], "float32")
        limit = T.alloc_fragment([ROWS], "int32")
        floor = T.alloc_fragment([ROWS], "int32")
        frags = SimpleNamespace(
            S=S, P=P, O=O, row_max=row_max, old_max=old_max, rescale=rescale, part_sum=part_sum, row_sum=row_sum, limit=limit, floor=floor
        )
        t = T.alloc_var("int32", init=0)
        turn = T.alloc_var("int32", init=0)
        done = T.alloc_var("int32", init=0)
        row0 = T.alloc_var("int32", init=0)
        head = T.alloc_var("int32", init=0)
        batch = T.alloc_var("int32", init=0)
        low = T.alloc_var("int32", init=0)
        count = T.alloc_var("int32", init=0)
        plain = T.alloc_var("int32", init=0)
        edge = T.alloc_var("int32", init=0)
        lead = T.shuffle_elect(128)
        # With softcap the logits are cap tanh(scale / cap q·k): the softmax scales by cap, and tanh takes the rest
        scale_log2 = (cap if softcap else scale) * tile.LOG2E
        logits = SimpleNamespace(
            scale_log2=scale_log2, inner=2 * tile.LOG2E * scale / cap if softcap else 0.0, left=left, right=right, low=bottom(low)
        )
        if w == 1:
            T.named_barrier_arrive(TURN, CONSUMERS)
        t = block
        while t < T.ceildiv(S_q, block_M) * H_q * B:
            locate(t, section, left, right, row0, head, batch, low, count)
            T.fill(O, 0)
            T.fill(row_sum, 0)
            T.fill(row_max, -T.infinity("float32"))
            # The block with the diagonal or the end of the keys: always masked, its logits have nothing to run beside
            T.mbarrier_wait_parity(bars.q_full, turn % 2)
            T.mbarrier_wait_parity(bars.k_full[done % stages], (done // stages) % 2)
            T.wgmma_gemm(Q_smem, K_smem[done % stages, :, :], S, transpose_B=True, policy=tile.FULL_ROW, clear_accum=True)
            T.wait_wgmma(0)
            if lead:
                T.mbarrier_arrive(bars.k_empty[done % stages])
                if own_staging:
                    if count == 1:
                        T.mbarrier_arrive(bars.q_empty)
            if softcap:
                tile.softcap(frags, ROWS, block_N, logits.inner)
            tile.mask(frags, ROWS, block_N, mask, row0 + w * ROWS, (bottom(low) + count - 1) * block_N, S_q, S_kv, left, right)
            tile.online_softmax(frags, ROWS, block_N, scale_log2, True, True)
            T.copy(S, P)
            if mask == "full":
                plain = 1
            else:
                # The edge of the mask can touch more blocks; from `plain` to `edge` every key is seen by every query
                whole = T.floordiv(row0 + S_kv - S_q + 1 + (right if mask == "window" else 0), block_N)
                if mask == "window":
                    whole = T.min(whole, T.floordiv(S_kv, block_N))
                    first = T.ceildiv(T.min(row0 + block_M, S_q) - 1 + S_kv - S_q - left, block_N)
                    edge = T.min(count, T.max(1, low + count - first))
                plain = T.min(edge if mask == "window" else count, T.max(1, bottom(low) + count - whole))
                for n in T.serial(1, plain):
                    ring = T.call_extern("int32", "gqa::uniform", done + n)
                    key_block(
                        w, ring, bottom(low) + count - 1 - n, Q_smem, K_smem, V_smem, bars, frags, lead, logits, row0 + w * ROWS, True
                    )
            for n in T.serial(plain, edge if mask == "window" else count):
                ring = T.call_extern("int32", "gqa::uniform", done + n)
                key_block(w, ring, bottom(low) + count - 1 - n, Q_smem, K_smem, V_smem, bars, frags, lead, logits, row0 + w * ROWS, False)
            if mask == "window":
                for n in T.serial(edge, count):
                    ring = T.call_extern("int32", "gqa::uniform", done + n)
                    key_block(w, ring, low + count - 1 - n, Q_smem, K_smem, V_smem, bars, frags, lead, logits, row0 + w * ROWS, True)
            done = done + count
            v_last = done - 1
            T.mbarrier_wait_parity(bars.v_full[v_last % stages], (v_last // stages) % 2)
            T.wgmma_gemm(P, V_smem[v_last % stages, :, :], O, policy=tile.FULL_ROW)
            for i in T.Parallel(ROWS):
                row_sum[i] = T.call_extern("float32", "gqa::quad_sum", row_sum[i])
            for i in T.Parallel(ROWS):
                rescale[i] = T.if_then_else(row_sum[i] > 0.0, 1.0 / row_sum[i], 0.0)
            if return_lse:
                for i in T.Parallel(ROWS):
                    row_sum[i] = T.if_then_else(
                        row_sum[i] > 0.0, (T.log2(row_sum[i]) + row_max[i] * scale_log2) * tile.LN2, -T.infinity("float32")
                    )
                for i in T.Parallel(ROWS):
                    if row0 + w * ROWS + i < S_q:
                        LSE[batch, head, row0 + w * ROWS + i] = row_sum[i]
            T.wait_wgmma(0)
            if lead:
                T.mbarrier_arrive(bars.v_empty[v_last % stages])
            for i, j in T.Parallel(ROWS, D_v):
                O[i, j] *= rescale[i]
            if own_staging:
                if lead:
                    T.tma_store_wait(0)
            T.sync_threads(STAGED + w, 128)
            T.copy(O, O_smem)
            T.fence_proxy_async()
            T.sync_threads(STAGED + w, 128)
            if lead:
                T.tma_copy(O_smem, O_out[batch, row0 + w * ROWS : row0 + (w + 1) * ROWS, head, :])
            if not own_staging:
                if lead:
                    T.tma_store_wait(0)
                    T.mbarrier_arrive(bars.q_empty)
            T.mbarrier_wait_parity(bars.tile_full, turn % 2)
            t = tile_smem[0]
            T.mbarrier_arrive(bars.tile_empty)
            turn = turn + 1
        if lead:
            T.tma_store_wait(0)

    @T.prim_func
    def attention_fwd(
        Q: T.StridedTensor([B, S_q, H_q, D], strides["Q"], dtype),
        K: T.StridedTensor([B, S_kv, H_kv, D], strides["K"], dtype),
        V: T.StridedTensor([B, S_kv, H_kv, D_v], strides["V"], dtype),
        O: T.StridedTensor([B, S_q, H_q, D_v], strides["O"], dtype),
        # Without LSE the output is passed again in its place
        LSE: T.Tensor([B, H_q, S_q], "float32") if return_lse else T.StridedTensor([B, S_q, H_q, D_v], strides["O"], dtype),
        scale: T.float32,
        cap: T.float32,
        left: T.int32,
        right: T.int32,
        blocks: T.int32,
        section: T.int32,
        slot: T.int32,
    ):
        with T.Kernel(blocks, threads=THREADS, prelude=tile.PRELUDE + COUNTER) as block:
            Q_0 = T.alloc_shared([ROWS, D], dtype)
            Q_1 = T.alloc_shared([ROWS, D], dtype)
            K_smem = T.alloc_shared([stages, block_N, D], dtype)
            V_smem = T.alloc_shared([stages, block_N, D_v], dtype)
            T.annotate_layout({b: make_swizzled_layout(b) for b in (Q_0, Q_1, K_smem, V_smem)})
            if own_staging:
                O_0 = T.alloc_shared([ROWS, D_v], dtype)
                O_1 = T.alloc_shared([ROWS, D_v], dtype)
                T.annotate_layout({b: make_swizzled_layout(b) for b in (O_0, O_1)})
            tile_smem = T.alloc_shared([4], "int32")
            q_full = T.alloc_barrier(1)
            q_empty = T.alloc_barrier(2)
            k_full = T.alloc_barrier([1] * stages)
            k_empty = T.alloc_barrier([2] * stages)
            v_full = T.alloc_barrier([1] * stages)
            v_empty = T.alloc_barrier([2] * stages)
            tile_full = T.alloc_barrier(1)
            tile_empty = T.alloc_barrier(CONSUMERS)
            bars = SimpleNamespace(
                q_full=q_full,
                q_empty=q_empty,
                k_full=k_full,
                k_empty=k_empty,
                v_full=v_full,
                v_empty=v_empty,
                tile_full=tile_full,
                tile_empty=tile_empty,
            )
            thread = T.get_thread_binding()
            if thread < 128:
                T.set_max_nreg(PRODUCER_REGISTERS, 0)
                if thread < 32:
                    if T.shuffle_elect(32):
                        producer(Q, K, V, (Q_0, Q_1), K_smem, V_smem, tile_smem, bars, left, right, block, blocks, section, slot)
            else:
                O_smem = (O_0, O_1) if own_staging else (Q_0, Q_1)
                if thread < 256:
                    consumer(0, Q_0, K_smem, V_smem, O_smem[0], tile_smem, bars, O, LSE, scale, cap, left, right, block, section)
                else:
                    consumer(1, Q_1, K_smem, V_smem, O_smem[1], tile_smem, bars, O, LSE, scale, cap, left, right, block, section)

    return attention_fwd
