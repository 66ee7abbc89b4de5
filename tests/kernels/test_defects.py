"""The emulator can fail: defects planted in good kernels, each in one line of the generated CUDA, and each caught for what it is."""

import re
from typing import NamedTuple

import catalogue
import pytest
import torch

from gqa_autograd.testing import Case
from gqa_autograd.testing_varlen import PackedCase

tilelang = pytest.importorskip("tilelang", reason="no tilelang here: no kernel to plant a defect in")
import emulation  # noqa: E402, needs tilelang
from emulation import Machine, emulated  # noqa: E402

from gqa_autograd.kernels import forward  # noqa: E402
from hopper_emulator import KINDS, EmulationError  # noqa: E402

FORWARD, BACKWARD = "forward-d128-causal-bfloat16-lse", "backward-d64-causal-bfloat16"
BACKWARD_PACKED, BACKWARD_SPLIT = "backward-d64-causal-packed-bfloat16", "backward-d64-causal-split-bfloat16"
PREPROCESS, POSTPROCESS, MERGE = "preprocess-d64-m128-bfloat16-dlse", "postprocess-d64-m128-bfloat16", "merge-d64-bfloat16"
PACKED, SPLIT, COMBINE = "forward-d128-causal-packed-bfloat16-lse", "forward-d128-causal-split-bfloat16-lse", "combine-d128-bfloat16-lse"
# Several tiles for each block, several turns of every ring; queries that see no key; fewer key blocks than the three parts
CASES = {
    FORWARD: Case(1, 300, 420, 2, 1, 128, causal=True),
    PACKED: PackedCase((130, 70, 0, 150), (200, 90, 40, 300), 2, 1, 128, causal=True, tail_q=50, tail_kv=60),
    SPLIT: Case(1, 300, 200, 2, 1, 128, causal=True),
    BACKWARD: Case(1, 300, 420, 2, 1, 64, causal=True),
    BACKWARD_PACKED: PackedCase((130, 70, 0, 150), (200, 90, 40, 300), 2, 1, 64, causal=True, tail_q=50, tail_kv=60),
    BACKWARD_SPLIT: Case(1, 300, 420, 2, 1, 64, causal=True),
}
# No error of the emulator: what the kernel computes differs from the truth, or is NaN, or lies where nothing should
WRONG = "wrong result"
STORE_WAIT = r"tl::tma_store_wait<0, true>\(\);"


class Defect(NamedTuple):
    """In the CUDA of `kernel`, what `pattern` finds for the `nth` time (None: each time) becomes `instead`; the emulator must call that
    `kind`."""

    name: str
    kernel: str
    pattern: str
    instead: str
    kind: str
    nth: int | None = 0
    says: str = ""
    schedule: str = "lazy"

    def __str__(self) -> str:
        return self.name.replace(" ", "-")

    def patch(self, source: str) -> str:
        found = list(re.finditer(self.pattern, source))
        assert len(found) > (self.nth or 0), f"the kernel has changed: {self.pattern} is not in it"
        for match in reversed(found) if self.nth is None else [found[self.nth]]:
            start, end = match.span()
            assert "\n" not in source[start:end]
            source = source[:start] + match.expand(self.instead) + source[end:]
        return source


