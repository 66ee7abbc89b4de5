"""Plots of train_lm.py: the curves of one run, and `python examples/plot_lm.py runs/*/log.jsonl --out curves.png` for several.

The comparison draws the losses of both attentions, and below how far they are apart seed by seed, beside how far apart seeds are."""

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

Row = dict[str, Any]
Runs = dict[tuple[str, int], list[Row]]
COLOURS = {"gqa": "#d95f02", "sdpa": "#1b6ca8"}
# One lies on the other: dashes over a broad line show both
LINES: dict[str, Row] = {"gqa": {"linewidth": 3, "alpha": 0.55}, "sdpa": {"linewidth": 1, "linestyle": "--"}}


def read(logs: Iterable[Path]) -> list[Row]:
    return [json.loads(line) for log in logs for line in log.read_text().splitlines() if line.strip()]


def by_run(rows: Iterable[Row]) -> Runs:
    """{(attention, seed): rows in order of steps}; of a step that was logged twice the last row counts."""
    runs: dict[tuple[str, int], dict[int, Row]] = {}
    for row in rows:
        runs.setdefault((row["attention"], row["seed"]), {})[row["step"]] = row
    return {key: [steps[step] for step in sorted(steps)] for key, steps in sorted(runs.items())}


def column(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
    """(steps, values), of the rows that have one."""
    kept = [row for row in rows if row[name] is not None]
    return [row["step"] for row in kept], [row[name] for row in kept]


def draw_run(log: Path, png: Path) -> None:
    rows = read([log])
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*column(rows, "loss"), color="#9a9a9a", linewidth=1, label="training")
    axes.plot(*column(rows, "val_loss"), color="#c0392b", marker="o", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss, nats a byte", title=f"{rows[-1]['attention']} attention, seed {rows[-1]['seed']}")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    _write(figure, png)


def draw_comparison(runs: Runs, png: Path) -> None:
    figure, (losses, distances) = pyplot.subplots(2, 1, figsize=(7.5, 6), sharex=True, height_ratios=(3, 2), layout="constrained")
    for attention in sorted({key[0] for key in runs}):
        _draw_losses(losses, [rows for key, rows in runs.items() if key[0] == attention], attention)
    losses.set(ylabel="loss, nats a byte")
    losses.legend(frameon=False, title="lines: training, mean of the seeds; band: their range; dots: validation")
    _draw_distances(distances, runs)
    distances.set(xlabel="step", ylabel="distance in training loss", yscale="log")
    distances.legend(frameon=False, fontsize="small", loc="best", ncols=2)
    for axes in (losses, distances):
        axes.grid(alpha=0.25)
    _write(figure, png)


def _shared(runs: list[list[Row]], name: str) -> tuple[list[int], list[list[float]]]:
    """The steps that all runs have, and for each the value of each run."""
    columns = [dict(zip(*column(rows, name), strict=True)) for rows in runs]
    steps = sorted(set.intersection(*map(set, columns))) if columns else []
    return steps, [[values[step] for values in columns] for step in steps]


def _draw_losses(axes, runs: list[list[Row]], attention: str) -> None:
    steps, values = _shared(runs, "loss")
    axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=COLOURS[attention], alpha=0.12, linewidth=0)
    axes.plot(steps, [fmean(v) for v in values], color=COLOURS[attention], label=f"{attention}, {len(runs)} seeds", **LINES[attention])
    steps, values = _shared(runs, "val_loss")
    axes.plot(steps, [fmean(v) for v in values], "o", markersize=7 if attention == "gqa" else 3, color=COLOURS[attention])


def _draw_distances(axes, runs: Runs) -> None:
    steps, values = _shared([rows for key, rows in runs.items() if key[0] == "sdpa"], "loss")
    axes.plot(steps, [max(v) - min(v) for v in values], color="#7f7f7f", label="between sdpa's seeds, largest - smallest")
    for attention, seed in runs:
        if attention == "gqa" and ("sdpa", seed) in runs:
            steps, values = _shared([runs["gqa", seed], runs["sdpa", seed]], "loss")
            gaps = [ours - theirs for ours, theirs in values]
            # A logarithmic axis leaves out the steps whose losses are bit-equal
            axes.plot(steps, [abs(gap) or math.nan for gap in gaps], linewidth=1, label=f"|gqa - sdpa|, seed {seed}")


def _write(figure, png: Path) -> None:
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=95, pil_kwargs={"optimize": True})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="plot_lm", description="Compare runs of train_lm: attentions and seeds.")
    parser.add_argument("logs", nargs="+", type=Path, metavar="LOG", help="log.jsonl of a run, or several runs in one file")
    parser.add_argument("--out", type=Path, default=Path("runs/lm_curves.png"), metavar="PNG", help="[%(default)s]")
    parser.add_argument("--data", type=Path, metavar="JSONL", help="also write the rows that were drawn, without the speeds")
    options = parser.parse_args()
    try:
        runs = by_run(read(options.logs))
        draw_comparison(runs, options.out)
    except (OSError, json.JSONDecodeError, KeyError) as error:
        sys.exit(f"plot_lm: error: {type(error).__name__}: {error}")
    if options.data:
        names = ("attention", "seed", "step", "loss", "val_loss")
        rows = [json.dumps({name: row[name] for name in names}) for run in runs.values() for row in run]
        options.data.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
