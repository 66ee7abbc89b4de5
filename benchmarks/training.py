"""Trains the model of examples/train_lm.py with ours and with torch's attentions, compiled, and appends a row per run to
benchmarks/results/<gpu>/training_speed.jsonl.

    python -m benchmarks.training --attention ours cudnn flex --lengths 2048 8192 32768
    python -m benchmarks.training --attention ours --lengths 8192 32768 --checkpointing none full selective budget

The model has four blocks of Llama 3 8B's shape (dim 4096, 32/8 heads, D 128; QK-norm, as in the example) and 874 M weights, float32 under
bfloat16 autocast; its vocabulary is bytes. A step is forward, loss, backward, clipping and AdamW on 32768 tokens, at every length. All
contestants have the same weights, batches and optimizer; of each length they take turns, A B C, C B A, ..., and each turn begins anew from
the first weights. Compilation comes before, in seconds of its own.

    tokens_per_s   tokens of the timed steps over their time: wall clock, the GPU waited for after each step
    mfu            FLOPs of the model over the same time and 989 TFLOP/s: 6 N a token, and 3.5 times attention's forward, 4 D FLOPs for each
                   visible pair and query head (a backward has 5 products where the forward has 2); nothing for what is computed again
    peak_gb        the most that was allocated in the timed steps, in 10^9 bytes: weights, gradients and AdamW's state are 14 of it

Before it is timed a contestant must have the gradients of the first one, and after its steps the loss: a row that has not is refused.
"""

import argparse
import contextlib
import gc
import itertools
import json
import math
import statistics
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import gqa_autograd

from . import measure, training_model
from .baselines import NoRow
from .progress import tracked
from .rows import Row, environment
from .run import RESULTS
from .training_model import ATTENTIONS, PEAK_FLOPS, RECIPES, Bench, Contestant, Run, Shape, graphs_made

OP = "training_speed"
# Relative, of the gradients of all q, k or v projections. bf16 on a CPU: two right attentions 0.005, a scale 10 % off 0.14
GRADIENT_TOLERANCE = 0.03
# Relative, of the loss after the steps. In 15 steps of lm_curves_h200.jsonl two right attentions come 0.0007 apart
LOSS_TOLERANCE = 0.005


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--attention", nargs="+", default=list(ATTENTIONS), choices=ATTENTIONS, help="[%(default)s]")
    add("--lengths", nargs="+", type=int, default=[2048, 8192, 32768], metavar="S", help="tokens a sequence [%(default)s]")
    add("--checkpointing", nargs="+", default=["none"], choices=RECIPES, help="docs/training.md; each with each attention [none]")
    add("--budget", type=float, default=0.5, help="of the recipe budget, 0 to 1 [%(default)s]")
    add("--runs", type=int, default=3, help="turns of each contestant [%(default)s]")
    add("--steps", type=int, default=6, help="timed steps a turn [%(default)s]")
    add("--warm-up", type=int, default=1, help="steps of a turn before those [%(default)s]")
    add("--tokens", type=int, default=32768, help="tokens a step; the lengths must divide it [%(default)s]")
    add("--layers", type=int, default=4, help="blocks [%(default)s]")
    add("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the rows go [benchmarks/results]")
    add("--commit", help="commit of this tree, where git can't tell it")
    options = parser.parse_args(argv)
    if min(options.runs, options.steps, options.tokens, options.layers, *options.lengths) < 1 or options.warm_up < 0:
        parser.error("--runs, --steps, --tokens, --layers and --lengths must be at least 1, --warm-up at least 0")
    if not 0 <= options.budget <= 1:
        parser.error(f"--budget must be from 0 to 1, got {options.budget}")
    if left := [S for S in options.lengths if options.tokens % S]:
        parser.error(f"--lengths must divide --tokens {options.tokens}, got {left[0]}")
    return options


class Ready(NamedTuple):
    """A contestant that is compiled and computes what the first one does."""

    contestant: Contestant
    compile_s: float
    gradient_distance: float
    attention_calls: dict[str, int] | None


