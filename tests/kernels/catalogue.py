"""Every kernel that `config` offers, by a readable name, and the code that TileLang generates for it."""

import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from covering import cover

from gqa_autograd.kernels import config
from hopper_emulator import Code, lower
from hopper_emulator.build import cache_folder

DTYPES = (torch.bfloat16, torch.float16)
KERNELS = Path(config.__file__).parent


class Entry(NamedTuple):
    """One kernel: family (forward, combine; decode, append; backward, preprocess, postprocess, merge), tile, dtype, and has it the family's
    option (LSE, dLSE, pages)?"""

    family: str
    tile: config.Forward | config.Backward | config.Decode
    dtype: torch.dtype
    option: bool

    @property
    def program(self):
        from gqa_autograd.kernels import backward_launch, cache, decode_launch, forward_launch

        if self.family == "append":
            return cache.program(self.dtype, self.option)
        if self.family == "decode":
            return decode_launch.program(self.tile, self.dtype)
        if self.family == "forward":
            return forward_launch.program(self.tile, self.dtype, self.option)
        if self.family == "combine":
            return forward_launch.combine_program(self.tile.D_v, self.dtype, self.option)
        return getattr(backward_launch.programs(self.tile, self.dtype, self.option), STAGES[self.family])

    def __str__(self) -> str:
        tile = self.tile
        if self.family == "append":
            return "-".join([self.family, str(self.dtype).removeprefix("torch."), *["paged"] * self.option])
        if self.family == "decode":
            return "-".join(["decode", f"d{tile.D}", *["softcap"] * tile.softcap, tile.form, str(self.dtype).removeprefix("torch.")])
        # dQ has no D_v
        parts = [self.family, f"d{tile.D}"] + [f"dv{tile.D_v}"] * (tile.D_v != tile.D and self.family != "postprocess")
        if self.family in ("forward", "backward"):
            parts += [tile.mask] + ["softcap"] * tile.softcap + [tile.form] * (tile.form != "dense")
        elif self.family != "combine":
            parts += [tile.form] * (tile.form == "packed") + [f"m{tile.block_M}"] * (self.family != "merge" and tile.D == 64)
        option = {"forward": "lse", "combine": "lse", "preprocess": "dlse"}.get(self.family)
        return "-".join([*parts, str(self.dtype).removeprefix("torch."), *[option] * self.option])


# The families of a backward and the fields of its programs
STAGES = {"backward": "main", "preprocess": "preprocess", "postprocess": "postprocess", "merge": "combine"}


def entries() -> dict[str, Entry]:
    """All of them, each once: of kernels that one configuration shares with another, the first. Parts of a split forward always have
    their LSE."""
    found = [
        Entry("forward", tile, dtype, lse)
        for tile in config.FORWARD.values()
        for dtype in DTYPES
        for lse in ((False, True) if tile.form != "split" else (True,))
    ]
    for tile in {D_v: config.FORWARD[D_v, D_v, "causal", False, "split"] for _, D_v in config.D_FORWARD}.values():
        found += [Entry("combine", tile, dtype, lse) for dtype in DTYPES for lse in (False, True)]
    for tile, dtype in itertools.product(config.BACKWARD.values(), DTYPES):
        found += [Entry("backward", tile, dtype, False), Entry("postprocess", tile, dtype, False)]
        found += [Entry("preprocess", tile, dtype, dlse) for dlse in (False, True)]
        found += [Entry("merge", tile, dtype, False)] * (tile.form == "split")
    # Any size: the tile says nothing of it
    found += [Entry("append", next(iter(config.FORWARD.values())), dtype, paged) for dtype in DTYPES for paged in (False, True)]
    found += [Entry("decode", tile, dtype, False) for tile, dtype in itertools.product(config.DECODE.values(), DTYPES)]
    unique: dict[str, Entry] = {}
    for entry in found:
        unique.setdefault(str(entry), entry)
    return unique


def axes(entry: Entry) -> dict[str, Any]:
    """What is static in a kernel, by name. The mask is none of the axes where the kernel doesn't depend on it."""
    tile = entry.tile
    if entry.family == "decode":
        return {"dtype": entry.dtype, "D": tile.D, "softcap": tile.softcap, "form": tile.form}
    found = {"dtype": entry.dtype, "option": entry.option, "sizes": (tile.D, tile.D_v), "block_M": tile.block_M}
    if entry.family in ("forward", "backward"):
        return found | {"mask": tile.mask, "softcap": tile.softcap, "form": tile.form}
    return found | ({"packed": tile.form == "packed"} if entry.family in ("preprocess", "postprocess") else {})


@functools.cache
def representative() -> dict[str, Entry]:
    """Of each family a few kernels: what the daily tests lower, compile and emulate. Of the main kernels' switches each two values meet;
    each head size and tile occurs, and so does each value of the small kernels' axes."""
    chosen = {}
    for family in dict.fromkeys(entry.family for entry in entries().values()):
        kernels = [(axes(entry), entry) for entry in entries().values() if entry.family == family]
        values = {axis: tuple(dict.fromkeys(a[axis] for a, _ in kernels)) for axis in kernels[0][0]}
        alone = ("sizes", "block_M") if family in ("forward", "backward") else tuple(values)
        wanted = cover(values, lambda choice, known=[a for a, _ in kernels]: choice in known, alone)
        chosen |= {str(entry): entry for found, entry in kernels if found in wanted}
    return chosen


def chosen(config: pytest.Config) -> dict[str, Entry]:
    """All kernels with --nightly, else the representative ones."""
    return entries() if config.getoption("--nightly") else representative()


def _sources() -> str:
    """The text that the code depends on: the kernels' files, TileLang's version, and how we lower."""
    # The tile itself is part of the key, the other tiles are not
    files = [*(file for file in sorted(KERNELS.glob("*.py")) if file.name != "config.py"), Path(inspect.getfile(lower))]
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    return hashlib.sha256(f"{importlib.metadata.version('tilelang')}{text}".encode()).hexdigest()


# Read with the modules themselves: a file edited later is not what this process lowers
SOURCES = _sources() if importlib.util.find_spec("tilelang") else ""


@functools.cache
def code(entry: Entry) -> Code:
    """Lowered once per state of the kernels' sources, since lowering takes seconds: the gates and the emulator share it."""
    file = cache_folder() / f"code-{hashlib.sha256(f'{entry}{entry.tile}{SOURCES}'.encode()).hexdigest()[:16]}.json"
    if file.exists():
        return Code(**json.loads(file.read_text(encoding="utf-8")))
    program = entry.program
    made = lower(program.factory, *program.configuration)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(made._asdict()), encoding="utf-8")
    aside.rename(file)
    return made
