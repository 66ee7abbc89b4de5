"""GQA backward for head sizes above 128; the formulas, the order of dQ's sums and the arguments are those of backward.py.

A thread block owns 64 keys of one KV head. Its two consumer warpgroups share the products and not the keys, of which 64 are the fewest that
a product can have: one computes S^T = K Q^T, hands P on through shared memory and keeps dV; the other computes dP^T = V dO^T, makes dS of
it and P, and keeps dK. So P^T and dS^T are register operands of the products for dV and dK, and while one warpgroup is at its exponentials
the other multiplies. Each takes some 64-column panels of dQ = dS K and has a warp that adds these to the workspace.

Shared memory is what limits this: its bandwidth (a product of 64 x 64 reads as much as it multiplies) and, at D 256, its size. There dO has
one buffer, which its load fills while dK and dQ are multiplied, Q, which is used from the first product to the last, has two, and a
warpgroup's two panels of dQ leave one after the other, the second behind the product for dK or S."""

from types import SimpleNamespace

import tilelang
import tilelang.language as T
from tilelang.layout import make_linear_layout, make_swizzled_layout

from . import backward_roles, backward_tiles, tile
from .backward_output import PRELUDE as OUTPUT
from .backward_output import ROWS, store_rows
from .backward_prepost import LINE, Piece, dq_pieces, dq_place
from .backward_tiles import BATCH, FIELDS, KEY_BLOCK, KV_HEAD, KV_START, PART, S_KV, S_Q, STEPS
from .forward_output import PACKED

CONSUMERS = 256
THREADS = 384
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240
# Named barriers: of all threads at the start; of the consumers where P is handed on and where dS is; of each warpgroup at the end
START, HANDED, EXCHANGE, OWN = 3, 4, 5, 6
# Columns of a panel of dQ, and its lines in the workspace
PANEL = 64
PANEL_LINES = ROWS * PANEL // LINE


def _blocked(i, j):
    """Element (i, j) of a panel, or of P -> its line and column, where a warp's 64-bit accesses are 256 contiguous bytes."""
    return dq_place(Piece(0, ROWS, 0, PANEL), i, j, ROWS, PANEL)


