"""Host time of one call until it returns, in microseconds, whole and in parts: what Python, the dispatcher, autograd and the launch take.

    taskset -c 0 python -m benchmarks.host_cost                  # anywhere: kernels that do nothing, on tensors of the CPU
    taskset -c 0 python -m benchmarks.host_cost --device cuda    # the real calls

On a GPU it is the time of the clock; the queue is emptied between batches of calls, outside the measured time, so that no launch waits for
room in it. On a CPU it is the process's CPU time, which neighbours disturb least, and the bodies for CUDA run there: all but torch's CUDA
allocator, the questions to the driver and the kernels themselves. Rows are taken in turn; the median of the runs is printed.
"""

import argparse
import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library

from gqa_autograd import functional, meta, ops, plans
from gqa_autograd.kernels import backward_launch, config, device, forward_launch

Call = Callable[[], object]
Rows = dict[str, Call]
SETTINGS = ops.Settings(window_right=0)
# As many heads for k and v as for q: torch's own attention takes another way with fewer
SHAPE = (1, 16, 4, 64)


def _nothing(*arguments) -> None:
    """A kernel without work."""


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """The bodies for CUDA compute on the CPU, with kernels that do nothing."""
    facts: dict[str, Any] = {
        "require_hopper": lambda function, device: None,
        "multiprocessors": lambda device: 132,
        "l2_bytes": lambda device: 50 * 2**20,
        "is_current": lambda index: True,
        "slot": lambda index: 0,
    }
    bodies = {
        "attention_fwd": lambda q, k, v, *settings: ops._cuda_forward(q, k, v, settings, False),
        "attention_fwd_lse": lambda q, k, v, *settings: ops._cuda_forward(q, k, v, settings, True),
        "attention_bwd": ops._cuda_backward,
    }
    with (
        mock.patch.multiple(device, **facts),
        mock.patch.object(forward_launch, "executable", return_value=_nothing),
        mock.patch.object(backward_launch, "compiled", return_value=(_nothing,) * 3),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        library = Library("gqa_autograd", "IMPL")
        for name, body in bodies.items():
            library.impl(name, body, "CPU", allow_override=True)
        yield
        library._destroy()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.attention(q, k, v, causal=True)


def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True).transpose(1, 2)


