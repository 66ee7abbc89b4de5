"""The README's table, from the committed rows: `python -m benchmarks.table`. A test holds the README against it."""

import json
from collections.abc import Sequence
from pathlib import Path

from gqa_autograd.testing import Case

from . import cases
from .rows import Row, described

RESULTS = Path(__file__).parent / "results" / "h200"
# The first that there are rows of counts; earlier runs were timed by events around the call
METRICS = ("busy", "span")
CONTESTANTS = ("ours", "cudnn")


def read(op: str, results: Path = RESULTS) -> list[Row]:
    return [json.loads(line) for line in (results / f"{op}.jsonl").read_text(encoding="utf-8").splitlines()]


def find(rows: list[Row], case: Case, contestant: str) -> Row | None:
    """A shape that stands in two sets may have been measured twice; the first counts."""
    wanted = described(case)
    return next((row for row in rows if row["contestant"] == contestant and row["case"] == wanted), None)


def newest(
    op: str, results: Path = RESULTS, wanted: Sequence[Case] = cases.SETS["first-mark"], contestants: Sequence[str] = CONTESTANTS
) -> list[Row]:
    """The rows of the newest run by the best metric that has all wanted shapes of these contestants; none if there is no such run."""
    rows = read(op, results)
    for metric in METRICS:
        for run in reversed(dict.fromkeys(row["run"] for row in rows)):
            mine = [row for row in rows if row["run"] == run and row["metric"] == metric and row["dtype"] == "bfloat16"]
            if all(find(mine, case, contestant) for case in wanted for contestant in contestants):
                return mine
    return []


def tflops(rows: list[Row], B: int, S: int, contestant: str) -> float:
    """Of the first-mark shapes: causal, 32/8 heads, D 128."""
    row = find(rows, Case(B, S, S, 32, 8, 128, causal=True), contestant)
    assert row is not None, f"no row of {contestant} for B {B}, S {S}"
    return row["tflops"]


def _dotted(version: str) -> str:
    """Old rows write cuDNN's 9.19.0 as 91900."""
    return version if "." in version else f"{int(version) // 10000}.{int(version) // 100 % 100}.{int(version) % 100}"


def table() -> str:
    """Each line names its own metric and commit: the newest whole runs of the two operations need not be one."""
    runs = {op: newest(op) for op in ("forward", "backward")}
    first = runs["forward"][0]
    cudnn = _dotted(next(r["peer_version"] for r in runs["forward"] if r["contestant"] == "cudnn"))
    shapes = [(case.B, case.S_q) for case in cases.SETS["first-mark"]]
    head = f"{first['gpu'].removeprefix('NVIDIA ')}, bf16, causal, 32/8 heads, D 128: TFLOP/s, ours / cuDNN {cudnn}"
    lines = [f"| {head} | " + " | ".join(f"B {B}, S {S}" for B, S in shapes) + " |", "|---" * (1 + len(shapes)) + "|"]
    for op, rows in runs.items():
        cells = (f"{tflops(rows, B, S, 'ours'):.0f} / {tflops(rows, B, S, 'cudnn'):.0f}" for B, S in shapes)
        lines.append(f"| {op}, {rows[0]['metric']}, commit {rows[0]['commit']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