def distance(mine: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of the tensors' relative distances; NaN if one is."""
    each = [((a - b).norm() / b.norm()).item() for a, b in zip(mine, expected, strict=True)]
    return math.nan if any(map(math.isnan, each)) else max(each)


def others_operator(contestant: Contestant, calls: dict[str, int] | None, layers: int) -> str | None:
    """Why this is not the attention of its name: in every block it runs at least once, forward and backward."""
    if calls is None or min(calls.values()) >= layers:
        return None
    return f"{training_model.OPERATORS[contestant.attention]} ran {calls} times a step in {layers} blocks: another attention computed"


def made(bench: Bench, args: argparse.Namespace, say: Callable[[str], None]) -> list[Ready]:
    """The contestants of a length; why the others have no row, in a line each. Ours has no excuse."""
    found: list[Ready] = []
    expected: list[Tensor] | None = None
    for recipe, name in itertools.product(args.checkpointing, args.attention):
        label = f"{name}, checkpointing {recipe}, S {bench.shape.context}"
        try:
            contestant = bench.contestant(name, recipe)
            seconds, gradients = bench.first(contestant, args.budget)
            calls = bench.calls(contestant)
        except NoRow as reason:
            say(f"{label}: no row: {reason}")
            continue
        except Exception as error:  # whatever stops a peer must not stop the others
            if name == "ours":
                raise
            say(f"{label}: no row: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        expected = gradients if expected is None else expected
        apart = distance(gradients, expected)
        refusal = others_operator(contestant, calls, bench.shape.layers)
        if not apart <= GRADIENT_TOLERANCE:  # NaN is no agreement
            refusal = f"its gradients are {apart:.1%} away from those of the first contestant"
        if refusal:
            say(f"{label}: no row: {refusal}")
            continue
        found.append(Ready(contestant, seconds, apart, calls))
        say(f"{label}: compiled in {seconds:.0f} s, gradients {apart:.2%} apart, attention calls {calls}")
    return found


def in_turns(bench: Bench, ready: list[Ready], args: argparse.Namespace) -> dict[str, list[Run]]:
    """A run of every contestant in every round; nothing may be compiled meanwhile."""
    contestants = {one.contestant.name: one.contestant for one in ready}
    runs: dict[str, list[Run]] = {name: [] for name in contestants}
    graphs = graphs_made()
    for order, _ in zip(measure.orders(list(contestants)), range(args.runs), strict=False):
        for name in order:
            runs[name].append(bench.run(contestants[name], args.warm_up))
            if graphs_made() != graphs:
                raise measure.Implausible(f"{name}: torch.compile worked while it was timed")
    return runs


def described(bench: Bench, contestant: Contestant, args: argparse.Namespace) -> Row:
    shape, weights = bench.shape, sum(weight.numel() for weight in bench.weights.parameters())
    heads = {"H_q": shape.heads, "H_kv": shape.kv_heads, "D": shape.dim // shape.heads}
    case = {"example": "train_lm.py", "layers": shape.layers, "dim": shape.dim, **heads, "S": shape.context, "batch": bench.batch}
    case |= {"weights": weights, "seed": bench.seed, "checkpointing": contestant.checkpointing}
    return case | ({"budget": args.budget} if contestant.checkpointing == "budget" else {})


def figures(run: Run, flops: float, tokens: int) -> Row:
    """Of one run: flops and tokens are those of a step."""
    seconds = sum(run.ms) / len(run.ms) / 1e3
    return {
        "tokens_per_s": round(tokens / seconds, 1),
        "mfu": round(flops / seconds / PEAK_FLOPS, 4),
        "flops": flops,
        "tflops": round(flops / seconds / 1e12, 1),
        "ms": {f"p{p}": round(measure.quantile(run.ms, p / 100), 3) for p in (10, 50, 90)},
        "steps": len(run.ms),
        "peak_gb": round(run.peak_bytes / 1e9, 2),
        "loss": round(run.loss, 6),
    }


def agrees(loss: float, expected: float) -> bool:
    """NaN does not."""
    return abs(loss - expected) <= LOSS_TOLERANCE * abs(expected)


def rows(bench: Bench, args: argparse.Namespace, common: Row, say: Callable[[str], None]) -> list[Row]:
    """A row for each contestant and run whose loss is that of the first run."""
    ready = made(bench, args, say)
    runs = in_turns(bench, ready, args) if ready else {}
    found: list[Row] = []
    expected = next(iter(runs.values()))[0].loss if runs else 0.0
    for one in ready:
        head = {"op": OP, "case": described(bench, one.contestant, args), "dtype": "bfloat16", "contestant": one.contestant.attention}
        checked: Row = {"compile_s": round(one.compile_s, 1), "gradient_distance": round(one.gradient_distance, 5)}
        checked |= {"attention_calls": one.attention_calls, "compiled": True, "peer_version": one.contestant.version}
        for turn, run in enumerate(runs[one.contestant.name]):
            if not agrees(run.loss, expected):
                apart = f"its loss is {run.loss:.4f}, that of the first run {expected:.4f}"
                say(f"{one.contestant.name}, S {bench.shape.context}: no row: {apart}")
                continue
            figured = {"metric": "wall", "turn": turn, **figures(run, bench.flops, bench.tokens), "warm_up_steps": args.warm_up}
            found.append({**head, **figured, **checked, **common})
    return found


def summary(found: list[Row]) -> list[str]:
    """A line a contestant: medians of its runs."""
    lines = []
    for key, group in itertools.groupby(found, lambda row: (row["contestant"], row["case"])):
        mine, (name, case) = list(group), key
        speed, mfu, peak = (statistics.median(row[field] for row in mine) for field in ("tokens_per_s", "mfu", "peak_gb"))
        speeds = ", ".join(f"{row['tokens_per_s']:.0f}" for row in mine)
        label = f"{name:6} S {case['S']:6} checkpointing {case['checkpointing']:10}"
        lines.append(f"{label} {speed:8.0f} tokens/s ({speeds}), MFU {mfu:.1%}, peak {peak:.1f} GB, loss {mine[0]['loss']:.4f}")
    return lines


def main() -> int:
    args = arguments()
    if not torch.cuda.is_available():
        print("benchmarks.training: error: no CUDA device; the figures are those of a GPU", file=sys.stderr)
        return 2
    common = {"run": uuid.uuid4().hex[:8], **environment(args.commit)}
    folder = args.results / str(common["gpu"]).removeprefix("NVIDIA ").lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    steps, say = tracked(args.lengths, "length")
    if "ours" in args.attention:
        # Kernels are built once for all lengths; the seconds of a compilation are then torch.compile's
        gqa_autograd.warmup(D=128, causal=True, device="cuda")
    wanted = args.runs * len(args.attention) * len(args.checkpointing)
    missing = 0
    for S in steps:
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        shape = Shape(layers=args.layers, dim=4096, heads=32, kv_heads=8, context=S, qk_norm=True)
        bench = Bench(shape, args.tokens // S, args.warm_up + args.steps, torch.device("cuda"))
        found = rows(bench, args, common, say)
        missing += wanted - len(found)
        with (folder / f"{OP}.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
        for line in summary(found):
            say(line)
        del bench
    return 1 if missing else 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
