"""A small set of combinations in which every pair of values of two axes occurs, chosen by code."""

import itertools
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

Choice = Mapping[str, Any]
Pair = tuple[str, Any, str, Any]


def meetings(axes: Iterable[str], alone: Collection[str] = ()) -> list[tuple[str, str]]:
    """Every two axes; those in `alone` with themselves only."""
    return [*((a, a) for a in alone), *itertools.combinations((a for a in axes if a not in alone), 2)]


def pairs(choice: Choice, alone: Collection[str] = ()) -> set[Pair]:
    """The pairs of axis values that one combination shows."""
    return {(a, choice[a], b, choice[b]) for a, b in meetings(choice, alone)}


def cover(
    axes: Mapping[str, Sequence], allowed: Callable[[Choice], bool] = lambda choice: True, alone: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Combinations of `axes` in which every pair occurs that any allowed combination has, of the axes in `alone` every value; always the
    same ones.

    Greedy: of some random allowed combinations around a pair that is still missing, the one that shows most missing pairs is taken."""
    generator = random.Random(0)
    missing = _possible(axes, allowed, alone, generator)
    chosen = []
    while missing:
        wanted = min(missing, key=repr)
        candidates = [c for c in (_random(axes, generator, wanted) for _ in range(60)) if allowed(c)]
        if candidates:
            best = max(candidates, key=lambda c: len(pairs(c, alone) & missing))
            chosen.append(best)
            missing -= pairs(best, alone)
    return chosen


def _random(axes: Mapping[str, Sequence], generator: random.Random, fixed: Pair | None = None) -> dict[str, Any]:
    choice = {name: generator.choice(values) for name, values in axes.items()}
    if fixed is not None:
        choice[fixed[0]], choice[fixed[2]] = fixed[1], fixed[3]
    return choice


def _possible(
    axes: Mapping[str, Sequence], allowed: Callable[[Choice], bool], alone: Collection[str], generator: random.Random
) -> set[Pair]:
    """Every pair for which some allowed combination was found; what two axes forbid is not asked for."""
    found = set()
    for a, b in meetings(axes, alone):
        for x, y in ((x, x) for x in axes[a]) if a == b else itertools.product(axes[a], axes[b]):
            if any(allowed(_random(axes, generator, (a, x, b, y))) for _ in range(300)):
                found.add((a, x, b, y))
    return found
