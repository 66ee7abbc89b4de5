"""Every kernel in the emulator: a covering set of configurations, cases and schedules, or with --nightly all of them.

The emulator itself fails a kernel that races, deadlocks, reads what nobody wrote or leaves its arguments, in whatever schedule."""

import itertools

import catalogue
import pytest
import torch
from covering import cover

from gqa_autograd.testing import Case
from gqa_autograd.testing_varlen import PackedCase

tilelang = pytest.importorskip("tilelang", reason="no tilelang here: the kernels were not emulated")
import emulation  # noqa: E402, needs tilelang
from emulation import Backward, Machine, emulated  # noqa: E402

from gqa_autograd.kernels.forward_tiles import GROUPS  # noqa: E402


def scattered(N: int, *lengths: int) -> tuple[int, ...]:
    """N lengths: those given as far apart as they can be, the first and the last at the ends, and 0 between them."""
    places = {round(n * (N - 1) / (len(lengths) - 1)): length for n, length in enumerate(lengths)}
    return tuple(places.get(n, 0) for n in range(N))


# One row, cut tiles, whole tiles, many tiles, queries that see no key, and both kinds of rectangle
LENGTHS = ((1, 1), (128, 128), (64, 300), (200, 333), (333, 200), (1, 257), (130, 20), (257, 64))
# Split: one key block, so that most parts have none, and up to a dozen for the same parts
SPLIT_LENGTHS = ((1, 1), (1, 1300), (128, 512), (200, 333), (130, 20), (257, 64))
# Lengths of q and of k and v: around the tile sizes; empty first, last and between; without keys; without sequences; as many sequences as
# groups, one more, and several to a group
PACKINGS = {
    "token": ((1,), (1,)),
    "one": ((300,), (420,)),
    "around": ((127, 128, 129, 193, 256, 1, 192), (129, 256, 128, 127, 1, 191, 193)),
    "empty": ((0, 50, 0, 0, 177, 0), (20, 161, 0, 5, 90, 0)),
    "no-keys": ((40, 131, 70, 9), (0, 200, 0, 0)),
    "no-key-at-all": ((40, 3), (0, 0)),
    "none": ((), ()),
    "five": ((3, 130, 64, 0, 17), (200, 131, 5, 33, 17)),
    "groups": (scattered(GROUPS, 3, 130, 2, 1), (7,) * GROUPS),
    "groups+1": (scattered(GROUPS + 1, 1, 129, 2, 40, 5), scattered(GROUPS + 1, 150, 1, 2, 41, 7)),
    "300": (tuple(n % 7 // 5 * n % 11 for n in range(300)), tuple(n % 13 for n in range(300))),
    "600": (scattered(600, *range(1, 30), 130, 2), scattered(600, 200, *range(1, 31))),
}
HEADS = ((1, 1), (2, 2), (4, 2), (3, 1))
SCHEDULES = ("eager", "lazy", 1, 2)
MACHINES = {"multiprocessors": (1, 3, 100), "slot": (0, -1)}
SHARED = {"H": HEADS, "scale": (None, -0.3, 0.0), "schedule": SCHEDULES}
DENSE = SHARED | {"B": (1, 2), "layout": ("bshd", "bhsd", "fused")}
# Of a kernel for windows; the others have none
WINDOWS = {"window": (None, (-1, 5), (63, -1), (17, 5), (0, 0), (128, 0), (300, 200))}
PACKED = {"layout": ("thd", "htd", "fused"), "tails": ((0, 0), (70, 141)), "spoiled": ("nothing", "even", "odd")}
WAITING = {"one_head_at_a_time": (False, True), "deterministic": (False, True)}
FORMS = {
    "forward": "dense",
    "backward": "dense",
    "split": "split",
    "backward_split": "split",
    "packed": "packed",
    "backward_packed": "packed",
}
# Of a test: its axes, the first the lengths
AXES = {
    "forward": {"S": LENGTHS} | DENSE | WINDOWS | MACHINES,
    "split": {"S": SPLIT_LENGTHS} | DENSE | WINDOWS | MACHINES | {"parts": (2, 3, 5), "lse": (False, True)},
    "packed": {"packing": tuple(PACKINGS)} | SHARED | WINDOWS | MACHINES | PACKED,
    "backward": {"S": LENGTHS} | DENSE | WINDOWS | WAITING | {"dlse": (False, True)},
    "backward_split": {"S": LENGTHS} | DENSE | WINDOWS | WAITING | {"dlse": (False, True), "parts": ((2, 1), (1, 3), (2, 2), (3, 2))},
    "backward_packed": {"packing": tuple(PACKINGS)} | SHARED | WINDOWS | WAITING | PACKED,
}


def allowed(choice) -> bool:
    """Views of one buffer need equal lengths, which tails can give; NaN would be written to a copy of them."""
    if (choice["window"] is None) == (choice["kernel"].tile.mask == "window"):
        return False
    if choice["layout"] != "fused":
        return True
    return choice["spoiled"] == "nothing" if "packing" in choice else choice["S"][0] == choice["S"][1]


def kernels(test: str, found: dict[str, catalogue.Entry]) -> tuple:
    """Those of a test: one form has its own."""
    family = "backward" if test.startswith("backward") else "forward"
    return tuple(entry for entry in found.values() if entry.family == family and entry.tile.form == FORMS[test])


def covering(test: str) -> list[dict]:
    return cover({"kernel": kernels(test, catalogue.representative())} | AXES[test], allowed, alone=("window",))


def everything(test: str) -> list[dict]:
    """Each kernel with all lengths in each schedule, with more seeds; the other axes go round."""
    axes = {"kernel": kernels(test, catalogue.entries())} | AXES[test]
    lengths = next(iter(AXES[test]))
    first = ("kernel", lengths, "schedule")
    axes["schedule"] = ("eager", "lazy", *range(1, 6))
    others = [a for a in axes if a not in first]
    rest = [dict(zip(others, values, strict=True)) for values in itertools.product(*(axes[a] for a in others))]
    turn = itertools.cycle(rest)
    chosen = []
    for values in itertools.product(*(axes[a] for a in first)):
        choice = dict(zip(first, values, strict=True))
        chosen.append(next(c for c in (choice | next(turn) for _ in rest) if allowed(c)))
    return chosen


def formula_of(choice) -> dict:
    """What a case says beside its lengths and heads."""
    tile = choice["kernel"].tile
    options = {"scale": choice["scale"], "dtype": choice["kernel"].dtype, "layout": choice["layout"]}
    options |= {"D_v": tile.D_v} if tile.D_v != tile.D else {}
    options |= {"window": choice["window"]} if tile.mask == "window" else {}
    # Near 0 the cap does nothing, so it is a small one
    return options | {"causal": tile.mask == "causal", "softcap": 2.0 if tile.softcap else 0.0}


def case_of(choice) -> Case:
    return Case(choice["B"], *choice["S"], *choice["H"], choice["kernel"].tile.D, **formula_of(choice))


def packed_case_of(choice) -> PackedCase:
    lengths, tails = PACKINGS[choice["packing"]], list(choice["tails"])
    if choice["layout"] == "fused":
        totals = [sum(own) + tail for own, tail in zip(lengths, tails, strict=True)]
        tails = [tail + max(totals) - total for total, tail in zip(totals, tails, strict=True)]
    options = formula_of(choice) | {"tail_q": tails[0], "tail_kv": tails[1]}
    return PackedCase(*lengths, *choice["H"], choice["kernel"].tile.D, **options)


def name_of(choice) -> str:
    if "packing" in choice:
        # The lengths themselves would be hundreds
        case = str(case_of(choice | {"B": 1, "S": (1, 1)})).replace("B1-q1-kv1", choice["packing"])
    else:
        case = str(case_of(choice))
    axes = ("dlse", "parts", "lse", "tails", "spoiled", "one_head_at_a_time", "deterministic", "schedule", "multiprocessors", "slot")
    rest = [f"{axis}={choice[axis]}" for axis in axes if axis in choice]
    return "-".join([*["lse"] * choice["kernel"].option, case, *rest]).replace(" ", "")


def pytest_generate_tests(metafunc):
    nightly = metafunc.config.getoption("--nightly")
    if "choice" in metafunc.fixturenames:
        test = metafunc.function.__name__.removeprefix("test_")
        choices = everything(test) if nightly else covering(test)
        # Runs of one kernel side by side, since a worker builds a kernel once
        choices.sort(key=lambda c: str(c["kernel"]))
        metafunc.parametrize("choice", choices, ids=name_of)
    if "packed_kernel" in metafunc.fixturenames:
        found = catalogue.entries() if nightly else catalogue.representative()
        test = "packed" if metafunc.function.__name__ == "test_offsets_are_not_trusted" else "backward_packed"
        metafunc.parametrize("packed_kernel", kernels(test, found), ids=str)


def machine(choice) -> Machine:
    return Machine(choice["schedule"], choice["multiprocessors"], choice["slot"])


def test_forward(choice):
    with emulated(machine(choice)):
        emulation.check_forward(choice["kernel"], case_of(choice))


def test_split(choice):
    with emulated(machine(choice)):
        emulation.check_split(choice["kernel"], case_of(choice), choice["lse"], choice["parts"])


def spoiled(choice, case: PackedCase) -> tuple[int, ...] | None:
    which = {"nothing": None, "even": tuple(range(0, len(case.lengths_q), 2)), "odd": tuple(range(1, len(case.lengths_q), 2))}
    return which[choice["spoiled"]]


def test_packed(choice):
    case = packed_case_of(choice)
    with emulated(machine(choice)):
        emulation.check_packed(choice["kernel"], case, spoiled(choice, case))


FAR = 2**31 - 1
NONSENSE = {
    "decreasing": ([200, 120, 60, 0], [300, 170, 30, 0]),
    "negative": ([-5, 40, -130, 100], [-300, -1, 250, -7]),
    "beyond the end": ([0, 90, 350, 999], [10, 290, 310, 10**6]),
    "first not 0": ([150, 170, 180, 190], [100, 100, 299, 299]),
    "extremes": ([-FAR - 1, FAR, -FAR - 1, FAR], [FAR, -FAR - 1, FAR, -FAR - 1]),
    "each the whole": ([0, FAR, 0, FAR], [0, FAR, -FAR, FAR]),
}


@pytest.mark.parametrize("offsets", NONSENSE.values(), ids=NONSENSE)
def test_offsets_are_not_trusted(packed_kernel, offsets):
    """The host cannot see them: whatever they hold, no row outside the tensors is read or written, and the launch ends."""
    case = PackedCase((200,), (300,), 2, 1, packed_kernel.tile.D, dtype=packed_kernel.dtype, D_v=packed_kernel.tile.D_v)
    q, k, v, *_ = emulation.packed_truth(case)[0]
    offsets = (torch.tensor(o, dtype=torch.int32) for o in offsets)
    with emulated(Machine("lazy", 2)), torch.no_grad():
        emulation.attend_packed(packed_kernel.tile, q, k, v, *offsets, case, packed_kernel.option)


def how(choice) -> Backward:
    return Backward(choice.get("parts", (1, 1)), choice["one_head_at_a_time"], choice["deterministic"])


def test_backward(choice):
    with emulated(Machine(choice["schedule"])):
        emulation.check_backward(choice["kernel"], case_of(choice), choice["dlse"], how(choice))


def test_backward_split(choice):
    with emulated(Machine(choice["schedule"])):
        emulation.check_backward(choice["kernel"], case_of(choice), choice["dlse"], how(choice))


def test_backward_packed(choice):
    case = packed_case_of(choice)
    with emulated(Machine(choice["schedule"])):
        emulation.check_backward_packed(choice["kernel"], case, how(choice), spoiled(choice, case))


@pytest.mark.parametrize("offsets", NONSENSE.values(), ids=NONSENSE)
def test_offsets_of_a_backward_are_not_trusted(packed_kernel, offsets):
    """The same of gradients; sequences that share tokens wait for each other's sums, and must not wait for ever."""
    case = PackedCase((200,), (300,), 2, 1, packed_kernel.tile.D, dtype=packed_kernel.dtype, D_v=packed_kernel.tile.D_v)
    args, _, exact = emulation.packed_truth(case)
    given = (*args[:4], *(torch.tensor(o, dtype=torch.int32) for o in offsets))
    out, lse = exact.out.to(args[0].dtype), exact.lse.float()
    for deterministic in (False, True):
        with emulated(Machine("lazy")), torch.no_grad():
            emulation.differentiate_packed(packed_kernel.tile, case, given, out, lse, None, Backward(deterministic=deterministic))
