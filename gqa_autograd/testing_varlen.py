"""`testing` for packed sequences: named cases, the truth and the closeness rule, sequence by sequence.

for case in testing_varlen.PACKED:
    q, k, v, do, cu_seqlens_q, cu_seqlens_k = args = testing_varlen.make(case, "cuda", seed=0)
    ours, plain, exact = (f(case, *args) for f in (testing_varlen.ours, testing_varlen.plain, testing_varlen.exact))
    testing_varlen.assert_no_worse(case, ours, plain, exact)
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import functional, testing
from .testing import Case, Result


@dataclasses.dataclass(frozen=True)
class PackedCase:
    """One packing: the lengths of its sequences and, as in `testing.Case`, the rest. Tails are tokens that belong to no sequence."""

    lengths_q: tuple[int, ...]
    lengths_kv: tuple[int, ...]
    H_q: int
    H_kv: int
    D: int
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    scale: float | None = None
    dtype: torch.dtype = torch.bfloat16
    # thd: contiguous. htd: a permuted view of [H, T, D]. fused: views of one [T, (H_q + 2 H_kv) D], needs T_q == T_kv
    layout: str = "thd"
    D_v: int | None = None
    tail_q: int = 0
    tail_kv: int = 0

    def __str__(self) -> str:
        # The dense case says the rest, after its own B and lengths
        dtype, _, _, _, rest = str(self.sequence(0)).split("-", 4)
        lengths = [name + ".".join(map(str, values)) for name, values in (("q", self.lengths_q), ("kv", self.lengths_kv))]
        parts = [dtype, *lengths, rest] + [self.layout] * (self.layout != "thd")
        return "-".join(parts + [f"tail{self.tail_q}_{self.tail_kv}"] * (self.tail_q + self.tail_kv > 0))

    def sequence(self, n: int) -> Case:
        """Sequence n as a case of dense attention, B = 1."""
        shared = ("H_q", "H_kv", "D", "causal", "window", "softcap", "scale", "dtype", "D_v")
        S_q, S_kv = (self.lengths_q[n], self.lengths_kv[n]) if self.lengths_q else (0, 0)
        return Case(1, S_q, S_kv, **{name: getattr(self, name) for name in shared})

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `gqa_autograd.attention_varlen` that are not tensors."""
        return self.sequence(0).options

    @property
    def formula(self) -> tuple[int, int, float, float]:
        return self.sequence(0).formula

    @property
    def slices(self) -> tuple[tuple[slice, slice], ...]:
        """(queries, keys) of each sequence."""
        ends = (tuple(itertools.accumulate(lengths)) for lengths in (self.lengths_q, self.lengths_kv))
        pairs = zip(zip(self.lengths_q, self.lengths_kv, strict=True), zip(*ends, strict=True), strict=True)
        return tuple((slice(a - S_q, a), slice(b - S_kv, b)) for (S_q, S_kv), (a, b) in pairs)


_F16 = torch.float16
# One and many sequences, lengths around the tile sizes, empty ones on either side, first, last and in between, queries that see no key,
# tails on either side, every group size
PACKED = (
    PackedCase((1,), (1,), 4, 4, 64),
    PackedCase((113,), (203,), 6, 3, 128, causal=True),
    PackedCase((3, 130, 64, 1), (3, 130, 64, 1), 8, 2, 128, causal=True),
    PackedCase((127, 1, 129, 40), (127, 1, 129, 40), 4, 4, 64, layout="fused", dtype=_F16),
    PackedCase((65, 200, 7), (190, 33, 128), 6, 2, 64, causal=True, layout="htd"),
    PackedCase((0, 50, 0, 0, 77), (20, 61, 0, 5, 90), 4, 1, 128, causal=True, dtype=_F16),
    PackedCase((40, 31, 128, 9), (0, 70, 0, 0), 6, 3, 64),
    PackedCase((64, 128), (64, 128), 8, 1, 128, causal=True, tail_q=3, tail_kv=3, layout="fused"),
    PackedCase((100, 30), (30, 111), 4, 2, 64, causal=True, tail_q=70, tail_kv=141, dtype=_F16),
    PackedCase((90, 60, 5), (130, 60, 70), 6, 2, 128, causal=True, window=(31, -1), tail_kv=11),
    PackedCase((20, 150), (180, 97), 4, 4, 64, window=(17, 5), dtype=_F16, tail_q=5),
    PackedCase((66, 35, 80), (66, 102, 80), 8, 2, 128, causal=True, softcap=15.0),
    PackedCase((33, 80), (71, 65), 4, 2, 128, causal=True, scale=-0.3, dtype=_F16),
    PackedCase((25, 140), (60, 77), 3, 1, 192, causal=True, D_v=128),
    PackedCase(tuple(range(1, 40, 3)), tuple(range(40, 1, -3)), 2, 2, 64, causal=True, tail_q=1, tail_kv=1),
    PackedCase((0, 0), (0, 0), 4, 2, 64, tail_q=6, tail_kv=9),
    PackedCase((), (), 4, 2, 128, causal=True, tail_q=7, tail_kv=4),
)
NAMES = ("out", "dq", "dk", "dv")