DEFECTS = [
    Defect("a buffer is never given back", FORWARD, r"k_empty\[.*\]\.arrive\(\);", ";", "deadlock", says="k_empty"),
    Defect("a phase that cannot come", FORWARD, r"q_full\[0\]\.init\(1\)", "q_full[0].init(2)", "deadlock", says="1 of 2 arrivals missing"),
    Defect("a tile is never handed on", FORWARD, r"tile_full\[.*\]\.arrive\(\)", "", "deadlock", says="tile_full"),
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
    Defect("nobody waits for V", FORWARD, r"v_full\[\(last.*\]\.wait\(.*\);", ";", "unwaited", says="V_desc"),
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
    Defect(
        "the next tile is written before the last was read",
        FORWARD,
        r"tile_empty\[.*\]\.wait\(.*\);",
        ";",
        "race",
        nth=None,
        says="packet",
    ),
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
    # Any later fence would do, too
    Defect(
        "no fence after the barriers are made",
        BACKWARD,
        r"tl::fence_barrier_init\(\);|tl::fence_proxy_async\(\);",
        ";",
        "proxy fence",
        nth=None,
        says="barrier",
    ),
    Defect("no barrier after the barriers are made", FORWARD, r"__syncthreads\(\);", ";", "race", says="initialisation"),
    Defect("no barrier between staging and store", FORWARD, r"tl::__sync_thread_partial\(\d+, 128\);", ";", "race", nth=1),
    Defect("lse is written past its end", FORWARD, r" LSE\[", " LSE[S_q * H_q + ", "out of bounds", says="argument 4"),
    Defect("more registers than there are", FORWARD, r"warpgroup_reg_dealloc<24>", "warpgroup_reg_dealloc<56>", "registers"),
    Defect("a register count that does not exist", FORWARD, r"warpgroup_reg_alloc<240>", "warpgroup_reg_alloc<236>", "registers"),
    Defect("logits are read before their product is done", FORWARD, r"tl::wait_wgmma<1>\(\);", ";", "wgmma"),
    Defect("no proxy fence before dS is multiplied", BACKWARD, r"tl::fence_proxy_async\(\);(?=\n *tl::__sync_thread)", ";", "proxy fence"),
    Defect("no barrier before dS is multiplied", BACKWARD, r"tl::__sync_thread_partial\(4, 256\);", ";", "race", says="dS_smem"),
    Defect(
        "dQ is written over a running reduction", BACKWARD, r"dq_empty\[.*\]\.wait\(.*\);", ";", "store source", nth=None, says="dQ_smem"
    ),
    Defect("dP is read before its product is done", BACKWARD, r"tl::wait_wgmma<0>\(\);", ";", "wgmma"),
    Defect("Q is given back before its product is done", BACKWARD, r"tl::wait_wgmma<0>\(\);", ";", "overwrite", nth=1, says="Q_smem"),
    Defect("a first sum never waited for", BACKWARD, STORE_WAIT, ";", "store source", says="dQ_smem"),
    Defect("a reduction never waited for", BACKWARD, STORE_WAIT, ";", "store source", nth=1, says="dQ_smem"),
    # The workspace is not cleared before
    Defect("the first sum is added", BACKWARD, r"tl::tma_store\(dQ_sum_desc", "tl::tma_store_add(dQ_sum_desc", WRONG, nth=None, says="dq"),
    Defect(
        "Q is awaited in the other phase",
        BACKWARD,
        r"(\bq_full\[.*\]\.wait)\((.*)\);",
        r"\1((\2 ^ 1));",
        "deadlock",
        nth=None,
        says="q_full[",
    ),
    Defect(
        "dQ is taken in the other phase",
        BACKWARD,
        r"dq_full\[0\]\.wait\((.*)\);",
        r"dq_full[0].wait((\1 ^ 1));",
        "unwritten",
        says="dQ_smem",
    ),
    Defect("the padding of LSE is not written", PREPROCESS, r"LSE2\[.*\] = CUDART_INF_F;", ";", WRONG),
    Defect("the gradient of lse is added", PREPROCESS, r"condval_3 = dLSE\[", "condval_3 = -dLSE[", WRONG, says="d"),
    Defect("a row of dQ beyond the last is written", POSTPROCESS, r"< \(rows_q - ", "< (rows_q + 1 - ", "out of bounds", nth=None),
    Defect("the last part of dK is not added", MERGE, r"p < parts;", "p < parts - 1;", WRONG, says="dk"),
    Defect("the last part of dV is not added", MERGE, r"p_1 < parts;", "p_1 < parts - 1;", WRONG, says="dv"),
    Defect(
        "a part's row beyond the end is stored", BACKWARD_SPLIT, r"\(S_kv - row_1\)\);", "(S_kv - row_1) + 1);", "out of bounds", nth=None
    ),
    *(
        Defect(
            f"the end of {name} is not cleared",
            BACKWARD_PACKED,
            rf"gqa::clear_rows\(.*\){name}_smem.*\);",
            ";",
            WRONG,
            nth=None,
            says="finite",
        )
        for name in ("Q", "dO", "K", "V")
    ),
    Defect("Q and LSE are loaded before they were used", BACKWARD, r"q_empty\[.*\]\.wait\(.*\);", ";", "overwrite", says="Q_smem"),
    Defect("the end of V is not cleared", PACKED, r"gqa::clear_rows\(\(&.*\);", ";", WRONG, says="finite"),
    Defect("the end of V is cleared before it is there", PACKED, r"v_full\[\(done_1 & 1\)\]\.wait\(.*\);", ";", "overwrite", says="V_smem"),
    # TileLang adds fences of its own, one of them behind the clearing
    Defect("no proxy fence after clearing", PACKED, r"tl::fence_proxy_async\(\);", ";", "proxy fence", nth=None, says="V_smem"),
    Defect(
        "no barrier after clearing",
        PACKED,
        rf"tl::__sync_thread_partial\({forward.CLEARED}, 256\);",
        ";",
        "overwrite",
        nth=None,
        says="V_smem",
    ),
    Defect("a packet is overwritten before it is read", PACKED, r"tile_empty\[.*\]\.wait\(.*\);", ";", "race", nth=None, says="packet"),
    Defect("a row beyond the sequence is stored", PACKED, r"(gqa::store_rows\(.*), rows, 2", r"\1, rows + 1, 2", WRONG),
    Defect("whole tiles are stored at a sequence's end", PACKED, r"if \(\(first_1 \+ 64\) <= .*\) \{", "if (true) {", WRONG),
    Defect("lse beyond the sequence is stored", PACKED, r"\+ 64\)\) \{(?=\n *if \(64 <= )", "+ 65)) {", WRONG),
    Defect("keys of the first sequence are read", PACKED, r"= offset\(cu_k, n, rows_kv\);", "= 0;", WRONG),
    Defect("a part without keys is no tile", SPLIT, r"(= max\(.* / parts\)\)), 1\);", r"\1, 0);", WRONG, nth=None),
    Defect("two parts have the same keys", SPLIT, r"(condval\w* =) \(\(number\w* \* part\w*\) / parts\)", r"\1 0", WRONG, nth=None),
    Defect("rows beyond the last are merged", COMBINE, r"< rows\)", "< rows + 16)", "out of bounds", says="argument 1"),
    Defect("the last part is not merged", COMBINE, r"p_1 < parts;", "p_1 < parts - 1;", WRONG),
]


