"""The contestants for decoding: q, k and v as of `attention`, k and v the whole caches, whose lengths are on the device for ours.

torch's attention has no lengths: a peer is handed caches of exactly the right length. It has no causal mask of the last queries for cuDNN
either; there cuDNN takes the full one beyond one query, whose work is the same but for a few pairs."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import gqa_autograd
from gqa_autograd.testing import Case

from . import baselines
from .baselines import Contestant, NoRow


def _lengths(case: Case, device: torch.device) -> Tensor:
    return torch.full((case.B,), case.S_kv, dtype=torch.int32, device=device)


def _ours(case: Case, op: str, tensors: tuple[Tensor, ...], page_table: Tensor | None, with_lse: bool = False) -> Contestant:
    lengths = _lengths(case, tensors[0].device)
    options = {**case.options, "page_table": page_table}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if with_lse:
            return gqa_autograd.attention_decode_with_lse(q, k, v, lengths, **options)[0]
        return gqa_autograd.attention_decode(q, k, v, lengths, **options)

    return baselines.contestant(attend, gqa_autograd.__version__, op, tensors)._replace(deterministic=True)


def ours(case: Case, op: str, *tensors: Tensor) -> Contestant:
    return _ours(case, op, tensors, None)


def ours_lse(case: Case, op: str, *tensors: Tensor) -> Contestant:
    return _ours(case, op, tensors, None, with_lse=True)


def _paged(S_page: int) -> Callable[..., Contestant]:
    """The same cache in pages that lie in random order."""

    def made(case: Case, op: str, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Contestant:
        if case.S_kv % S_page:
            raise NoRow(f"{case.S_kv} keys are no whole pages of {S_page}")
        P = case.B * case.S_kv // S_page
        order = torch.randperm(P, generator=torch.Generator().manual_seed(0)).to(q.device)
        table = torch.empty(P, dtype=torch.int32, device=q.device)
        table[order] = torch.arange(P, dtype=torch.int32, device=q.device)
        pools = [t.detach().reshape(P, S_page, case.H_kv, case.D)[order] for t in (k, v)]
        return _ours(case, op, (q, *pools, do), table.view(case.B, -1))

    return made


def cudnn(case: Case, op: str, *tensors: Tensor) -> Contestant:
    full = dataclasses.replace(case, causal=False)
    version = baselines.dotted(torch.backends.cudnn.version() or 0)
    made = baselines._sdpa(full, op, tensors, SDPBackend.CUDNN_ATTENTION, version)
    return made if case.S_q == 1 else made._replace(instead=full)


def fa2(case: Case, op: str, *tensors: Tensor) -> Contestant:
    return baselines._sdpa(
        case if case.S_q > 1 else dataclasses.replace(case, causal=False), op, tensors, SDPBackend.FLASH_ATTENTION, torch.__version__
    )


def absent(case: Case, op: str, *tensors: Tensor) -> Contestant:
    raise NoRow("no form of it for decoding is known here")


CONTESTANTS: dict[str, Callable[..., Contestant]] = {
    "ours": ours,
    "ours-lse": ours_lse,
    "ours-page16": _paged(16),
    "ours-page128": _paged(128),
    "cudnn": cudnn,
    "fa2": fa2,
}
