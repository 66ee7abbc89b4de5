"""Packs: documents of different lengths one behind another in [T, H, D], each attending causally to itself alone."""

import dataclasses
import itertools
import math
import random
from typing import Any

import torch

from gqa_autograd.testing import Case
from gqa_autograd.testing_varlen import PackedCase

TOKENS = (16384, 65536)
# What a test of values needs: some documents longer than a tile, and soon done in float64
TWIN_TOKENS = 3000


@dataclasses.dataclass(frozen=True)
class Pack:
    """`kind` says how the lengths came about; with their number it is the name in the rows, which state the lengths too."""

    kind: str
    lengths: tuple[int, ...]
    H_q: int = 32
    H_kv: int = 8
    D: int = 128
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtype = str(self.dense).split("-")[0]
        return f"{dtype}-{self.name}-T{self.T}-h{self.H_q}x{self.H_kv}-d{self.D}-causal"

    @property
    def name(self) -> str:
        return f"{self.kind}{len(self.lengths)}"

    @property
    def T(self) -> int:
        return sum(self.lengths)

    @property
    def case(self) -> PackedCase:
        """As the tests know it."""
        return PackedCase(self.lengths, self.lengths, self.H_q, self.H_kv, self.D, causal=True, dtype=self.dtype)

    @property
    def documents(self) -> tuple[Case, ...]:
        """Each as the dense attention that it is."""
        return tuple(self.case.sequence(n) for n in range(len(self.lengths)))

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `gqa_autograd.attention_varlen`, as a loader that knows its lengths gives them."""
        return {"causal": True, "max_seqlen_q": max(self.lengths), "max_seqlen_k": max(self.lengths)}

    @property
    def dense(self) -> Case:
        """As many tokens in B rows of one length, with visible pairs as near as whole rows allow: what the pack's rate is held against.

        Where the documents are not alike the length is an odd multiple of 64: half of a row's last tile is empty, as it is in the mean for
        documents of any lengths. Whole tiles would compare padding, which no kernel for packs can avoid."""
        if len(set(self.lengths)) == 1:
            B, S = len(self.lengths), self.lengths[0]
        else:
            # Causal pairs of B rows: B S (S + 1) / 2
            wanted = sum(S * (S + 1) for S in self.lengths)
            shapes = [(max(1, round(self.T / S)), S) for S in range(64, self.T, 128)]
            B, S = min(shapes, key=lambda shape: abs(math.log(shape[0] * shape[1] * (shape[1] + 1) / wanted)))
        return Case(B, S, S, self.H_q, self.H_kv, self.D, causal=True, dtype=self.dtype)

    @property
    def twin(self) -> "Pack":
        """The same in small: as many documents, in proportion."""
        return dataclasses.replace(self, lengths=tuple(max(1, S * TWIN_TOKENS // self.T) for S in self.lengths))


def drawn(kind: str, N: int, T: int) -> Pack:
    """N documents with about T tokens; the same at every call.

    uniform: all alike. odd: one token short of that, each. random: from a hundredth of the mean to twice the mean, all alike likely.
    skewed: in any order, the i-th longest is 1 / i of the longest: few long ones and many short ones, as text has them."""
    generator = random.Random(f"{kind}{N}x{T}")
    if kind in ("uniform", "odd"):
        return Pack(kind, (T // N - (kind == "odd"),) * N)
    weights = [generator.uniform(0.01, 2) if kind == "random" else 1 / (i + 1) for i in range(N)]
    generator.shuffle(weights)
    ends = [round(T * part / sum(weights)) for part in itertools.accumulate(weights)]
    return Pack(kind, tuple(b - a for a, b in itertools.pairwise((0, *ends))))


# A shape in each line, 16k and 64k tokens of it
SHAPES = (*((kind, N) for kind in ("uniform", "random", "skewed") for N in (8, 64)), ("odd", 16))


def of_shape(kind: str, N: int) -> tuple[Pack, ...]:
    return tuple(drawn(kind, N, T) for T in TOKENS)


PACKS = tuple(pack for kind, N in SHAPES for pack in of_shape(kind, N))
