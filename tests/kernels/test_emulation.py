"""Every kernel in the emulator: a covering set of configurations, cases and schedules, or with --nightly all of them.

The emulator itself fails a kernel that races, deadlocks, reads what nobody wrote or leaves its arguments, in whatever schedule."""

import itertools

import catalogue
import pytest
from covering import cover

from gqa_autograd.kernels import config
from gqa_autograd.testing import Case

tilelang = pytest.importorskip("tilelang", reason="no tilelang here: the kernels were not emulated")
import emulation  # noqa: E402, needs tilelang
from emulation import Machine, emulated  # noqa: E402

# One row, cut tiles, whole tiles, many tiles, queries that see no key, and both kinds of rectangle
LENGTHS = ((1, 1), (128, 128), (64, 300), (200, 333), (333, 200), (1, 257), (130, 20), (257, 64))
HEADS = ((1, 1), (2, 2), (4, 2), (3, 1))
SCHEDULES = ("eager", "lazy", 1, 2)
SHARED = {
    "S": LENGTHS,
    "H": HEADS,
    "B": (1, 2),
    "layout": ("bshd", "bhsd", "fused"),
    "scale": (None, -0.3, 0.0),
    "schedule": SCHEDULES,
}
WINDOWS = ((-1, 5), (63, -1), (17, 5), (0, 0), (128, 0), (300, 200))
AXES = {
    "forward": SHARED | {"window": WINDOWS, "multiprocessors": (1, 3, 100), "slot": (0, -1)},
    "backward": SHARED | {"dlse": (False, True)},
}


def allowed(choice) -> bool:
    """Views of one buffer need equal lengths."""
    return choice["layout"] != "fused" or choice["S"][0] == choice["S"][1]


def kernels(family: str, found: dict[str, catalogue.Entry]) -> tuple:
    return tuple(entry for entry in found.values() if entry.family == family)


def covering(family: str) -> list[dict]:
    return cover({"kernel": kernels(family, catalogue.representative())} | AXES[family], allowed)


def everything(family: str) -> list[dict]:
    """Each kernel with each pair of lengths in each schedule, with more seeds; the other axes go round."""
    axes = {"kernel": kernels(family, catalogue.entries())} | AXES[family]
    first = ("kernel", "S", "schedule")
    axes["schedule"] = ("eager", "lazy", *range(1, 6))
    others = [a for a in axes if a not in first]
    rest = [dict(zip(others, values, strict=True)) for values in itertools.product(*(axes[a] for a in others))]
    turn = itertools.cycle(rest)
    chosen = []
    for values in itertools.product(*(axes[a] for a in first)):
        choice = dict(zip(first, values, strict=True))
        chosen.append(next(c for c in (choice | next(turn) for _ in rest) if allowed(c)))
    return chosen


def case_of(choice) -> Case:
    tile = choice["kernel"].tile
    options = {"scale": choice["scale"], "dtype": choice["kernel"].dtype, "layout": choice["layout"]}
    if isinstance(tile, config.Backward):
        return Case(choice["B"], *choice["S"], *choice["H"], tile.D, tile.causal, **options)
    options |= {"D_v": tile.D_v} if tile.D_v != tile.D else {}
    options |= {"window": choice["window"]} if tile.mask == "window" else {}
    # Near 0 the cap does nothing, so it is a small one
    return Case(choice["B"], *choice["S"], *choice["H"], tile.D, tile.mask == "causal", softcap=2.0 if tile.softcap else 0.0, **options)


def name_of(choice) -> str:
    rest = [f"{axis}={choice[axis]}" for axis in ("dlse", "schedule", "multiprocessors", "slot") if axis in choice]
    return "-".join([*["lse"] * choice["kernel"].option, str(case_of(choice)), *rest])


def pytest_generate_tests(metafunc):
    if "choice" in metafunc.fixturenames:
        family = metafunc.function.__name__.removeprefix("test_")
        choices = everything(family) if metafunc.config.getoption("--nightly") else covering(family)
        # Runs of one kernel side by side, since a worker builds a kernel once
        choices.sort(key=lambda c: str(c["kernel"]))
        metafunc.parametrize("choice", choices, ids=name_of)


def test_forward(choice):
    with emulated(Machine(choice["schedule"], choice["multiprocessors"], choice["slot"])):
        emulation.check_forward(choice["kernel"], case_of(choice))


def test_backward(choice):
    with emulated(Machine(choice["schedule"])):
        emulation.check_backward(choice["kernel"], case_of(choice), choice["dlse"])
