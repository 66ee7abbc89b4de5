"""Times on the GPU from the profiler's records of each kernel, and beside them, never mixed: replays of a CUDA graph, time on the host.

busy is the time in which kernels of the call ran; it holds no launch, no gap and no flush. span goes from the first start to the last end.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from . import trace

Function = Callable[[], object]
# The CPU's side carries the scopes and the launch calls
ACTIVITIES = (ProfilerActivity.CPU, ProfilerActivity.CUDA)
ATTEMPTS = 3
COPIES = 20


class Flush:
    """Writes `factor` times the L2 cache, as often as it takes to keep the GPU busy for `microseconds`."""

    def __init__(self, factor: int = 2) -> None:
        self.buffer = torch.empty(
            factor * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size, dtype=torch.int8, device="cuda"
        )
        self.one_pass_us = event_us(self.buffer.zero_, 10)

    def __call__(self, microseconds: float) -> None:
        for _ in range(1 + int(microseconds / self.one_pass_us)):
            self.buffer.zero_()


def event_us(function: Function, calls: int) -> float:
    """Microseconds a call by a pair of events around several: for calibration and cross-checks, never for a row."""
    function()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / calls


def warm_up(function: Function) -> float:
    """Calls it at least 3 times and for 25 ms after the first; microseconds of a call, with the wait for its end."""
    function()
    torch.cuda.synchronize()
    start, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - start < 0.025:
        function()
        torch.cuda.synchronize()
        calls += 1
    return (time.perf_counter() - start) / calls * 1e6


def repeats_for(call_us: float) -> int:
    """About 100 ms of work in a trial."""
    return min(200, max(10, int(1e5 / call_us)))


def trial(
    function: Function, flush: Callable[[float], None], lead_us: float, repeats: int, clocks: contextlib.AbstractContextManager
) -> list[trace.Repetition]:
    """One profile of `repeats` calls, each behind a flush of at least lead_us, which keeps the host's work out of the span."""
    torch.cuda.synchronize()
    # A fresh profiler and no schedule: what was launched before is finished, what is launched inside finishes inside
    with profile(activities=ACTIVITIES) as profiler, clocks:
        for i in range(repeats):
            flush(lead_us)
            with record_function(f"{trace.SCOPE}{i}"):
                function()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return trace.repetitions(trace.read(path), repeats)


def checked_trial(
    function: Function,
    flush: Callable[[float], None],
    lead_us: float,
    repeats: int,
    clocks: contextlib.AbstractContextManager | None = None,
) -> list[trace.Repetition]:
    """A trial that passes every check of the trace; repeated where it does not, an error after the third."""
    failures = []
    for _ in range(ATTEMPTS):
        try:
            return trial(function, flush, lead_us, repeats, clocks or contextlib.nullcontext())
        except trace.Inconsistent as error:
            failures.append(error)
    raise failures[-1]


def _captured(function: Function, calls: int) -> torch.cuda.CUDAGraph:
    """A CUDA graph of so many calls, on the current stream unless that is the default one, which can't be captured."""
    stream = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():
        stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            function()
    return graph


def graph_us(function: Function, replays: int = 10) -> list[float]:
    """Microseconds a call, one for each replay of a CUDA graph of 20 calls. No flush: what fits stays in the L2 cache.

    Autograd runs a backward on the stream of its forward, so both belong on one side stream, which must be current here."""
    graph = _captured(function, COPIES)
    return [event_us(graph.replay, 1) / COPIES for _ in range(replays)]


def cold_us(function: Function, flush: Callable[[float], None], replays: int = 30) -> list[float]:
    """Microseconds of each replay of a CUDA graph of one call behind a flush of the L2 cache, by events around it. The flush is still at
    work when the replay is launched; what a graph's start takes on the device is part of the time, for every contestant."""
    graph = _captured(function, 1)
    pairs = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush(300)
        start.record()
        graph.replay()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in pairs]


def host_us(function: Function, calls: int = 20, batches: int = 15) -> list[float]:
    """Microseconds in which a call returns, one for each batch of calls; nothing waits for the GPU inside a batch."""
    function()
    times = []
    for _ in range(batches):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return times


def lead_us(function: Function) -> float:
    """What the flush must last so that the host has launched the whole call behind it; the profiler makes each launch dearer."""
    return 3 * min(host_us(function, calls=1, batches=5)) + 100
