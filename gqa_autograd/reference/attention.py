"""Grouped-query attention and its gradient, written out: the CPU body of the operators and the reference of every test.

    z_ij = scale q_i·k_j                     (softcap: cap tanh(scale q_i·k_j / cap))
    lse_i = ln sum_j exp z_ij                over the keys j that query i sees
    out_i = sum_j exp(z_ij - lse_i) v_j      0 for a query that sees no key, whose lse is -inf

Query i sees key j if i + S_kv - S_q - window_left <= j <= i + S_kv - S_q + window_right; -1 leaves a side open, so causal is
window_right = 0. The G query heads of a KV head are stacked as rows, [B, H_kv, G S_q, D]: K and V are never repeated, and the sum of
dk and dv over the group is part of the matrix product. Computed in float32, in float64 for float64 inputs.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor


def _accumulate(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype is torch.float64 else torch.float32


def _as_written(function: Callable) -> Callable:
    """Autocast is off inside: it would turn the float32 products into bfloat16 ones."""

    @functools.wraps(function)
    def run(q: Tensor, *args):
        with torch.autocast(q.device.type, enabled=False):
            return function(q, *args)

    return run


def visible(S_q: int, S_kv: int, window_left: int, window_right: int, device: torch.device) -> Tensor:
    """[S_q, S_kv], True where query i sees key j."""
    i = torch.arange(S_q, device=device).unsqueeze(1) + (S_kv - S_q)
    j = torch.arange(S_kv, device=device)
    seen = torch.ones(S_q, S_kv, dtype=torch.bool, device=device)
    if window_left >= 0:
        seen = seen & (j >= i - window_left)
    if window_right >= 0:
        seen = seen & (j <= i + window_right)
    return seen


def _rows(t: Tensor, H_kv: int, dtype: torch.dtype) -> Tensor:
    """[B, S, H, D] -> [B, H_kv, G S, D]: the heads of a group one below the other."""
    B, S, H, D = t.shape
    return t.to(dtype).permute(0, 2, 1, 3).reshape(B, H_kv, H // H_kv * S, D)


def _heads(t: Tensor, S: int, H: int) -> Tensor:
    """[B, H_kv, G S, D] -> [B, S, H, D]: the inverse of _rows."""
    B, _, _, D = t.shape
    # S is given, not inferred: an empty batch would leave it ambiguous
    return t.reshape(B, H, S, D).permute(0, 2, 1, 3)


def _logits(q: Tensor, k: Tensor, window_left: int, window_right: int, scale: float, softcap: float) -> tuple[Tensor, Tensor | None]:
    """z [B, H_kv, G S_q, S_kv] before the mask, and the rows of the mask [G S_q, S_kv] (None: every key is seen)."""
    S_q, H_q, S_kv, H_kv = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
    dtype = _accumulate(q)
    z = _rows(q, H_kv, dtype) @ _rows(k, H_kv, dtype).transpose(2, 3) * scale
    if softcap > 0:
        z = softcap * torch.tanh(z / softcap)
    if window_left < 0 and window_right < 0:
        return z, None
    return z, visible(S_q, S_kv, window_left, window_right, q.device).repeat(H_q // H_kv, 1)


@_as_written
def attention_fwd_lse(
    q: Tensor, k: Tensor, v: Tensor, window_left: int, window_right: int, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """out [B, S_q, H_q, D_v] in q.dtype and lse [B, H_q, S_q]; the formulas of the module's docstring."""
    B, S_q, H_q, _ = q.shape
    z, seen = _logits(q, k, window_left, window_right, scale, softcap)
    if seen is not None:
        z = z.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(z, dim=-1, keepdim=True)
    p = torch.exp(z - lse.masked_fill(lse == -math.inf, 0))
    out = _heads(p @ _rows(v, k.shape[2], p.dtype), S_q, H_q)
    return out.to(q.dtype), lse.reshape(B, H_q, S_q)


@_as_written
def attention_bwd(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    window_left: int,
    window_right: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. out and lse may be those of a longer attention of which k, v are a part (a ring): P = exp(z - lse).

    delta_i = do_i·out_i - dlse_i;  dz = P (do v^T - delta);  ds = dz (1 - (z/cap)^2);  dq = scale ds k,  dk = scale ds^T q,  dv = P^T do
    """
    S_q, H_q, S_kv, H_kv, dtype = q.shape[1], q.shape[2], k.shape[1], k.shape[2], _accumulate(q)
    z, seen = _logits(q, k, window_left, window_right, scale, softcap)
    column = _rows(lse.transpose(1, 2).unsqueeze(3), H_kv, dtype)
    # A row that sees no key has lse = -inf; +inf makes its P zero
    p = torch.exp(z - column.masked_fill(column == -math.inf, math.inf))
    if seen is not None:
        p = p.masked_fill(~seen, 0)
    do_rows, q_rows, k_rows, v_rows = (_rows(t, H_kv, dtype) for t in (do, q, k, v))
    delta = (do_rows * _rows(out, H_kv, dtype)).sum(-1, keepdim=True)
    if dlse is not None:
        # Nothing flows through lse = -inf, whatever gradient arrives there
        delta = delta - _rows(dlse.transpose(1, 2).unsqueeze(3), H_kv, dtype).masked_fill(column == -math.inf, 0)
    ds = p * (do_rows @ v_rows.transpose(2, 3) - delta) * scale
    if softcap > 0:
        ds = ds * (1 - (z / softcap).square())
    dq, dk, dv = ds @ k_rows, ds.transpose(2, 3) @ q_rows, p.transpose(2, 3) @ do_rows
    return _heads(dq, S_q, H_q).to(q.dtype), _heads(dk, S_kv, H_kv).to(k.dtype), _heads(dv, S_kv, H_kv).to(v.dtype)
