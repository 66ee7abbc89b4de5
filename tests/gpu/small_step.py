"""What test_sanitizer.py runs under compute-sanitizer: `small_step.py all`, or `few` for the tools that take minutes a call.

all: a training step and an inference call of every backward's head size at odd lengths, then the calls below with D 64, 128 and 256.
few: dense, split and packed forwards at D 64 and 128, results not read: their last writer is TMA, which not every tool follows.
"""

import sys

import torch
from packed_cases import NONSENSE, T

import gqa_autograd
from gqa_autograd.testing import Case, make
from gqa_autograd.testing_varlen import PackedCase
from gqa_autograd.testing_varlen import make as make_packed


def train(D: int) -> None:
    for causal in (True, False):
        for S_q, S_kv in ((131, 77), (77, 131), (1, 1)):
            q, k, v, do = make(Case(1, S_q, S_kv, 4, 2, D), "cuda")
            gqa_autograd.attention(q, k, v, causal=causal).backward(do)


@torch.no_grad()
def infer(D: int) -> None:
    """Dense, split among thread blocks, and under a window."""
    for S_q, S_kv, options in ((131, 77, {"causal": True}), (77, 131, {}), (64, 1200, {"causal": True}), (90, 100, {"window": (30, 5)})):
        q, k, v, _ = make(Case(1, S_q, S_kv, 4, 2, D), "cuda")
        gqa_autograd.attention(q, k, v, **options)
        gqa_autograd.attention_with_lse(q, k, v, **options)


@torch.no_grad()
def packed(D: int) -> None:
    """With empty sequences and tails."""
    case = PackedCase((100, 0, 1, 150, 3), (70, 5, 0, 190, 3), 4, 2, D, tail_q=9, tail_kv=200)
    q, k, v, _, *cu_seqlens = make_packed(case, "cuda")
    for options in ({"causal": True}, {}, {"window": (30, 5)}):
        gqa_autograd.attention_varlen(q, k, v, *cu_seqlens, **options)
        gqa_autograd.attention_varlen_with_lse(q, k, v, *cu_seqlens, **options)


@torch.no_grad()
def nonsense() -> None:
    """Offsets that fall, that are negative or lie beyond the tokens: nothing outside the tensors is read or written."""
    q, k, v, *_ = make_packed(PackedCase((T,), (T,), 4, 2, 128), "cuda")
    for values in NONSENSE.values():
        cu_seqlens = (torch.tensor(offsets, dtype=torch.int32, device="cuda") for offsets in values)
        gqa_autograd.attention_varlen_with_lse(q, k, v, *cu_seqlens, causal=True)


def main() -> None:
    few = sys.argv[1] == "few"
    for D in (64, 128) if few else (64, 128, 256):
        if D < 256 and not few:
            train(D)
        infer(D)
        packed(D)
    if not few:
        nonsense()
    torch.cuda.synchronize()
    print("small_step: done")


main()
