"""GQA forward: S = scale Q K^T, or cap tanh(scale / cap Q K^T) with a softcap; O = softmax(S) V, LSE = ln sum exp S.

Online softmax, arXiv:1805.02867 algorithm 3; warp-specialised and persistent. A thread block has a producer, which takes tile after tile
and loads Q, K and V by TMA, and two or three consumer warpgroups of 64 queries each. They take turns at the tensor cores by named
barriers, so that one's softmax runs under the others' products; the product with V of key block n - 1 is issued behind the product with K
of block n and runs under its softmax. Tiles come longest first; the output leaves by TMA under the next tile's loads. Every tile does at
least one, then fully masked, key block: so each load is waited for, and a query without keys gets out = 0 and lse = -inf. Under a window a
tile does the key blocks from the first that its first query sees to the last of its last query; only those at the two edges are masked.

Three forms. "dense": [B, S, H, D]. "packed": sequences end to end in a batch of one, lengths from cu_seqlens on the device. "split": dense,
for grids with fewer tiles than multiprocessors; each part of a tile's keys is a tile of its own, and forward_combine merges the parts."""

from types import SimpleNamespace

import tilelang
import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from . import forward_output, forward_tiles, tile
from .forward_output import ROWS, outputs, panels
from .forward_tiles import BATCH, COUNT, FIELDS, HEAD, KV_START, LOW, Q_START, ROW0, S_KV, S_Q, Place, end_block

# Registers a thread of the producer and of a consumer, by the number of consumer warpgroups: together what a block is launched with
REGISTERS = {2: (24, 240), 3: (32, 160)}
# Named barriers: from TURN on they order the warpgroups at the tensor cores, two of them at each; CLEARED is all consumers'
TURN, CLEARED = 1, 7
PAIR = 256


