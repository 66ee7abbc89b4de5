"""The contestants for packs: q, k, v in [T, H, D] and cu_seqlens, which is made before and is not part of the call."""

from collections.abc import Callable

import torch
from torch import Tensor

import gqa_autograd
from gqa_autograd import ops_varlen, testing
from gqa_autograd.testing_varlen import offsets

from . import baselines, optional
from .baselines import Attend, Contestant, NoRow
from .packs import Pack


def _differentiable(make: Callable[[Pack, torch.device], tuple[Attend, str]]) -> Callable[..., Contestant]:
    return lambda pack, op, *tensors: baselines.contestant(*make(pack, tensors[0].device), op, tensors)


def _forward_only(make: Callable[[Pack, torch.device], tuple[Attend, str]]) -> Callable[..., Contestant]:
    def made(pack: Pack, op: str, *tensors: Tensor) -> Contestant:
        if op != "forward":
            raise NoRow("it has no backward")
        return baselines.contestant(*make(pack, tensors[0].device), op, tensors)

    return made


def ours(pack: Pack, op: str, *tensors: Tensor) -> Contestant:
    """As baselines.ours: the backward is the operator itself."""
    return _ours(pack, op, tensors, False)


def ours_det(pack: Pack, op: str, *tensors: Tensor) -> Contestant:
    if op == "forward":
        raise NoRow("ours is deterministic in a forward")
    return _ours(pack, op, tensors, True)


def _ours(pack: Pack, op: str, tensors: tuple[Tensor, ...], deterministic: bool) -> Contestant:
    starts, options = offsets(pack.lengths, tensors[0].device), {**pack.options, "deterministic": deterministic}
    attend = lambda q, k, v: gqa_autograd.attention_varlen(q, k, v, starts, starts, **options)  # noqa: E731
    made = baselines.contestant(attend, gqa_autograd.__version__, op, tensors)._replace(deterministic=deterministic or op == "forward")
    if op == "forward":
        return made
    q, k, v, do = (t.detach() for t in tensors)
    out, lse = gqa_autograd.attention_varlen_with_lse(q, k, v, starts, starts, **pack.options)
    run = ops_varlen.attention_varlen_bwd
    return made._replace(backward=lambda: run(do, q, k, v, out, lse, None, starts, starts, *pack.case.formula, deterministic))


def ours_lse(pack: Pack, op: str, *tensors: Tensor) -> Contestant:
    if op != "forward":
        raise NoRow("a backward needs LSE, so ours has it")
    starts, options = offsets(pack.lengths, tensors[0].device), pack.options
    attend = lambda q, k, v: gqa_autograd.attention_varlen_with_lse(q, k, v, starts, starts, **options)[0]  # noqa: E731
    return baselines.contestant(attend, gqa_autograd.__version__, op, tensors)._replace(deterministic=True)


def ours_dense(pack: Pack, op: str, *tensors: Tensor) -> Contestant:
    """Our dense attention on the shape that the pack's rate is held against; its own tensors and FLOPs."""
    own = testing.make(pack.dense, tensors[0].device)
    return baselines.ours(pack.dense, op, *own)._replace(instead=pack.dense)


@_differentiable
def fa2(pack: Pack, device: torch.device) -> tuple[Attend, str]:
    """The operator under torch.nn.attention.varlen.varlen_attn, which itself launches a fill more."""
    starts, longest = offsets(pack.lengths, device), max(pack.lengths)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.aten._flash_attention_forward(q, k, v, starts, starts, longest, longest, 0.0, True, False)[0]

    return attend, torch.__version__


CONTESTANTS: dict[str, Callable[..., Contestant]] = {
    "ours": ours,
    "ours-lse": ours_lse,
    "ours-det": ours_det,
    "ours-dense": ours_dense,
    "fa2": fa2,
    "fa3": _differentiable(optional.fa3_packed),
    "fa4": _differentiable(optional.fa4_packed),
    "flashinfer": _forward_only(optional.flashinfer_packed),
}


def absent(pack: Pack, op: str, *tensors: Tensor) -> Contestant:
    raise NoRow("no packed form of it is known here")
