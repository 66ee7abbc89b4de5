"""Cases of the backward, dense and packed: every pair of values of any two axes of the specification, with each (D, D_v)."""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from cases import BF16, F16

from gqa_autograd.kernels import config
from gqa_autograd.testing import Case
from gqa_autograd.testing_varlen import PackedCase

sys.path.append(str(Path(__file__).parents[1] / "kernels"))
from covering import cover

HEADS = ((4, 4), (6, 3), (6, 1), (8, 2), (12, 1), (32, 8), (64, 8), (28, 4))
LENGTHS = (
    *((1, 1), (1, 239), (3, 799), (64, 128), (113, 203), (128, 217), (127, 512), (256, 512), (512, 256), (799, 3), (1023, 1024)),
    *((1024, 1023), (2048, 2048), (512, 4096), (4096, 512)),
    # One key of many queries: dq and dk are exactly zero, and dk sums the rounding of thousands of rows
    *((799, 1), (130, 1)),
)
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "causal_63": {"causal": True, "window": (63, -1)},
    "causal_0": {"causal": True, "window": (0, 128)},
    "left_128": {"window": (128, 0)},
    "left_1": {"window": (1, -1)},
    "right_63": {"window": (-1, 63)},
    "right_1": {"window": (-1, 1)},
    "both": {"window": (63, 128)},
    "wide": {"window": (128, 128)},
}
AXES = {
    "lengths": LENGTHS,
    "heads": HEADS,
    "mask": tuple(MASKS),
    "softcap": (0.0, 15.0, 50.0),
    "scale": (None, 0.125, 1.0, -0.3, 0.0),
    "dtype": (BF16, F16),
    "dlse": (False, True),
    "layout": ("bshd", "bhsd", "fused"),
    "do": ("contiguous", "permuted", "expanded"),
}


class Gradient(NamedTuple):
    """A case, whether lse has a gradient too, and how `do` lies in memory."""

    case: Case
    dlse: bool
    do: str

    def __str__(self) -> str:
        return f"{self.case}{'-dlse' * self.dlse}{f'-do_{self.do}' * (self.do != 'contiguous')}"


def _possible(choice) -> bool:
    S_q, S_kv = choice["lengths"]
    return choice["layout"] != "fused" or S_q == S_kv


def _gradient(D: int, D_v: int, choice) -> Gradient:
    S_q, S_kv = choice["lengths"]
    options = {name: choice[name] for name in ("softcap", "scale", "dtype", "layout")}
    B = 2 if S_q * S_kv <= 2**16 else 1
    case = Case(B, S_q, S_kv, *choice["heads"], D, D_v=D_v if D_v != D else None, **MASKS[choice["mask"]], **options)
    return Gradient(case, choice["dlse"], choice["do"])


_CHOICES = cover(AXES, _possible)
# Each size walks through the same choices
COVERING = {str(one): one for sizes in config.D_BACKWARD for choice in _CHOICES if (one := _gradient(*sizes, choice))}


def stored(do: torch.Tensor, layout: str) -> torch.Tensor:
    """`do` in another layout; expanded has stride 0 everywhere and is a number of its own."""
    if layout == "contiguous":
        return do.contiguous()
    if layout == "permuted":
        return do.mT.contiguous().mT
    return torch.full((), 0.7, dtype=do.dtype, device=do.device).expand_as(do)


# --- packed ---
_SEQUENCES = {
    "mixed": ((113, 1, 128, 300), (203, 1, 128, 290)),
    "empty": ((0, 50, 0, 129, 0, 40), (20, 61, 0, 5, 90, 0)),
    "one_key": ((130, 7, 64), (1, 1, 200)),
    "long": ((257, 640), (66, 1500)),
    # Of two or three keys one may have all the weight: plain's P is then 1 and its error 0 by luck, too low a measure for a mean
    "many": (tuple(37 * n % 70 for n in range(40)), tuple(59 * n % 90 for n in range(40))),
    "square": ((130, 64, 7, 1), (130, 64, 7, 1)),
    "none": ((0, 0), (0, 0)),
}
_PACKED_AXES = {
    "packing": tuple(_SEQUENCES),
    "heads": ((4, 4), (6, 3), (6, 1), (8, 2), (32, 8)),
    "mask": tuple(MASKS),
    "softcap": (0.0, 15.0),
    "scale": (None, 1.0, -0.3, 0.0),
    "dtype": (BF16, F16),
    "dlse": (False, True),
    "layout": ("thd", "htd", "fused"),
    "do": ("contiguous", "permuted", "expanded"),
    "tails": ((0, 0), (3, 3), (70, 141)),
}


class PackedGradient(NamedTuple):
    """As Gradient, of a packing."""

    case: PackedCase
    dlse: bool
    do: str
    packing: str

    def __str__(self) -> str:
        rest = str(self.case.sequence(0)).split("-", 4)
        tails = f"-tail{self.case.tail_q}_{self.case.tail_kv}" * (self.case.tail_q > 0)
        layout = f"-{self.case.layout}" * (self.case.layout != "thd")
        return f"{rest[0]}-{self.packing}-{rest[4]}{layout}{tails}{'-dlse' * self.dlse}{f'-do_{self.do}' * (self.do != 'contiguous')}"


def _packed_possible(choice) -> bool:
    alike = choice["packing"] in ("square", "none") and choice["tails"][0] == choice["tails"][1]
    # Where a sequence of two keys has logits in the tens, plain's P is 1 and its error 0 by luck: a measure for many tokens, not for a few
    return (choice["layout"] != "fused" or alike) and (choice["packing"], choice["scale"]) != ("many", 1.0)


def _packed(D: int, D_v: int, choice) -> PackedGradient:
    options = {name: choice[name] for name in ("softcap", "scale", "dtype", "layout")}
    tail_q, tail_kv = choice["tails"]
    sizes = {"D": D, "D_v": D_v if D_v != D else None, "tail_q": tail_q, "tail_kv": tail_kv}
    case = PackedCase(*_SEQUENCES[choice["packing"]], *choice["heads"], **sizes, **MASKS[choice["mask"]], **options)
    return PackedGradient(case, choice["dlse"], choice["do"], choice["packing"])


_PACKED_CHOICES = cover(_PACKED_AXES, _packed_possible)
PACKED_COVERING = {str(one): one for sizes in config.D_BACKWARD for choice in _PACKED_CHOICES if (one := _packed(*sizes, choice))}
