"""Contestants side by side: who runs when, what is kept of their samples, and the bounds that no sample may break."""

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from . import profiled
from .clocks import Clocks

Function = Callable[[], object]
# Calls longer than this are compared with a graph's: below, launch gaps and a warm cache decide. The check is for gross faults, warm-up or
# a flush counted along, which double a time. Calls back to back in a graph draw more power than calls behind a flush, and the card then
# lowers its clock: cuDNN at 2 x 4096 took 1.15 times as long, ours up to 1.13; ours also takes its tiles in another order while captured
GRAPH_FROM_US = 100
GRAPH_TOLERANCE = 0.3


class Implausible(RuntimeError):
    """A time that the device cannot reach, or two methods that disagree."""


@dataclasses.dataclass
class Samples:
    """Microseconds of one contestant, a list for each trial, and what the clocks said meanwhile."""

    busy: list[list[float]] = dataclasses.field(default_factory=list)
    span: list[list[float]] = dataclasses.field(default_factory=list)
    kernels: set[int] = dataclasses.field(default_factory=set)
    clocks: Clocks = dataclasses.field(default_factory=Clocks)
    graph_over_busy: float | None = None


def orders(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """A B C, C B A, B C A, A C B, ...: everyone is first, last and beside everyone else; the card is limited by its power, and who runs
    behind a contestant that draws little is faster for it."""
    turn = 0
    while True:
        first = turn // 2 % len(names)
        order = (*names[first:], *names[:first])
        yield order if turn % 2 == 0 else order[::-1]
        turn += 1


def quantile(samples: Sequence[float], p: float) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, round(p * (len(ordered) - 1)))]


def spread(trials: Sequence[Sequence[float]]) -> float:
    """How far the medians of the trials lie apart, as a part of their median."""
    middles = [statistics.median(trial) for trial in trials]
    return (max(middles) - min(middles)) / statistics.median(middles)


def per_kernel(functions: dict[str, Function], rounds: int, repeats: int | None) -> dict[str, Samples]:
    """A trial of every contestant in every round."""
    flush = profiled.Flush()
    samples = {name: Samples() for name in functions}
    calls = {name: profiled.warm_up(function) for name, function in functions.items()}
    leads = {name: profiled.lead_us(function) for name, function in functions.items()}
    for order, _ in zip(orders(list(functions)), range(rounds), strict=False):
        for name in order:
            mine, count = samples[name], repeats or profiled.repeats_for(calls[name])
            measured = profiled.checked_trial(functions[name], flush, leads[name], count, mine.clocks)
            mine.busy.append([r.busy_ns / 1e3 for r in measured])
            mine.span.append([r.span_ns / 1e3 for r in measured])
            mine.kernels |= {r.kernels for r in measured}
    for name, mine in samples.items():
        if len(mine.kernels) != 1:
            raise Implausible(f"{name}: the number of kernels differs between trials: {sorted(mine.kernels)}")
    return samples


def in_turns(functions: Mapping[str, Function], rounds: int, once: Callable[[Function], list[float]]) -> dict[str, list[list[float]]]:
    """For each contestant a list of samples a round, by the method `once`."""
    samples: dict[str, list[list[float]]] = {name: [] for name in functions}
    for function in functions.values():
        profiled.warm_up(function)
    for order, _ in zip(orders(list(functions)), range(rounds), strict=False):
        for name in order:
            samples[name].append(once(functions[name]))
    return samples


def check_floor(name: str, times_us: Sequence[Sequence[float]], floor_us: float) -> None:
    """No time lies below what memory and tensor cores allow."""
    least = min(map(min, times_us))
    if least < floor_us:
        raise Implausible(f"{name}: {least:.2f} µs, the device needs at least {floor_us:.2f}: work is missing or was not recorded")


def check_graph(name: str, mine: Samples, graph_us: Sequence[float]) -> None:
    """The profiler's time and that of a graph's replay agree; where a call is long enough for that to mean something."""
    busy = statistics.median([t for trial in mine.busy for t in trial])
    mine.graph_over_busy = statistics.median(graph_us) / busy
    if busy >= GRAPH_FROM_US and abs(mine.graph_over_busy - 1) > GRAPH_TOLERANCE:
        raise Implausible(f"{name}: busy {busy:.1f} µs, in a CUDA graph {statistics.median(graph_us):.1f}: one of the two is wrong")


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    """A stream of our own is current, so that a graph can capture also a backward: it runs on the stream of its forward."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.synchronize()
