"""Host time of one call on tiny CPU tensors, in microseconds: what Python, the dispatcher and autograd take around a kernel.

The definition's own arithmetic is replaced by stubs that return ready tensors, so what is left is what a CUDA call pays too: checks,
allocation, dispatch, autograd (and here one copy per output). CPU time of the process, which neighbours disturb least. On one core:

    taskset -c 0 python -m benchmarks.host_cost
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from gqa_autograd import checks, functional, meta, ops
from gqa_autograd.reference import attention as reference

SETTINGS = ops.Settings(window_right=0)


def stub(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Replaces the arithmetic of the CPU bodies by finished results."""
    out, lse = reference.attention_fwd_lse(q, k, v, -1, 0, 1.0, 0.0)
    dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
    reference.attention_fwd_lse = lambda *args: (out, lse)
    reference.attention_bwd = lambda *args: (dq, dk, dv)


def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What the body of attention_fwd_lse does, called as plain Python: the floor of every other row."""
    checks.attention("attention", q, k, v, SETTINGS.scale, SETTINGS.softcap)
    out, lse = meta.attention_fwd_lse(q, k, v)
    values = reference.attention_fwd_lse(q, k, v, -1, 0, 1.0, 0.0)
    return out.copy_(values[0]), lse.copy_(values[1])


def microseconds(call: Callable[[], object], calls: int) -> float:
    for _ in range(calls // 10 + 1):
        call()
    start = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - start) / calls * 1e6


def cases(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> dict[str, Callable[[], object]]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    forwards = {
        "(a) ops.Attention.apply": lambda *x: ops.Attention.apply(*x, *SETTINGS),
        "(b) the operator attention_fwd_lse": lambda *x: ops.attention_fwd_lse(*x, *SETTINGS),
        "(c) ops.EagerAttention.apply": lambda *x: ops.EagerAttention.apply(*x, *SETTINGS),
        "functional.attention_with_lse": lambda *x: functional.attention_with_lse(*x, causal=True),
    }
    found: dict[str, Callable[[], object]] = {
        "no grad: plain Python": lambda: plain(q, k, v),
        "no grad: the operator attention_fwd": lambda: ops.attention_fwd(q, k, v, *SETTINGS),
        "no grad: functional.attention": lambda: functional.attention(q, k, v, causal=True),
    }
    for name, forward in forwards.items():
        found[f"no grad: {name}"] = partial(forward, q, k, v)
    for name, forward in forwards.items():
        found[f"training forward: {name}"] = partial(forward, *leaves)
    for name, forward in forwards.items():
        found[f"forward + backward: {name}"] = partial(lambda forward: torch.autograd.grad(forward(*leaves)[0], leaves, do), forward)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=25, help="runs of each row, taken in turn; the median is printed (default 25)")
    parser.add_argument("--calls", type=int, default=500, help="calls in a run (default 500)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    q, do = torch.randn(2, 1, 2, 4, 8).unbind(0)
    k, v = torch.randn(2, 1, 2, 2, 8).unbind(0)
    stub(q, k, v)
    rows = cases(q, k, v, do)
    runs = [[microseconds(call, arguments.calls) for call in rows.values()] for _ in range(arguments.runs)]
    print(f"torch {torch.__version__}; median (lowest to highest) of {arguments.runs} runs of {arguments.calls} calls, CPU µs a call")
    for name, times in zip(rows, zip(*runs, strict=True), strict=True):
        print(f"{statistics.median(times):7.1f}  ({min(times):.1f} to {max(times):.1f})  {name}")


if __name__ == "__main__":
    main()