def run(defect_emulator, kernel: str, schedule, check_order: bool = True) -> None:
    planted = catalogue.entries()[kernel]
    with_main = {COMBINE: SPLIT, PREPROCESS: BACKWARD, POSTPROCESS: BACKWARD, MERGE: BACKWARD_SPLIT}
    entry = catalogue.entries()[with_main.get(kernel, kernel)]
    case = CASES[str(entry)]
    with emulated(Machine(schedule, multiprocessors=2), {planted: defect_emulator}, check_order):
        if entry.family == "backward" and entry.tile.form == "packed":
            emulation.check_backward_packed(entry, case, emulation.Backward(), spoiled=(1,))
        elif entry.family == "backward":
            parts = (2, 1) if entry.tile.form == "split" else (1, 1)
            emulation.check_backward(entry, case, True, emulation.Backward(parts))
        elif entry.tile.form == "packed":
            # The third sequence has no queries
            emulation.check_packed(entry, case, spoiled=(2,))
        elif entry.tile.form == "split":
            emulation.check_split(entry, case, return_lse=True, parts=3)
        else:
            emulation.check_forward(entry, case)


@pytest.mark.parametrize("kernel", [FORWARD, PACKED, SPLIT, COMBINE, BACKWARD, BACKWARD_PACKED, BACKWARD_SPLIT])
@pytest.mark.parametrize("schedule", ["eager", "lazy", 1])
def test_the_kernels_without_a_defect_are_right(kernel, schedule):
    run(emulation.emulator(catalogue.entries()[kernel]), kernel, schedule)


@pytest.mark.parametrize("defect", DEFECTS, ids=str)
def test_defect_is_caught_and_named(defect):
    planted = emulation.patched(catalogue.entries()[defect.kernel], defect.patch)
    with pytest.raises(AssertionError if defect.kind == WRONG else EmulationError) as caught:
        run(planted, defect.kernel, defect.schedule)
    assert defect.says in str(caught.value)
    if defect.kind != WRONG:
        assert caught.value.kind == defect.kind, caught.value
        assert "block (" in str(caught.value)


def test_an_offset_that_is_trusted_leads_out_of_the_tensors():
    """The other side of test_emulation.test_offsets_are_not_trusted."""
    trusting = Defect("", PACKED, r"return min\(max\(cu\[n\], 0\), rows\);", "return cu[n];", "out of bounds")
    entry, case = catalogue.entries()[PACKED], PackedCase((100,), (100,), 2, 1, 128)
    cu_seqlens = torch.tensor([0, 40, 90, 130], dtype=torch.int32)
    planted, (q, k, v, *_) = emulation.patched(entry, trusting.patch), emulation.packed_truth(case)[0]
    with emulated(Machine(), {entry: planted}), torch.no_grad(), pytest.raises(EmulationError) as caught:
        emulation.attend_packed(entry.tile, q, k, v, cu_seqlens, cu_seqlens, case, True)
    assert caught.value.kind == trusting.kind, caught.value


def test_each_kind_has_a_defect():
    """All kinds but those of a program that never was right: a bad tensor map, a call that the host refuses, something unknown."""
    assert {defect.kind for defect in DEFECTS} - {WRONG} == set(KINDS) - {"tma", "host", "unknown"}


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
