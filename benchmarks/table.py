"""The README's tables, from the committed rows: `python -m benchmarks.table`. A test holds the README against them."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gqa_autograd.testing import Case

from . import cases, packs
from .packs import Pack
from .rows import Row, described

RESULTS = Path(__file__).parent / "results" / "h200"
# The first that there are rows of counts; earlier runs were timed by events around the call
METRICS = ("busy", "span")
CONTESTANTS = ("ours", "cudnn")
LABELS = {
    "ours": "ours",
    "cudnn": "cuDNN",
    "fa2": "FA2",
    "flex": "Flex",
    "ours-det": "ours, deterministic",
    "fa3": "FA3",
    "fa4": "FA4",
    "flashinfer": "FlashInfer",
}
# Of each shape the fastest backward that a peer was seen to have on an H200: TFLOP/s of bf16, measured once in one process with torch 2.11,
# cuDNN 9.19, the FA3 of its time and FA4 for SM90, median of do_bench with the L2 cache flushed. Those that are not installed here stand in
# no row of ours, so their figures are of another run; 586-597 is taken as 597
_FASTEST = (
    *((458, "FA4"), (616, "FA4"), (626, "FA4"), (415, "FA4"), (506, "FA3"), (558, "FA3"), (597, "FA3"), (562, "FA4"), (409, "FA4")),
    *((156, "FA4"), (513, "FA4"), (427, "FA4"), (378, "cuDNN")),
)
BEST_BACKWARD = dict(zip(cases.SETS["peers"], _FASTEST, strict=True))


def read(op: str, results: Path = RESULTS) -> list[Row]:
    return [json.loads(line) for line in (results / f"{op}.jsonl").read_text(encoding="utf-8").splitlines()]


def find(rows: list[Row], case: Case | Pack, contestant: str) -> Row | None:
    """A shape that stands in two sets may have been measured twice; the first counts. The dtype is the case's."""
    wanted, dtype = described(case, contestant), str(case.dtype).removeprefix("torch.")
    return next((r for r in rows if r["contestant"] == contestant and r["case"] == wanted and r["dtype"] == dtype), None)


def newest(
    op: str,
    results: Path = RESULTS,
    wanted: Sequence[Case | Pack] = cases.SETS["first-mark"],
    contestants: Sequence[str] = CONTESTANTS,
) -> list[Row]:
    """The rows of the newest run by the best metric that has all wanted shapes of these contestants; none if there is no such run."""
    rows = read(op, results) if (results / f"{op}.jsonl").exists() else []
    for metric in METRICS:
        for run in reversed(dict.fromkeys(row["run"] for row in rows)):
            mine = [row for row in rows if row["run"] == run and row["metric"] == metric]
            if all(find(mine, case, contestant) for case in wanted for contestant in contestants):
                return mine
    return []


def row_of(rows: list[Row], case: Case | Pack, contestant: str) -> Row:
    found = find(rows, case, contestant)
    assert found is not None, f"no row of {contestant} for {case}"
    return found


def tflops(rows: list[Row], B: int, S: int, contestant: str) -> float:
    """Of the first-mark shapes: causal, 32/8 heads, D 128."""
    return row_of(rows, Case(B, S, S, 32, 8, 128, causal=True), contestant)["tflops"]


def _dotted(version: str) -> str:
    """Old rows write cuDNN's 9.19.0 as 91900."""
    return version if "." in version else f"{int(version) // 10000}.{int(version) // 100 % 100}.{int(version) % 100}"


def grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    written = [f"| {' | '.join(line)} |" for line in (head, *lines)]
    return "\n".join([written[0], "|---" * len(head) + "|", *written[1:]])


def _told(rows: list[Row], what: str) -> str:
    """The corner of a table: what holds for all of it."""
    return f"{rows[0]['gpu'].removeprefix('NVIDIA ')}, bf16, {what}, {rows[0]['metric']}, commit {rows[0]['commit']}"


def first_mark(results: Path = RESULTS) -> str:
    """Each line names its own metric and commit: the newest whole runs of the two operations need not be one."""
    runs = {op: newest(op, results) for op in ("forward", "backward")}
    first = runs["forward"][0]
    cudnn = _dotted(next(r["peer_version"] for r in runs["forward"] if r["contestant"] == "cudnn"))
    shapes = [(case.B, case.S_q) for case in cases.SETS["first-mark"]]
    corner = f"{first['gpu'].removeprefix('NVIDIA ')}, bf16, causal, 32/8 heads, D 128: TFLOP/s, ours / cuDNN {cudnn}"
    lines = []
    for op, rows in runs.items():
        cells = (f"{tflops(rows, B, S, 'ours'):.0f} / {tflops(rows, B, S, 'cudnn'):.0f}" for B, S in shapes)
        lines.append((f"{op}, {rows[0]['metric']}, commit {rows[0]['commit']}", *cells))
    return grid((corner, *(f"B {B}, S {S}" for B, S in shapes)), lines)


def _cell(rows: list[Row], case: Case | Pack, contestant: str) -> str:
    """TFLOP/s, or a dash where there is no row."""
    found = find(rows, case, contestant)
    return f"{found['tflops']:.0f}" if found else "-"


