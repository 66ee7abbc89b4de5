"""Dense GQA backward: with P = exp(S - LSE), delta = rowsum(dO O) - dLSE and dS = P (dO V^T - delta)

    dQ = scale dS K,    dK = scale sum over the group of dS^T Q,    dV = sum over the group of P^T dO

arXiv:2307.08691 algorithm 2. Three kernels: `build_preprocess` makes delta and the LSE in units of log 2 and clears the float32 dQ; `build`
computes; `build_postprocess` scales and casts dQ. A thread block of `build` owns block_N keys of one KV head. Its producer warp passes the
queries of every head of the group by, so dK and dV stay in registers and need no atomics. Two consumer warpgroups own 64 keys each and
compute S^T and dP^T, so that P^T and dS^T are register operands of the products for dV and dK. dQ is the product over all keys of the
block: dS goes through shared memory, each warpgroup takes half of D, and a warp of its own adds the result to global memory by TMA."""

import functools
from types import SimpleNamespace

import tilelang
import tilelang.language as T
import torch
from tilelang.layout import make_linear_layout, make_swizzled_layout
from torch import Tensor

from . import device, tile
from .backward_prepost import LINE, build_postprocess, build_preprocess, dq_place
from .build import Program, kernel
from .config import Backward

ROWS = 64
CONSUMERS = 256
THREADS = 384
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240
# Named barrier of the consumers around dS; 1 and 2 belong to TileLang's reductions
EXCHANGE = 4


