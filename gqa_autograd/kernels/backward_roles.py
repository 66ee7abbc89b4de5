"""What both main kernels of the backward have in common: loads, the consumers' way through the queries, and the ends of packed sequences."""

from types import SimpleNamespace

import tilelang.language as T

from .backward_tiles import BATCH, END, GROUP, HEAD, KEY_BLOCK, KV_HEAD, KV_START, Q_START, STEPS
from .forward_output import panels


def roles(form, mask, D, D_v, block_M, block_N, stages, do_stages, consumers, barrier) -> SimpleNamespace:
    """The macros for Q in `stages` and dO in `do_stages` buffers, `consumers` threads behind the first 128 and their named barrier."""
    packed = form == "packed"

    @T.macro
    def clear(blocks, rows, length):
        """Zeroes what lies behind the first `rows` of (first element, columns): other sequences' rows, where 0 times NaN would be NaN."""
        thread = T.get_thread_binding() - 128
        T.call_extern("handle", "gqa::clear_rows", T.address_of(blocks[0]), thread, consumers, rows, length, *panels(D))
        T.call_extern("handle", "gqa::clear_rows", T.address_of(blocks[1]), thread, consumers, rows, length, *panels(D_v))
        T.fence_proxy_async()
        T.sync_threads(barrier, consumers)

    @T.macro
    def clear_queries(stage, do_stage, rows, smem):
        clear((smem.Q[stage, 0, 0], smem.dO[do_stage, 0, 0]), rows, block_M)

    @T.macro
    def clear_keys(rows, smem):
        clear((smem.K[0, 0], smem.V[0, 0]), rows, block_N)

    @T.macro
    def walk(step, w, at, where, smem, bars, frags, call):
        """All steps of the thread block, those that need a mask apart."""
        steps = T.alloc_var("int32")
        group = T.alloc_var("int32")
        plain = T.alloc_var("int32")
        edge = T.alloc_var("int32")
        steps = at[STEPS]
        group = at[GROUP]
        queries, keys = where.lengths(at)
        n0 = at[KEY_BLOCK] * block_N
        # From step `plain` on, as long as `edge` is not reached, every query sees every key of the block
        plain = 0
        edge = steps
        if mask == "window":
            plain = (at[END] - T.floordiv(n0 + queries - keys + call.left + 1, block_M)) * group
            plain = T.min(T.max(plain, 0), steps)
        if mask != "full":
            edge = (at[END] - T.ceildiv(n0 + block_N - 1 + queries - keys - call.right, block_M)) * group
            edge = T.max(T.min(edge, steps), plain)
        if mask != "causal":
            edge = T.if_then_else(n0 + block_N > keys, plain, edge)
        if mask == "window":
            for u in T.serial(plain):
                step(w, u, at[END] - 1 - T.truncdiv(u, group), True, at, where, smem, bars, frags, call)
        for u in T.serial(plain, edge):
            step(w, u, at[END] - 1 - T.truncdiv(u, group), False, at, where, smem, bars, frags, call)
        for u in T.serial(edge, steps):
            step(w, u, at[END] - 1 - T.truncdiv(u, group), True, at, where, smem, bars, frags, call)

    @T.macro
    def producer(Q, K, V, dO, LSE2, DELTA, at, where, smem, bars):
        """By one thread: all loads."""
        batch, kv_head = at[BATCH], at[KV_HEAD]
        key = at[KEY_BLOCK] * block_N + (at[KV_START] if packed else 0)
        steps = T.alloc_var("int32")
        m = T.alloc_var("int32")
        head = T.alloc_var("int32")
        row = T.alloc_var("int32")
        place = T.alloc_var("int32")
        steps = at[STEPS]
        m = at[END] - 1
        head = at[HEAD]
        T.tma_copy(K[batch, key : key + block_N, kv_head, :], smem.K, barrier=bars.k_full)
        T.mbarrier_arrive(bars.k_full)
        for turn in T.unroll(0, steps, unroll_factor=1):
            row = m * block_M + (at[Q_START] if packed else 0)
            place = where.tile(at, head, m)
            stage, phase = turn % stages, (turn // stages) % 2
            do_stage, do_phase = turn % do_stages, (turn // do_stages) % 2
            T.mbarrier_wait_parity(bars.q_empty[stage], phase ^ 1)
            T.tma_copy(Q[batch, row : row + block_M, head, :], smem.Q[stage, :, :], barrier=bars.q_full[stage])
            T.tma_copy(LSE2[place, :], smem.lse[stage, :], barrier=bars.q_full[stage])
            T.mbarrier_arrive(bars.q_full[stage])
            # V is needed after the first Q: it waits until that is under way
            if turn == 0:
                T.tma_copy(V[batch, key : key + block_N, kv_head, :], smem.V, barrier=bars.v_full)
                T.mbarrier_arrive(bars.v_full)
            T.mbarrier_wait_parity(bars.do_empty[do_stage], do_phase ^ 1)
            T.tma_copy(dO[batch, row : row + block_M, head, :], smem.dO[do_stage, :, :], barrier=bars.do_full[do_stage])
            T.tma_copy(DELTA[place, :], smem.delta[do_stage, :], barrier=bars.do_full[do_stage])
            T.mbarrier_arrive(bars.do_full[do_stage])
            # Counted on: a division each step would need registers
            head += 1
            if head == at[HEAD] + at[GROUP]:
                head = at[HEAD]
                m -= 1
        if steps == 0:
            T.tma_copy(V[batch, key : key + block_N, kv_head, :], smem.V, barrier=bars.v_full)
            T.mbarrier_arrive(bars.v_full)

    return SimpleNamespace(clear_queries=clear_queries, clear_keys=clear_keys, walk=walk, producer=producer)
