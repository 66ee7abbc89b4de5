"""The contestants: each makes, for a case and its tensors, a forward and a backward to time. Absence is reported, never worked around.

A backward is timed without its forward. Ours is the operator itself; a peer's is autograd.grad over a graph that is kept, under
set_multithreading_enabled(False): the engine then launches from the calling thread, where the timed scope is, and what it launches is
the peer's backward and what the peer wraps around it. GPU time holds nothing of the engine; host time does, so there ours is
autograd.grad too.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, bias, sdpa_kernel

import gqa_autograd
from gqa_autograd import ops
from gqa_autograd.testing import Case

from . import optional

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
NoRow = optional.NoRow


class Contestant(NamedTuple):
    """forward() gives out without autograd, backward() the gradients of q, k and v, on tensors prepared before; gradient() is backward as
    an eager user runs it. A contestant without a backward has None. bhsd: results are [B, H, S, D]. instead: what it computes, where that
    is not the case of the row; its rate is then its own. deterministic: it promises the same bits from run to run."""

    forward: Callable[[], Tensor]
    backward: Callable[[], tuple[Tensor, ...]] | None
    gradient: Callable[[], tuple[Tensor, ...]] | None
    version: str
    bhsd: bool = False
    instead: Case | None = None
    deterministic: bool = False


def differentiated(attend: Attend, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """The gradients alone, as often as one likes, from the calling thread."""
    with torch.enable_grad():
        out = attend(q, k, v)

    def backward() -> tuple[Tensor, ...]:
        with torch.autograd.set_multithreading_enabled(False):
            return torch.autograd.grad(out, (q, k, v), do, retain_graph=True)

    return backward


def contestant(attend: Attend, version: str, op: str, tensors: tuple[Tensor, ...], bhsd: bool = False) -> Contestant:
    """Of a function that autograd can differentiate."""
    q, k, v, do = (t.detach().transpose(1, 2) if bhsd else t.detach() for t in tensors)
    q, k, v = (t.requires_grad_(op == "backward") for t in (q, k, v))

    def forward() -> Tensor:
        with torch.no_grad():
            return attend(q, k, v)

    forward()
    backward = differentiated(attend, q, k, v, do) if op == "backward" else None
    return Contestant(forward, backward, backward, version, bhsd)


def ours(case: Case, op: str, *tensors: Tensor) -> Contestant:
    """Its forward has the same bits from run to run, its backward does not promise it."""
    return _ours(case, op, tensors, False)


def ours_det(case: Case, op: str, *tensors: Tensor) -> Contestant:
    """The backward with deterministic=True."""
    if op == "forward":
        raise NoRow("ours is deterministic in a forward")
    return _ours(case, op, tensors, True)


def _ours(case: Case, op: str, tensors: tuple[Tensor, ...], deterministic: bool) -> Contestant:
    attend = functools.partial(gqa_autograd.attention, **case.options, deterministic=deterministic)
    made = contestant(attend, gqa_autograd.__version__, op, tensors)._replace(deterministic=deterministic or op == "forward")
    if op == "forward":
        return made
    q, k, v, do = (t.detach() for t in tensors)
    out, lse = gqa_autograd.attention_with_lse(q, k, v, **case.options)
    return made._replace(backward=lambda: ops.attention_bwd(do, q, k, v, out, lse, None, *case.formula, deterministic))


def ours_lse(case: Case, op: str, *tensors: Tensor) -> Contestant:
    """The same with LSE, which a user of attention_with_lse has without gradients too."""
    if op != "forward":
        raise NoRow("a backward needs LSE, so ours has it")
    attend = lambda q, k, v: gqa_autograd.attention_with_lse(q, k, v, **case.options)[0]  # noqa: E731
    return contestant(attend, gqa_autograd.__version__, op, tensors)._replace(deterministic=True)


def ours_dense(case: Case, op: str, *tensors: Tensor) -> Contestant:
    raise NoRow("the case is dense itself; it stands beside packs")


def cudnn(case: Case, op: str, *tensors: Tensor) -> Contestant:
    if case.causal and case.S_q != case.S_kv:
        raise NoRow("torch's causal mask is top-left for cuDNN; aligned at the ends it would be a dense bias")
    return _sdpa(case, op, tensors, SDPBackend.CUDNN_ATTENTION, dotted(torch.backends.cudnn.version() or 0))


def fa2(case: Case, op: str, *tensors: Tensor) -> Contestant:
    if case.window != (-1, -1) and not case.softcap:
        return contestant(functools.partial(_fa2_window, case), torch.__version__, op, tensors)
    return _sdpa(case, op, tensors, SDPBackend.FLASH_ATTENTION, torch.__version__)


def _fa2_window(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """scaled_dot_product_attention has no window, the operator under it has; its lengths are aligned at their ends."""
    left, right, scale, _ = case.formula
    sides = {"window_size_left": left, "window_size_right": right}
    return torch.ops.aten._flash_attention_forward(q, k, v, None, None, case.S_q, case.S_kv, 0.0, right == 0, False, scale=scale, **sides)[
        0
    ]


def _sdpa(case: Case, op: str, tensors: tuple[Tensor, ...], backend: SDPBackend, version: str) -> Contestant:
    if case.window != (-1, -1) or case.softcap:
        raise NoRow("scaled_dot_product_attention has no window and no softcap")
    square = case.S_q == case.S_kv
    mask = bias.causal_lower_right(case.S_q, case.S_kv) if case.causal and not square else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            causal = case.causal and square
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=case.scale, enable_gqa=case.H_q != case.H_kv)

    return contestant(attend, version, op, tensors, bhsd=True)


def dotted(version: int) -> str:
    """cuDNN's 91900 is 9.19.0."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def flex(case: Case, op: str, *tensors: Tensor) -> Contestant:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    left, right, _, softcap = case.formula
    offset = case.S_kv - case.S_q

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        upper = j <= i + offset + right if right >= 0 else j >= 0
        return upper & (j >= i + offset - left) if left >= 0 else upper

    def capped(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    masked = left >= 0 or right >= 0
    mask = create_block_mask(seen, None, None, case.S_q, case.S_kv, device=tensors[0].device) if masked else None
    # Each case afresh: past the recompile limit Dynamo would run the unfused definition
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    options: dict[str, Any] = {"block_mask": mask, "scale": case.scale, "enable_gqa": case.H_q != case.H_kv}
    attend = functools.partial(compiled, score_mod=capped if softcap else None, **options)
    return contestant(attend, torch.__version__, op, tensors, bhsd=True)


def _differentiable(make: Callable[[Case], tuple[Attend, str]]) -> Callable[..., Contestant]:
    return lambda case, op, *tensors: contestant(*make(case), op, tensors)


def _forward_only(make: Callable[[Case], tuple[Attend, str]]) -> Callable[..., Contestant]:
    def made(case: Case, op: str, *tensors: Tensor) -> Contestant:
        if op != "forward":
            raise NoRow("it has no backward")
        return contestant(*make(case), op, tensors)

    return made


CONTESTANTS: dict[str, Callable[..., Contestant]] = {
    "ours": ours,
    "ours-lse": ours_lse,
    "ours-det": ours_det,
    "ours-dense": ours_dense,
    "cudnn": cudnn,
    "fa2": fa2,
    "flex": flex,
    "fa3": _differentiable(optional.fa3),
    "fa4": _differentiable(optional.fa4),
    "flashinfer": _forward_only(optional.flashinfer),
    "fla": _differentiable(optional.fla),
}
# Ours in another form: only where one asks for it
VARIANTS = ("ours-lse", "ours-det", "ours-dense", "ours-page16", "ours-page128")
PEERS = tuple(name for name in CONTESTANTS if name != "ours" and name not in VARIANTS)


def missing(name: str) -> str | None:
    """The module that a contestant needs and this environment lacks."""
    module = optional.MODULES.get(name)
    try:
        return module if module and importlib.util.find_spec(module) is None else None
    except ModuleNotFoundError:  # of a package that holds the module
        return module