def through_the_operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend` as it goes where no plan is found."""
    q, k, v, settings = functional.settle("attention", q, k, v, causal=True)
    return ops.run(ops.attention_fwd, q, k, v, *settings)


def of_a_new_kind(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    plans._plans.clear()
    return attend(q, k, v)


def run_time_numbers(tile: config.Forward, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple:
    """What a launch passes to the kernel behind the tensors, from a launch of something else."""
    passed: list[Any] = []
    with mock.patch.object(forward_launch, "executable", return_value=lambda *arguments: passed.extend(arguments)):
        forward_launch.plan(tile, q, k, v, False, 0.125, (-1, 0), 0.0)(q, k, v, out, None)
    return tuple(passed[5:])


def inference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Rows, Rows]:
    """The parts of a call without gradients, and what each way in takes as a whole."""
    out, tile = meta.attention_fwd(q, k, v), config.forward("host_cost", q.shape[3], v.shape[3], -1, 0, 0.0)
    kernel = forward_launch.executable(tile, q.dtype, False)
    numbers = run_time_numbers(tile, q, k, v, out)
    launch = forward_launch.plan(tile, q, k, v, False, 0.125, (-1, 0), 0.0)
    attend(q, k, v)
    body = plans.planned(q, k, v, True, None, 0, (-1, -1), None, False)
    assert body is not None
    empty = partial(torch.empty, tuple(q.shape), dtype=q.dtype, device=q.device)
    index = q.device.index
    parts: Rows = {
        "the kernel's executable": lambda: kernel(q, k, v, out, out, *numbers),
        "torch.empty": empty,
        "both: the floor": lambda: kernel(q, k, v, empty(), out, *numbers),
        "meta.attention_fwd": lambda: meta.attention_fwd(q, k, v),
        "device.is_current": lambda: device.is_current(index),
        "device.slot": lambda: device.slot(index),
        "the plan's launch, executable included": lambda: launch(q, k, v, out, None),
        "the plan: allocation and launch": lambda: body(q, k, v),
        "plans.watched": plans.watched,
        "plans.kind": lambda: plans.kind(q, k, v, 0, -1, 0, None, 0, False),
        "plans.planned, both included": lambda: plans.planned(q, k, v, True, None, 0, (-1, -1), None, False),
        "functional.settle": lambda: functional.settle("attention", q, k, v, True),
        "the operator, its body included": lambda: ops.run(ops.attention_fwd, q, k, v, *SETTINGS),
        "torch.no_grad() around nothing": torch.no_grad()(_nothing),
    }
    whole: Rows = {
        "functional.attention": lambda: attend(q, k, v),
        "functional.attention_with_lse": lambda: functional.attention_with_lse(q, k, v, causal=True),
        "functional.attention through the operator": lambda: through_the_operator(q, k, v),
        "functional.attention of a new kind": lambda: of_a_new_kind(q, k, v),
        "torch's own attention": lambda: torchs(q, k, v),
    }
    return parts, whole


class NoWork(torch.autograd.Function):
    """What autograd takes by itself."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx, do):
        return ctx.saved_tensors


def in_one_thread(call: Call) -> Call:
    def run():
        with torch.autograd.set_multithreading_enabled(False):
            return call()

    return run


def training(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> tuple[Rows, Rows]:
    """Forwards that record, each with and without its backward."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    forwards: dict[str, Callable[..., Tensor]] = {
        "(a) ops.Attention.apply": lambda *x: ops.Attention.apply(*x, *SETTINGS)[0],
        "(b) the operator attention_fwd_lse": lambda *x: ops.attention_fwd_lse(*x, *SETTINGS)[0],
        "(c) ops.EagerAttention.apply": lambda *x: ops.EagerAttention.apply(*x, *SETTINGS)[0],
        "a Function without work": NoWork.apply,
        "functional.attention": attend,
        "torch's own attention": torchs,
    }

    def both(forward):
        return torch.autograd.grad(forward(*leaves), leaves, do)

    out, lse = functional.attention_with_lse(q, k, v, causal=True)
    backwards: Rows = {name: partial(both, forward) for name, forward in forwards.items()}
    backwards["functional.attention, autograd in the calling thread"] = in_one_thread(partial(both, attend))
    backwards["the operator attention_bwd alone"] = lambda: ops.run(ops.attention_bwd, do, q, k, v, out, lse, None, *SETTINGS)
    return {name: partial(forward, *leaves) for name, forward in forwards.items()}, backwards


def microseconds(call: Call, calls: int, batch: int, clock: Callable[[], float], finish: Call) -> float:
    """Of one call, in batches with the device idle before each."""
    spent = 0.0
    for _ in range(calls // batch):
        finish()
        start = clock()
        for _ in range(batch):
            call()
        spent += clock() - start
    finish()
    return spent / (calls // batch * batch) * 1e6


def tables(where: str) -> dict[str, Rows]:
    q, k, v, do = torch.randn(4, *SHAPE, device=where).bfloat16().unbind(0)
    with torch.no_grad():
        parts, whole = inference(q, k, v)
    forward, both = training(q, k, v, do)
    return {"no grad, parts": parts, "no grad": whole, "training forward": forward, "forward + backward": both}


def measure(found: dict[str, Rows], arguments: argparse.Namespace) -> None:
    cuda = arguments.device == "cuda"
    clock, finish = (time.perf_counter, torch.cuda.synchronize) if cuda else (time.process_time, _nothing)
    print(f"torch {torch.__version__}; median (lowest to highest) of {arguments.runs} runs of {arguments.calls} calls, µs a call")
    for title, rows in found.items():
        print(f"\n{title}")
        with torch.set_grad_enabled(not title.startswith("no grad")):
            runs = []
            for turn in range(arguments.runs + 1):
                times = [microseconds(call, arguments.calls, arguments.batch, clock, finish) for call in rows.values()]
                # The first turn warms up
                runs += [times] if turn else []
        for name, of_row in zip(rows, zip(*runs, strict=True), strict=True):
            print(f"{statistics.median(of_row):7.1f}  ({min(of_row):.1f} to {max(of_row):.1f})  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", type=int, default=25, help="runs of each row, taken in turn; the median is printed (default 25)")
    parser.add_argument("--calls", type=int, default=500, help="calls in a run (default 500)")
    parser.add_argument("--batch", type=int, default=50, help="calls between two waits for the GPU (default 50)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with standing_in() if arguments.device == "cpu" else contextlib.nullcontext():
        measure(tables(arguments.device), arguments)


if __name__ == "__main__":
    main()
