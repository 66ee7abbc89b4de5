"""FLOPs of each operator, counted over the (query, key) pairs that are visible: what an ideal kernel must do, masked tiles excluded.

Forward: 2 products, 2 (D + D_v) FLOPs a pair and query head. Backward: 5 products, 2 (3 D + 2 D_v).
"""

from torch.utils.flop_counter import register_flop_formula


def visible_pairs(S_q: int, S_kv: int, window_left: int = -1, window_right: int = -1) -> int:
    """Pairs (i, j) with i + S_kv - S_q - window_left <= j <= i + S_kv - S_q + window_right and 0 <= j < S_kv."""
    offset = S_kv - S_q
    right = S_q if window_right < 0 else window_right
    left = S_kv if window_left < 0 else window_left
    return _at_most(S_q, S_kv, offset + right + 1) - _at_most(S_q, S_kv, offset - left)


def _at_most(S_q: int, S_kv: int, first: int) -> int:
    """sum over i < S_q of clamp(first + i, 0, S_kv): a ramp between two flat parts."""
    ramp_from, ramp_to = min(max(-first, 0), S_q), min(max(S_kv - first, 0), S_q)
    n = ramp_to - ramp_from
    return n * first + (ramp_from + ramp_to - 1) * n // 2 + (S_q - ramp_to) * S_kv


def _forward_flops(q, k, v, window_left=-1, window_right=-1, *args, out_shape=None, **kwargs) -> int:
    B, S_q, H_q, D = q
    return 2 * B * H_q * visible_pairs(S_q, k[1], window_left, window_right) * (D + v[3])


def _backward_flops(do, q, k, v, out, lse, dlse, window_left=-1, window_right=-1, *args, out_shape=None, **kwargs) -> int:
    B, S_q, H_q, D = q
    return 2 * B * H_q * visible_pairs(S_q, k[1], window_left, window_right) * (3 * D + 2 * v[3])


def register(forward: list, backward: list) -> None:
    """Tell torch.utils.flop_counter; the targets are operator packets, torch.ops.gqa_autograd.attention_fwd and so on."""
    register_flop_formula(forward)(_forward_flops)
    register_flop_formula(backward)(_backward_flops)
