"""GQA backward for head sizes up to 128: with P = exp(S - LSE), delta = rowsum(dO O) - dLSE and dS = P (dO V^T - delta)

    dQ = scale dS K,    dK = scale sum over the group of dS^T Q,    dV = sum over the group of P^T dO

and dS (1 - tanh^2) for dS under a softcap; arXiv:2307.08691 algorithm 2. backward_prepost.py has what runs before and after.

A thread block owns block_N keys of one KV head. Its producer warp passes the queries of every head of the group by, so dK and dV stay in
registers and need no atomics. Two consumer warpgroups own 64 keys each and compute S^T and dP^T, so that P^T and dS^T are register operands
of the products for dV and dK. dQ is the product over all keys of the block: dS goes through shared memory, each warpgroup takes half of
dQ, and two further warps in turns add it to the workspace by TMA, in the order that backward_tiles.py tells."""

from types import SimpleNamespace

import tilelang
import tilelang.language as T
from tilelang.layout import make_linear_layout, make_swizzled_layout

from . import backward_tiles, tile
from .backward_output import PRELUDE as OUTPUT
from .backward_output import ROWS, store
from .backward_prepost import LINE, dq_pieces, dq_place
from .backward_tiles import BATCH, END, FIELDS, INNER, KEY_BLOCK, KV_HEAD, KV_START, Q_START, ROUND, S_Q, STEPS
from .forward_output import PACKED, panels

CONSUMERS = 256
THREADS = 384
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240
# Named barriers: of all threads at the start, and of the consumers around dS; 1 and 2 belong to TileLang's reductions
START, EXCHANGE = 3, 4


