"""What the main kernels of the backward have in common: loads, the way through the queries, and the ends of packed sequences."""

from types import SimpleNamespace

import tilelang.language as T

from .backward_tiles import BATCH, END, HEAD, INNER, KEY_BLOCK, KV_HEAD, KV_START, Q_START, ROUND, STEPS
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
        inner = T.alloc_var("int32")
        plain = T.alloc_var("int32")
        edge = T.alloc_var("int32")
        steps = at[ROUND]
        inner = at[INNER]
        queries, keys = where.lengths(at)
        n0 = at[KEY_BLOCK] * block_N
        # From step `plain` of a round on, as long as `edge` is not reached, every query sees every key of the block
        plain = 0
        edge = steps
        if mask == "window":
            plain = (at[END] - T.floordiv(n0 + queries - keys + call.left + 1, block_M)) * inner
            plain = T.min(T.max(plain, 0), steps)
        if mask != "full":
            edge = (at[END] - T.ceildiv(n0 + block_N - 1 + queries - keys - call.right, block_M)) * inner
            edge = T.max(T.min(edge, steps), plain)
        if mask != "causal":
            edge = T.if_then_else(n0 + block_N > keys, plain, edge)
        turn = T.alloc_var("int32", init=0)
        while turn < at[STEPS]:
            if mask == "window":
                for u in T.serial(plain):
                    step(w, turn + u, at[END] - 1 - T.truncdiv(u, inner), True, at, where, smem, bars, frags, call)
            for u in T.serial(plain, edge):
                step(w, turn + u, at[END] - 1 - T.truncdiv(u, inner), False, at, where, smem, bars, frags, call)
            for u in T.serial(edge, steps):
                step(w, turn + u, at[END] - 1 - T.truncdiv(u, inner), True, at, where, smem, bars, frags, call)
            turn = turn + steps

    @T.macro
    def begin(spot, at):
        """spot: the query head and query block of a step, and how many steps are left to the next block and to the next heads."""
        spot[0] = at[HEAD]
        spot[1] = at[END] - 1
        spot[2] = at[INNER]
        spot[3] = at[ROUND]

    @T.macro
    def advance(spot, at):
        """To the next step, counting: divisions each step would need more registers than these warps have."""
        spot[0] += 1
        spot[2] -= 1
        spot[3] -= 1
        if spot[2] == 0:
            spot[2] = at[INNER]
            if spot[3] == 0:
                spot[3] = at[ROUND]
                spot[1] = at[END] - 1
            else:
                spot[0] -= at[INNER]
                spot[1] -= 1

    @T.macro
    def producer(Q, K, V, dO, LSE2, DELTA, at, where, smem, bars):
        """By one thread: all loads."""
        batch, kv_head = at[BATCH], at[KV_HEAD]
        key = at[KEY_BLOCK] * block_N + (at[KV_START] if packed else 0)
        spot = T.alloc_local([4], "int32")
        steps = T.alloc_var("int32")
        row = T.alloc_var("int32")
        place = T.alloc_var("int32")
        steps = at[STEPS]
        begin(spot, at)
        T.tma_copy(K[batch, key : key + block_N, kv_head, :], smem.K, barrier=bars.k_full)
        T.mbarrier_arrive(bars.k_full)
        for turn in T.unroll(0, steps, unroll_factor=1):
            row = spot[1] * block_M + (at[Q_START] if packed else 0)
            place = where.tile(at, spot[0], spot[1])
            stage, phase = turn % stages, (turn // stages) % 2
            do_stage, do_phase = turn % do_stages, (turn // do_stages) % 2
            T.mbarrier_wait_parity(bars.q_empty[stage], phase ^ 1)
            T.tma_copy(Q[batch, row : row + block_M, spot[0], :], smem.Q[stage, :, :], barrier=bars.q_full[stage])
            T.tma_copy(LSE2[place, :], smem.lse[stage, :], barrier=bars.q_full[stage])
            T.mbarrier_arrive(bars.q_full[stage])
            # V is needed after the first Q: it waits until that is under way
            if turn == 0:
                T.tma_copy(V[batch, key : key + block_N, kv_head, :], smem.V, barrier=bars.v_full)
                T.mbarrier_arrive(bars.v_full)
            T.mbarrier_wait_parity(bars.do_empty[do_stage], do_phase ^ 1)
            T.tma_copy(dO[batch, row : row + block_M, spot[0], :], smem.dO[do_stage, :, :], barrier=bars.do_full[do_stage])
            T.tma_copy(DELTA[place, :], smem.delta[do_stage, :], barrier=bars.do_full[do_stage])
            T.mbarrier_arrive(bars.do_full[do_stage])
            advance(spot, at)
        if steps == 0:
            T.tma_copy(V[batch, key : key + block_N, kv_head, :], smem.V, barrier=bars.v_full)
            T.mbarrier_arrive(bars.v_full)

    return SimpleNamespace(clear_queries=clear_queries, clear_keys=clear_keys, walk=walk, begin=begin, advance=advance, producer=producer)
