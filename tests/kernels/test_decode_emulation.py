"""Decoding in the emulator: a small covering set of cases, masks and schedules, or with --nightly every kernel with all lengths.

The emulator itself fails a kernel that races, deadlocks, reads what nobody wrote, leaves its arguments, or waits for ever."""

import itertools
import re

import catalogue
import pytest
import torch
from covering import cover

from gqa_autograd import testing_decode
from gqa_autograd.testing_decode import DecodeCase

tilelang = pytest.importorskip("tilelang", reason="no tilelang here: the kernels were not emulated")
import emulation  # noqa: E402, needs tilelang
import emulation_decode  # noqa: E402
from emulation import Machine  # noqa: E402

from hopper_emulator import EmulationError  # noqa: E402

# Of sequences: one key; a whole tile; some empty, one in several blocks; more sequences than a warp has lanes
LENGTHS = ((1,), (64, 128), (0, 700, 63), (1000, 0, 2, 130), tuple(7 * n % 90 for n in range(40)))
MASKS = (("causal", (-1, -1)), ("full", (-1, -1)), ("causal", (40, -1)), ("full", (17, 5)))
AXES = {
    "lengths": LENGTHS,
    "S_q": (1, 2, 33, 64),
    "H": ((4, 4), (7, 1), (12, 2), (71, 1)),
    "mask": MASKS,
    "scale": (None, -0.3, 0.0),
    "spare": (0, 37),
    "layout": ("bshd", "bhsd", "fused"),
    "multiprocessors": (1, 3, 60),
    "schedule": ("eager", "lazy", 1, 2),
    "lse": (True, False),
}
PAGES = {"dense": (None,), "paged": (64, 128, 256), "small": (16, 32)}


def allowed(choice) -> bool:
    """The emulator takes a second for some thirty tiles of rows."""
    rows = choice["S_q"] * choice["H"][0] * len(choice["lengths"])
    return rows <= (2500 if len(choice["lengths"]) < 40 else 500)


def case_of(entry: catalogue.Entry, choice, page: int | None) -> DecodeCase:
    kind, window = choice["mask"]
    tile, lengths = entry.tile, choice["lengths"]
    return DecodeCase(
        *(choice["S_q"], lengths, *choice["H"], tile.D, page, max(lengths) + choice["spare"], kind == "causal", window),
        # Near 0 the cap does nothing, so it is a small one
        *(2.0 if tile.softcap else 0.0, choice["scale"], entry.dtype, choice["layout"]),
    )


def kernels(found) -> list[catalogue.Entry]:
    return [entry for entry in found.values() if entry.family == "decode"]


def covering() -> list[tuple]:
    """Pairs of all axes; kernels and page sizes go round."""
    turn = itertools.cycle(kernels(catalogue.representative()))
    pages = {form: itertools.cycle(sizes) for form, sizes in PAGES.items()}
    return [(entry, choice, next(pages[entry.tile.form])) for choice in cover(AXES, allowed) for entry in (next(turn),)]


def everything() -> list[tuple]:
    """Each kernel with all lengths, page sizes and schedules; the other axes go round."""
    others = [axis for axis in AXES if axis not in ("lengths", "schedule")]
    turn = itertools.cycle(itertools.product(*(AXES[axis] for axis in others)))
    chosen = []
    for entry in kernels(catalogue.entries()):
        for page, lengths, schedule in itertools.product(PAGES[entry.tile.form], LENGTHS, AXES["schedule"]):
            fixed = {"lengths": lengths, "schedule": schedule}
            choice = next(c for c in (dict(zip(others, rest, strict=True)) | fixed for rest in turn) if allowed(c))
            chosen.append((entry, choice, page))
    return chosen


def name_of(value) -> str:
    entry, choice, page = value
    rest = [f"{axis}={choice[axis]}" for axis in ("multiprocessors", "schedule", "lse")]
    return "-".join([str(case_of(entry, choice, page)), *rest])


def pytest_generate_tests(metafunc):
    nightly = metafunc.config.getoption("--nightly")
    if "chosen" in metafunc.fixturenames:
        choices = everything() if nightly else covering()
        # Runs of one kernel side by side, since a worker builds a kernel once
        choices.sort(key=lambda c: str(c[0]))
        metafunc.parametrize("chosen", choices, ids=name_of)


def test_decode(chosen):
    entry, choice, page = chosen
    machine = Machine(choice["schedule"], choice["multiprocessors"])
    emulation_decode.check(emulation_decode.made(case_of(entry, choice, page)), machine, choice["lse"])


def test_daily_choice_is_small_and_whole():
    chosen = covering()
    assert len(chosen) <= 30
    assert {str(entry) for entry, _, _ in chosen} == {str(entry) for entry in kernels(catalogue.representative())}
    assert {(axis, choice[axis]) for _, choice, _ in chosen for axis in AXES} == {(a, x) for a, values in AXES.items() for x in values}


