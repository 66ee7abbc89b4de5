"""A bar on a terminal, if tqdm is installed; plain lines otherwise."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def tracked(items: Sequence[Item], unit: str) -> tuple[Iterator[Item], Callable[[str], None]]:
    """The items with their progress shown, and a print that doesn't disturb it."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _numbered(items, unit), lambda line: print(line, flush=True)
    # None: no bar where the output is no terminal
    return iter(tqdm(items, unit=unit, disable=None)), lambda line: tqdm.write(line)


def _numbered(items: Sequence[Item], unit: str) -> Iterator[Item]:
    for number, item in enumerate(items, 1):
        print(f"{unit} {number} of {len(items)}", flush=True)
        yield item
