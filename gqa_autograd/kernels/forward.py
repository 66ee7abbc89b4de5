"""GQA forward: S = scale Q K^T, or cap tanh(scale / cap Q K^T) with a softcap; O = softmax(S) V, LSE = ln sum exp S.

Online softmax, arXiv:1805.02867 algorithm 3; warp-specialised and persistent. A thread block has one producer warp, which loads Q, K and V
by TMA, and two consumer warpgroups of 64 queries each. They take turns at the tensor cores by two named barriers, so that the softmax of
one runs under the products of the other; the product with V of key block n - 1 is issued behind the product with K of block n and runs
under its softmax. A block takes tile after tile, longest first; the output leaves by TMA under the next tile's loads. Every tile does at
least one, then fully masked, key block: so each load is waited for, and a query without keys gets out = 0 and lse = -inf. Under a window a
tile does the key blocks from the first that its first query sees to the last of its last query; only those at the two edges are masked.

Three forms. "dense": [B, S, H, D]. "packed": sequences end to end in a batch of one, lengths from cu_seqlens on the device. "split": dense,
for grids with fewer tiles than multiprocessors; each part of a tile's keys is a tile of its own, and forward_combine merges the parts."""

from types import SimpleNamespace

import tilelang
import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from . import forward_tiles, tile
from .forward_tiles import BATCH, COUNT, FIELDS, HEAD, KV_START, LOW, PART, Q_START, ROW0, S_KV, S_Q, Place

ROWS = 64
CONSUMERS = 256
THREADS = 384
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240
# Named barriers: 1 and 2 order the warpgroups at the tensor cores, 3 and 4 guard each one's output staging, 5 a cleared end of V
TURN, STAGED, CLEARED = 1, 3, 5