def peers(results: Path = RESULTS, op: str = "forward") -> str:
    """The set peers: ours in both dtypes from their newest runs, who else was in the run of bf16, and of a backward the best of BEST."""
    shapes = cases.SETS["peers"]
    rows = newest(op, results, shapes, ["ours"])
    if not rows:
        return ""
    halves = tuple(dataclasses.replace(case, dtype=torch.float16) for case in shapes)
    rows16 = newest(op, results, halves, ["ours"])
    others = [who for who in dict.fromkeys(r["contestant"] for r in rows) if who in LABELS]
    best = op == "backward"
    lines = [
        (
            f"{c.B}, {c.S_q}, {c.S_kv}, {c.H_q}/{c.H_kv}, {c.D}{', causal' if c.causal else ''}",
            *(_cell(rows, c, who) for who in others),
            *(f"{BEST_BACKWARD[c][0]} {BEST_BACKWARD[c][1]}" for _ in range(best)),
            *(_cell(rows16, half, who) for who in CONTESTANTS if rows16),
        )
        for c, half in zip(shapes, halves, strict=True)
    ]
    head = (f"{_told(rows, op)}: B, S_q, S_kv, heads, D; TFLOP/s", *(LABELS[who] for who in others), *(["best peer, another run"] * best))
    head += ("fp16: ours", "cuDNN") if rows16 else ()
    return grid(head, lines)


def peers_backward(results: Path = RESULTS) -> str:
    return peers(results, "backward")


def varlen(results: Path = RESULTS, op: str = "forward") -> str:
    rows = newest(op, results, packs.PACKS, ["ours", "ours-dense"])
    if not rows:
        return ""

    def cell(pack: Pack) -> str:
        ours, dense = (row_of(rows, pack, who)["tflops"] for who in ("ours", "ours-dense"))
        return f"{ours:.0f} / {dense:.0f} ({ours / dense:.2f}) / {_cell(rows, pack, 'fa2')}"

    lines = [(f"{N} documents, {kind}", *(cell(pack) for pack in packs.of_shape(kind, N))) for kind, N in packs.SHAPES]
    what = f"{'' if op == 'forward' else 'backward, '}packed, causal, 32/8 heads, D 128"
    corner = f"{_told(rows, what)}: TFLOP/s, ours / ours dense at equal FLOPs (ratio) / FA2"
    return grid((corner, *(f"{T // 1024}k tokens" for T in packs.TOKENS)), lines)


def varlen_backward(results: Path = RESULTS) -> str:
    return varlen(results, "backward")


def small_backward(results: Path = RESULTS) -> str:
    """Times, as of the small grids of the forward."""
    rows = newest("backward", results, cases.SETS["small-training"], ["ours"])
    if not rows:
        return ""

    def cell(case: Case) -> str:
        return " / ".join(f"{found['ms']['p50'] * 1e3:.1f}" if (found := find(rows, case, who)) else "-" for who in CONTESTANTS)

    lines = [
        (
            f"{H_q}/{H_kv} heads, {'causal' if causal else 'full'}",
            *(cell(Case(1, S, S, H_q, H_kv, 128, causal=causal)) for S in cases.SMALL_TRAINING),
        )
        for H_q, H_kv in cases.SMALL_HEADS
        for causal in (True, False)
    ]
    return grid((f"{_told(rows, 'backward, B 1, D 128')}: µs, ours / cuDNN", *(f"S {S}" for S in cases.SMALL_TRAINING)), lines)


def small_grids(results: Path = RESULTS) -> str:
    """Times, since the rates of so little work say little."""
    rows = newest("forward", results, cases.SETS["small-grids"], ["ours"])
    if not rows:
        return ""

    def cell(case: Case) -> str:
        return " / ".join(f"{found['ms']['p50'] * 1e3:.1f}" if (found := find(rows, case, who)) else "-" for who in CONTESTANTS)

    long = cases.SMALL_KEYS
    forms = {"S_q, causal": (None, True), f"{long}, causal": (long, True), f"{long}, full": (long, False)}
    lines = [
        (f"{H_q}/{H_kv} heads, S_kv {form}", *(cell(Case(1, S, keys or S, H_q, H_kv, 128, causal=causal)) for S in cases.SMALL))
        for H_q, H_kv in cases.SMALL_HEADS
        for form, (keys, causal) in forms.items()
    ]
    corner = f"{_told(rows, 'B 1, D 128')}: µs, ours / cuDNN"
    return grid((corner, *(f"S_q {S}" for S in cases.SMALL)), lines)


def lse(results: Path = RESULTS) -> str:
    """What LSE costs, over the set peers."""
    return _variant("forward", "ours-lse", "With LSE", results)


def _variant(op: str, variant: str, what: str, results: Path) -> str:
    """How much longer ours takes in another form."""
    shapes = cases.SETS["peers"]
    rows = newest(op, results, shapes, ["ours", variant])
    if not rows:
        return ""
    ratios = sorted(row_of(rows, c, variant)["ms"]["p50"] / row_of(rows, c, "ours")["ms"]["p50"] for c in shapes)
    mean = statistics.geometric_mean(ratios)
    return (
        f"{what} the {len(shapes)} shapes take {ratios[0]:.3f} to {ratios[-1]:.3f} times as long as without, "
        f"geometric mean {mean:.3f} ({_told(rows, op)})."
    )


def deterministic(results: Path = RESULTS) -> str:
    """What a fixed order of dq's sums costs, over the set peers."""
    return _variant("backward", "ours-det", "With deterministic=True", results)


TABLES: tuple[Callable[[Path], str], ...] = (
    first_mark,
    peers,
    peers_backward,
    lse,
    deterministic,
    varlen,
    varlen_backward,
    small_grids,
    small_backward,
)


def tables(results: Path = RESULTS) -> list[str]:
    """Each that there are rows for."""
    return [text for make in TABLES if (text := make(results))]


if __name__ == "__main__":
    print("\n\n".join(tables()))
