"""Gates on what nvcc makes of every kernel configuration: a spill or a serialised product costs a quarter of the speed, in silence."""

import importlib.util

import catalogue
import pytest
import resources

ENTRIES = catalogue.entries()
MISSING = resources.missing()
needs_nvcc = pytest.mark.skipif(MISSING is not None, reason=f"{MISSING}: the kernels were not compiled")

GOOD = resources.Resources(registers=168, warpgroups=3, asked=504, spilled=0, products=12, remarks=[], hgmma=96)
SOURCE = """__launch_bounds__(384, 1)
tl::warpgroup_reg_dealloc<24>(); tl::warpgroup_reg_alloc<240>(); tl::warpgroup_reg_alloc<240>(); tl::wgmma_ss<"""
PRODUCT = """#include <cstdint>
extern "C" __global__ void __launch_bounds__(128, 1) probe(float* out, uint64_t a, uint64_t b) {
  float c[4] = {};
  asm volatile("wgmma.fence.sync.aligned;");
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "l"(a), "l"(b));
  c[0] += 1.f;
  asm volatile("wgmma.commit_group.sync.aligned;");
  asm volatile("wgmma.wait_group.sync.aligned 0;");
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = c[i];
}"""
SPILL = """extern "C" __global__ void __launch_bounds__(1024, 2) probe(float* out) {
  float held[64];
  for (int i = 0; i < 64; ++i) held[i] = out[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 64; ++i) out[i * 1024 + threadIdx.x] = held[i] + held[63 - i];
}"""


@pytest.fixture(scope="module")
def committed():
    return resources.committed()


def pytest_generate_tests(metafunc):
    if metafunc.function is test_resources:
        metafunc.parametrize("name", catalogue.chosen(metafunc.config))


@needs_nvcc
def test_resources(name, committed):
    found, wrong, _, _ = resources.gate(name)
    # With a compiler that has no rows, the rules are all there is to hold: test_the_compiler_in_use_has_rows says so
    if found is not None and name in committed:
        fields = resources.moved(committed[name], found)
        wrong += [f"moved: {field}; if it is meant to, run python tests/kernels/resources.py" for field in fields]
    assert not wrong, f"{name}\n" + "\n".join(wrong)


@needs_nvcc
def test_the_compiler_in_use_has_rows(committed):
    if not committed:
        pytest.skip(f"no rows for {resources.versions()}: the kernels' numbers were not compared with any")
    # Of another compiler only the daily kernels need rows; test_every_configuration_has_a_row holds all together
    assert set(committed) >= set(catalogue.representative())


@needs_nvcc
def test_hgmma_is_counted(committed):
    if resources.disassembler() is None:
        pytest.skip(f"no nvdisasm beside nvcc {resources.versions()['nvcc']}: HGMMA was not counted")
    assert resources.measure(PRODUCT).hgmma == 1
    uncounted = [name for name, row in committed.items() if row.hgmma is None]
    assert not uncounted, "run python tests/kernels/resources.py"


@needs_nvcc
def test_ptxas_is_understood():
    """A product whose accumulator is read before its end, and a kernel with more to hold than registers."""
    assert resources.measure(PRODUCT).remarks == ["C7517"]
    assert resources.measure(SPILL).spilled > 0


@needs_nvcc
def test_what_nvcc_refuses(monkeypatch):
    """Its words are one of the messages."""
    refused = SOURCE.replace("240", "236")
    monkeypatch.setattr(catalogue, "code", lambda entry: catalogue.Code(refused, ""))
    found, wrong, _, _ = resources.gate("forward-d64-full-float16")
    assert found is None
    assert [text.split(":")[0] for text in wrong] == ["setmaxnreg 236", "nvcc failed"]


def test_every_configuration_has_a_row():
    assert {row["kernel"] for row in resources.read()} == set(ENTRIES)


def test_hgmma_was_counted_for_some_compiler():
    """For all configurations or for none, and never none in a kernel that has products."""
    rows = [(row["nvcc"], ENTRIES[row["kernel"]].family, row["resources"].get("hgmma")) for row in resources.read()]
    counted = {nvcc for nvcc, _, count in rows if count is not None}
    assert counted
    assert [row for row in rows if (row[2] is not None) != (row[0] in counted)] == []
    assert [row for row in rows if row[1] in resources.PRODUCTS and row[2] == 0] == []


RULES = {
    "setmaxnreg 236": ("<240>", "<236>", {}),
    "setmaxnreg 264": ("<240>", "<264>", {}),
    "setmaxnreg [24, 240]": ("tl::warpgroup_reg_alloc<240>(); tl::wgmma", "tl::wgmma", {}),
    "products 0": ("wgmma_ss", "mma", {}),
    "spilled 40 bytes": ("", "", {"spilled": 40}),
    "remarks ['C7510']": ("", "", {"remarks": ["C7510"]}),
    "asked 504": ("", "", {"registers": 160}),
    "hgmma 0": ("", "", {"hgmma": 0}),
}


@pytest.mark.parametrize("message", RULES)
def test_rule(message):
    old, new, fields = RULES[message]
    (said,) = resources.broken("forward", SOURCE.replace(old, new), GOOD._replace(**fields))
    assert said.split(":")[0] == message


def test_all_broken_rules_are_named():
    found = GOOD._replace(spilled=8, remarks=["C7514"], registers=160, hgmma=0)
    said = resources.broken("backward", SOURCE.replace("<24>", "<20>"), found)
    assert [text.split(":")[0] for text in said] == ["setmaxnreg 20", "spilled 8 bytes", "remarks ['C7514']", "asked 504", "hgmma 0"]
    assert resources.broken("forward", SOURCE, GOOD) == []
    assert resources.broken("preprocess", "__launch_bounds__(256)", GOOD._replace(asked=0, products=0, hgmma=0)) == []


def test_what_moved():
    gates = {"a": resources.Gate(GOOD, [], 0, 0), "b": resources.Gate(GOOD, ["spilled 4 bytes"], 0, 0)}
    said = resources.changes({"a": GOOD._replace(registers=160, hgmma=None), "c": GOOD}, gates)
    assert said == ["a moved: registers 160 -> 168", "b is new", "c is gone", "b BREAKS spilled 4 bytes"]
    assert resources.moved(GOOD, GOOD._replace(hgmma=95)) == ["hgmma 96 -> 95"]


def test_missing_tools_are_named(monkeypatch):
    if importlib.util.find_spec("tilelang"):
        from tilelang.contrib import nvcc

        # As tilelang itself answers without a toolkit, and with CUDA_HOME on a folder that has none
        monkeypatch.setattr(nvcc, "CUDA_HOME", "")
        assert resources.missing().startswith("no nvcc here (Failed to automatically detect CUDA installation")
        monkeypatch.setattr(nvcc, "CUDA_HOME", "/nowhere")
        assert resources.missing() == "no nvcc here (there is no /nowhere/bin/nvcc)"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert resources.missing() == "no tilelang here"