@tilelang.jit(pass_configs=tile.OWN_BARRIERS, target=tile.TARGET)
def build(dtype, return_lse, D, D_v, mask, softcap, form, block_M, block_N, stages, own_staging, skip_rescale):
    # Rows: of one batch, S_q and S_kv; packed, of all sequences
    names = ("B", "rows_q", "rows_kv", "H_q", "H_kv", "B_out", "offsets")
    B, rows_q, rows_kv, H_q, H_kv, B_out, offsets = (T.dynamic(name) for name in names)
    # A stride can pass 2^31 elements; a length can't
    strides = {t: (*(T.dynamic(f"{t}_stride_{d}", "int64") for d in "bsh"), 1) for t in "QKVO"}
    split, packed, fields = form == "split", form == "packed", FIELDS[form]

    # V and the staged output lie in panels of so many columns, row by row: the swizzle moves 16-byte pieces within a row
    panel = 64 if D_v % 64 == 0 else 32

    def bottom(at):
        """The lowest key block of a tile."""
        return at[LOW] if mask == "window" or split else 0

    def lengths(at):
        """S_q and S_kv of a tile's sequence."""
        return (at[S_Q], at[S_KV]) if packed else (rows_q, rows_kv)

    @T.macro
    def load(tensor, batch, row, head, buffers, full, empty, ring):
        """Key block `ring` of this thread block's life, into the buffer it goes round to, once that is free."""
        stage = ring % stages
        T.mbarrier_wait_parity(empty[stage], ((ring // stages) % 2) ^ 1)
        T.tma_copy(tensor[batch, row : row + block_N, head, :], buffers[stage, :, :], barrier=full[stage])
        T.mbarrier_arrive(full[stage])

    @T.macro
    def producer(Q, K, V, Q_smem, K_smem, V_smem, packet, table, bars, call, tiles):
        t = T.alloc_var("int32", init=0)
        following = T.alloc_var("int32", init=0)
        turn = T.alloc_var("int32", init=0)
        done = T.alloc_var("int32", init=0)
        at = T.alloc_local([fields], "int32")
        t = call.block
        while t < tiles.total(table):
            T.mbarrier_wait_parity(bars.tile_empty[turn % 2], ((turn // 2) % 2) ^ 1)
            tiles.place(t, packet, turn % 2, table)
            T.mbarrier_arrive(bars.tile_full[turn % 2])
            for field in T.unroll(fields):
                at[field] = packet[turn % 2, field]
            query = at[ROW0] + (at[Q_START] if packed else 0)
            key = bottom(at) * block_N + (at[KV_START] if packed else 0)
            count = at[COUNT]
            kv_head = T.truncdiv(at[HEAD], T.truncdiv(H_q, H_kv))
            load(K, at[BATCH], key + (count - 1) * block_N, kv_head, K_smem, bars.k_full, bars.k_empty, done)
            T.mbarrier_wait_parity(bars.q_empty, (turn % 2) ^ 1)
            T.tma_copy(Q[at[BATCH], query : query + ROWS, at[HEAD], :], Q_smem[0], barrier=bars.q_full)
            T.tma_copy(Q[at[BATCH], query + ROWS : query + block_M, at[HEAD], :], Q_smem[1], barrier=bars.q_full)
            T.mbarrier_arrive(bars.q_full)
            # Asked for now, needed at the end of the tile: the counter's latency hides under the loads
            following = T.call_extern("int32", "gqa::next_tile", call.slot, turn + 1, call.blocks)
            for n in T.unroll(1, count, unroll_factor=1):
                load(K, at[BATCH], key + (count - 1 - n) * block_N, kv_head, K_smem, bars.k_full, bars.k_empty, done + n)
                load(V, at[BATCH], key + (count - n) * block_N, kv_head, V_smem, bars.v_full, bars.v_empty, done + n - 1)
            done = done + count
            load(V, at[BATCH], key, kv_head, V_smem, bars.v_full, bars.v_empty, done - 1)
            t = following
            turn = turn + 1
        T.mbarrier_wait_parity(bars.tile_empty[turn % 2], ((turn // 2) % 2) ^ 1)
        packet[turn % 2, COUNT] = 0
        T.mbarrier_arrive(bars.tile_full[turn % 2])
        T.call_extern("handle", "gqa::last_block_resets", call.slot, call.blocks)

    @T.macro
    def key_block(w, ring, n, Q_smem, K_smem, V_smem, bars, frags, lead, logits, at, masked):
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
                if n == bottom(at):
                    T.mbarrier_arrive(bars.q_empty)
        if softcap:
            tile.softcap(frags, ROWS, block_N, logits.inner)
        if masked:
            tile.mask(frags, ROWS, block_N, mask, at[ROW0] + w * ROWS, n * block_N, *lengths(at), logits.left, logits.right)
        tile.online_softmax(frags, ROWS, block_N, logits.scale_log2, False, masked)
        for i in T.Parallel(ROWS):
            T.call_extern("handle", "gqa::keep_order", frags.part_sum[i])
        T.wait_wgmma(0)
        if lead:
            T.mbarrier_arrive(bars.v_empty[before % stages])
        tile.rescale_output(frags, ROWS, D_v, skip_rescale)
        T.copy(frags.S, frags.P)

    @T.macro
    def clear_end(V_smem, bars, ring, rows):
        """Zeroes what lies behind the first `rows` rows of a block of V: other sequences' rows, where 0 times NaN would be NaN."""
        stage = ring % stages
        T.mbarrier_wait_parity(bars.v_full[stage], (ring // stages) % 2)
        thread = T.get_thread_binding() - 128
        T.call_extern("handle", "gqa::clear_rows", T.address_of(V_smem[stage, 0, 0]), thread, rows, block_N, D_v // panel, panel * 2)
        T.fence_proxy_async()
        T.sync_threads(CLEARED, CONSUMERS)

    @T.macro
    def store(w, at, frags, O_smem, O_out, bars, lead):
        """The output, by TMA where all rows are the sequence's own, whose rows behind the end are another's. Parts leave as they are."""
        first = at[ROW0] + w * ROWS
        query = first + (at[Q_START] if packed else 0)
        if split:
            for i, j in T.Parallel(ROWS, D_v):
                if first + i < rows_q:
                    O_out[at[PART] * B + at[BATCH], first + i, at[HEAD], j] = frags.O[i, j]
            if not own_staging:
                if lead:
                    T.mbarrier_arrive(bars.q_empty)
        else:
            if own_staging:
                if lead:
                    T.tma_store_wait(0)
            T.sync_threads(STAGED + w, 128)
            T.copy(frags.O, O_smem)
            T.fence_proxy_async()
            T.sync_threads(STAGED + w, 128)
            if packed:
                if first + ROWS <= at[S_Q]:
                    if lead:
                        T.tma_copy(O_smem, O_out[at[BATCH], query : query + ROWS, at[HEAD], :])
                else:
                    rows = T.min(at[S_Q] - first, ROWS)
                    thread = T.get_thread_binding() % 128
                    T.call_extern(
                        "handle",
                        "gqa::store_rows",
                        T.address_of(O_out[0, query, at[HEAD], 0]),
                        strides["O"][1],
                        T.address_of(O_smem[0, 0]),
                        *(thread, rows, D_v // panel, panel * 2),
                    )
                    if not own_staging:
                        T.sync_threads(STAGED + w, 128)
            else:
                if lead:
                    T.tma_copy(O_smem, O_out[at[BATCH], query : query + ROWS, at[HEAD], :])
            if not own_staging:
                if lead:
                    T.tma_store_wait(0)
                    T.mbarrier_arrive(bars.q_empty)

    @T.macro
    def store_lse(w, at, frags, LSE, scale_log2):
        first = at[ROW0] + w * ROWS
        S_q, _ = lengths(at)
        for i in T.Parallel(ROWS):
            frags.row_sum[i] = T.if_then_else(
                frags.row_sum[i] > 0.0, (T.log2(frags.row_sum[i]) + frags.row_max[i] * scale_log2) * tile.LN2, -T.infinity("float32")
            )
        for i in T.Parallel(ROWS):
            if first + i < S_q:
                if split:
                    LSE[at[PART] * B + at[BATCH], first + i, at[HEAD]] = frags.row_sum[i]
                else:
                    LSE[at[BATCH], at[HEAD], first + i + (at[Q_START] if packed else 0)] = frags.row_sum[i]

    @T.macro
    def consumer(w, Q_smem, K_smem, V_smem, O_smem, packet, bars, O_out, LSE, call):
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
        turn = T.alloc_var("int32", init=0)
        done = T.alloc_var("int32", init=0)
        plain = T.alloc_var("int32", init=0)
        edge = T.alloc_var("int32", init=0)
        count = T.alloc_var("int32", init=0)
        at = Place(packet, turn)
        lead = T.shuffle_elect(128)
        # With softcap the logits are cap tanh(scale / cap q·k): the softmax scales by cap, and tanh takes the rest
        scale_log2 = (call.cap if softcap else call.scale) * tile.LOG2E
        inner = 2 * tile.LOG2E * call.scale / call.cap if softcap else 0.0
        logits = SimpleNamespace(scale_log2=scale_log2, inner=inner, left=call.left, right=call.right)
        if w == 1:
            T.named_barrier_arrive(TURN, CONSUMERS)
        T.mbarrier_wait_parity(bars.tile_full[0], 0)
        count = at[COUNT]
        while count > 0:
            S_q, S_kv = lengths(at)
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
                tile.softcap(frags, ROWS, block_N, inner)
            tile.mask(frags, ROWS, block_N, mask, at[ROW0] + w * ROWS, (bottom(at) + count - 1) * block_N, S_q, S_kv, call.left, call.right)
            tile.online_softmax(frags, ROWS, block_N, scale_log2, True, True)
            T.copy(S, P)
            if packed:
                if S_kv < (bottom(at) + count) * block_N:
                    clear_end(V_smem, bars, done, S_kv - (bottom(at) + count - 1) * block_N)
            edge = count
            if mask == "full":
                plain = 1
            else:
                # The edge of the mask can touch more blocks; from `plain` to `edge` every key is seen by every query
                whole = T.floordiv(at[ROW0] + S_kv - S_q + 1 + (call.right if mask == "window" else 0), block_N)
                if mask == "window":
                    whole = T.min(whole, T.floordiv(S_kv, block_N))
                    first = T.ceildiv(T.min(at[ROW0] + block_M, S_q) - 1 + S_kv - S_q - call.left, block_N)
                    edge = T.min(count, T.max(1, bottom(at) + count - first))
                plain = T.min(edge, T.max(1, bottom(at) + count - whole))
                for n in T.serial(1, plain):
                    ring = T.call_extern("int32", "gqa::uniform", done + n)
                    key_block(w, ring, bottom(at) + count - 1 - n, Q_smem, K_smem, V_smem, bars, frags, lead, logits, at, True)
            for n in T.serial(plain, edge):
                ring = T.call_extern("int32", "gqa::uniform", done + n)
                key_block(w, ring, bottom(at) + count - 1 - n, Q_smem, K_smem, V_smem, bars, frags, lead, logits, at, False)
            if mask == "window":
                for n in T.serial(edge, count):
                    ring = T.call_extern("int32", "gqa::uniform", done + n)
                    key_block(w, ring, bottom(at) + count - 1 - n, Q_smem, K_smem, V_smem, bars, frags, lead, logits, at, True)
            done = done + count
            last = done - 1
            T.mbarrier_wait_parity(bars.v_full[last % stages], (last // stages) % 2)
            T.wgmma_gemm(P, V_smem[last % stages, :, :], O, policy=tile.FULL_ROW)
            for i in T.Parallel(ROWS):
                row_sum[i] = T.call_extern("float32", "gqa::quad_sum", row_sum[i])
            for i in T.Parallel(ROWS):
                rescale[i] = T.if_then_else(row_sum[i] > 0.0, 1.0 / row_sum[i], 0.0)
            if return_lse:
                store_lse(w, at, frags, LSE, scale_log2)
            T.wait_wgmma(0)
            if lead:
                T.mbarrier_arrive(bars.v_empty[last % stages])
            for i, j in T.Parallel(ROWS, D_v):
                O[i, j] *= rescale[i]
            store(w, at, frags, O_smem, O_out, bars, lead)
            T.mbarrier_arrive(bars.tile_empty[turn % 2])
            turn = turn + 1
            T.mbarrier_wait_parity(bars.tile_full[turn % 2], (turn // 2) % 2)
            count = at[COUNT]
        if not split:
            if lead:
                T.tma_store_wait(0)

    output = T.StridedTensor([B_out if split else B, rows_q, H_q, D_v], strides["O"], "float32" if split else dtype)
    lse = T.Tensor([B_out, rows_q, H_q] if split else [B, H_q, rows_q], "float32")

    prelude = tile.PRELUDE + forward_tiles.COUNTER + (forward_tiles.PACKED if packed else "")

    @T.macro
    def kernel(Q, K, V, O, LSE, cu_q, cu_k, scale, cap, left, right, blocks, section, slot, parts):
        with T.Kernel(blocks, threads=THREADS, prelude=prelude) as block:
            Q_0 = T.alloc_shared([ROWS, D], dtype)
            Q_1 = T.alloc_shared([ROWS, D], dtype)
            K_smem = T.alloc_shared([stages, block_N, D], dtype)
            V_smem = T.alloc_shared([stages, block_N, D_v], dtype)
            T.annotate_layout({b: make_swizzled_layout(b) for b in (Q_0, Q_1, K_smem, V_smem)})
            if own_staging and not split:
                O_0 = T.alloc_shared([ROWS, D_v], dtype)
                O_1 = T.alloc_shared([ROWS, D_v], dtype)
                T.annotate_layout({b: make_swizzled_layout(b) for b in (O_0, O_1)})
            packet = T.alloc_shared([2, fields], "int32")
            table = T.alloc_shared([forward_tiles.GROUPS + 1], "int32") if packed else None
            bars = SimpleNamespace(
                q_full=T.alloc_barrier(1),
                q_empty=T.alloc_barrier(2),
                k_full=T.alloc_barrier([1] * stages),
                k_empty=T.alloc_barrier([2] * stages),
                v_full=T.alloc_barrier([1] * stages),
                v_empty=T.alloc_barrier([2] * stages),
                tile_full=T.alloc_barrier([1] * 2),
                tile_empty=T.alloc_barrier([CONSUMERS] * 2),
            )
            sizes = {"B": B, "H_q": H_q, "rows_q": rows_q, "rows_kv": rows_kv, "cu_q": cu_q, "cu_k": cu_k, "sequences": offsets - 1}
            numbers = {"scale": scale, "cap": cap, "left": left, "right": right, "section": section, "slot": slot, "parts": parts}
            call = SimpleNamespace(**sizes, **numbers, block=block, blocks=blocks)
            tiles = forward_tiles.schedule(form, mask, block_M, block_N, call)
            thread = T.get_thread_binding()
            if thread < 128:
                T.set_max_nreg(PRODUCER_REGISTERS, 0)
                if thread < 32:
                    if packed:
                        T.call_extern(
                            "handle", "gqa::count_tiles", *(T.address_of(x[0]) for x in (table, cu_q)), offsets - 1, rows_q, block_M
                        )
                    if T.shuffle_elect(32):
                        producer(Q, K, V, (Q_0, Q_1), K_smem, V_smem, packet, table, bars, call, tiles)
            else:
                O_smem = (O_0, O_1) if own_staging and not split else (Q_0, Q_1)
                if thread < 256:
                    consumer(0, Q_0, K_smem, V_smem, O_smem[0], packet, bars, O, LSE, call)
                else:
                    consumer(1, Q_1, K_smem, V_smem, O_smem[1], packet, bars, O, LSE, call)

    queries = T.StridedTensor([B, rows_q, H_q, D], strides["Q"], dtype)
    keys = T.StridedTensor([B, rows_kv, H_kv, D], strides["K"], dtype)
    values = T.StridedTensor([B, rows_kv, H_kv, D_v], strides["V"], dtype)

    if packed:

        @T.prim_func
        def attention_fwd(
            Q: queries,
            K: keys,
            V: values,
            O: output,
            LSE: lse if return_lse else output,
            cu_q: T.Tensor([offsets], "int32"),
            cu_k: T.Tensor([offsets], "int32"),
            scale: T.float32,
            cap: T.float32,
            left: T.int32,
            right: T.int32,
            blocks: T.int32,
            section: T.int32,
            slot: T.int32,
            parts: T.int32,
        ):
            kernel(Q, K, V, O, LSE, cu_q, cu_k, scale, cap, left, right, blocks, section, slot, parts)

    else:

        @T.prim_func
        def attention_fwd(
            Q: queries,
            K: keys,
            V: values,
            O: output,
            # Without LSE the output is passed again in its place
            LSE: lse if return_lse else output,
            scale: T.float32,
            cap: T.float32,
            left: T.int32,
            right: T.int32,
            blocks: T.int32,
            section: T.int32,
            slot: T.int32,
            parts: T.int32,
        ):
            kernel(Q, K, V, O, LSE, Q, Q, scale, cap, left, right, blocks, section, slot, parts)

    return attention_fwd
