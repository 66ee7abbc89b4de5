"""Named cases of decoding, and the truth about them: as `testing`, for a cache.

for case in testing_decode.CASES:
    given = testing_decode.make(case, "cuda")
    out, lse = gqa_autograd.attention_decode_with_lse(*given.arguments, **given.options)
    testing_decode.check(given, out, lse)
"""

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, testing
from .reference import decode as reference


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """One configuration of decoding. `str(case)` is the test id; only what differs from the default is in it."""

    S_q: int
    lengths: tuple[int, ...]
    H_q: int
    H_kv: int
    D: int
    # None: a dense cache
    S_page: int | None = None
    # What a sequence can hold; the longest length when None
    S_max: int | None = None
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    scale: float | None = None
    dtype: torch.dtype = torch.bfloat16
    # bshd: contiguous. bhsd: permuted views of [B, H, S, D]. fused: q is a view of [B, S_q, (H_q + 2 H_kv) D]
    layout: str = "bshd"

    def __str__(self) -> str:
        lengths = "_".join(map(str, self.lengths)) if len(self.lengths) <= 6 else f"{len(self.lengths)}of{max(self.lengths)}"
        parts = [testing._SHORT[self.dtype], f"q{self.S_q}", f"kv{lengths}", f"h{self.H_q}x{self.H_kv}", f"d{self.D}"]
        parts += [f"page{self.S_page}"] * (self.S_page is not None) + [f"max{self.S_max}"] * (self.S_max is not None)
        parts += ["full"] * (not self.causal) + ["w{}_{}".format(*self.window)] * (self.window != (-1, -1))
        parts += [f"cap{self.softcap:g}"] * (self.softcap > 0) + [f"scale{self.scale}"] * (self.scale is not None)
        return "-".join(parts + [self.layout] * (self.layout != "bshd"))

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `gqa_autograd.attention_decode`, without the page table."""
        return {"causal": self.causal, "window": self.window, "softcap": self.softcap, "scale": self.scale}

    @property
    def formula(self) -> tuple[int, int, float, float]:
        """window_left, window_right, scale, softcap."""
        scale = self.D**-0.5 if self.scale is None else self.scale
        return *checks.window("DecodeCase", self.causal, self.window), scale, self.softcap


_F16 = torch.float16
# Every ratio of heads and head size, one query to 64, empty sequences and such with fewer keys than queries, around the sizes of tiles
CASES = (
    DecodeCase(1, (1, 64, 129), 4, 4, 128),
    DecodeCase(1, (1000, 0, 63), 6, 3, 64, dtype=_F16),
    DecodeCase(2, (127, 1), 6, 2, 128, layout="fused"),
    DecodeCase(3, (257, 2, 300), 10, 2, 64, S_max=400),
    DecodeCase(4, (130, 513), 12, 2, 128, S_page=16, dtype=_F16),
    DecodeCase(7, (5, 200), 14, 2, 256, layout="bhsd"),
    DecodeCase(8, (600, 65), 16, 2, 128, S_page=64),
    DecodeCase(1, (1025,), 12, 1, 128, S_page=256, S_max=2000),
    DecodeCase(5, (90, 333, 0), 24, 2, 64, S_page=32),
    DecodeCase(16, (300, 17), 32, 2, 256, S_page=128, dtype=_F16),
    DecodeCase(1, (500, 77), 71, 1, 64),
    DecodeCase(9, (444,), 71, 1, 128, S_page=16),
    DecodeCase(63, (100, 64, 1), 4, 2, 128),
    DecodeCase(64, (64, 700), 12, 1, 64, S_page=64),
    DecodeCase(64, (10, 0), 2, 1, 256, causal=False),
    DecodeCase(2, (700, 30), 12, 2, 128, window=(63, -1)),
    DecodeCase(17, (300, 9), 8, 2, 64, causal=False, window=(11, 4), S_page=16),
    DecodeCase(6, (640, 200), 6, 1, 128, causal=False, window=(-1, 3), dtype=_F16, layout="bhsd"),
    DecodeCase(3, (400, 1, 66), 15, 3, 128, softcap=30.0),
    DecodeCase(1, (800, 31), 14, 2, 256, softcap=15.0, window=(100, 0), S_page=32),
    DecodeCase(2, (222, 350), 6, 2, 64, scale=-0.3),
    DecodeCase(2, (222,), 6, 2, 128, scale=0.0, S_page=128),
    DecodeCase(1, tuple(7 * n % 130 for n in range(70)), 8, 2, 128),
)


class Given(NamedTuple):
    """The tensors of a case. Of the cache, all that is no key of a sequence is NaN."""

    case: DecodeCase
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor
    page_table: Tensor | None

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k_cache, self.v_cache, self.cache_seqlens

    @property
    def options(self) -> dict[str, Any]:
        return {**self.case.options, "page_table": self.page_table}


def make(case: DecodeCase, device: torch.device | str = "cpu", seed: int = 0) -> Given:
    """Standard normal numbers; pages in random order, and table entries behind the last key that name no page."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(B: int, S: int, H: int) -> Tensor:
        shape = (B, H, S, case.D) if case.layout == "bhsd" else (B, S, H, case.D)
        made = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(case.dtype)
        return made.transpose(1, 2) if case.layout == "bhsd" else made

    B, S_max = len(case.lengths), max(case.lengths, default=0) if case.S_max is None else case.S_max
    q = normal(B, case.S_q, case.H_q + (2 * case.H_kv if case.layout == "fused" else 0))[:, :, : case.H_q]
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    if case.S_page is None:
        k, v = normal(B, S_max, case.H_kv), normal(B, S_max, case.H_kv)
        for n, length in enumerate(case.lengths):
            k[n, length:], v[n, length:] = math.nan, math.nan
        return Given(case, q, k, v, lengths, None)
    columns = -(-S_max // case.S_page)
    used = [-(-length // case.S_page) for length in case.lengths]
    P = sum(used) + 1
    order = torch.randperm(P, generator=torch.Generator().manual_seed(seed))
    k, v = normal(P, case.S_page, case.H_kv), normal(P, case.S_page, case.H_kv)
    table = torch.full((B, columns), -1, dtype=torch.int32)
    for n, (length, pages) in enumerate(zip(case.lengths, used, strict=True)):
        mine, order = order[:pages], order[pages:]
        table[n, :pages] = mine.int()
        table[n, pages:] = torch.tensor((-1, P, 2**31 - 1, -(2**31)), dtype=torch.int32).repeat(columns)[: columns - pages]
        if length % case.S_page:
            k[mine[-1], length % case.S_page :], v[mine[-1], length % case.S_page :] = math.nan, math.nan
    k[order], v[order] = math.nan, math.nan
    return Given(case, q, k, v, lengths, table.to(device))


@torch.no_grad()
def exact(given: Given) -> tuple[Tensor, Tensor]:
    """out and lse by the definition in float64."""
    return _defined(given, torch.float64)


def _defined(given: Given, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q, k, v = (t.to(dtype) for t in (given.q, given.k_cache, given.v_cache))
    B, S_q, H_q, D = q.shape
    out, lse = q.new_empty((B, S_q, H_q, D)), q.new_empty((B, H_q, S_q))
    pages = None if given.page_table is None else given.page_table.tolist()
    reference.attention_decode(q, k, v, given.cache_seqlens.tolist(), pages, out, lse, *given.case.formula)
    return out, lse


@torch.no_grad()
def plain(given: Given) -> Tensor:
    """out as one would write it in PyTorch, each step in the dtype of q; a sequence at a time, of keys that are all there."""
    case, out = given.case, torch.empty_like(given.q, memory_format=torch.contiguous_format)
    for n, length in enumerate(given.cache_seqlens.tolist()):
        k, v = (_keys(given, t, n, length) for t in (given.k_cache, given.v_cache))
        G = case.H_q // case.H_kv
        for h in range(case.H_kv):
            group = slice(h * G, (h + 1) * G)
            inputs = [given.q[n : n + 1, :, group], k[None, :, h : h + 1], v[None, :, h : h + 1]]
            out[n, :, group] = testing._plain_forward(inputs, *case.formula)[0][0] if length else 0
    return out


def _keys(given: Given, cache: Tensor, n: int, length: int) -> Tensor:
    """[length, H_kv, D]"""
    if given.page_table is None:
        return cache[n, :length]
    used = given.page_table[n, : -(-length // cache.shape[1])].long()
    return cache[used].flatten(0, 1)[:length]


def check(given: Given, out: Tensor, lse: Tensor | None) -> None:
    """The closeness rule of `testing`."""
    wanted, wanted_lse = exact(given)
    testing.assert_no_worse(out, plain(given), wanted, "out", softcap=given.case.softcap > 0)
    if lse is not None:
        testing.assert_lse(lse, wanted_lse)
