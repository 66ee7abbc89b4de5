"""Time on the GPU by events. Every call stands behind a flush of the L2 cache in the same stream, outside its events: the flush is longer
than the host needs for the call, so no launch latency is inside, and the inputs come from memory, not from the cache."""

from collections.abc import Callable

import torch


def flush_buffer() -> torch.Tensor:
    """Four times the L2 cache: the flush must outlast the host's work for one call."""
    return torch.empty(4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device="cuda")


def times_ms(function: Callable[[], object], flush: torch.Tensor, repeats: int) -> list[float]:
    """One time per call, in milliseconds."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in events:
        flush.zero_()
        flush.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def interleaved(functions: dict[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Contestants in order, then in reverse, and so on: the card is power-limited, and whoever always runs second runs hotter."""
    flush = flush_buffer()
    for function in functions.values():
        times_ms(function, flush, 3)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds):
        for name in list(functions) if turn % 2 == 0 else list(functions)[::-1]:
            samples[name] += times_ms(functions[name], flush, repeats)
    return samples


def quantile(samples: list[float], p: float) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, round(p * (len(ordered) - 1)))]
