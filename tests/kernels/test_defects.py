"""The emulator can fail: defects planted in good kernels, each in one line of the generated CUDA, and each caught for what it is."""

import re
from typing import NamedTuple

import catalogue
import pytest

from gqa_autograd.testing import Case

tilelang = pytest.importorskip("tilelang", reason="no tilelang here: no kernel to plant a defect in")
import emulation  # noqa: E402, needs tilelang
from emulation import Machine, emulated  # noqa: E402

from hopper_emulator import KINDS, EmulationError  # noqa: E402

FORWARD, BACKWARD = "forward-d128-causal-bfloat16-lse", "backward-d64-causal-bfloat16"
# Several tiles for each block, several turns of every ring
CASES = {FORWARD: Case(1, 300, 420, 2, 1, 128, causal=True), BACKWARD: Case(1, 300, 420, 2, 1, 64, causal=True)}
STORE_WAIT = r"tl::tma_store_wait<0, true>\(\);"


class Defect(NamedTuple):
    """In the CUDA of `kernel`, what `pattern` finds for the `nth` time becomes `instead`; the emulator must call that `kind`."""

    name: str
    kernel: str
    pattern: str
    instead: str
    kind: str
    nth: int = 0
    says: str = ""
    schedule: str = "lazy"

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    def patch(self, source: str) -> str:
        found = list(re.finditer(self.pattern, source))
        assert len(found) > self.nth, f"the kernel has changed: {self.pattern} is not in it"
        start, end = found[self.nth].span()
        assert "\n" not in source[start:end]
        return source[:start] + found[self.nth].expand(self.instead) + source[end:]


DEFECTS = [
    Defect("a buffer is never given back", FORWARD, r"k_empty\[.*\]\.arrive\(\);", ";", "deadlock", says="k_empty"),
    Defect("a phase that cannot come", FORWARD, r"q_full\[0\]\.init\(1\)", "q_full[0].init(2)", "deadlock", says="1 of 2 arrivals missing"),
    Defect("a tile is never handed on", FORWARD, r"tile_full\[0\]\.arrive\(\)", "", "deadlock", says="tile_full"),
    Defect(
        "fewer bytes land than announced",
        FORWARD,
        r"(k_full\[.*\]\.arrive_and_expect_tx)\((\d+)\)",
        r"\1(\2 + 16)",
        "deadlock",
        says="16 bytes",
    ),
    Defect(
        "one arrival too many",
        FORWARD,
        r"q_full\[0\]\.expect_transaction\(",
        "q_full[0].arrive_and_expect_tx(",
        "over-arrival",
        says="q_full",
    ),
    Defect(
        "sides of a named barrier disagree",
        FORWARD,
        r"__named_barrier_arrive\(2, 256\)",
        "__named_barrier_arrive(2, 384)",
        "barrier",
        says="384",
    ),
    Defect("a warpgroup arrives twice", FORWARD, r"tl::__named_barrier_arrive\(2, 256\);", r"\g<0> \g<0>", "over-arrival"),
    Defect(
        "a quarter of the output is not staged",
        FORWARD,
        r"(i_\d+) < 8; (.*)(?=\n *tl::ptx_stmatrix)",
        r"\1 < 7; \2",
        "unwritten",
        says="O_",
    ),
    Defect("a wait for the other parity", FORWARD, r"q_full\[0\]\.wait\(\((\w+) & 1\)\)", r"q_full[0].wait(((\1 & 1) ^ 1))", "unwaited"),
    Defect("nobody waits for V", FORWARD, r"v_full\[\(v_last.*\]\.wait\(.*\);", ";", "unwaited", says="V_desc"),
    Defect(
        "a load after the last tile",
        FORWARD,
        r"gqa::last_block_resets\(slot, blocks\);",
        r"k_empty[(done & 1)].wait((((done & 3) >> 1) ^ 1)); k_full[(done & 1)].arrive_and_expect_tx(16384); "
        r"tl::tma_load(K_desc, k_full[(done & 1)], (&(((bfloat16_t*)K_smem)[((done & 1) * 16384)])), 0, 0, 0, 0); \g<0>",
        "unwaited",
        says="nobody has waited for this TMA load",
    ),
    Defect("K is loaded over a running product", FORWARD, r"k_empty\[\(ring_1.*\]\.wait\(.*\);", ";", "overwrite", schedule="eager"),
    Defect("the next tile is written before the last was read", FORWARD, r"tile_empty\[0\]\.wait\(.*\);", ";", "race", says="tile_smem"),
    Defect(
        "the epilogue races with a load in flight",
        FORWARD,
        r"(void\* O_0 = .*buf_dyn_shmem) \+ \d+\)",
        r"\1 + 0)",
        "overwrite",
        says="K_smem",
    ),
    Defect("the output is staged over a running store", FORWARD, STORE_WAIT, ";", "store source", says="O_0"),
    Defect("the block ends before its store has read", FORWARD, STORE_WAIT, ";", "store source", nth=1, says="the block ends"),
    Defect(
        "no proxy fence before a store", FORWARD, r"tl::fence_proxy_async\(\);(?=\n *tl::__sync_thread)", ";", "proxy fence", says="O_0"
    ),
    Defect("no fence after the barriers are made", BACKWARD, r"tl::fence_barrier_init\(\);", ";", "proxy fence", says="barrier"),
    Defect("no barrier after the barriers are made", FORWARD, r"__syncthreads\(\);", ";", "race", says="initialisation"),
    Defect("no barrier between staging and store", FORWARD, r"tl::__sync_thread_partial\(3, 128\);", ";", "race", nth=1),
    Defect("lse is written past its end", FORWARD, r" LSE\[", " LSE[S_q * H_q + ", "out of bounds", says="argument 4"),
    Defect("more registers than there are", FORWARD, r"warpgroup_reg_dealloc<24>", "warpgroup_reg_dealloc<56>", "registers"),
    Defect("a register count that does not exist", FORWARD, r"warpgroup_reg_alloc<240>", "warpgroup_reg_alloc<236>", "registers"),
    Defect("logits are read before their product is done", FORWARD, r"tl::wait_wgmma<1>\(\);", ";", "wgmma"),
    Defect("no proxy fence before dS is multiplied", BACKWARD, r"tl::fence_proxy_async\(\);(?=\n *tl::__sync_thread)", ";", "proxy fence"),
    Defect("no barrier before dS is multiplied", BACKWARD, r"tl::__sync_thread_partial\(4, 256\);", ";", "race", says="dS_smem"),
    Defect("dQ is written over a running reduction", BACKWARD, r"dq_empty\[0\]\.wait\(.*\);", ";", "store source", says="dQ_smem"),
    Defect("dP is read before its product is done", BACKWARD, r"tl::wait_wgmma<0>\(\);", ";", "wgmma"),
    Defect("Q is given back before its product is done", BACKWARD, r"tl::wait_wgmma<0>\(\);", ";", "overwrite", nth=1, says="Q_smem"),
    Defect("a reduction never waited for", BACKWARD, STORE_WAIT, ";", "store source"),
    Defect("Q and LSE are loaded before they were used", BACKWARD, r"q_empty\[.*\]\.wait\(.*\);", ";", "overwrite", says="Q_smem"),
]


