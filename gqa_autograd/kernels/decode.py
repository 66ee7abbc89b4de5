"""Decoding: a few queries of each sequence over its cache, O = softmax(S) V, S = scale Q K^T or cap tanh(scale / cap Q K^T).

All query heads of a KV head share a tile of 64 rows, row = position G + head in the group, so K and V are read once whatever the ratio of
heads. A thread block has one consumer warpgroup and one producer warp, which streams K and V by TMA through rings of buffers; up to D 128
two blocks share a multiprocessor, and one's softmax runs under the other's products. What a block does is an equal stretch of all key tiles
(decode_tiles.py); where it begins or ends inside a unit it leaves a part, and the last to come merges the parts (decode_output.py).

Three forms. "dense": the cache is [B, S_max, H_kv, D]. "paged": pages of at least `box` keys in a pool. "small": pages below that; then a
tile takes several boxes of 16. A page that the pool doesn't have is read from behind the pool's end, where TMA gives zeros, and masked."""

from types import SimpleNamespace

import tilelang
import tilelang.language as T
from tilelang.layout import make_swizzled_layout

from . import decode_output, decode_tiles, forward_output, tile
from .decode_output import TAIL
from .decode_tiles import FIELDS, LENGTH, LOW, OFFSET, ROWS, SEQUENCE, TILES, UNIT

THREADS = 160
# Named barrier of the consumers
TOGETHER = 3
WARPS = 4


