"""Measures attention next to its peers in one process and appends a row per contestant to benchmarks/results/<gpu>/<op>.jsonl.

    python -m benchmarks.run forward backward --cases first-mark --against cudnn fa2

Each shape is first checked against float64 by the closeness rule on a short twin; a red check prints no number.
"""

import argparse
import dataclasses
import datetime
import json
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import torch

import gqa_autograd
from gqa_autograd import testing
from gqa_autograd.flops import visible_pairs
from gqa_autograd.kernels import config
from gqa_autograd.testing import Case

from . import baselines, cases, measure

RESULTS = Path(__file__).parent / "results"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="+", choices=("forward", "backward"), help="what to time")
    parser.add_argument(
        "--cases", nargs="+", default=["first-mark"], choices=sorted(cases.SETS), help="named sets of shapes (default: first-mark)"
    )
    parser.add_argument("--against", nargs="*", default=["cudnn"], choices=sorted(set(baselines.CONTESTANTS) - {"ours"}), help="peers")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--rounds", type=int, default=6, help="how often the contestants take turns (default: 6)")
    parser.add_argument("--repeats", type=int, default=10, help="calls per turn (default: 10)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows (default: benchmarks/results)")
    parser.add_argument("--commit", help="commit of this tree, where git can't tell it")
    return parser.parse_args()


def error_ratio(case: Case, op: str) -> float:
    """The worst tensor's error over plain PyTorch's on a short twin of the case, which must pass the closeness rule."""
    twin = dataclasses.replace(case, B=1, S_q=min(case.S_q, 777), S_kv=min(case.S_kv, 777))
    tensors = testing.make(twin, "cuda")
    names = ("out",) if op == "forward" else ("dq", "dk", "dv")
    if op == "forward":
        with torch.no_grad():
            mine = {"out": gqa_autograd.attention(*tensors[:3], **twin.options)}
    else:
        mine = testing.ours(twin, *tensors)._asdict()
    plain, exact = testing.plain(twin, *tensors)._asdict(), testing.exact(twin, *tensors)._asdict()
    for name in names:
        testing.assert_no_worse(mine[name], plain[name], exact[name], name)
    error = lambda x, name: (x[name].double() - exact[name]).abs().max()  # noqa: E731
    return max((error(mine, name) / error(plain, name)).item() for name in names)


def environment(commit: str | None) -> dict[str, object]:
    def output(*command: str) -> str | None:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    try:
        from tilelang import __version__ as tilelang
    except ImportError:
        tilelang = None
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    software = {"driver": driver, "cuda": torch.version.cuda, "torch": torch.__version__, "tilelang": tilelang}
    changes = output("git", "status", "--porcelain", "-uno")
    # Outside a checkout nobody can tell
    dirty = None if changes is None else bool(changes)
    tree = {"commit": commit or output("git", "rev-parse", "--short", "HEAD"), "dirty": dirty}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"gpu": torch.cuda.get_device_name(), **software, **tree, "date": now}


def sm_mhz(function: Callable[[], object]) -> int | None:
    """The SM clock while `function` keeps the GPU busy; None where NVML's Python bindings are missing."""
    for _ in range(50):
        function()
    try:
        return torch.cuda.clock_rate()
    except (ImportError, RuntimeError):
        return None
    finally:
        torch.cuda.synchronize()


def flops(case: Case, op: str) -> float:
    """4 D FLOPs a visible pair and query head; a backward has five products where a forward has two."""
    forward = 4 * case.B * case.H_q * case.D * visible_pairs(case.S_q, case.S_kv, *case.formula[:2])
    return forward if op == "forward" else 2.5 * forward


def described(case: Case) -> dict[str, object]:
    sizes = {name: getattr(case, name) for name in ("B", "S_q", "S_kv", "H_q", "H_kv", "D")}
    return {**sizes, "D_v": case.D, "causal": case.causal, "window": None, "softcap": 0.0, "lse": False, "varlen": None}


def rows(case: Case, op: str, names: list[str], args: argparse.Namespace, common: dict[str, object]) -> list[dict[str, object]]:
    """A row for each contestant, all measured in turns."""
    ratio = error_ratio(case, op)
    tensors = testing.make(case, "cuda")
    contestants = {name: baselines.CONTESTANTS[name](case, *tensors) for name in names}
    samples = measure.interleaved({name: getattr(c, op) for name, c in contestants.items()}, args.rounds, args.repeats)
    clock = sm_mhz(getattr(contestants["ours"], op))
    measured = []
    for name, times in samples.items():
        row = {"op": op, "contestant": name, "case": described(case), "dtype": args.dtype, "deterministic": False}
        row |= {"ms": {f"p{p}": round(measure.quantile(times, p / 100), 5) for p in (10, 50, 90)}}
        row |= {"tflops": round(flops(case, op) / measure.quantile(times, 0.5) / 1e9, 1), "metric": "span", "samples": len(times)}
        row |= {"error_ratio": round(ratio, 3)} if name == "ours" else {}
        measured.append({**row, "sm_mhz": clock, "peer_version": contestants[name].version, **common})
    return measured


def main() -> int:
    args = arguments()
    if not torch.cuda.is_available():
        print("benchmarks.run: error: no CUDA device; the figures are those of a GPU", file=sys.stderr)
        return 2
    common = {"run": uuid.uuid4().hex[:8], **environment(args.commit)}
    folder = args.results / str(common["gpu"]).removeprefix("NVIDIA ").lower().replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    dtype = getattr(torch, args.dtype)
    for op in args.ops:
        for case in (dataclasses.replace(case, dtype=dtype) for group in args.cases for case in cases.SETS[group]):
            if op == "backward" and (case.D, case.D) not in config.D_BACKWARD:
                print(f"{op} {case}: no kernel of ours, no row")
                continue
            measured = rows(case, op, ["ours", *args.against], args, common)
            with (folder / f"{op}.jsonl").open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in measured)
            print(f"{op:8} {case!s:48}", *(f"{row['contestant']} {row['tflops']:6.1f}" for row in measured), "TFLOP/s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