@tilelang.jit(pass_configs=tile.OWN_BARRIERS, target=tile.TARGET)
def build(dtype, D, D_v, mask, softcap, form, block_M, block_N, stages):
    names = ("B", "rows_q", "rows_kv", "H_q", "H_kv", "B_out", "turns", "tiles", "entries")
    B, rows_q, rows_kv, H_q, H_kv, B_out, turns, tiles, entries = (T.dynamic(name) for name in names)
    # A stride can pass 2^31 elements; a length can't
    strides = {t: (*(T.dynamic(f"{t}_stride_{d}", "int64") for d in "bsh"), 1) for t in ("Q", "K", "V", "dO", "dK", "dV")}
    packed, lines, pieces = form == "packed", block_M * D // LINE, dq_pieces(block_M, D)

    @T.macro
    def probabilities(w, stage, m, masked, at, where, smem, frags, call):
        """S becomes what dP - delta must be multiplied with, P_16 the probabilities."""
        if softcap:
            tile.softcap(frags, ROWS, block_M, 2 * tile.LOG2E * call.scale / call.cap)
        scale_log2 = (call.cap if softcap else call.scale) * tile.LOG2E
        for i, j in T.Parallel(ROWS, block_M):
            frags.P[i, j] = T.exp2(frags.S[i, j] * scale_log2 - smem.lse[stage, j])
        if masked:
            key = at[KEY_BLOCK] * block_N + w * ROWS
            tile.mask_transposed(frags, ROWS, block_M, mask, key, m * block_M, *where.lengths(at), call.left, call.right)
        T.copy(frags.P, frags.P_16)
        if softcap:
            for i, j in T.Parallel(ROWS, block_M):
                frags.P[i, j] *= 1.0 - frags.S[i, j] * frags.S[i, j]

    def dq_shape(w, n):
        """Of the n-th piece; of one that there isn't, anything."""
        piece = (*pieces[w], *pieces[0], *pieces[0])[n]
        return [piece.rows, piece.columns]

    # Loops over pieces are Python's, so they stand outside of the macros
    def multiply_dq(w, turn, smem, frags):
        """This warpgroup's pieces of dQ, a product each."""
        for piece, values in zip(pieces[w], frags.dQ, strict=False):
            multiply_piece(piece, turn, smem, values)

    @T.macro
    def multiply_piece(piece, turn, smem, values):
        T.wgmma_gemm(
            smem.dS[turn % 2, :, piece.row : piece.row + piece.rows],
            smem.K[:, piece.column : piece.column + piece.columns],
            values,
            transpose_A=True,
            policy=tile.FULL_ROW,
            clear_accum=True,
        )

    def stage_dq(w, smem, frags):
        for piece, values in zip(pieces[w], frags.dQ, strict=False):
            stage_piece(piece, smem, values)

    @T.macro
    def stage_piece(piece, smem, values):
        for i, j in T.Parallel(piece.rows, piece.columns):
            line, column = dq_place(piece, i, j, block_M, D)
            smem.dQ[line, column] = values[i, j]

    @T.macro
    def clear_queries(stage, phase, rows, smem, bars):
        """Zeroes what lies behind the first `rows` queries: other sequences' rows, where 0 times NaN would be NaN."""
        T.mbarrier_wait_parity(bars.do_full[stage], phase)
        thread = T.get_thread_binding() - 128
        T.call_extern("handle", "gqa::clear_rows", T.address_of(smem.Q[stage, 0, 0]), thread, CONSUMERS, rows, block_M, *panels(D))
        T.call_extern("handle", "gqa::clear_rows", T.address_of(smem.dO[stage, 0, 0]), thread, CONSUMERS, rows, block_M, *panels(D_v))
        T.fence_proxy_async()
        T.sync_threads(EXCHANGE, CONSUMERS)

    @T.macro
    def clear_keys(rows, smem):
        """The same behind the first `rows` keys."""
        thread = T.get_thread_binding() - 128
        T.call_extern("handle", "gqa::clear_rows", T.address_of(smem.K[0, 0]), thread, CONSUMERS, rows, block_N, *panels(D))
        T.call_extern("handle", "gqa::clear_rows", T.address_of(smem.V[0, 0]), thread, CONSUMERS, rows, block_N, *panels(D_v))
        T.fence_proxy_async()
        T.sync_threads(EXCHANGE, CONSUMERS)

    @T.macro
    def step(w, turn, m, masked, at, where, smem, bars, frags, call):
        """All five products for one query block of one head and this warpgroup's 64 keys."""
        stage = turn % stages
        phase = (turn // stages) % 2
        T.mbarrier_wait_parity(bars.q_full[stage], phase)
        if packed:
            if (m + 1) * block_M > at[S_Q]:
                clear_queries(stage, phase, at[S_Q] - m * block_M, smem, bars)
        T.wgmma_gemm(
            smem.K[w * ROWS : (w + 1) * ROWS, :], smem.Q[stage, :, :], frags.S, transpose_B=True, policy=tile.FULL_ROW, clear_accum=True
        )
        T.mbarrier_wait_parity(bars.do_full[stage], phase)
        T.wgmma_gemm(
            smem.V[w * ROWS : (w + 1) * ROWS, :], smem.dO[stage, :, :], frags.dP, transpose_B=True, policy=tile.FULL_ROW, clear_accum=True
        )
        T.wait_wgmma(1)
        probabilities(w, stage, m, masked, at, where, smem, frags, call)
        T.wait_wgmma(0)
        for i, j in T.Parallel(ROWS, block_M):
            frags.dP[i, j] = frags.P[i, j] * (frags.dP[i, j] - smem.delta[stage, j])
        T.copy(frags.dP, frags.dS)
        T.wgmma_gemm(frags.P_16, smem.dO[stage, :, :], frags.dV, policy=tile.FULL_ROW)
        # Two dS buffers: this barrier also says that everyone's dQ product of two turns ago is done
        T.copy(frags.dS, smem.dS[turn % 2, w * ROWS : (w + 1) * ROWS, :])
        T.fence_proxy_async()
        T.sync_threads(EXCHANGE, CONSUMERS)
        multiply_dq(w, turn, smem, frags)
        T.wait_wgmma(len(pieces[w]))
        if T.shuffle_elect(128):
            T.mbarrier_arrive(bars.do_empty[stage])
        T.wgmma_gemm(frags.dS, smem.Q[stage, :, :], frags.dK, policy=tile.FULL_ROW)
        T.wait_wgmma(1)
        # Of the turn before; at the first turn a phase that never was counts as done
        T.mbarrier_wait_parity(bars.dq_empty[(turn + 1) % 2], ((turn + 1) // 2 + 1) % 2)
        stage_dq(w, smem, frags)
        T.fence_proxy_async()
        T.mbarrier_arrive(bars.dq_full[turn % 2])
        T.wait_wgmma(0)
        if T.shuffle_elect(128):
            T.mbarrier_arrive(bars.q_empty[stage])

    @T.macro
    def consumer(w, at, where, smem, bars, dK_out, dV_out, call):
        T.set_max_nreg(CONSUMER_REGISTERS, 1)
        S = T.alloc_fragment([ROWS, block_M], "float32")
        P = T.alloc_fragment([ROWS, block_M], "float32")
        P_16 = T.alloc_fragment([ROWS, block_M], dtype)
        dP = T.alloc_fragment([ROWS, block_M], "float32")
        dS = T.alloc_fragment([ROWS, block_M], dtype)
        dV = T.alloc_fragment([ROWS, D_v], "float32")
        dK = T.alloc_fragment([ROWS, D], "float32")
        dQ_0 = T.alloc_fragment(dq_shape(w, 0), "float32")
        dQ_1 = T.alloc_fragment(dq_shape(w, 1), "float32")
        low = T.alloc_fragment([ROWS], "int32")
        high = T.alloc_fragment([ROWS], "int32")
        frags = SimpleNamespace(S=S, P=P, P_16=P_16, dP=dP, dS=dS, dV=dV, dK=dK, dQ=(dQ_0, dQ_1), low=low, high=high)
        steps = T.alloc_var("int32")
        inner = T.alloc_var("int32")
        plain = T.alloc_var("int32")
        edge = T.alloc_var("int32")
        steps = at[ROUND]
        inner = at[INNER]
        queries, keys = where.lengths(at)
        n0 = at[KEY_BLOCK] * block_N
        T.fill(dV, 0)
        T.fill(dK, 0)
        T.mbarrier_wait_parity(bars.k_full, 0)
        T.mbarrier_wait_parity(bars.v_full, 0)
        if packed:
            if n0 + block_N > keys:
                clear_keys(keys - n0, smem)
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
        for i, j in T.Parallel(ROWS, D):
            dK[i, j] *= call.scale
        store(form, w, block_N, at, call, frags, smem, dK_out, dV_out, (strides["dK"][1], strides["dV"][1]), (D, D_v), EXCHANGE, CONSUMERS)

    @T.macro
    def producer(Q, K, V, dO, LSE2, DELTA, at, where, smem, bars):
        batch, kv_head = at[BATCH], at[KV_HEAD]
        key = at[KEY_BLOCK] * block_N + (at[KV_START] if packed else 0)
        steps = T.alloc_var("int32")
        m = T.alloc_var("int32")
        head = T.alloc_var("int32")
        row = T.alloc_var("int32")
        place = T.alloc_var("int32")
        steps = at[STEPS]
        T.tma_copy(K[batch, key : key + block_N, kv_head, :], smem.K, barrier=bars.k_full)
        T.mbarrier_arrive(bars.k_full)
        for turn in T.unroll(0, steps, unroll_factor=1):
            head = where.step(at, turn)[0]
            m = where.step(at, turn)[1]
            row = m * block_M + (at[Q_START] if packed else 0)
            place = where.tile(at, head, m)
            stage = turn % stages
            phase = (turn // stages) % 2
            T.mbarrier_wait_parity(bars.q_empty[stage], phase ^ 1)
            T.tma_copy(Q[batch, row : row + block_M, head, :], smem.Q[stage, :, :], barrier=bars.q_full[stage])
            T.tma_copy(LSE2[place, :], smem.lse[stage, :], barrier=bars.q_full[stage])
            T.mbarrier_arrive(bars.q_full[stage])
            # V is needed after the first Q: it waits until that is under way
            if turn == 0:
                T.tma_copy(V[batch, key : key + block_N, kv_head, :], smem.V, barrier=bars.v_full)
                T.mbarrier_arrive(bars.v_full)
            T.mbarrier_wait_parity(bars.do_empty[stage], phase ^ 1)
            T.tma_copy(dO[batch, row : row + block_M, head, :], smem.dO[stage, :, :], barrier=bars.do_full[stage])
            T.tma_copy(DELTA[place, :], smem.delta[stage, :], barrier=bars.do_full[stage])
            T.mbarrier_arrive(bars.do_full[stage])
        if steps == 0:
            T.tma_copy(V[batch, key : key + block_N, kv_head, :], smem.V, barrier=bars.v_full)
            T.mbarrier_arrive(bars.v_full)

    @T.macro
    def adder(w, dQ_sum, TURN, at, where, smem, bars, call):
        """Every second step's dQ: so that one sum's way to memory, about as long as a step, runs beside the other's."""
        m = T.alloc_var("int32")
        place = T.alloc_var("int32")
        rank = T.alloc_var("int32")
        for t in T.unroll(0, T.truncdiv(at[STEPS] + 1 - w, 2), unroll_factor=1):
            m = where.step(at, 2 * t + w)[1]
            place = where.tile(at, where.step(at, 2 * t + w)[0], m)
            rank = where.rank(at, m)
            T.call_extern("handle", "gqa::await_turn", T.address_of(TURN[place + 1]), T.min(rank, call.patience))
            T.mbarrier_wait_parity(bars.dq_full[w], t % 2)
            if rank == 0:
                T.tma_copy(smem.dQ, dQ_sum[place, :, :])
                T.tma_store_wait(0)
            else:
                T.atomic_add(dQ_sum[place, :, :], smem.dQ, use_tma=True)
            T.mbarrier_arrive(bars.dq_empty[w])
            if rank < call.patience:
                T.call_extern("handle", "gqa::end_turn", T.address_of(TURN[place + 1]))

    @T.macro
    def kernel(Q, K, V, dO, LSE2, DELTA, dQ_sum, TURN, TABLE, dK, dV, call):
        prelude = tile.PRELUDE + backward_tiles.PRELUDE + OUTPUT + (PACKED if packed else "")
        with T.Kernel(H_kv * B * call.key_blocks * call.head_parts * call.query_parts, threads=THREADS, prelude=prelude):
            K_smem = T.alloc_shared([block_N, D], dtype)
            V_smem = T.alloc_shared([block_N, D_v], dtype)
            Q_smem = T.alloc_shared([stages, block_M, D], dtype)
            dO_smem = T.alloc_shared([stages, block_M, D_v], dtype)
            dS_smem = T.alloc_shared([2, block_N, block_M], dtype)
            dQ_smem = T.alloc_shared([lines, LINE], "float32")
            lse_smem = T.alloc_shared([stages, block_M], "float32")
            delta_smem = T.alloc_shared([stages, block_M], "float32")
            at = T.alloc_shared([FIELDS], "int32")
            T.annotate_layout({b: make_swizzled_layout(b) for b in (K_smem, V_smem, Q_smem, dO_smem, dS_smem)})
            T.annotate_layout({dQ_smem: make_linear_layout(dQ_smem)})
            smem = SimpleNamespace(K=K_smem, V=V_smem, Q=Q_smem, dO=dO_smem, dS=dS_smem, dQ=dQ_smem, lse=lse_smem, delta=delta_smem)
            # Assigned one by one: the generated code takes their names from here
            k_full = T.alloc_barrier(1)
            v_full = T.alloc_barrier(1)
            q_full = T.alloc_barrier([1] * stages)
            q_empty = T.alloc_barrier([2] * stages)
            do_full = T.alloc_barrier([1] * stages)
            do_empty = T.alloc_barrier([2] * stages)
            dq_full = T.alloc_barrier([CONSUMERS] * 2)
            dq_empty = T.alloc_barrier([1] * 2)
            rings = {"q_full": q_full, "q_empty": q_empty, "do_full": do_full, "do_empty": do_empty}
            bars = SimpleNamespace(k_full=k_full, v_full=v_full, dq_full=dq_full, dq_empty=dq_empty, **rings)
            where = backward_tiles.schedule(form, mask, block_M, block_N, call)
            thread = T.get_thread_binding()
            if thread == 0:
                order = T.alloc_var("int32")
                order = T.call_extern("int32", "gqa::ticket", T.address_of(TURN[0]))
                where.settle(at, order, TABLE)
            T.sync_threads(START, THREADS)
            if thread < 128:
                T.set_max_nreg(PRODUCER_REGISTERS, 0)
                if thread < 32:
                    if T.shuffle_elect(32):
                        producer(Q, K, V, dO, LSE2, DELTA, at, where, smem, bars)
                elif thread < 64:
                    if T.shuffle_elect(32):
                        adder(0, dQ_sum, TURN, at, where, smem, bars, call)
                elif thread < 96:
                    if T.shuffle_elect(32):
                        adder(1, dQ_sum, TURN, at, where, smem, bars, call)
            else:
                if thread < 256:
                    consumer(0, at, where, smem, bars, dK, dV, call)
                else:
                    consumer(1, at, where, smem, bars, dK, dV, call)

    queries = T.StridedTensor([B, rows_q, H_q, D], strides["Q"], dtype)
    keys = T.StridedTensor([B, rows_kv, H_kv, D], strides["K"], dtype)
    values = T.StridedTensor([B, rows_kv, H_kv, D_v], strides["V"], dtype)
    gradients = T.StridedTensor([B, rows_q, H_q, D_v], strides["dO"], dtype)
    sizes = {"B": B, "H_q": H_q, "H_kv": H_kv, "rows_q": rows_q, "rows_kv": rows_kv, "columns": B * H_kv}
    kind = "float32" if form == "split" else dtype

    @T.prim_func
    def attention_bwd(
        Q: queries,
        K: keys,
        V: values,
        dO: gradients,
        LSE2: T.Tensor([tiles, block_M], "float32"),
        DELTA: T.Tensor([tiles, block_M], "float32"),
        dQ_sum: T.Tensor([tiles, lines, LINE], "float32"),
        TURN: T.Tensor([turns], "int32"),
        # One row that nobody reads unless the call is packed
        TABLE: T.Tensor([entries, backward_tiles.ROW], "int32"),
        dK: T.StridedTensor([B_out, rows_kv, H_kv, D], strides["dK"], kind),
        dV: T.StridedTensor([B_out, rows_kv, H_kv, D_v], strides["dV"], kind),
        scale: T.float32,
        cap: T.float32,
        left: T.int32,
        right: T.int32,
        head_tiles: T.int32,
        key_blocks: T.int32,
        head_parts: T.int32,
        query_parts: T.int32,
        width: T.int32,
        inner: T.int32,
        patience: T.int32,
    ):
        numbers = {"scale": scale, "cap": cap, "left": left, "right": right, "width": width, "inner": inner, "patience": patience}
        blocks = {"head_tiles": head_tiles, "key_blocks": key_blocks, "head_parts": head_parts, "query_parts": query_parts}
        kernel(Q, K, V, dO, LSE2, DELTA, dQ_sum, TURN, TABLE, dK, dV, SimpleNamespace(**sizes, **numbers, **blocks))

    return attention_bwd
