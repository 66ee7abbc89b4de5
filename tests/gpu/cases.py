"""Cases for the kernels, beside testing.DENSE: longer, more heads, every configuration, and what a kernel may get wrong."""

from itertools import product

import torch

from gqa_autograd.kernels import config
from gqa_autograd.testing import DENSE, Case

BF16, F16 = torch.bfloat16, torch.float16


def has_kernel(case: Case) -> bool:
    return (case.D, case.D if case.D_v is None else case.D_v) in config.D_FORWARD


# Each configuration at lengths around its tiles: (S_q, S_kv) with one tile, a cut tile, many, and both kinds of rectangle
_LENGTHS = ((1, 1), (64, 65), (128, 128), (113, 203), (203, 113), (127, 512), (512, 127), (1, 799), (799, 2), (333, 1024), (1023, 257))
_MASKS = ({"causal": True}, {}, {"window": (100, 0)}, {"window": (17, 63)})
CONFIGURATIONS = tuple(
    Case(1 + (S_q + S_kv) % 2, S_q, S_kv, *heads, D, D_v=D_v if D_v != D else None, dtype=dtype, softcap=softcap, **mask)
    for (D, D_v), mask, softcap, dtype in product(config.D_FORWARD, _MASKS, (0.0, 15.0), (BF16, F16))
    for (S_q, S_kv), heads in zip(
        _LENGTHS, ((4, 4), (6, 3), (6, 1), (8, 2), (12, 1), (5, 1), (7, 7), (32, 8), (28, 4), (10, 2), (3, 1)), strict=True
    )
)
LONG = (
    Case(1, 2048, 2048, 32, 8, 128, causal=True),
    Case(2, 1024, 1024, 16, 16, 64, causal=True, layout="fused"),
    Case(1, 4096, 512, 8, 2, 128, causal=True),
    Case(1, 512, 4096, 8, 1, 128, causal=True, dtype=F16),
    Case(1, 2047, 2049, 6, 2, 128),
    Case(1, 1500, 1500, 71, 1, 64, causal=True),
    Case(8, 300, 300, 12, 4, 128, causal=True, layout="bhsd"),
    Case(1, 2500, 2500, 4, 1, 256, causal=True),
    Case(1, 700, 900, 8, 4, 128, causal=True, scale=-0.3),
    Case(1, 650, 650, 4, 2, 64, scale=0.0, dtype=F16),
    Case(1, 400, 600, 4, 2, 128, causal=True, scale=1.0),
)
ALL = tuple(case for case in (*DENSE, *CONFIGURATIONS, *LONG) if has_kernel(case))
