"""The contestants for packs, forward only: q, k, v in [T, H, D] and cu_seqlens, which is made before and is not part of the call."""

from collections.abc import Callable

import torch
from torch import Tensor

import gqa_autograd
from gqa_autograd import testing
from gqa_autograd.testing_varlen import offsets

from . import baselines, optional
from .baselines import Attend, Contestant, NoRow
from .packs import Pack


def _forward_only(make: Callable[[Pack, torch.device], tuple[Attend, str]]) -> Callable[..., Contestant]:
    def made(pack: Pack, op: str, *tensors: Tensor) -> Contestant:
        if op != "forward":
            raise NoRow("packs are timed forward only")
        return baselines.contestant(*make(pack, tensors[0].device), op, tensors)

    return made


@_forward_only
def ours(pack: Pack, device: torch.device) -> tuple[Attend, str]:
    starts, options = offsets(pack.lengths, device), pack.options
    return lambda q, k, v: gqa_autograd.attention_varlen(q, k, v, starts, starts, **options), gqa_autograd.__version__


@_forward_only
def ours_lse(pack: Pack, device: torch.device) -> tuple[Attend, str]:
    starts, options = offsets(pack.lengths, device), pack.options
    return lambda q, k, v: gqa_autograd.attention_varlen_with_lse(q, k, v, starts, starts, **options)[0], gqa_autograd.__version__


def ours_dense(pack: Pack, op: str, *tensors: Tensor) -> Contestant:
    """Our dense attention on the shape that the pack's rate is held against; its own tensors and FLOPs."""
    if op != "forward":
        raise NoRow("packs are timed forward only")
    own = testing.make(pack.dense, tensors[0].device)
    return baselines.ours(pack.dense, op, *own)._replace(instead=pack.dense)


@_forward_only
def fa2(pack: Pack, device: torch.device) -> tuple[Attend, str]:
    """The operator under torch.nn.attention.varlen.varlen_attn, which itself launches a fill more."""
    starts, longest = offsets(pack.lengths, device), max(pack.lengths)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.aten._flash_attention_forward(q, k, v, starts, starts, longest, longest, 0.0, True, False)[0]

    return attend, torch.__version__


CONTESTANTS: dict[str, Callable[..., Contestant]] = {
    "ours": ours,
    "ours-lse": ours_lse,
    "ours-dense": ours_dense,
    "fa2": fa2,
    "fa3": _forward_only(optional.fa3_packed),
    "fa4": _forward_only(optional.fa4_packed),
    "flashinfer": _forward_only(optional.flashinfer_packed),
}


def absent(pack: Pack, op: str, *tensors: Tensor) -> Contestant:
    raise NoRow("no packed form of it is known here")
