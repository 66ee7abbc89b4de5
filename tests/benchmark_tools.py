"""What tests of the benchmarks share: a run without a GPU, rows as a run would have left them."""

import contextlib
import json

from benchmarks import cases, measure, profiled, rows, trace
from benchmarks.packs import Pack
from gqa_autograd import testing, testing_decode, testing_varlen

SMALL_PACK = Pack("any", (50, 1, 77), 4, 2, 64)


def fake_gpu(monkeypatch):
    """Everything of a run but the times: contestants on the CPU, each call 3 ms in 2 kernels."""
    repetition = trace.Repetition(3_000_000, 3_100_000, 2)
    for module in (testing, testing_decode, testing_varlen):
        monkeypatch.setattr(module, "make", lambda case, device="cpu", seed=0, make=module.make: make(case, "cpu", seed))
    monkeypatch.setattr(measure, "side_stream", contextlib.nullcontext)
    monkeypatch.setattr(measure.Clocks, "row", lambda self: {"sm_mhz": 1980, "mem_mhz": 3201, "watts": 500})
    times = {
        "Flush": lambda: None,
        "warm_up": lambda f: 100.0,
        "lead_us": lambda f: 0.0,
        "graph_us": lambda f, replays=10: [3050.0] * replays,
    }
    times |= {"checked_trial": lambda f, flush, lead, count, clocks: [repetition] * count, "host_us": lambda f: [40.0, 41.0]}
    times |= {"cold_us": lambda f, flush: [3200.0] * 3}
    for name, value in times.items():
        monkeypatch.setattr(profiled, name, value)


def write(folder, op, runs, dtype="bfloat16"):
    """runs: (id, metric, set, contestants). The n-th contestant of a run takes n µs more."""
    folder.mkdir(exist_ok=True)
    lines = [
        {"op": op, "contestant": who, "run": name, "metric": metric, "case": rows.described(case, who), "dtype": dtype}
        | {"tflops": 100.0 + number, "gpu": "NVIDIA H200", "commit": name, "peer_version": "9.19.0"}
        | {"ms": {"p50": (100 + place) / 1e3}}
        for number, (name, metric, group, contestants) in enumerate(runs)
        for case in cases.EVERY[group]
        for place, who in enumerate(contestants)
    ]
    with (folder / f"{op}.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