def offsets(lengths: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """cu_seqlens [N + 1] of these lengths."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def make(case: PackedCase, device: torch.device | str = "cpu", seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, each a leaf that requires a gradient, do, cu_seqlens_q, cu_seqlens_k; standard normal numbers, in the tails too."""
    layout = {"thd": "bshd", "htd": "bhsd", "fused": "fused"}[case.layout]
    T_q, T_kv = sum(case.lengths_q) + case.tail_q, sum(case.lengths_kv) + case.tail_kv
    dense = testing.make(dataclasses.replace(case.sequence(0), S_q=T_q, S_kv=T_kv, layout=layout), device, seed)
    q, k, v, do = (t.detach()[0] for t in dense)
    cu_seqlens = offsets(case.lengths_q, device), offsets(case.lengths_kv, device)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), do, *cu_seqlens


def spoil(case: PackedCase, args: tuple, sequences: tuple[int, ...] = (), value: float = float("nan")) -> tuple:
    """What `make` returns, as new leaves that hold NaN in every tail and in all of the sequences named: no other may see it."""
    q, k, v, do, *cu_seqlens = args
    tails = slice(sum(case.lengths_q), None), slice(sum(case.lengths_kv), None)
    spoiled = []
    for t, side in ((q, 0), (k, 1), (v, 1), (do, 0)):
        # torch.clone keeps the strides of a permuted view; those of a fused one become contiguous
        copy = t.detach().clone()
        for where in (tails, *(case.slices[n] for n in sequences)):
            copy[where[side]] = value
        spoiled.append(copy.requires_grad_(t.requires_grad))
    return *spoiled, *cu_seqlens


def ours(
    case: PackedCase, q, k, v, do, cu_seqlens_q, cu_seqlens_k, dlse: Tensor | None = None, *, deterministic: bool | None = None
) -> Result:
    """The public function of this package, differentiated by autograd."""
    out, lse = functional.attention_varlen_with_lse(q, k, v, cu_seqlens_q, cu_seqlens_k, **case.options, deterministic=deterministic)
    outputs = ((out, do),) if dlse is None else ((out, do), (lse, dlse))
    grads = torch.autograd.grad([o for o, _ in outputs], (q, k, v), [g for _, g in outputs])
    return Result(out.detach(), lse.detach(), *grads)


@torch.no_grad()
def forward(case: PackedCase, q, k, v, do, cu_seqlens_q, cu_seqlens_k) -> Result:
    """`ours` where there are no gradients: out and lse, and NaN for the rest; compare them by names=("out",)."""
    out, lse = functional.attention_varlen_with_lse(q, k, v, cu_seqlens_q, cu_seqlens_k, **case.options)
    return Result(out, lse, *(torch.full_like(t, torch.nan) for t in (q, k, v)))


def exact(case: PackedCase, q, k, v, do, cu_seqlens_q, cu_seqlens_k, dlse: Tensor | None = None) -> Result:
    """The truth: `testing.exact` of each sequence. NaN in the tails of out and lse, 0 in those of the gradients."""
    return _each(testing.exact, case, torch.float64, q, k, v, do, dlse)