SMALL, DENSE = "decode-d128-small-bfloat16", "decode-d128-dense-bfloat16"
FAR = 2**31 - 1
NONSENSE = {
    "lengths beyond the cache": ([FAR, 500, 257], None),
    "negative lengths": ([-1, -FAR - 1, 100], None),
    "pages that are not there": ([200, 256, 100], [[-1, 0, 99, 1], [FAR, 2, -FAR - 1, 3], [5, 5, 5, 5]]),
    "no page at all": ([256, 10, 0], [[-1] * 4, [6] * 4, [-1] * 4]),
    "a page of two sequences": ([256, 256, 256], [[0, 1, 2, 3], [0, 1, 2, 3], [3, 2, 1, 0]]),
}


@pytest.mark.parametrize(("lengths", "pages"), NONSENSE.values(), ids=NONSENSE)
@pytest.mark.parametrize("S_page", [16, 64])
def test_lengths_and_pages_are_not_trusted(lengths, pages, S_page):
    """The host cannot see them: what they say is clamped or masked, and nothing outside the tensors is read or written."""
    case = DecodeCase(2, (256, 256, 256), 6, 2, 128, S_page, window=(150, -1))
    given = testing_decode.make(case)
    given = given._replace(
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
        k_cache=given.k_cache[:6].nan_to_num(),
        v_cache=given.v_cache[:6].nan_to_num(),
        page_table=torch.tensor(pages or [[0, 1, 2, 3]] * 3, dtype=torch.int32),
    )
    with emulation_decode.emulated(Machine("lazy", 2)), torch.no_grad():
        out, lse = emulation_decode.decode(given)
    wanted, wanted_lse = testing_decode.exact(given)
    assert (out - wanted).abs().max() < 2e-2
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)


# In the CUDA of a kernel, what the pattern finds for the nth time becomes `instead`; the emulator calls that `kind`, or the result is wrong
DEFECTS = {
    "the last buffer of V is not cleared": (DENSE, r"gqa::clear_rows\([^;]*;", ";", 0, None),
    "nobody waits for V": (DENSE, r"v_full\[\(ring & 1\)\]\.wait[^;]*;", ";", 0, "unwaited"),
    "V is given back too early": (DENSE, r"v_empty\[[^;]*\.wait\([^;]*;", ";", 0, "overwrite"),
    "a warp gives nothing back": (DENSE, r"k_empty\[0\]\.init\(4\)", "k_empty[0].init(5)", 0, "deadlock"),
    "queries are read before they are there": (DENSE, r"tl::__sync_thread_partial\(3, 128\);", ";", 1, "race"),
    "no fence behind the queries": (DENSE, r"tl::fence_proxy_async\(\);", ";", 0, "proxy fence"),
    "the mask is never applied": (DENSE, r"\(unseen < \(key0_1 \+ 64\)\)", "false", None, None),
    "the counter stays": (DENSE, r"if \(\*last\) counters\[first\] = 0;", ";", 0, None),
    "one part too few": (DENSE, r"last - begin \+ 1", "last - begin", 0, None),
    "the next sequence keeps the length": (DENSE, r"enter<block_N>\(at, lengths, at\[2\] \+ 1, capacity, reach\);", "++at[2];", 0, None),
    "absent pages are not masked": (SMALL, r"if \(absent_1 != 0\)", "if (false)", 0, None),
    "absent pages are read": (SMALL, r"page >= 0 && page < pages", "true", 0, None),
    "nobody waits for the other lanes": (SMALL, r"__syncwarp\(\);", ";", 0, "race"),
}


def planted(name: str, pattern: str, instead: str, nth: int | None) -> emulation.Emulator:
    def patch(source: str) -> str:
        found = list(re.finditer(pattern, source))
        assert len(found) > (nth or 0), f"the kernel has changed: {pattern} is not in it"
        for match in reversed(found) if nth is None else [found[nth]]:
            source = source[: match.start()] + instead + "\n" * match[0].count("\n") + source[match.end() :]
        return source

    return emulation.patched(catalogue.entries()[name], patch)


def check_with_a_hole(name: str, other: emulation.Emulator | None) -> None:
    page = 16 if name == SMALL else None
    given = testing_decode.make(DecodeCase(2, (700, 63, 250), 6, 2, 128, page, 720))
    if page:
        given.page_table[0, 3] = -5
        # Beyond the length of the second sequence
        given.page_table[1, 6] = 2**20
    with emulation_decode.emulated(Machine("lazy", 3), other) as counters, torch.no_grad():
        out, lse = emulation_decode.decode(given)
        assert not bool(counters.any()), "counters are not 0 after the launch"
    wanted, wanted_lse = testing_decode.exact(given)
    assert (out - wanted).abs().max() < 2e-2
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [DENSE, SMALL])
def test_the_kernels_without_a_defect_are_right(name):
    check_with_a_hole(name, None)


@pytest.mark.parametrize("defect", DEFECTS.values(), ids=[name.replace(" ", "-") for name in DEFECTS])
def test_defect_is_caught(defect):
    name, pattern, instead, nth, kind = defect
    other = planted(name, pattern, instead, nth)
    with pytest.raises(EmulationError if kind else (AssertionError, EmulationError)) as caught:
        check_with_a_hole(name, other)
    if kind:
        assert caught.value.kind == kind