@tilelang.jit(pass_configs=tile.OWN_BARRIERS, target=tile.TARGET)
def build(dtype, D, softcap, form, block_N, box, k_stages, v_stages, blocks_per_sm, skip_rescale):
    names = ("B", "S_q", "H_q", "H_kv", "P", "S_page", "max_pages", "slots", "most_rows", "counters", "l_0", "l_1", "l_2")
    B, S_q, H_q, H_kv, P, S_page, max_pages, slots, most_rows, counters, l_0, l_1, l_2 = (T.dynamic(name) for name in names)
    # A stride can pass 2^31 elements; a length can't
    strides = {t: (*(T.dynamic(f"{t}_stride_{d}", "int64") for d in "bsh"), 1) for t in "QKV"}
    paged, boxes = form != "dense", block_N // box
    columns = D if boxes == 1 else 64

    @T.macro
    def begin(at, lengths, call):
        T.call_extern(
            "handle",
            f"gqa::begin<{block_N}>",
            *(at.data, lengths.data, B, call.capacity, S_q + call.left, call.units, call.fewest),
            *(call.block, call.blocks),
        )

    @T.macro
    def advance(at, lengths, call):
        T.call_extern(
            "handle",
            f"gqa::advance<{block_N}>",
            *(at.data, lengths.data, call.capacity, S_q + call.left, call.units),
        )

    @T.macro
    def load(tensor, at, key0, head, pages, smem, stage, full):
        for x in T.unroll(boxes):
            page = pages[x] if paged else at[SEQUENCE]
            row = T.truncmod(key0 + x * box, S_page) if paged else key0 + x * box
            # Where a tile takes several boxes TileLang wants each panel of 64 columns by itself
            for c in T.unroll(D // columns):
                T.tma_copy(
                    tensor[page, row : row + box, head, c * columns : (c + 1) * columns],
                    smem[stage, x * box : (x + 1) * box, c * columns : (c + 1) * columns],
                    barrier=full[stage],
                )

    @T.macro
    def producer(K, V, K_smem, V_smem, absent_smem, lengths, table, bars, call):
        at = T.alloc_local([FIELDS], "int32")
        pages = T.alloc_local([boxes], "int32")
        count = T.alloc_var("int32", init=0)
        done = T.alloc_var("int32", init=0)
        absent = T.alloc_var("int32", init=0)
        key0 = T.alloc_var("int32", init=0)
        head = T.alloc_var("int32", init=0)
        begin(at, lengths, call)
        if T.shuffle_elect(32):
            count = T.call_extern("int32", "gqa::stretch", at.data)
            while count > 0:
                head = T.truncdiv(at[UNIT], call.row_tiles)
                for n in T.unroll(count, unroll_factor=1):
                    ring = done + n
                    key0 = (at[LOW] + at[OFFSET] + n) * block_N
                    if paged:
                        absent = 0
                        for x in T.unroll(boxes):
                            pages[x] = T.call_extern(
                                "int32", "gqa::page_of", table.data, at[SEQUENCE], max_pages, P, key0 + x * box, S_page, at[LENGTH]
                            )
                            absent = absent + T.if_then_else(pages[x] == P, 1 << x, 0)
                    T.mbarrier_wait_parity(bars.k_empty[ring % k_stages], ((ring // k_stages) % 2) ^ 1)
                    load(K, at, key0, head, pages, K_smem, ring % k_stages, bars.k_full)
                    if paged:
                        absent_smem[ring % k_stages] = absent
                    T.mbarrier_arrive(bars.k_full[ring % k_stages])
                    T.mbarrier_wait_parity(bars.v_empty[ring % v_stages], ((ring // v_stages) % 2) ^ 1)
                    load(V, at, key0, head, pages, V_smem, ring % v_stages, bars.v_full)
                    T.mbarrier_arrive(bars.v_full[ring % v_stages])
                done = done + count
                advance(at, lengths, call)
                count = T.call_extern("int32", "gqa::stretch", at.data)

    @T.macro
    def key_tile(ring, key0, Q_smem, K_smem, V_smem, absent_smem, bars, frags, unit, logits, lead):
        """The softmax over one tile of keys, and its product with V."""
        T.mbarrier_wait_parity(bars.k_full[ring % k_stages], (ring // k_stages) % 2)
        absent = T.alloc_var("int32")
        absent = absent_smem[ring % k_stages] if paged else 0
        T.wgmma_gemm(Q_smem, K_smem[ring % k_stages, :, :], frags.S, transpose_B=True, policy=tile.FULL_ROW, clear_accum=True)
        T.wait_wgmma(0)
        if paged:
            # One lane gives back what all have read
            T.call_extern("handle", "__syncwarp")
        if lead:
            T.mbarrier_arrive(bars.k_empty[ring % k_stages])
        if softcap:
            tile.softcap(frags, ROWS, block_N, logits.inner)
        if T.Or(key0 < unit.seen_by_all, key0 + block_N > unit.unseen):
            decode_tiles.mask(frags, block_N, key0, S_q, unit.length, logits.left, logits.right)
        if paged:
            if absent != 0:
                decode_tiles.mask_pages(frags, block_N, box, absent)
        tile.online_softmax(frags, ROWS, block_N, logits.scale_log2, False, True)
        tile.rescale_output(frags, ROWS, D, skip_rescale)
        T.copy(frags.S, frags.P)
        T.mbarrier_wait_parity(bars.v_full[ring % v_stages], (ring // v_stages) % 2)
        if key0 + block_N > unit.length:
            # What lies behind the last key may be NaN, and 0 times NaN is NaN
            T.call_extern(
                "handle",
                "gqa::clear_rows",
                T.address_of(V_smem[ring % v_stages, 0, 0]),
                *(T.get_thread_binding(), 128, unit.length - key0, block_N, *forward_output.panels(D)),
            )
            T.fence_proxy_async()
            T.sync_threads(TOGETHER, 128)
        T.wgmma_gemm(frags.P, V_smem[ring % v_stages, :, :], frags.O, policy=tile.FULL_ROW)
        T.wait_wgmma(0)
        if lead:
            T.mbarrier_arrive(bars.v_empty[ring % v_stages])

    @T.macro
    def finish(at, count, frags, unit, O, LSE, Parts, Counters, last_smem, call, scale_log2):
        """Sums become out and lse, which leave; a part's go to the workspace, and the last part merges them all."""
        thread = T.get_thread_binding()
        values = T.alloc_local([D // 2], "float32")
        row_lse = T.alloc_local([2], "float32")
        for i in T.Parallel(ROWS):
            frags.row_sum[i] = T.call_extern("float32", "gqa::quad_sum", frags.row_sum[i])
        for i in T.Parallel(ROWS):
            frags.rescale[i] = T.if_then_else(frags.row_sum[i] > 0.0, 1.0 / frags.row_sum[i], 0.0)
            frags.part_sum[i] = T.if_then_else(
                frags.row_sum[i] > 0.0, T.log2(frags.row_sum[i]) + frags.row_max[i] * scale_log2, -T.infinity("float32")
            )
        for i in T.Parallel(ROWS):
            T.call_extern("handle", "gqa::put", row_lse.data, i % 16 // 8, frags.part_sum[i])
        for i, j in T.Parallel(ROWS, D):
            frags.O[i, j] *= frags.rescale[i]
        for i, j in T.Parallel(ROWS, D):
            T.call_extern("handle", "gqa::put", values.data, j // 8 * 4 + i % 16 // 8 * 2 + j % 2, frags.O[i, j])
        place = (unit.row0, unit.rows, at[SEQUENCE], unit.head, S_q, H_q, call.G, call.with_lse)
        if count == at[TILES]:
            T.call_extern(
                "handle",
                f"gqa::store_whole<{D}>",
                *(T.address_of(O[0, 0, 0, 0]), T.address_of(LSE[0, 0, 0]), values.data, row_lse.data),
                *(thread, *place),
            )
        else:
            first = T.alloc_var("int32")
            last = T.alloc_var("int32")
            first = T.call_extern("int32", "gqa::first_block", at.data)
            last = T.call_extern("int32", "gqa::last_block", at.data)
            T.call_extern(
                "handle",
                f"gqa::store_part<{D}>",
                *(T.address_of(Parts[0, 0, 0]), most_rows, first, call.block, values.data, row_lse.data, thread, unit.rows),
            )
            T.sync_threads(TOGETHER, 128)
            if thread == 0:
                T.call_extern("handle", "gqa::note_last", *(T.address_of(last_smem[0]), T.address_of(Counters[0]), first, last - first + 1))
            T.sync_threads(TOGETHER, 128)
            if last_smem[0] != 0:
                T.call_extern(
                    "handle",
                    f"gqa::merge<{D}>",
                    *(T.address_of(O[0, 0, 0, 0]), T.address_of(LSE[0, 0, 0]), T.address_of(Parts[0, 0, 0]), most_rows, first, last),
                    *(thread, *place),
                )

    @T.macro
    def consumer(Q, O, LSE, Parts, Counters, Q_smem, K_smem, V_smem, absent_smem, last_smem, lengths, bars, call):
        S = T.alloc_fragment([ROWS, block_N], "float32")
        P = T.alloc_fragment([ROWS, block_N], dtype)
        O_frag = T.alloc_fragment([ROWS, D], "float32")
        row_max = T.alloc_fragment([ROWS], "float32")
        old_max = T.alloc_fragment([ROWS], "float32")
        rescale = T.alloc_fragment([ROWS], "float32")
        part_sum = T.alloc_fragment([ROWS], "float32")
        row_sum = T.alloc_fragment([ROWS], "float32")
        position = T.alloc_fragment([ROWS], "int32")
        limit = T.alloc_fragment([ROWS], "int32")
        floor = T.alloc_fragment([ROWS], "int32")
        sums = {"row_max": row_max, "old_max": old_max, "rescale": rescale, "part_sum": part_sum, "row_sum": row_sum}
        frags = SimpleNamespace(S=S, P=P, O=O_frag, position=position, limit=limit, floor=floor, **sums)
        at = T.alloc_local([FIELDS], "int32")
        count = T.alloc_var("int32", init=0)
        done = T.alloc_var("int32", init=0)
        head = T.alloc_var("int32", init=0)
        row0 = T.alloc_var("int32", init=0)
        rows = T.alloc_var("int32", init=0)
        seen_by_all = T.alloc_var("int32", init=0)
        unseen = T.alloc_var("int32", init=0)
        lead = T.shuffle_elect(32)
        # With softcap the logits are cap tanh(scale / cap q·k): the softmax scales by cap, and tanh takes the rest
        scale_log2 = (call.cap if softcap else call.scale) * tile.LOG2E
        inner = 2 * tile.LOG2E * call.scale / call.cap if softcap else 0.0
        logits = SimpleNamespace(scale_log2=scale_log2, inner=inner, left=call.left, right=call.right)
        unit = SimpleNamespace(head=head, row0=row0, rows=rows, length=at[LENGTH], seen_by_all=seen_by_all, unseen=unseen)
        begin(at, lengths, call)
        count = T.call_extern("int32", "gqa::stretch", at.data)
        while count > 0:
            head = T.truncdiv(at[UNIT], call.row_tiles)
            row0 = T.truncmod(at[UNIT], call.row_tiles) * ROWS
            rows = T.min(S_q * call.G - row0, ROWS)
            # Nobody reads the queries before any more, nor the flag of the last merge
            T.sync_threads(TOGETHER, 128)
            T.call_extern(
                "handle",
                f"gqa::load_queries<{D}>",
                *(T.address_of(Q_smem[0, 0]), Q.data, *strides["Q"][:3], at[SEQUENCE], head, T.get_thread_binding(), row0, rows, call.G),
            )
            for i in T.Parallel(ROWS):
                position[i] = T.truncdiv(row0 + i, call.G)
            # Keys from seen_by_all on and before unseen are seen by every row
            seen_by_all = T.truncdiv(row0 + rows - 1, call.G) + at[LENGTH] - S_q - call.left
            unseen = T.min(at[LENGTH], T.truncdiv(row0, call.G) + at[LENGTH] - S_q + call.right + 1)
            T.fill(O_frag, 0)
            T.fill(row_sum, 0)
            T.fill(row_max, -T.infinity("float32"))
            T.fence_proxy_async()
            T.sync_threads(TOGETHER, 128)
            for n in T.unroll(count, unroll_factor=1):
                ring = T.call_extern("int32", "gqa::uniform", done + n)
                key0 = (at[LOW] + at[OFFSET] + n) * block_N
                key_tile(ring, key0, Q_smem, K_smem, V_smem, absent_smem, bars, frags, unit, logits, lead)
            finish(at, count, frags, unit, O, LSE, Parts, Counters, last_smem, call, scale_log2)
            done = done + count
            advance(at, lengths, call)
            count = T.call_extern("int32", "gqa::stretch", at.data)

    prelude = tile.PRELUDE + forward_output.PACKED + decode_tiles.PRELUDE + decode_output.PRELUDE

    @T.prim_func
    def attention_decode(
        Q: T.StridedTensor([B, S_q, H_q, D], strides["Q"], dtype),
        K: T.StridedTensor([P, S_page, H_kv, D], strides["K"], dtype),
        V: T.StridedTensor([P, S_page, H_kv, D], strides["V"], dtype),
        O: T.Tensor([B, S_q, H_q, D], dtype),
        # Without LSE the workspace is passed again in its place
        LSE: T.Tensor([l_0, l_1, l_2], "float32"),
        lengths: T.Tensor([B], "int32"),
        # A dense cache has none, and passes its lengths again
        table: T.Tensor([B, max_pages], "int32") if paged else T.Tensor([B], "int32"),
        Parts: T.Tensor([slots, most_rows, D + TAIL], "float32"),
        Counters: T.Tensor([counters], "int32"),
        scale: T.float32,
        cap: T.float32,
        left: T.int32,
        right: T.int32,
        capacity: T.int32,
        fewest: T.int32,
        with_lse: T.int32,
        blocks: T.int32,
    ):
        with T.Kernel(blocks, threads=THREADS, prelude=prelude) as block:
            T.annotate_min_blocks_per_sm(blocks_per_sm)
            Q_smem = T.alloc_shared([ROWS, D], dtype)
            K_smem = T.alloc_shared([k_stages, block_N, D], dtype)
            V_smem = T.alloc_shared([v_stages, block_N, D], dtype)
            T.annotate_layout({b: make_swizzled_layout(b) for b in (Q_smem, K_smem, V_smem)})
            absent_smem = T.alloc_shared([k_stages], "int32") if paged else None
            last_smem = T.alloc_shared([1], "int32")
            # Assigned one by one: the generated code takes their names from here
            k_full = T.alloc_barrier([1] * k_stages)
            k_empty = T.alloc_barrier([WARPS] * k_stages)
            v_full = T.alloc_barrier([1] * v_stages)
            v_empty = T.alloc_barrier([WARPS] * v_stages)
            bars = SimpleNamespace(k_full=k_full, k_empty=k_empty, v_full=v_full, v_empty=v_empty)
            G = T.alloc_var("int32")
            row_tiles = T.alloc_var("int32")
            units = T.alloc_var("int32")
            G = T.truncdiv(H_q, H_kv)
            row_tiles = T.ceildiv(S_q * G, ROWS)
            units = row_tiles * H_kv
            numbers = {"scale": scale, "cap": cap, "left": left, "right": right, "capacity": capacity, "fewest": fewest}
            call = SimpleNamespace(**numbers, with_lse=with_lse, block=block, blocks=blocks, G=G, row_tiles=row_tiles, units=units)
            if T.get_thread_binding() < 128:
                consumer(Q, O, LSE, Parts, Counters, Q_smem, K_smem, V_smem, absent_smem, last_smem, lengths, bars, call)
            else:
                producer(K, V, K_smem, V_smem, absent_smem, lengths, table, bars, call)

    return attention_decode