def plain(case: PackedCase, q, k, v, do, cu_seqlens_q, cu_seqlens_k, dlse: Tensor | None = None) -> Result:
    """`testing.plain` of each sequence, with the same tails."""
    return _each(testing.plain, case, q.dtype, q, k, v, do, dlse)


def _each(of_dense: Callable, case: PackedCase, dtype: torch.dtype, q, k, v, do, dlse: Tensor | None) -> Result:
    out, lse = do.new_full(do.shape, torch.nan, dtype=dtype), do.new_full((q.shape[1], q.shape[0]), torch.nan, dtype=dtype)
    result = Result(out, lse, *(t.new_zeros(t.shape, dtype=dtype) for t in (q.detach(), k.detach(), v.detach())))
    for n, (mine, theirs) in enumerate(case.slices):
        tensors = q[None, mine], k[None, theirs], v[None, theirs], do[None, mine]
        one = of_dense(case.sequence(n), *(t.detach() for t in tensors), None if dlse is None else dlse[None, :, mine])
        for whole, part in zip(sequence(case, result, n), one, strict=True):
            whole.copy_(part[0])
    return result


def sequence(case: PackedCase, result: Result, n: int) -> Result:
    """What a result says of sequence n, as views."""
    mine, theirs = case.slices[n]
    return Result(result.out[mine], result.lse[:, mine], result.dq[mine], result.dk[theirs], result.dv[theirs])


def tails(case: PackedCase, result: Result) -> Result:
    """What a result says of the tokens that belong to no sequence, as views."""
    T_q, T_kv = sum(case.lengths_q), sum(case.lengths_kv)
    return Result(result.out[T_q:], result.lse[:, T_q:], result.dq[T_q:], result.dk[T_kv:], result.dv[T_kv:])


def assert_no_worse(
    case: PackedCase, ours: Result, plain: Result, exact: Result, names: tuple[str, ...] = NAMES, without: tuple[int, ...] = ()
) -> None:
    """testing.assert_no_worse and assert_lse for each sequence but those in `without`, which were spoiled; gradients of tails are 0."""
    for n in (n for n in range(len(case.lengths_q)) if n not in without):
        mine, theirs, truth = (sequence(case, result, n) for result in (ours, plain, exact))
        for name in names:
            got, allowed, want = (getattr(result, name) for result in (mine, theirs, truth))
            testing.assert_no_worse(got, allowed, want, f"{name} of sequence {n}", softcap=case.softcap > 0)
        testing.assert_lse(mine.lse, truth.lse)
    for name in names:
        if name != "out":
            assert not bool(getattr(tails(case, ours), name).any()), f"{name}: not 0 beyond the last offset"


def assert_untouched(case: PackedCase, ours: Result) -> None:
    """Under `testing.poisoned`: nobody wrote to the rows of out and lse that belong to no sequence."""
    for name in ("out", "lse"):
        assert bool(getattr(tails(case, ours), name).isnan().all()), f"{name}: written beyond the last offset"


def assert_gradients(
    case: PackedCase, ours: Result, plain: Result, exact: Result, args: tuple, dlse: Tensor | None = None, without: tuple[int, ...] = ()
) -> None:
    """testing.assert_gradients of each sequence but those in `without`, with what may be left where they vanish; 0 in the tails.

    args: what `make` returned, before anything was spoiled."""
    q, k, v, do, *_ = args
    for n in (n for n in range(len(case.lengths_q)) if n not in without):
        mine, theirs = case.slices[n]
        tensors = q[None, mine], k[None, theirs], v[None, theirs], do[None, mine]
        one = case.sequence(n)
        rounding = testing.vanishing(one, *tensors, None if dlse is None else dlse[None, :, mine])
        got, allowed, want = (Result(*(t[None] for t in sequence(case, result, n))) for result in (ours, plain, exact))
        testing.assert_gradients(one, got, allowed, want, rounding, of=f" of sequence {n}")
    for name in ("dq", "dk", "dv"):
        assert not bool(getattr(tails(case, ours), name).any()), f"{name}: not 0 beyond the last offset"
