"""A row of the results: what was run, on what, and the figures of one contestant by one metric."""

import datetime
import statistics
import subprocess
from collections.abc import Sequence
from typing import Any

import torch

from gqa_autograd.testing import Case

from . import bounds, measure
from .packs import Pack

Row = dict[str, Any]


def described(case: Case | Pack, contestant: str = "ours") -> Row:
    """Keys that don't apply are absent: a pack has lengths and no B."""
    lse = contestant == "ours-lse"
    if isinstance(case, Pack):
        heads = {"T": case.T, "N": len(case.lengths), "H_q": case.H_q, "H_kv": case.H_kv, "D": case.D, "D_v": case.D, "causal": True}
        return {**heads, "window": None, "softcap": 0.0, "lse": lse, "varlen": case.name, "lengths": list(case.lengths)}
    sizes = {name: getattr(case, name) for name in ("B", "S_q", "S_kv", "H_q", "H_kv", "D")}
    window = None if case.window == (-1, -1) else list(case.window)
    row = {**sizes, "D_v": case.D if case.D_v is None else case.D_v, "causal": case.causal, "window": window, "softcap": case.softcap}
    return {**row, "lse": lse, "varlen": None} | ({} if case.scale is None else {"scale": case.scale})


def figures(case: Case | Pack, op: str, metric: str, trials_us: Sequence[Sequence[float]]) -> Row:
    """Quantiles over all calls, the spread between trials, and for times on the GPU the rate and the FLOPs that it counts."""
    samples = [t for trial in trials_us for t in trial]
    row: Row = {"ms": {f"p{p}": round(measure.quantile(samples, p / 100) / 1e3, 6) for p in (10, 50, 90)}}
    if metric != "host":
        middle, flops = statistics.median(samples), bounds.flops(case, op)
        row |= {
            "flops": flops,
            "tflops": float(f"{flops / middle / 1e6:.4g}"),
            "gbps": round(bounds.bytes_read(case, op) / middle / 1e3, 1),
        }
    return row | {"metric": metric, "samples": len(samples), "trials": len(trials_us), "spread": round(measure.spread(trials_us), 4)}


def environment(commit: str | None) -> Row:
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
    # Outside a checkout nobody can tell, and who names the commit says that git can't
    dirty = None if commit or changes is None else bool(changes)
    tree = {"commit": commit or output("git", "rev-parse", "--short", "HEAD"), "dirty": dirty}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"gpu": torch.cuda.get_device_name(), **software, **tree, "date": now}
