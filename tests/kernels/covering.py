"""A small set of combinations in which every pair of values of two axes occurs, chosen by code."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Choice = Mapping[str, Any]
Pair = tuple[str, Any, str, Any]


def pairs(choice: Choice) -> set[Pair]:
    """The pairs of axis values that one combination shows."""
    return {(a, x, b, y) for (a, x), (b, y) in itertools.combinations(choice.items(), 2)}


def cover(axes: Mapping[str, Sequence], allowed: Callable[[Choice], bool] = lambda choice: True) -> list[dict[str, Any]]:
    """Combinations of `axes` in which every pair occurs that any allowed combination has; always the same ones.

    Greedy: of some random allowed combinations around a pair that is still missing, the one that shows most missing pairs is taken."""
    generator = random.Random(0)
    missing = _possible(axes, allowed, generator)
    chosen = []
    while missing:
        wanted = min(missing, key=repr)
        candidates = [c for c in (_random(axes, generator, wanted) for _ in range(60)) if allowed(c)]
        if candidates:
            best = max(candidates, key=lambda c: len(pairs(c) & missing))
            chosen.append(best)
            missing -= pairs(best)
    return chosen


def _random(axes: Mapping[str, Sequence], generator: random.Random, fixed: Pair | None = None) -> dict[str, Any]:
    choice = {name: generator.choice(values) for name, values in axes.items()}
    if fixed is not None:
        choice[fixed[0]], choice[fixed[2]] = fixed[1], fixed[3]
    return choice


def _possible(axes: Mapping[str, Sequence], allowed: Callable[[Choice], bool], generator: random.Random) -> set[Pair]:
    """Every pair for which some allowed combination was found; what two axes forbid is not asked for."""
    found = set()
    for (a, xs), (b, ys) in itertools.combinations(axes.items(), 2):
        for x, y in itertools.product(xs, ys):
            if any(allowed(_random(axes, generator, (a, x, b, y))) for _ in range(60)):
                found.add((a, x, b, y))
    return found
