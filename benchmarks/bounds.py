"""What a case costs at least: FLOPs over visible pairs, bytes that must be read, and the time that a Hopper GPU needs for them."""

from gqa_autograd.flops import visible_pairs
from gqa_autograd.testing import Case

from .packs import Pack

# The H200's data sheet: dense bf16 and memory. No part of the family is faster
PEAK_TFLOPS = 990
PEAK_TBPS = 4.8


def flops(case: Case | Pack, op: str) -> int:
    """Forward and decode: two products, 2 (D + D_v) FLOPs a visible pair and query head; backward: five, 2 (3 D + 2 D_v)."""
    if isinstance(case, Pack):
        return sum(flops(document, op) for document in case.documents)
    D_v = case.D if case.D_v is None else case.D_v
    per_pair = 2 * (3 * case.D + 2 * D_v) if op == "backward" else 2 * (case.D + D_v)
    return per_pair * case.B * case.H_q * visible_pairs(case.S_q, case.S_kv, *case.formula[:2])


def bytes_read(case: Case | Pack, op: str) -> int:
    """Inputs, each once, without the keys that no query sees. Outputs may stay in the L2 cache beyond the end of the kernel."""
    if isinstance(case, Pack):
        return sum(bytes_read(document, op) for document in case.documents)
    D_v = case.D if case.D_v is None else case.D_v
    left, right, *_ = case.formula
    offset = case.S_kv - case.S_q
    first = 0 if left < 0 else max(0, offset - left)
    last = case.S_kv if right < 0 else min(case.S_kv, case.S_q + offset + right)
    # With more queries than keys the first see nothing and need not be read
    rows = case.S_q if right < 0 else min(case.S_q, max(0, case.S_q + offset + right))
    queries = case.B * rows * case.H_q * (case.D + 2 * D_v if op == "backward" else case.D)
    keys = case.B * max(0, last - first) * case.H_kv * (case.D + D_v)
    return (queries + keys) * case.dtype.itemsize


def floor_us(case: Case | Pack, op: str, flushed: bool) -> float:
    """The least time of one call; without a flush the inputs may come from the cache."""
    compute = flops(case, op) / PEAK_TFLOPS / 1e6
    return max(compute, bytes_read(case, op) / PEAK_TBPS / 1e6) if flushed else compute
