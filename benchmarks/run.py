"""Measures attention next to its peers in one process and appends a row per contestant and metric to benchmarks/results/<gpu>/<op>.jsonl.

    python -m benchmarks.run forward backward --cases first-mark --against cudnn fa2

takes the shapes of the set first-mark one after another. Of each it checks ours against float64 by the closeness rule on a short twin, and
that every contestant gives the same numbers; a red check prints no number. Then the contestants take turns, A B, B A, ..., and a line says

    forward  bf16-B4-q2048-kv2048-h32x8-d128-causal  busy: ours ..., cudnn ..., fa2 ... TFLOP/s

Metrics are kept apart, each in rows of its own:
    busy   time in which kernels of the call run, from the profiler's record of each; caches flushed (the headline)
    span   from the first kernel's start to the last one's end, in the same trials
    graph  a call in a CUDA graph of 20, by events; caches not flushed
    host   time until a call returns, GPU not waited for; an eager user's backward, through autograd
A contestant that is not installed, or can't compute a shape, is named with the reason and has no row. Nothing stands in for it.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import gqa_autograd
from gqa_autograd import testing
from gqa_autograd.testing import Case

from . import baselines, bounds, cases, measure, profiled
from .baselines import Contestant
from .progress import tracked
from .rows import Row, described, environment, figures
from .trace import Inconsistent

RESULTS = Path(__file__).parent / "results"
METRICS = ("busy", "span", "graph", "host")
# Of bf16 results over standard normal inputs; another mask or layout gives 10 % and more
AGREEMENT = 0.03


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("ops", nargs="+", choices=("forward", "backward"), help="what to time")
    add(
        "--cases",
        nargs="+",
        default=["first-mark"],
        choices=sorted(cases.SETS),
        metavar="SET",
        help="sets of shapes: %(choices)s [first-mark]",
    )
    add("--against", nargs="*", choices=baselines.PEERS, metavar="PEER", help="peers: %(choices)s [all that are installed]")
    add("--metric", nargs="+", default=["busy"], choices=METRICS, metavar="METRIC", help="any of %(choices)s [busy]")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16"), help="[%(default)s]")
    add("--rounds", type=int, default=4, help="trials of each contestant; best a multiple of twice the contestants [%(default)s]")
    add("--repeats", type=int, help="calls in a trial [as many as take 100 ms, 10 to 200]")
    add("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the rows go [benchmarks/results]")
    add("--commit", help="commit of this tree, where git can't tell it")
    options = parser.parse_args(argv)
    if options.rounds < 1 or (options.repeats is not None and options.repeats < 1):
        parser.error("--rounds and --repeats must be at least 1")
    return options


def present(wanted: list[str] | None, say: Callable[[str], None]) -> list[str]:
    """Ours and the peers that are installed; each of the others in a line."""
    found = ["ours"]
    for name in baselines.PEERS if wanted is None else wanted:
        module = baselines.missing(name)
        found += [name] * (module is None)
        if module is not None:
            say(f"{name}: not installed (no module {module}), no rows")
    return found


def error_ratio(case: Case, op: str) -> float:
    """The worst tensor's error over plain PyTorch's on a short twin of the case, which must pass the closeness rule."""
    twin = dataclasses.replace(case, B=1, S_q=min(case.S_q, 777), S_kv=min(case.S_kv, 777))
    tensors = testing.make(twin, "cuda")
    names = ("out",) if op == "forward" else ("dq", "dk", "dv")
    with testing.poisoned():
        if op == "forward":
            with torch.no_grad():
                mine = {"out": gqa_autograd.attention(*tensors[:3], **twin.options)}
        else:
            mine = testing.ours(twin, *tensors)._asdict()
    plain, exact = testing.plain(twin, *tensors)._asdict(), testing.exact(twin, *tensors)._asdict()
    for name in names:
        testing.assert_no_worse(mine[name], plain[name], exact[name], name, softcap=case.softcap > 0)
    error = lambda x, name: (x[name].double() - exact[name]).abs().max()  # noqa: E731
    return max((error(mine, name) / error(plain, name)).item() for name in names)


def made(case: Case, op: str, names: list[str], say: Callable[[str], None]) -> dict[str, Contestant]:
    """The contestants that compute this case; why the others don't, in a line each."""
    tensors = testing.make(case, "cuda")
    found = {}
    for name in names:
        try:
            found[name] = baselines.CONTESTANTS[name](case, op, *tensors)
        except (baselines.NoRow, NotImplementedError) as reason:
            say(f"{name}: no row for {op} {case}: {reason}")
        except Exception as error:  # whatever stops a peer must not stop the others; ours has no excuse
            if name == "ours":
                raise
            say(f"{name}: no row for {op} {case}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return found


def results(contestant: Contestant, op: str) -> tuple[Tensor, ...]:
    """out, or dq, dk and dv, as [B, S, H, D]."""
    if op == "forward":
        outputs: tuple[Tensor, ...] = (contestant.forward(),)
    else:
        assert contestant.backward is not None
        outputs = contestant.backward()
    return tuple(t.transpose(1, 2) if contestant.bhsd else t for t in outputs)


def agreeing(contestants: dict[str, Contestant], op: str, say: Callable[[str], None]) -> dict[str, Contestant]:
    """Those whose results are the first one's: the same mask, scale and layout. Ours is first where it has a kernel."""
    expected: tuple[Tensor, ...] | None = None
    found = {}
    for name, contestant in contestants.items():
        mine = results(contestant, op)
        expected = mine if expected is None else expected
        distance = max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(mine, expected, strict=True))
        # NaN is no agreement
        if distance <= AGREEMENT:
            found[name] = contestant
        else:
            say(f"{name}: no row: its {op} is {distance:.1%} away from that of {next(iter(contestants))}")
    return found