def run(defect_emulator, kernel: str, schedule, check_order: bool = True) -> None:
    entry = catalogue.entries()[kernel]
    with emulated(Machine(schedule, multiprocessors=2), {entry: defect_emulator}, check_order):
        if entry.family == "forward":
            emulation.check_forward(entry, CASES[kernel])
        else:
            emulation.check_backward(entry, CASES[kernel], True)


@pytest.mark.parametrize("kernel", [FORWARD, BACKWARD])
@pytest.mark.parametrize("schedule", ["eager", "lazy", 1])
def test_the_kernels_without_a_defect_are_right(kernel, schedule):
    run(emulation.emulator(catalogue.entries()[kernel]), kernel, schedule)


@pytest.mark.parametrize("defect", DEFECTS, ids=str)
def test_defect_is_caught_and_named(defect):
    planted = emulation.patched(catalogue.entries()[defect.kernel], defect.patch)
    with pytest.raises(EmulationError) as caught:
        run(planted, defect.kernel, defect.schedule)
    assert caught.value.kind == defect.kind, caught.value
    assert defect.says in str(caught.value)
    assert "block (" in str(caught.value)


def test_each_kind_has_a_defect():
    """All kinds but those of a program that never was right: a bad tensor map, a call that the host refuses, something unknown."""
    assert {defect.kind for defect in DEFECTS} == set(KINDS) - {"tma", "host", "unknown"}


def test_a_race_shows_as_a_wrong_value_under_some_seed():
    """Without the checks of order: the schedules themselves tell a good kernel from a racing one."""
    defect = next(d for d in DEFECTS if d.name == "K is loaded over a running product")
    planted = emulation.patched(catalogue.entries()[FORWARD], defect.patch)

    def fails(kernel, seed: int) -> bool:
        try:
            run(kernel, FORWARD, seed, check_order=False)
        except (AssertionError, EmulationError):
            return True
        return False

    assert any(fails(planted, seed) for seed in range(4))
    assert not any(fails(emulation.emulator(catalogue.entries()[FORWARD]), seed) for seed in range(4))