@tilelang.jit(pass_configs=tile.OWN_BARRIERS, target=tile.TARGET)
def build(dtype, D, causal, block_M, block_N, stages):
    B, S_q, S_kv, H_q, H_kv, S_pad, lines = (T.dynamic(name) for name in ("B", "S_q", "S_kv", "H_q", "H_kv", "S_pad", "lines"))
    # A stride can pass 2^31 elements; a length can't
    strides = {t: (*(T.dynamic(f"{t}_stride_{d}", "int64") for d in "bsh"), 1) for t in ("Q", "K", "V", "dO", "dK", "dV")}
    half = D // 2
    half_lines = block_M * half // LINE

    @T.macro
    def query_block(w, turn, m, masked, smem, bars, frags, scale_log2, n0):
        """All five products for the queries of block m and this warpgroup's 64 keys."""
        stage = turn % stages
        phase = (turn // stages) % 2
        T.mbarrier_wait_parity(bars.q_full[stage], phase)
        T.wgmma_gemm(
            smem.K_smem[w * ROWS : (w + 1) * ROWS, :],
            smem.Q_smem[stage, :, :],
            frags.S,
            transpose_B=True,
            policy=tile.FULL_ROW,
            clear_accum=True,
        )
        T.mbarrier_wait_parity(bars.do_full[stage], phase)
        T.wgmma_gemm(
            smem.V_smem[w * ROWS : (w + 1) * ROWS, :],
            smem.dO_smem[stage, :, :],
            frags.dP,
            transpose_B=True,
            policy=tile.FULL_ROW,
            clear_accum=True,
        )
        T.wait_wgmma(1)
        for i, j in T.Parallel(ROWS, block_M):
            frags.P[i, j] = T.exp2(frags.S[i, j] * scale_log2 - smem.lse_smem[stage, j])
        if masked:
            # Select after exp2: a condition around it would become a branch per element
            for i, j in T.Parallel(ROWS, block_M):
                if causal:
                    frags.P[i, j] = T.if_then_else(n0 + w * ROWS + i <= m * block_M + j + S_kv - S_q, frags.P[i, j], 0.0)
                else:
                    frags.P[i, j] = T.if_then_else(n0 + w * ROWS + i < S_kv, frags.P[i, j], 0.0)
        T.copy(frags.P, frags.P_16)
        T.wait_wgmma(0)
        for i, j in T.Parallel(ROWS, block_M):
            frags.dP[i, j] = frags.P[i, j] * (frags.dP[i, j] - smem.delta_smem[stage, j])
        T.copy(frags.dP, frags.dS_16)
        T.wgmma_gemm(frags.P_16, smem.dO_smem[stage, :, :], frags.dV, policy=tile.FULL_ROW)
        # Two dS buffers: this barrier also says that everyone's dQ product of two turns ago is done
        T.copy(frags.dS_16, smem.dS_smem[turn % 2, w * ROWS : (w + 1) * ROWS, :])
        T.fence_proxy_async()
        T.sync_threads(EXCHANGE, CONSUMERS)
        T.wgmma_gemm(
            smem.dS_smem[turn % 2, :, :],
            smem.K_smem[:, w * half : (w + 1) * half],
            frags.dQ,
            transpose_A=True,
            policy=tile.FULL_ROW,
            clear_accum=True,
        )
        T.wait_wgmma(1)
        if T.shuffle_elect(128):
            T.mbarrier_arrive(bars.do_empty[stage])
        T.wgmma_gemm(frags.dS_16, smem.Q_smem[stage, :, :], frags.dK, policy=tile.FULL_ROW)
        T.wait_wgmma(1)
        T.mbarrier_wait_parity(bars.dq_empty[w], (turn % 2) ^ 1)
        for i, j in T.Parallel(block_M, half):
            line, column = dq_place(i, j, half)
            smem.dQ_smem[w, line, column] = frags.dQ[i, j]
        T.fence_proxy_async()
        T.mbarrier_arrive(bars.dq_full[w])
        T.wait_wgmma(0)
        if T.shuffle_elect(128):
            T.mbarrier_arrive(bars.q_empty[stage])

    @T.macro
    def consumer(w, smem, bars, n0, first, count, scale):
        T.set_max_nreg(CONSUMER_REGISTERS, 1)
        S = T.alloc_fragment([ROWS, block_M], "float32")
        P = T.alloc_fragment([ROWS, block_M], "float32")
        P_16 = T.alloc_fragment([ROWS, block_M], dtype)
        dP = T.alloc_fragment([ROWS, block_M], "float32")
        dS_16 = T.alloc_fragment([ROWS, block_M], dtype)
        dV = T.alloc_fragment([ROWS, D], "float32")
        dK = T.alloc_fragment([ROWS, D], "float32")
        dQ = T.alloc_fragment([block_M, half], "float32")
        frags = SimpleNamespace(S=S, P=P, P_16=P_16, dP=dP, dS_16=dS_16, dV=dV, dK=dK, dQ=dQ)
        scale_log2 = scale * tile.LOG2E
        T.fill(dV, 0)
        T.fill(dK, 0)
        T.mbarrier_wait_parity(bars.k_full, 0)
        T.mbarrier_wait_parity(bars.v_full, 0)
        if causal:
            masked = T.min(count, T.max(T.ceildiv(n0 + block_N - 1 - (S_kv - S_q), block_M) - first, 0))
        else:
            masked = T.if_then_else(n0 + block_N > S_kv, count, 0)
        for g in T.serial(T.truncdiv(H_q, H_kv)):
            for m in T.serial(masked):
                query_block(w, g * count + m, first + m, True, smem, bars, frags, scale_log2, n0)
            for m in T.serial(masked, count):
                query_block(w, g * count + m, first + m, False, smem, bars, frags, scale_log2, n0)
        for i, j in T.Parallel(ROWS, D):
            dK[i, j] *= scale
        # K and V are read no more: their buffers take dK and dV on the way out
        T.sync_threads(EXCHANGE, CONSUMERS)
        T.copy(dV, smem.V_smem[w * ROWS : (w + 1) * ROWS, :])
        T.copy(dK, smem.K_smem[w * ROWS : (w + 1) * ROWS, :])
        T.fence_proxy_async()
        T.sync_threads(EXCHANGE, CONSUMERS)

    @T.macro
    def producer(Q, K, V, dO, LSE, DELTA, smem, bars, batch, kv_head, n0, first, count):
        group = T.truncdiv(H_q, H_kv)
        T.tma_copy(K[batch, n0 : n0 + block_N, kv_head, :], smem.K_smem, barrier=bars.k_full)
        T.mbarrier_arrive(bars.k_full)
        for g in T.serial(group):
            for m in T.unroll(0, count, unroll_factor=1):
                turn = g * count + m
                row = (first + m) * block_M
                head = kv_head * group + g
                stage = turn % stages
                phase = (turn // stages) % 2
                T.mbarrier_wait_parity(bars.q_empty[stage], phase ^ 1)
                T.tma_copy(Q[batch, row : row + block_M, head, :], smem.Q_smem[stage, :, :], barrier=bars.q_full[stage])
                T.tma_copy(LSE[batch, head, row : row + block_M], smem.lse_smem[stage, :], barrier=bars.q_full[stage])
                T.mbarrier_arrive(bars.q_full[stage])
                # V is needed after the first Q: it waits until that is under way
                if turn == 0:
                    T.tma_copy(V[batch, n0 : n0 + block_N, kv_head, :], smem.V_smem, barrier=bars.v_full)
                    T.mbarrier_arrive(bars.v_full)
                T.mbarrier_wait_parity(bars.do_empty[stage], phase ^ 1)
                T.tma_copy(dO[batch, row : row + block_M, head, :], smem.dO_smem[stage, :, :], barrier=bars.do_full[stage])
                T.tma_copy(DELTA[batch, head, row : row + block_M], smem.delta_smem[stage, :], barrier=bars.do_full[stage])
                T.mbarrier_arrive(bars.do_full[stage])
        if count == 0:
            T.tma_copy(V[batch, n0 : n0 + block_N, kv_head, :], smem.V_smem, barrier=bars.v_full)
            T.mbarrier_arrive(bars.v_full)

    @T.macro
    def dq_adder(w, dQ_sum, smem, bars, batch, kv_head, first, count):
        group = T.truncdiv(H_q, H_kv)
        for g in T.serial(group):
            for m in T.unroll(0, count, unroll_factor=1):
                turn = g * count + m
                line = ((first + m) * 2 + w) * half_lines
                T.mbarrier_wait_parity(bars.dq_full[w], turn % 2)
                T.atomic_add(dQ_sum[batch, kv_head * group + g, line : line + half_lines, :], smem.dQ_smem[w, :, :], use_tma=True)
                T.mbarrier_arrive(bars.dq_empty[w])

    @T.prim_func
    def attention_bwd(
        Q: T.StridedTensor([B, S_q, H_q, D], strides["Q"], dtype),
        K: T.StridedTensor([B, S_kv, H_kv, D], strides["K"], dtype),
        V: T.StridedTensor([B, S_kv, H_kv, D], strides["V"], dtype),
        dO: T.StridedTensor([B, S_q, H_q, D], strides["dO"], dtype),
        LSE: T.Tensor([B, H_q, S_pad], "float32"),
        DELTA: T.Tensor([B, H_q, S_pad], "float32"),
        dQ_sum: T.Tensor([B, H_q, lines, LINE], "float32"),
        dK: T.StridedTensor([B, S_kv, H_kv, D], strides["dK"], dtype),
        dV: T.StridedTensor([B, S_kv, H_kv, D], strides["dV"], dtype),
        scale: T.float32,
        width: T.int32,
    ):
        # Longest first: in a group of `width` (batch, KV head) the key block is the slow index. `width` divides B H_kv
        with T.Kernel(width, T.ceildiv(S_kv, block_N), T.truncdiv(H_kv * B, width), threads=THREADS) as (i_h, i_n, i_g):
            K_smem = T.alloc_shared([block_N, D], dtype)
            V_smem = T.alloc_shared([block_N, D], dtype)
            Q_smem = T.alloc_shared([stages, block_M, D], dtype)
            dO_smem = T.alloc_shared([stages, block_M, D], dtype)
            dS_smem = T.alloc_shared([2, block_N, block_M], dtype)
            dQ_smem = T.alloc_shared([2, half_lines, LINE], "float32")
            lse_smem = T.alloc_shared([stages, block_M], "float32")
            delta_smem = T.alloc_shared([stages, block_M], "float32")
            T.annotate_layout({b: make_swizzled_layout(b) for b in (K_smem, V_smem, Q_smem, dO_smem, dS_smem)})
            T.annotate_layout({dQ_smem: make_linear_layout(dQ_smem)})
            smem = SimpleNamespace(
                K_smem=K_smem,
                V_smem=V_smem,
                Q_smem=Q_smem,
                dO_smem=dO_smem,
                dS_smem=dS_smem,
                dQ_smem=dQ_smem,
                lse_smem=lse_smem,
                delta_smem=delta_smem,
            )
            k_full = T.alloc_barrier(1)
            v_full = T.alloc_barrier(1)
            q_full = T.alloc_barrier([1] * stages)
            q_empty = T.alloc_barrier([2] * stages)
            do_full = T.alloc_barrier([1] * stages)
            do_empty = T.alloc_barrier([2] * stages)
            dq_full = T.alloc_barrier([128] * 2)
            dq_empty = T.alloc_barrier([1] * 2)
            bars = SimpleNamespace(
                k_full=k_full,
                v_full=v_full,
                q_full=q_full,
                q_empty=q_empty,
                do_full=do_full,
                do_empty=do_empty,
                dq_full=dq_full,
                dq_empty=dq_empty,
            )
            # Variables and not expressions: TileLang inlines an expression at each use, and the producer has 24 registers
            batch = T.alloc_var("int32")
            kv_head = T.alloc_var("int32")
            first = T.alloc_var("int32")
            count = T.alloc_var("int32")
            n0 = i_n * block_N
            batch = T.truncdiv(i_g * width + i_h, H_kv)
            kv_head = i_g * width + i_h - batch * H_kv
            first = T.max(T.floordiv(n0 - (S_kv - S_q), block_M), 0) if causal else 0
            count = T.max(T.ceildiv(S_q, block_M) - first, 0)
            thread = T.get_thread_binding()
            if thread < 128:
                T.set_max_nreg(PRODUCER_REGISTERS, 0)
                if thread < 32:
                    if T.shuffle_elect(32):
                        producer(Q, K, V, dO, LSE, DELTA, smem, bars, batch, kv_head, n0, first, count)
                elif thread < 64:
                    if T.shuffle_elect(32):
                        dq_adder(0, dQ_sum, smem, bars, batch, kv_head, first, count)
                elif thread < 96:
                    if T.shuffle_elect(32):
                        dq_adder(1, dQ_sum, smem, bars, batch, kv_head, first, count)
            else:
                if thread < 256:
                    consumer(0, smem, bars, n0, first, count, scale)
                    if thread < 160:
                        if T.shuffle_elect(32):
                            T.tma_copy(V_smem, dV[batch, n0 : n0 + block_N, kv_head, :])
                            T.tma_copy(K_smem, dK[batch, n0 : n0 + block_N, kv_head, :])
                            T.tma_store_wait(0)
                else:
                    consumer(1, smem, bars, n0, first, count, scale)

    return attention_bwd


def programs(cfg: Backward, dtype: torch.dtype, has_dlse: bool) -> tuple[Program, ...]:
    """The three kernels of a configuration: preprocess, main, postprocess."""
    name = str(dtype).removeprefix("torch.")
    return (
        Program("attention_bwd_preprocess", build_preprocess, (cfg.D, name, has_dlse, cfg.block_M)),
        Program("attention_bwd", build, (name, *cfg)),
        Program("attention_bwd_postprocess", build_postprocess, (cfg.D, name, cfg.block_M)),
    )


@functools.cache
def compiled(cfg: Backward, dtype: torch.dtype, has_dlse: bool) -> tuple:
    """The three, built at their first use."""
    return tuple(kernel(program) for program in programs(cfg, dtype, has_dlse))


def launch(
    cfg: Backward,
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    scale: float,
) -> None:
    """Writes dq, dk, dv. Workspace: dq in float32 and 2 B H_q S_q float32, with S_q rounded up to block_M."""
    device.require_hopper("attention_bwd", q.device)
    device.warn_if_deterministic("attention_bwd")
    if dq.numel() == 0 or dk.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    preprocess, main, postprocess = compiled(cfg, q.dtype, dlse is not None)
    with device.current(q.device):
        q, k, v, do = device.rows(q), device.rows(k), device.rows(v), do.detach().contiguous()
        out, lse = out.detach().contiguous(), lse.detach().contiguous()
        lse2, delta, dq_sum = _workspace(cfg, q)
        preprocess(out, do, lse, lse if dlse is None else dlse.detach().contiguous(), lse2, delta, dq_sum)
        main(q, k, v, do, lse2, delta, dq_sum, dk, dv, scale, _width(k.shape[0] * k.shape[2], k.shape[1]))
        postprocess(dq_sum, dq, scale)


def _workspace(cfg: Backward, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """lse2 and delta [B, H_q, S_pad], since TMA wants rows of whole 16 bytes; dq_sum [B, H_q, lines, LINE]."""
    B, S_q, H_q, D = q.shape
    S_pad = -(-S_q // cfg.block_M) * cfg.block_M
    lse2, delta = (q.new_empty((B, H_q, S_pad), dtype=torch.float32) for _ in range(2))
    return lse2, delta, q.new_empty((B, H_q, S_pad * D // LINE, LINE), dtype=torch.float32)


def _width(heads: int, S_kv: int) -> int:
    """How many (batch, KV head) go longest-first together: measured 8 up to 8k keys, 4 beyond; the largest divisor of all up to that."""
    width = min(8 if S_kv <= 8192 else 4, heads)
    while heads % width:
        width -= 1
    return width