@tilelang.jit(pass_configs=tile.OWN_BARRIERS, target=tile.TARGET)
def build(dtype, return_lse, D, D_v, mask, softcap, form, block_M, block_N, stages, own_staging, skip_rescale, early_wait):
    # Rows: of one batch, S_q and S_kv; packed, of all sequences
    names = ("B", "rows_q", "rows_kv", "H_q", "H_kv", "B_out", "offsets")
    B, rows_q, rows_kv, H_q, H_kv, B_out, offsets = (T.dynamic(name) for name in names)
    # A stride can pass 2^31 elements; a length can't
    strides = {t: (*(T.dynamic(f"{t}_stride_{d}", "int64") for d in "bsh"), 1) for t in "QKVO"}
    split, packed, fields = form == "split", form == "packed", FIELDS[form]
    consumers = block_M // ROWS
    producer_registers, consumer_registers = REGISTERS[consumers]
    # Where a tile has more queries than a key block has keys, a warpgroup may see nothing of its last blocks
    passes = block_M > block_N
    output = outputs(form, D_v, own_staging, B, rows_q, strides["O"][1])

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
    def publish(t, turn, packet, table, bars, tiles):
        """Tells the consumers where tile t lies, once they are through with the tile two turns before, or that there is none."""
        T.mbarrier_wait_parity(bars.tile_empty[turn % 2], ((turn // 2) % 2) ^ 1)
        if t < tiles.total(table):
            tiles.place(t, packet, turn % 2, table)
        else:
            packet[turn % 2, COUNT] = 0
        T.mbarrier_arrive(bars.tile_full[turn % 2])

    @T.macro
    def producer(Q, K, V, Q_smem, K_smem, V_smem, packet, table, bars, call, tiles):
        turn = T.alloc_var("int32", init=0)
        done = T.alloc_var("int32", init=0)
        count = T.alloc_var("int32", init=0)
        at = Place(packet, turn)
        publish(call.block, 0, packet, table, bars, tiles)
        count = at[COUNT]
        while count > 0:
            batch, head = at[BATCH], at[HEAD]
            query = at[ROW0] + (at[Q_START] if packed else 0)
            key = bottom(at) * block_N + (at[KV_START] if packed else 0)
            kv_head = T.truncdiv(head, T.truncdiv(H_q, H_kv))
            load(K, batch, key + (count - 1) * block_N, kv_head, K_smem, bars.k_full, bars.k_empty, done)
            T.mbarrier_wait_parity(bars.q_empty, (turn % 2) ^ 1)
            T.tma_copy(Q[batch, query : query + ROWS, head, :], Q_smem[0], barrier=bars.q_full)
            T.tma_copy(Q[batch, query + ROWS : query + 2 * ROWS, head, :], Q_smem[1], barrier=bars.q_full)
            if consumers == 3:
                T.tma_copy(Q[batch, query + 2 * ROWS : query + block_M, head, :], Q_smem[2], barrier=bars.q_full)
            T.mbarrier_arrive(bars.q_full)
            # Asked for now, needed at the end of the tile: the counter's latency hides under the loads
            following = T.call_extern("int32", "gqa::next_tile", call.slot, turn + 1, call.blocks)
            for n in T.unroll(1, count, unroll_factor=1):
                load(K, batch, key + (count - 1 - n) * block_N, kv_head, K_smem, bars.k_full, bars.k_empty, done + n)
                load(V, batch, key + (count - n) * block_N, kv_head, V_smem, bars.v_full, bars.v_empty, done + n - 1)
            # Before the last load, which has to wait anyway
            publish(following, turn + 1, packet, table, bars, tiles)
            done = done + count
            load(V, batch, key, kv_head, V_smem, bars.v_full, bars.v_empty, done - 1)
            turn = turn + 1
            count = at[COUNT]
        T.call_extern("handle", "gqa::last_block_resets", call.slot, call.blocks)

    @T.macro
    def key_block(w, ring, n, Q_smem, K_smem, V_smem, bars, frags, lead, logits, at, masked):
        """Logits of key block n and the product of the block before with V, issued together; then the softmax."""
        before = ring - 1
        T.mbarrier_wait_parity(bars.k_full[ring % stages], (ring // stages) % 2)
        T.sync_threads(TURN + w, PAIR)
        T.wgmma_gemm(Q_smem, K_smem[ring % stages, :, :], frags.S, transpose_B=True, policy=tile.FULL_ROW, clear_accum=True)
        T.mbarrier_wait_parity(bars.v_full[before % stages], (before // stages) % 2)
        T.wgmma_gemm(frags.P, V_smem[before % stages, :, :], frags.O, policy=tile.FULL_ROW)
        T.named_barrier_arrive(TURN + (w + 1) % consumers, PAIR)
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
            # A thread holds rows i and i + 8
            if not early_wait or (i // 8) % 2 == 0:
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
        T.call_extern("handle", "gqa::clear_rows", T.address_of(V_smem[stage, 0, 0]), thread, 128 * consumers, rows, block_N, *panels(D_v))
        T.fence_proxy_async()
        T.sync_threads(CLEARED, 128 * consumers)

    @T.macro
    def pass_block(w, ring, bars, lead):
        """A key block that none of this warpgroup's queries sees: given back, and the turn passed on."""
        T.mbarrier_wait_parity(bars.k_full[ring % stages], (ring // stages) % 2)
        T.mbarrier_wait_parity(bars.v_full[ring % stages], (ring // stages) % 2)
        T.sync_threads(TURN + w, PAIR)
        T.named_barrier_arrive(TURN + (w + 1) % consumers, PAIR)
        if lead:
            T.mbarrier_arrive(bars.k_empty[ring % stages])
            T.mbarrier_arrive(bars.v_empty[ring % stages])

    @T.macro
    def consumer(w, Q_smem, K_smem, V_smem, O_smem, packet, bars, O_out, LSE, call):
        T.set_max_nreg(consumer_registers, 1)
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
        skip = T.alloc_var("int32", init=0)
        at = Place(packet, turn)
        lead = T.shuffle_elect(128)
        # With softcap the logits are cap tanh(scale / cap q·k): the softmax scales by cap, and tanh takes the rest
        scale_log2 = (call.cap if softcap else call.scale) * tile.LOG2E
        inner = 2 * tile.LOG2E * call.scale / call.cap if softcap else 0.0
        logits = SimpleNamespace(scale_log2=scale_log2, inner=inner, left=call.left, right=call.right)
        # The last one opens the first one's turn
        if w == consumers - 1:
            T.named_barrier_arrive(TURN, PAIR)
        T.mbarrier_wait_parity(bars.tile_full[0], 0)
        count = at[COUNT]
        while count > 0:
            S_q, S_kv = lengths(at)
            first = at[ROW0] + w * ROWS
            T.fill(O, 0)
            T.fill(row_sum, 0)
            T.fill(row_max, -T.infinity("float32"))
            if passes:
                if packed:
                    if S_kv < (bottom(at) + count) * block_N:
                        clear_end(V_smem, bars, done, S_kv - (bottom(at) + count - 1) * block_N)
                unseen = T.max(0, bottom(at) + count - end_block(mask, block_N, first + ROWS, S_q, S_kv, call.right))
                skip = T.if_then_else(first < S_q, T.min(count - 1, unseen), count - 1)
                for n in T.serial(skip):
                    ring = T.call_extern("int32", "gqa::uniform", done + n)
                    pass_block(w, ring, bars, lead)
            # The block with the diagonal or the end of the keys: always masked, its logits have nothing to run beside
            start = T.call_extern("int32", "gqa::uniform", done + skip) if passes else done
            T.mbarrier_wait_parity(bars.q_full, turn % 2)
            T.mbarrier_wait_parity(bars.k_full[start % stages], (start // stages) % 2)
            T.wgmma_gemm(Q_smem, K_smem[start % stages, :, :], S, transpose_B=True, policy=tile.FULL_ROW, clear_accum=True)
            T.wait_wgmma(0)
            if lead:
                T.mbarrier_arrive(bars.k_empty[start % stages])
                if own_staging:
                    if count == (skip + 1 if passes else 1):
                        T.mbarrier_arrive(bars.q_empty)
            n_first = bottom(at) + count - 1 - (skip if passes else 0)
            if softcap:
                tile.softcap(frags, ROWS, block_N, inner)
            tile.mask(frags, ROWS, block_N, mask, first, n_first * block_N, S_q, S_kv, call.left, call.right)
            tile.online_softmax(frags, ROWS, block_N, scale_log2, True, True)
            T.copy(S, P)
            if packed and not passes:
                if S_kv < (bottom(at) + count) * block_N:
                    clear_end(V_smem, bars, done, S_kv - (bottom(at) + count - 1) * block_N)
            edge = count
            plain = skip + 1 if passes else 1
            if mask != "full":
                # The edge of the mask can touch more blocks; from `plain` to `edge` every key is seen by every query
                whole = T.floordiv((first if passes else at[ROW0]) + S_kv - S_q + 1 + (call.right if mask == "window" else 0), block_N)
                if mask == "window":
                    whole = T.min(whole, T.floordiv(S_kv, block_N))
                    seen = T.ceildiv(T.min(at[ROW0] + block_M, S_q) - 1 + S_kv - S_q - call.left, block_N)
                    edge = T.min(count, T.max(plain, bottom(at) + count - seen))
                plain = T.min(edge, T.max(plain, bottom(at) + count - whole))
                for n in T.serial(skip + 1 if passes else 1, plain):
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
                output.store_lse(first, at, frags, LSE, scale_log2)
            T.wait_wgmma(0)
            if lead:
                T.mbarrier_arrive(bars.v_empty[last % stages])
            for i, j in T.Parallel(ROWS, D_v):
                O[i, j] *= rescale[i]
            output.store(w, first, at, frags, O_smem, O_out, bars, lead)
            T.mbarrier_arrive(bars.tile_empty[turn % 2])
            turn = turn + 1
            T.mbarrier_wait_parity(bars.tile_full[turn % 2], (turn // 2) % 2)
            count = at[COUNT]
        if not split:
            if lead:
                T.tma_store_wait(0)

    more = {"dense": "", "packed": forward_tiles.PACKED + forward_output.PACKED, "split": forward_output.SPLIT}
    prelude = tile.PRELUDE + forward_tiles.COUNTER + more[form]

    @T.macro
    def kernel(Q, K, V, O, LSE, cu_q, cu_k, scale, cap, left, right, blocks, section, slot, parts):
        with T.Kernel(blocks, threads=128 * (1 + consumers), prelude=prelude) as block:
            Q_0 = T.alloc_shared([ROWS, D], dtype)
            Q_1 = T.alloc_shared([ROWS, D], dtype)
            K_smem = T.alloc_shared([stages, block_N, D], dtype)
            V_smem = T.alloc_shared([stages, block_N, D_v], dtype)
            Q_2 = T.alloc_shared([ROWS, D], dtype) if consumers == 3 else Q_1
            T.annotate_layout({b: make_swizzled_layout(b) for b in (Q_0, Q_1, Q_2, K_smem, V_smem)})
            if own_staging and not split:
                O_0 = T.alloc_shared([ROWS, D_v], dtype)
                O_1 = T.alloc_shared([ROWS, D_v], dtype)
                O_2 = T.alloc_shared([ROWS, D_v], dtype) if consumers == 3 else O_1
                T.annotate_layout({b: make_swizzled_layout(b) for b in (O_0, O_1, O_2)})
            packet = T.alloc_shared([2, fields], "int32")
            table = T.alloc_shared([forward_tiles.GROUPS + 1], "int32") if packed else None
            # Assigned one by one: the generated code takes their names from here
            q_full = T.alloc_barrier(1)
            q_empty = T.alloc_barrier(consumers)
            k_full = T.alloc_barrier([1] * stages)
            k_empty = T.alloc_barrier([consumers] * stages)
            v_full = T.alloc_barrier([1] * stages)
            v_empty = T.alloc_barrier([consumers] * stages)
            tile_full = T.alloc_barrier([1] * 2)
            tile_empty = T.alloc_barrier([128 * consumers] * 2)
            rings = {"k_full": k_full, "k_empty": k_empty, "v_full": v_full, "v_empty": v_empty}
            bars = SimpleNamespace(q_full=q_full, q_empty=q_empty, tile_full=tile_full, tile_empty=tile_empty, **rings)
            sizes = {"B": B, "H_q": H_q, "rows_q": rows_q, "rows_kv": rows_kv, "cu_q": cu_q, "cu_k": cu_k, "sequences": offsets - 1}
            numbers = {"scale": scale, "cap": cap, "left": left, "right": right, "section": section, "slot": slot, "parts": parts}
            call = SimpleNamespace(**sizes, **numbers, block=block, blocks=blocks)
            tiles = forward_tiles.schedule(form, mask, block_M, block_N, call)
            thread = T.get_thread_binding()
            if thread < 128:
                T.set_max_nreg(producer_registers, 0)
                if thread < 32:
                    if packed:
                        T.call_extern(
                            "handle", "gqa::count_tiles", *(T.address_of(x[0]) for x in (table, cu_q)), offsets - 1, rows_q, block_M
                        )
                    if T.shuffle_elect(32):
                        producer(Q, K, V, (Q_0, Q_1, Q_2), K_smem, V_smem, packet, table, bars, call, tiles)
            else:
                O_smem = (O_0, O_1, O_2) if own_staging and not split else (Q_0, Q_1, Q_2)
                if thread < 256:
                    consumer(0, Q_0, K_smem, V_smem, O_smem[0], packet, bars, O, LSE, call)
                elif thread < 384 or consumers == 2:
                    consumer(1, Q_1, K_smem, V_smem, O_smem[1], packet, bars, O, LSE, call)
                else:
                    consumer(2, Q_2, K_smem, V_smem, O_smem[2], packet, bars, O, LSE, call)

    queries = T.StridedTensor([B, rows_q, H_q, D], strides["Q"], dtype)
    keys = T.StridedTensor([B, rows_kv, H_kv, D], strides["K"], dtype)
    values = T.StridedTensor([B, rows_kv, H_kv, D_v], strides["V"], dtype)
    outs = T.StridedTensor([B_out if split else B, rows_q, H_q, D_v], strides["O"], "float32" if split else dtype)
    lse = T.Tensor([B_out, rows_q, H_q] if split else [B, H_q, rows_q], "float32")

    if packed:

        @T.prim_func
        def attention_fwd(
            Q: queries,
            K: keys,
            V: values,
            O: outs,
            LSE: lse if return_lse else outs,
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
            O: outs,
            # Without LSE the output is passed again in its place
            LSE: lse if return_lse else outs,
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
