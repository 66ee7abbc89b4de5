"""Packings for the kernels, beside testing_varlen.PACKED: every configuration of the forward, each on every packing."""

from itertools import product

import torch
from cases import BF16, F16

from gqa_autograd.kernels import config
from gqa_autograd.testing_varlen import PACKED, PackedCase

# Around the tiles, in both orders of S_q and S_kv; empty sequences everywhere; views of one tensor; long ones; many short ones. The tails
# belong to no sequence
PACKINGS: dict[str, dict] = {
    "mixed": {"lengths_q": (113, 1, 128, 300), "lengths_kv": (203, 1, 128, 290), "H_q": 4, "H_kv": 2},
    "empty": {"lengths_q": (0, 50, 0, 129, 0), "lengths_kv": (20, 61, 0, 5, 90), "H_q": 6, "H_kv": 3, "layout": "htd", "tail_q": 3},
    "fused": {"lengths_q": (130, 64, 7, 1), "lengths_kv": (130, 64, 7, 1), "H_q": 8, "H_kv": 2, "layout": "fused", "tail_q": 5},
    "long": {"lengths_q": (257, 640), "lengths_kv": (66, 1500), "H_q": 8, "H_kv": 1, "tail_q": 200, "tail_kv": 1},
    "many": {
        "lengths_q": tuple(37 * n % 70 for n in range(40)),
        "lengths_kv": tuple(53 * n % 90 for n in range(40)),
        "H_q": 4,
        "H_kv": 4,
        "tail_kv": 77,
    },
}
PACKINGS["fused"]["tail_kv"] = 5
MASKS = {"causal": {"causal": True}, "full": {}, "left": {"window": (100, 0)}, "both": {"window": (17, 63)}}
# Each mask with and without softcap in both dtypes over the head sizes, and the most used sizes in the other dtype too
_SETTINGS = [
    (D, mask, softcap, (BF16, F16)[(n + m + (softcap > 0)) % 2])
    for (n, D), (m, mask), softcap in product(enumerate(config.D_FORWARD), enumerate(MASKS), (0.0, 15.0))
]
_SETTINGS += [
    (D, mask, 0.0, {BF16: F16, F16: BF16}[dtype]) for D, mask, softcap, dtype in _SETTINGS if D in ((64, 64), (128, 128)) and softcap == 0
]


def packed(packing: str, D: tuple[int, int], mask: str, softcap: float, dtype: torch.dtype) -> PackedCase:
    D_v = {} if D[0] == D[1] else {"D_v": D[1]}
    return PackedCase(**PACKINGS[packing], **MASKS[mask], **D_v, D=D[0], softcap=softcap, dtype=dtype)


def _id(packing: str, D: tuple[int, int], mask: str, softcap: float, dtype: torch.dtype) -> str:
    return f"{packing}-d{D[0]}x{D[1]}-{mask}{'-softcap' * (softcap > 0)}-{ {BF16: 'bf16', F16: 'f16'}[dtype] }"


# {id: case}; one packing alone has every configuration once
CONFIGURATIONS = {_id("mixed", *setting): packed("mixed", *setting) for setting in _SETTINGS}
ALL = {_id(packing, *setting): packed(packing, *setting) for setting in _SETTINGS for packing in PACKINGS}
ALL |= {str(case): case for case in PACKED if (case.D, case.D_v or case.D) in config.D_FORWARD}


def many(N: int, **options) -> PackedCase:
    """N short sequences, a seventh of them without queries, an eleventh without keys."""
    lengths_q = tuple(97 * n % 61 if n % 7 else 0 for n in range(N))
    lengths_kv = tuple(89 * n % 67 if n % 11 else 0 for n in range(N))
    return PackedCase(lengths_q, lengths_kv, 4, 2, 64, tail_q=3, tail_kv=2, **options)


# Offsets of T tokens, each wrong in another way, in q, in k or in both
T = 300
NONSENSE = {
    "decreasing": ((0, 200, 100, 300), (0, 200, 100, 300)),
    "beyond": ((0, 100, 5000, 300), (0, 100, 300, 2**31 - 1)),
    "negative": ((-7, 100, 200, 300), (-(2**31), 100, 200, 300)),
    "all_beyond": ((400, 500, 600, 700), (400, 500, 600, 700)),
    "all_negative": ((-4, -3, -2, -1), (-300, -200, -100, -1)),
    "overlapping": ((0, 300, 0, 300), (0, 300, 0, 300)),
    "widest": ((-(2**31), 2**31 - 1, -(2**31), 2**31 - 1), (-(2**31), 2**31 - 1, -(2**31), 2**31 - 1)),
    "q_alone": ((0, 9000, -9000, 300), (0, 100, 200, 300)),
    "k_alone": ((0, 100, 200, 300), (0, -9000, 9000, 300)),
}
