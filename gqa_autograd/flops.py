"""FLOPs of each operator, counted over the (query, key) pairs that are visible: what an ideal kernel must do, masked tiles excluded.

Forward: 2 products, 2 (D + D_v) FLOPs a pair and query head. Backward: 5 products, 2 (3 D + 2 D_v).

Packed sequences are counted one by one where their offsets are in reach, in a CPU tensor. On CUDA a look at them would make the host wait,
and while compile traces they have no values: there the count is an upper bound, that of one sequence of all tokens. (It is one: of each
diagonal j - i = const, counted from the ends, joined sequences have at least as many pairs as the two of them had.)
"""

import itertools

from torch import Tensor
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


def packed_pairs(T_q: int, T_kv: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, window_left: int = -1, window_right: int = -1) -> int:
    """visible_pairs summed over packed sequences; their upper bound where nobody knows the lengths."""
    # A fake tensor has a type of its own
    if not all(type(t) is Tensor and t.device.type == "cpu" for t in (cu_seqlens_q, cu_seqlens_k)):
        return visible_pairs(T_q, T_kv, window_left, window_right)
    lengths = ([end - start for start, end in itertools.pairwise(t.tolist())] for t in (cu_seqlens_q, cu_seqlens_k))
    return sum(visible_pairs(S_q, S_kv, window_left, window_right) for S_q, S_kv in zip(*lengths, strict=True))


def _forward_flops(q, k, v, window_left=-1, window_right=-1, *args, out_shape=None, **kwargs) -> int:
    B, S_q, H_q, D = q
    return 2 * B * H_q * visible_pairs(S_q, k[1], window_left, window_right) * (D + v[3])


def _backward_flops(do, q, k, v, out, lse, dlse, window_left=-1, window_right=-1, *args, out_shape=None, **kwargs) -> int:
    B, S_q, H_q, D = q
    return 2 * B * H_q * visible_pairs(S_q, k[1], window_left, window_right) * (3 * D + 2 * v[3])


def _packed_forward_flops(q, k, v, cu_seqlens_q, cu_seqlens_k, window_left=-1, window_right=-1, *args, out_val=None, **kwargs) -> int:
    T_q, H_q, D = q.shape
    pairs = packed_pairs(T_q, k.shape[0], cu_seqlens_q, cu_seqlens_k, window_left, window_right)
    return 2 * H_q * pairs * (D + v.shape[2])


def _packed_backward_flops(
    do, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, window_left=-1, window_right=-1, *args, out_val=None, **kwargs
) -> int:
    T_q, H_q, D = q.shape
    pairs = packed_pairs(T_q, k.shape[0], cu_seqlens_q, cu_seqlens_k, window_left, window_right)
    return 2 * H_q * pairs * (3 * D + 2 * v.shape[2])


def decode_pairs(S_q: int, capacity: int, cache_seqlens: Tensor, window_left: int = -1, window_right: int = -1) -> int:
    """visible_pairs summed over the sequences of a cache; their upper bound, full caches, where nobody knows the lengths."""
    if not (type(cache_seqlens) is Tensor and cache_seqlens.device.type == "cpu"):
        return cache_seqlens.shape[0] * visible_pairs(S_q, capacity, window_left, window_right)
    return sum(visible_pairs(S_q, length, window_left, window_right) for length in cache_seqlens.tolist())


def _decode_flops(
    q, k_cache, v_cache, cache_seqlens, page_table=None, window_left=-1, window_right=-1, *args, out_val=None, **kwargs
) -> int:
    _, S_q, H_q, D = q.shape
    capacity = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
    return 4 * H_q * D * decode_pairs(S_q, capacity, cache_seqlens, window_left, window_right)


def register(forward: list, backward: list) -> None:
    """Tell torch.utils.flop_counter; the targets are operator packets, torch.ops.gqa_autograd.attention_fwd and so on."""
    register_flop_formula(forward)(_forward_flops)
    register_flop_formula(backward)(_backward_flops)


def register_varlen(forward: list, backward: list) -> None:
    """The same for packed sequences, whose formulas are handed the tensors and not their shapes alone."""
    register_flop_formula(forward, get_raw=True)(_packed_forward_flops)
    register_flop_formula(backward, get_raw=True)(_packed_backward_flops)


def register_decode(forward: list) -> None:
    """The same for decoding, which has no backward."""
    register_flop_formula(forward, get_raw=True)(_decode_flops)
