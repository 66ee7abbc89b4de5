"""The contestants: each makes, for a case and its tensors, a forward and a backward to time. Absence is reported, never worked around."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import gqa_autograd
from gqa_autograd import ops
from gqa_autograd.testing import Case


class Contestant(NamedTuple):
    """forward() runs without autograd, backward() only the backward, on tensors prepared before."""

    forward: Callable[[], object]
    backward: Callable[[], object]
    version: str


def ours(case: Case, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Contestant:
    options: dict[str, Any] = {"causal": case.causal, "scale": case.scale}
    with torch.no_grad():
        out, lse = gqa_autograd.attention_with_lse(q, k, v, **options)
    window_right = 0 if case.causal else -1

    def forward():
        with torch.no_grad():
            return gqa_autograd.attention(q, k, v, **options)

    def backward():
        with torch.no_grad():
            return ops.attention_bwd(do, q, k, v, out, lse, None, -1, window_right, case.scale)

    return Contestant(forward, backward, gqa_autograd.__version__)


def cudnn(case: Case, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Contestant:
    return _sdpa(case, q, k, v, do, SDPBackend.CUDNN_ATTENTION, str(torch.backends.cudnn.version()))


def fa2(case: Case, q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Contestant:
    return _sdpa(case, q, k, v, do, SDPBackend.FLASH_ATTENTION, torch.__version__)


def _sdpa(case: Case, q: Tensor, k: Tensor, v: Tensor, do: Tensor, backend: SDPBackend, version: str) -> Contestant:
    if case.causal and case.S_q != case.S_kv:
        raise ValueError(f"torch's causal mask is top-left, ours bottom-right: no row for {case}")
    q, k, v = (t.detach().transpose(1, 2).requires_grad_() for t in (q, k, v))
    do = do.transpose(1, 2)

    def attend():
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, scale=case.scale, enable_gqa=True)

    def forward():
        with torch.no_grad():
            return attend()

    out = attend()
    return Contestant(forward, lambda: torch.autograd.grad(out, (q, k, v), do, retain_graph=True), version)


CONTESTANTS: dict[str, Callable[..., Contestant]] = {"ours": ours, "cudnn": cudnn, "fa2": fa2}
