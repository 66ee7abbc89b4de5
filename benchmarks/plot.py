"""TFLOP/s over sequence length, ours and peers, from the committed rows: `python -m benchmarks.plot` writes docs/figures/*_tflops.png."""

import argparse
import sys
from pathlib import Path

from . import cases, table
from .rows import Row

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
LABELS = {"ours": "gqa_autograd", "cudnn": "cuDNN", "fa2": "FlashAttention-2 (torch)", "flex": "FlexAttention", "fa3": "FlashAttention-3"}
LABELS |= {"fa4": "FlashAttention-4 (CuTe)", "flashinfer": "FlashInfer", "fla": "fla"}
COLOURS = dict(zip(LABELS, ("#d95f02", "#1b6ca8", "#7f7f7f", "#2a9d5c", "#8e44ad", "#c0392b", "#16a085", "#b58900"), strict=True))


def curves(rows: list[Row]) -> dict[str, tuple[list[int], list[float]]]:
    """{contestant: (lengths, TFLOP/s)} over the set `lengths`, in the order of the labels."""
    found = {}
    for name in LABELS:
        points = [(case.S_q, row["tflops"]) for case in cases.SETS["lengths"] if (row := table.find(rows, case, name))]
        if points:
            found[name] = ([S for S, _ in points], [rate for _, rate in points])
    return found


def draw(op: str, rows: list[Row], png: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    drawn = curves(rows)
    for name, (lengths, rates) in drawn.items():
        axes.plot(
            lengths, rates, marker="o", markersize=4, color=COLOURS[name], linewidth=2.4 if name == "ours" else 1.3, label=LABELS[name]
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(cases.PLOTTED), [str(S) for S in cases.PLOTTED])
    gpu, commit = rows[0]["gpu"].removeprefix("NVIDIA "), rows[0]["commit"]
    axes.set(xlabel="sequence length, 16k tokens (32k in the last)", ylabel="TFLOP/s", ylim=(0, None))
    axes.set_title(f"{op}, {gpu}, bf16, causal, 32/8 heads, D 128, commit {commit}", fontsize="medium")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize="small")
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=95, pil_kwargs={"optimize": True})
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=table.RESULTS, metavar="FOLDER", help="folder of the rows [benchmarks/results/h200]"
    )
    parser.add_argument("--out", type=Path, default=FIGURES, metavar="FOLDER", help="folder of the pictures [docs/figures]")
    options = parser.parse_args(argv)
    drawn = 0
    for op in ("forward", "backward"):
        rows = table.newest(op, options.results, cases.SETS["lengths"], ["ours"]) if (options.results / f"{op}.jsonl").exists() else []
        if rows:
            draw(op, rows, options.out / f"{op}_tflops.png")
            drawn += 1
        else:
            print(f"{op}: no run has ours at every length: python -m benchmarks.run {op} --cases lengths", file=sys.stderr)
    return 0 if drawn else 1


if __name__ == "__main__":
    sys.exit(main())