@tilelang.jit(pass_configs=tile.OWN_BARRIERS, target=tile.TARGET)
def build(dtype, D, D_v, mask, softcap, form, block_M, block_N, stages):
    names = ("B", "rows_q", "rows_kv", "H_q", "H_kv", "B_out", "turns", "tiles", "entries")
    B, rows_q, rows_kv, H_q, H_kv, B_out, turns, tiles, entries = (T.dynamic(name) for name in names)
    # A stride can pass 2^31 elements; a length can't
    strides = {t: (*(T.dynamic(f"{t}_stride_{d}", "int64") for d in "bsh"), 1) for t in ("Q", "K", "V", "dO", "dK", "dV")}
    packed, lines = form == "packed", block_M * D // LINE
    # What shared memory has room for: buffers of dO, and of panels of dQ, in a row for each warpgroup
    do_stages, most = (1, 1) if D > 192 else (stages, 2)
    pieces = dq_pieces(block_M, D)
    held = [min(len(own), most) for own in pieces]
    # Of a product whose keys stay in registers, shared memory is read for the queries only
    keep_K, keep_V = D <= 192, D_v <= 128
    # The last panel of the first warpgroup waits until the next step's product for S is under way
    late = len(pieces[0]) - 1
    roles = backward_roles.roles(form, mask, D, D_v, block_M, block_N, stages, do_stages, CONSUMERS, EXCHANGE)

    def panel(w, turn, p):
        """Buffer and phase of a turn's panel `p` of warpgroup w."""
        return w * held[0] + p % held[w], (turn * len(pieces[w]) + p) // held[w] % 2

    @T.macro
    def probabilities(stage, m, masked, at, where, smem, frags, call):
        """P_16 becomes the probabilities, P what dP - delta must be multiplied with."""
        if softcap:
            tile.softcap(frags, ROWS, block_M, 2 * tile.LOG2E * call.scale / call.cap)
        scale_log2 = (call.cap if softcap else call.scale) * tile.LOG2E
        for i, j in T.Parallel(ROWS, block_M):
            frags.P[i, j] = T.exp2(frags.S[i, j] * scale_log2 - smem.lse[stage, j])
        if masked:
            key = at[KEY_BLOCK] * block_N
            tile.mask_transposed(frags, ROWS, block_M, mask, key, m * block_M, *where.lengths(at), call.left, call.right)
        T.copy(frags.P, frags.P_16)
        if softcap:
            for i, j in T.Parallel(ROWS, block_M):
                frags.P[i, j] *= 1.0 - frags.S[i, j] * frags.S[i, j]

    @T.macro
    def multiply_dq(w, smem, frags):
        first, columns = pieces[w][0].column, len(pieces[w]) * PANEL
        T.wgmma_gemm(smem.dS, smem.K[:, first : first + columns], frags.dQ, transpose_A=True, policy=tile.FULL_ROW, clear_accum=True)

    @T.macro
    def hand_panel(w, turn, p, smem, bars, frags):
        """A panel of dQ, to the warp that adds it up. Its buffer must be free: at first a phase that never was counts as done."""
        buffer, phase = panel(w, turn, p)
        T.mbarrier_wait_parity(bars.dq_empty[buffer], phase ^ 1)
        for i, j in T.Parallel(ROWS, PANEL):
            line, column = _blocked(i, j)
            smem.dQ[buffer, line, column] = frags.dQ[i, p * PANEL + j]
        T.fence_proxy_async()
        T.mbarrier_arrive(bars.dq_full[buffer])

    def hand(w, turn, panels, smem, bars, frags):
        for p in panels:
            hand_panel(w, turn, p, smem, bars, frags)

    @T.macro
    def score_step(w, turn, m, masked, at, where, smem, bars, frags, call):
        """S and P, this warpgroup's part of dQ, and dV."""
        stage, phase = turn % stages, (turn // stages) % 2
        do_stage, do_phase = turn % do_stages, (turn // do_stages) % 2
        T.mbarrier_wait_parity(bars.q_full[stage], phase)
        if packed:
            if (m + 1) * block_M > at[S_Q]:
                T.mbarrier_wait_parity(bars.do_full[do_stage], do_phase)
                roles.clear_queries(stage, do_stage, at[S_Q] - m * block_M, smem)
        T.wgmma_gemm(frags.K, smem.Q[stage, :, :], frags.S, transpose_B=True, policy=tile.FULL_ROW, clear_accum=True)
        if turn > 0:
            hand_panel(w, turn - 1, late, smem, bars, frags)
        T.wait_wgmma(0)
        probabilities(stage, m, masked, at, where, smem, frags, call)
        # The other warpgroup has read the P before: it handed its dS on since
        for i, j in T.Parallel(ROWS, block_M):
            line, column = _blocked(i, j)
            smem.P[line, column] = frags.P[i, j]
        T.named_barrier_arrive(HANDED, CONSUMERS)
        T.mbarrier_wait_parity(bars.do_full[do_stage], do_phase)
        T.wgmma_gemm(frags.P_16, smem.dO[do_stage, :, :], frags.dV, policy=tile.FULL_ROW)
        T.sync_threads(EXCHANGE, CONSUMERS)
        if T.shuffle_elect(128):
            T.mbarrier_arrive(bars.q_empty[stage])
        multiply_dq(w, smem, frags)
        T.wait_wgmma(1)
        if T.shuffle_elect(128):
            T.mbarrier_arrive(bars.do_empty[do_stage])
        T.wait_wgmma(0)
        hand(w, turn, range(late), smem, bars, frags)

    @T.macro
    def gradient_step(w, turn, m, at, smem, bars, frags):
        """dP and dS, this warpgroup's part of dQ, and dK."""
        stage, phase = turn % stages, (turn // stages) % 2
        do_stage, do_phase = turn % do_stages, (turn // do_stages) % 2
        T.mbarrier_wait_parity(bars.do_full[do_stage], do_phase)
        if packed:
            if (m + 1) * block_M > at[S_Q]:
                T.mbarrier_wait_parity(bars.q_full[stage], phase)
                roles.clear_queries(stage, do_stage, at[S_Q] - m * block_M, smem)
        T.wgmma_gemm(frags.V, smem.dO[do_stage, :, :], frags.dP, transpose_B=True, policy=tile.FULL_ROW, clear_accum=True)
        # Whoever hands P on has finished the dQ product of the turn before: dS may be overwritten
        T.sync_threads(HANDED, CONSUMERS)
        for i, j in T.Parallel(ROWS, block_M):
            line, column = _blocked(i, j)
            frags.P[i, j] = smem.P[line, column]
        T.wait_wgmma(0)
        for i, j in T.Parallel(ROWS, block_M):
            frags.dP[i, j] = frags.P[i, j] * (frags.dP[i, j] - smem.delta[do_stage, j])
        T.copy(frags.dP, frags.dS)
        T.copy(frags.dS, smem.dS)
        T.fence_proxy_async()
        T.sync_threads(EXCHANGE, CONSUMERS)
        if T.shuffle_elect(128):
            T.mbarrier_arrive(bars.do_empty[do_stage])
        multiply_dq(w, smem, frags)
        T.mbarrier_wait_parity(bars.q_full[stage], phase)
        T.wgmma_gemm(frags.dS, smem.Q[stage, :, :], frags.dK, policy=tile.FULL_ROW)
        T.wait_wgmma(1)
        # As many panels as have a buffer behind the product for dK
        hand(w, turn, range(held[w]), smem, bars, frags)
        T.wait_wgmma(0)
        if T.shuffle_elect(128):
            T.mbarrier_arrive(bars.q_empty[stage])
        hand(w, turn, range(held[w], len(pieces[w])), smem, bars, frags)

    @T.macro
    def store_staged(w, values, buffer, out, batch, key, head):
        """By TMA, from the buffer of K or V, which is read no more."""
        T.sync_threads(EXCHANGE, CONSUMERS)
        T.copy(values, buffer)
        T.fence_proxy_async()
        T.sync_threads(OWN + w, 128)
        if T.shuffle_elect(128):
            T.tma_copy(buffer, out[batch, key : key + block_N, head, :])
            T.tma_store_wait(0)

    @T.macro
    def store(w, values, columns, buffer, out, stride, at, call):
        """dV or dK."""
        first = at[KEY_BLOCK] * block_N
        if form == "split":
            batch = at[PART] * call.B + at[BATCH]
            store_rows(values, columns, out, batch, first, at[KV_HEAD], 0, stride, call.rows_kv - first)
        elif packed:
            if first + block_N <= at[S_KV]:
                store_staged(w, values, buffer, out, 0, at[KV_START] + first, at[KV_HEAD])
            else:
                store_rows(values, columns, out, 0, at[KV_START] + first, at[KV_HEAD], 0, stride, at[S_KV] - first)
        else:
            store_staged(w, values, buffer, out, at[BATCH], first, at[KV_HEAD])

    @T.macro
    def await_keys(at, where, smem, bars):
        T.mbarrier_wait_parity(bars.k_full, 0)
        T.mbarrier_wait_parity(bars.v_full, 0)
        if packed:
            _, keys = where.lengths(at)
            if (at[KEY_BLOCK] + 1) * block_N > keys:
                roles.clear_keys(keys - at[KEY_BLOCK] * block_N, smem)

    @T.macro
    def scores(w, at, where, smem, bars, dV_out, call):
        """The first warpgroup."""
        T.set_max_nreg(CONSUMER_REGISTERS, 1)
        S = T.alloc_fragment([ROWS, block_M], "float32")
        P = T.alloc_fragment([ROWS, block_M], "float32")
        P_16 = T.alloc_fragment([ROWS, block_M], dtype)
        dV = T.alloc_fragment([ROWS, D_v], "float32")
        dQ = T.alloc_fragment([ROWS, len(pieces[w]) * PANEL], "float32")
        low = T.alloc_fragment([ROWS], "int32")
        high = T.alloc_fragment([ROWS], "int32")
        K_own = T.alloc_fragment([block_N, D], dtype) if keep_K else smem.K
        frags = SimpleNamespace(K=K_own, S=S, P=P, P_16=P_16, dV=dV, dQ=dQ, low=low, high=high)
        T.fill(dV, 0)
        T.fill(dQ, 0)
        await_keys(at, where, smem, bars)
        if keep_K:
            T.copy(smem.K, K_own)
        roles.walk(score_step, w, at, where, smem, bars, frags, call)
        if at[STEPS] > 0:
            hand_panel(w, at[STEPS] - 1, late, smem, bars, frags)
        store(w, dV, D_v, smem.V, dV_out, strides["dV"][1], at, call)

    @T.macro
    def gradients(w, at, where, smem, bars, dK_out, call):
        """The second."""
        T.set_max_nreg(CONSUMER_REGISTERS, 1)
        P = T.alloc_fragment([ROWS, block_M], "float32")
        dP = T.alloc_fragment([ROWS, block_M], "float32")
        dS = T.alloc_fragment([ROWS, block_M], dtype)
        dK = T.alloc_fragment([ROWS, D], "float32")
        dQ = T.alloc_fragment([ROWS, len(pieces[w]) * PANEL], "float32")
        V_own = T.alloc_fragment([block_N, D_v], dtype) if keep_V else smem.V
        frags = SimpleNamespace(V=V_own, P=P, dP=dP, dS=dS, dK=dK, dQ=dQ)
        T.fill(dK, 0)
        await_keys(at, where, smem, bars)
        if keep_V:
            T.copy(smem.V, V_own)
        for u in T.serial(at[STEPS]):
            gradient_step(w, u, where.step(at, u)[1], at, smem, bars, frags)
        for i, j in T.Parallel(ROWS, D):
            dK[i, j] *= call.scale
        store(w, dK, D, smem.K, dK_out, strides["dK"][1], at, call)

    @T.macro
    def adder(w, dQ_sum, TURN, at, where, smem, bars, call):
        """Warpgroup w's panels of every step. Both adders count a tile's turns, so a key block's turn has come at twice its rank."""
        spot = T.alloc_local([4], "int32")
        place = T.alloc_var("int32")
        rank = T.alloc_var("int32")
        roles.begin(spot, at)
        for t in T.unroll(0, at[STEPS], unroll_factor=1):
            place = where.tile(at, spot[0], spot[1])
            rank = where.rank(at, spot[1])
            T.call_extern("handle", "gqa::await_turn", T.address_of(TURN[place + 1]), 2 * T.min(rank, call.patience))
            for p in T.unroll(0, len(pieces[w]), unroll_factor=1):
                buffer, phase = panel(w, t, p)
                line = pieces[w][0].column // PANEL * PANEL_LINES + p * PANEL_LINES
                T.mbarrier_wait_parity(bars.dq_full[buffer], phase)
                if rank == 0:
                    T.tma_copy(smem.dQ[buffer, :, :], dQ_sum[place, line : line + PANEL_LINES, :])
                    T.tma_store_wait(0)
                else:
                    T.atomic_add(dQ_sum[place, line : line + PANEL_LINES, :], smem.dQ[buffer, :, :], use_tma=True)
                T.mbarrier_arrive(bars.dq_empty[buffer])
            if rank < call.patience:
                T.call_extern("handle", "gqa::end_turn", T.address_of(TURN[place + 1]))
            roles.advance(spot, at)

    @T.macro
    def kernel(Q, K, V, dO, LSE2, DELTA, dQ_sum, TURN, TABLE, dK, dV, call):
        prelude = tile.PRELUDE + backward_tiles.PRELUDE + OUTPUT + (PACKED if packed else "")
        with T.Kernel(H_kv * B * call.key_blocks * call.head_parts * call.query_parts, threads=THREADS, prelude=prelude):
            K_smem = T.alloc_shared([block_N, D], dtype)
            V_smem = T.alloc_shared([block_N, D_v], dtype)
            Q_smem = T.alloc_shared([stages, block_M, D], dtype)
            dO_smem = T.alloc_shared([do_stages, block_M, D_v], dtype)
            dS_smem = T.alloc_shared([block_N, block_M], dtype)
            P_smem = T.alloc_shared([PANEL_LINES, LINE], "float32")
            dQ_smem = T.alloc_shared([sum(held), PANEL_LINES, LINE], "float32")
            lse_smem = T.alloc_shared([stages, block_M], "float32")
            delta_smem = T.alloc_shared([do_stages, block_M], "float32")
            at = T.alloc_shared([FIELDS], "int32")
            T.annotate_layout({b: make_swizzled_layout(b) for b in (K_smem, V_smem, Q_smem, dO_smem, dS_smem)})
            T.annotate_layout({b: make_linear_layout(b) for b in (P_smem, dQ_smem)})
            blocks = {"K": K_smem, "V": V_smem, "Q": Q_smem, "dO": dO_smem, "dS": dS_smem, "P": P_smem, "dQ": dQ_smem}
            smem = SimpleNamespace(**blocks, lse=lse_smem, delta=delta_smem)
            # Assigned one by one: the generated code takes their names from here
            k_full = T.alloc_barrier(1)
            v_full = T.alloc_barrier(1)
            q_full = T.alloc_barrier([1] * stages)
            q_empty = T.alloc_barrier([2] * stages)
            do_full = T.alloc_barrier([1] * do_stages)
            do_empty = T.alloc_barrier([2] * do_stages)
            dq_full = T.alloc_barrier([128] * sum(held))
            dq_empty = T.alloc_barrier([1] * sum(held))
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
                        roles.producer(Q, K, V, dO, LSE2, DELTA, at, where, smem, bars)
                elif thread < 64:
                    if T.shuffle_elect(32):
                        adder(0, dQ_sum, TURN, at, where, smem, bars, call)
                elif thread < 96:
                    if T.shuffle_elect(32):
                        adder(1, dQ_sum, TURN, at, where, smem, bars, call)
            else:
                if thread < 256:
                    scores(0, at, where, smem, bars, dV, call)
                else:
                    gradients(1, at, where, smem, bars, dK, call)

    queries = T.StridedTensor([B, rows_q, H_q, D], strides["Q"], dtype)
    keys = T.StridedTensor([B, rows_kv, H_kv, D], strides["K"], dtype)
    values = T.StridedTensor([B, rows_kv, H_kv, D_v], strides["V"], dtype)
    gradients_out = T.StridedTensor([B, rows_q, H_q, D_v], strides["dO"], dtype)
    sizes = {"B": B, "H_q": H_q, "H_kv": H_kv, "rows_q": rows_q, "rows_kv": rows_kv, "columns": B * H_kv}
    kind = "float32" if form == "split" else dtype

    @T.prim_func
    def attention_bwd(
        Q: queries,
        K: keys,
        V: values,
        dO: gradients_out,
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
