"""What test_sanitizer.py runs under compute-sanitizer: `small_step.py all`, or `few` for the tools that take minutes a call.

all: a training step of every head size at odd lengths, dense, split and packed, with and without a window and a softcap; then the
forwards below with D 64, 128 and 256, and offsets that are nonsense.
few: dense, split and packed forwards and gradients at D 64 and 128, results not read: their last writer is TMA, which not every tool
follows.
grad: the training steps of `all` that `few` leaves out, once for each head size.
"""

import sys
from pathlib import Path

import torch

# As a script: pytest has this folder on the path already
sys.path.append(str(Path(__file__).parents[1]))
from cache_cases import ADVERSARIAL, ORDERLY
from cache_cases import make as make_append
from packed_cases import NONSENSE, T

import gqa_autograd
from gqa_autograd.kernels import config
from gqa_autograd.testing import Case, make
from gqa_autograd.testing_varlen import PackedCase
from gqa_autograd.testing_varlen import make as make_packed

BOTH = {"window": (30, 5), "softcap": 15.0}


def train(D: int, D_v: int, shapes: tuple = ((131, 77), (77, 131), (1, 1), (700, 60))) -> None:
    """The last shape has fewer key tiles than a card has multiprocessors: its queries are split."""
    for S_q, S_kv in shapes:
        for options in ({"causal": True}, {}, BOTH):
            q, k, v, do = make(Case(1, S_q, S_kv, 4, 2, D, D_v=D_v), "cuda")
            out, lse = gqa_autograd.attention_with_lse(q, k, v, **options)
            torch.autograd.backward((out, lse), (do, torch.zeros_like(lse)))


def train_packed(D: int, D_v: int) -> None:
    """With empty sequences and tails."""
    case = PackedCase((100, 0, 1, 150, 3), (70, 5, 0, 190, 3), 4, 2, D, D_v=D_v, tail_q=9, tail_kv=200)
    for options in ({"causal": True}, BOTH):
        q, k, v, do, *cu_seqlens = make_packed(case, "cuda")
        gqa_autograd.attention_varlen(q, k, v, *cu_seqlens, **options).backward(do)


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


def nonsense() -> None:
    """Offsets that fall, that are negative or lie beyond the tokens: nothing outside the tensors is touched, in the backward too."""
    q, k, v, do, *_ = make_packed(PackedCase((T,), (T,), 4, 2, 128), "cuda")
    for values in NONSENSE.values():
        cu_seqlens = (torch.tensor(offsets, dtype=torch.int32, device="cuda") for offsets in values)
        gqa_autograd.attention_varlen(q, k, v, *cu_seqlens, causal=True).backward(do)


@torch.no_grad()
def appends() -> None:
    """To caches, lengths and tables that are nonsense included."""
    for case in (*ORDERLY, *ADVERSARIAL):
        torch.ops.gqa_autograd.cache_append_(*make_append(case, torch.bfloat16, "cuda"))


def main() -> None:
    calls = sys.argv[1]
    for D, D_v in config.D_BACKWARD:
        few = (D, D_v) in ((64, 64), (128, 128))
        if calls == "all":
            train(D, D_v)
            train_packed(D, D_v)
        elif (calls == "few") == few:
            train(D, D_v, ((77, 131), (700, 60)) if few else ((77, 131),))
            train_packed(D, D_v)
    for D in {"all": (64, 128, 256), "few": (64, 128), "grad": ()}[calls]:
        infer(D)
        packed(D)
    if calls == "all":
        nonsense()
        appends()
    torch.cuda.synchronize()
    print("small_step: done")


main()
