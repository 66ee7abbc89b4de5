"""Time on the GPU by events. Every call stands behind a flush of the L2 cache in the same stream, outside its events. The flush is made
longer than the host needs for the call, so no launch latency is inside, and the inputs come from memory, not from the cache."""

import itertools
import time
from collections.abc import Callable

import torch


class Flush:
    """Writes twice the L2 cache, as often as it takes to keep the GPU busy for `microseconds`."""

    def __init__(self) -> None:
        self.buffer = torch.empty(2 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device="cuda")
        self.buffer.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(10):
            self.buffer.zero_()
        end.record()
        end.synchronize()
        self.one_pass = start.elapsed_time(end) * 100

    def __call__(self, microseconds: float) -> None:
        for _ in range(1 + int(microseconds / self.one_pass)):
            self.buffer.zero_()


def host_us(function: Callable[[], object]) -> float:
    """What the host needs to enqueue one call, while the device is free: the least of a few."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times) * 1e6


def times_ms(function: Callable[[], object], flush: Flush, lead_us: float, repeats: int) -> list[float]:
    """One time per call, in milliseconds."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in events:
        flush(lead_us)
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def interleaved(functions: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, list[float]]:
    """All contestants in every round, and over the rounds in every order: the card is limited by its power, and who runs behind a
    contestant that draws little is faster for it. `rounds` is best a multiple of the number of orders."""
    flush = Flush()
    lead = {}
    for name, function in functions.items():
        function()
        # The flush is over when the host has enqueued the call, with as much again to spare
        lead[name] = 2 * host_us(function) + 100
        times_ms(function, flush, lead[name], 3)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    orders = itertools.cycle(itertools.permutations(functions))
    for order in itertools.islice(orders, rounds):
        for name in order:
            samples[name] += times_ms(functions[name], flush, lead[name], repeats)
    return samples


def quantile(samples: list[float], p: float) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, round(p * (len(ordered) - 1)))]
