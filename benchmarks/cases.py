"""Shapes that the benchmarks run. Named sets, so that a row's case can be run again by name."""

from gqa_autograd.testing import Case

LENGTHS = (2048, 4096, 8192, 16384)
# Up to 8k tokens in every row: B 4, 2, 1, 1
SETS = {
    "first-mark": tuple(Case(max(1, 8192 // S), S, S, 32, 8, 128, causal=True) for S in LENGTHS),
    "batch-1": tuple(Case(1, S, S, 32, 8, 128, causal=True) for S in LENGTHS),
    "shapes": (
        Case(2, 4096, 4096, 32, 8, 128),
        Case(8, 2048, 2048, 16, 16, 128, causal=True),
        Case(4, 512, 512, 32, 8, 128, causal=True),
        Case(2, 4096, 4096, 32, 8, 64, causal=True),
        Case(1, 8192, 8192, 16, 4, 256, causal=True),
    ),
}
