"""Outputs of each operator. The fake kernel is the allocator: tracing and running ask the same function, so they can't drift.

Never `empty_like` without a memory format: a q that is a view of a fused QKV would leak its strides into the output.
"""

import torch
from torch import Tensor


def lse_dtype(q: Tensor) -> torch.dtype:
    """Float32, and float64 for float64 inputs: also the type in which the definition computes."""
    return torch.float64 if q.dtype is torch.float64 else torch.float32


def attention_fwd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """out [B, S_q, H_q, D_v], contiguous, in q.dtype."""
    shape = q.shape
    D_v = v.shape[3]
    # Half the time of new_empty, whose sizes torch reads one by one. A symbolic size isn't asked: that would be a guard
    if type(D_v) is int and D_v == shape[3]:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    return q.new_empty((*shape[:3], D_v))


def attention_fwd_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out as attention_fwd; lse [B, H_q, S_q], contiguous, natural logarithm."""
    B, S_q, H_q, _ = q.shape
    return attention_fwd(q, k, v), q.new_empty((B, H_q, S_q), dtype=lse_dtype(q))


def attention_bwd(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv: shapes and dtypes of q, k, v, contiguous."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def attention_decode_fwd(q: Tensor) -> Tensor:
    """out [B, S_q, H_q, D], contiguous, in q.dtype."""
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def attention_decode_fwd_lse(q: Tensor) -> tuple[Tensor, Tensor]:
    """out as attention_decode_fwd; lse [B, H_q, S_q], contiguous, natural logarithm."""
    B, S_q, H_q, _ = q.shape
    return attention_decode_fwd(q), q.new_empty((B, H_q, S_q), dtype=lse_dtype(q))


def attention_varlen_fwd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """out [T_q, H_q, D_v], contiguous, in q.dtype."""
    T_q, H_q, _ = q.shape
    return q.new_empty((T_q, H_q, v.shape[2]))


def attention_varlen_fwd_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out as attention_varlen_fwd; lse [H_q, T_q], contiguous, natural logarithm."""
    T_q, H_q, _ = q.shape
    return attention_varlen_fwd(q, k, v), q.new_empty((H_q, T_q), dtype=lse_dtype(q))


def attention_varlen_bwd(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv: shapes and dtypes of q, k, v, contiguous."""
    return attention_bwd(q, k, v)
