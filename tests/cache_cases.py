"""Appends to caches in odd sizes, and where each token belongs, written as a loop."""

from typing import NamedTuple

import torch
from torch import Tensor


class Append(NamedTuple):
    """A call: sequences of `lengths` tokens get S_new more. `rows` of each sequence, or, where `tables` says which each has, of P pages."""

    lengths: tuple[int, ...]
    S_new: int
    rows: int
    tables: tuple[tuple[int, ...], ...] | None = None
    P: int = 0
    H_kv: int = 2
    D: int = 8
    D_v: int = 8
    fused: bool = False

    def __str__(self) -> str:
        kind = "dense" if self.tables is None else f"{self.P}-pages"
        sizes = f"h{self.H_kv}-d{self.D}-dv{self.D_v}"
        return f"{kind}-{'_'.join(map(str, self.lengths))}+{self.S_new}-of-{self.rows}-{sizes}{'-fused' * self.fused}"


# Every token has a place
ORDERLY = (
    Append((0,), 1, 1),
    Append((0, 5, 3), 3, 8),
    Append((7, 0), 9, 17, D=70, D_v=6, fused=True),
    Append((2, 2, 2), 0, 3),
    Append((3, 9, 0), 1, 4, ((2, -1, -1), (0, 4, 1), (3, -1, -1)), 5),
    Append((5, 15), 17, 16, ((1, 0, -1), (6, 2, 4)), 7, H_kv=3, D=72, D_v=72, fused=True),
)
BIG = 2**31 - 1
# Some have none
ADVERSARIAL = (
    Append((-1, 8, 7, BIG, -BIG - 1, 5), 3, 8),
    Append((0, 3, 4, 8), 6, 4, ((5, 1), (-1, 2), (BIG, 0), (3, 4)), 5),
    Append((-2, BIG, 7, 0), 5, 4, ((0, 1), (2, 3), (4, -BIG - 1), (-7, 3)), 5),
    Append((0, 1), 2, 4, ((), ()), 3),
)


class Tensors(NamedTuple):
    k_cache: Tensor
    v_cache: Tensor
    k_new: Tensor
    v_new: Tensor
    cache_seqlens: Tensor
    page_table: Tensor | None


def make(case: Append, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensors:
    """Caches of NaN, so that nothing is right by chance; with `fused`, k and v are columns of one projection of q, k and v."""
    B = len(case.lengths)
    blocks = B if case.tables is None else case.P
    caches = (torch.full((blocks, case.rows, case.H_kv, D), torch.nan, dtype=dtype, device=device) for D in (case.D, case.D_v))
    sizes = [case.H_kv * case.D, case.H_kv * case.D_v]
    if case.fused:
        whole = torch.randn(B, case.S_new, 5 + sum(sizes), device=device).to(dtype)
        k, v = whole[..., 5:].split(sizes, dim=-1)
    else:
        k, v = (torch.randn(B, case.S_new, size, device=device).to(dtype) for size in sizes)
    table = None if case.tables is None else torch.tensor(case.tables, dtype=torch.int32, device=device).view(B, -1)
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    return Tensors(*caches, k.unflatten(-1, (case.H_kv, case.D)), v.unflatten(-1, (case.H_kv, case.D_v)), lengths, table)


def appended(case: Append, t: Tensors) -> tuple[Tensor, Tensor]:
    """The caches afterwards, by a loop over tokens."""
    k_cache, v_cache = t.k_cache.clone(), t.v_cache.clone()
    for b, length in enumerate(case.lengths):
        for i in range(case.S_new):
            row, block = length + i, b
            if length < 0:
                continue
            if case.tables is not None:
                entry, row = divmod(row, case.rows)
                block = case.tables[b][entry] if entry < len(case.tables[b]) else -1
            if row < case.rows and 0 <= block < k_cache.shape[0]:
                k_cache[block, row], v_cache[block, row] = t.k_new[b, i], t.v_new[b, i]
    return k_cache, v_cache
