"""From a profiler's trace to times: which device work belongs to which repetition, and whether the trace can be believed.

Device work belongs to the scope that its launch call was made in: the record and the call carry one correlation id, the call has a thread
and a time, the scope too. Names decide nothing, so that an operator which is itself a fill isn't taken for the flush. A launch that the
profiler has no record of (it keeps few of the driver's calls) is found by the operator that was open on its thread, the external id.
Everything here is a function of plain records and runs without a GPU.
"""

import json
import re
from bisect import bisect_right
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

SCOPE = "benchmarks.timed#"
DEVICE = frozenset({"kernel", "gpu_memset", "gpu_memcpy"})
CALLS = frozenset({"cuda_runtime", "cuda_driver"})
OPERATORS = frozenset({"cpu_op", "user_annotation"})
# The calls of CUDA that put work on the device, each of which must come back as a record
LAUNCH = re.compile(r"Launch(Cooperative)?Kernel|GraphLaunch|Mem(set|cpy)")
# Two neighbours on one stream may overlap by the resolution of the device's clock
SLACK_NS = 1000


class Inconsistent(RuntimeError):
    """A trial whose records can't be right. It may be repeated, never used."""


class NoDeviceActivity(RuntimeError):
    """The profiler saw no work of the GPU at all: CUPTI is missing, refused or held by another tool."""


class Record(NamedTuple):
    """One interval of the trace, in nanoseconds. `thread` is the stream for work of the device."""

    kind: str
    name: str
    start: int
    end: int
    thread: int
    correlation: int | None = None
    external: int | None = None


class Repetition(NamedTuple):
    """One timed call: the time in which any of its kernels ran, from the first start to the last end, and how many there were."""

    busy_ns: int
    span_ns: int
    kernels: int


def read(path: Path) -> list[Record]:
    """The intervals of a trace as `torch.profiler` exports it."""
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return [_record(event) for event in events if event.get("ph") == "X" and event.get("cat") in DEVICE | CALLS | OPERATORS]


def _record(event: dict[str, Any]) -> Record:
    start, extra = round(event["ts"] * 1000), event.get("args", {})
    end = start + round(event["dur"] * 1000)
    return Record(event["cat"], event["name"], start, end, event["tid"], extra.get("correlation"), extra.get("External id"))


def repetitions(records: Iterable[Record], count: int) -> list[Repetition]:
    """One for each of `count` scopes, in their order; raises where the trace contradicts itself."""
    records = list(records)
    scopes = _scopes(records, count)
    work = [record for record in records if record.kind in DEVICE]
    if not work:
        raise NoDeviceActivity("the profiler recorded no work of the GPU: CUPTI is missing, not permitted or in use by another tool")
    _none_lost(records, scopes, {record.correlation for record in work})
    launched = _launched(records, work, scopes)
    _in_turn(launched)
    mine: list[list[Record]] = [[] for _ in scopes]
    for index, record in launched:
        if index is not None:
            mine[index].append(record)
    _same_number(mine)
    return [Repetition(union_ns(m), max(r.end for r in m) - min(r.start for r in m), len(m)) for m in mine]


def union_ns(records: Iterable[Record]) -> int:
    """The time in which at least one of them ran."""
    total, until = 0, None
    for start, end in sorted((record.start, record.end) for record in records):
        total += max(0, end - (start if until is None else max(start, until)))
        until = end if until is None else max(until, end)
    return total


def _scopes(records: list[Record], count: int) -> list[Record]:
    scopes = sorted((r for r in records if r.kind == "user_annotation" and r.name.startswith(SCOPE)), key=lambda r: r.start)
    if [scope.name for scope in scopes] != [f"{SCOPE}{i}" for i in range(count)]:
        raise Inconsistent(f"{len(scopes)} timed scopes in the trace, {count} were opened")
    return scopes


def _scope_of(origin: Record, scopes: list[Record], starts: list[int]) -> int | None:
    """The scope that was open when `origin` began, None between scopes."""
    index = bisect_right(starts, origin.start) - 1
    if index < 0 or origin.start > scopes[index].end:
        return None
    if origin.thread != scopes[index].thread:
        raise Inconsistent(
            f"{origin.name} launched from thread {origin.thread} inside a scope of thread {scopes[index].thread}: which of the two it "
            "belongs to is not known. Call the operator directly; autograd.grad under set_multithreading_enabled(False)"
        )
    return index


def _launched(records: list[Record], work: list[Record], scopes: list[Record]) -> list[tuple[int | None, Record]]:
    """The device's work in the order of its launches, each with the index of its scope."""
    # Zero is nobody's number
    calls = {r.correlation: r for r in records if r.kind in CALLS and r.correlation}
    operators = {r.external: r for r in records if r.kind in OPERATORS}
    starts = [scope.start for scope in scopes]
    found = []
    for record in work:
        origin = calls.get(record.correlation or 0) or (operators.get(record.external) if record.external else None)
        if origin is None:
            raise Inconsistent(
                f"{record.name}: work of the GPU that nobody in the trace launched, left over from before or its launch lost"
            )
        found.append((origin.start, record.start, _scope_of(origin, scopes, starts), record))
    return [(index, record) for _, _, index, record in sorted(found, key=lambda f: f[:2])]


def _none_lost(records: list[Record], scopes: list[Record], recorded: set[int | None]) -> None:
    """Every launch inside a scope has come back as work of the device. A call inside another call is the other's."""
    starts = [scope.start for scope in scopes]
    until: dict[int, int] = {}
    for call in sorted((r for r in records if r.kind in CALLS), key=lambda r: (r.start, -r.end)):
        nested, until[call.thread] = call.end <= until.get(call.thread, -1), max(call.end, until.get(call.thread, -1))
        if nested or call.correlation in recorded or not LAUNCH.search(call.name):
            continue
        if _scope_of(call, scopes, starts) is not None:
            raise Inconsistent(f"{call.name} inside a timed scope has no record of the GPU: the profiler lost it")


def _in_turn(launched: list[tuple[int | None, Record]]) -> None:
    """What is launched later, in another scope or between scopes, starts later: nothing runs beside the work that is timed."""
    finished = None
    for index, group in groupby(launched, key=lambda pair: pair[0]):
        members = [record for _, record in group]
        first = min(members, key=lambda r: r.start)
        if finished is not None and first.start < finished - SLACK_NS:
            where = "between scopes" if index is None else f"in scope {index}"
            raise Inconsistent(f"{first.name}, launched {where}, ran beside earlier work: does the function use another stream?")
        finished = max(finished or 0, *(record.end for record in members))


def _same_number(repetitions: list[list[Record]]) -> None:
    numbers = [len(records) for records in repetitions]
    if 0 in numbers:
        raise Inconsistent(f"repetition {numbers.index(0)} launched nothing on the GPU")
    if len(set(numbers)) > 1:
        raise Inconsistent(f"the number of kernels differs between repetitions: {sorted(set(numbers))}")
