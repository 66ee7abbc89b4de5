"""Plots of train_lm.py: the curves of one run, and `python examples/plot_lm.py runs/*/log.jsonl --out curves.png` for several.

The comparison draws every run's training loss, and below it gqa - sdpa of each seed beside how far apart the seeds are."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

Row = dict[str, Any]
Runs = dict[tuple[str, int], list[Row]]
COLOURS = {"gqa": "#d95f02", "sdpa": "#1b6ca8"}


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
    figure, (losses, differences) = pyplot.subplots(2, 1, figsize=(8, 6.5), sharex=True, height_ratios=(3, 2), layout="constrained")
    _draw_losses(losses, runs)
    _draw_differences(differences, runs)
    differences.set_xlabel("step")
    _write(figure, png)


def _draw_losses(axes, runs: Runs) -> None:
    for number, ((attention, _), rows) in enumerate(runs.items()):
        style = {"color": COLOURS.get(attention), "linestyle": "--" if attention == "sdpa" else "-"}
        axes.plot(*column(rows, "loss"), linewidth=1, alpha=0.7, **style)
        first = all(other[0] != attention for other in list(runs)[:number])
        axes.plot(*column(rows, "val_loss"), marker="o", markersize=4, label=attention if first else None, **style)
    axes.set(ylabel="loss, nats a byte")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, title="thin: training, dots: validation")


def _draw_differences(axes, runs: Runs) -> None:
    baseline = [dict(zip(*column(rows, "loss"), strict=True)) for (attention, _), rows in runs.items() if attention == "sdpa"]
    steps = sorted(set.intersection(*map(set, baseline))) if baseline else []
    half = [(max(run[step] for run in baseline) - min(run[step] for run in baseline)) / 2 for step in steps]
    axes.fill_between(
        steps, [-h for h in half], half, color=COLOURS["sdpa"], alpha=0.15, linewidth=0, label="± half the range of sdpa's seeds"
    )
    for (attention, seed), rows in runs.items():
        if attention == "gqa" and ("sdpa", seed) in runs:
            other = dict(zip(*column(runs["sdpa", seed], "loss"), strict=True))
            gaps = [(step, loss - other[step]) for step, loss in zip(*column(rows, "loss"), strict=True) if step in other]
            axes.plot(*zip(*gaps, strict=True), linewidth=1, label=f"gqa - sdpa, seed {seed}")
    axes.set(ylabel="difference in training loss")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, ncols=2)


def _write(figure, png: Path) -> None:
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=110)
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
