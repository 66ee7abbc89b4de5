"""What test_sanitizer.py runs under compute-sanitizer: `small_step.py all`, or `few` for the tools that take minutes a call.

all: a training step of every head size at odd lengths, dense, split and packed, with and without a window and a softcap; then the
forwards below and decoding with D 64, 128 and 256; offsets, lengths and page tables that are nonsense.
few: dense, split and packed forwards, decoding and gradients at D 64 and 128, results not read: their last writer is TMA, which not
every tool follows.
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
from gqa_autograd import testing_decode
from gqa_autograd.kernels import config
from gqa_autograd.testing import Case, make
from gqa_autograd.testing_decode import DecodeCase
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


def decode(D: int) -> None:
    """Over a dense cache and pages of each form; an empty sequence, one of several thread blocks, two tiles of rows."""
    for S_page in (None, 16, 64):
        for S_q, options in ((1, {}), (9, {"window": (100, -1)}), (2, {"softcap": 15.0})):
            given = testing_decode.make(DecodeCase(S_q, (1500, 0, 70), 16, 2, D, S_page, **options), "cuda")
            gqa_autograd.attention_decode(*given.arguments, **given.options)
            gqa_autograd.attention_decode_with_lse(*given.arguments, **given.options)


def adversarial() -> None:
    """Lengths beyond the cache and below 0, pages that the pool doesn't have: nothing outside the tensors is read."""
    far = 2**31 - 1
    lengths = torch.tensor((far, -5, 600, 1024), dtype=torch.int32, device="cuda")
    table = torch.tensor((0, -1, far, -far - 1, 5, 1, 2**20, 4), dtype=torch.int32, device="cuda").repeat(4, 1)
    for S_page in (16, 32, 64, 128):
        for pages in (None, table):
            given = testing_decode.make(DecodeCase(2, (5 * S_page,), 12, 2, 128, S_page), "cuda")
            k, v = (t[: 4 if pages is None else 6].nan_to_num() for t in (given.k_cache, given.v_cache))
            gqa_autograd.attention_decode(given.q.expand(4, -1, -1, -1).contiguous(), k, v, lengths, page_table=pages)


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
        decode(D)
    if calls == "all":
        nonsense()
        adversarial()
        appends()
    torch.cuda.synchronize()
    print("small_step: done")


main()
