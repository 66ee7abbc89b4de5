"""Measures attention next to its peers in one process and appends a row per contestant and metric to benchmarks/results/<gpu>/<op>.jsonl.

    python -m benchmarks.run forward backward --cases first-mark --against cudnn fa2

takes the shapes of the set first-mark one after another. Of each it checks ours against float64 by the closeness rule on a short twin, and
that every contestant gives the same numbers; a red check prints no number. Then the contestants take turns, A B, B A, ..., and a line says

    forward  bf16-B4-q2048-kv2048-h32x8-d128-causal  busy: ours ..., cudnn ..., fa2 ... TFLOP/s

Metrics are kept apart, each in rows of its own:
    busy   time in which kernels of the call run, from the profiler's record of each; caches flushed (the headline)
    span   from the first kernel's start to the last one's end, in the same trials
    graph  a call in a CUDA graph of 20, by events; caches not flushed
    cold   a CUDA graph of one call, by events around its replay; caches flushed
    host   time until a call returns, GPU not waited for; an eager user's backward, through autograd
Ours in other forms: ours-lse also writes LSE; ours-det is a backward with deterministic=True; ours-dense stands beside a pack (set varlen)
with our dense attention on a shape of as many tokens and FLOPs, its rate its own.
A contestant that is not installed, or can't compute a shape, is named with the reason and has no row. Nothing stands in for it.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import torch

from gqa_autograd import testing, testing_varlen
from gqa_autograd.testing import Case

from . import baselines, bounds, cases, decode, measure, packed, profiled
from .baselines import Contestant
from .gate import agreeing, error_ratio
from .packs import Pack
from .progress import tracked
from .rows import Row, described, environment, figures
from .trace import Inconsistent

RESULTS = Path(__file__).parent / "results"
METRICS = ("busy", "span", "graph", "cold", "host")
# Sets of shapes for the operation decode, and only for it, begin so
DECODE = "decode-"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("ops", nargs="+", choices=("forward", "backward", "decode"), help="what to time")
    add(
        "--cases",
        nargs="+",
        default=["first-mark"],
        choices=sorted(cases.EVERY),
        metavar="SET",
        help="sets of shapes: %(choices)s [first-mark]",
    )
    add(
        "--against",
        nargs="*",
        choices=(*baselines.PEERS, *baselines.VARIANTS),
        metavar="PEER",
        help="%(choices)s [all peers that are installed, ours in no other form]",
    )
    add("--metric", nargs="+", default=["busy"], choices=METRICS, metavar="METRIC", help="any of %(choices)s [busy]")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16"), help="[%(default)s]")
    add("--rounds", type=int, default=4, help="trials of each contestant; best a multiple of twice the contestants [%(default)s]")
    add("--repeats", type=int, help="calls in a trial [as many as take 100 ms, 10 to 200]")
    add("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the rows go [benchmarks/results]")
    add("--commit", help="commit of this tree, where git can't tell it")
    options = parser.parse_args(argv)
    if options.rounds < 1 or (options.repeats is not None and options.repeats < 1):
        parser.error("--rounds and --repeats must be at least 1")
    for op in options.ops:
        if wrong := [group for group in options.cases if group.startswith(DECODE) != (op == "decode")]:
            parser.error(f"{op} can't take the shapes of {', '.join(wrong)}: those of {DECODE}* are for decode alone")
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


def made(case: Case | Pack, op: str, names: list[str], say: Callable[[str], None]) -> dict[str, Contestant]:
    """The contestants that compute this case; why the others don't, in a line each."""
    pack = isinstance(case, Pack)
    tensors = testing_varlen.make(case.case, "cuda")[:4] if isinstance(case, Pack) else testing.make(case, "cuda")
    makers = packed.CONTESTANTS if pack else decode.CONTESTANTS if op == "decode" else baselines.CONTESTANTS
    found = {}
    for name in names:
        try:
            found[name] = makers.get(name, decode.absent if op == "decode" else packed.absent)(case, op, *tensors)
        except (baselines.NoRow, NotImplementedError) as reason:
            say(f"{name}: no row for {op} {case}: {reason}")
        except Exception as error:  # whatever stops a peer must not stop the others; ours has no excuse
            if name == "ours":
                raise
            say(f"{name}: no row for {op} {case}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    return found


def measured(case: Case | Pack, op: str, contestants: dict[str, Contestant], args: argparse.Namespace) -> dict[str, list[Row]]:
    """The figures of each contestant, a row for each metric that was asked for."""
    functions = {name: getattr(c, "backward" if op == "backward" else "forward") for name, c in contestants.items()}
    computed = {name: c.instead or case for name, c in contestants.items()}
    found: dict[str, list[Row]] = {name: [] for name in contestants}
    if {"busy", "span"} & set(args.metric):
        for name, samples in measure.per_kernel(functions, args.rounds, args.repeats).items():
            measure.check_floor(name, samples.busy, bounds.floor_us(computed[name], op, flushed=True))
            measure.check_graph(name, samples, profiled.graph_us(functions[name], replays=3))
            common = {
                "kernels_per_call": min(samples.kernels),
                "graph_over_busy": round(samples.graph_over_busy or 0, 3),
                **samples.clocks.row(),
            }
            for metric, trials in (("busy", samples.busy), ("span", samples.span)):
                found[name] += [{**figures(computed[name], op, metric, trials), **common}] * (metric in args.metric)
    if "graph" in args.metric:
        for name, trials in measure.in_turns(functions, args.rounds, profiled.graph_us).items():
            measure.check_floor(name, trials, bounds.floor_us(computed[name], op, flushed=False))
            found[name].append(figures(computed[name], op, "graph", trials))
    if "cold" in args.metric:
        cold = functools.partial(profiled.cold_us, flush=profiled.Flush())
        for name, trials in measure.in_turns(functions, args.rounds, cold).items():
            measure.check_floor(name, trials, bounds.floor_us(computed[name], op, flushed=True))
            found[name].append(figures(computed[name], op, "cold", trials))
    if "host" in args.metric:
        # Every contestant of a backward has both
        eager = {name: c.gradient or c.forward if op == "backward" else c.forward for name, c in contestants.items()}
        for name, trials in measure.in_turns(eager, args.rounds, profiled.host_us).items():
            found[name].append(figures(computed[name], op, "host", trials))
    return found


def rows(case: Case | Pack, op: str, names: list[str], args: argparse.Namespace, common: Row, say: Callable[[str], None]) -> list[Row]:
    """A row for each contestant and metric, all measured in turns."""
    with measure.side_stream():
        contestants = made(case, op, names, say)
        # Of ours with LSE the agreement with ours says as much
        judged: dict[str, Case | Pack] = {name: contestants[name].instead or case for name in ("ours", "ours-dense") if name in contestants}
        ratios: dict[str, Row] = {name: {"error_ratio": round(error_ratio(c, op), 3)} for name, c in judged.items()}
        contestants = agreeing(contestants, op, say)
        figures_of = measured(case, op, contestants, args) if contestants else {}
    found = []
    for name, several in figures_of.items():
        instead, version, same_bits = contestants[name].instead, contestants[name].version, contestants[name].deterministic
        head = {"op": op, "case": described(case, name), "dtype": args.dtype, "deterministic": same_bits, "contestant": name}
        head |= {"instead": described(instead)} if instead else {}
        found += [{**head, **row, **ratios.get(name, {}), "peer_version": version, **common} for row in several]
    return found


def summary(op: str, case: Case | Pack, found: list[Row]) -> list[str]:
    """A line a metric."""
    lines = []
    for metric in dict.fromkeys(row["metric"] for row in found):
        unit = "µs" if metric == "host" else "GB/s" if op == "decode" else "TFLOP/s"
        mine = [row for row in found if row["metric"] == metric]
        shown = {"µs": lambda r: r["ms"]["p50"] * 1e3, "GB/s": lambda r: r["gbps"], "TFLOP/s": lambda r: r["tflops"]}[unit]
        values = (f"{r['contestant']} {shown(r):.1f}" for r in mine)
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
    work = [(op, dataclasses.replace(case, dtype=dtype)) for op in args.ops for group in args.cases for case in cases.EVERY[group]]
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
