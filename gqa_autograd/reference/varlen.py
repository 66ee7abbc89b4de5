"""Packed attention: `attention` of one sequence after the other. Offsets are lists: sequence n has the tokens from offsets[n] to
offsets[n + 1], and the lengths of its queries and its keys are aligned at their ends, as in `attention`.

Nothing is read or written between sequences, so what stands in one, or beyond the last, reaches no other."""

import itertools
from collections.abc import Iterator, Sequence

from torch import Tensor

from . import attention


def sequences(offsets_q: Sequence[int], offsets_k: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """(queries, keys) of each sequence, as slices of the tokens."""
    for (q_start, q_end), (k_start, k_end) in zip(itertools.pairwise(offsets_q), itertools.pairwise(offsets_k), strict=True):
        yield slice(q_start, q_end), slice(k_start, k_end)


def attention_varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets_q: Sequence[int],
    offsets_k: Sequence[int],
    out: Tensor,
    lse: Tensor | None,
    *formula,
) -> None:
    """Writes out [T_q, H_q, D_v] and, unless None, lse [H_q, T_q], up to the last offset. formula: as in `attention`."""
    for mine, theirs in sequences(offsets_q, offsets_k):
        out_n, lse_n = attention.attention_fwd_lse(q[None, mine], k[None, theirs], v[None, theirs], *formula)
        out[mine] = out_n[0]
        if lse is not None:
            lse[:, mine] = lse_n[0]


def attention_varlen_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    offsets_q: Sequence[int],
    offsets_k: Sequence[int],
    gradients: tuple[Tensor, Tensor, Tensor],
    *formula,
) -> None:
    """Writes dq, dk and dv; 0 beyond the last offset."""
    dq, dk, dv = gradients
    for t, end in ((dq, offsets_q[-1]), (dk, offsets_k[-1]), (dv, offsets_k[-1])):
        t[end:] = 0
    for mine, theirs in sequences(offsets_q, offsets_k):
        dlse_n = None if dlse is None else dlse[None, :, mine]
        tensors = do[None, mine], q[None, mine], k[None, theirs], v[None, theirs], out[None, mine], lse[None, :, mine], dlse_n
        dq_n, dk_n, dv_n = attention.attention_bwd(*tensors, *formula)
        dq[mine], dk[theirs], dv[theirs] = dq_n[0], dk_n[0], dv_n[0]