def measured(case: Case, op: str, contestants: dict[str, Contestant], args: argparse.Namespace) -> dict[str, list[Row]]:
    """The figures of each contestant, a row for each metric that was asked for."""
    functions = {name: getattr(c, op) for name, c in contestants.items()}
    found: dict[str, list[Row]] = {name: [] for name in contestants}
    if {"busy", "span"} & set(args.metric):
        for name, samples in measure.per_kernel(functions, args.rounds, args.repeats).items():
            measure.check_floor(name, samples.busy, bounds.floor_us(case, op, flushed=True))
            measure.check_graph(name, samples, profiled.graph_us(functions[name], replays=3))
            common = {
                "kernels_per_call": min(samples.kernels),
                "graph_over_busy": round(samples.graph_over_busy or 0, 3),
                **samples.clocks.row(),
            }
            for metric, trials in (("busy", samples.busy), ("span", samples.span)):
                found[name] += [{**figures(case, op, metric, trials), **common}] * (metric in args.metric)
    if "graph" in args.metric:
        for name, trials in measure.in_turns(functions, args.rounds, profiled.graph_us).items():
            measure.check_floor(name, trials, bounds.floor_us(case, op, flushed=False))
            found[name].append(figures(case, op, "graph", trials))
    if "host" in args.metric:
        # Every contestant of a backward has both
        eager = {name: c.forward if op == "forward" else c.gradient or c.forward for name, c in contestants.items()}
        for name, trials in measure.in_turns(eager, args.rounds, profiled.host_us).items():
            found[name].append(figures(case, op, "host", trials))
    return found


def rows(case: Case, op: str, names: list[str], args: argparse.Namespace, common: Row, say: Callable[[str], None]) -> list[Row]:
    """A row for each contestant and metric, all measured in turns."""
    with measure.side_stream():
        contestants = made(case, op, names, say)
        ratio = {"error_ratio": round(error_ratio(case, op), 3)} if "ours" in contestants else {}
        contestants = agreeing(contestants, op, say)
        figures_of = measured(case, op, contestants, args) if contestants else {}
    head = {"op": op, "case": described(case), "dtype": args.dtype, "deterministic": False}
    return [
        {**head, "contestant": name, **row, **(ratio if name == "ours" else {}), "peer_version": contestants[name].version, **common}
        for name, several in figures_of.items()
        for row in several
    ]


def summary(op: str, case: Case, found: list[Row]) -> list[str]:
    """A line a metric."""
    lines = []
    for metric in dict.fromkeys(row["metric"] for row in found):
        unit = "µs" if metric == "host" else "TFLOP/s"
        mine = [row for row in found if row["metric"] == metric]
        values = (f"{r['contestant']} {r['ms']['p50'] * 1e3 if metric == 'host' else r['tflops']:.1f}" for r in mine)
        lines.append(f"{op:8} {case!s:48} {metric}: {', '.join(values)} {unit}")
    return lines


def main() -> int:
    args = arguments()
    if not torch.cuda.is_available():
        print("benchmarks.run: error: no CUDA device; the figures are those of a GPU", file=sys.stderr)
        return 2
    common = {"run": uuid.uuid4().hex[:8], **environment(args.commit)}
    folder = args.results / str(common["gpu"]).removeprefix("NVIDIA ").lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    dtype, failed = getattr(torch, args.dtype), 0
    work = [(op, dataclasses.replace(case, dtype=dtype)) for op in args.ops for group in args.cases for case in cases.SETS[group]]
    steps, say = tracked(list(dict.fromkeys(work)), "shape")
    names = present(args.against, say)
    for op, case in steps:
        try:
            found = rows(case, op, names, args, common, say)
        except (Inconsistent, measure.Implausible, AssertionError) as error:
            say(f"{op} {case}: ERROR, no rows: {error}")
            failed += 1
            continue
        with (folder / f"{op}.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
        for line in summary(op, case, found):
            say(line)
    return 1 if failed else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
