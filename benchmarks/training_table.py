"""The tables of docs/training.md, from the rows of benchmarks.training: `python -m benchmarks.training_table`, with --write into the page.

A test holds the page to what this prints, with rows and without."""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from .rows import Row
from .table import LABELS, RESULTS, grid

NAME = "training_speed.jsonl"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "training.md"
BEGIN, END = "<!-- made by benchmarks.training_table -->\n", "<!-- end -->"
LENGTHS = (2048, 8192, 32768)
CONTESTANTS = ("ours", "cudnn", "flex")
RECIPES = ("none", "full", "selective", "budget")
CHECKPOINTED = (8192, 32768)
MISSING = "no row"


def read(results: Path) -> list[Row]:
    path = results / NAME
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def most(rows: list[Row], key: Callable[[Row], str]) -> list[Row]:
    """The rows of the run with the most values of the key; of equal ones the newest."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["run"], []).append(row)
    found: list[Row] = []
    for mine in runs.values():
        if len(set(map(key, mine))) >= len(set(map(key, found))):
            found = mine
    return found


def middle(rows: list[Row], field: str) -> float:
    return statistics.median(row[field] for row in rows)


def spread(groups: Sequence[list[Row]]) -> float:
    """How far the runs of one contestant lie apart, as a part of their median; the worst of them."""
    speeds = [[row["tokens_per_s"] for row in group] for group in groups if group]
    return max((max(mine) - min(mine)) / statistics.median(mine) for mine in speeds)


def told(rows: list[Row], groups: Sequence[list[Row]]) -> str:
    """What holds for a table, as a line below it."""

    def several(values: Sequence[object]) -> str:
        return ", ".join(dict.fromkeys(map(str, values)))

    case, counts = rows[0]["case"], sorted({len(group) for group in groups if group})
    runs = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    gpu, torch = rows[0]["gpu"].removeprefix("NVIDIA "), several([row["torch"] for row in rows])
    return (
        f"{gpu}, torch {torch}, bf16, {case['weights'] / 1e6:.0f} M weights: {case['layers']} layers of {case['dim']}, "
        f"{case['H_q']}/{case['H_kv']} heads, D {case['D']}; medians of {runs} runs, at most {spread(groups):.1%} apart; "
        f"commit {several([row['commit'] for row in rows])}."
    )


def speeds(rows: list[Row]) -> str:
    """tokens/s and MFU of each attention, a line a length."""
    lines, groups, used = [], [], []
    for S in LENGTHS:
        mine = most([r for r in rows if r["case"]["S"] == S and r["case"]["checkpointing"] == "none"], lambda row: row["contestant"])
        of = {who: [row for row in mine if row["contestant"] == who] for who in CONTESTANTS}
        used += mine
        groups += list(of.values())
        cells = (f"{middle(g, 'tokens_per_s'):,.0f}, {middle(g, 'mfu'):.1%}" if g else MISSING for g in of.values())
        lines.append((f"{mine[0]['case']['batch']} x {S}" if mine else f"S {S}", *cells))
    if not used:
        return f"There are no rows in {NAME} yet, so there is no table of speeds."
    return f"{grid(('tokens/s, MFU', *(LABELS[who] for who in CONTESTANTS)), lines)}\n\n{told(used, groups)}"


def recipes(rows: list[Row]) -> str:
    """Memory and speed of ours by recipe, a line each."""
    of: dict[int, dict[str, list[Row]]] = {}
    for S in CHECKPOINTED:
        mine = most([r for r in rows if r["case"]["S"] == S and r["contestant"] == "ours"], lambda row: row["case"]["checkpointing"])
        of[S] = {recipe: [row for row in mine if row["case"]["checkpointing"] == recipe] for recipe in RECIPES}
    if not any(group for found in of.values() for recipe, group in found.items() if recipe != "none"):
        return f"There are no rows of recipes in {NAME} yet, so there is no table of them."

    def cell(S: int, recipe: str) -> str:
        group, plain = of[S][recipe], of[S]["none"]
        if not group:
            return MISSING
        speed = middle(group, "tokens_per_s")
        relative = f" ({speed / middle(plain, 'tokens_per_s'):.2f})" if plain else ""
        forwards = group[0]["attention_calls"]["forward"] / group[0]["case"]["layers"]
        return f"{middle(group, 'peak_gb'):.1f} GB, {speed:,.0f}{relative}, {forwards:g}"

    def label(recipe: str) -> str:
        budgets = dict.fromkeys(f" {row['case']['budget']:g}" for S in of for row in of[S][recipe] if "budget" in row["case"])
        return recipe + ",".join(budgets)

    lines = [(label(recipe), *(cell(S, recipe) for S in CHECKPOINTED)) for recipe in RECIPES]
    used = [row for found in of.values() for group in found.values() for row in group]
    head = ("peak memory, tokens/s (to none), forwards of attention a block and step", *(f"S {S}" for S in CHECKPOINTED))
    return f"{grid(head, lines)}\n\n{told(used, [group for found in of.values() for group in found.values()])}"


def text(results: Path = RESULTS) -> str:
    rows = read(results)
    return f"{speeds(rows)}\n\n{recipes(rows)}\n"


def placed(page: str, tables: str) -> str:
    """The page with these tables between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, f"the page has no {BEGIN.strip()} ... {END}"
    return f"{before}{BEGIN}{tables}{END}{after}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training_table", description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/training.md")
    if parser.parse_args().write:
        PAGE.write_text(placed(PAGE.read_text(encoding="utf-8"), text()), encoding="utf-8")
    else:
        print(text(), end="")
