"""The committed rows: complete, and what the README says of speed is what they say."""

import json
from pathlib import Path

import pytest

from benchmarks import cases, table

ROOT = Path(__file__).resolve().parents[1]
ROWS = [
    (path.name, row)
    for path in sorted((ROOT / "benchmarks" / "results").rglob("*.jsonl"))
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())
]
KEYS = {"op", "contestant", "run", "case", "dtype", "metric", "gpu", "driver", "cuda", "torch", "tilelang", "commit", "date"}


def test_rows_say_where_they_come_from():
    assert ROWS
    for name, row in ROWS:
        assert row.keys() >= KEYS, f"{name}: a row lacks {KEYS - row.keys()}"
        assert row["op"] == name.removesuffix(".jsonl")
        assert row["gpu"]
        assert row["commit"]


def test_times_and_rates_agree():
    for _, row in ROWS:
        if "ms" in row:
            assert 0 < row["ms"]["p10"] <= row["ms"]["p50"] <= row["ms"]["p90"]
        # Above the dense peak of the data sheet a figure is a mistake; time on the host has no rate
        if "ms" in row and row["metric"] != "host":
            assert 0 < row["tflops"] < 990
        if row["op"] in ("forward", "backward") and row["contestant"] == "ours":
            assert row["error_ratio"] <= 2


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_first_speed_mark(op):
    """At least 1.05 times cuDNN, in one process, at every length of the set."""
    rows = table.newest(op)
    for case in cases.SETS["first-mark"]:
        ours, cudnn = (table.tflops(rows, case.B, case.S_q, contestant) for contestant in ("ours", "cudnn"))
        assert ours >= 1.05 * cudnn, f"{op}, S {case.S_q}: {ours} against {cudnn}"


def test_readme_and_docs_show_the_newest_rows():
    """The first table stands in the README, the others there or in docs/benchmarks.md."""
    readme, docs = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/benchmarks.md"))
    assert table.first_mark() in readme, "paste what `python -m benchmarks.table` prints"
    for text in table.tables():
        assert text in readme or text in docs, f"paste what `python -m benchmarks.table` prints:\n{text}"
