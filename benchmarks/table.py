"""The README's table, from the committed rows of the newest run: `python -m benchmarks.table`. A test holds the README against it."""

import json
from pathlib import Path

from . import cases

RESULTS = Path(__file__).parent / "results" / "h200"
Row = dict


def newest(op: str, results: Path = RESULTS) -> list[Row]:
    """The rows of the run that the last line of the file belongs to."""
    rows = [json.loads(line) for line in (results / f"{op}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["run"] == rows[-1]["run"]]


def tflops(rows: list[Row], B: int, S: int, contestant: str) -> float:
    """Of the first-mark shapes: causal, 32/8 heads, D 128. A shape that stands in two sets was measured twice; the first counts."""
    shape = {"B": B, "S_q": S, "S_kv": S, "H_q": 32, "H_kv": 8, "D": 128, "causal": True}
    return next(row["tflops"] for row in rows if row["contestant"] == contestant and shape.items() <= row["case"].items())


def _dotted(version: int) -> str:
    """cuDNN's 91900 is 9.19.0."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def table() -> str:
    runs = {op: newest(op) for op in ("forward", "backward")}
    row = runs["forward"][0]
    cudnn = _dotted(int(next(r["peer_version"] for r in runs["forward"] if r["contestant"] == "cudnn")))
    shapes = [(case.B, case.S_q) for case in cases.SETS["first-mark"]]
    head = f"{row['gpu'].removeprefix('NVIDIA ')}, bf16, causal, 32/8 heads, D 128: TFLOP/s, ours / cuDNN {cudnn}; commit {row['commit']}"
    lines = [f"| {head} | " + " | ".join(f"B {B}, S {S}" for B, S in shapes) + " |", "|---" * (1 + len(shapes)) + "|"]
    for op, rows in runs.items():
        cells = (f"{tflops(rows, B, S, 'ours'):.0f} / {tflops(rows, B, S, 'cudnn'):.0f}" for B, S in shapes)
        lines.append(f"| {op} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
